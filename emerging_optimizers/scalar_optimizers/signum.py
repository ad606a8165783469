"""Signum: the sign of the momentum."""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from .._codes import SignedState
from .._docstrings import fill_docstring
from .._hyperparameters import Beta, Step
from .._optimizer import ScalarOptimizer, SharedOptions
from .._rule import Rule, shape_scale
from .._schedules import bias_correction
from ..registry import register_optimizer


def _signum(
    grad: Tensor,
    exp_avg: SignedState,
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
        update.mul_(shape_scale(grad.shape))
    return update


_RULE = Rule("signum", _signum)
_call = _RULE.entry_point()


@fill_docstring
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
        grad: {grad}
        exp_avg: Average of the gradient.
            {state}
        momentum_beta: Decay rate of the average, in [0, 1).
        correct_bias: Apply bias correction: divide by ``1 - beta**step``. Changes the update with
            Nesterov momentum only.
        use_nesterov: Use Nesterov momentum.
        step: {step}
        use_shape_scaling: Multiply the update of a matrix by ``2 / (rows + columns)``; a
            ValueError unless tensors are 2-D.
        out: {out}

    Returns:
        {returns}

    Raises:
        {raises}

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
    return _call(
        grad, exp_avg, momentum_beta, correct_bias, use_nesterov, step, use_shape_scaling, out
    )


@register_optimizer("signum")
@fill_docstring
class Signum(ScalarOptimizer):
    r"""Signum, as a ``torch.optim`` optimizer.

    .. math::
        p \leftarrow p - \gamma u

    with :math:`u` as in :func:`calculate_signum_update`.

    Args:
        params: {params}
        lr: {lr}
        momentum: Decay rate of the average of the gradient, in [0, 1).
        weight_decay: {weight_decay}
        correct_bias: Apply bias correction: divide by ``1 - beta**step``. Changes the update with
            Nesterov momentum only.
        nesterov: Use Nesterov momentum.
        use_shape_scaling: Multiply the update of a matrix by ``2 / (rows + columns)``; an
            error unless parameters are 2-D.
        weight_decay_method: {weight_decay_method}
        **options: {options}

    Raises:
        {raises}

    Example:
        >>> import torch
        >>> from emerging_optimizers import Signum
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = Signum([weight], lr=0.1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([ 0.9000, -1.9000])

    Reference:
        Bernstein et al., "signSGD: Compressed Optimisation for Non-Convex Problems",
        https://arxiv.org/abs/1802.04434; the scaling by shape: https://arxiv.org/abs/2506.07254.
    """

    _rule = _RULE
    _renamed: ClassVar = {"momentum_beta": "momentum", "use_nesterov": "nesterov"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        correct_bias: bool = True,
        nesterov: bool = False,
        use_shape_scaling: bool = False,
        weight_decay_method: str = "decoupled",
        **options: Unpack[SharedOptions],
    ) -> None:
        hyperparameters = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "weight_decay_method": weight_decay_method,
            "correct_bias": correct_bias,
            "nesterov": nesterov,
            "use_shape_scaling": use_shape_scaling,
        }
        super().__init__(params, hyperparameters, options)
