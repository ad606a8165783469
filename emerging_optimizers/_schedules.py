"""Schedules and bias corrections, which the PyTorch formulas compute once a step."""

import math


def bias_correction(beta: float, step: int, correct_bias: bool) -> float:
    """Return ``1 - beta**step``, without cancellation for a beta close to 1."""
    if not correct_bias or beta == 0.0:
        return 1.0
    return -math.expm1(step * math.log(beta))


def linear_warmup(step: int, end: float, warmup_steps: int | None) -> float:
    """Return a value that rises linearly from 0 to ``end`` over ``warmup_steps``."""
    if not warmup_steps or step >= warmup_steps:
        return end
    return step / warmup_steps * end


def half_life_warmup(step: int, start: float, end: float, warmup_steps: int | None) -> float:
    """Return a beta from ``start`` to ``end``, such that the half-life grows linearly."""
    if not warmup_steps or step >= warmup_steps:
        return end

    def half_life(beta: float) -> float:
        return math.log(0.5) / math.log(beta + 1e-8) - 1.0

    done = step / warmup_steps
    return math.pow(0.5, 1.0 / ((1.0 - done) * half_life(start) + done * half_life(end) + 1.0))


def check_half_life(name: str, beta: float, warmup_steps: int | None) -> None:
    """Raise for a beta with a warm-up that has no half-life."""
    if warmup_steps and beta + 1e-8 >= 1.0:
        raise ValueError(
            f"{name} is too close to 1 to be warmed up: expected {name} + 1e-8 < 1; pass None as"
            " the number of warm-up steps to use it from the first step"
        )
