"""The update functions, and the rules that they compute."""

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .._optimizer import ScalarOptimizer
from .._rule import GroupKey, Rule
from . import update_functions


class Form(NamedTuple):
    """What an update function computes.

    Attributes:
        rule: The rule.
        renamed: Where its arguments have a hyperparameter of the rule, if not under its name.
    """

    rule: Rule
    renamed: Mapping[str, GroupKey]


def form_of(function: Callable[..., Any]) -> Form | None:
    """Return what an update function computes; None for a function of another package."""
    try:
        return _forms().get(function)
    except TypeError:  # callables need not be hashable
        return None


@functools.cache
def _forms() -> dict[Callable[..., Any], Form]:
    """Return the functions with the names of the rules' hyperparameters, and keyword-only ones."""
    forms = {}
    for cls in ScalarOptimizer.__subclasses__():
        if cls.__module__.startswith(f"{__package__}.") and hasattr(cls, "_rule"):
            rule = cls._rule
            # The keyword-only form has the arguments of the class.
            forms[getattr(update_functions, rule.title)] = Form(rule, cls._renamed)
            forms[getattr(sys.modules[cls.__module__], rule.title)] = Form(rule, {})
    return forms
