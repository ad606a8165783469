"""AdEMAMix: Adam with a second, slower average of the gradient."""

from collections.abc import Sequence

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from .._codes import SignedState, UnsignedState
from .._docstrings import fill_docstring
from .._hyperparameters import Beta, NonNegative, Step, WarmupSteps
from .._optimizer import ScalarOptimizer, SharedOptions
from .._rule import Rule
from .._schedules import bias_correction, check_half_life, half_life_warmup, linear_warmup
from ..registry import register_optimizer


def _ademamix(
    grad: Tensor,
    exp_avg_fast: SignedState,
    exp_avg_slow: SignedState,
    exp_avg_sq: UnsignedState,
    num_beta_slow_warmup_steps: WarmupSteps | None,
    num_alpha_warmup_steps: WarmupSteps | None,
    betas: tuple[Beta, Beta, Beta],
    step: Step,
    eps: NonNegative,
    correct_bias: bool,
    alpha: float,
) -> Tensor:
    beta_fast, beta2, final_beta_slow = betas
    beta_slow = half_life_warmup(step, beta_fast, final_beta_slow, num_beta_slow_warmup_steps)
    alpha = linear_warmup(step, alpha, num_alpha_warmup_steps)
    c_fast = bias_correction(beta_fast, step, correct_bias)
    c2 = bias_correction(beta2, step, correct_bias)
    exp_avg_fast.mul_(beta_fast).add_(grad, alpha=1 - beta_fast)
    exp_avg_slow.mul_(beta_slow).add_(grad, alpha=1 - beta_slow)
    exp_avg_sq.mul_(beta2).addcmul_(grad * (1 - beta2), grad)
    mixed = (exp_avg_fast / c_fast).add_(exp_avg_slow, alpha=alpha)
    return mixed.div_(exp_avg_sq.sqrt().div_(c2**0.5).add_(eps))


def _check(betas: Sequence[float], num_beta_slow_warmup_steps: int | None, **_: object) -> None:
    check_half_life("betas[0]", betas[0], num_beta_slow_warmup_steps)
    check_half_life("betas[2]", betas[2], num_beta_slow_warmup_steps)


_RULE = Rule("ademamix", _ademamix, check=_check)
_call = _RULE.entry_point()


@fill_docstring
def calculate_ademamix_update(
    grad: Tensor | Sequence[Tensor],
    exp_avg_fast: Tensor | Sequence[Tensor],
    exp_avg_slow: Tensor | Sequence[Tensor],
    exp_avg_sq: Tensor | Sequence[Tensor],
    num_beta_slow_warmup_steps: int | None,
    num_alpha_warmup_steps: int | None,
    betas: Sequence[float],
    step: int | float | Tensor,
    eps: float,
    correct_bias: bool,
    alpha: float = 2,
    *,
    out: Tensor | Sequence[Tensor] | None = None,
) -> Tensor | list[Tensor]:
    r"""Update AdEMAMix's states in place and return the update.

    .. math::
        m_f &\leftarrow \beta_f m_f + (1 - \beta_f) g \\
        m_s &\leftarrow B(t) m_s + (1 - B(t)) g \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        u &= \Bigl(\frac{m_f}{1 - \beta_f^t} + A(t) m_s\Bigr) \,/\,
            \bigl(\sqrt{v / (1 - \beta_2^t)} + \epsilon\bigr)

    :math:`A(t)` rises linearly from 0 to `alpha`. :math:`B(t)` goes from the fast to the slow beta
    so that the half-life of the average grows linearly. The slow average has no bias correction.

    Args:
        grad: {grad}
        exp_avg_fast: Fast average of the gradient.
            {state}
        exp_avg_slow: Slow average of the gradient.
            {state}
        exp_avg_sq: Average of the squared gradient.
            {state}
        num_beta_slow_warmup_steps: {num_beta_slow_warmup_steps}
        num_alpha_warmup_steps: {num_alpha_warmup_steps}
        betas: Decay rates of the fast average, the second moment and the slow average, in this
            order, each in [0, 1).
        step: {step}
        eps: {eps}
        correct_bias: Apply bias correction: divide the fast average and the second moment by
            ``1 - beta**step``.
        alpha: Final weight of the slow average.
        out: {out}

    Returns:
        {returns}

    Raises:
        {raises}

    Example:
        >>> import torch
        >>> from emerging_optimizers.scalar_optimizers import calculate_ademamix_update
        >>> grad = torch.tensor([1.0, -2.0, 0.0])
        >>> exp_avg_fast, exp_avg_slow, exp_avg_sq = (torch.zeros(3) for _ in range(3))
        >>> calculate_ademamix_update(
        ...     grad, exp_avg_fast, exp_avg_slow, exp_avg_sq, num_beta_slow_warmup_steps=1000,
        ...     num_alpha_warmup_steps=1000, betas=(0.9, 0.999, 0.9999), step=1, eps=1e-8,
        ...     correct_bias=True, alpha=5.0,
        ... )
        tensor([ 1.0003, -1.0003,  0.0000])

    Reference:
        Pagliardini, Ablin and Grangier, "The AdEMAMix Optimizer: Better, Faster, Older",
        https://arxiv.org/abs/2409.03137.
    """
    return _call(
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


@register_optimizer("ademamix")
@fill_docstring
class AdEMAMix(ScalarOptimizer):
    r"""AdEMAMix, as a ``torch.optim`` optimizer.

    .. math::
        p \leftarrow p - \gamma u

    with :math:`u` as in :func:`calculate_ademamix_update`.

    Args:
        params: {params}
        lr: {lr}
        betas: Decay rates of the fast average, the second moment and the slow average, in this
            order, each in [0, 1).
        eps: {eps}
        weight_decay: {weight_decay}
        alpha: Final weight of the slow average.
        num_beta_slow_warmup_steps: {num_beta_slow_warmup_steps}
        num_alpha_warmup_steps: {num_alpha_warmup_steps}
        correct_bias: Apply bias correction: divide the fast average and the second moment by
            ``1 - beta**step``.
        weight_decay_method: {weight_decay_method}
        **options: {options}

    Raises:
        {raises}

    Example:
        >>> import torch
        >>> from emerging_optimizers import AdEMAMix
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = AdEMAMix([weight], lr=0.1, alpha=0.0)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([ 0.9000, -1.9000])

    Reference:
        Pagliardini, Ablin and Grangier, "The AdEMAMix Optimizer: Better, Faster, Older",
        https://arxiv.org/abs/2409.03137.
    """

    _rule = _RULE

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        alpha: float = 5.0,
        num_beta_slow_warmup_steps: int | None = None,
        num_alpha_warmup_steps: int | None = None,
        correct_bias: bool = True,
        weight_decay_method: str = "decoupled",
        **options: Unpack[SharedOptions],
    ) -> None:
        hyperparameters = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "weight_decay_method": weight_decay_method,
            "alpha": alpha,
            "num_beta_slow_warmup_steps": num_beta_slow_warmup_steps,
            "num_alpha_warmup_steps": num_alpha_warmup_steps,
            "correct_bias": correct_bias,
        }
        super().__init__(params, hyperparameters, options)
