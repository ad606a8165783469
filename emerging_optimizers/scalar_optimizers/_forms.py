"""Update functions as rules: those of this package, and others."""

import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from .._hyperparameters import Hyperparameter
from .._optimizer import ScalarOptimizer
from .._rounding import store
from .._rule import GroupKey, GroupRule, Rule, arithmetic_dtype
from . import update_functions

UpdateFunction: TypeAlias = Callable[..., Any]


class Form(NamedTuple):
    """What an update function of this package computes.

    Attributes:
        rule: The rule.
        renamed: Where its arguments have a hyperparameter of the rule, if not under its name.
    """

    rule: Rule
    renamed: Mapping[str, GroupKey]


def form_of(function: UpdateFunction) -> Form | None:
    """Return what an update function computes; None for a function of another package."""
    try:
        return _forms().get(function)
    except TypeError:  # callables need not be hashable
        return None


@functools.cache
def _forms() -> dict[UpdateFunction, Form]:
    """Return the functions with the names of the rules' hyperparameters, and keyword-only ones."""
    forms = {}
    for cls in ScalarOptimizer.__subclasses__():
        if cls.__module__.startswith(f"{__package__}.") and hasattr(cls, "_rule"):
            rule = cls._rule
            # The keyword-only form has the arguments of the class.
            forms[getattr(update_functions, rule.title)] = Form(rule, cls._renamed)
            forms[getattr(sys.modules[cls.__module__], rule.title)] = Form(rule, {})
    return forms


# ---- functions that groups call ------------------------------------------------------------------


def complete_defaults(
    function: UpdateFunction,
    names: Sequence[str],
    defaults: Mapping[str, Any],
    state_keys: Sequence[str],
) -> dict[str, Any]:
    """Check what a group passes to an update function.

    Args:
        function: The function.
        names: The keys of its hyperparameters in the group.
        defaults: The group's defaults.
        state_keys: The keys of its states.

    Returns:
        The defaults, with those of the function's hyperparameters that the group lacks.
    """
    form = form_of(function)
    if form is None:
        return dict(defaults)
    states = form.rule.states
    if len(states) != len(state_keys):
        raise TypeError(
            f"{form.rule.title} takes {_listed('state', states)}, but state_keys has"
            f" {_listed('key', state_keys)}"
        )
    arguments = _hyperparameters(function, form)
    for name in names:
        if name not in arguments:
            raise TypeError(
                f"{form.rule.title} takes no {name!r}, which is in update_kwarg_names; it takes"
                f" {', '.join(map(repr, arguments))}"
            )
    for name, default in arguments.items():
        if name not in names and default is inspect.Parameter.empty:
            raise TypeError(f"{form.rule.title} needs {name!r}, which update_kwarg_names lacks")
    return _not_passed(function, form, names) | dict(defaults)


class FunctionRules:
    """An update function as parameter groups store a rule.

    Args:
        function: The function.
        names: The keys of its hyperparameters in a group.
        state_keys: The keys of its states.
    """

    def __init__(
        self, function: UpdateFunction, names: Sequence[str], state_keys: tuple[str, ...]
    ) -> None:
        form = form_of(function)
        self._by_function = CalledRule(function, state_keys, names).for_groups({}, state_keys)
        self._by_rule = None
        self._not_passed: dict[str, Any] = {}
        if form is not None:
            self._by_rule = form.rule.for_groups(form.renamed, state_keys)
            self._not_passed = _not_passed(function, form, names)

    def of(self, group: Mapping[str, Any]) -> GroupRule:
        """Return a group's rule: for a function of this package, the rule that it computes."""
        for name, default in self._not_passed.items():
            value = group.get(name, default)
            # Another value is not passed to the function, and must not be the rule's.
            if value is not default and (isinstance(value, Tensor) or value != default):
                return self._by_function
        return self._by_function if self._by_rule is None else self._by_rule


def _not_passed(function: UpdateFunction, form: Form, names: Sequence[str]) -> dict[str, Any]:
    """Return the hyperparameters that groups do not pass to a function, with their defaults."""
    arguments = _hyperparameters(function, form)
    return {name: default for name, default in arguments.items() if name not in names}


def _hyperparameters(function: UpdateFunction, form: Form) -> dict[str, Any]:
    """Return the hyperparameters that a function takes, except ``step``, with their defaults."""
    others = ("grad", *form.rule.states, "step", "out")
    parameters = inspect.signature(function).parameters
    return {name: p.default for name, p in parameters.items() if name not in others}


def _listed(noun: str, names: Sequence[str]) -> str:
    plural = "" if len(names) == 1 else "s"
    return f"{len(names)} {noun}{plural} ({', '.join(map(repr, names))})"


class InvalidUpdateError(Exception):
    """What an update function returned is no update; the argument is the error to raise."""


class CalledRule(Rule):
    """A rule without native code that calls a function for each tensor.

    Args:
        function: Called with the gradient and the states, in float32 or float64, and with keyword
            arguments.
        states: The names of its states.
        names: The names of the keyword arguments, other than ``step``.
    """

    def __init__(
        self, function: UpdateFunction, states: tuple[str, ...], names: Sequence[str]
    ) -> None:
        self.formula = function
        self._check = None
        self._lowest_step = 0
        declared = [Hyperparameter(name, "any") for name in names]
        title = getattr(function, "__name__", type(function).__name__)
        self._describe(title, states, [*declared, Hyperparameter("step", "step")])
        self.title = title

    def compute_update(
        self, grad: Tensor, states: list[Tensor], values: dict[str, Any]
    ) -> Tensor | None:
        """Call the function, and return a copy of the update: it may have returned a state."""
        real = arithmetic_dtype((grad, *states))
        widened = [state.to(real) for state in states]
        update: Any = self.formula(grad.to(real), *widened, **values)
        if not isinstance(update, Tensor):
            given = "None" if update is None else f"a {type(update).__name__}"
            raise InvalidUpdateError(
                TypeError(f"update_fn ({self.title}) returned {given}; expected the update")
            )
        if update.shape != grad.shape:
            raise InvalidUpdateError(
                ValueError(
                    f"update_fn ({self.title}) returned an update of shape {tuple(update.shape)};"
                    f" expected {tuple(grad.shape)}"
                )
            )
        if update.device != grad.device:
            raise InvalidUpdateError(
                ValueError(
                    f"update_fn ({self.title}) returned an update on {update.device}; expected"
                    f" {grad.device}"
                )
            )
        for state, wide in zip(states, widened, strict=True):
            if wide is not state:
                store(state, wide)
        return update.to(real, copy=True)
