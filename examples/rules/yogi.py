"""Yogi: Adam whose second moment moves by at most a fraction of the squared gradient.

Zaheer et al., "Adaptive Methods for Nonconvex Optimization", NeurIPS 2018,
https://papers.nips.cc/paper/8186-adaptive-methods-for-nonconvex-optimization, algorithm 2.
"""

import torch

import emerging_optimizers as eo


@eo.rule
def yogi(
    grad, exp_avg: eo.SignedState, exp_avg_sq: eo.UnsignedState, *, betas=(0.9, 0.999), eps=1e-3
):
    """Return the average of the gradients over the root of Yogi's second moment."""
    beta1, beta2 = betas
    exp_avg = beta1 * exp_avg + (1 - beta1) * grad
    squared = torch.square(grad)
    exp_avg_sq = exp_avg_sq - (1 - beta2) * torch.sign(exp_avg_sq - squared) * squared
    return exp_avg / (torch.sqrt(exp_avg_sq) + eps), exp_avg, exp_avg_sq


class Yogi(eo.ScalarOptimizer, rule=yogi, lr=1e-2):
    """Yogi, NeurIPS 2018."""
