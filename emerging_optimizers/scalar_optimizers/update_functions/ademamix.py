"""AdEMAMix's update functions, with keyword-only hyperparameters."""

from collections.abc import Sequence

from torch import Tensor

from ..ademamix import _call as _call_ademamix
from ..sim_ademamix import _call as _call_sim_ademamix


def calculate_ademamix_update(
    grad: Tensor | Sequence[Tensor],
    exp_avg_fast: Tensor | Sequence[Tensor],
    exp_avg_slow: Tensor | Sequence[Tensor],
    exp_avg_sq: Tensor | Sequence[Tensor],
    *,
    betas: Sequence[float],
    eps: float,
    correct_bias: bool,
    step: int | float | Tensor,
    num_beta_slow_warmup_steps: int | None,
    num_alpha_warmup_steps: int | None,
    alpha: float = 2,
    out: Tensor | Sequence[Tensor] | None = None,
) -> Tensor | list[Tensor]:
    """Update AdEMAMix's states in place and return the update.

    See :func:`~emerging_optimizers.scalar_optimizers.calculate_ademamix_update` for the formula,
    shapes, dtypes and errors.

    Args:
        grad: Gradient, or a sequence of gradients.
        exp_avg_fast: Fast average of the gradient. Modified in place.
        exp_avg_slow: Slow average of the gradient. Modified in place.
        exp_avg_sq: Average of the squared gradient. Modified in place.
        betas: Decay rates of the fast average, the second moment and the slow average, in this
            order, each in [0, 1).
        eps: Added to the denominator; not negative.
        correct_bias: Apply bias correction to the fast average and the second moment.
        step: Step number, counted from 1.
        num_beta_slow_warmup_steps: Number of steps over which the slow beta rises to its final
            value. None: no warm-up.
        num_alpha_warmup_steps: Number of steps over which `alpha` rises from 0. None: no warm-up.
        alpha: Final weight of the slow average.
        out: Receives the updates and is returned.

    Returns:
        The update; a list of updates where `grad` is a sequence.

    Example:
        >>> import torch
        >>> from emerging_optimizers.scalar_optimizers.update_functions import (
        ...     calculate_ademamix_update,
        ... )
        >>> calculate_ademamix_update(
        ...     torch.tensor([1.0, -2.0, 0.0]), torch.zeros(3), torch.zeros(3), torch.zeros(3),
        ...     betas=(0.9, 0.999, 0.9999), eps=1e-8, correct_bias=True, step=1,
        ...     num_beta_slow_warmup_steps=1000, num_alpha_warmup_steps=1000, alpha=5.0,
        ... )
        tensor([ 1.0003, -1.0003,  0.0000])

    Reference:
        Pagliardini, Ablin and Grangier, "The AdEMAMix Optimizer: Better, Faster, Older",
        https://arxiv.org/abs/2409.03137.
    """
    return _call_ademamix(
        grad,
        exp_avg_fast,
        exp_avg_slow,
        exp_avg_sq,
        num_beta_slow_warmup_steps,
        num_alpha_warmup_steps,
        betas,
        step,
        eps,
        correct_bias,
        alpha,
        out,
    )


def calculate_sim_ademamix_update(
    grad: Tensor | Sequence[Tensor],
    exp_avg: Tensor | Sequence[Tensor],
    exp_avg_sq: Tensor | Sequence[Tensor],
    *,
    betas: Sequence[float],
    eps: float,
    correct_bias: bool,
    step: int | float | Tensor,
    num_beta_fast_warmup_steps: int | None,
    min_beta_fast: float,
    alpha: float = 2,
    out: Tensor | Sequence[Tensor] | None = None,
) -> Tensor | list[Tensor]:
    """Update Simplified AdEMAMix's states in place and return the update.

    See :func:`~emerging_optimizers.scalar_optimizers.calculate_sim_ademamix_update` for the
    formula, shapes, dtypes and errors.

    Args:
        grad: Gradient, or a sequence of gradients.
        exp_avg: Momentum: a decaying sum of the gradient. Modified in place.
        exp_avg_sq: Average of the squared gradient. Modified in place.
        betas: Decay rates of the momentum and of the second moment, each in [0, 1).
        eps: Added to the denominator; not negative.
        correct_bias: Apply bias correction to the momentum and the second moment.
        step: Step number, counted from 1.
        num_beta_fast_warmup_steps: Number of steps over which the fast beta rises to its final
            value. None: no warm-up.
        min_beta_fast: The fast beta at the start of its warm-up, in [0, 1).
        alpha: Weight of the gradient, which is added to the momentum.
        out: Receives the updates and is returned.

    Returns:
        The update; a list of updates where `grad` is a sequence.

    Example:
        >>> import torch
        >>> from emerging_optimizers.scalar_optimizers.update_functions import (
        ...     calculate_sim_ademamix_update,
        ... )
        >>> calculate_sim_ademamix_update(
        ...     torch.tensor([1.0, -2.0, 0.0]), torch.zeros(3), torch.zeros(3),
        ...     betas=(0.9999, 0.999), eps=1e-8, correct_bias=True, step=1,
        ...     num_beta_fast_warmup_steps=1000, min_beta_fast=0.9, alpha=2.0,
        ... )
        tensor([ 3.0000, -3.0000,  0.0000])

    Reference:
        Morwani, Vyas, Zhang and Kakade, "Connections between Schedule-Free Optimizers, AdEMAMix,
        and Accelerated SGD Variants", https://arxiv.org/abs/2502.02431.
    """
    return _call_sim_ademamix(
        grad,
        exp_avg,
        exp_avg_sq,
        num_beta_fast_warmup_steps,
        min_beta_fast,
        betas,
        step,
        eps,
        correct_bias,
        alpha,
        out,
    )
