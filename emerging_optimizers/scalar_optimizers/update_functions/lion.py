"""Lion's update function, with keyword-only hyperparameters."""

from collections.abc import Sequence

from torch import Tensor

from ..._hyperparameters import read_numbers
from ..lion import Lion, _call
from ._names import in_own_terms


def calculate_lion_update(
    grad: Tensor | Sequence[Tensor],
    exp_avg: Tensor | Sequence[Tensor],
    *,
    betas: Sequence[float],
    step: object = None,
    out: Tensor | Sequence[Tensor] | None = None,
) -> Tensor | list[Tensor]:
    """Update Lion's state in place and return the update.

    See :func:`~emerging_optimizers.scalar_optimizers.calculate_lion_update` for the formula,
    shapes, dtypes and errors.

    Args:
        grad: Gradient, or a sequence of gradients.
        exp_avg: Average of the gradient. Modified in place.
        betas: Weight of the momentum in the update, and decay rate of the average, each in [0, 1).
        step: Ignored: there is no bias correction. All update functions can take it.
        out: Receives the updates and is returned.

    Returns:
        The update; a list of updates where `grad` is a sequence.

    Example:
        >>> import torch
        >>> from emerging_optimizers.scalar_optimizers.update_functions import (
        ...     calculate_lion_update,
        ... )
        >>> calculate_lion_update(
        ...     torch.tensor([1.0, -2.0, 0.0]), torch.zeros(3), betas=(0.9, 0.99)
        ... )
        tensor([ 1., -1.,  0.])

    Reference:
        Chen et al., "Symbolic Discovery of Optimization Algorithms",
        https://arxiv.org/abs/2302.06675.
    """
    if type(betas) is not tuple or len(betas) != 2:
        betas = read_numbers("betas", betas, 2)
    try:
        return _call(grad, exp_avg, betas[0], betas[1], out)
    except (TypeError, ValueError) as error:
        raise in_own_terms(error, Lion._renamed) from None
