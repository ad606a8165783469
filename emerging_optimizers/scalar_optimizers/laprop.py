"""LaProp: Adam with the gradient normalised before it is averaged."""

from collections.abc import Sequence

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from .._codes import SignedState, UnsignedState
from .._docstrings import fill_docstring
from .._hyperparameters import Beta, NonNegative, Step
from .._norms import KEEP_NORMS
from .._optimizer import ScalarOptimizer, SharedOptions
from .._rule import Rule
from .._schedules import bias_correction
from ..registry import register_optimizer


def _laprop(
    grad: Tensor,
    exp_avg: SignedState,
    exp_avg_sq: UnsignedState,
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


@fill_docstring
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
        grad: {grad}
        exp_avg: Average of the normalised gradient.
            {state}
        exp_avg_sq: Average of the squared gradient.
            {state}
        correct_bias: {correct_bias}
        betas: Decay rates of the two averages, each in [0, 1).
        step: {step}
        eps: {eps}
        out: {out}

    Returns:
        {returns}

    Raises:
        {raises}

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


@register_optimizer("laprop")
@fill_docstring
class LaProp(ScalarOptimizer):
    r"""LaProp, as a ``torch.optim`` optimizer.

    .. math::
        p \leftarrow p - \gamma u

    with :math:`u` as in :func:`calculate_laprop_update`.

    Args:
        params: {params}
        lr: {lr}
        betas: Decay rates of the averages of the normalised gradient and of the squared gradient,
            each in [0, 1).
        eps: {eps}
        weight_decay: {weight_decay}
        correct_bias: {correct_bias}
        frob_normalize: Scale each parameter back to the Frobenius norm that it had before the step.
            This cancels weight decay: with both, an error is logged.
        weight_decay_method: {weight_decay_method}
        **options: {options}

    Raises:
        {raises}

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
