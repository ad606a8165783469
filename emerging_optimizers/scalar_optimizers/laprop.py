"""LaProp: Adam with the gradient normalised before it is averaged."""

from collections.abc import Sequence

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from .._hyperparameters import Beta, NonNegative, Step
from .._norms import KEEP_NORMS
from .._optimizer import ScalarOptimizer, SharedOptions
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
    exp_avg_sq.mul_(beta2).addcmul_(grad * (1 - beta2), grad)
    normalised = grad / exp_avg_sq.sqrt().div_(c2**0.5).add_(eps)
    exp_avg.mul_(beta1).add_(normalised, alpha=1 - beta1)
    return exp_avg / c1


_RULE = Rule("laprop", _laprop)
_call = _RULE.entry_point()


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
        tensor([ 1.0000, -1.0000,  0.0000])

    Reference:
        Ziyin, Wang and Ueda, "LaProp: Separating Momentum and Adaptivity in Adam",
        https://arxiv.org/abs/2002.04839.
    """
    return _call(grad, exp_avg, exp_avg_sq, correct_bias, betas, step, eps, out)


class LaProp(ScalarOptimizer):
    r"""LaProp, as a ``torch.optim`` optimizer.

    .. math::
        p \leftarrow p - \gamma u

    with :math:`u` as in :func:`calculate_laprop_update`.

    Args:
        params: Parameters to optimize: tensors, ``(name, tensor)`` pairs or parameter groups.
        lr: Learning rate, a float or a one-element tensor. Where it is 0, states are updated and
            parameters keep every bit.
        betas: Decay rates of the averages of the normalised gradient and of the squared gradient,
            each in [0, 1).
        eps: Added to the denominator; not negative.
        weight_decay: Strength of the weight decay.
        correct_bias: Divide averages by what a constant 1 would have brought them to by now.
        frob_normalize: After the step, scale each parameter to the Frobenius norm that it had
            before. Leaves nothing of weight decay but a smaller step; together, an error is logged.
        weight_decay_method: "decoupled", "independent", "palm" or "l2".
        **options: What all optimizers here take by keyword: `maximize`, `fused`, `capturable`,
            `state_dtype`, `master_weights` and `stochastic_rounding`. These, and the methods of
            weight decay: :class:`~emerging_optimizers.scalar_optimizers.ScalarOptimizer`.

    Raises:
        ValueError: A hyperparameter out of range.

    Example:
        >>> import torch
        >>> from emerging_optimizers import LaProp
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = LaProp([weight], lr=0.1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([ 0.9000, -1.9000])

    Reference:
        Ziyin, Wang and Ueda, "LaProp: Separating Momentum and Adaptivity in Adam",
        https://arxiv.org/abs/2002.04839.
    """

    _rule = _RULE
    _hook = KEEP_NORMS

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        correct_bias: bool = True,
        frob_normalize: bool = False,
        weight_decay_method: str = "decoupled",
        **options: Unpack[SharedOptions],
    ) -> None:
        hyperparameters = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "weight_decay_method": weight_decay_method,
            "correct_bias": correct_bias,
            "frob_normalize": frob_normalize,
        }
        super().__init__(params, hyperparameters, options)
