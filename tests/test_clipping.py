"""Clipping: norms of gradients, their coefficient, and steps that apply it."""

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from optimizers import (
    MEGATRON,
    Setup,
    assert_same,
    contents,
    every_optimizer,
    every_variant,
    make_grads,
    make_params,
    set_grads,
)
from processes import launch
from support import assert_equal_bits
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import clip_grad_norm_

from emerging_optimizers import (
    AdamW,
    ScalarOptimizer,
    _grad_norm,
    clip_coefficient,
    megatron,
    rule,
)
from emerging_optimizers.scalar_optimizers import SingleMomentumOptimizer

pytestmark = pytest.mark.on_devices("tests-optimizers")

ORDERS = (1.0, 2.0, math.inf, 0.5, 3.0, -1.0, -math.inf)
DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.complex128,
)
SHAPES = ((7, 13), (), (3001,), (0, 4), (2, 3, 5))
DOUBLES = (torch.float64, torch.complex128)


def wide(tensor: Tensor) -> Tensor:
    """The absolute values of the elements, in float64 on the host."""
    tensor = tensor.detach().cpu()
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64).abs().flatten()


def exact_norm(grads: list[Tensor], order: float) -> float:
    values = torch.cat([wide(grad) for grad in grads])
    if math.isinf(order):
        return float(values.amax() if order > 0 else values.amin())
    return float(math.fsum((values**order).tolist()) ** (1 / order))


def assert_near(got: Tensor, exact: float) -> None:
    """Within 1 ulp of a number in float64; that itself is a rounded sum of rounded powers."""
    if got.dtype == torch.float64:
        assert got.item() == pytest.approx(exact, rel=1e-13)
    else:
        number = np.float32(exact)
        assert abs(np.float32(got.item()) - number) <= np.spacing(number)


def with_grads(params: list[nn.Parameter], factor: float = 1.0) -> list[nn.Parameter]:
    set_grads(params, 1)
    for param in params:
        assert param.grad is not None
        param.grad.mul_(factor)
    return params


def grads_of(params: list[nn.Parameter]) -> list[Tensor]:
    return [param.grad.clone() for param in params if param.grad is not None]


@pytest.fixture(params=[True, False], ids=["native", "PyTorch"])
def _ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:
        monkeypatch.setattr(_grad_norm, "native", None)


# ---- the norm and the coefficient ----------------------------------------------------------------


@pytest.mark.usefixtures("_ways")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_norm(dtype: torch.dtype, order: float) -> None:
    params = with_grads(make_params(SHAPES, dtype))
    before = grads_of(params)
    versions = [param.grad._version for param in params if param.grad is not None]
    norm, coefficient = clip_coefficient(params, 0.25, order)
    exact = exact_norm(before, order)
    assert norm.shape == coefficient.shape == ()
    assert norm.dtype == coefficient.dtype
    assert norm.dtype == (torch.float64 if dtype in DOUBLES else torch.float32)
    assert norm.device == coefficient.device == params[0].device
    assert_near(norm, exact)
    assert_near(coefficient, min(1.0, 0.25 / (exact + 1e-6)))
    assert_same(grads_of(params), before)
    assert versions == [param.grad._version for param in params if param.grad is not None]
    if order > 0 and dtype not in (torch.bfloat16, torch.float16):
        filled = [param for param in params if param.numel()]
        clipped = clip_grad_norm_(filled, 0.25, order)
        torch.testing.assert_close(norm, clipped.abs().to(norm.dtype), rtol=1e-5, atol=0.0)
        torch.testing.assert_close([g * coefficient for g in before], grads_of(params))


@pytest.mark.usefixtures("_ways")
def test_dtypes_and_layouts_may_be_mixed() -> None:
    base = torch.randn(6, 8)
    conjugate = torch.randn(2, 3, dtype=torch.complex64).conj()
    grads = [
        base.t(),
        base[::2, 1::3],
        torch.randn(1, 4).expand(3, 4),
        conjugate,
        conjugate.imag,  # lazily negated
        torch.randn(5, dtype=torch.bfloat16),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(3)[1:],
    ]
    params: list[Any] = [nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    params.insert(2, nn.Parameter(torch.ones(3)))  # without a gradient
    for order in ORDERS:
        found = clip_coefficient(params, 1.0, order)
        assert_near(found.total_norm, exact_norm(grads, order))
        assert found.total_norm.dtype == torch.float32
    params.append(nn.Parameter(torch.ones(2, dtype=torch.float64)))
    params[-1].grad = torch.ones(2, dtype=torch.float64)
    assert clip_coefficient(params, 1.0).total_norm.dtype == torch.float64


@pytest.mark.once
@pytest.mark.usefixtures("_ways")
@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta state")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_gradients(layout: torch.layout) -> None:
    dense = torch.tensor([[0.0, 3.0, 0.0, 0.0], [0.0] * 4, [-4.0, 0.0, 0.0, 0.0]])
    grad = dense.to_sparse(layout=layout)
    param = nn.Parameter(grad.clone())
    param.grad = grad
    for order, norm in ((1, 7.0), (2, 5.0), (math.inf, 4.0)):
        assert clip_coefficient(param, 1.0, order).total_norm == norm


@pytest.mark.usefixtures("_ways")
def test_arguments() -> None:
    params = with_grads(make_params())
    found = clip_coefficient(params, 1.0)
    again = [
        clip_coefficient(iter(params), 1),
        clip_coefficient((p for p in params), torch.tensor([1.0]), norm_type=2),
        clip_coefficient(tuple(params), max_norm=np.float32(1.0), norm_type=torch.tensor(2.0)),
    ]
    for other in again:
        assert_same(other, found)
    assert_near(clip_coefficient(params[0], 1.0)[0], exact_norm(grads_of(params)[:1], 2.0))
    assert_same(clip_coefficient(params, 1.0, "inf"), clip_coefficient(params, 1.0, math.inf))
    assert clip_coefficient(params, math.inf).coefficient == 1.0
    assert clip_coefficient(params, 0.0).coefficient == 0.0
    # A parameter that is passed twice counts twice, as in torch.
    twice = clip_coefficient([params[0], params[0]], 1.0).total_norm
    torch.testing.assert_close(twice, clip_coefficient(params[0], 1.0).total_norm * math.sqrt(2))
    params[1].grad = torch.zeros_like(params[1])
    assert clip_coefficient(params, 1.0, 0).total_norm == params[0].numel()


@pytest.mark.usefixtures("_ways")
@pytest.mark.parametrize("order", ORDERS)
def test_without_gradients(order: float) -> None:
    empty = torch.inf if order == -math.inf else 0.0
    for params in ([], make_params()):
        norm, coefficient = clip_coefficient(params, 1.0, order)
        assert norm.dtype == torch.float32
        assert norm.device.type == "cpu"
        assert order in (-1.0, -math.inf) or (norm, coefficient) == (empty, 1.0)
    with pytest.warns(UserWarning, match="parameters is an empty generator, so nothing") as caught:
        clip_coefficient((p for p in ()), 1.0, order)
    assert caught[0].filename == __file__


@pytest.mark.usefixtures("_ways")
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int32])
@pytest.mark.parametrize("order", [1.0, 2.0, math.inf, 3.0])
def test_dtypes_without_norms(dtype: torch.dtype, order: float) -> None:
    values = torch.tensor([3.0, -4.0])
    narrow = nn.Parameter(values.to(dtype), requires_grad=False)
    narrow.grad = values.to(dtype)
    (param,) = make_params([(2,)])
    param.grad = values
    assert_same(clip_coefficient([narrow], 1.0, order), clip_coefficient([param], 1.0, order))


def test_a_step_refuses_integers_by_name() -> None:
    param = nn.Parameter(torch.ones(2, dtype=torch.int32), requires_grad=False)
    param.grad = torch.ones(2, dtype=torch.int32)
    with pytest.raises(
        TypeError, match=r"param_groups\[0\]\['params'\]\[0\]: the parameter has dtype"
    ):
        AdamW([param], lr=0.1).step(max_norm=1.0)


@pytest.mark.usefixtures("_ways")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("order", [1.0, 2.0, math.inf, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_norms_that_are_not_finite(value: float, order: float, dtype: torch.dtype) -> None:
    params = with_grads(make_params(((3,), (5, 40), (2,)), dtype))
    assert params[1].grad is not None
    params[1].grad[2, 3] = value
    norm, coefficient = clip_coefficient(params, 1.0, order)
    torch.testing.assert_close(norm.item(), abs(value), equal_nan=True)
    torch.testing.assert_close(coefficient.item(), 1.0 / abs(value), equal_nan=True)
    with pytest.raises(RuntimeError, match=f"their norm of order {order:g} is {abs(value)}; "):
        clip_coefficient(params, 1.0, order, error_if_nonfinite=True)
    assert params[0].grad is not None
    params[0].grad[0] = math.nan
    assert clip_coefficient(params, 1.0, order).total_norm.isnan()


ERRORS: list[tuple[tuple[Any, ...], type[Exception], str]] = [
    ((-1.0,), ValueError, "max_norm is -1; expected max_norm >= 0"),
    ((math.nan,), ValueError, "max_norm is nan; expected max_norm >= 0"),
    (("1",), TypeError, "max_norm must be a number, not str"),
    ((1.0, math.nan), ValueError, "norm_type is nan; expected a number"),
    ((1.0, None), TypeError, "norm_type must be a number, not NoneType"),
]


def test_a_norm_that_overflows_float32() -> None:
    param = nn.Parameter(torch.zeros(2))
    param.grad = torch.full((2,), 3e38)
    total_norm, coefficient = clip_coefficient([param], 1.0)
    assert total_norm == math.inf
    wanted = 1.0 / (math.sqrt(2.0) * float(torch.tensor(3e38)))  # float64 does not overflow
    assert coefficient.item() == pytest.approx(wanted, abs=2e-45)
    optimizer = AdamW([param])
    optimizer.step(max_norm=1.0)
    assert optimizer.grad_norm == math.inf
    assert bool(param.isfinite().all())


def test_traced() -> None:
    weight = torch.zeros(3)

    def clip(grad: Tensor) -> Tensor:
        param = nn.Parameter(weight)
        param.grad = grad
        return grad * clip_coefficient([param], 1.0).coefficient

    grad = torch.tensor([3.0, 0.0, 4.0])
    graph = make_fx(clip)(torch.ones(3))
    torch.testing.assert_close(graph(grad), clip(grad))


@pytest.mark.parametrize(("arguments", "error", "message"), ERRORS)
def test_errors(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    params = with_grads(make_params())
    with pytest.raises(error, match=message):
        clip_coefficient(params, *arguments)
    if len(arguments) == 1:
        optimizer = AdamW(params)
        before = contents(optimizer)
        with pytest.raises(error, match=message):
            optimizer.step(max_norm=arguments[0])
        assert_same(contents(optimizer), before)
        assert optimizer.grad_norm is None


@pytest.mark.usefixtures("_ways")
def test_parameters_that_are_not_tensors() -> None:
    wrong: Any = [*make_params(), ("weight", torch.ones(2))]
    with pytest.raises(TypeError, match=r"parameters\[2\] must be a Tensor, not tuple"):
        clip_coefficient(wrong, 1.0)


# ---- step(max_norm=...) --------------------------------------------------------------------------


@every_variant
def test_a_step_clips(setup: Setup, fused: bool | None) -> None:
    """The bits of the coefficient of `clip_coefficient`, as a multiplier."""
    params, others = make_params(), make_params()
    options = {"lr": 0.01, "weight_decay": 0.1, "fused": fused}
    optimizer, other = setup.make(params, **options), setup.make(others, **options)
    assert optimizer.grad_norm is None
    for step in range(1, 5):
        # One is not clipped.
        factor = 1e-3 if step == 2 else 10.0
        set_grads(params, step)
        for p, q in zip(params, others, strict=True):
            assert p.grad is not None
            p.grad *= factor
            q.grad = p.grad.clone()
        before = grads_of(params)
        optimizer.step(max_norm=2.5)
        norm, coefficient = clip_coefficient(others, 2.5)
        assert (coefficient == 1.0) == (step == 2)
        other.step(grad_multiplier=coefficient)
        assert optimizer.grad_norm is not None
        assert_equal_bits(optimizer.grad_norm, norm, "norm")
        assert_same(contents(optimizer), contents(other))
        assert_same(grads_of(params), before)
    assert "grad_norm" not in optimizer.state_dict()


@pytest.mark.parametrize("multiplier", [-3.0, 0.125, torch.tensor([5.0]), np.float64(0.5)])
def test_the_multiplier_counts(multiplier: Any, fused: bool | None) -> None:
    """The norm is that of the gradients after `grad_multiplier`."""
    params, others = (with_grads(make_params()) for _ in range(2))
    optimizer, other = AdamW(params, fused=fused), torch.optim.AdamW(others)
    for q in others:
        assert q.grad is not None
        q.grad *= float(multiplier)
    optimizer.step(grad_multiplier=multiplier, max_norm=1.0)
    norm = clip_grad_norm_(others, 1.0)
    other.step()
    torch.testing.assert_close(optimizer.grad_norm, norm)
    torch.testing.assert_close(params, others)


@every_optimizer
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_norm_that_is_not_finite(setup: Setup, value: float, fused: bool | None) -> None:
    """Without a scaler, the same happens as with `clip_grad_norm_`."""
    params, others = (with_grads(make_params()) for _ in range(2))
    optimizer, other = setup.make(params, fused=fused), setup.make(others, fused=fused)
    for tensors in (params, others):
        assert tensors[0].grad is not None
        tensors[0].grad.view(-1)[1] = value
    optimizer.step(max_norm=1.0)
    clip_grad_norm_(others, 1.0)
    other.step()
    torch.testing.assert_close(params, others, equal_nan=True)


def train_with_scaler(
    make: Callable[..., Any], in_step: bool
) -> tuple[list[Tensor], list[Tensor], float]:
    """Return the parameters and states, the norms, and the scale; the third step overflows."""
    params = make_params()
    optimizer = make(params)
    scaler = torch.amp.GradScaler(params[0].device.type, init_scale=256.0, growth_interval=100)
    norms = []
    for step in range(1, 6):
        terms = [(p * g).sum() for p, g in zip(params, make_grads(params, step), strict=True)]
        scaler.scale(torch.stack(terms).sum()).backward()
        before = contents(optimizer)
        if step == 3:
            assert params[0].grad is not None
            params[0].grad.view(-1)[1] = math.inf
        if in_step:
            scaler.step(optimizer, max_norm=0.5)
            norm = optimizer.grad_norm
        else:
            scaler.unscale_(optimizer)
            norm = clip_grad_norm_(params, 0.5)
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step == 3:
            assert_same(contents(optimizer)[:1], before[:1], "overflow")
        else:
            norms.append(norm)
    return contents(optimizer), norms, scaler.get_scale()


@pytest.mark.real
@every_optimizer
def test_grad_scaler(setup: Setup) -> None:
    """As `unscale_`, then `clip_grad_norm_`; whoever unscales."""
    wanted = train_with_scaler(setup.make, in_step=False)
    assert wanted[-1] == 128.0
    for fused in (None, False, True):
        got = train_with_scaler(lambda p, fused=fused: setup.make(p, fused=fused), in_step=True)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_numbers_of_a_scaler(fused: bool | None) -> None:
    params, others = (with_grads(make_params(), 1024.0) for _ in range(2))
    optimizer, other = AdamW(params, fused=fused), AdamW(with_grads(others))
    optimizer.grad_scale = torch.tensor(1024.0)  # type: ignore[attr-defined]
    optimizer.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]
    for multiplier in (None, 0.5):
        optimizer.step(grad_multiplier=multiplier, max_norm=1.0)
        other.step(grad_multiplier=multiplier, max_norm=1.0)
        assert optimizer.grad_norm is not None
        assert other.grad_norm is not None
        assert_equal_bits(optimizer.grad_norm, other.grad_norm, "norm")
        torch.testing.assert_close(params, others)
    optimizer.found_inf.fill_(1.0)  # type: ignore[attr-defined]
    for scale in (1024.0, 0.0):  # after many overflows, a scale is 0
        optimizer.grad_scale.fill_(scale)  # type: ignore[attr-defined]
        before = contents(optimizer)
        optimizer.step(max_norm=1.0)
        assert_same(contents(optimizer), before)
    assert optimizer.grad_norm == math.inf


# ---- ways to step --------------------------------------------------------------------------------


def expected_step(make: Callable[..., ScalarOptimizer]) -> list[Tensor]:
    params = with_grads(make_params())
    optimizer = make(params)
    optimizer.step(grad_multiplier=clip_coefficient(params, 0.5).coefficient)
    return contents(optimizer)


def test_closures_and_hooks(fused: bool | None) -> None:
    """What hooks see, and a hook that clips the steps of code that does not."""

    def make(params: Any) -> AdamW:
        return AdamW(params, lr=0.1, fused=fused)

    wanted = expected_step(make)
    params = make_params()
    optimizer = make(params)

    def closure() -> float:
        assert torch.is_grad_enabled()
        with_grads(params)
        return 3.0

    assert optimizer.step(closure, max_norm=0.5) == 3.0
    assert_same(contents(optimizer), wanted)

    seen: list[Any] = []
    optimizer = make(with_grads(make_params()))
    optimizer.register_step_pre_hook(lambda _, args, kwargs: seen.append((args[1:], kwargs)))
    optimizer.step(max_norm=0.5)
    assert seen == [((), {"max_norm": 0.5})]
    assert_same(contents(optimizer), wanted)

    optimizer = make(with_grads(make_params()))
    optimizer.register_step_pre_hook(lambda _, args, kwargs: (args, {**kwargs, "max_norm": 0.5}))
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.step()
    assert_same(contents(optimizer), wanted)


@pytest.mark.once
def test_compiled(fused: bool | None) -> None:
    torch._dynamo.reset()
    wanted = expected_step(lambda params: AdamW(params, lr=0.1, fused=fused))
    for with_coefficient in (False, True):
        params = with_grads(make_params())
        optimizer = AdamW(params, lr=0.1, fused=fused)

        @torch.compile(backend="eager")
        def step(params: Any, optimizer: Any, with_coefficient: bool) -> None:
            if with_coefficient:
                optimizer.step(grad_multiplier=clip_coefficient(params, 0.5).coefficient)
            else:
                optimizer.step(max_norm=0.5)

        step(params, optimizer, with_coefficient)
        assert_same(contents(optimizer), wanted)


@pytest.mark.parametrize("cls", MEGATRON.values())
def test_megatron(cls: type[megatron.MegatronMixin]) -> None:
    """Including gradients that are elsewhere, and of another dtype."""
    wanted = expected_step(lambda params: cls(params, lr=0.1))
    params = make_params()
    optimizer = cls(params, lr=0.1, use_decoupled_grad=True)
    for param, grad in zip(params, make_grads(params, 1), strict=True):
        param.decoupled_grad = grad  # type: ignore[attr-defined]
    optimizer.step(max_norm=0.5)
    assert_same(contents(optimizer), wanted)
    assert optimizer.grad_norm is not None
    assert optimizer.grad_norm.dtype == torch.float32
    assert optimizer.param_groups[0]["step"] == 1

    params[1].decoupled_grad = [1.0]  # type: ignore[attr-defined]
    norm = optimizer.grad_norm
    before = contents(optimizer)
    with pytest.raises(
        TypeError, match=r"\['params'\]\[1\]: its gradient must be a Tensor, not li"
    ):
        optimizer.step(max_norm=0.5)
    assert_same(contents(optimizer), before)
    assert optimizer.grad_norm is norm
    assert optimizer.param_groups[0]["step"] == 1


def calculate_sgd_update(grad: Tensor, exp_avg: Tensor, *, momentum: float, step: int) -> Tensor:
    return exp_avg.mul_(momentum).add_(grad)


class SGD(SingleMomentumOptimizer):
    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(
            params,
            {"lr": lr, "momentum": 0.9},
            update_fn=calculate_sgd_update,
            update_kwarg_names=("momentum",),
        )

    def post_step_inplace(self, p: Tensor, group: dict[str, Any], ctx: Any) -> None:
        p.add_(1.0)


def test_bases() -> None:
    params = with_grads(make_params())
    optimizer = SGD(params)
    optimizer.step(max_norm=0.5)
    assert_same(contents(optimizer), expected_step(SGD))


@pytest.mark.once
def test_rules_in_python() -> None:
    @rule
    def soft_sign(grad: Tensor, *, scale: float = 1.0) -> Tensor:
        return scale * grad / (1 + abs(grad))

    class SoftSign(ScalarOptimizer, rule=soft_sign):
        pass

    params = with_grads(make_params())
    optimizer = SoftSign(params, lr=0.1, fused=False)
    optimizer.step(max_norm=0.5)
    assert_same(contents(optimizer), expected_step(lambda p: SoftSign(p, lr=0.1, fused=False)))


@pytest.mark.real
@pytest.mark.parametrize("make", [AdamW, megatron.FusedAdam, SGD])
def test_copies(make: Callable[..., ScalarOptimizer]) -> None:
    """The norm is not saved: a copy has none until it steps."""
    optimizer = make(with_grads(make_params()), lr=0.1)
    optimizer.step(max_norm=0.5)
    assert optimizer.grad_norm is not None
    for other in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        assert other.grad_norm is None
        with_grads(other.param_groups[0]["params"])
        other.step(max_norm=0.5)
        assert_same([other.grad_norm], [optimizer.grad_norm])
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.grad_norm is not None


@pytest.mark.once
@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_without_values(kind: str, fused: bool | None) -> None:
    """Steps create states, and compute nothing."""
    mode = torch._subclasses.fake_tensor.FakeTensorMode() if kind == "fake" else torch.device(kind)
    with mode:
        params = [nn.Parameter(torch.ones(3, 2)) for _ in range(2)]
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer = AdamW(params, fused=fused)
        for multiplier in (None, 0.5, torch.tensor(0.5)):
            optimizer.step(grad_multiplier=multiplier, max_norm=1.0)
            norm, coefficient = clip_coefficient(params, 1.0)
            for tensor in (norm, coefficient, optimizer.grad_norm):
                assert isinstance(tensor, Tensor)
                assert tensor.shape == ()
                assert tensor.dtype == torch.float32
        assert all(len(optimizer.state[param]) == 3 for param in params)


# ---- several processes ---------------------------------------------------------------------------


@pytest.mark.once
@pytest.mark.parametrize("world_size", [2, 4])
def test_processes(world_size: int, tmp_path: Path) -> None:
    launch("clipping_workers.clip", world_size, tmp_path)
