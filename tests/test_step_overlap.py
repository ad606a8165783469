"""Optimizers whose tensors share memory: states must not; parameters step in order."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from support import assert_equal_bits
from torch import Tensor

from emerging_optimizers import AdamW, Lion, ScalarOptimizer, SimplifiedAdEMAMix
from emerging_optimizers._native import native
from emerging_optimizers.megatron import FusedAdam
from emerging_optimizers.megatron import Lion as MegatronLion

pytestmark = pytest.mark.on_devices("tests-states")

FUSED = [None, False] if native is None else [None, True, False]
every_fused = pytest.mark.parametrize("fused", FUSED, ids=lambda fused: f"fused={fused}")


def parameter(view: Tensor, grad: Tensor | None = None) -> torch.nn.Parameter:
    param = torch.nn.Parameter(view)
    assert param.data_ptr() == view.data_ptr()
    param.grad = torch.randn_like(view) if grad is None else grad
    return param


# ---- states --------------------------------------------------------------------------------------

# What replaces a state of parameter 1 in group 1, and how the message describes both.
Setting = tuple[str, Callable[[list[Tensor], ScalarOptimizer], Tensor], str, str]

AT_0, AT_1 = "param_groups[0]['params'][0]", "param_groups[1]['params'][0]"
STATES: dict[str, Setting] = {
    "another state": (
        "exp_avg", lambda p, o: o.state[p[0]]["exp_avg"], "exp_avg", f"state 'exp_avg' of {AT_0}"),
    "another state of the same parameter": (
        "exp_avg_sq", lambda p, o: o.state[p[1]]["exp_avg"], "exp_avg_sq",
        f"state 'exp_avg' of {AT_1}"),
    "its parameter": ("exp_avg", lambda p, o: p[1].detach(), "exp_avg", AT_1),
    "another parameter": ("exp_avg_sq", lambda p, o: p[0].detach(), "exp_avg_sq", AT_0),
    "its gradient": (
        "exp_avg", lambda p, o: p[1].grad, "exp_avg", f"the gradient of {AT_1}"),
    "another gradient": (
        "exp_avg", lambda p, o: p[0].grad, "exp_avg", f"the gradient of {AT_0}"),
    "a counter": ("step", lambda p, o: o.state[p[0]]["exp_avg"].fill_(2).view(-1)[3], "step",
        f"state 'exp_avg' of {AT_0}"),
}  # fmt: skip


@every_fused
@pytest.mark.parametrize("case", STATES)
def test_states_that_share_memory_are_rejected(case: str, fused: bool | None) -> None:
    params = [parameter(torch.randn(3, 5)) for _ in range(2)]
    optimizer = AdamW([{"params": [p]} for p in params], fused=fused)
    optimizer.step()
    key, make, name, other = STATES[case]
    optimizer.state[params[1]][key] = make(list(params), optimizer)
    tensors = [t for p in params for t in (p, p.grad, *optimizer.state[p].values())]
    before = [(t.clone(), t._version) for t in tensors]
    message = f"state {name!r} of {AT_1} shares memory with {other}, and a state is modified"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        optimizer.step()
    for tensor, (contents, version) in zip(tensors, before, strict=True):
        assert torch.equal(tensor, contents)
        assert tensor._version == version or tensor.dim() == 0


# Even a master at the address of its parameter: a float32 parameter is its own master.
@pytest.mark.parametrize("first", [0, 3], ids=lambda first: f"parameter from {first}")
@every_fused
def test_a_parameter_inside_its_master_is_rejected(fused: bool | None, first: int) -> None:
    memory = torch.randn(5)
    param = parameter(memory.view(torch.bfloat16)[first : first + 5])
    optimizer = AdamW([param], fused=fused, master_weights=True)
    optimizer.step()
    optimizer.state[param]["master_param"] = memory
    before = memory.view(torch.int32).clone()
    with pytest.raises(ValueError, match=r"^state 'master_param' of .* shares memory with param_"):
        optimizer.step()
    assert torch.equal(memory.view(torch.int32), before)
    assert optimizer.state[param]["step"] == 1


@pytest.mark.parametrize("cls", [FusedAdam, MegatronLion])
def test_remainders_inside_their_parameter_are_rejected(cls: Any) -> None:
    param = parameter(torch.randn(5).bfloat16())
    optimizer = cls([param], lr=0.01, master_weights=True, store_param_remainders=True)
    optimizer.step()
    optimizer.state[param]["master_param"] = param.detach().view(torch.int16)
    before = param.detach().clone()
    with pytest.raises(ValueError, match=r"^state 'master_param' of .* shares memory with param_"):
        optimizer.step()
    assert torch.equal(param, before)
    assert optimizer.param_groups[0]["step"] == 1


# The same tensor objects, with no other reference: a step detects them only by counting.
def share(target: dict[str, Tensor], source: dict[str, Tensor]) -> None:
    target["exp_avg_sq"] = source["exp_avg"]


def view_through(wrap: Callable[[Tensor], Tensor]) -> Callable[..., None]:
    def apply(params: list[Any], state: Any) -> None:
        state[params[1]]["exp_avg"] = wrap(params[0].detach())

    return apply


OBJECTS: dict[str, Callable[[list[Any], Any], None]] = {
    "a tensor of two names": lambda p, state: share(state[p[1]], state[p[1]]),
    "a tensor of two parameters": lambda p, state: share(state[p[1]], state[p[0]]),
    "a dictionary": lambda p, state: state.__setitem__(p[1], state[p[0]]),
    "its parameter": lambda p, state: state[p[1]].update(exp_avg=p[1]),
    "another parameter": lambda p, state: state[p[1]].update(exp_avg=p[0]),
    "its gradient": lambda p, state: setattr(p[1], "grad", state[p[1]]["exp_avg"]),
    "another gradient": lambda p, state: setattr(p[0], "grad", state[p[1]]["exp_avg"]),
    "an alias": view_through(Tensor.detach),
    "NumPy": view_through(lambda tensor: torch.from_numpy(tensor.numpy())),
    "DLPack": view_through(torch.from_dlpack),
    "a storage": view_through(lambda t: t.new_empty(0).set_(t.untyped_storage(), 0, t.shape)),
}


@every_fused
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.real) if case in ("DLPack", "a storage") else case
        for case in OBJECTS
    ],
)
def test_shared_objects_are_rejected(case: str, fused: bool | None) -> None:
    if case == "NumPy" and torch.get_default_device().type != "cpu":
        pytest.skip("for tensors on the CPU")
    params = [parameter(torch.randn(15)) for _ in range(2)]
    optimizer = AdamW(params, fused=fused)
    optimizer.step()
    optimizer.step()
    OBJECTS[case](list(params), optimizer.state)
    with pytest.raises(ValueError, match=r"shares memory with .*, and a state is modified"):
        optimizer.step()


@every_fused
@pytest.mark.parametrize("cls", [AdamW, FusedAdam])
def test_a_state_inside_a_gradient_with_gaps(cls: Any, fused: bool | None) -> None:
    """A native step reads a copy of a gradient with gaps."""
    memory = torch.randn(30)
    param = parameter(torch.randn(15), memory[::2])
    optimizer = cls([{"params": [param], "fused": fused}])
    optimizer.step()
    optimizer.state[param]["exp_avg"] = memory[15:]
    before = memory.clone(), param.detach().clone()
    with pytest.raises(ValueError, match=r"state 'exp_avg' of .* shares memory with the gradient"):
        optimizer.step()
    assert torch.equal(memory, before[0])
    assert torch.equal(param, before[1])


@pytest.mark.parametrize("fused", [None, False])
def test_a_state_inside_a_conjugated_gradient(fused: bool | None) -> None:
    memory = torch.randn(15, dtype=torch.complex64)
    param = parameter(torch.randn(15, dtype=torch.complex64), memory.conj())
    optimizer = AdamW([param], fused=fused)
    optimizer.step()
    optimizer.state[param]["exp_avg"] = memory
    before = memory.clone()
    with pytest.raises(ValueError, match=r"state 'exp_avg' of .* shares memory with the gradient"):
        optimizer.step()
    assert torch.equal(memory, before)


@pytest.mark.parametrize("fused", [None, False])
def test_an_earlier_parameter_inside_a_gradient_with_gaps(fused: bool | None) -> None:
    """The gradient is read when its parameter is stepped."""
    found = []
    for is_together in (True, False):
        memory = torch.linspace(-1, 1, 30)
        first, second = parameter(memory, torch.linspace(-1, 1, 30)), parameter(torch.ones(15))
        second.grad = memory[::2]
        if is_together:
            optimizers = [AdamW([first, second], lr=0.1, fused=fused)]
        else:
            optimizers = [AdamW([p], lr=0.1, fused=fused) for p in (first, second)]
        for _ in range(3):
            for optimizer in optimizers:
                optimizer.step()
        found.append([first.detach(), second.detach()])
    torch.testing.assert_close(*found)


@every_fused
def test_states_that_overlap_partly_are_rejected(fused: bool | None) -> None:
    named = [(f"layer{i}.weight", parameter(torch.randn(20))) for i in range(2)]
    optimizer = Lion(named, fused=fused)
    optimizer.step()
    buffer = torch.zeros(39)
    for (_, param), state in zip(named, (buffer[:20], buffer[19:]), strict=True):
        optimizer.state[param]["exp_avg"] = state
    message = (
        "state 'exp_avg' of param_groups[0]['params'][1] ('layer1.weight') shares memory with state"
        " 'exp_avg' of param_groups[0]['params'][0] ('layer0.weight'), and"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        optimizer.step()
    assert not buffer.any()
    # Adjacent states are fine.
    buffer = torch.zeros(40)
    for (_, param), state in zip(named, (buffer[:20], buffer[20:]), strict=True):
        optimizer.state[param]["exp_avg"] = state
    optimizer.step()
    assert bool(buffer.all())


@every_fused
def test_masters_that_share_memory_are_rejected(fused: bool | None) -> None:
    params = [parameter(torch.randn(20).bfloat16()) for _ in range(2)]
    optimizer = AdamW(params, master_weights=True, fused=fused)
    optimizer.step()
    optimizer.state[params[1]]["master_param"] = optimizer.state[params[0]]["exp_avg"].float()
    optimizer.step()
    optimizer.state[params[1]]["master_param"] = optimizer.state[params[0]]["master_param"]
    with pytest.raises(ValueError, match=r"^state 'master_param' of .* shares memory with state"):
        optimizer.step()


def test_a_float32_parameter_is_its_own_master() -> None:
    param = parameter(torch.randn(20))
    optimizer = FusedAdam([param], master_weights=True)
    for _ in range(2):
        optimizer.step()
    assert optimizer.state[param]["master_param"] is param
    assert optimizer.state[param]["step"] == 2


# ---- parameters ----------------------------------------------------------------------------------

Views = Callable[[Tensor], Sequence[Tensor]]
PARAMS: dict[str, Views] = {
    "partly": lambda f: [f[:60], f[40:]],
    "the same memory": lambda f: [f[:60], f[:60]],
    "a chain": lambda f: [f[:40], f[30:70], f[60:], f[10:20]],
    "tied by views": lambda f: [f.view(10, 10), f.view(10, 10)[3], f[50:55], f[35:37]],
    "with gaps": lambda f: [f[::2], f[:60], f[1::2], f[50:]],
    "with gaps, later": lambda f: [f[:60], f[50:], f[::2]],
}


def step_thrice(optimizers: Sequence[ScalarOptimizer]) -> None:
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.step()


@every_fused
@pytest.mark.parametrize("num_groups", ["one group", "groups"])
@pytest.mark.parametrize("kind", PARAMS)
@pytest.mark.parametrize("cls", [AdamW, SimplifiedAdEMAMix], ids=lambda c: c.__name__)
def test_parameters_step_in_order(cls: Any, kind: str, num_groups: str, fused: bool | None) -> None:
    start, noise = torch.randn(100), torch.randn(100)
    results = []
    for is_together in (False, True):
        buffer = start.clone()
        grads = [noise[: view.numel()].view(view.shape) for view in PARAMS[kind](buffer)]
        params = [parameter(v, g) for v, g in zip(PARAMS[kind](buffer), grads, strict=True)]
        has_gaps = not all(param.is_contiguous() for param in params)
        if has_gaps and fused:
            return  # some need the fallback
        groups: Any = params if num_groups == "one group" else [{"params": [p]} for p in params]
        optimizers = [groups] if is_together else [[param] for param in params]
        step_thrice([cls(group, lr=0.1, fused=fused) for group in optimizers])
        results.append(buffer)
    if fused is None and has_gaps:  # parameters after one of the fallback's take the fallback, too
        torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    else:
        assert_equal_bits(results[1], results[0], kind)


@pytest.mark.skipif(native is None, reason="there are no native kernels")
@pytest.mark.parametrize("first", [False, None])
def test_order_between_fallback_and_native_groups(first: bool | None) -> None:
    start, noise = torch.randn(100), torch.randn(60)
    results = []
    for is_together in (False, True):
        buffer = start.clone()
        params = [parameter(view, noise) for view in (buffer[:60], buffer[40:])]
        groups = [
            {"params": [params[0]], "fused": first},
            {"params": [params[1]], "fused": None if first is False else False},
        ]
        optimizers = (
            [AdamW(groups, lr=0.1)] if is_together else [AdamW([g], lr=0.1) for g in groups]
        )
        for _ in range(3):
            for optimizer in optimizers:
                optimizer.step()
        results.append(buffer)
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


@every_fused
def test_large_parameters(fused: bool | None) -> None:
    # Of several threads' shares each.
    n = 200_000
    start, noise = torch.randn(2 * n), torch.randn(n)
    results = []
    for is_together in (False, True):
        buffer = start.clone()
        params = [parameter(v, noise) for v in (buffer[:n], buffer[1 : n + 1], buffer[n:])]
        if is_together:
            Lion(params, lr=0.1, fused=fused).step()
        else:
            for param in params:
                Lion([param], lr=0.1, fused=fused).step()
        results.append(buffer)
    assert_equal_bits(results[1], results[0], "buffer")


@every_fused
@pytest.mark.parametrize("is_decoupled", [False, True], ids=["grad", "decoupled_grad"])
def test_a_parameter_that_is_the_gradient_of_another(
    is_decoupled: bool, fused: bool | None
) -> None:
    name = "decoupled_grad" if is_decoupled else "grad"
    # Of several threads' shares each.
    start, noise = torch.randn(2, 2, 200_000)
    results = []
    for is_together in (False, True):
        params: list[Any] = [torch.nn.Parameter(row.clone(), requires_grad=False) for row in start]
        optimizers: list[ScalarOptimizer] = [
            FusedAdam(some, lr=0.1, use_decoupled_grad=True)
            if is_decoupled
            else AdamW(some, lr=0.1, fused=fused)
            for some in ([params] if is_together else [params[:1], params[1:]])
        ]
        for param, grad in zip(params, noise, strict=True):
            setattr(param, name, grad.clone())
        for optimizer in optimizers:
            optimizer.step()
        setattr(params[1], name, params[0])
        for optimizer in optimizers:
            optimizer.step()
        results.append(torch.cat(params))
    assert_equal_bits(results[1], results[0], "parameters")


@every_fused
def test_gradients_in_parameters(fused: bool | None) -> None:
    start = torch.randn(100)
    for first, second in [
        ((slice(0, 40), slice(50, 90)), (slice(60, 100), slice(0, 40))),  # each other's
        ((slice(0, 40), slice(0, 40)), (slice(50, 90), slice(50, 90))),  # their own
        ((slice(0, 40), slice(4, 44)), (slice(50, 90), slice(46, 86))),  # partly
    ]:
        expected, buffer = start.clone(), start.clone()
        for param, grad in (first, second):
            own = parameter(expected[param], expected[grad].clone())
            AdamW([own], lr=0.1, fused=fused).step()
        params = [parameter(buffer[param], buffer[grad]) for param, grad in (first, second)]
        AdamW(params, lr=0.1, fused=fused).step()
        assert_equal_bits(buffer, expected, f"{first}, {second}")


@every_fused
def test_complex_parameters(fused: bool | None) -> None:
    start, noise = torch.randn(50, dtype=torch.complex64), torch.randn(30, dtype=torch.complex64)
    results = []
    for is_together in (False, True):
        buffer = start.clone()
        params = [parameter(view, noise) for view in (buffer[:30], buffer[20:])]
        for group in [params] if is_together else [[p] for p in params]:
            AdamW(group, lr=0.1, fused=fused).step()
        results.append(buffer)
    assert_equal_bits(torch.view_as_real(results[1]), torch.view_as_real(results[0]), "buffer")


@every_fused
def test_columns_as_states_share_nothing(fused: bool | None) -> None:
    if fused:
        return  # states with gaps are the fallback's
    params = [parameter(torch.randn(20)) for _ in range(3)]
    expected = [parameter(p.detach().clone(), p.grad) for p in params]
    optimizer, other = (AdamW(ps, lr=0.1, fused=fused) for ps in (params, expected))
    for step in range(2):
        optimizer.step()
        other.step()
        if step == 0:
            matrix = torch.stack([optimizer.state[p]["exp_avg"] for p in params], 1)
            for param, column in zip(params, matrix.T, strict=True):
                optimizer.state[param]["exp_avg"] = column
    for param, wanted in zip(params, expected, strict=True):
        torch.testing.assert_close(param, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize("fused", [None, False])
def test_a_parameter_twice_in_a_group(fused: bool | None) -> None:
    noise, start = torch.randn(20), torch.randn(20)
    param, other = parameter(start.clone(), noise), parameter(start.clone(), noise)
    optimizer, once = AdamW([param, param], fused=fused), AdamW([other], fused=fused)
    for _ in range(2):
        optimizer.step()
        once.step()
        once.step()
    assert optimizer.state[param]["step"] == once.state[other]["step"] == 4
    torch.testing.assert_close(param, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("fused", [None, False])
def test_a_parameter_that_is_in_two_groups(fused: bool | None) -> None:
    """torch checks groups when they are added, but not later changes."""
    noise, start = torch.randn(20), torch.randn(20)
    param, other = parameter(start.clone(), noise), parameter(start.clone(), noise)
    others = [parameter(torch.randn(5)) for _ in range(2)]
    optimizer = AdamW([{"params": [param]}, {"params": others, "lr": 0.1}], fused=fused)
    optimizer.param_groups[1]["params"].insert(1, param)
    once = AdamW([other], fused=fused)
    for _ in range(2):
        optimizer.step()
        for lr in (1e-3, 0.1):
            once.param_groups[0]["lr"] = lr
            once.step()
    assert optimizer.state[param]["step"] == once.state[other]["step"] == 4
    torch.testing.assert_close(param, other, rtol=1e-6, atol=1e-7)
    assert [optimizer.state[p]["step"] for p in others] == [2, 2]


@every_fused
def test_shared_counters(fused: bool | None) -> None:
    params = [parameter(torch.randn(20)) for _ in range(3)]
    optimizer = AdamW(params, fused=fused)
    optimizer.step()
    counter = optimizer.state[params[0]]["step"]
    for param in params:
        optimizer.state[param]["step"] = counter
    for _ in range(2):
        optimizer.step()
    assert [float(optimizer.state[param]["step"]) for param in params] == [3.0] * 3
