"""RMSprop, also centered and with momentum."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypedDict

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from .._codes import SignedState, UnsignedState
from .._docstrings import fill_docstring
from .._hyperparameters import Beta, NonNegative
from .._optimizer import (
    MasterWeights,
    ScalarOptimizer,
    SharedOptions,
    StateDtype,
    StateDtypeFilter,
)
from .._rule import GroupRule, Rule
from ..registry import register_optimizer


def _rmsprop(grad: Tensor, exp_avg_sq: UnsignedState, alpha: Beta, eps: NonNegative) -> Tensor:
    exp_avg_sq.mul_(alpha).addcmul_(grad * (1 - alpha), grad)
    return grad / exp_avg_sq.sqrt().add_(eps)


# The variance is a difference, which rounding of its averages to 8 bits would make negative.
def _centered(
    grad: Tensor, exp_avg_sq: Tensor, grad_avg: Tensor, alpha: Beta, eps: NonNegative
) -> Tensor:
    exp_avg_sq.mul_(alpha).addcmul_(grad * (1 - alpha), grad)
    grad_avg.mul_(alpha).add_(grad, alpha=1 - alpha)
    return grad / exp_avg_sq.addcmul(grad_avg, grad_avg, value=-1).sqrt_().add_(eps)


def _momentum(
    grad: Tensor,
    exp_avg_sq: UnsignedState,
    momentum_buffer: SignedState,
    alpha: Beta,
    eps: NonNegative,
    momentum: NonNegative,
) -> Tensor:
    momentum_buffer.mul_(momentum).add_(_rmsprop(grad, exp_avg_sq, alpha, eps))
    return momentum_buffer.clone()


def _centered_momentum(
    grad: Tensor,
    exp_avg_sq: Tensor,
    grad_avg: Tensor,
    momentum_buffer: SignedState,
    alpha: Beta,
    eps: NonNegative,
    momentum: NonNegative,
) -> Tensor:
    momentum_buffer.mul_(momentum).add_(_centered(grad, exp_avg_sq, grad_avg, alpha, eps))
    return momentum_buffer.clone()


_RULE = Rule("rmsprop", _rmsprop)
_CENTERED = Rule("rmsprop_centered", _centered)
_MOMENTUM = Rule("rmsprop_momentum", _momentum)
_CENTERED_MOMENTUM = Rule("rmsprop_centered_momentum", _centered_momentum)
_call = _RULE.entry_point()


@fill_docstring
def calculate_rmsprop_update(
    grad: Tensor | Sequence[Tensor],
    exp_avg_sq: Tensor | Sequence[Tensor],
    *,
    alpha: float,
    eps: float,
    step: object = None,
    out: Tensor | Sequence[Tensor] | None = None,
) -> Tensor | list[Tensor]:
    r"""Update RMSprop's state in place and return the update.

    .. math::
        v &\leftarrow \alpha v + (1 - \alpha) g^2 \\
        u &= g \,/\, \bigl(\sqrt{v} + \epsilon\bigr)

    Args:
        grad: {grad}
        exp_avg_sq: Average of the squared gradient.
            {state}
        alpha: Decay rate of the average, in [0, 1).
        eps: {eps}
        step: Ignored: there is no bias correction. All update functions can take it.
        out: {out}

    Returns:
        {returns}

    Raises:
        {raises}

    Example:
        >>> import torch
        >>> from emerging_optimizers.scalar_optimizers import calculate_rmsprop_update
        >>> grad = torch.tensor([1.0, -2.0, 0.0])
        >>> exp_avg_sq = torch.zeros(3)
        >>> calculate_rmsprop_update(grad, exp_avg_sq, alpha=0.75, eps=1e-8)
        tensor([ 2., -2.,  0.])
        >>> exp_avg_sq
        tensor([0.2500, 1.0000, 0.0000])

    Reference:
        Tieleman and Hinton, "Lecture 6.5: rmsprop", Neural Networks for Machine Learning,
        Coursera 2012.
    """
    return _call(grad, exp_avg_sq, alpha, eps, out)


class _Options(TypedDict, total=False):
    """The options that are not arguments of ``torch.optim.RMSprop``."""

    fused: bool | None
    state_dtype: StateDtype
    state_dtype_filter: StateDtypeFilter
    master_weights: MasterWeights
    stochastic_rounding: bool


@register_optimizer("rmsprop")
@fill_docstring
class RMSprop(ScalarOptimizer):
    r"""RMSprop, as a ``torch.optim`` optimizer.

    .. math::
        p \leftarrow p - \gamma u

    with :math:`u` as in :func:`calculate_rmsprop_update`. If `centered`, the divisor is the
    gradient's standard deviation: :math:`\sqrt{v - \bar g^2} + \epsilon`, with an average
    :math:`\bar g` of the gradient. With `momentum` :math:`\mu`, the update is the buffer
    :math:`b \leftarrow \mu b + u`. Takes the arguments of :class:`torch.optim.RMSprop`, in their
    positions, and its state dicts. The states are ``square_avg``; ``grad_avg``, if `centered`; and
    ``momentum_buffer``, with a `momentum` other than 0.

    Args:
        params: {params}
        lr: {lr}
        alpha: Decay rate of the averages, in [0, 1).
        eps: {eps}
        weight_decay: {weight_decay}
        momentum: Decay rate of the momentum; not negative.
        centered: Divide by the standard deviation. As in ``torch.optim``, the variance is a
            difference of averages: where a gradient hardly varies, rounding can make it negative,
            and the update NaN.
        capturable: This and the following arguments are those of
            :class:`~emerging_optimizers.scalar_optimizers.ScalarOptimizer`.
        foreach: Accepted and ignored; cannot be combined with ``fused=True``.
        maximize: Maximize the objective.
        differentiable: Not supported; True raises a ValueError.
        weight_decay_method: {weight_decay_method}
        **options: {options}

    Raises:
        {raises}

    Example:
        >>> import torch
        >>> from emerging_optimizers import RMSprop
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = RMSprop([weight], lr=0.1, alpha=0.75, momentum=0.9)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([ 0.8000, -1.8000])
        >>> sorted(optimizer.state[weight])
        ['momentum_buffer', 'square_avg', 'step']

    Reference:
        Tieleman and Hinton, "Lecture 6.5: rmsprop", Neural Networks for Machine Learning,
        Coursera 2012; Graves, "Generating Sequences With Recurrent Neural Networks",
        https://arxiv.org/abs/1308.0850.
    """

    _rule = _RULE
    _other_rules = (_CENTERED, _MOMENTUM, _CENTERED_MOMENTUM)
    _state_keys: ClassVar = {"exp_avg_sq": "square_avg"}
    _own_flags: ClassVar[tuple[str, ...]] = ("centered",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        weight_decay_method: str = "l2",
        **options: Unpack[_Options],
    ) -> None:
        hyperparameters = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "weight_decay_method": weight_decay_method,
            "momentum": momentum,
            "centered": centered,
            "foreach": foreach,
        }
        shared: SharedOptions = {
            "capturable": capturable,
            "maximize": maximize,
            "differentiable": differentiable,
            **options,
        }
        super().__init__(params, hyperparameters, shared)

    def _rule_of(self, group: Mapping[str, Any]) -> GroupRule:
        # Groups of a loaded state dict may lack keys.
        centered = group.get("centered", False)
        momentum = group.get("momentum", 0.0)
        # A tensor may be on a device that no step waits for.
        has_momentum = isinstance(momentum, Tensor) or momentum != 0
        if centered is False:
            return self._group_rules["rmsprop_momentum"] if has_momentum else self._group_rule
        rules = (_CENTERED_MOMENTUM, _MOMENTUM) if has_momentum else (_CENTERED, self._rule)
        return self._chosen_rule(centered, *rules)
