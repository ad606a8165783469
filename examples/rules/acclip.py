"""ACClip: momentum, clipped element by element at an average of the gradients' sizes.

Zhang et al., "Why are Adaptive Methods Good for Attention Models?",
https://arxiv.org/abs/1912.03194, algorithm 2 with alpha = 1. A `threshold` replaces that average.
"""

import emerging_optimizers as eo


@eo.rule
def acclip(
    grad,
    exp_avg: eo.SignedState,
    exp_avg_abs: eo.UnsignedState,
    *,
    betas=(0.9, 0.99),
    eps=1e-5,
    threshold: eo.NonNegative | None = None,
):
    """Return the average of the gradients, no larger than the threshold."""
    beta1, beta2 = betas
    exp_avg = beta1 * exp_avg + (1 - beta1) * grad
    exp_avg_abs = beta2 * exp_avg_abs + (1 - beta2) * abs(grad)
    limit = exp_avg_abs if threshold is None else threshold
    return exp_avg * (limit / (abs(exp_avg) + eps)).clamp(max=1), exp_avg, exp_avg_abs


class ACClip(eo.ScalarOptimizer, rule=acclip, lr=1e-3):
    """ACClip, arXiv:1912.03194."""
