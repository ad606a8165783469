"""What a rule computes once per step, for the plain PyTorch formulas."""

import math


def bias_correction(beta: float, step: int, correct_bias: bool) -> float:
    """Return ``1 - beta**step``, without cancellation where beta is close to 1."""
    if not correct_bias or beta == 0.0:
        return 1.0
    return -math.expm1(step * math.log(beta))


def linear_warmup(step: int, end: float, warmup_steps: int | None) -> float:
    """Rise from 0 to ``end`` over ``warmup_steps``."""
    if not warmup_steps or step >= warmup_steps:
        return end
    return step / warmup_steps * end


def half_life_warmup(step: int, start: float, end: float, warmup_steps: int | None) -> float:
    """Go from ``start`` to ``end`` so that the average's half-life grows linearly."""
    if not warmup_steps or step >= warmup_steps:
        return end

    def half_life(beta: float) -> float:
        return math.log(0.5) / math.log(beta + 1e-8) - 1.0

    done = step / warmup_steps
    return math.pow(0.5, 1.0 / ((1.0 - done) * half_life(start) + done * half_life(end) + 1.0))


def check_half_life(name: str, beta: float, warmup_steps: int | None) -> None:
    """Raise where a beta that is to be warmed up has no half-life."""
    if warmup_steps and beta + 1e-8 >= 1.0:
        raise ValueError(
            f"{name} is too close to 1 to be warmed up: expected {name} + 1e-8 < 1; pass None as"
            " the number of warm-up steps to use it from the first step"
        )
