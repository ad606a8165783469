"""Lion: the sign of an interpolated momentum."""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from .._codes import SignedState
from .._docstrings import fill_docstring
from .._hyperparameters import Beta
from .._optimizer import ScalarOptimizer, SharedOptions
from .._rule import Rule
from ..registry import register_optimizer


def _lion(
    grad: Tensor,
    exp_avg: SignedState,
    momentum_beta: Beta,
    momentum_beta2: Beta,
) -> Tensor:
    update = (exp_avg * momentum_beta).add_(grad, alpha=1 - momentum_beta).sign_()
    exp_avg.mul_(momentum_beta2).add_(grad, alpha=1 - momentum_beta2)
    return update


_RULE = Rule("lion", _lion)
_call = _RULE.entry_point()


@fill_docstring
def calculate_lion_update(
    grad: Tensor | Sequence[Tensor],
    exp_avg: Tensor | Sequence[Tensor],
    momentum_beta: float,
    momentum_beta2: float | None = None,
    *,
    out: Tensor | Sequence[Tensor] | None = None,
) -> Tensor | list[Tensor]:
    r"""Update Lion's state in place and return the update.

    .. math::
        u &= \operatorname{sign}\bigl(\beta_1 m + (1 - \beta_1) g\bigr) \\
        m &\leftarrow \beta_2 m + (1 - \beta_2) g

    The sign of 0 and of NaN is 0, as in :func:`torch.sign`.

    Args:
        grad: {grad}
        exp_avg: Average of the gradient.
            {state}
        momentum_beta: :math:`\beta_1`, the weight of the momentum in the update, in [0, 1).
        momentum_beta2: :math:`\beta_2`, the decay rate of the average, in [0, 1). None:
            `momentum_beta`.
        out: {out}

    Returns:
        {returns}

    Raises:
        {raises}

    Example:
        >>> import torch
        >>> from emerging_optimizers.scalar_optimizers import calculate_lion_update
        >>> grad = torch.tensor([1.0, -2.0, 0.0])
        >>> exp_avg = torch.zeros(3)
        >>> calculate_lion_update(grad, exp_avg, momentum_beta=0.9, momentum_beta2=0.99)
        tensor([ 1., -1.,  0.])
        >>> exp_avg
        tensor([ 0.0100, -0.0200,  0.0000])

    Reference:
        Chen et al., "Symbolic Discovery of Optimization Algorithms",
        https://arxiv.org/abs/2302.06675.
    """
    if momentum_beta2 is None:
        momentum_beta2 = momentum_beta
    return _call(grad, exp_avg, momentum_beta, momentum_beta2, out)


@register_optimizer("lion")
@fill_docstring
class Lion(ScalarOptimizer):
    r"""Lion, as a ``torch.optim`` optimizer.

    .. math::
        p \leftarrow p - \gamma u

    with :math:`u` as in :func:`calculate_lion_update`.

    Args:
        params: {params}
        lr: {lr}
        betas: Weight of the momentum in the update, and decay rate of the momentum, each in [0, 1).
        weight_decay: {weight_decay}
        weight_decay_method: {weight_decay_method}
        **options: {options}

    Raises:
        {raises}

    Example:
        >>> import torch
        >>> from emerging_optimizers import Lion
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = Lion([weight], lr=0.1, weight_decay=0.0)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([ 0.9000, -1.9000])

    Reference:
        Chen et al., "Symbolic Discovery of Optimization Algorithms",
        https://arxiv.org/abs/2302.06675.
    """

    _rule = _RULE
    _renamed: ClassVar = {"momentum_beta": ("betas", 0, 2), "momentum_beta2": ("betas", 1, 2)}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.01,
        *,
        weight_decay_method: str = "decoupled",
        **options: Unpack[SharedOptions],
    ) -> None:
        hyperparameters = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "weight_decay_method": weight_decay_method,
        }
        super().__init__(params, hyperparameters, options)
