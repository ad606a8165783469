"""LaProp: Adam with the gradient normalised before it is averaged."""

from collections.abc import Sequence

from torch import Tensor

from .._checks import Beta, NonNegative, Step
from .._rule import Rule
from .._schedules import bias_correction


def _laprop(
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    correct_bias: bool,
    betas: tuple[Beta, Beta],
    step: Step,
    eps: NonNegative,
) -> Tensor:
    beta1, beta2 = betas
    c1 = bias_correction(beta1, step, correct_bias)
    c2 = bias_correction(beta2, step, correct_bias)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    normalised = grad / (exp_avg_sq / c2).sqrt_().add_(eps)
    exp_avg.mul_(beta1).add_(normalised, alpha=1 - beta1)
    return exp_avg / c1


_RULE = Rule("laprop", _laprop)
_enter = _RULE.door()


def calculate_laprop_update(
    grad: Tensor | Sequence[Tensor],
    exp_avg: Tensor | Sequence[Tensor],
    exp_avg_sq: Tensor | Sequence[Tensor],
    correct_bias: bool,
    betas: Sequence[float],
    step: int | float | Tensor,
    eps: float,
    *,
    out: Tensor | Sequence[Tensor] | None = None,
) -> Tensor | list[Tensor]:
    r"""Update LaProp's states in place and return the update.

    .. math::
        v &\leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        g' &= g \,/\, \bigl(\sqrt{v / (1 - \beta_2^t)} + \epsilon\bigr) \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) g' \\
        u &= m / (1 - \beta_1^t)

    Without bias correction, both divisors :math:`1 - \beta^t` are 1.

    Args:
        grad: Gradient, or a sequence of them. Any shape and layout; float32, float64, bfloat16 or
            float16. Not modified.
        exp_avg: Average of the normalised gradient, or a sequence of them: one for each `grad`, of
            its shape. Any of the four dtypes. Modified in place.
        exp_avg_sq: Average of the squared gradient, likewise. Modified in place.
        correct_bias: Divide averages by what a constant 1 would have brought them to by now.
        betas: Decay rates of the two averages, each in [0, 1).
        step: Number of this step, from 1: an int, an integral float, or a 0-dim tensor of dtype
            int64 or float32. The CUDA kernels read one on their device, unchecked.
        eps: Added to the denominator; not negative.
        out: Receives the update(s) and is returned, so that nothing is allocated: a tensor, or a
            sequence of them. May be `grad` itself.

    Returns:
        The update, with the shape and layout of `exp_avg` and dtype
        ``torch.promote_types(grad.dtype, exp_avg.dtype)`` (that of `out`, where given). A list of
        them where `grad` is a sequence. No parameter is touched.

    Raises:
        ValueError: Lists of different lengths, a list mixed with a single tensor, different shapes
            or devices at one position, a tensor to be modified that overlaps itself or another one,
            or a hyperparameter out of range.
        TypeError: A tensor that is not strided or has another dtype, or a hyperparameter of the
            wrong type. In each case nothing has been modified.

    Example:
        >>> import torch
        >>> from emerging_optimizers.scalar_optimizers import calculate_laprop_update
        >>> grad = torch.tensor([1.0, -2.0, 0.0])
        >>> exp_avg, exp_avg_sq = torch.zeros(3), torch.zeros(3)
        >>> calculate_laprop_update(
        ...     grad, exp_avg, exp_avg_sq, correct_bias=True, betas=(0.9, 0.999), step=1, eps=1e-8
        ... )
        tensor([ 1., -1.,  0.])

    Reference:
        Ziyin, Wang and Ueda, "LaProp: Separating Momentum and Adaptivity in Adam",
        https://arxiv.org/abs/2002.04839.
    """
    return _enter(grad, exp_avg, exp_avg_sq, correct_bias, betas, step, eps, out)
