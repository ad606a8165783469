"""Adam, with or without Nesterov momentum."""

from collections.abc import Sequence

from torch import Tensor

from .._checks import Beta, NonNegative, Step
from .._rule import Rule
from .._schedules import bias_correction


def _adam(
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    betas: tuple[Beta, Beta],
    correct_bias: bool,
    use_nesterov: bool,
    step: Step,
    eps: NonNegative,
) -> Tensor:
    beta1, beta2 = betas
    c1 = bias_correction(beta1, step, correct_bias)
    c2 = bias_correction(beta2, step, correct_bias)
    exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    if use_nesterov:
        c1_next = bias_correction(beta1, step + 1, correct_bias)
        exp_avg_hat = (exp_avg * (beta1 / c1_next)).add_(grad, alpha=(1 - beta1) / c1)
    else:
        exp_avg_hat = exp_avg / c1
    return exp_avg_hat.div_((exp_avg_sq / c2).sqrt_().add_(eps))


_RULE = Rule("adam", _adam)
_enter = _RULE.door()


def calculate_adam_update(
    grad: Tensor | Sequence[Tensor],
    exp_avg: Tensor | Sequence[Tensor],
    exp_avg_sq: Tensor | Sequence[Tensor],
    betas: Sequence[float],
    correct_bias: bool,
    use_nesterov: bool,
    step: int | float | Tensor,
    eps: float,
    *,
    out: Tensor | Sequence[Tensor] | None = None,
) -> Tensor | list[Tensor]:
    r"""Update Adam's states in place and return the update.

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1) g \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        \hat m &= \frac{m}{1 - \beta_1^t} \quad\text{or, with Nesterov momentum,}\quad
            \frac{\beta_1 m}{1 - \beta_1^{t+1}} + \frac{(1 - \beta_1) g}{1 - \beta_1^t} \\
        u &= \hat m \,/\, \bigl(\sqrt{v / (1 - \beta_2^t)} + \epsilon\bigr)

    Without bias correction, every divisor :math:`1 - \beta^t` is 1.

    Args:
        grad: Gradient, or a sequence of them. Any shape and layout; float32, float64, bfloat16 or
            float16. Not modified.
        exp_avg: Average of the gradient, or a sequence of them: one for each `grad`, of its shape.
            Any of the four dtypes. Modified in place.
        exp_avg_sq: Average of the squared gradient, likewise. Modified in place.
        betas: Decay rates of the two averages, each in [0, 1).
        correct_bias: Divide averages by what a constant 1 would have brought them to by now.
        use_nesterov: Look one step ahead, as NAdam does (without its momentum schedule).
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
        >>> from emerging_optimizers.scalar_optimizers import calculate_adam_update
        >>> params = [torch.zeros(3), torch.zeros(2, 2)]
        >>> grads = [torch.tensor([1.0, -2.0, 0.0]), torch.full((2, 2), 0.5)]
        >>> exp_avgs = [torch.zeros_like(p) for p in params]
        >>> exp_avg_sqs = [torch.zeros_like(p) for p in params]
        >>> updates = calculate_adam_update(
        ...     grads, exp_avgs, exp_avg_sqs, betas=(0.9, 0.999), correct_bias=True,
        ...     use_nesterov=False, step=1, eps=1e-8,
        ... )
        >>> updates[0]
        tensor([ 1., -1.,  0.])
        >>> _ = torch._foreach_add_(params, updates, alpha=-1e-3)

    Reference:
        Kingma and Ba, "Adam: A Method for Stochastic Optimization",
        https://arxiv.org/abs/1412.6980; Dozat, "Incorporating Nesterov Momentum into Adam", ICLR
        workshop 2016.
    """
    return _enter(grad, exp_avg, exp_avg_sq, betas, correct_bias, use_nesterov, step, eps, out)
