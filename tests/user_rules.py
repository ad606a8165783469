"""Rules as users define them, and their optimizers: the table of rules under `--rules user`.

They compute what built-in rules compute, so that the same oracles judge them.
"""

import torch
from torch import Tensor

import emerging_optimizers as eo
from emerging_optimizers.megatron import MegatronMixin
from emerging_optimizers.registry import register_optimizer


@eo.rule
def user_adam(
    grad: Tensor,
    exp_avg: eo.SignedState,
    exp_avg_sq: eo.UnsignedState,
    *,
    betas: tuple[eo.Beta, eo.Beta],
    correct_bias: bool,
    use_nesterov: bool,
    step: int,
    eps: eo.NonNegative,
) -> tuple[Tensor, Tensor, Tensor]:
    """Adam, written functionally."""
    beta1, beta2 = betas
    exp_avg = beta1 * exp_avg + (1 - beta1) * grad
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad * grad
    c1 = 1 - beta1**step if correct_bias else 1.0
    c2 = 1 - beta2**step if correct_bias else 1.0
    if use_nesterov:
        c1_next = 1 - beta1 ** (step + 1) if correct_bias else 1.0
        exp_avg_hat = exp_avg * (beta1 / c1_next) + grad * ((1 - beta1) / c1)
    else:
        exp_avg_hat = exp_avg / c1
    return exp_avg_hat / (exp_avg_sq.sqrt() / c2**0.5 + eps), exp_avg, exp_avg_sq


@eo.rule
def user_sign(
    grad: Tensor,
    exp_avg: eo.SignedState,
    *,
    momentum_beta: eo.Beta,
    momentum_beta2: eo.Beta | None = None,
) -> Tensor:
    """Lion, written in place."""
    if momentum_beta2 is None:
        momentum_beta2 = momentum_beta
    update = exp_avg.mul(momentum_beta).add_(grad, alpha=1 - momentum_beta).sign_()
    exp_avg.mul_(momentum_beta2).add_(grad, alpha=1 - momentum_beta2)
    return update


@eo.rule
def user_root(grad: Tensor, *, scale: eo.NonNegative) -> Tensor:
    """The signed square root of the gradient: a rule without states."""
    return torch.sign(grad) * grad.abs().sqrt() * scale


@register_optimizer("user_adam")
class UserAdam(
    eo.ScalarOptimizer,
    rule=user_adam,
    lr=1e-3,
    betas=(0.9, 0.999),
    correct_bias=True,
    use_nesterov=False,
    eps=1e-8,
):
    """Adam."""


@register_optimizer("user_sign")
class UserSign(eo.ScalarOptimizer, rule=user_sign, lr=1e-4, momentum_beta=0.9, momentum_beta2=0.99):
    """Lion."""


@register_optimizer("user_root")
class UserRoot(eo.ScalarOptimizer, rule=user_root, lr=1e-3, scale=8.0):
    """Steps by the signed square root of the gradient."""


class MegatronUserAdam(MegatronMixin, UserAdam):
    """Adam for Megatron-Core."""


class MegatronUserSign(MegatronMixin, UserSign):
    """Lion for Megatron-Core."""


class MegatronUserRoot(MegatronMixin, UserRoot):
    """Signed square roots for Megatron-Core."""


ALL = (user_adam, user_sign, user_root)
