"""ADOPT: Adam whose average is of gradients normalized by the *previous* second moment.

Taniguchi et al., "ADOPT: Modified Adam Can Converge with Any beta2 with the Optimal Rate",
https://arxiv.org/abs/2411.02853, with the authors' clipping.
"""

import emerging_optimizers as eo


@eo.rule
def adopt(
    grad,
    exp_avg: eo.SignedState,
    exp_avg_sq: eo.UnsignedState,
    *,
    betas=(0.9, 0.9999),
    eps=1e-6,
    step,
):
    """Return the average of the clipped, normalized gradients; the first step only measures."""
    beta1, beta2 = betas
    if step == 1:
        return None, exp_avg, grad * grad
    clip = (step - 1) ** 0.25
    normed = (grad / exp_avg_sq.sqrt().clamp(min=eps)).clamp(-clip, clip)
    exp_avg = exp_avg + (1 - beta1) * (normed - exp_avg)
    return exp_avg, exp_avg, beta2 * exp_avg_sq + (1 - beta2) * grad * grad


class Adopt(eo.ScalarOptimizer, rule=adopt, lr=1e-3):
    """ADOPT, arXiv:2411.02853."""
