"""Adadelta: gradients in the units of the parameters, by the ratio of two root mean squares.

Zeiler, "ADADELTA: An Adaptive Learning Rate Method", https://arxiv.org/abs/1212.5701.
"""

import emerging_optimizers as eo


@eo.rule
def adadelta(
    grad,
    square_avg: eo.UnsignedState,
    acc_delta: eo.UnsignedState,
    *,
    rho: eo.Beta = 0.9,
    eps: eo.NonNegative = 1e-6,
):
    """Return the gradient times the RMS of the updates so far over that of the gradients."""
    square_avg.mul_(rho).addcmul_(grad, grad, value=1 - rho)
    delta = (acc_delta + eps).sqrt() / (square_avg + eps).sqrt() * grad
    acc_delta.mul_(rho).addcmul_(delta, delta, value=1 - rho)
    return delta


class Adadelta(eo.ScalarOptimizer, rule=adadelta, lr=1.0):
    """Adadelta, arXiv:1212.5701."""
