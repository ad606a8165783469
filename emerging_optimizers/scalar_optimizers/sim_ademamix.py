"""Simplified AdEMAMix: one momentum buffer, mixed with the gradient itself."""

from collections.abc import Sequence

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from .._codes import SignedState, UnsignedState
from .._docstrings import fill_docstring
from .._hyperparameters import Beta, NonNegative, Step, WarmupSteps
from .._optimizer import ScalarOptimizer, SharedOptions
from .._rule import Rule
from .._schedules import bias_correction, check_half_life, half_life_warmup
from ..registry import register_optimizer


def _sim_ademamix(
    grad: Tensor,
    exp_avg: SignedState,
    exp_avg_sq: UnsignedState,
    num_beta_fast_warmup_steps: WarmupSteps | None,
    min_beta_fast: Beta,
    betas: tuple[Beta, Beta],
    step: Step,
    eps: NonNegative,
    correct_bias: bool,
    alpha: float,
) -> Tensor:
    final_beta_fast, beta2 = betas
    beta = half_life_warmup(step, min_beta_fast, final_beta_fast, num_beta_fast_warmup_steps)
    c1 = bias_correction(beta, step, True) / (1 - beta) if correct_bias else 1.0
    c2 = bias_correction(beta2, step, correct_bias)
    exp_avg.mul_(beta).add_(grad)
    exp_avg_sq.mul_(beta2).addcmul_(grad * (1 - beta2), grad)
    mixed = (exp_avg / c1).add_(grad, alpha=alpha)
    return mixed.div_(exp_avg_sq.sqrt().div_(c2**0.5).add_(eps))


def _check(
    betas: Sequence[float],
    min_beta_fast: float,
    num_beta_fast_warmup_steps: int | None,
    **_: object,
) -> None:
    check_half_life("min_beta_fast", min_beta_fast, num_beta_fast_warmup_steps)
    check_half_life("betas[0]", betas[0], num_beta_fast_warmup_steps)


_RULE = Rule("sim_ademamix", _sim_ademamix, check=_check)
_call = _RULE.entry_point()


@fill_docstring
def calculate_sim_ademamix_update(
    grad: Tensor | Sequence[Tensor],
    exp_avg: Tensor | Sequence[Tensor],
    exp_avg_sq: Tensor | Sequence[Tensor],
    num_beta_fast_warmup_steps: int | None,
    min_beta_fast: float,
    betas: Sequence[float],
    step: int | float | Tensor,
    eps: float,
    correct_bias: bool,
    alpha: float = 2,
    *,
    out: Tensor | Sequence[Tensor] | None = None,
) -> Tensor | list[Tensor]:
    r"""Update Simplified AdEMAMix's states in place and return the update.

    .. math::
        m &\leftarrow B(t) m + g \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        u &= \Bigl(\alpha g + m \,/\, \frac{1 - B(t)^t}{1 - B(t)}\Bigr) \,/\,
            \bigl(\sqrt{v / (1 - \beta_2^t)} + \epsilon\bigr)

    :math:`B(t)` goes from `min_beta_fast` to the fast beta so that the half-life of the momentum
    grows linearly. Without bias correction, both divisors are 1.

    Args:
        grad: {grad}
        exp_avg: Momentum: a decaying sum of the gradient.
            {state}
        exp_avg_sq: Average of the squared gradient.
            {state}
        num_beta_fast_warmup_steps: {num_beta_fast_warmup_steps}
        min_beta_fast: {min_beta_fast}
        betas: Decay rates of the momentum and of the second moment, each in [0, 1).
        step: {step}
        eps: {eps}
        correct_bias: Apply bias correction: divide the momentum and the second moment by the
            divisors above.
        alpha: Weight of the gradient, which is added to the momentum.
        out: {out}

    Returns:
        {returns}

    Raises:
        {raises}

    Example:
        >>> import torch
        >>> from emerging_optimizers.scalar_optimizers import calculate_sim_ademamix_update
        >>> grad = torch.tensor([1.0, -2.0, 0.0])
        >>> exp_avg, exp_avg_sq = torch.zeros(3), torch.zeros(3)
        >>> calculate_sim_ademamix_update(
        ...     grad, exp_avg, exp_avg_sq, num_beta_fast_warmup_steps=1000, min_beta_fast=0.9,
        ...     betas=(0.9999, 0.999), step=1, eps=1e-8, correct_bias=True, alpha=2.0,
        ... )
        tensor([ 3.0000, -3.0000,  0.0000])

    Reference:
        Pagliardini, Ablin and Grangier, "The AdEMAMix Optimizer: Better, Faster, Older",
        https://arxiv.org/abs/2409.03137; Morwani, Vyas, Zhang and Kakade, "Connections between
        Schedule-Free Optimizers, AdEMAMix, and Accelerated SGD Variants",
        https://arxiv.org/abs/2502.02431.
    """
    return _call(
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


@register_optimizer("sim_ademamix")
@fill_docstring
class SimplifiedAdEMAMix(ScalarOptimizer):
    r"""Simplified AdEMAMix, as a ``torch.optim`` optimizer.

    .. math::
        p \leftarrow p - \gamma u

    with :math:`u` as in :func:`calculate_sim_ademamix_update`.

    Args:
        params: {params}
        lr: {lr}
        betas: Decay rates of the momentum and of the second moment, each in [0, 1).
        eps: {eps}
        weight_decay: {weight_decay}
        correct_bias: Apply bias correction: divide the momentum and the second moment by the
            divisors above.
        num_beta_fast_warmup_steps: {num_beta_fast_warmup_steps}
        min_beta_fast: {min_beta_fast}
        alpha: Weight of the gradient, which is added to the momentum.
        weight_decay_method: {weight_decay_method}
        **options: {options}

    Raises:
        {raises}

    Example:
        >>> import torch
        >>> from emerging_optimizers import SimplifiedAdEMAMix
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = SimplifiedAdEMAMix([weight], lr=0.1, alpha=0.0)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([ 0.9000, -1.9000])

    Reference:
        Pagliardini, Ablin and Grangier, "The AdEMAMix Optimizer: Better, Faster, Older",
        https://arxiv.org/abs/2409.03137; Morwani, Vyas, Zhang and Kakade, "Connections between
        Schedule-Free Optimizers, AdEMAMix, and Accelerated SGD Variants",
        https://arxiv.org/abs/2502.02431.
    """

    _rule = _RULE

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9999, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        correct_bias: bool = True,
        num_beta_fast_warmup_steps: int | None = None,
        min_beta_fast: float = 0.9,
        alpha: float = 2.0,
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
            "num_beta_fast_warmup_steps": num_beta_fast_warmup_steps,
            "min_beta_fast": min_beta_fast,
            "alpha": alpha,
        }
        super().__init__(params, hyperparameters, options)
