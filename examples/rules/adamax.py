"""Adamax: Adam with the infinity norm in place of the second moment.

Kingma and Ba, "Adam: A Method for Stochastic Optimization", https://arxiv.org/abs/1412.6980,
algorithm 2. As in `torch.optim.Adamax`, `eps` keeps the norm of zero gradients above 0.
"""

import torch

import emerging_optimizers as eo


@eo.rule
def adamax(
    grad, exp_avg: eo.SignedState, exp_inf: eo.UnsignedState, *, betas=(0.9, 0.999), eps=1e-8, step
):
    """Return the average of gradients over their decaying maximum."""
    beta1, beta2 = betas
    exp_avg = torch.lerp(exp_avg, grad, 1 - beta1)
    exp_inf = torch.maximum(beta2 * exp_inf, torch.abs(grad) + eps)
    return exp_avg / ((1 - beta1**step) * exp_inf), exp_avg, exp_inf


class Adamax(eo.ScalarOptimizer, rule=adamax, lr=2e-3):
    """Adamax, arXiv:1412.6980."""
