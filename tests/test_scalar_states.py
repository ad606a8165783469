"""Scalar states of rules in calls."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from scalar_rules import (
    Float64NAdam,
    inference_tensor,
    randn,
    scalar,
    scalar_averages,
    scalar_nadam,
    scalar_phases,
    without_memory,
)
from support import assert_equal_bits, assert_near, needs_native
from test_rule_definitions import every_mode, in_mode
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.fx.experimental.proxy_tensor import make_fx

import emerging_optimizers as eo

pytestmark = [
    pytest.mark.usefixtures("_no_other_device", "_quick_builds"),
    # Compiling raises warnings about code of torch itself.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
MODES = ("compiled", "interpreted", "fallback")


def nadam_operands(*shape: int, dtype: torch.dtype = F32) -> list[Tensor]:
    grad = randn(*shape, dtype=dtype)
    return [grad, torch.zeros_like(grad), torch.zeros_like(grad)]


# ---- values --------------------------------------------------------------------------------------


@every_mode
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("form", ["single", "list"])
def test_nadam(mode: str, dtype: torch.dtype, form: str) -> None:
    call = in_mode(scalar_nadam, mode)
    shapes = [(3, 5)] if form == "single" else [(3, 5), (), (0, 2), (1025,)]
    states = [[torch.zeros(s, dtype=dtype) for s in shapes] for _ in range(2)]
    oracles = [Float64NAdam(shape) for shape in shapes]
    product = scalar()
    for step in range(1, 7):
        grads = [randn(*s, seed=step, dtype=dtype) for s in shapes]
        lists = [grads, *states] if form == "list" else [grads[0], *(s[0] for s in states)]
        updates = call(*lists, mu_product=product, step=step)
        tolerance = 1e-12 if dtype == F64 else 5e-6
        for i, (update, oracle) in enumerate(
            zip(updates if form == "list" else [updates], oracles, strict=True)
        ):
            assert_near(update, oracle.update(grads[i]), tolerance)
            assert_near(states[0][i], oracle.exp_avg, tolerance)
        assert product.item() == oracles[0].mu_product
        assert product._version == step


SPECIAL = [1.0, 0.0, -0.0, 0.55, 1e-45, 3e38, -3e38, math.inf, -math.inf, math.nan, 0.1, 0.3]


def outcomes(rule: Any, mode: str, first: float, dtype: torch.dtype) -> list[Tensor]:
    """The updates, states and scalar states after three calls."""
    call, names = in_mode(rule, mode), rule.scalar_states
    scalars = {name: scalar(first + i) for i, name in enumerate(names)}
    lists = [[randn(5, 7, seed=i, dtype=dtype)] for i in range(1 + len(rule.states))]
    updates = [call(*lists, **scalars)[0] for _ in range(3)]
    return [*updates, *(tensor for each in lists for tensor in each), *scalars.values()]


@needs_native
@pytest.mark.parametrize("first", SPECIAL)
@pytest.mark.parametrize("rule", [scalar_averages, scalar_phases], ids=lambda rule: rule.name)
def test_modes_have_the_same_bits(rule: Any, first: float) -> None:
    for dtype in (F32, F64, BF16):
        wanted = outcomes(rule, "fallback", first, dtype)
        for mode in ("compiled", "interpreted"):
            for i, pair in enumerate(zip(outcomes(rule, mode, first, dtype), wanted, strict=True)):
                assert_equal_bits(*pair, f"{mode} tensor {i}")


@every_mode
def test_several_scalars(mode: str) -> None:
    call = in_mode(scalar_averages, mode)
    grad, exp_avg = torch.tensor([2.0]), torch.tensor([4.0])
    total, scale, previous = scalar(3.0), scalar(0.25), scalar(7.0)
    update = call(grad, exp_avg, total=total, scale=scale, previous=previous, beta=0.5)
    assert exp_avg.item() == 0.5 * 4 + 0.5 * 2 * 0.25
    assert update.item() == exp_avg.item() - 7 * 2
    assert (total.item(), scale.item(), previous.item()) == (3.25, 0.125, 3.0)


@every_mode
@pytest.mark.parametrize(
    ("before", "factor", "after"),
    [
        (1.0, 1.0, 0.5),
        (0.5, -1.0, 0.25),
        (0.6, 0.6, 0.3),  # just above 0.6 in float32
        (0.25, 0.0, 1.25),
        (-math.inf, 0.0, -math.inf),
        (math.inf, math.inf, math.inf),
        (math.nan, 0.5, 1.0),
    ],
)
def test_conditions(mode: str, before: float, factor: float, after: float) -> None:
    mu = scalar(before)
    update = in_mode(scalar_phases, mode)(torch.ones(3), mu=mu)
    assert update.tolist() == [np.float32(factor)] * 3
    assert mu.item() == np.float32(after)


@every_mode
def test_none_leaves_out_at_zero(mode: str) -> None:
    mu, out = scalar(0.125), torch.full((3,), 5.0)
    assert in_mode(scalar_phases, mode)(torch.ones(3), mu=mu, out=out) is out
    assert out.tolist() == [0.0] * 3
    assert mu.item() == 1.125


@eo.rule
def scalar_extremes(grad, *, factor=1.0, value: eo.ScalarState = 1.0):
    return grad * value, value * factor * factor * factor


@every_mode
def test_overflow_rounds_to_infinity(mode: str) -> None:
    call = in_mode(scalar_extremes, mode)
    for value, factor, after in [
        (1.0, 1e30, math.inf),
        (-1.0, 1e100, -math.inf),
        (1.0, 1e-100, 0.0),
        (math.inf, 2.0, math.inf),
        (math.nan, 2.0, math.nan),
        (0.0, math.inf, math.nan),
        (1.0, 6.982e12, math.inf),
        (1.0, 6.981e12, np.float32(6.981e12**3)),
        (16777217.0, 1.0, 16777216.0),  # rounded as it is stored
    ]:
        tensor = scalar(value)
        update = call(torch.ones(2), value=tensor, factor=factor)
        np.testing.assert_equal(tensor.item(), float(after))
        np.testing.assert_equal(update.tolist(), [np.float32(value)] * 2)


@eo.rule
def scalar_flags(grad, *, use: bool = True, count: eo.ScalarState = 0):
    if not use:
        return grad, False
    return grad * count, max(count, 2) if count > 1 else count + True


@every_mode
def test_flags_and_whole_numbers_as_values(mode: str) -> None:
    count = scalar(0.0)
    seen = []
    for _ in range(4):
        in_mode(scalar_flags, mode)(torch.ones(1), count=count)
        seen.append(count.item())
    assert seen == [1.0, 2.0, 2.0, 2.0]
    in_mode(scalar_flags, mode)(torch.ones(1), count=count, use=False)
    assert count.item() == 0.0


@every_mode
def test_lists_and_empty_tensors(mode: str) -> None:
    call = in_mode(scalar_nadam, mode)
    product = scalar(0.5)
    assert call([], [], [], mu_product=product, step=1) == []
    assert (product.item(), product._version) == (0.5, 0)
    update = call(*nadam_operands(0, 3), mu_product=product, step=1)
    assert update.shape == (0, 3)
    once = product.item()
    assert 0.2 < once < 0.25
    # Once for a list, however long.
    product = scalar(0.5)
    lists = [[t.clone() for _ in range(300)] for t in nadam_operands(3)]
    updates = call(*lists, mu_product=product, step=1)
    assert product.item() == once
    assert all(torch.equal(update, updates[0]) for update in updates)


@every_mode
def test_step_tensors(mode: str) -> None:
    call = in_mode(scalar_nadam, mode)
    for step in (torch.tensor(3), torch.tensor(3.0)):
        product, other = scalar(0.5), scalar(0.5)
        got = call(*nadam_operands(4), mu_product=product, step=step)
        assert_equal_bits(got, call(*nadam_operands(4), mu_product=other, step=3), "update")
        assert torch.equal(product, other)
        assert step == 3


def parameter(value: float) -> Tensor:
    return torch.nn.Parameter(scalar(value))


def view(value: float) -> Tensor:
    return torch.full((3, 2), value)[1, 1]


def subclass(value: float) -> Tensor:
    return scalar(value).as_subclass(type("Subclass", (Tensor,), {}))


def copy_on_write(value: float) -> Tensor:
    original = scalar(value)
    lazy = torch._lazy_clone(original)
    lazy.original = original  # type: ignore[attr-defined]
    return lazy


@every_mode
@pytest.mark.parametrize("kind", [parameter, view, subclass, copy_on_write])
def test_kinds_of_tensors(mode: str, kind: Callable[[float], Tensor]) -> None:
    tensor, other = kind(0.5), scalar(0.5)
    before = tensor._version
    call = in_mode(scalar_nadam, mode)
    update = call(*nadam_operands(4), mu_product=tensor, step=1)
    assert_equal_bits(update, call(*nadam_operands(4), mu_product=other, step=1), "update")
    assert not update.requires_grad
    assert tensor.item() == other.item()
    assert tensor._version > before
    if kind is copy_on_write:
        assert tensor.original == 0.5  # type: ignore[attr-defined]


@every_mode
def test_autograd_sees_the_modification(mode: str) -> None:
    factor, product = torch.ones((), requires_grad=True), scalar()
    loss = factor * product
    in_mode(scalar_nadam, mode)(*nadam_operands(4), mu_product=product, step=1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_mode
def test_inference_mode(mode: str) -> None:
    with torch.inference_mode():
        product = scalar()
        in_mode(scalar_nadam, mode)(*nadam_operands(4), mu_product=product, step=1)
    assert 0.44 < product.item() < 0.46


# ---- errors --------------------------------------------------------------------------------------


def _of(dtype: str, dimensions: int) -> str:
    return (
        f"mu_product is a tensor of dtype {dtype} with {dimensions} dimensions; expected a 0-dim"
        " tensor of dtype float32"
    )


def _no(kind: str) -> str:
    return f"mu_product must be a 0-dim tensor of dtype float32, not {kind}"


WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a float": (lambda: 1.0, TypeError, _no("float")),
    "an int": (lambda: 1, TypeError, _no("int")),
    "None": (lambda: None, TypeError, _no("NoneType")),
    "a list": (lambda: [scalar()], TypeError, _no("list")),
    "numpy": (lambda: np.float32(1), TypeError, _no("float32")),
    "an array": (lambda: np.ones(()), TypeError, _no("ndarray")),
    "float64": (lambda: scalar(dtype=F64), TypeError, _of("float64", 0)),
    "bfloat16": (lambda: scalar(dtype=BF16), TypeError, _of("bfloat16", 0)),
    "int64": (lambda: torch.tensor(1), TypeError, _of("int64", 0)),
    "complex": (lambda: torch.tensor(1j), TypeError, _of("complex64", 0)),
    "bool": (lambda: torch.tensor(True), TypeError, _of("bool", 0)),
    "one dimension": (lambda: torch.ones(1), TypeError, _of("float32", 1)),
    "two dimensions": (lambda: torch.ones(2, 2), TypeError, _of("float32", 2)),
    "sparse": (
        lambda: torch.ones(()).to_sparse(),
        TypeError,
        "mu_product has layout Sparse; expected a strided (dense) tensor",
    ),
    "negated": (
        lambda: torch._neg_view(scalar()),
        RuntimeError,
        "mu_product is a lazily negated view; pass resolve_neg() of it",
    ),
    "meta": (
        lambda: scalar(device="meta"),
        TypeError,
        "mu_product is on meta but grad is on cpu",
    ),
    "inference": (
        inference_tensor,
        RuntimeError,
        "mu_product is an inference tensor, which cannot be modified outside of inference mode",
    ),
    "no memory": (
        without_memory,
        ValueError,
        "mu_product has no memory: its storage was resized to 0",
    ),
}


@every_mode
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_tensors(mode: str, wrong: str) -> None:
    make_it, error, text = WRONG[wrong]
    operands, value = nadam_operands(4), make_it()
    before = [tensor.clone() for tensor in operands]
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        in_mode(scalar_nadam, mode)(*operands, mu_product=value, step=1)
    for got, wanted in zip(operands, before, strict=True):
        assert torch.equal(got, wanted)
        assert got._version == 0


SHARED = (
    "mu_product shares memory with another tensor of the call, and is modified in place; give it"
    " separate memory (.clone())"
)


@every_mode
@pytest.mark.parametrize("with_what", ["grad", "exp_avg", "exp_avg_sq", "out", "step", "overlap"])
def test_shared_memory(mode: str, with_what: str) -> None:
    operands = nadam_operands(4)
    names = ("grad", "exp_avg", "exp_avg_sq")
    out: Tensor | None = torch.zeros(4) if with_what == "out" else None
    step: Any = scalar(2.0) if with_what == "step" else 2
    if with_what == "step":
        product = step
    elif with_what == "overlap":  # at another offset
        buffer = torch.zeros(5)
        operands[1], product = buffer[:4], buffer.as_strided((), (), 3)
    else:
        product = (out if out is not None else operands[names.index(with_what)])[2]
    before = [tensor.clone() for tensor in (*operands, product)]
    with pytest.raises(ValueError, match=f"^{re.escape(SHARED)}$"):
        in_mode(scalar_nadam, mode)(*operands, mu_product=product, step=step, out=out)
    for got, wanted in zip((*operands, product), before, strict=True):
        assert torch.equal(got, wanted)


@every_mode
def test_shared_by_two_scalars(mode: str) -> None:
    call, one = in_mode(scalar_averages, mode), scalar()
    exp_avg = torch.zeros(2)
    with pytest.raises(ValueError, match=r"^(total|previous) shares memory with another"):
        call(torch.ones(2), exp_avg, total=one, scale=scalar(), previous=one)
    assert (one.item(), exp_avg.tolist()) == (1.0, [0.0, 0.0])
    # Neighbours in memory are not shared.
    a, b, c = torch.tensor([0.0, 1.0, 2.0]).unbind()
    call(torch.ones(2), exp_avg, total=a, scale=b, previous=c)
    assert (a.item(), b.item(), c.item()) == (1.0, 0.5, 0.0)


@every_mode
def test_missing_and_unknown_arguments(mode: str) -> None:
    call, operands = in_mode(scalar_nadam, mode), nadam_operands(4)
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'mu_product'"):
        call(*operands, step=1)
    with pytest.raises(TypeError, match="positional"):
        call(*operands, scalar(), step=1)


@every_mode
def test_other_errors_leave_the_scalar(mode: str) -> None:
    call, product = in_mode(scalar_nadam, mode), scalar()
    grad, exp_avg, exp_avg_sq = nadam_operands(4)
    with pytest.raises(ValueError, match="step is 0; expected step >= 1"):
        call(grad, exp_avg, exp_avg_sq, mu_product=product, step=0)
    with pytest.raises(ValueError, match=r"exp_avg has shape \(3,\) but grad has shape \(4,\)"):
        call(grad, torch.zeros(3), exp_avg_sq, mu_product=product, step=1)
    with pytest.raises(ValueError, match="exp_avg_sq shares memory with exp_avg"):
        call(grad, exp_avg, exp_avg, mu_product=product, step=1)
    lists = [exp_avg, torch.zeros(3)], [exp_avg_sq, torch.zeros(4)]
    with pytest.raises(ValueError, match=r"exp_avgs\[1\] has shape"):
        call([grad, grad], *lists, mu_product=product, step=1)
    assert (product.item(), product._version) == (1.0, 0)
    assert exp_avg.tolist() == [0.0] * 4


# ---- tracers -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A mesh of this process alone."""
    store = tmp_path_factory.mktemp("mesh") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@every_mode
def test_dtensors(mode: str, mesh: Any) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    call = in_mode(scalar_nadam, mode)
    product, other = scalar(), scalar()
    whole = nadam_operands(4, 3)
    operands = [distribute_tensor(t.clone(), mesh, [Shard(0)]) for t in whole]
    # A plain tensor beside DTensors, in a list of both.
    lists = [[a, b] for a, b in zip(operands, nadam_operands(2), strict=True)]
    first, second = call(*lists, mu_product=product, step=1)
    wanted = call(*whole, mu_product=other, step=1)
    assert_equal_bits(first.full_tensor(), wanted, "update")
    assert product.item() == other.item()
    assert type(product) is type(second) is Tensor
    distributed = distribute_tensor(scalar(), mesh, [Replicate()])
    text = "^mu_product is a DTensor; expected a plain tensor, the same on all processes$"
    for tensors in (operands, nadam_operands(4)):
        before = [tensor.clone() for tensor in tensors]
        with pytest.raises(TypeError, match=text):
            call(*tensors, mu_product=distributed, step=1)
        assert all(map(torch.equal, tensors, before))


@needs_native
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile(backend: str) -> None:
    torch._dynamo.reset()

    def train(lists: list[list[Tensor]], product: Tensor, step: int) -> Any:
        updates = scalar_nadam(*lists, mu_product=product * 1.0, step=step)
        return updates, scalar_nadam(*lists, mu_product=product, step=step), product + 1

    compiled = torch.compile(train, fullgraph=True, backend=backend)
    product, other = scalar(), scalar()
    lists = [[t, t.clone()[:3]] for t in nadam_operands(5)]
    others = copy.deepcopy(lists)
    for step in range(1, 5):
        got, wanted = compiled(lists, product, step), train(others, other, step)
        for i in (0, 1):
            assert all(map(torch.equal, got[i], wanted[i]))
        assert got[2] == wanted[2] == product + 1
        assert product == other
    if backend == "eager":  # others let operators modify copies
        with pytest.raises(ValueError, match=re.escape(SHARED)):
            compiled(lists, lists[1][0][0], 5)


@needs_native
def test_inductor() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(scalar_averages, fullgraph=True)
    scalars, others = [scalar(i) for i in (0, 1, -1)], [scalar(i) for i in (0, 1, -1)]
    names = scalar_averages.scalar_states
    exp_avg, other = torch.zeros(5), torch.zeros(5)
    for step in range(3):
        grad = randn(5, seed=step)
        got = compiled(grad, exp_avg, **dict(zip(names, scalars, strict=True)))
        wanted = scalar_averages(grad, other, **dict(zip(names, others, strict=True)))
        assert torch.equal(got, wanted)
        assert all(map(torch.equal, scalars, others))


def test_errors_when_compiled() -> None:
    compiled = torch.compile(lambda p: scalar_nadam(*nadam_operands(3), mu_product=p, step=1))
    torch._dynamo.reset()
    for wrong in ("float64", "one dimension"):
        make_it, error, text = WRONG[wrong]
        with pytest.raises(error, match=re.escape(text)):
            compiled(make_it())


@needs_native
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    class Step(torch.nn.Module):
        def forward(self, operands: list[Tensor], product: Tensor) -> Any:
            update = scalar_nadam(*operands, mu_product=product, step=2)
            return update, product * 2

    example = (nadam_operands(4), scalar(0.5))
    exported = torch.export.export(Step(), copy.deepcopy(example), strict=strict)
    targets = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert scalar_nadam._operator in targets
    for program in (exported, exported.run_decompositions()):
        operands, product = copy.deepcopy(example)
        got, twice = program.module()(operands, product)
        others, other = copy.deepcopy(example)
        assert torch.equal(got, scalar_nadam(*others, mu_product=other, step=2))
        assert (product, twice) == (other, 2 * other)
        assert all(map(torch.equal, operands, others))


@every_mode
@pytest.mark.parametrize("how", ["fake", "symbolic", "export"])
def test_graphs_have_no_values(mode: str, how: str) -> None:
    call = in_mode(scalar_averages, mode)

    def function(grad: Tensor, exp_avg: Tensor, *scalars: Tensor) -> Tensor:
        return call(grad, exp_avg, **dict(zip(scalar_averages.scalar_states, scalars, strict=True)))

    class Step(torch.nn.Module):
        def forward(self, *arguments: Tensor) -> Tensor:
            return function(*arguments)

    def arguments(first: float) -> tuple[Tensor, ...]:
        return (randn(3), randn(3, seed=1), *(scalar(first + i) for i in range(3)))

    graph: Any
    if how == "export":
        graph = torch.export.export(Step(), arguments(1.0)).module()
    else:
        graph = make_fx(function, tracing_mode=how)(*arguments(1.0))
    mine, others = arguments(5.0), arguments(5.0)
    assert torch.equal(graph(*mine), function(*others))
    assert all(map(torch.equal, mine, others))
    assert [number.item() for number in mine[2:]] == [11.0, 3.0, 5.0]


@needs_native
# From torch 2.14 on, Dynamo reads the gradients of non-leaf tensors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_opcheck() -> None:
    in_mode(scalar_averages, "compiled")
    lists = [[randn(3, seed=i), randn(2, 2, seed=i)] for i in range(2)]
    updates = [torch.empty_like(tensor) for tensor in lists[0]]
    scalars = [scalar(i) for i in range(3)]
    operator = scalar_averages._operator
    results = torch.library.opcheck(operator, (updates, *lists, 0.5, *scalars))
    assert set(results.values()) == {"SUCCESS"}
    assert re.search(r"Tensor\(c!\) total, Tensor\(d!\) scale", str(operator._schema))


@every_mode
def test_tensors_without_values(mode: str) -> None:
    call = in_mode(scalar_nadam, mode)
    meta = [tensor.to("meta") for tensor in nadam_operands(4)]
    product = scalar()
    for number in (product, scalar(device="meta")):
        update = call(*meta, mu_product=number, step=1)
        assert (update.is_meta, update.shape) == (True, (4,))
    assert product.item() == 1.0
    with FakeTensorMode():
        fake = scalar()
        update = call(*nadam_operands(4), mu_product=fake, step=1)
    assert (type(update), update.shape) == (type(fake), (4,))
