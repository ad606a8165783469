"""Grams: the size of Adam's update, in the direction of the gradient.

Cao et al., "Grams: Gradient Descent with Adaptive Momentum Scaling",
https://arxiv.org/abs/2412.17107.
"""

import emerging_optimizers as eo


@eo.rule
def grams(
    grad,
    exp_avg: eo.SignedState,
    exp_avg_sq: eo.UnsignedState,
    *,
    betas=(0.9, 0.999),
    eps=1e-6,
    step,
):
    """Return the absolute value of Adam's update with the gradient's sign."""
    beta1, beta2 = betas
    exp_avg += (1 - beta1) * (grad - exp_avg)
    exp_avg_sq *= beta2
    exp_avg_sq += (1 - beta2) * grad**2
    update = exp_avg / (1 - beta1**step) / ((exp_avg_sq / (1 - beta2**step)) ** 0.5 + eps)
    return update.abs_().mul_(grad.sign())


class Grams(eo.ScalarOptimizer, rule=grams, lr=1e-3):
    """Grams, arXiv:2412.17107."""
