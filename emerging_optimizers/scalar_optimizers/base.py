"""Bases of optimizers that call an update function, with the interface of NVIDIA's package."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from .._groups import TITLES
from .._hyperparameters import Beta, NonNegative, is_in_domain, read_number
from .._members import Member, blame
from .._optimizer import ScalarOptimizer, SharedOptions
from .._rule import GroupRule
from .._states import check_param
from .._weights import MASTER
from ._forms import FunctionRules, InvalidUpdateError, UpdateFunction, complete_defaults


def _validate_common_hparams(
    *,
    lr: float | Tensor | None = None,
    betas: Sequence[float] | None = None,
    eps: float | None = None,
    weight_decay: float | None = None,
) -> None:
    """Raise for a hyperparameter out of range, as ``torch.optim`` does. None is not checked."""
    _check_not_negative("lr", lr)
    for i, beta in enumerate(() if betas is None else betas):
        if not is_in_domain(read_number(f"betas[{i}]", beta), Beta):
            raise ValueError(f"Invalid beta at index {i}: {beta}")
    _check_not_negative("eps", eps)
    _check_not_negative("weight_decay", weight_decay)


def _check_not_negative(name: str, value: Any) -> None:
    if value is not None and not is_in_domain(read_number(name, value), NonNegative):
        raise ValueError(f"Invalid {TITLES[name]}: {value}")


class _UpdateFunctionOptimizer(ScalarOptimizer):
    """What the two bases have in common."""

    state_keys: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if isinstance(cls.state_keys, str):
            raise TypeError(
                f"class {cls.__name__}: state_keys must be a tuple of names, not the str"
                f" {cls.state_keys!r}"
            )
        names = tuple(cls.state_keys)
        if len({"step", MASTER, *names}) != len(names) + 2:
            raise ValueError(
                f"class {cls.__name__}: state_keys must be different names, and neither 'step' nor"
                f" {MASTER!r}, not {names}"
            )
        cls._state_names = cls._all_state_names = names

    def __init__(
        self,
        params: ParamsT,
        defaults: Mapping[str, Any],
        *,
        update_fn: UpdateFunction,
        update_kwarg_names: Sequence[str],
        weight_decay_method: str = "decoupled",
        **options: Unpack[SharedOptions],
    ) -> None:
        name = type(self).__name__
        if not callable(update_fn):
            raise TypeError(f"{name}: update_fn must be callable, not {type(update_fn).__name__}")
        if isinstance(update_kwarg_names, str):
            raise TypeError(
                f"{name}: update_kwarg_names must be a tuple of names, not the str"
                f" {update_kwarg_names!r}"
            )
        if "step" in update_kwarg_names:
            raise ValueError(f"{name}: update_kwarg_names has 'step', which is always passed")
        self.update_fn = update_fn
        self.update_kwarg_names = tuple(update_kwarg_names)
        for key in ("lr", *self.update_kwarg_names):
            if key not in defaults:
                source = "" if key == "lr" else ", which update_kwarg_names has"
                raise ValueError(f"{name}: defaults lacks {key!r}{source}")
        try:
            complete = complete_defaults(
                update_fn, self.update_kwarg_names, defaults, self._state_names
            )
        except TypeError as error:
            raise blame(error, name) from None
        complete.setdefault("weight_decay", 0.0)
        complete.setdefault("weight_decay_method", weight_decay_method)
        self.weight_decay_method = complete["weight_decay_method"]
        self._rules = FunctionRules(update_fn, self.update_kwarg_names, self._state_names)
        super().__init__(params, complete, options)

    # ---- for subclasses --------------------------------------------------------------------------

    def pre_step_inplace(self, p: Tensor, group: dict[str, Any]) -> Any:
        """Do something before a parameter is updated; subclasses may override this.

        Args:
            p: The parameter, which may be modified in place; ``p.grad`` may also be replaced.
            group: Its group.

        Returns:
            What `post_step_inplace` receives as `ctx`.
        """

    def post_step_inplace(self, p: Tensor, group: dict[str, Any], ctx: Any) -> None:
        """Do something after a parameter was updated; subclasses may override this.

        Args:
            p: The parameter, which may be modified in place.
            group: Its group.
            ctx: What `pre_step_inplace` returned.
        """

    # ---- the rule --------------------------------------------------------------------------------

    def _rule_of(self, group: Mapping[str, Any]) -> GroupRule:
        rule = self._rules.of(group)
        return rule._replace(native=None) if self._has_hooks() else rule

    def _build_rule(self, group: Mapping[str, Any]) -> GroupRule:
        return self._rule_of(group)  # no rule is built

    def _has_hooks(self) -> bool:
        """Return whether the class, or the optimizer itself, has hooks of its own."""
        cls, base, own = type(self), _UpdateFunctionOptimizer, self.__dict__
        return (
            cls.pre_step_inplace is not base.pre_step_inplace
            or cls.post_step_inplace is not base.post_step_inplace
            or "pre_step_inplace" in own
            or "post_step_inplace" in own
        )

    def _check_masters(self, group: Mapping[str, Any]) -> None:
        """Raise for a group with masters, if there are hooks."""
        if group["master_weights"]:
            raise ValueError(
                f"{type(self).__name__} overrides pre_step_inplace or post_step_inplace, which"
                f" cannot be combined with master_weights={group['master_weights']!r}: the"
                " parameter would be overwritten by its master"
            )

    # ---- what torch.optim calls ------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; missing keys take the defaults."""
        if isinstance(param_group, dict) and self._has_hooks():
            self._check_masters({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def _step(
        self, grad_multiplier: float | Tensor | None, max_norm: float | None = None
    ) -> Tensor | None:
        if self._has_hooks():
            for group in self.param_groups:
                self._check_masters(group)
        if type(self)._init_group is not _INIT_GROUP or "_init_group" in self.__dict__:
            with torch.no_grad():
                for group in self.param_groups:
                    self._init_group(group)
        return super()._step(grad_multiplier, max_norm)

    def _around_update(self, member: Member, update: Callable[[Member], None]) -> None:
        try:
            if not self._has_hooks():
                return update(member)
            param, params = member.param, member.group["params"]
            # The member's group may be a copy.
            (group,) = (group for group in self.param_groups if group["params"] is params)
            ctx = self.pre_step_inplace(param, group)
            update(self._with_present_grad(member))
            self.post_step_inplace(param, group, ctx)
        except InvalidUpdateError as invalid:
            raise blame(invalid.args[0], member.name) from None

    def _with_present_grad(self, member: Member) -> Member:
        """Return a parameter with the gradient that it has after `pre_step_inplace`."""
        grad = self._grad(member.group, member.param)
        if grad is member.grad:
            return member
        member = member._replace(grad=grad)
        try:
            if grad is None:
                raise RuntimeError("pre_step_inplace has removed its gradient")
            check_param(member, must_be_matrix=False)
        except (TypeError, ValueError, RuntimeError) as error:
            raise blame(error, member.name) from None
        return member

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled or copied: in contrast to ``torch.optim``, all attributes."""
        base = vars(torch.optim.Optimizer([Tensor()], {}))
        dropped = {"_rules", "_state_dtype_filter", "grad_norm", "step", "_opt_called", *base}
        own = {name: value for name, value in vars(self).items() if name not in dropped}
        return {**own, **super().__getstate__()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what was pickled, copied or loaded."""
        if "update_fn" in state:  # not loaded
            vars(self).update(
                {k: v for k, v in state.items() if k not in ("state", "param_groups")}
            )
            names = self.update_kwarg_names
            self._rules = FunctionRules(self.update_fn, names, self._state_names)
        super().__setstate__(state)


_INIT_GROUP = ScalarOptimizer._init_group


class SingleMomentumOptimizer(_UpdateFunctionOptimizer):
    r"""Base of optimizers with one state, whose rule is an update function.

    .. math::
        p \leftarrow p - \gamma \, \mathtt{update\_fn}(g, m, \ldots)

    The interface is that of NVIDIA's package. If `update_fn` is one of this package's functions and
    no hook is overridden, a step is native. Otherwise, the function is called for each parameter,
    with tensors of dtype float32 or float64, and PyTorch operations do the rest. The hooks
    `pre_step_inplace` and `post_step_inplace` do nothing unless a subclass overrides them. They
    cannot be combined with `master_weights`.

    Args:
        params: Parameters to optimize: tensors, ``(name, tensor)`` pairs or parameter groups.
        defaults: Defaults of the groups' hyperparameters: ``lr``, ``weight_decay`` (if not 0), and
            those of `update_fn`.
        update_fn: Called as ``update_fn(grad, *states, **hyperparameters, step=step)``. Modifies
            the states in place, and returns the update.
        update_kwarg_names: The keys of a group that are passed to `update_fn`.
        weight_decay_method: "decoupled", "independent", "palm" or "l2"; see
            :class:`~emerging_optimizers.scalar_optimizers.ScalarOptimizer`.
        **options: `maximize`, `fused`, `capturable`, `state_dtype`, `master_weights` and
            `stochastic_rounding`, which all optimizers take; see
            :class:`~emerging_optimizers.scalar_optimizers.ScalarOptimizer`.

    Attributes:
        state_keys: The keys of a parameter's states, in the order in which `update_fn` takes them.
            A subclass may have others. There is also ``step``.

    Raises:
        ValueError: `defaults` lacks a key, or a hyperparameter is out of range.
        TypeError: One of this package's functions would get the wrong arguments.

    Example:
        >>> import torch
        >>> from emerging_optimizers.scalar_optimizers import SingleMomentumOptimizer
        >>> def calculate_sgd_update(grad, exp_avg, *, momentum, step):
        ...     return exp_avg.mul_(momentum).add_(grad)
        >>> class SGD(SingleMomentumOptimizer):
        ...     def __init__(self, params, lr=1e-2, momentum=0.9):
        ...         super().__init__(
        ...             params, {"lr": lr, "momentum": momentum}, update_fn=calculate_sgd_update,
        ...             update_kwarg_names=("momentum",),
        ...         )
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = SGD([weight], lr=0.25)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([ 0.5000, -1.0000])

    Reference:
        NVIDIA, "Emerging-Optimizers", https://github.com/NVIDIA-NeMo/Emerging-Optimizers.
    """

    state_keys: ClassVar[tuple[str, ...]] = ("exp_avg",)


class TwoMomentsOptimizer(_UpdateFunctionOptimizer):
    r"""Base of optimizers with two states, whose rule is an update function.

    .. math::
        p \leftarrow p - \gamma \, \mathtt{update\_fn}(g, m, v, \ldots)

    As :class:`SingleMomentumOptimizer`, which describes the arguments, but for `state_keys`.

    Example:
        >>> import torch
        >>> from emerging_optimizers.scalar_optimizers import TwoMomentsOptimizer
        >>> from emerging_optimizers.scalar_optimizers.update_functions import (
        ...     calculate_laprop_update,
        ... )
        >>> class LaProp(TwoMomentsOptimizer):
        ...     def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8):
        ...         super().__init__(
        ...             params, {"lr": lr, "betas": betas, "eps": eps, "correct_bias": True},
        ...             update_fn=calculate_laprop_update,
        ...             update_kwarg_names=("betas", "eps", "correct_bias"),
        ...         )
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = LaProp([weight], lr=0.1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([ 0.9000, -1.9000])

    Reference:
        NVIDIA, "Emerging-Optimizers", https://github.com/NVIDIA-NeMo/Emerging-Optimizers.
    """

    state_keys: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
