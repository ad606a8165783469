"""Rprop: a step size for each element, which grows while the gradient keeps its sign.

Riedmiller and Braun, "A direct adaptive method for faster backpropagation learning: the RPROP
algorithm", ICNN 1993, https://doi.org/10.1109/ICNN.1993.298623, in the form of `torch.optim.Rprop`.
Step sizes are in units of the learning rate, and start at 1.
"""

import torch

import emerging_optimizers as eo


@eo.rule
def rprop(
    grad,
    previous_grad: eo.SignedState,
    step_size: eo.UnsignedState,
    *,
    etas=(0.5, 1.2),
    limits=(1e-4, 5e3),
    step,
):
    """Return the gradient's sign times the step size; 0 where the sign has changed."""
    if step == 1:
        step_size = step_size + 1
    shrink, grow = etas
    same = grad * previous_grad > 0
    turned = grad * previous_grad < 0
    step_size = torch.where(
        same, grow * step_size, torch.where(turned, shrink * step_size, step_size)
    )
    step_size = step_size.clamp(*limits)
    grad = torch.where(turned, 0.0, grad)
    return grad.sign() * step_size, grad, step_size


class Rprop(eo.ScalarOptimizer, rule=rprop, lr=1e-2):
    """Rprop, ICNN 1993."""
