"""AdaBound: Adam whose step sizes are clipped between bounds that approach SGD's.

Luo et al., "Adaptive Gradient Methods with Dynamic Bound of Learning Rate",
https://arxiv.org/abs/1902.09843. As in the authors' code, there is a bias correction and no
division by the root of the step. `final_scale` is the final step size in units of the learning
rate.
"""

import math

import emerging_optimizers as eo


@eo.rule
def adabound(
    grad,
    exp_avg: eo.SignedState,
    exp_avg_sq: eo.UnsignedState,
    *,
    betas=(0.9, 0.999),
    eps=1e-8,
    final_scale=100.0,
    gamma=1e-3,
    step,
):
    """Return the average of the gradients times a step size within the bounds."""
    beta1, beta2 = betas
    exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    size = math.sqrt(1 - beta2**step) / (1 - beta1**step) / (exp_avg_sq.sqrt() + eps)
    lower = final_scale * (1 - 1 / (gamma * step + 1))
    upper = final_scale * (1 + 1 / (gamma * step))
    return size.clamp_(lower, upper).mul_(exp_avg)


class AdaBound(eo.ScalarOptimizer, rule=adabound, lr=1e-3):
    """AdaBound, arXiv:1902.09843."""
