"""Gradient scaling: GradScaler, its attributes, and steps that overflow."""

import math

import pytest
import torch
from optimizers import (
    Setup,
    assert_same,
    contents,
    every_optimizer,
    make_grads,
    make_params,
    run,
    set_grads,
)

pytestmark = pytest.mark.on_devices("tests-optimizers")


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
