"""Signum: the sign of the momentum."""

from collections.abc import Sequence

from torch import Tensor

from .._checks import Beta, Step
from .._rule import Rule
from .._schedules import bias_correction


def _signum(
    grad: Tensor,
    exp_avg: Tensor,
    momentum_beta: Beta,
    correct_bias: bool,
    use_nesterov: bool,
    step: Step,
    use_shape_scaling: bool,
) -> Tensor:
    exp_avg.mul_(momentum_beta).add_(grad, alpha=1 - momentum_beta)
    if use_nesterov:
        c1 = bias_correction(momentum_beta, step, correct_bias)
        c1_next = bias_correction(momentum_beta, step + 1, correct_bias)
        ahead = (exp_avg * (momentum_beta / c1_next)).add_(grad, alpha=(1 - momentum_beta) / c1)
        update = ahead.sign_()
    else:
        update = exp_avg.sign()
    if use_shape_scaling:
        update.mul_(2 / (grad.shape[0] + grad.shape[1]))
    return update


_RULE = Rule("signum", _signum)
_enter = _RULE.door()


def calculate_signum_update(
    grad: Tensor | Sequence[Tensor],
    exp_avg: Tensor | Sequence[Tensor],
    momentum_beta: float,
    correct_bias: bool,
    use_nesterov: bool,
    step: int | float | Tensor,
    use_shape_scaling: bool = False,
    *,
    out: Tensor | Sequence[Tensor] | None = None,
) -> Tensor | list[Tensor]:
    r"""Update Signum's state in place and return the update.

    .. math::
        m &\leftarrow \beta m + (1 - \beta) g \\
        u &= \operatorname{sign}(m) \quad\text{or, with Nesterov momentum,}\quad
            \operatorname{sign}\Bigl(\frac{\beta m}{1 - \beta^{t+1}} +
            \frac{(1 - \beta) g}{1 - \beta^t}\Bigr)

    The sign of 0 and of NaN is 0, as in :func:`torch.sign`. Without bias correction, both divisors
    are 1; without Nesterov momentum, they do not matter.

    Args:
        grad: Gradient, or a sequence of them. Any shape and layout; float32, float64, bfloat16 or
            float16. Not modified.
        exp_avg: Average of the gradient, or a sequence of them: one for each `grad`, of its shape.
            Any of the four dtypes. Modified in place.
        momentum_beta: Decay rate of the average, in [0, 1).
        correct_bias: Divide by what a constant 1 would have brought the average to by now.
        use_nesterov: Look one step ahead.
        step: Number of this step, from 1: an int, an integral float, or a 0-dim tensor of dtype
            int64 or float32. The CUDA kernels read one on their device, unchecked.
        use_shape_scaling: Multiply the update of a matrix by ``2 / (rows + columns)``; needs 2-D
            tensors.
        out: Receives the update(s) and is returned, so that nothing is allocated: a tensor, or a
            sequence of them. May be `grad` itself.

    Returns:
        The update, with the shape and layout of `exp_avg` and dtype
        ``torch.promote_types(grad.dtype, exp_avg.dtype)`` (that of `out`, where given). A list of
        them where `grad` is a sequence. No parameter is touched.

    Raises:
        ValueError: Lists of different lengths, a list mixed with a single tensor, different shapes
            or devices at one position, a tensor to be modified that overlaps itself or another one,
            or a hyperparameter out of range, or shape scaling of a tensor that is not 2-D.
        TypeError: A tensor that is not strided or has another dtype, or a hyperparameter of the
            wrong type. In each case nothing has been modified.

    Example:
        >>> import torch
        >>> from emerging_optimizers.scalar_optimizers import calculate_signum_update
        >>> grad = torch.tensor([[1.0, -2.0, 0.0]])
        >>> exp_avg = torch.zeros(1, 3)
        >>> calculate_signum_update(
        ...     grad, exp_avg, momentum_beta=0.9, correct_bias=True, use_nesterov=True, step=1,
        ...     use_shape_scaling=True,
        ... )
        tensor([[ 0.5000, -0.5000,  0.0000]])

    Reference:
        Bernstein et al., "signSGD: Compressed Optimisation for Non-Convex Problems",
        https://arxiv.org/abs/1802.04434; the scaling by shape: https://arxiv.org/abs/2506.07254.
    """
    return _enter(
        grad, exp_avg, momentum_beta, correct_bias, use_nesterov, step, use_shape_scaling, out
    )
