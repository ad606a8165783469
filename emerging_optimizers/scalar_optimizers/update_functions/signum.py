"""Signum's update function, with keyword-only hyperparameters."""

from collections.abc import Sequence

from torch import Tensor

from ..signum import Signum, _call
from ._names import in_own_terms


def calculate_signum_update(
    grad: Tensor | Sequence[Tensor],
    exp_avg: Tensor | Sequence[Tensor],
    *,
    momentum: float,
    correct_bias: bool,
    nesterov: bool,
    step: int | float | Tensor,
    use_shape_scaling: bool = False,
    out: Tensor | Sequence[Tensor] | None = None,
) -> Tensor | list[Tensor]:
    """Update Signum's state in place and return the update.

    See :func:`~emerging_optimizers.scalar_optimizers.calculate_signum_update` for the formula,
    shapes, dtypes and errors.

    Args:
        grad: Gradient, or a sequence of gradients.
        exp_avg: Average of the gradient. Modified in place.
        momentum: Decay rate of the average, in [0, 1).
        correct_bias: Apply bias correction: divide by ``1 - momentum**step``. Changes the update
            with Nesterov momentum only.
        nesterov: Use Nesterov momentum.
        step: Step number, counted from 1.
        use_shape_scaling: Multiply the update of a matrix by ``2 / (rows + columns)``; a
            ValueError unless tensors are 2-D.
        out: Receives the updates and is returned.

    Returns:
        The update; a list of updates where `grad` is a sequence.

    Example:
        >>> import torch
        >>> from emerging_optimizers.scalar_optimizers.update_functions import (
        ...     calculate_signum_update,
        ... )
        >>> calculate_signum_update(
        ...     torch.tensor([1.0, -2.0, 0.0]), torch.zeros(3),
        ...     momentum=0.9, correct_bias=True, nesterov=True, step=1,
        ... )
        tensor([ 1., -1.,  0.])

    Reference:
        Bernstein et al., "signSGD: Compressed Optimisation for Non-Convex Problems",
        https://arxiv.org/abs/1802.04434; the scaling by shape: https://arxiv.org/abs/2506.07254.
    """
    try:
        return _call(grad, exp_avg, momentum, correct_bias, nesterov, step, use_shape_scaling, out)
    except (TypeError, ValueError) as error:
        raise in_own_terms(error, Signum._renamed) from None
