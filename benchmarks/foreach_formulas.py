"""The rules' formulas in ``torch._foreach_*`` operations.

They use as few operations as the arithmetic allows, in place where a tensor can be reused.
Numerator and denominator of an update are both multiplied by the numerator's bias correction, which
saves an operation. Momentum betas must not be 0.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from emerging_optimizers._schedules import bias_correction, half_life_warmup, linear_warmup

_Tensors = Sequence[Tensor]


def _update_square_average(averages: _Tensors, grads: _Tensors, beta: float) -> None:
    torch._foreach_mul_(averages, beta)
    torch._foreach_addcmul_(averages, grads, grads, 1 - beta)


def _denominators(exp_avg_sqs: _Tensors, c2: float, eps: float, scale: float) -> _Tensors:
    """Return ``scale * (sqrt(exp_avg_sq / c2) + eps)``."""
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_mul_(denominators, scale / c2**0.5)
    torch._foreach_add_(denominators, scale * eps)
    return denominators


def _look_ahead(
    exp_avgs: _Tensors, grads: _Tensors, beta: float, step: int, correct_bias: bool
) -> tuple[_Tensors, float]:
    """Return Nesterov's momentum ``beta m / c1' + (1 - beta) g / c1`` times a factor, and that."""
    c1 = bias_correction(beta, step, correct_bias)
    c1_next = bias_correction(beta, step + 1, correct_bias)
    scale = c1_next / beta
    return torch._foreach_add(exp_avgs, grads, alpha=scale * (1 - beta) / c1), scale


def _foreach_adam(
    grads: _Tensors,
    exp_avgs: _Tensors,
    exp_avg_sqs: _Tensors,
    betas: tuple[float, float],
    correct_bias: bool,
    use_nesterov: bool,
    step: int,
    eps: float,
) -> _Tensors:
    beta1, beta2 = betas
    c2 = bias_correction(beta2, step, correct_bias)
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    _update_square_average(exp_avg_sqs, grads, beta2)
    if use_nesterov:
        updates, scale = _look_ahead(exp_avgs, grads, beta1, step, correct_bias)
        torch._foreach_div_(updates, _denominators(exp_avg_sqs, c2, eps, scale))
        return updates
    c1 = bias_correction(beta1, step, correct_bias)
    return torch._foreach_div(exp_avgs, _denominators(exp_avg_sqs, c2, eps, scale=c1))


def _foreach_ademamix(
    grads: _Tensors,
    exp_avgs_fast: _Tensors,
    exp_avgs_slow: _Tensors,
    exp_avg_sqs: _Tensors,
    num_beta_slow_warmup_steps: int | None,
    num_alpha_warmup_steps: int | None,
    betas: tuple[float, float, float],
    step: int,
    eps: float,
    correct_bias: bool,
    alpha: float,
) -> _Tensors:
    beta_fast, beta2, final_beta_slow = betas
    beta_slow = half_life_warmup(step, beta_fast, final_beta_slow, num_beta_slow_warmup_steps)
    alpha = linear_warmup(step, alpha, num_alpha_warmup_steps)
    c_fast = bias_correction(beta_fast, step, correct_bias)
    c2 = bias_correction(beta2, step, correct_bias)
    torch._foreach_lerp_(exp_avgs_fast, grads, 1 - beta_fast)
    torch._foreach_lerp_(exp_avgs_slow, grads, 1 - beta_slow)
    _update_square_average(exp_avg_sqs, grads, beta2)
    updates = torch._foreach_add(exp_avgs_fast, exp_avgs_slow, alpha=alpha * c_fast)
    torch._foreach_div_(updates, _denominators(exp_avg_sqs, c2, eps, scale=c_fast))
    return updates


def _foreach_laprop(
    grads: _Tensors,
    exp_avgs: _Tensors,
    exp_avg_sqs: _Tensors,
    correct_bias: bool,
    betas: tuple[float, float],
    step: int,
    eps: float,
) -> _Tensors:
    beta1, beta2 = betas
    c1 = bias_correction(beta1, step, correct_bias)
    c2 = bias_correction(beta2, step, correct_bias)
    _update_square_average(exp_avg_sqs, grads, beta2)
    torch._foreach_mul_(exp_avgs, beta1)
    denominators = _denominators(exp_avg_sqs, c2, eps, scale=1.0)
    torch._foreach_addcdiv_(exp_avgs, grads, denominators, 1 - beta1)
    return torch._foreach_div(exp_avgs, c1)


def _foreach_lion(
    grads: _Tensors, exp_avgs: _Tensors, momentum_beta: float, momentum_beta2: float
) -> _Tensors:
    updates = torch._foreach_lerp(exp_avgs, grads, 1 - momentum_beta)
    torch._foreach_sign_(updates)
    torch._foreach_lerp_(exp_avgs, grads, 1 - momentum_beta2)
    return updates


def _foreach_signum(
    grads: _Tensors,
    exp_avgs: _Tensors,
    momentum_beta: float,
    correct_bias: bool,
    use_nesterov: bool,
    step: int,
    use_shape_scaling: bool,
) -> _Tensors:
    torch._foreach_lerp_(exp_avgs, grads, 1 - momentum_beta)
    if use_nesterov:
        updates, _ = _look_ahead(exp_avgs, grads, momentum_beta, step, correct_bias)
        torch._foreach_sign_(updates)
    else:
        updates = torch._foreach_sign(exp_avgs)
    if use_shape_scaling:
        torch._foreach_mul_(updates, [2 / (grad.shape[0] + grad.shape[1]) for grad in grads])
    return updates


def _foreach_sim_ademamix(
    grads: _Tensors,
    exp_avgs: _Tensors,
    exp_avg_sqs: _Tensors,
    num_beta_fast_warmup_steps: int | None,
    min_beta_fast: float,
    betas: tuple[float, float],
    step: int,
    eps: float,
    correct_bias: bool,
    alpha: float,
) -> _Tensors:
    final_beta_fast, beta2 = betas
    beta = half_life_warmup(step, min_beta_fast, final_beta_fast, num_beta_fast_warmup_steps)
    c1 = bias_correction(beta, step, True) / (1 - beta) if correct_bias else 1.0
    c2 = bias_correction(beta2, step, correct_bias)
    torch._foreach_mul_(exp_avgs, beta)
    torch._foreach_add_(exp_avgs, grads)
    _update_square_average(exp_avg_sqs, grads, beta2)
    updates = torch._foreach_add(exp_avgs, grads, alpha=alpha * c1)
    torch._foreach_div_(updates, _denominators(exp_avg_sqs, c2, eps, scale=c1))
    return updates


FOREACH_FORMULAS: dict[str, Callable[..., _Tensors]] = {
    "adam": _foreach_adam,
    "ademamix": _foreach_ademamix,
    "laprop": _foreach_laprop,
    "lion": _foreach_lion,
    "signum": _foreach_signum,
    "sim_ademamix": _foreach_sim_ademamix,
}
