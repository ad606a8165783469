"""The optimizers' parameters over several steps, against float64, PyTorch and each other."""

from typing import Any

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
from support import assert_equal_bits, assert_near, to_numpy

import emerging_optimizers

pytestmark = pytest.mark.on_devices("tests-optimizers")

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


@pytest.mark.once
@every_variant
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_trajectory(setup: Setup, method: str, dtype: torch.dtype, fused: bool | None) -> None:
    decay = {"lr": 0.02, "weight_decay": 0.1}
    # A centered variance is a difference. PyTorch's float32 loses more of it on some machines.
    tolerance = TOLERANCE[dtype] * (2 if "centered" in str(setup) else 1)
    params = make_params(dtype=dtype)
    optimizer = setup.make(params, **decay, weight_decay_method=method, fused=fused)
    wanted = [Trajectory(setup, to_numpy(p), **decay, method=method) for p in params]
    for step in range(1, 8):
        set_grads(params, step)
        optimizer.step()
        for param, trajectory in zip(params, wanted, strict=True):
            assert param.grad is not None
            trajectory.step(to_numpy(param.grad))
            assert_near(param, trajectory.param, tolerance)
            state = optimizer.state[param]
            assert list(state) == ["step", *setup.states]
            assert state["step"].item() == step
            for name, value in zip(setup.states, trajectory.states, strict=True):
                assert_near(state[name], value, tolerance)


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


@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("Adam", {"amsgrad": True, "weight_decay": 0.1}),
        ("AdamW", {"amsgrad": True, "betas": (0.8, 0.9)}),
        ("RMSprop", {"weight_decay": 0.1}),
        ("RMSprop", {"centered": True, "alpha": 0.9}),
        ("RMSprop", {"momentum": 0.9, "maximize": True}),
        ("RMSprop", {"momentum": 0.5, "centered": True, "weight_decay": 0.1, "eps": 1e-4}),
    ],
    ids=str,
)
def test_in_float64_against_torch(name: str, arguments: dict[str, Any], fused: bool | None) -> None:
    ours, theirs = (make_params(dtype=torch.float64) for _ in range(2))
    optimizer = getattr(emerging_optimizers, name)(ours, lr=0.01, fused=fused, **arguments)
    reference = getattr(torch.optim, name)(theirs, lr=0.01, **arguments)
    for step in range(1, 101):
        run(optimizer, ours, [step])
        run(reference, theirs, [step])
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0.0)
        states = [[o.state[p] for p in ps] for o, ps in ((optimizer, ours), (reference, theirs))]
        torch.testing.assert_close(*states, rtol=1e-5, atol=1e-12)


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
    # With different steps, each parameter steps as in an optimizer alone.
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
