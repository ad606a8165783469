"""The optimizers: trajectories, options, and all that happens to an optimizer between steps."""

import copy
import functools
import inspect
import io
import logging
import math
import pickle
import typing
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from optimizers import (
    METHODS,
    Setup,
    Trajectory,
    assert_same,
    contents,
    every_optimizer,
    every_variant,
    make_grads,
    make_params,
    run,
    set_grads,
)
from support import LAYOUT_SHAPE, LAYOUTS, assert_equal_bits, round_once, to_numpy
from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import register_optimizer_step_pre_hook

import emerging_optimizers
from emerging_optimizers import (
    Adam,
    AdamW,
    LaProp,
    Lion,
    ScalarOptimizer,
    Signum,
    _fallback_step,
    _step,
)
from emerging_optimizers._native import native
from emerging_optimizers._optimizer import SharedOptions
from emerging_optimizers._rounding import (
    element_indices,
    random_bits,
    round_stochastically,
    rounding_key,
)

Breaking = Callable[[ScalarOptimizer, Parameter, dict[str, Any]], None]
HALVES = (torch.bfloat16, torch.float16)
every_half = pytest.mark.parametrize("dtype", HALVES, ids=str)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


@pytest.fixture(params=[False, None], ids=["plain", "native where it can"])
def fused(request: pytest.FixtureRequest) -> bool | None:
    return request.param


def assert_near(got: Tensor, wanted: Any, tolerance: float) -> None:
    np.testing.assert_allclose(to_numpy(got), wanted, rtol=tolerance, atol=tolerance)


# ---- trajectories --------------------------------------------------------------------------------


@pytest.mark.once
@every_variant
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_trajectory(setup: Setup, method: str, dtype: torch.dtype, fused: bool | None) -> None:
    decay = {"lr": 0.02, "weight_decay": 0.1}
    params = make_params(dtype=dtype)
    optimizer = setup.make(params, **decay, weight_decay_method=method, fused=fused)
    wanted = [Trajectory(setup, to_numpy(p), **decay, method=method) for p in params]
    for step in range(1, 8):
        set_grads(params, step)
        optimizer.step()
        for param, trajectory in zip(params, wanted, strict=True):
            assert param.grad is not None
            trajectory.step(to_numpy(param.grad))
            assert_near(param, trajectory.param, TOLERANCE[dtype])
            state = optimizer.state[param]
            assert list(state) == ["step", *setup.states]
            assert state["step"].item() == step
            for name, value in zip(setup.states, trajectory.states, strict=True):
                assert_near(state[name], value, TOLERANCE[dtype])


@every_optimizer
def test_maximize(setup: Setup, fused: bool | None) -> None:
    up, down = make_params(), make_params()
    climbing = setup.make(up, weight_decay=0.1, maximize=True, fused=fused)
    falling = setup.make(down, weight_decay=0.1, fused=fused)
    for step in range(1, 4):
        set_grads(up, step)
        for p, q in zip(up, down, strict=True):
            assert p.grad is not None
            q.grad = -p.grad
        climbing.step()
        falling.step()
    assert_same(contents(climbing), contents(falling))


@pytest.mark.once
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "maximize": True}, {"betas": (0.8, 0.9)}],
    ids=str,
)
def test_against_torch(name: str, arguments: dict[str, Any], fused: bool | None) -> None:
    ours, theirs = make_params(), make_params()
    optimizer = getattr(emerging_optimizers, name)(ours, lr=0.01, fused=fused, **arguments)
    reference = getattr(torch.optim, name)(theirs, lr=0.01, **arguments)
    for step in range(1, 101):
        set_grads(ours, step)
        set_grads(theirs, step)
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@every_optimizer
@pytest.mark.parametrize("shape", [(), (1,), torch.Size([])], ids=str)
def test_tensor_lr(setup: Setup, shape: tuple[int, ...], fused: bool | None) -> None:
    params, others = make_params(), make_params()
    optimizer = setup.make(params, lr=torch.full(shape, 0.25), fused=fused)
    run(optimizer, params, [1, 2])
    optimizer.param_groups[0]["lr"].fill_(0.5)
    run(optimizer, params, [3])
    other = setup.make(others, lr=0.25, fused=fused)
    run(other, others, [1, 2])
    other.param_groups[0]["lr"] = 0.5
    run(other, others, [3])
    assert_same(contents(optimizer), contents(other))


@every_optimizer
@pytest.mark.parametrize("method", METHODS)
def test_zero_lr(setup: Setup, method: str, fused: bool | None) -> None:
    arguments: dict[str, Any] = {"weight_decay": 0.1, "weight_decay_method": method}
    if "eps" in setup.case:
        arguments["eps"] = 0.0
    if setup.cls is LaProp:
        arguments["frob_normalize"] = True
    for lr in (0.0, torch.zeros(())):
        for dtype in (torch.float32, torch.bfloat16):
            params = make_params(dtype=dtype)
            with torch.no_grad():
                params[0].view(-1)[:4] = torch.tensor([-0.0, math.nan, math.inf, 1e-40])
            before = [p.detach().clone() for p in params]
            for option in ({}, {"master_weights": True}, {"stochastic_rounding": True}):
                optimizer = setup.make(params, lr=lr, fused=fused, **option, **arguments)
                for step in (1, 2):
                    set_grads(params, step)
                    assert params[0].grad is not None
                    params[0].grad.view(-1)[:6] = torch.tensor([0, 0, 0, 0, math.nan, math.inf])
                    optimizer.step()
                assert_same([p.detach() for p in params], before, f"{lr} {dtype} {option}")
                state = optimizer.state[params[1]]
                assert state["step"].item() == 2
                assert state[setup.states[0]].count_nonzero() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_frob_normalize(
    dtype: torch.dtype, fused: bool | None, caplog: pytest.LogCaptureFixture
) -> None:
    params = [*make_params(dtype=dtype), torch.nn.Parameter(torch.zeros(3, dtype=dtype))]
    norms = [p.detach().norm().item() for p in params]
    before = [p.detach().clone() for p in params]
    optimizer = LaProp(params, lr=0.1, frob_normalize=True, fused=fused)
    assert not caplog.records
    run(optimizer, params, range(1, 4))
    for param, norm, old in zip(params[:2], norms, before, strict=False):
        assert param.detach().norm().item() == pytest.approx(norm, rel=4 * torch.finfo(dtype).eps)
        assert not torch.equal(param, old)
    assert not params[2].any()
    LaProp(params, frob_normalize=True, weight_decay=0.1)
    assert [r.levelno for r in caplog.records] == [logging.ERROR]
    groups = [{"params": params[:1]}, {"params": params[1:], "frob_normalize": True}]
    LaProp(groups, weight_decay=0.1)
    assert [r.levelno for r in caplog.records] == 2 * [logging.ERROR]


@every_half
def test_frob_normalize_of_masters(dtype: torch.dtype, fused: bool | None) -> None:
    params = make_params(dtype=dtype)
    params.append(torch.nn.Parameter(torch.full((3,), math.nan, dtype=dtype)))
    optimizer = LaProp(params, lr=0.1, frob_normalize=True, master_weights=True, fused=fused)
    norms = [p.detach().double().norm().item() for p in params[:2]]
    run(optimizer, params, range(1, 4))
    for param, norm in zip(params[:2], norms, strict=False):
        master = optimizer.state[param]["master_param"]
        assert master.double().norm().item() == pytest.approx(norm, rel=1e-6)
        assert_equal_bits(param.detach(), master.to(dtype), "parameter")
    assert params[2].isnan().all()


def test_frob_normalize_natively(monkeypatch: pytest.MonkeyPatch) -> None:
    if native is None:
        pytest.skip("no native kernels")
    params, others = make_params(), make_params()
    run(LaProp(others, lr=0.1, frob_normalize=True, fused=False), others, [1, 2, 3])
    monkeypatch.setattr(_fallback_step, "_update", None)
    run(LaProp(params, lr=0.1, frob_normalize=True, fused=True), params, [1, 2, 3])
    torch.testing.assert_close(params, others, rtol=1e-6, atol=1e-7)


# ---- dtypes and layouts --------------------------------------------------------------------------


@every_optimizer
@every_half
def test_half_params_are_rounded_once(setup: Setup, dtype: torch.dtype, fused: bool | None) -> None:
    params = make_params(dtype=dtype)
    optimizer = setup.make(params, lr=0.02, weight_decay=0.1, fused=fused)
    method = optimizer.defaults["weight_decay_method"]
    wanted = [Trajectory(setup, to_numpy(p), 0.02, 0.1, method) for p in params]
    run(optimizer, params, [1])
    for param, trajectory in zip(params, wanted, strict=True):
        assert param.grad is not None
        trajectory.step(to_numpy(param.grad))
        state = optimizer.state[param]
        values = [trajectory.param, *trajectory.states]
        for tensor, value in zip([param, *(state[s] for s in setup.states)], values, strict=True):
            assert tensor.dtype == dtype
            # Values that lie next to a midpoint may go either way after float32 arithmetic.
            nearest = round_once(torch.tensor(value), dtype)
            assert (tensor == nearest).double().mean() > 0.8
            assert_near(tensor, value, 2 * torch.finfo(dtype).eps)


@every_optimizer
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(setup: Setup, layout: str, fused: bool | None) -> None:
    if "expanded" in layout or "one element" in layout:
        pytest.skip("of gradients only")
    plain = make_params([LAYOUT_SHAPE])
    values = plain[0].detach()
    if layout == "one channel":
        plain = [torch.nn.Parameter(values[:, :1].clone())]
        values = plain[0].detach()
    laid_out = [torch.nn.Parameter(LAYOUTS[layout](values.clone(), 1, 1))]
    optimizers = [setup.make(p, fused=fused, weight_decay=0.1) for p in (plain, laid_out)]
    for step in (1, 2):
        set_grads(plain, step)
        assert plain[0].grad is not None
        laid_out[0].grad = LAYOUTS[layout](plain[0].grad.clone(), 0, 1)
        for optimizer in optimizers:
            optimizer.step()
    is_dense = laid_out[0].stride() == torch.empty_like(laid_out[0]).stride()
    if fused is False or is_dense:
        assert_same(contents(optimizers[1]), contents(optimizers[0]), layout)
    else:  # in plain operations, while the other one takes the native step
        torch.testing.assert_close(laid_out[0], plain[0])
    for name in setup.states:
        state = optimizers[1].state[laid_out[0]][name]
        assert state.stride() == torch.empty_like(laid_out[0]).stride()


@every_optimizer
def test_shapes(setup: Setup, fused: bool | None) -> None:
    shapes: list[tuple[int, ...]] = [(), (0,), (3, 0), (1,), (2, 1, 3)]
    params = make_params(shapes)
    optimizer = setup.make(params, fused=fused)
    lr, decay, method = (
        optimizer.defaults[key] for key in ("lr", "weight_decay", "weight_decay_method")
    )
    wanted = [Trajectory(setup, to_numpy(p), lr, decay, method) for p in params]
    for step in (1, 2):
        set_grads(params, step)
        optimizer.step()
        for param, trajectory in zip(params, wanted, strict=True):
            assert param.grad is not None
            trajectory.step(to_numpy(param.grad))
            assert_near(param, trajectory.param, 2e-6)


@every_optimizer
@pytest.mark.parametrize("method", METHODS)
def test_complex(setup: Setup, method: str, fused: bool | None) -> None:
    params = make_params(dtype=torch.complex64)
    reals = [torch.nn.Parameter(torch.view_as_real(p.detach()).clone()) for p in params]
    arguments = {"weight_decay": 0.1, "weight_decay_method": method, "fused": fused}
    optimizer = setup.make(params, state_dtype=torch.bfloat16, **arguments)
    other = setup.make(reals, **arguments)
    for step in (1, 2, 3):
        set_grads(params, step)
        for param, real in zip(params, reals, strict=True):
            assert param.grad is not None
            real.grad = torch.view_as_real(param.grad).clone()
            if step == 2:
                param.grad = param.grad.conj().resolve_conj().conj()  # a lazy conjugation
                assert param.grad.is_conj()
        optimizer.step()
        other.step()
    assert_same(contents(optimizer), contents(other))
    assert optimizer.state[params[0]][setup.states[0]].dtype == torch.complex64


def test_complex_shape_scaling(fused: bool | None) -> None:
    params = make_params([(3, 4)], dtype=torch.complex64)
    before = params[0].detach().clone()
    run(Signum(params, lr=1.0, use_shape_scaling=True, fused=fused), params, [1])
    moved = torch.view_as_real(before - params[0].detach()).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 2 / 7))


@every_optimizer
def test_options_of_the_state_dtype(setup: Setup, fused: bool | None) -> None:
    params = make_params(dtype=torch.bfloat16)
    last = setup.states[-1]
    half = dict.fromkeys(setup.states, torch.bfloat16)
    for option, wanted in [
        (None, half),
        (torch.float32, dict.fromkeys(setup.states, torch.float32)),
        (
            {last: torch.float16},
            dict.fromkeys(setup.states, torch.bfloat16) | {last: torch.float16},
        ),
    ]:
        optimizer = setup.make(params, state_dtype=option, fused=fused)
        run(optimizer, params, [1, 2])
        state = optimizer.state[params[0]]
        assert {name: state[name].dtype for name in setup.states} == wanted
        assert state["step"].dtype == torch.float32
        assert state["step"].dim() == 0
        assert state["step"].device.type == "cpu"


@every_optimizer
def test_capturable(setup: Setup, fused: bool | None) -> None:
    params, others = make_params(), make_params()
    optimizer = setup.make(params, capturable=True, fused=fused)
    run(optimizer, params, [1, 2, 3])
    other = setup.make(others, fused=fused)
    run(other, others, [1, 2, 3])
    assert optimizer.state[params[0]]["step"].device == params[0].device
    assert optimizer.state[params[0]]["step"].item() == 3
    torch.testing.assert_close(params, others)


# ---- master weights and stochastic rounding ------------------------------------------------------


@every_optimizer
@every_half
def test_master_weights(setup: Setup, dtype: torch.dtype, fused: bool | None) -> None:
    params = make_params(dtype=dtype)
    full = [torch.nn.Parameter(p.detach().float()) for p in params]
    arguments = {"lr": 1e-4, "weight_decay": 0.1, "fused": fused}
    optimizer = setup.make(params, master_weights=True, state_dtype=torch.float32, **arguments)
    other = setup.make(full, master_weights=True, **arguments)
    for step in range(1, 6):
        set_grads(params, step)
        for param, wide in zip(params, full, strict=True):
            assert param.grad is not None
            wide.grad = param.grad.float()
        optimizer.step()
        other.step()
    for param, wide in zip(params, full, strict=True):
        master = optimizer.state[param]["master_param"]
        assert master.dtype == torch.float32
        torch.testing.assert_close(master, wide.detach())
        assert_equal_bits(param.detach(), master.to(dtype), "parameter")
        assert "master_param" not in other.state[wide]


def _random_bits(count: int, seed: int = 1, position: int = 0, step: int = 1) -> Tensor:
    return random_bits(rounding_key(seed, position, step), torch.arange(count))


def test_random_bits() -> None:
    count = 100_000
    bits = _random_bits(count)
    assert bits.min() >= 0
    assert bits.max() < 2**32
    assert bits.unique().numel() > count - 10
    others = [
        _random_bits(count + 1)[1:],
        _random_bits(count, seed=2),
        _random_bits(count, position=1),
        _random_bits(count, step=2),
        random_bits(rounding_key(1, 0, 1), torch.arange(2**32, 2**32 + count)),
    ]
    sigma = 0.5 / math.sqrt(count)
    for bit in range(32):
        mine = (bits >> bit) & 1
        assert abs(mine.double().mean() - 0.5) < 5 * sigma
        for other in others:
            assert abs((mine ^ ((other >> bit) & 1)).double().mean() - 0.5) < 5 * sigma


def test_random_bits_by_hand() -> None:
    # As in the docstrings, in Python's integers: what other implementations are held to.
    def hashed(x: int) -> int:
        x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
        x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
        return x ^ (x >> 16)

    indices = [0, 1, 12345, 2**32 - 1, 2**32, 5 * 2**32 + 7, 2**40]
    for seed in (0, 2**64 - 1, 987654321):
        key = rounding_key(seed, 3, 17)
        low, high = key % 2**32, key >> 32
        wanted = [
            hashed(hashed(i % 2**32 ^ low) ^ (high + 0x9E3779B9 * (i >> 32)) % 2**32)
            for i in indices
        ]
        assert random_bits(key, torch.tensor(indices)).tolist() == wanted
    assert rounding_key(0, 0, 0) != rounding_key(0, 0, 1) != rounding_key(0, 1, 0)


def test_element_indices() -> None:
    assert element_indices(torch.empty(2, 3)).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert element_indices(torch.empty(3, 2).t()).tolist() == [[0, 2, 4], [1, 3, 5]]
    assert element_indices(torch.empty(2, 6)[:, ::2]).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert element_indices(torch.empty(())).item() == 0


@every_half
def test_rounding_is_unbiased(dtype: torch.dtype) -> None:
    count = 100_000
    bits = _random_bits(count)
    lowest = {torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}[dtype]
    eps = torch.finfo(dtype).eps
    cases = [(1.0, eps), (-1.0, eps), (2 - eps, eps), (3 * lowest, lowest), (0.0, lowest)]
    for base, spacing in cases:
        for part in (1 / 1000, 0.25, 0.5, 0.999):
            values = torch.full((count,), base + math.copysign(part, base) * spacing)
            rounded = round_stochastically(values, dtype, bits)
            error = (rounded.double() - values.double()).mean().item() / spacing
            assert abs(error) < 5 * math.sqrt(part * (1 - part) / count) + 2e-5, (base, part)
            assert rounded.unique().numel() <= 2


@every_half
def test_rounding_keeps_what_is_exact(dtype: torch.dtype) -> None:
    exact = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for seed in (1, 2, 3):
        bits = _random_bits(exact.numel(), seed)
        assert_equal_bits(round_stochastically(exact.float(), dtype, bits), exact, "exact")
    largest = torch.finfo(dtype).max
    just_below = torch.full((1000,), largest).nextafter(torch.tensor(0.0))
    assert round_stochastically(just_below, dtype, _random_bits(1000)).max() == largest


@every_optimizer
@every_half
def test_stochastic_rounding_of_a_step(
    setup: Setup, dtype: torch.dtype, fused: bool | None
) -> None:
    count = 100_000
    eps = torch.finfo(dtype).eps
    param = torch.nn.Parameter(torch.full((100, count // 100), 1.5, dtype=dtype))
    # The first update of each rule, of a gradient of ones.
    size = torch.nn.Parameter(torch.ones(1, 1))
    size.grad = torch.ones(1, 1)
    setup.make([size], lr=1.0, weight_decay=0.0).step()
    lr = 1e-3 * eps / (1 - size.item())
    options: dict[str, Any] = {"stochastic_rounding": True, "state_dtype": torch.float32}
    optimizer = setup.make([param], lr=lr, weight_decay=0.0, fused=fused, **options)
    param.grad = torch.ones_like(param)
    optimizer.step()
    moved = (1.5 - param.detach().double()) / eps
    assert set(moved.unique().tolist()) == {0.0, 1.0}
    assert abs(moved.mean().item() - 1e-3) < 5 * math.sqrt(1e-3 / count)


@pytest.mark.once
def test_stochastic_rounding_learns(fused: bool | None) -> None:
    def distance(**options: Any) -> float:
        torch.manual_seed(0)
        param = torch.nn.Parameter(torch.full((64,), 4.0, dtype=torch.bfloat16))
        optimizer = AdamW([param], lr=5e-3, weight_decay=0.0, fused=fused, **options)
        for _ in range(400):
            param.grad = 2 * (param.detach() - 3.0)
            optimizer.step()
        return (param.detach().float() - 3.0).abs().mean().item()

    assert distance() == 1.0  # each update is less than half of 4's distance to its neighbours
    assert distance(stochastic_rounding=True) < 0.1
    assert distance(master_weights=True, state_dtype=torch.float32) < 0.1


@every_half
def test_stochastic_rounding_depends_on_seed_step_position(
    dtype: torch.dtype, fused: bool | None
) -> None:
    def result(seed: int = 0, groups: bool = False, frozen: bool = False) -> list[Tensor]:
        torch.manual_seed(seed)
        params = make_params([(30, 40)] * 3, dtype)
        arguments: Any = [{"params": [p]} for p in params] if groups else params
        optimizer = Lion(arguments, lr=1e-4, stochastic_rounding=True, fused=fused)
        for step in (1, 2):
            set_grads(params, step)
            if frozen:
                params[0].grad = None
            optimizer.step()
        return [p.detach() for p in params]

    first = result()
    assert_same(result(), first)
    assert_same(result(groups=True), first)
    assert_same(result(frozen=True)[1:], first[1:])
    assert not torch.equal(result(seed=1)[0], first[0])
    # Neither another device's generator nor, without the option, any generator is used.
    torch.manual_seed(0)
    before = torch.get_rng_state()
    params = make_params(dtype=dtype)
    run(Lion(params, fused=fused), params, [1])
    assert torch.equal(torch.get_rng_state(), before)


# ---- mixed precision and gradient multipliers ----------------------------------------------------


@every_optimizer
@pytest.mark.parametrize("method", ["decoupled", "l2"])
def test_grad_multiplier(setup: Setup, method: str, fused: bool | None) -> None:
    params, others = make_params(), make_params()
    arguments = {"weight_decay": 0.1, "weight_decay_method": method, "fused": fused}
    optimizer, other = setup.make(params, **arguments), setup.make(others, **arguments)
    for step, multiplier in enumerate([0.5, torch.tensor(0.25), torch.tensor([2.0])], 1):
        set_grads(params, step)
        set_grads(others, step)
        for q in others:
            assert q.grad is not None
            q.grad.mul_(float(multiplier))
        optimizer.step(grad_multiplier=multiplier)
        other.step()
    assert_same(contents(optimizer), contents(other))
    with pytest.raises(ValueError, match="Tensor grad_multiplier must be 1-element"):
        optimizer.step(grad_multiplier=torch.ones(2))


@every_optimizer
def test_amp_attributes(setup: Setup, fused: bool | None) -> None:
    params, others = make_params(), make_params()
    options = {"weight_decay": 0.1, "fused": fused}
    optimizer, other = setup.make(params, **options), setup.make(others, **options)
    for step, overflow in enumerate([False, True, False, True], 1):
        set_grads(params, step)
        set_grads(others, step)
        for p in params:
            assert p.grad is not None
            p.grad.mul_(1024)
            if overflow:
                p.grad.view(-1)[0] = math.inf
        optimizer.grad_scale = torch.tensor(1024.0)  # type: ignore[attr-defined]
        optimizer.found_inf = torch.tensor(float(overflow))  # type: ignore[attr-defined]
        before = contents(optimizer)
        optimizer.step()
        if overflow:
            assert_same(contents(optimizer), before, "overflow")
        else:
            other.step()
    assert [s["step"].item() for s in optimizer.state.values()] == [2, 2]
    assert_same([p.detach() for p in params], [p.detach() for p in others])


@every_optimizer
def test_overflow_at_the_first_step(setup: Setup, fused: bool | None) -> None:
    params = make_params(dtype=torch.bfloat16)
    before = [p.detach().clone() for p in params]
    optimizer = setup.make(params, weight_decay=0.1, master_weights=True, fused=fused)
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    run(optimizer, params, [1])
    assert_same([p.detach() for p in params], before)
    assert all(float(state["step"]) == 0 for state in optimizer.state.values())


@pytest.mark.real
@every_optimizer
def test_grad_scaler(setup: Setup, fused: bool | None) -> None:
    params, others = make_params(), make_params()
    optimizer, other = setup.make(params, fused=fused), setup.make(others, fused=fused)
    device = params[0].device.type
    scaler = torch.amp.GradScaler(device, init_scale=256.0, growth_interval=100)
    for step in range(1, 6):
        grads = make_grads(params, step)
        optimizer.zero_grad()
        loss = torch.stack([(p * g).sum() for p, g in zip(params, grads, strict=True)]).sum()
        scaler.scale(loss).backward()
        if step == 3:
            assert params[0].grad is not None
            params[0].grad.view(-1)[1] = math.nan
        elif step == 4:
            scaler.unscale_(optimizer)
        before = contents(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if step == 3:
            assert_same(contents(optimizer)[:1], before[:1])
            assert scaler.get_scale() == 128.0
        else:
            run(other, others, [step])
    assert optimizer.state[params[0]]["step"].item() == 4
    assert not hasattr(optimizer, "found_inf")
    torch.testing.assert_close(params, others)


# ---- what happens between steps ------------------------------------------------------------------


@every_optimizer
def test_grads_are_not_modified(setup: Setup, fused: bool | None) -> None:
    for method in METHODS:
        params = make_params()
        optimizer = setup.make(
            params, weight_decay=0.1, weight_decay_method=method, maximize=True, fused=fused
        )
        optimizer.grad_scale = torch.tensor(2.0)  # type: ignore[attr-defined]
        set_grads(params, 1)
        grads = [p.grad for p in params]
        copies = [g.clone() for g in grads if g is not None]
        optimizer.step(grad_multiplier=0.5)
        assert all(p.grad is g for p, g in zip(params, grads, strict=True))
        assert_same([g for g in grads if g is not None], copies)


@every_optimizer
def test_params_replaced_in_groups(setup: Setup, fused: bool | None) -> None:
    params = make_params()
    optimizer = setup.make(params, fused=fused)
    run(optimizer, params, [1])
    replaced = torch.nn.Parameter(params[0].detach().clone())
    optimizer.param_groups[0]["params"][0] = replaced
    kept = params[0].detach().clone()
    run(optimizer, [replaced, params[1]], [2])
    assert_equal_bits(params[0].detach(), kept, "the parameter that left")
    assert optimizer.state[replaced]["step"].item() == 1
    assert optimizer.state[params[1]]["step"].item() == 2
    assert not torch.equal(replaced, kept)


@every_optimizer
def test_missing_grads(setup: Setup, fused: bool | None) -> None:
    params = make_params()
    optimizer = setup.make(params, fused=fused)
    optimizer.step()
    assert not any(optimizer.state.values())
    run(optimizer, params, [1])
    before = contents(optimizer)
    optimizer.zero_grad()
    optimizer.step()
    assert_same(contents(optimizer), before)
    # Per-parameter steps that differ: as if each had been alone.
    params[1].grad = make_grads(params, 2)[1]
    optimizer.step()
    run(optimizer, params, [3])
    assert [optimizer.state[p]["step"].item() for p in params] == [2, 3]
    for i, steps in ((0, [1, 3]), (1, [1, 2, 3])):
        alone = make_params()
        other = setup.make([alone[i]], fused=fused)
        for step in steps:
            alone[i].grad = make_grads(alone, step)[i]
            other.step()
        assert_equal_bits(params[i].detach(), alone[i].detach(), f"parameter {i}")


@every_optimizer
def test_data_swapped(setup: Setup, fused: bool | None) -> None:
    params, others = make_params(), make_params()
    optimizer, other = setup.make(params, fused=fused), setup.make(others, fused=fused)
    run(optimizer, params, [1])
    run(other, others, [1])
    for param in params:
        param.data = param.data.t().contiguous().t()  # other memory, laid out otherwise
    run(optimizer, params, [2, 3])
    run(other, others, [2, 3])
    if fused is False:
        assert_same(contents(optimizer), contents(other))
    for param, same in zip(params, others, strict=True):
        torch.testing.assert_close(param, same)
        param.data = param.data.bfloat16()
    run(optimizer, params, [4])
    assert optimizer.state[params[0]][setup.states[0]].dtype == torch.float32


@every_optimizer
def test_states_replaced(setup: Setup, fused: bool | None) -> None:
    params, others = make_params(), make_params()
    optimizer, other = setup.make(params, fused=fused), setup.make(others, fused=fused)
    run(optimizer, params, [1])
    run(other, others, [1])
    for state in optimizer.state.values():
        for name in setup.states:
            state[name] = state[name].double()
        state["step"] = int(state["step"])
    run(optimizer, params, [2])
    run(other, others, [2])
    torch.testing.assert_close(params, others)
    assert optimizer.state[params[0]][setup.states[0]].dtype == torch.float64
    assert isinstance(optimizer.state[params[0]]["step"], Tensor)
    for state in optimizer.state.values():
        state.clear()
    run(optimizer, params, [3])
    assert optimizer.state[params[0]]["step"].item() == 1


@every_optimizer
def test_groups(setup: Setup, fused: bool | None) -> None:
    params, others = make_params([(3, 4)] * 3), make_params([(3, 4)] * 3)
    groups: list[dict[str, Any]] = [
        {"params": [params[0]], "lr": 0.1, "name": "first", "extra": [1, 2]},
        {"params": []},
        {"params": [params[1]], "weight_decay": 0.5, "maximize": True},
    ]
    optimizer = setup.make(groups, lr=0.01, fused=fused)
    run(optimizer, params[:2], [1])
    optimizer.add_param_group({"params": [params[2]], "lr": 0.2})
    run(optimizer, params, [2])
    optimizer.step()
    assert optimizer.param_groups[0]["extra"] == [1, 2]
    options: list[dict[str, Any]] = [
        {"lr": 0.1},
        {"lr": 0.01, "weight_decay": 0.5, "maximize": True},
        {"lr": 0.2},
    ]
    for i, steps in enumerate([[1, 2, 2], [1, 2, 2], [2, 2]]):
        other = setup.make([others[i]], fused=fused, **options[i])
        for step in steps:
            others[i].grad = make_grads(others[: 2 if step == 1 else 3], step)[i]
            other.step()
        assert_equal_bits(params[i].detach(), others[i].detach(), f"parameter {i}")
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        optimizer.add_param_group({"params": make_params([(2,)]), "lr": -1})
    assert len(optimizer.param_groups) == 4


@every_optimizer
@pytest.mark.parametrize(
    "how",
    ["deepcopy", *(pytest.param(how, marks=pytest.mark.real) for how in ("pickle", "state_dict"))],
)
def test_copies_continue(setup: Setup, how: str, fused: bool | None) -> None:
    params = make_params(dtype=torch.bfloat16)
    arguments: dict[str, Any] = {"fused": fused, "master_weights": True, "weight_decay": 0.1}
    arguments["state_dtype"] = {setup.states[0]: torch.float32}
    optimizer = setup.make(params, **arguments)
    run(optimizer, params, [1, 2])
    if how == "deepcopy":
        other = copy.deepcopy(optimizer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(optimizer))
    else:
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        buffer.seek(0)
        copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
        other = setup.make(copies, **arguments)
        other.load_state_dict(state_dict=torch.load(buffer, weights_only=True))
    assert repr(other) == repr(optimizer)
    others = other.param_groups[0]["params"]
    run(optimizer, params, [3, 4])
    run(other, others, [3, 4])
    assert_same(contents(other), contents(optimizer))


@every_optimizer
@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16], ids=str)
def test_loaded_dtypes(setup: Setup, saved: torch.dtype, fused: bool | None) -> None:
    params = make_params(dtype=torch.bfloat16)
    optimizer = setup.make(params, state_dtype=saved, fused=fused)
    run(optimizer, params, [1])
    state_dict = optimizer.state_dict()
    for option in (None, torch.float32, torch.float16):
        other = setup.make(make_params(dtype=torch.bfloat16), state_dtype=option, fused=fused)
        other.load_state_dict(copy.deepcopy(state_dict))
        for state in other.state.values():
            assert {state[name].dtype for name in setup.states} == {option or saved}
            assert state["step"].dtype == torch.float32
        run(other, other.param_groups[0]["params"], [2])


def test_what_is_no_state_is_loaded_as_it_was_saved(fused: bool | None) -> None:
    params = make_params()
    optimizer = AdamW(params, state_dtype=torch.bfloat16, fused=fused)
    run(optimizer, params, [1])
    optimizer.state[params[0]]["extra"] = torch.tensor([1 + 2**20, 3])
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    extra = optimizer.state[params[0]]["extra"]
    assert extra.dtype == torch.int64
    assert extra.tolist() == [1 + 2**20, 3]


@every_optimizer
def test_older_state_dicts(setup: Setup, fused: bool | None) -> None:
    params = make_params()
    optimizer = setup.make(params, lr=0.05, fused=fused)
    run(optimizer, params, [1, 2])
    state_dict = copy.deepcopy(optimizer.state_dict())
    group = state_dict["param_groups"][0]
    for key in list(group):
        if key not in ("params", "lr"):
            del group[key]
    group["unknown"] = "kept"
    group["step"] = torch.tensor(6.0)  # for what has none
    state_dict["state"][0]["step"] = 2
    del state_dict["state"][1]["step"]
    state_dict["state"]["of no parameter"] = {"tensor": torch.ones(2)}
    others = make_params()
    other = setup.make(others, lr=0.9, fused=fused)
    seen = []
    other.register_load_state_dict_pre_hook(
        lambda _, loaded: seen.append(loaded["state"][0]["step"])
    )
    other.load_state_dict(state_dict)
    assert seen == [2]
    loaded = other.param_groups[0]
    assert loaded["lr"] == 0.05
    assert loaded["unknown"] == "kept"
    assert loaded["weight_decay_method"] == other.defaults["weight_decay_method"]
    assert torch.equal(other.state["of no parameter"]["tensor"], torch.ones(2))  # type: ignore[index]
    assert isinstance(other.state[others[0]]["step"], Tensor)
    run(other, others, [3])
    assert [other.state[p]["step"].item() for p in others] == [3, 7]
    assert "step" not in loaded
    with pytest.raises(ValueError, match="different number of parameter groups"):
        setup.make(others).load_state_dict({"state": {}, "param_groups": []})


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@pytest.mark.parametrize("direction", ["from torch", "to torch"])
def test_interchange_with_torch(name: str, direction: str, fused: bool | None) -> None:
    ours, theirs = make_params(), make_params()
    optimizer = getattr(emerging_optimizers, name)(ours, lr=0.05, weight_decay=0.1, fused=fused)
    reference = getattr(torch.optim, name)(theirs, lr=0.05, weight_decay=0.1)
    run(optimizer, ours, [1, 2])
    run(reference, theirs, [1, 2])
    if direction == "from torch":
        optimizer = getattr(emerging_optimizers, name)(ours, fused=fused)
        optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    else:
        reference = getattr(torch.optim, name)(theirs)
        reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(optimizer, ours, [3, 4])
    run(reference, theirs, [3, 4])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("decoupled", [False, True])
def test_weight_decay_continues_in_torch(decoupled: bool, fused: bool | None) -> None:
    ours, theirs = make_params(), make_params()
    options: dict[str, Any] = {"weight_decay": 0.5, "decoupled_weight_decay": decoupled}
    optimizer = Adam(ours, lr=0.05, fused=fused, **options)
    seen = []
    optimizer.register_state_dict_post_hook(lambda _, saved: seen.append(saved))
    run(optimizer, ours, [1, 2])
    reference = torch.optim.Adam(theirs, lr=0.05, **options)
    run(reference, theirs, [1, 2])
    reference = torch.optim.Adam(theirs)
    reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert seen[0]["param_groups"][0]["decoupled_weight_decay"] == decoupled
    optimizer.load_state_dict(optimizer.state_dict())
    assert "decoupled_weight_decay" not in optimizer.param_groups[0]
    run(optimizer, ours, [3, 4])
    run(reference, theirs, [3, 4])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_decoupled_weight_decay_of_torch() -> None:
    params = make_params()
    assert Adam(params, decoupled_weight_decay=True).defaults["weight_decay_method"] == "decoupled"
    loaded = Adam(params)
    loaded.load_state_dict(torch.optim.AdamW(params).state_dict())
    assert loaded.param_groups[0]["weight_decay_method"] == "decoupled"
    with pytest.raises(ValueError, match=r"amsgrad=True is not supported; torch\.optim"):
        loaded.load_state_dict(torch.optim.Adam(params, amsgrad=True).state_dict())


# ---- torch's conventions -------------------------------------------------------------------------


@pytest.mark.real
@every_optimizer
def test_closure(setup: Setup, fused: bool | None) -> None:
    params = make_params()
    optimizer = setup.make(params, fused=fused)

    def closure() -> float:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = torch.stack([p.square().sum() for p in params]).sum()
        loss.backward()
        return loss.item()

    with torch.no_grad():
        first = optimizer.step(closure)
        assert optimizer.step(closure=closure) < first
    assert optimizer.step() is None
    assert optimizer.step(closure=None) is None


@every_optimizer
def test_lr_schedulers(setup: Setup, fused: bool | None) -> None:
    params = make_params()
    optimizer = setup.make(params, lr=torch.tensor(0.1), fused=fused)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    cycle = torch.optim.lr_scheduler.OneCycleLR(setup.make(make_params()), 0.1, total_steps=5)
    for step in (1, 2):
        run(optimizer, params, [step])
        scheduler.step()
        run(cycle.optimizer, cycle.optimizer.param_groups[0]["params"], [step])
        cycle.step()
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.025)


@every_optimizer
def test_hooks_and_named_parameters(setup: Setup, fused: bool | None) -> None:
    params = make_params()
    optimizer = setup.make([("a", params[0]), ("b", params[1])], fused=fused)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    run(optimizer, params, [1])
    assert calls == ["before", "after"]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["a", "b"]
    assert repr(optimizer).startswith(f"{setup.cls.__name__} (\nParameter Group 0\n")


def test_hooks_see_the_arguments_and_may_replace_them() -> None:
    params = make_params()
    optimizer = Adam(params)
    seen: list[Any] = []
    optimizer.register_step_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)))
    run(optimizer, params, [1])
    optimizer.step(grad_multiplier=0.5)
    optimizer.step(lambda: 2.5)
    ((first, one), (_, two), (last, three)) = seen
    assert first == (optimizer,)
    assert last[1]() == 2.5
    assert (one, two, three) == ({}, {"grad_multiplier": 0.5}, {})
    optimizer.register_step_pre_hook(lambda opt, *_: ((opt, lambda: 7.5), {}))
    assert optimizer.step() == 7.5


@every_optimizer
@pytest.mark.filterwarnings("ignore:.*Profiler clears events")  # before torch 2.13, each does
def test_profiler_sees_the_step(setup: Setup, fused: bool | None) -> None:
    params = make_params()
    optimizer = setup.make(params, fused=fused)
    with torch.profiler.profile() as profile:
        run(optimizer, params, [1])
    name = f"Optimizer.step#{setup.cls.__name__}.step"
    assert name in {event.key for event in profile.key_averages()}


class Noting(Adam):
    """Notes its steps, of which each says what it is the step of."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        # Not a number: torch.compile sets no attribute of an optimizer before torch 2.12.
        self.noted: list[str] = []

    def step(self, what: str) -> None:  # type: ignore[override]
        self.noted.append(what)
        super().step()


def test_hooks_of_a_subclass_run_once() -> None:
    params = make_params()
    calls: list[str] = []
    handle = register_optimizer_step_pre_hook(lambda *_: calls.append("for all"))
    try:
        for cls in (Adam, Noting):
            calls.clear()
            optimizer = cls(params)
            optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
            optimizer.register_step_post_hook(lambda *_: calls.append("after"))
            set_grads(params, 1)
            optimizer.step(*(["training"] if cls is Noting else []))
            assert calls == ["for all", "before", "after"]
    finally:
        handle.remove()
    assert isinstance(optimizer, Noting)
    assert optimizer.noted == ["training"]


@pytest.mark.real
@every_optimizer
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_training_step(setup: Setup, fused: bool | None) -> None:
    def train(compiled: bool) -> list[Tensor]:
        params = make_params()
        optimizer = setup.make(params, fused=fused)

        def step(x: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = (x @ params[0]).square().sum() + params[1].square().sum()
            loss.backward()
            optimizer.step()
            return loss.detach()

        function = torch.compile(step, backend="eager") if compiled else step
        for _ in range(3):
            function(torch.ones(2, 3))
        return contents(optimizer)

    assert_same(train(True), train(False))


@pytest.mark.real  # compiling asks a CUDA device for the state of its random numbers
def test_a_compiled_step_of_a_subclass_runs_once() -> None:
    params = make_params()
    optimizer = Noting(params)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))

    @torch.compile(backend="eager")
    def train() -> None:
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step("training")

    train()
    assert (optimizer.noted, calls) == (["training"], ["before"])
    assert all(optimizer.state[p]["step"] == 1 for p in params)


@pytest.mark.real
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf",
    "ignore::DeprecationWarning",  # of torch's own parts, which a reset imports where CUDA is
)
def test_a_compiled_step_with_a_closure() -> None:
    torch._dynamo.reset()  # it gives up compiling what has been compiled for many classes
    params = make_params()
    optimizer = Adam(params)
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=backend)
    def train() -> float:
        def closure() -> float:
            return sum(param.square().sum() for param in params)  # type: ignore[return-value]

        return optimizer.step(closure)

    wanted = sum(float(param.detach().square().sum()) for param in params)
    loss: Any = train()
    assert loss.item() == pytest.approx(wanted)
    assert graphs  # of the closure


@pytest.mark.real
def test_a_step_while_something_else_is_compiled() -> None:
    params = make_params()
    optimizer = Adam(params)

    def backend(graph: Any, _: Any) -> Any:
        run(optimizer, params, [1])
        return graph.forward

    assert torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2)).sum() == 4
    assert all(optimizer.state[p]["step"] == 1 for p in params)


# ---- groups that were changed --------------------------------------------------------------------


def test_groups_in_a_tuple(fused: bool | None) -> None:
    params, others = make_params(), make_params()
    optimizer, other = (
        Adam([{"params": p[:1]}, {"params": p[1:]}], fused=fused) for p in (params, others)
    )
    optimizer.param_groups = tuple(optimizer.param_groups)  # type: ignore[assignment]
    run(optimizer, params, [1, 2])
    run(other, others, [1, 2])
    assert_same(contents(optimizer), contents(other))


@pytest.mark.skipif(native is None, reason="no native kernels")
def test_numbers_are_read_before_parameters() -> None:
    """Even where reading one lets other Python code run, which removes a gradient."""

    class Removing:
        def __float__(self) -> float:
            params[0].grad = None
            return 0.9

    params = make_params([(1 << 16,), (3,)])
    optimizer = AdamW([{"params": params[:1]}, {"params": params[1:]}])
    run(optimizer, params, [1])
    before = params[0].detach().clone()
    set_grads(params, 2)
    optimizer.param_groups[1]["betas"] = (Removing(), 0.99)
    optimizer.step()
    assert_same([params[0].detach()], [before])
    assert optimizer.state[params[1]]["step"] == 2


@every_optimizer
@pytest.mark.parametrize("surplus", [-1, 1])
def test_another_number_of_betas(setup: Setup, surplus: int, fused: bool | None) -> None:
    params = make_params()
    optimizer = setup.make(params, fused=fused)
    group = optimizer.param_groups[0]
    if "betas" not in group:
        pytest.skip("of one beta only")
    run(optimizer, params, [1])
    before = [tensor.clone() for tensor in contents(optimizer)]
    length = len(group["betas"])
    group["betas"] = ((*group["betas"], 0.5) if surplus > 0 else group["betas"])[: length + surplus]
    set_grads(params, 2)
    message = f"betas has {length + surplus} values; expected {length}"
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert_same(contents(optimizer), before)


@pytest.mark.real
@pytest.mark.skipif(native is None, reason="no native kernels")
def test_what_is_left_costs_one_more_native_call(monkeypatch: pytest.MonkeyPatch) -> None:
    params = make_params([(3, 4)] * 3)
    params[1] = Parameter(torch.ones(3, 8)[:, ::2])
    optimizer = Adam(params)
    run(optimizer, params, [1])
    calls = []
    assert native is not None
    step = native.step

    def counted(*arguments: Any) -> Any:
        calls.append(step(*arguments))
        return calls[-1]

    monkeypatch.setattr(native, "step", counted)
    run(optimizer, params, [2])
    assert calls == [[[1]], [[1]]]
    assert all(optimizer.state[p]["step"] == 2 for p in params)


# ---- errors --------------------------------------------------------------------------------------

_BAD = [
    ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
    ({"lr": math.nan}, ValueError, "Invalid learning rate: nan"),
    ({"lr": torch.ones(2)}, ValueError, "Tensor lr must be 1-element"),
    ({"weight_decay": -0.5}, ValueError, "Invalid weight_decay value: -0.5"),
    ({"weight_decay_method": "none"}, ValueError, "Invalid weight_decay_method: 'none'"),
    ({"differentiable": True}, ValueError, "does not support differentiable=True"),
    ({"master_weights": True, "stochastic_rounding": True}, ValueError, "cannot be combined"),
    ({"state_dtype": torch.float64}, ValueError, "Invalid state_dtype: torch.float64"),
    ({"state_dtype": {"other": torch.float32}}, ValueError, "has no state 'other'"),
    ({"unknown": 1}, TypeError, "unexpected keyword argument 'unknown'"),
]  # fmt: skip


@pytest.mark.once
@every_optimizer
@pytest.mark.parametrize(("arguments", "error", "message"), _BAD, ids=lambda v: str(v)[:40])
def test_bad_arguments(
    setup: Setup, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        setup.make(make_params(), **arguments)


_BAD_HYPERPARAMETERS = [
    ("Adam", {"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0: 1.0"),
    ("AdamW", {"betas": (0.9, -0.1)}, "Invalid beta parameter at index 1: -0.1"),
    ("Lion", {"betas": (0.9, 1.5)}, "Invalid beta at index 1: 1.5"),
    ("AdEMAMix", {"betas": (0.9, 0.9, 1.0)}, "Invalid beta at index 2: 1.0"),
    ("AdEMAMix", {"betas": (0.9, 0.9)}, "betas has 2 values; expected 3"),
    ("LaProp", {"eps": -1e-8}, "Invalid epsilon value: -1e-08"),
    ("Signum", {"momentum": 1.0}, "Invalid momentum: 1.0"),
    ("SimplifiedAdEMAMix", {"min_beta_fast": 1.0}, "Invalid min_beta_fast: 1.0"),
    (
        "SimplifiedAdEMAMix",
        {"num_beta_fast_warmup_steps": -1},
        "Invalid num_beta_fast_warmup_steps: -1",
    ),
    ("SimplifiedAdEMAMix", {"alpha": math.nan}, "Invalid alpha: nan"),
    ("AdEMAMix", {"num_alpha_warmup_steps": -1}, "Invalid num_alpha_warmup_steps: -1"),
    ("AdEMAMix", {"num_beta_slow_warmup_steps": -1}, "Invalid num_beta_slow_warmup_steps: -1"),
    (
        "AdEMAMix",
        {"betas": (0.9, 0.999, 1 - 1e-9), "num_beta_slow_warmup_steps": 10},
        r"betas\[2\] is too close to 1 to be warmed up",
    ),
    ("Adam", {"amsgrad": True}, "amsgrad=True is not supported; torch.optim.Adam"),
    ("AdamW", {"amsgrad": True}, "amsgrad=True is not supported; torch.optim.Adam"),
    ("Adam", {"decoupled_weight_decay": True, "weight_decay_method": "palm"}, "cannot be combined"),
]


@pytest.mark.parametrize(("name", "arguments", "message"), _BAD_HYPERPARAMETERS)
def test_bad_hyperparameters(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(emerging_optimizers, name)(make_params(), **arguments)


@pytest.mark.parametrize("cls", [Adam, AdamW])
def test_arguments_of_torch(cls: type[Adam]) -> None:
    params = make_params()
    optimizer = cls(params, 0.1, (0.8, 0.9), 1e-6, 0.2, False, foreach=True, capturable=False)
    assert optimizer.defaults["weight_decay"] == 0.2
    betas: Any = (torch.tensor(0.8), torch.tensor(0.9))
    run(cls(params, betas=betas), params, [1])
    with pytest.raises(RuntimeError, match="`fused` and `foreach` cannot be `True` together"):
        cls(params, foreach=True, fused=True)


@pytest.mark.real
@every_optimizer
def test_bad_steps(setup: Setup, fused: bool | None) -> None:
    params = make_params()
    optimizer = setup.make(params, fused=fused)
    before = [p.detach().clone() for p in params]
    set_grads(params, 1)
    assert params[1].grad is not None
    params[1].grad = params[1].grad.to_sparse()
    message = f"{setup.cls.__name__} does not support sparse gradients"
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert_same([p.detach() for p in params], before, "after the error")


def test_shape_scaling_needs_matrices(fused: bool | None) -> None:
    params = make_params([(3, 4), (5,)])
    optimizer = Signum(params, use_shape_scaling=True, fused=fused)
    with pytest.raises(ValueError, match=r"use_shape_scaling needs 2-D parameters; .* \(5,\)"):
        run(optimizer, params, [1])
    assert_same([p.detach() for p in params], [p.detach() for p in make_params([(3, 4), (5,)])])


def test_shape_scaling_of_an_empty_matrix(fused: bool | None) -> None:
    params = make_params([(0, 0), (3, 4)])
    run(Signum(params, use_shape_scaling=True, fused=fused), params, [1])
    assert not torch.equal(params[1], make_params([(0, 0), (3, 4)])[1])


@every_optimizer
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_parameter_that_is_in_a_group_twice(setup: Setup, fused: bool | None) -> None:
    params, others = make_params(), make_params()
    optimizer = setup.make([*params, params[0]], fused=fused)
    plain = setup.make([*others, others[0]], fused=False)
    run(optimizer, params, [1, 2])
    run(plain, others, [1, 2])
    assert [optimizer.state[param]["step"] for param in params] == [4, 2]
    for param, other in zip(params, others, strict=True):
        torch.testing.assert_close(param, other)


@pytest.mark.skipif(native is None, reason="there are no native kernels")
@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_native_step_is_taken(
    setup: Setup, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(_fallback_step, "update_group")
    params = make_params(dtype=dtype)
    master_weights = dtype == torch.bfloat16
    optimizer = setup.make(params, lr=0.1, fused=True, master_weights=master_weights)
    versions = [param._version for param in params]
    before = [param.detach().clone() for param in params]
    run(optimizer, params, [1, 2])
    for param, version, old in zip(params, versions, before, strict=True):
        state = optimizer.state[param]
        assert state["step"] == 2
        assert param._version > version
        assert all(state[name]._version > 0 for name in (*setup.states, "step"))
        assert not torch.equal(param, old)
        if master_weights:
            assert torch.equal(param, state["master_param"].to(dtype))


@pytest.mark.real
@every_optimizer
def test_errors_change_nothing(setup: Setup, fused: bool | None) -> None:
    params = make_params([(3, 4), (5, 2), (2, 2)])
    optimizer = setup.make([{"params": [p]} for p in params], fused=fused)
    run(optimizer, params, [1])
    before = contents(optimizer)
    set_grads(params, 2)
    params[1].grad = torch.ones(5, 2).to_sparse()
    versions = [p._version for p in params]
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert_same(contents(optimizer), before)
    assert [p._version for p in params] == versions
    set_grads(params, 2)
    name = setup.states[-1]
    for wrong, error, message in (
        (torch.zeros(5), ValueError, f"state '{name}' has shape"),
        (3.0, TypeError, f"state '{name}' must be a Tensor"),
        (None, ValueError, rf"the state of param_groups\[2\]\['params'\]\[0\] has no '{name}'"),
    ):
        optimizer.state[params[2]][name] = wrong
        with pytest.raises(error, match=message):
            optimizer.step()
        optimizer.state[params[2]][name] = torch.zeros_like(params[2])
        assert_same(contents(optimizer)[:-1], before[:-1])


@every_optimizer
def test_counters_that_are_shared(setup: Setup, fused: bool | None) -> None:
    params, others = make_params(), make_params()
    optimizer, other = setup.make(params, fused=fused), setup.make(others, fused=fused)
    run(optimizer, params, [1])
    run(other, others, [1, 2, 3])
    optimizer.state[params[1]]["step"] = optimizer.state[params[0]]["step"]
    run(optimizer, params, [2, 3])
    assert [optimizer.state[p]["step"].item() for p in params] == [3, 3]
    assert_same([p.detach() for p in params], [p.detach() for p in others])


# What is wrong with one of several parameters, and the error that says so.
def _replaced_state(make: Callable[[Tensor], Any], name: str = "exp_avg") -> Breaking:
    def apply(optimizer: ScalarOptimizer, param: Parameter, group: dict[str, Any]) -> None:
        optimizer.state[param][name] = make(optimizer.state[param][name])

    return apply


def _replaced_value(key: str, value: Any) -> Breaking:
    return lambda optimizer, param, group: group.update({key: value})


def _free(tensor: Tensor) -> Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


def _expand(optimizer: ScalarOptimizer, param: Parameter, group: dict[str, Any]) -> None:
    param.data = torch.ones(()).expand(param.shape)


def _make_grad_complex(optimizer: ScalarOptimizer, param: Parameter, group: dict[str, Any]) -> None:
    data, grad = param.data, param.grad
    param.grad = None
    param.data = data.to(torch.complex64)
    assert grad is not None
    param.grad = grad.to(torch.complex64)
    param.data = data


def _free_param(optimizer: ScalarOptimizer, param: Parameter, group: dict[str, Any]) -> None:
    _free(param.data)


def _free_grad(optimizer: ScalarOptimizer, param: Parameter, group: dict[str, Any]) -> None:
    assert param.grad is not None
    _free(param.grad)


_BREAKING: dict[str, tuple[Breaking, type[Exception], str]] = {
    "expanded param": (_expand, ValueError, "the parameter overlaps itself"),
    "freed param": (_free_param, ValueError, "the parameter has no memory"),
    "freed grad": (_free_grad, ValueError, "its gradient has no memory"),
    "complex grad": (_make_grad_complex, TypeError, "its gradient has dtype torch.complex64"),
    "freed state": (_replaced_state(_free), ValueError, "state 'exp_avg' has no memory"),
    "whole state": (_replaced_state(Tensor.long), TypeError, "'exp_avg' has dtype torch.int64"),
    "complex state": (
        _replaced_state(lambda state: state + 0j),
        TypeError,
        "'exp_avg' has dtype torch.complex64",
    ),
    "sparse state": (_replaced_state(Tensor.to_sparse), TypeError, "'exp_avg' has layout"),
    "meta state": (_replaced_state(lambda state: state.to("meta")), ValueError, "is on meta"),
    "expanded state": (
        _replaced_state(lambda state: torch.zeros(()).expand(state.shape)),
        ValueError,
        "state 'exp_avg' overlaps itself",
    ),
    "inference state": (
        _replaced_state(torch.inference_mode()(torch.clone)),
        RuntimeError,
        "state 'exp_avg' is an inference tensor",
    ),
    "no step": (
        _replaced_state(lambda step: step * math.nan, "step"),
        ValueError,
        "state 'step' is nan",
    ),
    "negative step": (_replaced_state(Tensor.neg, "step"), ValueError, "state 'step' is -1"),
    "two steps": (
        _replaced_state(lambda step: step.expand(2), "step"),
        ValueError,
        "state 'step' has 2 elements",
    ),
    "lr": (_replaced_value("lr", "fast"), TypeError, "lr must be a number, not str"),
    "two lrs": (_replaced_value("lr", torch.ones(2)), ValueError, "lr .*1"),
    "weight decay": (_replaced_value("weight_decay", None), TypeError, "weight_decay must be a"),
    "method": (
        _replaced_value("weight_decay_method", "l1"),
        ValueError,
        "Invalid weight_decay_method: 'l1'; expected one of 'decoupled', 'independent', 'palm'",
    ),
    "no method": (
        _replaced_value("weight_decay_method", None),
        TypeError,
        "weight_decay_method must be a str, not NoneType",
    ),
    "betas": (
        _replaced_value("betas", (1.5, 0.9)),
        ValueError,
        "Invalid beta parameter at index 0: 1.5",
    ),
}


@pytest.mark.real
@pytest.mark.parametrize("what", _BREAKING)
def test_errors_change_no_other_parameter_either(what: str, fused: bool | None) -> None:
    """Neither one that comes before in the step, in its group or in another one, nor one after."""
    params = make_params([(3, 4)] * 5)
    groups: list[dict[str, Any]] = [{"params": params[:1]}, {"params": params[1:4]}]
    optimizer = AdamW([*groups, {"params": params[4:]}], lr=0.1, fused=fused)
    run(optimizer, params, [1])
    set_grads(params, 2)
    others = [p for i, p in enumerate(params) if i != 2]
    parts = [tensor for p in others for tensor in (p, *optimizer.state[p].values())]
    before = [tensor.detach().clone() for tensor in parts]
    apply, error, message = _BREAKING[what]
    apply(optimizer, params[2], optimizer.param_groups[1])
    with pytest.raises(error, match=message):
        optimizer.step()
    now = [tensor for p in others for tensor in (p, *optimizer.state[p].values())]
    assert_same([tensor.detach() for tensor in now], before)


def test_gradients_that_are_stored_otherwise(fused: bool | None) -> None:
    grads = {
        "bfloat16": torch.tensor([[1.0, -2.0, 3.0]] * 2).bfloat16(),
        "float64": torch.tensor([[1.0, -2.0, 3.0]] * 2).double(),
        "expanded": torch.full((1, 1), 3.0).expand(2, 3),
        "strided": torch.arange(12.0).view(2, 6)[:, ::2],
        "transposed": torch.arange(6.0).view(3, 2).t(),
        "negated lazily": torch._neg_view(torch.ones(2, 3)),  # type: ignore[attr-defined]
    }
    for name, grad in grads.items():
        params, others = make_params([(2, 3)]), make_params([(2, 3)])
        optimizer = AdamW(params, lr=0.1, fused=fused)
        other = AdamW(others, lr=0.1, fused=fused)
        if fused is None and native is not None:
            optimizer.param_groups[0]["fused"] = True  # where it can, that is everywhere here
        params[0].grad_dtype = None  # type: ignore[attr-defined]
        for _ in range(2):
            params[0].grad = grad
            others[0].grad = grad.float().clone(memory_format=torch.contiguous_format)
            others[0].grad = others[0].grad.resolve_neg()
            optimizer.step()
            other.step()
        torch.testing.assert_close(params, others, msg=name)
        assert optimizer.state[params[0]]["exp_avg"].dtype == torch.float32
        assert params[0].grad is grad


@every_optimizer
@pytest.mark.parametrize("lies", ["contiguous", "transposed"])
def test_a_step_allocates_nothing(setup: Setup, lies: str) -> None:
    if native is None:
        pytest.skip("no native kernels")
    for dtype, options in (
        (torch.float32, {}),
        (torch.complex64, {}),
        (torch.bfloat16, {"master_weights": True}),
        (torch.float16, {"stochastic_rounding": True, "state_dtype": torch.float32}),
    ):
        (value,) = make_params([(64, 200)], dtype)
        param = Parameter(value.detach() if lies == "contiguous" else value.detach().t())
        optimizer = setup.make([param], weight_decay=0.1, fused=True, **options)
        param.grad = torch.ones_like(param)
        optimizer.step()
        with torch.autograd.profiler.profile(profile_memory=True) as profile:
            optimizer.step(grad_multiplier=0.5)
        events = profile.function_events
        allocated = sum(max(0, event.self_cpu_memory_usage) for event in events)
        assert allocated < 100, (dtype, allocated)  # a seed


_SIGNATURES = {
    "Adam": "lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.0, amsgrad=False, *,"
    " correct_bias=True, nesterov=False, weight_decay_method='l2', decoupled_weight_decay=False,"
    " foreach=None",
    "AdamW": "lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.01, amsgrad=False, *,"
    " correct_bias=True, nesterov=False, weight_decay_method='decoupled', foreach=None",
    "AdEMAMix": "lr=0.001, betas=(0.9, 0.999, 0.9999), eps=1e-08, weight_decay=0.0, *, alpha=5.0,"
    " num_beta_slow_warmup_steps=None, num_alpha_warmup_steps=None, correct_bias=True,"
    " weight_decay_method='decoupled'",
    "LaProp": "lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.0, *, correct_bias=True,"
    " frob_normalize=False, weight_decay_method='decoupled'",
    "Lion": "lr=0.0001, betas=(0.9, 0.99), weight_decay=0.01, *, weight_decay_method='decoupled'",
    "Signum": "lr=0.001, momentum=0.9, weight_decay=0.0, *, correct_bias=True, nesterov=False,"
    " use_shape_scaling=False, weight_decay_method='decoupled'",
    "SimplifiedAdEMAMix": "lr=0.001, betas=(0.9999, 0.999), eps=1e-08, weight_decay=0.0, *,"
    " correct_bias=True, num_beta_fast_warmup_steps=None, min_beta_fast=0.9, alpha=2.0,"
    " weight_decay_method='decoupled'",
}


@pytest.mark.parametrize("name", _SIGNATURES)
def test_signatures(name: str) -> None:
    cls = getattr(emerging_optimizers, name)
    assert getattr(emerging_optimizers.scalar_optimizers, name) is cls
    parameters = inspect.signature(cls).parameters.values()
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    assert str(inspect.Signature(plain)) == f"(params, {_SIGNATURES[name]}, **options)"
    options = typing.get_type_hints(SharedOptions)
    assert set(options) <= set(cls(make_params()).defaults)


def test_lr_0_leaves_every_bit(fused: bool | None) -> None:
    """Numbers that are none and have a payload, a denormal one, both zeros."""
    bits = torch.tensor([0x7F800001, 0x7FC00001, -0x3FFFFF, 1, 0, -(2**31)], dtype=torch.int32)
    for dtype, values in (
        (torch.float32, bits),
        (torch.bfloat16, (bits >> 16).to(torch.int16)),
        (torch.bfloat16, torch.tensor([0x7F81, 0x7FC1, -1, 1, 0, -(2**15)], dtype=torch.int16)),
    ):
        params = [Parameter(values.clone().view(dtype))]
        for options in ({}, {"master_weights": True}):
            optimizer = LaProp(params, lr=0.0, frob_normalize=True, fused=fused, **options)
            run(optimizer, params, [1, 2])
            assert torch.equal(params[0].detach().view(values.dtype), values)


@every_half
@pytest.mark.parametrize(
    "make", [AdamW, functools.partial(LaProp, frob_normalize=True)], ids=["AdamW", "LaProp"]
)
def test_lr_0_leaves_a_parameter_whatever_its_master(
    make: Any, dtype: torch.dtype, fused: bool | None
) -> None:
    params = make_params(dtype=dtype)
    optimizer = make(params, master_weights=True, fused=fused)
    run(optimizer, params, [1])
    with torch.no_grad():
        params[0].fill_(7.0)
    optimizer.param_groups[0]["lr"] = 0.0
    run(optimizer, params, [2])
    assert (params[0] == 7.0).all()


def test_a_master_that_is_of_no_use_any_more(fused: bool | None) -> None:
    params = make_params(dtype=torch.bfloat16)
    optimizer = LaProp(params, lr=0.1, master_weights=True, frob_normalize=True, fused=fused)
    run(optimizer, params, [1])
    for param in params:
        param.data = param.data.float()
    before = [p.detach().clone() for p in params]
    run(optimizer, params, [2])
    assert not any(torch.equal(p, old) for p, old in zip(params, before, strict=True))


@every_optimizer
def test_lazily_conjugated_parameters_are_refused(setup: Setup, fused: bool | None) -> None:
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64).conj())
    param.grad = torch.ones(3, dtype=torch.complex64)
    with pytest.raises(RuntimeError, match="the parameter is a lazily conjugated view"):
        setup.make([param], fused=fused).step()


def test_groups_as_users_write_them(fused: bool | None) -> None:
    params, others = make_params(), make_params()
    optimizer = AdamW(params, maximize=True, fused=fused)
    optimizer.param_groups[0]["params"] = tuple(params)
    run(optimizer, params, [1, 2])
    run(AdamW(others, maximize=True, fused=fused), others, [1, 2])
    assert_same([p.detach() for p in params], [p.detach() for p in others])


@every_optimizer
def test_parameters_that_share_memory(setup: Setup, fused: bool | None) -> None:
    params, others = make_params(), make_params()
    shared = [*params, torch.nn.Parameter(params[0].detach())]
    optimizer, other = setup.make(shared, fused=fused), setup.make(others, fused=False)
    twice = setup.make([others[0]], fused=False)
    for step in (1, 2, 3):
        set_grads(shared, step)
        set_grads(others, step)
        optimizer.step()
        other.step()
        others[0].grad = shared[2].grad
        twice.step()
    torch.testing.assert_close(shared, [*others, others[0]])


@every_optimizer
def test_fused_without_a_native_step(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    message = f"fused=True, but {setup.cls.__name__} has no native"
    params = make_params()
    params[1] = torch.nn.Parameter(params[1].detach()[:, ::2])  # with gaps in its memory
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match=message):
        run(setup.make(params, fused=True), params, [1])
    assert_same([p.detach() for p in params], before)
    monkeypatch.setattr(_step, "native", None)
    with pytest.raises(RuntimeError, match=message):
        run(setup.make(params, fused=True), params, [1])
