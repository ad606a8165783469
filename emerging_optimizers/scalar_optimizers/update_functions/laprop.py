"""LaProp's update function, with keyword-only hyperparameters."""

from collections.abc import Sequence

from torch import Tensor

from ..laprop import _call


def calculate_laprop_update(
    grad: Tensor | Sequence[Tensor],
    exp_avg: Tensor | Sequence[Tensor],
    exp_avg_sq: Tensor | Sequence[Tensor],
    *,
    betas: Sequence[float],
    eps: float,
    correct_bias: bool,
    step: int | float | Tensor,
    out: Tensor | Sequence[Tensor] | None = None,
) -> Tensor | list[Tensor]:
    """Update LaProp's states in place and return the update.

    See :func:`~emerging_optimizers.scalar_optimizers.calculate_laprop_update` for the formula,
    shapes, dtypes and errors.

    Args:
        grad: Gradient, or a sequence of gradients.
        exp_avg: Average of the normalised gradient. Modified in place.
        exp_avg_sq: Average of the squared gradient. Modified in place.
        betas: Decay rates of the two averages, each in [0, 1).
        eps: Added to the denominator; not negative.
        correct_bias: Apply bias correction: divide each average by ``1 - beta**step``.
        step: Step number, counted from 1.
        out: Receives the updates and is returned.

    Returns:
        The update; a list of updates where `grad` is a sequence.

    Example:
        >>> import torch
        >>> from emerging_optimizers.scalar_optimizers.update_functions import (
        ...     calculate_laprop_update,
        ... )
        >>> calculate_laprop_update(
        ...     torch.tensor([1.0, -2.0, 0.0]), torch.zeros(3), torch.zeros(3),
        ...     betas=(0.9, 0.999), eps=1e-8, correct_bias=True, step=1,
        ... )
        tensor([ 1.0000, -1.0000,  0.0000])

    Reference:
        Ziyin, Wang and Ueda, "LaProp: Separating Momentum and Adaptivity in Adam",
        https://arxiv.org/abs/2002.04839.
    """
    return _call(grad, exp_avg, exp_avg_sq, correct_bias, betas, step, eps, out)
