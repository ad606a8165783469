"""Gradients whose square overflows."""

from typing import Any

import numpy as np
import pytest
import torch
from optimizers import SETUPS, VARIANTS, Setup
from oracle import RULES, is_square
from support import to_numpy
from torch.nn import Parameter

from emerging_optimizers import Adam, megatron

LARGEST = 1e20  # of the gradients of `test_elements_recover`


def _stores(setup: Setup) -> bool:
    """Whether the average of the largest gradient's square is a float32 number."""
    step = {"step": 1} if setup.rule.has_step else {}
    zeros = [np.zeros(1) for _ in setup.states]
    expected = setup.rule.oracle(np.full(1, LARGEST), *zeros, **setup.case, **step)
    return bool(expected.states[-1].value < torch.finfo(torch.float32).max)


HAS_SQUARE = [s for s in SETUPS + VARIANTS if s.states and is_square(s.states[-1]) and _stores(s)]
every_square = pytest.mark.parametrize("setup", HAS_SQUARE, ids=str)


@pytest.mark.parametrize(
    "name", [n for n, r in RULES.items() if r.states and is_square(r.states[-1])]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_of_a_large_gradient(name: str, dtype: torch.dtype) -> None:
    """The state is finite if the weighted square is; the first update has size 1."""
    rule = RULES[name]
    case = rule.usual | ({"step": 1} if rule.has_step else {})
    weight = rule.oracle(np.ones(1), *(np.zeros(1) for _ in rule.states), **case).states[-1].value
    largest = (torch.finfo(torch.float32).max / 2 / weight.item()) ** 0.5
    grad = torch.tensor([0.25 * largest, -0.75 * largest, largest, 1.0]).to(dtype)
    states = [torch.zeros(4) for _ in rule.states]
    update = rule.function(grad, *states, **case)
    zeros = [np.zeros(4) for _ in rule.states]
    wanted = rule.oracle(to_numpy(grad), *zeros, **case)
    np.testing.assert_allclose(to_numpy(states[-1]), wanted.states[-1].value, rtol=1e-6)
    np.testing.assert_allclose(to_numpy(update), wanted.update.value, rtol=1e-6)


@every_square
def test_elements_recover(setup: Setup, fused: bool | None) -> None:
    """An element continues as in float64, where nothing overflows."""
    grads = torch.rand(300, 3) + 0.5
    grads[0], grads[120], grads[200] = LARGEST, -LARGEST, 2.0
    params = [Parameter(torch.zeros(3, dtype=dtype)) for dtype in (torch.float32, torch.float64)]
    optimizer = setup.make(params, lr=1e-2, weight_decay=0.0, fused=fused)
    moved = []
    for grad in grads:
        before = params[0].detach().clone()
        for param in params:
            param.grad = grad.to(param.dtype)
        optimizer.step()
        moved.append((params[0].detach() - before).abs().min().item())
        assert optimizer.state[params[0]][setup.states[-1]].isfinite().all()
    torch.testing.assert_close(params[0].double(), params[1], rtol=1e-5, atol=1e-6)
    assert moved[0] > 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_torch(dtype: torch.dtype, fused: bool | None) -> None:
    """As in torch, elements change again once the large square has decayed."""
    betas = (0.9, 0.5)
    grads = torch.randn(400, 50)
    grads[0, :10], grads[50, 10:20] = 2e19, -2e19
    ours = Parameter(torch.ones(50))
    theirs = Parameter(torch.ones(50, device="cpu"))  # on CUDA, torch's state overflows
    optimizer: Any = Adam([ours], lr=1e-2, betas=betas, fused=fused)
    if dtype != torch.float32:
        optimizer = megatron.FusedAdam([ours], lr=1e-2, betas=betas, use_decoupled_grad=True)
        optimizer.param_groups[0]["fused"] = fused
    reference = torch.optim.Adam([theirs], lr=1e-2, betas=betas)
    for grad in grads:
        theirs.grad = grad.to(dtype).float().cpu()
        if dtype == torch.float32:
            ours.grad = grad.clone()
        else:
            ours.decoupled_grad = grad.to(dtype)  # type: ignore[attr-defined]
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-4)
    assert (ours - 1.0).abs().min() > 1e-3
