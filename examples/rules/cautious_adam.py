"""Cautious Adam: Adam that skips the elements whose update opposes their gradient.

Liang et al., "Cautious Optimizers: Improving Training with One Line of Code",
https://arxiv.org/abs/2411.16085. The paper also divides the mask by its mean over the tensor; that
is a reduction, and left out here.
"""

import emerging_optimizers as eo


@eo.rule
def cautious_adam(
    grad,
    exp_avg: eo.SignedState,
    exp_avg_sq: eo.UnsignedState,
    *,
    betas=(0.9, 0.999),
    eps=1e-8,
    step,
):
    """Return Adam's update where it has the gradient's sign, and 0 elsewhere."""
    beta1, beta2 = betas
    exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denom = exp_avg_sq.div(1 - beta2**step).sqrt_().add_(eps)
    mask = (exp_avg * grad > 0).to(grad.dtype)
    return (exp_avg * mask).div_(1 - beta1**step).div_(denom)


class CautiousAdam(eo.ScalarOptimizer, rule=cautious_adam, lr=1e-3):
    """Adam with the mask of arXiv:2411.16085."""
