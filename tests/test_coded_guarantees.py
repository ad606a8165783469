"""Training with 8-bit states against training with float32 states: no element runs away or stops.

One group of 32 elements of a 128x32 parameter is set; the others have gradients of 0.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from emerging_optimizers import AdamW

pytestmark = [
    pytest.mark.usefixtures("_no_other_device"),
    pytest.mark.builtin_rules("has no rule"),
]

LR = 1e-3


def updates(
    state_dtype: object, steps: int, grad_of: Callable[[int], Tensor], **options: Any
) -> Tensor:
    """Return the updates of the group's elements in each step, divided by the learning rate."""
    param = nn.Parameter(torch.zeros(128, 32))
    optimizer = AdamW(
        [param],
        lr=LR,
        betas=(0.9, 0.999),
        weight_decay=0.0,
        state_dtype=state_dtype,  # type: ignore[arg-type]
        **options,
    )
    assert optimizer.param_groups[0]["fused"] is None
    grad = torch.zeros(128, 32)
    param.grad = grad
    found = torch.empty(steps, 32)
    for step in range(steps):
        grad[5] = grad_of(step)
        param.data[5] = 0.0  # so that no update is lost to rounding
        optimizer.step()
        found[step] = -param.detach()[5] / LR
    return found.double()


def both(steps: int, grad_of: Callable[[int], Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """The updates with 8-bit states, and with float32 states."""
    coded, wide = (updates(d, steps, grad_of, **options) for d in ("8bit", torch.float32))
    return coded, wide


def rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def noise(steps: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(steps, 32, generator=generator)


@pytest.mark.parametrize("ratio", [1.0, 1e3, 1e4])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_large_neighbour(ratio: float, seed: int) -> None:
    grads = noise(1000, seed)
    grads[:, 0] *= ratio
    coded, wide = both(1000, grads.__getitem__)
    size = rms(coded[-100:, 1:]) / rms(wide[-100:, 1:])
    assert 0.8 <= size <= 1.25
    # At each step and element: the largest that float32 had up to there.
    largest = wide.abs().cummax(0).values.clamp(min=wide[0].abs().min())
    worst = (coded.abs() / largest).max().item()
    assert worst <= 2


def test_gradients_that_shrink() -> None:
    """By a factor of 100, beside one that does not."""
    steps = 9000
    grads = noise(steps, 2)
    shrinking = torch.logspace(0, -2, steps // 3)
    grads[: steps // 3, 1:] *= shrinking.view(-1, 1)
    grads[steps // 3 :, 1:] *= 0.01
    coded, wide = both(steps, grads.__getitem__)
    size = rms(coded[-100:, 1:]) / rms(wide[-100:, 1:])
    assert 0.8 <= size <= 1.25


def test_a_gradient_that_becomes_0() -> None:
    """Exactly 0, after steps in which it had a mean: the remaining movement is that of float32."""
    begin, steps = 500, 5500
    grads = noise(steps, 3) * 0.1 + 1.0
    grads[begin:, 1:] = 0.0
    coded, wide = both(steps, grads.__getitem__)
    moved = coded[begin:, 1:].sum() / wide[begin:, 1:].sum()
    assert 0.67 <= moved.item() <= 1.5


def test_a_running_maximum() -> None:
    """It does not keep what rounding adds, step after step."""
    grads = noise(4000, 4)
    coded, wide = both(4000, grads.__getitem__, amsgrad=True)
    assert 0.97 <= rms(coded[-1000:]) / rms(wide[-1000:]) <= 1.03
