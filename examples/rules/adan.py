"""Adan: Adam with Nesterov momentum, from an average of the gradients' differences.

Xie et al., "Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing Deep Models",
https://arxiv.org/abs/2208.06677. As in the authors' code, `betas` are what averages keep, and the
averages are corrected for their bias.
"""

import math

import emerging_optimizers as eo


@eo.rule
def adan(
    grad,
    exp_avg: eo.SignedState,
    exp_avg_diff: eo.SignedState,
    exp_avg_sq: eo.UnsignedState,
    # Not in 8 bits: gradients may differ by less than that would round off.
    previous_grad,
    *,
    betas: tuple[eo.Beta, eo.Beta, eo.Beta] = (0.98, 0.92, 0.99),
    eps: eo.NonNegative = 1e-8,
    step,
):
    """Return the averages of the gradients and of their differences, normalized."""
    beta1, beta2, beta3 = betas
    diff = grad - (grad if step == 1 else previous_grad)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_diff.lerp_(diff, 1 - beta2)
    ahead = grad + beta2 * diff
    exp_avg_sq.mul_(beta3).addcmul_(ahead, ahead, value=1 - beta3)
    denom = exp_avg_sq.sqrt() / math.sqrt(1 - beta3**step) + eps
    average = exp_avg / (1 - beta1**step) + exp_avg_diff * (beta2 / (1 - beta2**step))
    return average / denom, exp_avg, exp_avg_diff, exp_avg_sq, grad


class Adan(eo.ScalarOptimizer, rule=adan, lr=1e-3):
    """Adan, arXiv:2208.06677."""
