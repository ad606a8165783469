"""RAdam: Adam that starts as SGD with momentum, until the variance of its step size is known.

Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond",
https://arxiv.org/abs/1908.03265. The threshold is 5, and `eps` is added before the bias correction,
as in the authors' code and in `torch.optim.RAdam`.
"""

import math

import emerging_optimizers as eo


@eo.rule
def radam(
    grad,
    exp_avg: eo.SignedState,
    exp_avg_sq: eo.UnsignedState,
    *,
    betas=(0.9, 0.999),
    eps=1e-8,
    step,
):
    """Return Adam's update times the rectification, or the average alone in early steps."""
    beta1, beta2 = betas
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    c2 = 1 - beta2**step
    average = exp_avg / (1 - beta1**step)
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * step * beta2**step / c2
    if rho <= 5:
        return average
    rect = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
    return average * math.sqrt(rect * c2) / (exp_avg_sq.sqrt() + eps)


class RAdam(eo.ScalarOptimizer, rule=radam, lr=1e-3):
    """RAdam, arXiv:1908.03265."""
