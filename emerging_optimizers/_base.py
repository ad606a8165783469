"""What a class of optimizers declares: its rule, how it stores weights, how it counts steps."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ._counters import Counters
from ._hooks import WeightHook
from ._hyperparameters import is_flag
from ._members import Member, param_name
from ._rule import GroupKey, GroupRule, Rule
from ._weights import new_master

SHARED_DEFAULTS: dict[str, Any] = {
    "maximize": False,
    "fused": None,
    "capturable": False,
    "state_dtype": None,
    "master_weights": False,
    "stochastic_rounding": False,
    "differentiable": False,
}


class BaseOptimizer(torch.optim.Optimizer):
    """An optimizer as the modules of a step see it.

    A subclass declares a rule, and may override the other attributes.
    """

    _rule: ClassVar[Rule]
    # Where a group has a hyperparameter of the rule, if not under its name: a key; or a key, an
    # index in the sequence that is there, and the length of that.
    _renamed: ClassVar[Mapping[str, GroupKey]] = {}
    # The rules of groups to which `_rule_of` gives another one. They may have other states.
    _other_rules: ClassVar[tuple[Rule, ...]] = ()
    # The keys of a parameter's states, by their names in the formulas, where these differ.
    _state_keys: ClassVar[Mapping[str, str]] = {}
    # The norm of the gradients in the last step that clipped them.
    grad_norm: Tensor | None = None
    # Made from these: `_rule` as groups store it, and the keys of its states; all rules, by name;
    # the keys of all states; and those of all scalar states.
    _group_rule: ClassVar[GroupRule]
    _state_names: ClassVar[tuple[str, ...]]
    _group_rules: ClassVar[dict[str, GroupRule]]
    _all_state_names: ClassVar[tuple[str, ...]]
    _all_scalar_names: ClassVar[tuple[str, ...]] = ()
    # How errors name one of the ``betas``: like the class of that name in torch.optim, or NVIDIA's.
    _beta_title: ClassVar[str] = "beta"
    _option_defaults: ClassVar[Mapping[str, Any]] = SHARED_DEFAULTS
    # Whether a step also completes the states of parameters without a gradient.
    _makes_all_states: ClassVar[bool] = False
    _counters: ClassVar[Counters] = Counters()
    _hook: ClassVar[WeightHook | None] = None
    # Whether a parameter with one dimension may be a shard of a larger one.
    _has_flat_shards: ClassVar[bool] = False
    # Whether a parameter may have 8-bit states, given its name; and the answers.
    _state_dtype_filter: Callable[[str | None, Tensor], Any] | None = None
    _filtered: dict[Tensor, bool]
    # Flags of groups, in addition to those of all optimizers and of the class's bases.
    _own_flags: ClassVar[tuple[str, ...]] = ()
    # Those of them that need more than one native call. The hook's flag is added.
    _slow_flags: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, rule: Any = None, **defaults: Any) -> None:
        """Read the class's rule and hook.

        Args:
            rule: The rule, if it is one that a user wrote.
            **defaults: Then, defaults of the constructor's arguments.
        """
        super().__init_subclass__()
        if rule is not None or defaults:
            _complete_class(cls, rule, defaults)
        if hasattr(cls, "_rule"):
            cls._take_rules()
        for name in ("_own_flags", "_slow_flags"):
            flags = (flag for base in cls.__mro__ for flag in vars(base).get(name, ()))
            setattr(cls, name, tuple(dict.fromkeys(flags)))
        flag = cls._hook.flag if cls._hook is not None else None
        if flag is not None and flag not in cls._slow_flags:
            cls._own_flags = (*cls._own_flags, flag)
            cls._slow_flags = (*cls._slow_flags, flag)

    @classmethod
    def _take_rules(cls) -> None:
        """Make the rules as groups store them."""
        cls._group_rules = {
            rule.name: rule.for_groups(
                cls._renamed, tuple(cls._state_keys.get(name, name) for name in rule.states)
            )
            for rule in (cls._rule, *cls._other_rules)
        }
        cls._group_rule = cls._group_rules[cls._rule.name]
        cls._state_names = cls._group_rule.state_names
        names = (name for rule in cls._group_rules.values() for name in rule.state_names)
        cls._all_state_names = tuple(dict.fromkeys(names))
        scalars = (name for rule in cls._group_rules.values() for name in rule.scalar_names)
        cls._all_scalar_names = tuple(dict.fromkeys(scalars))

    def _rule_of(self, group: Mapping[str, Any]) -> GroupRule:
        """Return the rule of a group, which may depend on its options."""
        return self._group_rule

    def _chosen_rule(self, flag: Any, rule: Rule, other: Rule) -> GroupRule:
        """Return `rule` if a group's flag is set, else `other`.

        If the flag is not a bool, there is no native step. So the checks before any other step find
        it.
        """
        if is_flag(flag):  # numpy's, too
            return self._group_rules[(rule if flag else other).name]
        return self._group_rules[rule.name]._replace(native=None)

    def _build_rule(self, group: Mapping[str, Any]) -> GroupRule:
        """Return the rule of a group; build its native code if the group can use it."""
        found = self._rule_of(group)
        if found.native is None and found.rule.build_for(group["params"]):
            type(self)._take_rules()
            return self._rule_of(group)
        return found

    def _grad(self, group: Mapping[str, Any], param: Tensor) -> Tensor | None:
        """Return a parameter's gradient, if it has one."""
        return param.grad

    def _new_master(self, group: dict[str, Any], param: Tensor) -> Tensor | None:
        """Return a new ``master_param`` with the parameter's value, if it should have one.

        It may be the parameter itself.
        """
        return new_master(group, param)

    def _around_update(self, member: Member, update: Callable[[Member], None]) -> None:
        """Run one parameter's update in the fallback step."""
        update(member)

    def _translate_group(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Return a saved group, which may be another optimizer's, with this optimizer's keys."""
        return saved

    def _translate_state(self, group: Mapping[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
        """Return a loaded state of one of a group's parameters, as this optimizer can read it."""
        return saved

    def _as_stored(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return a complete state as the mapping that the optimizer stores."""
        return state


def _complete_class(cls: type[BaseOptimizer], rule: Any, defaults: Mapping[str, Any]) -> None:
    """Give a class a user's rule, or other defaults than its base has."""
    known = getattr(cls, "_rule", None) if rule is None else rule
    if not isinstance(known, Rule):
        given = ", and none is given" if rule is None else f", not {type(rule).__name__}"
        raise TypeError(
            f"class {cls.__name__}: rule= must be a rule made by emerging_optimizers.rule or"
            f" load_rule{given}"
        )
    known.complete_class(cls, defaults)


class StepScalars(NamedTuple):
    """What one call of ``step`` passes to the update of every group.

    Attributes:
        grad_multiplier: Every gradient is multiplied by it, if it is not None.
        grad_scale: Every gradient is divided by it, if it is not None; from a ``GradScaler``.
        found_inf: The step is a no-op if it is neither None nor 0; from a ``GradScaler``.
        seed: 64 random bits; 0 if no group rounds stochastically.
    """

    grad_multiplier: float | Tensor | None
    grad_scale: Tensor | None
    found_inf: Tensor | None
    seed: int


class StepCall(NamedTuple):
    """One call of ``step``.

    Attributes:
        optimizer: The optimizer.
        groups: Its groups; copies of those whose learning rate was a DTensor.
        positions: For each group, the position of its first parameter in the optimizer.
        scalars: What is the same for all groups.
    """

    optimizer: BaseOptimizer
    groups: list[dict[str, Any]]
    positions: list[int]
    scalars: StepScalars


def grads_of(optimizer: BaseOptimizer, group: dict[str, Any]) -> list[Tensor | None]:
    return [optimizer._grad(group, param) for param in group["params"]]


def members_of(
    optimizer: BaseOptimizer, group: dict[str, Any], indices: Iterable[int] | None = None
) -> list[Member]:
    """Return a group's parameters, all of them or those with some indices."""
    rule = optimizer._rule_of(group)
    params = group["params"]
    states = optimizer.state
    members = []
    for i in range(len(params)) if indices is None else indices:
        param = params[i]
        state = states.get(param)
        grad = optimizer._grad(group, param)
        members.append(
            Member(optimizer, group, i, param, grad, {} if state is None else state, rule)
        )
    return members


def hook_of(optimizer: BaseOptimizer, group: Mapping[str, Any]) -> WeightHook | None:
    """Return the hook around a group's update, if the group asks for it."""
    hook = optimizer._hook
    return hook if hook is not None and group.get(hook.flag) else None


def check_tensors(optimizer: BaseOptimizer, group: dict[str, Any]) -> None:
    """Raise for parameters, and gradients, that are not tensors."""
    for index, param in enumerate(group["params"]):
        if not isinstance(param, Tensor):
            name = param_name(optimizer, group, index)
            raise TypeError(f"{name} must be a Tensor, not {type(param).__name__}")
        grad: Any = optimizer._grad(group, param)
        if grad is not None and not isinstance(grad, Tensor):
            name = param_name(optimizer, group, index)
            raise TypeError(f"{name}: its gradient must be a Tensor, not {type(grad).__name__}")
