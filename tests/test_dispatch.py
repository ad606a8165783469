"""Which eager calls go through PyTorch's dispatcher: only those that need it.

A kernel that only marks updates replaces an operator's native one. Calls through the dispatcher
mark their updates; calls that bypass it compute them.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from oracle import RULES, Rule
from support import (
    MIXES,
    Operands,
    assert_equal_bits,
    call,
    every_rule,
    make_operands,
    needs_native,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = needs_native
MARK = 42.0
ADAM = RULES["adam"]
COUNT = 5


@pytest.fixture(autouse=True)
def _on_cpu(_default_device: None) -> Iterator[None]:
    with torch.device("cpu"):
        yield


def mark(updates: list[Tensor], *arguments: Any, **options: Any) -> None:
    with torch.no_grad():
        for update in updates:
            update.fill_(MARK)


@contextlib.contextmanager
def marking_kernel(rule: Rule) -> Iterator[None]:
    """Let the dispatcher mark updates instead of computing them."""
    with torch.library._scoped_library(rule.operator.namespace, "IMPL") as library:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
            library.impl(f"{rule.name}_update_", mark, "CPU")
        yield


def operands_of(rule: Rule, count: int = COUNT) -> list[Operands]:
    return [make_operands(rule, (2, 3), MIXES["float32"], seed=i) for i in range(count)]


def is_dispatched(rule: Rule, operands: Any, case: Any = None, out: Any = None) -> bool:
    """Call, and return whether the dispatcher has called the operator's kernel."""
    with marking_kernel(rule):
        updates = call(rule, case or rule.usual, operands, out=out)
    updates = [updates] if isinstance(updates, Tensor) else updates
    marks = {bool((update.detach() == MARK).all()) for update in updates}
    assert len(marks) == 1
    return marks.pop()


# ---- around the dispatcher -----------------------------------------------------------------------


@every_rule
@pytest.mark.parametrize("count", [None, 1, 300], ids=["single", "one", "many"])
def test_ordinary_calls_bypass_it(rule: Rule, count: int | None) -> None:
    operands = operands_of(rule, count or 1)
    assert not is_dispatched(rule, operands if count else operands[0])
    out = [torch.empty(2, 3) for _ in operands]
    assert not is_dispatched(rule, operands, out=out)
    assert not is_dispatched(rule, operands, out=[each.grad for each in operands])


CONTEXTS: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu"),
    "a default device": lambda: torch.device("cpu"),
    "hooks of saved tensors": lambda: torch.autograd.graph.save_on_cpu(),
}


@pytest.mark.parametrize("name", list(CONTEXTS))
def test_modes_that_do_not_need_it(name: str) -> None:
    operands = operands_of(ADAM)
    out = [torch.empty(2, 3) for _ in operands]
    with CONTEXTS[name]():
        assert not is_dispatched(ADAM, operands, out=out)


def test_ordinary_tensors_of_all_kinds() -> None:
    grad = torch.rand(2, 3, requires_grad=True) * 2  # with autograd history
    states = [nn.Parameter(torch.rand(2, 3)), torch.rand(2, 6)[:, ::2]]
    for operands in (Operands(grad, states), Operands(grad.half(), [*states[:1], grad.data * 2])):
        assert not is_dispatched(ADAM, operands)
        assert not is_dispatched(ADAM, [operands_of(ADAM, 1)[0], operands])
    case = {**ADAM.usual, "step": torch.tensor(3)}
    assert not is_dispatched(ADAM, operands_of(ADAM), case)


# ---- through the dispatcher ----------------------------------------------------------------------


class Seen(TorchDispatchMode):
    """Records each operator."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class Wrapped(Tensor):
    """A subclass that handles operations in Python, by those of a wrapped tensor."""

    inner: Tensor
    names: list[str] = []  # noqa: RUF012

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapped":
        wrapped = Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device, strides=inner.stride()
        )
        wrapped.inner = inner
        return wrapped

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        cls.names.append(str(function))
        args, kwargs = torch.utils._pytree.tree_map(unwrap, (args, kwargs or {}))
        return function(*args, **kwargs)


def unwrap(value: Any) -> Any:
    return value.inner if isinstance(value, Wrapped) else value


def results(rule: Rule, operands: list[Operands], out: Any = None) -> list[Tensor]:
    updates = call(rule, rule.usual, operands, out=out)
    tensors = [*updates, *(state for position in operands for state in position.states)]
    return [unwrap(tensor) for tensor in tensors]


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
@every_rule
def test_profilers(rule: Rule) -> None:
    with torch.profiler.profile():
        assert is_dispatched(rule, operands_of(rule))
    wanted = results(rule, operands_of(rule))
    with torch.profiler.profile():
        got = results(rule, operands_of(rule))
    for a, b in zip(got, wanted, strict=True):
        assert_equal_bits(a, b, "under a profiler")
    # No profiler is active any more.
    assert not is_dispatched(rule, operands_of(rule))


@every_rule
def test_dispatch_modes(rule: Rule) -> None:
    with Seen():
        assert is_dispatched(rule, operands_of(rule))
    wanted = results(rule, operands_of(rule))
    operands = operands_of(rule)
    with Seen() as seen:
        got = results(rule, operands)
    assert seen.names.count(str(rule.operator)) == 1
    for a, b in zip(got, wanted, strict=True):
        assert_equal_bits(a, b, "under a mode")


@every_rule
@pytest.mark.parametrize("position", [0, COUNT - 1])
def test_one_subclass_in_each_list(rule: Rule, position: int) -> None:
    wanted = results(rule, operands_of(rule), [torch.empty(2, 3) for _ in range(COUNT)])
    for k in range(len(rule.states) + 2):
        operands = operands_of(rule)
        out: list[Any] = [torch.empty(2, 3) for _ in operands]
        chosen = operands[position]
        if k == 0:
            chosen.grad = Wrapped(chosen.grad)
        elif k <= len(rule.states):
            chosen.states[k - 1] = Wrapped(chosen.states[k - 1])
        else:
            out[position] = Wrapped(out[position])
        Wrapped.names.clear()
        got = results(rule, operands, out)
        assert Wrapped.names == [str(rule.operator)], k
        for a, b in zip(got, wanted, strict=True):
            assert_equal_bits(a, b, f"list {k}")


def test_a_subclass_as_the_step() -> None:
    wanted = results(ADAM, operands_of(ADAM))
    Wrapped.names.clear()
    operands = operands_of(ADAM)
    case = {**ADAM.usual, "step": Wrapped(torch.tensor(ADAM.usual["step"]))}
    updates = call(ADAM, case, operands)
    assert Wrapped.names == [str(ADAM.operator)]
    for a, b in zip(updates, wanted, strict=False):
        assert_equal_bits(a, b, "update")


@pytest.mark.parametrize("position", [None, 0, COUNT - 1])
def test_lazy_gradients(position: int | None) -> None:
    """Lazily negated gradients, and gradients without memory."""
    lazy = torch.complex(torch.rand(2, 3), torch.rand(2, 3)).conj().imag
    assert lazy.is_neg()
    for grad in (lazy, torch._efficientzerotensor(2, 3)):
        operands = operands_of(ADAM)
        chosen = operands[position or 0]
        chosen.grad = grad
        same = [each.clone() for each in operands]
        same[position or 0].grad = torch.zeros(2, 3) + grad
        mine: Any = [chosen] if position is None else operands
        theirs: Any = [same[0]] if position is None else same
        assert is_dispatched(ADAM, [each.clone() for each in theirs]) is False
        for a, b in zip(results(ADAM, mine), results(ADAM, theirs), strict=True):
            assert_equal_bits(a, b, str(position))


def test_inference_tensors_beside_others() -> None:
    """Outside inference mode, an inference tensor may be read, but not modified."""
    with torch.inference_mode():
        grad, state = torch.rand(2, 3), torch.rand(2, 3)
        assert is_dispatched(ADAM, Operands(grad, [state.clone(), state.clone()]))
    operands = operands_of(ADAM)
    operands[3].grad = grad
    assert is_dispatched(ADAM, operands)
    operands = operands_of(ADAM)
    same = operands_of(ADAM)
    operands[3].grad, same[3].grad = grad, grad.clone()
    for a, b in zip(results(ADAM, operands), results(ADAM, same), strict=True):
        assert_equal_bits(a, b, "an inference tensor as a gradient")
    operands[3].states[1] = state
    before = [[t.clone() for t in each] for each in operands]
    with pytest.raises(RuntimeError, match=r"exp_avg_sqs\[3\] is an inference tensor"):
        results(ADAM, operands)
    for each, old in zip(operands, before, strict=True):
        for a, b in zip(each, old, strict=True):
            assert_equal_bits(a, b, "operand")


# ---- transforms ----------------------------------------------------------------------------------


def transformed(rule: Rule, states: list[Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda grad: call(rule, rule.usual, Operands(grad, states))


@every_rule
def test_vmap(rule: Rule) -> None:
    operands = operands_of(rule, 1)[0]
    before = operands.clone()

    def function(grad: Tensor, *states: Tensor) -> Tensor:
        return call(rule, rule.usual, Operands(grad, list(states)))

    with pytest.raises(RuntimeError, match="Batching rule not implemented for emerging_optimizers"):
        torch.vmap(function)(*operands)
    for a, b in zip(operands, before, strict=True):
        assert_equal_bits(a, b, "operand")


@every_rule
def test_functionalize(rule: Rule) -> None:
    """torch.func.functionalize rejects operators with lists, and nothing changes."""
    operands = operands_of(rule, 1)[0]
    before = operands.clone()
    with pytest.raises(RuntimeError, match="emerging_optimizers"):
        torch.func.functionalize(transformed(rule, operands.states))(operands.grad)
    for a, b in zip(operands, before, strict=True):
        assert_equal_bits(a, b, "operand")


@every_rule
def test_derivatives(rule: Rule) -> None:
    """Updates are not differentiable: no gradient flows through them."""
    operands, same = operands_of(rule, 1)[0], operands_of(rule, 1)[0]
    wanted = call(rule, rule.usual, same)

    def loss(grad: Tensor) -> tuple[Tensor, Tensor]:
        update = transformed(rule, operands.states)(grad)
        return (grad * 3 + update).sum(), update

    derivative, update = torch.func.grad(loss, has_aux=True)(operands.grad)
    assert_equal_bits(derivative, torch.full_like(derivative, 3.0), "derivative")
    assert_equal_bits(update, wanted, "update")
    for a, b in zip(operands.states, same.states, strict=True):
        assert_equal_bits(a, b, "state")
