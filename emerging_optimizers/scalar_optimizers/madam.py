"""MAdam: Adam without epsilon, with a scaled average of squares."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from .._codes import SignedState, UnsignedState
from .._docstrings import fill_docstring
from .._hyperparameters import Beta, Step
from .._optimizer import ScalarOptimizer, SharedOptions
from .._rule import Rule
from .._schedules import bias_correction
from ..registry import register_optimizer

_LARGEST_LOG2 = 252


def _madam(
    grad: Tensor,
    exp_avg: SignedState,
    exp_avg_sq_scaled: UnsignedState,
    betas: tuple[Beta, Beta],
    correct_bias: bool,
    step: Step,
    scale_log2: int,
) -> Tensor:
    beta1, beta2 = betas
    root_of_scale = math.ldexp(1.0, int(scale_log2) // 2)
    exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
    scaled = grad * root_of_scale
    exp_avg_sq_scaled.mul_(beta2).addcmul_(scaled * (1 - beta2), scaled)
    exp_avg_hat = (exp_avg * root_of_scale).div_(bias_correction(beta1, step, correct_bias))
    root = exp_avg_sq_scaled.sqrt().div_(bias_correction(beta2, step, correct_bias) ** 0.5)
    return exp_avg_hat.div_(root).masked_fill_(exp_avg == 0, 0.0)


def _check(scale_log2: float, **_: Any) -> None:
    if scale_log2 % 2 != 0 or abs(scale_log2) > _LARGEST_LOG2:
        raise ValueError(
            f"scale_log2 is {scale_log2:.17g}; expected an even whole number from -252 to 252"
        )


_RULE = Rule("madam", _madam, _check)
_call = _RULE.entry_point()


@fill_docstring
def calculate_madam_update(
    grad: Tensor | Sequence[Tensor],
    exp_avg: Tensor | Sequence[Tensor],
    exp_avg_sq_scaled: Tensor | Sequence[Tensor],
    *,
    betas: Sequence[float],
    correct_bias: bool,
    step: int | float | Tensor,
    scale_log2: float,
    out: Tensor | Sequence[Tensor] | None = None,
) -> Tensor | list[Tensor]:
    r"""Update the states of MAdam (magnitude-aware Adam) in place and return the update.

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1) g \\
        v' &\leftarrow \beta_2 v' + (1 - \beta_2) \bigl(\sqrt{s}\, g\bigr)^2 \\
        u &= \sqrt{s}\, \frac{m}{1 - \beta_1^t} \,/\, \sqrt{\frac{v'}{1 - \beta_2^t}}
            \quad\text{or, where } m = 0, \quad 0

    with :math:`s = 2^{\mathtt{scale\_log2}}`. Without bias correction, every divisor
    :math:`1 - \beta^t` is 1. There is no epsilon: for :math:`s = 1`, this is Adam with ``eps=0``,
    but for the zeros. The scale keeps the squares of small gradients from underflowing: float32
    squares of gradients below about 1e-19 are 0 with :math:`s = 1`, and the update is then
    infinite.

    Args:
        grad: {grad}
        exp_avg: Average of the gradient.
            {state}
        exp_avg_sq_scaled: Average of the squared gradient, times the scale.
            {state}
        betas: Decay rates of the two averages, each in [0, 1).
        correct_bias: {correct_bias}
        step: {step}
        scale_log2: Logarithm of the scale to base 2: an even whole number from -252 to 252, the
            same at each step.
        out: {out}

    Returns:
        {returns}

    Raises:
        {raises}

    Example:
        >>> import torch
        >>> from emerging_optimizers.scalar_optimizers import calculate_madam_update
        >>> grad = torch.tensor([1e-30, -2.0, 0.0])
        >>> exp_avg, exp_avg_sq_scaled = torch.zeros(3), torch.zeros(3)
        >>> calculate_madam_update(
        ...     grad, exp_avg, exp_avg_sq_scaled, betas=(0.9, 0.999), correct_bias=True, step=1,
        ...     scale_log2=100,
        ... )
        tensor([ 1., -1.,  0.])

    Reference:
        NVIDIA, "Emerging-Optimizers", https://github.com/NVIDIA-NeMo/Emerging-Optimizers.
    """
    return _call(grad, exp_avg, exp_avg_sq_scaled, betas, correct_bias, step, scale_log2, out)


@register_optimizer("madam")
@fill_docstring
class MAdam(ScalarOptimizer):
    r"""MAdam (magnitude-aware Adam), as a ``torch.optim`` optimizer.

    .. math::
        p \leftarrow p - \gamma u

    with :math:`u` as in :func:`calculate_madam_update`.

    Args:
        params: {params}
        lr: {lr}
        betas: Decay rates of the averages of the gradient and of its square, each in [0, 1).
        weight_decay: {weight_decay}
        correct_bias: {correct_bias}
        scale_log2: Logarithm to base 2 of the scale of the squares: an even whole number from -252
            to 252. States that were made with another scale do not fit.
        weight_decay_method: {weight_decay_method}
        **options: {options}

    Raises:
        {raises}

    Example:
        >>> import torch
        >>> from emerging_optimizers import MAdam
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = MAdam([weight], lr=0.1, scale_log2=64)
        >>> (1e-25 * weight.square()).sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([ 0.9000, -1.9000])

    Reference:
        NVIDIA, "Emerging-Optimizers", https://github.com/NVIDIA-NeMo/Emerging-Optimizers.
    """

    _rule = _RULE

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        *,
        correct_bias: bool = True,
        scale_log2: int = 0,
        weight_decay_method: str = "decoupled",
        **options: Unpack[SharedOptions],
    ) -> None:
        hyperparameters = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "weight_decay_method": weight_decay_method,
            "correct_bias": correct_bias,
            "scale_log2": scale_log2,
        }
        super().__init__(params, hyperparameters, options)
