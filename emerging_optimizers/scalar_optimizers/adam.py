"""Adam, with or without Nesterov momentum, and AMSGrad."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from .._codes import SignedState, UnsignedState
from .._docstrings import fill_docstring
from .._hyperparameters import Beta, NonNegative, Step, read_flag
from .._optimizer import ScalarOptimizer, SharedOptions
from .._rule import GroupRule, Rule
from .._schedules import bias_correction
from ..registry import register_optimizer


def _adam(
    grad: Tensor,
    exp_avg: SignedState,
    exp_avg_sq: UnsignedState,
    betas: tuple[Beta, Beta],
    correct_bias: bool,
    use_nesterov: bool,
    step: Step,
    eps: NonNegative,
) -> Tensor:
    _average(grad, exp_avg, exp_avg_sq, betas)
    return _normalize(grad, exp_avg, exp_avg_sq, betas, correct_bias, use_nesterov, step, eps)


# The largest of averages that fluctuate grows with the number of steps, so they are not 8-bit.
def _amsgrad(
    grad: Tensor,
    exp_avg: SignedState,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor,
    betas: tuple[Beta, Beta],
    correct_bias: bool,
    use_nesterov: bool,
    step: Step,
    eps: NonNegative,
) -> Tensor:
    _average(grad, exp_avg, exp_avg_sq, betas)
    torch.maximum(max_exp_avg_sq, exp_avg_sq, out=max_exp_avg_sq)
    return _normalize(grad, exp_avg, max_exp_avg_sq, betas, correct_bias, use_nesterov, step, eps)


def _average(grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, betas: tuple[float, float]) -> None:
    beta1, beta2 = betas
    exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad * (1 - beta2), grad)


def _normalize(
    grad: Tensor,
    exp_avg: Tensor,
    square: Tensor,
    betas: tuple[float, float],
    correct_bias: bool,
    use_nesterov: bool,
    step: int,
    eps: float,
) -> Tensor:
    beta1, beta2 = betas
    c1 = bias_correction(beta1, step, correct_bias)
    c2 = bias_correction(beta2, step, correct_bias)
    if use_nesterov:
        c1_next = bias_correction(beta1, step + 1, correct_bias)
        exp_avg_hat = (exp_avg * (beta1 / c1_next)).add_(grad, alpha=(1 - beta1) / c1)
    else:
        exp_avg_hat = exp_avg / c1
    return exp_avg_hat.div_(square.sqrt().div_(c2**0.5).add_(eps))


_RULE = Rule("adam", _adam)
_AMSGRAD = Rule("amsgrad", _amsgrad)
_call = _RULE.entry_point()


@fill_docstring
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
        grad: {grad}
        exp_avg: Average of the gradient.
            {state}
        exp_avg_sq: Average of the squared gradient.
            {state}
        betas: Decay rates of the two averages, each in [0, 1).
        correct_bias: {correct_bias}
        use_nesterov: Use Nesterov momentum, as NAdam does, but without its schedule.
        step: {step}
        eps: {eps}
        out: {out}

    Returns:
        {returns}

    Raises:
        {raises}

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
    return _call(grad, exp_avg, exp_avg_sq, betas, correct_bias, use_nesterov, step, eps, out)


@register_optimizer("adam")
@fill_docstring
class Adam(ScalarOptimizer):
    r"""Adam, as a ``torch.optim`` optimizer.

    .. math::
        p \leftarrow p - \gamma u

    with :math:`u` as in :func:`calculate_adam_update`. Takes the arguments of
    :class:`torch.optim.Adam`, in their positions, and its state dicts.

    Args:
        params: {params}
        lr: {lr}
        betas: Decay rates of the averages of the gradient and of its square, each in [0, 1).
        eps: {eps}
        weight_decay: {weight_decay}
        amsgrad: Divide by the largest average of squares so far, the state ``max_exp_avg_sq``.
        correct_bias: {correct_bias}
        nesterov: Use Nesterov momentum, as NAdam does, but without its schedule.
        weight_decay_method: {weight_decay_method}
        decoupled_weight_decay: True is the same as ``weight_decay_method="decoupled"``.
        foreach: Accepted and ignored; cannot be combined with ``fused=True``.
        **options: {options}

    Raises:
        {raises}

    Example:
        >>> import torch
        >>> from emerging_optimizers import Adam
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = Adam([weight], lr=0.1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([ 0.9000, -1.9000])

    Reference:
        Kingma and Ba, "Adam: A Method for Stochastic Optimization",
        https://arxiv.org/abs/1412.6980; Reddi, Kale and Kumar, "On the Convergence of Adam and
        Beyond", https://arxiv.org/abs/1904.09237.
    """

    _rule = _RULE
    _other_rules = (_AMSGRAD,)
    _renamed: ClassVar = {"use_nesterov": "nesterov"}
    _beta_title = "beta parameter"
    _own_flags: ClassVar[tuple[str, ...]] = ("amsgrad",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        correct_bias: bool = True,
        nesterov: bool = False,
        weight_decay_method: str = "l2",
        decoupled_weight_decay: bool = False,
        foreach: bool | None = None,
        **options: Unpack[SharedOptions],
    ) -> None:
        if read_flag("decoupled_weight_decay", decoupled_weight_decay):
            weight_decay_method = _decoupled(weight_decay_method)
        hyperparameters = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "weight_decay_method": weight_decay_method,
            "correct_bias": correct_bias,
            "nesterov": nesterov,
            "foreach": foreach,
        }
        if read_flag("amsgrad", amsgrad):
            # Only then: distributed checkpoints are read by a group's keys, and those of earlier
            # versions do not have this one.
            hyperparameters["amsgrad"] = True
        super().__init__(params, hyperparameters, options)

    def _rule_of(self, group: Mapping[str, Any]) -> GroupRule:
        # Without the key, it is False.
        amsgrad = group.get("amsgrad", False)
        if amsgrad is False:
            return self._group_rule
        return self._chosen_rule(amsgrad, _AMSGRAD, self._rule)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; missing keys take the defaults.

        It may have the key ``decoupled_weight_decay``, as in ``torch.optim.Adam``.
        """
        if isinstance(param_group, dict):
            param_group = _with_method(param_group)
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the state dict, which ``torch.optim.Adam`` can load.

        Its groups have ``decoupled_weight_decay`` as well as ``weight_decay_method``.
        """
        return super().state_dict()

    def _finish_state_dict(self, saved: dict[str, Any]) -> None:
        super()._finish_state_dict(saved)
        for group in saved["param_groups"]:
            group["decoupled_weight_decay"] = group["weight_decay_method"] == "decoupled"

    def _translate_group(self, saved: dict[str, Any]) -> dict[str, Any]:
        translated = dict(saved)
        if "amsgrad" in self.defaults:
            translated.setdefault("amsgrad", False)
        # torch.optim.AdamW saves the same keys as torch.optim.Adam, with this one True.
        if read_flag("decoupled_weight_decay", translated.pop("decoupled_weight_decay", False)):
            translated.setdefault("weight_decay_method", "decoupled")
        return translated


def _decoupled(method: str) -> str:
    if method not in ("l2", "decoupled"):
        raise ValueError(
            f"decoupled_weight_decay=True cannot be combined with weight_decay_method={method!r}"
        )
    return "decoupled"


def _with_method(group: dict[str, Any]) -> dict[str, Any]:
    """Return a group with ``weight_decay_method`` instead of ``decoupled_weight_decay``."""
    key = "decoupled_weight_decay"
    if key not in group:
        return group
    translated = {name: value for name, value in group.items() if name != key}
    if read_flag(key, group[key]):
        method = group.get("weight_decay_method", "decoupled")
        translated["weight_decay_method"] = _decoupled(method)
    else:
        translated.setdefault("weight_decay_method", "l2")
    return translated


@register_optimizer("adamw")
@fill_docstring
class AdamW(Adam):
    r"""Adam with decoupled weight decay, as a ``torch.optim`` optimizer.

    .. math::
        p &\leftarrow p - \gamma \lambda p \\
        p &\leftarrow p - \gamma u

    with :math:`u` as in :func:`calculate_adam_update`. Takes the arguments of
    :class:`torch.optim.AdamW`, in their positions, and its state dicts.

    Args:
        params: {params}
        lr: {lr}
        betas: Decay rates of the averages of the gradient and of its square, each in [0, 1).
        eps: {eps}
        weight_decay: {weight_decay}
        amsgrad: Divide by the largest average of squares so far, the state ``max_exp_avg_sq``.
        correct_bias: {correct_bias}
        nesterov: Use Nesterov momentum, as NAdam does, but without its schedule.
        weight_decay_method: {weight_decay_method}
        foreach: Accepted and ignored; cannot be combined with ``fused=True``.
        **options: {options}

    Raises:
        {raises}

    Example:
        >>> import torch
        >>> from emerging_optimizers import AdamW
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = AdamW([weight], lr=0.1, weight_decay=0.0)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([ 0.9000, -1.9000])

    Reference:
        Loshchilov and Hutter, "Decoupled Weight Decay Regularization",
        https://arxiv.org/abs/1711.05101.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        correct_bias: bool = True,
        nesterov: bool = False,
        weight_decay_method: str = "decoupled",
        foreach: bool | None = None,
        **options: Unpack[SharedOptions],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            correct_bias=correct_bias,
            nesterov=nesterov,
            weight_decay_method=weight_decay_method,
            foreach=foreach,
            **options,
        )
