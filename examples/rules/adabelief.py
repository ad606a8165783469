"""AdaBelief: Adam that divides by the deviation of gradients from their average.

Zhuang et al., "AdaBelief Optimizer: Adapting Stepsizes by the Belief in Observed Gradients",
https://arxiv.org/abs/2010.07468, algorithm 2.
"""

from torch import Tensor

import emerging_optimizers as eo


@eo.rule
def adabelief(
    grad: Tensor,
    exp_avg: Tensor,  # not in 8 bits: rounding it would add to the variance about it
    exp_avg_var: eo.UnsignedState,
    *,
    betas: tuple[eo.Beta, eo.Beta] = (0.9, 0.999),
    eps: eo.NonNegative = 1e-16,
    step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return Adam's update with the variance about `exp_avg` instead of the second moment."""
    beta1, beta2 = betas
    exp_avg = beta1 * exp_avg + (1 - beta1) * grad
    exp_avg_var = beta2 * exp_avg_var + (1 - beta2) * (grad - exp_avg).square() + eps
    deviation = (exp_avg_var / (1 - beta2**step)).sqrt()
    return exp_avg / (1 - beta1**step) / (deviation + eps), exp_avg, exp_avg_var


class AdaBelief(eo.ScalarOptimizer, rule=adabelief, lr=1e-3):
    """AdaBelief, arXiv:2010.07468."""
