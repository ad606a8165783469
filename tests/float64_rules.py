"""The rules in float64.

The formulas are written from the papers' equations, in their order, on NumPy arrays: they share
nothing with the compiled rules or with the PyTorch formulas that they judge. Each is
evaluated twice, on the operands and on their absolute values; the second is the *size of the terms*
in which the error of a sum is measured, so that cancellation is not held against the arithmetic.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Value(NamedTuple):
    """A result, and the size of the terms that were summed to it."""

    value: Array
    size: Array


class Expected(NamedTuple):
    """What a call computes. An update by sign is `scale` times the sign of `before_sign`."""

    update: Value
    states: tuple[Value, ...]
    before_sign: Value | None = None
    scale: float = 1.0


# ---- once per step -------------------------------------------------------------------------------


def one_minus_power(beta: float, step: float) -> float:
    """1 - beta^step, without the cancellation of the literal form."""
    if step == 0:
        return 0.0
    return 1.0 if beta == 0.0 else -math.expm1(step * math.log(beta))


def bias_correction(beta: float, step: float, correct_bias: bool) -> float:
    return one_minus_power(beta, step) if correct_bias else 1.0


def linear(step: float, end: float, warmup_steps: int | None) -> float:
    if warmup_steps is None or step >= warmup_steps:
        return end
    return (step / warmup_steps) * end


def half_life(step: float, start: float, end: float, warmup_steps: int | None) -> float:
    if warmup_steps is None or step >= warmup_steps:
        return end

    def steps_of(beta: float) -> float:
        return math.log(0.5) / math.log(beta + 1e-8) - 1.0

    done = step / warmup_steps
    steps = (1.0 - done) * steps_of(start) + done * steps_of(end)
    return 0.5 ** (1.0 / (steps + 1.0))


# ---- the rules -----------------------------------------------------------------------------------


def _evaluate(formula: Callable[..., Sequence[Array]], *operands: Array) -> list[Value]:
    with np.errstate(all="ignore"):
        values = formula(*operands)
        sizes = formula(*(np.abs(operand) for operand in operands))
    return [Value(value, size) for value, size in zip(values, sizes, strict=True)]


def _sign(before: Value, scale: float) -> Value:
    value = np.where(np.isnan(before.value), 0.0, np.sign(before.value)) * scale
    # -1, 0 and 1 are exact; a product with the scale is not.
    return Value(value, np.abs(value) if scale != 1.0 else np.zeros_like(value))


def adam(
    grad: Array,
    exp_avg: Array,
    exp_avg_sq: Array,
    *,
    betas: Sequence[float],
    correct_bias: bool,
    use_nesterov: bool,
    step: float,
    eps: float,
) -> Expected:
    b1, b2 = betas
    c1 = bias_correction(b1, step, correct_bias)
    c1_next = bias_correction(b1, step + 1, correct_bias)
    c2 = bias_correction(b2, step, correct_bias)

    def formula(g: Array, m: Array, v: Array) -> Sequence[Array]:
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        m_hat = b1 * m / c1_next + (1 - b1) * g / c1 if use_nesterov else m / c1
        return m_hat / (np.sqrt(v / c2) + eps), m, v

    update, *states = _evaluate(formula, grad, exp_avg, exp_avg_sq)
    return Expected(update, tuple(states))


def amsgrad(
    grad: Array,
    exp_avg: Array,
    exp_avg_sq: Array,
    max_exp_avg_sq: Array,
    *,
    betas: Sequence[float],
    correct_bias: bool,
    use_nesterov: bool,
    step: float,
    eps: float,
) -> Expected:
    b1, b2 = betas
    c1 = bias_correction(b1, step, correct_bias)
    c1_next = bias_correction(b1, step + 1, correct_bias)
    c2 = bias_correction(b2, step, correct_bias)

    def formula(g: Array, m: Array, v: Array, v_max: Array) -> Sequence[Array]:
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        v_max = np.maximum(v_max, v)
        m_hat = b1 * m / c1_next + (1 - b1) * g / c1 if use_nesterov else m / c1
        return m_hat / (np.sqrt(v_max / c2) + eps), m, v, v_max

    update, *states = _evaluate(formula, grad, exp_avg, exp_avg_sq, max_exp_avg_sq)
    return Expected(update, tuple(states))


def madam(
    grad: Array,
    exp_avg: Array,
    exp_avg_sq_scaled: Array,
    *,
    betas: Sequence[float],
    correct_bias: bool,
    step: float,
    scale_log2: float,
) -> Expected:
    b1, b2 = betas
    c1 = bias_correction(b1, step, correct_bias)
    c2 = bias_correction(b2, step, correct_bias)
    root_of_s = 2.0 ** (scale_log2 / 2)

    def formula(g: Array, m: Array, v: Array) -> Sequence[Array]:
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * (root_of_s * g) * (root_of_s * g)
        return np.where(m == 0, 0.0, root_of_s * (m / c1) / np.sqrt(v / c2)), m, v

    update, *states = _evaluate(formula, grad, exp_avg, exp_avg_sq_scaled)
    return Expected(update, tuple(states))


def rmsprop(grad: Array, exp_avg_sq: Array, *, alpha: float, eps: float) -> Expected:
    def formula(g: Array, v: Array) -> Sequence[Array]:
        v = alpha * v + (1 - alpha) * g * g
        return g / (np.sqrt(v) + eps), v

    update, square = _evaluate(formula, grad, exp_avg_sq)
    return Expected(update, (square,))


def rmsprop_centered(
    grad: Array, exp_avg_sq: Array, grad_avg: Array, *, alpha: float, eps: float
) -> Expected:
    def formula(g: Array, v: Array, mean: Array) -> Sequence[Array]:
        v = alpha * v + (1 - alpha) * g * g
        mean = alpha * mean + (1 - alpha) * g
        return g / (np.sqrt(v - mean * mean) + eps), v, mean

    update, square, mean = _evaluate(formula, grad, exp_avg_sq, grad_avg)
    # The error of the variance is relative to its terms, which may be much larger.
    with np.errstate(all="ignore"):
        terms = square.size + mean.size * mean.size
        lost = np.maximum(terms / np.abs(square.value - mean.value * mean.value), 1.0)
        size = np.where(update.value == 0.0, 0.0, np.abs(update.value) * lost)
    return Expected(Value(update.value, size), (square, mean))


def _with_momentum(normalized: Value, momentum_buffer: Array, momentum: float) -> Value:
    with np.errstate(all="ignore"):
        return Value(
            momentum * momentum_buffer + normalized.value,
            momentum * np.abs(momentum_buffer) + normalized.size,
        )


def rmsprop_momentum(
    grad: Array,
    exp_avg_sq: Array,
    momentum_buffer: Array,
    *,
    alpha: float,
    eps: float,
    momentum: float,
) -> Expected:
    plain = rmsprop(grad, exp_avg_sq, alpha=alpha, eps=eps)
    buffer = _with_momentum(plain.update, momentum_buffer, momentum)
    return Expected(buffer, (*plain.states, buffer))


def rmsprop_centered_momentum(
    grad: Array,
    exp_avg_sq: Array,
    grad_avg: Array,
    momentum_buffer: Array,
    *,
    alpha: float,
    eps: float,
    momentum: float,
) -> Expected:
    centered = rmsprop_centered(grad, exp_avg_sq, grad_avg, alpha=alpha, eps=eps)
    buffer = _with_momentum(centered.update, momentum_buffer, momentum)
    return Expected(buffer, (*centered.states, buffer))


def ademamix(
    grad: Array,
    exp_avg_fast: Array,
    exp_avg_slow: Array,
    exp_avg_sq: Array,
    *,
    num_beta_slow_warmup_steps: int | None,
    num_alpha_warmup_steps: int | None,
    betas: Sequence[float],
    step: float,
    eps: float,
    correct_bias: bool,
    alpha: float = 2,
) -> Expected:
    b_fast, b2, b_slow_final = betas
    a = linear(step, alpha, num_alpha_warmup_steps)
    b_slow = half_life(step, b_fast, b_slow_final, num_beta_slow_warmup_steps)
    c_fast = bias_correction(b_fast, step, correct_bias)
    c2 = bias_correction(b2, step, correct_bias)

    def formula(g: Array, m_fast: Array, m_slow: Array, v: Array, a: Array) -> Sequence[Array]:
        m_fast = b_fast * m_fast + (1 - b_fast) * g
        m_slow = b_slow * m_slow + (1 - b_slow) * g
        v = b2 * v + (1 - b2) * g * g
        return (m_fast / c_fast + a * m_slow) / (np.sqrt(v / c2) + eps), m_fast, m_slow, v

    update, *states = _evaluate(
        formula, grad, exp_avg_fast, exp_avg_slow, exp_avg_sq, np.float64(a)
    )
    return Expected(update, tuple(states))


def sim_ademamix(
    grad: Array,
    exp_avg: Array,
    exp_avg_sq: Array,
    *,
    num_beta_fast_warmup_steps: int | None,
    min_beta_fast: float,
    betas: Sequence[float],
    step: float,
    eps: float,
    correct_bias: bool,
    alpha: float = 2,
) -> Expected:
    b_fast_final, b2 = betas
    b = half_life(step, min_beta_fast, b_fast_final, num_beta_fast_warmup_steps)
    c1 = one_minus_power(b, step) / (1 - b) if correct_bias else 1.0
    c2 = bias_correction(b2, step, correct_bias)

    def formula(g: Array, m: Array, v: Array, a: Array) -> Sequence[Array]:
        m = b * m + g
        v = b2 * v + (1 - b2) * g * g
        return (a * g + m / c1) / (np.sqrt(v / c2) + eps), m, v

    update, *states = _evaluate(formula, grad, exp_avg, exp_avg_sq, np.float64(alpha))
    return Expected(update, tuple(states))


def laprop(
    grad: Array,
    exp_avg: Array,
    exp_avg_sq: Array,
    *,
    correct_bias: bool,
    betas: Sequence[float],
    step: float,
    eps: float,
) -> Expected:
    b1, b2 = betas
    c1 = bias_correction(b1, step, correct_bias)
    c2 = bias_correction(b2, step, correct_bias)

    def formula(g: Array, m: Array, v: Array) -> Sequence[Array]:
        v = b2 * v + (1 - b2) * g * g
        normalised = g / (np.sqrt(v / c2) + eps)
        m = b1 * m + (1 - b1) * normalised
        return m / c1, m, v

    update, *states = _evaluate(formula, grad, exp_avg, exp_avg_sq)
    return Expected(update, tuple(states))


def lion(
    grad: Array,
    exp_avg: Array,
    *,
    momentum_beta: float,
    momentum_beta2: float | None = None,
) -> Expected:
    b1 = momentum_beta
    b2 = b1 if momentum_beta2 is None else momentum_beta2

    def formula(g: Array, m: Array) -> Sequence[Array]:
        return b1 * m + (1 - b1) * g, b2 * m + (1 - b2) * g

    before_sign, momentum = _evaluate(formula, grad, exp_avg)
    return Expected(_sign(before_sign, 1.0), (momentum,), before_sign)


def signum(
    grad: Array,
    exp_avg: Array,
    *,
    momentum_beta: float,
    correct_bias: bool,
    use_nesterov: bool,
    step: float,
    use_shape_scaling: bool = False,
) -> Expected:
    b = momentum_beta
    c1 = bias_correction(b, step, correct_bias)
    c1_next = bias_correction(b, step + 1, correct_bias)
    scale = 2.0 / (grad.shape[0] + grad.shape[1]) if use_shape_scaling and grad.size else 1.0

    def formula(g: Array, m: Array) -> Sequence[Array]:
        m = b * m + (1 - b) * g
        return b * m / c1_next + (1 - b) * g / c1 if use_nesterov else m, m

    before_sign, momentum = _evaluate(formula, grad, exp_avg)
    return Expected(_sign(before_sign, scale), (momentum,), before_sign, scale)


def root(grad: Array, *, scale: float) -> Expected:
    update, *_ = _evaluate(lambda g: (scale * np.sign(g) * np.sqrt(np.abs(g)),), grad)
    return Expected(update, ())
