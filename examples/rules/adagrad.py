"""Adagrad: gradients over the root of the sum of all their squares.

Duchi et al., "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization", JMLR
12, 2011, https://jmlr.org/papers/v12/duchi11a.html. `lr_decay` is that of `torch.optim.Adagrad`.
"""

import emerging_optimizers as eo


@eo.rule
def adagrad(
    grad,
    sum_sq: eo.UnsignedState,
    *,
    lr_decay: eo.NonNegative = 0.0,
    eps: eo.NonNegative = 1e-10,
    step,
):
    """Return the normalized gradient over ``1 + (step - 1) * lr_decay``."""
    sum_sq.addcmul_(grad, grad)
    slower = 1 + (step - 1) * lr_decay
    return grad / sum_sq.sqrt().add_(eps).mul_(slower)


class Adagrad(eo.ScalarOptimizer, rule=adagrad, lr=1e-2):
    """Adagrad, JMLR 12, 2011."""
