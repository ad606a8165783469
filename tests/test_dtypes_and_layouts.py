"""Optimizers with parameters and gradients of every dtype, shape and layout."""

import pytest
import torch
from optimizers import (
    METHODS,
    Setup,
    Trajectory,
    assert_same,
    contents,
    every_optimizer,
    every_optimizer_with_states,
    make_params,
    run,
    set_grads,
)
from support import (
    LAYOUT_SHAPE,
    LAYOUTS,
    assert_equal_bits,
    assert_near,
    every_half,
    round_once,
    to_numpy,
)

from emerging_optimizers import AdamW, Signum
from emerging_optimizers._native import native

pytestmark = pytest.mark.on_devices("tests-optimizers")


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
            # After float32 arithmetic, values close to a midpoint may round either way.
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
    else:  # the fallback, while the other one takes the native step
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
                param.grad = param.grad.conj().resolve_conj().conj()  # lazily conjugated
                assert param.grad.is_conj()
        optimizer.step()
        other.step()
    assert_same(contents(optimizer), contents(other))
    for name in setup.states:
        assert optimizer.state[params[0]][name].dtype == torch.complex64


def test_complex_shape_scaling(fused: bool | None) -> None:
    params = make_params([(3, 4)], dtype=torch.complex64)
    before = params[0].detach().clone()
    run(Signum(params, lr=1.0, use_shape_scaling=True, fused=fused), params, [1])
    moved = torch.view_as_real(before - params[0].detach()).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 2 / 7))


@every_optimizer_with_states
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


def test_dtypes_and_layouts_of_gradients(fused: bool | None) -> None:
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
            optimizer.param_groups[0]["fused"] = True  # native steps are possible for all of them
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
def test_lazily_conjugated_parameters_are_rejected(setup: Setup, fused: bool | None) -> None:
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64).conj())
    param.grad = torch.ones(3, dtype=torch.complex64)
    with pytest.raises(RuntimeError, match="the parameter is a lazily conjugated view"):
        setup.make([param], fused=fused).step()
