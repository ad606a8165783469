"""Optimizer classes of users' rules: ``class Adopt(ScalarOptimizer, rule=adopt, lr=1e-3)``."""

import inspect
from collections.abc import Mapping
from typing import Any

from .._base import SHARED_DEFAULTS, BaseOptimizer
from .rule import UserRule

# Arguments of every optimizer, which no hyperparameter may be named like.
_OWN_DEFAULTS = {"weight_decay": 0.0, "weight_decay_method": "decoupled"}
_TAKEN = ("lr", *_OWN_DEFAULTS, *SHARED_DEFAULTS, "grad_multiplier", "closure", "foreach", "initial_lr")
_POSITIONAL = inspect.Parameter.POSITIONAL_OR_KEYWORD
_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def complete_class(cls: type[BaseOptimizer], rule: Any, defaults: Mapping[str, Any]) -> None:
    """Give a class its rule, and an ``__init__`` with the rule's hyperparameters.

    Args:
        cls: The class.
        rule: Its rule; None for the rule of the class from which it derives.
        defaults: Defaults of arguments, which override the rule's.

    Raises:
        TypeError: There is no rule, the rule's arguments clash with the optimizer's, or a default
            is of an unknown argument.
    """
    inherited = getattr(cls, "_class_defaults", {})
    if rule is None:
        rule = getattr(cls, "_rule", None)
    elif inherited and rule is not cls._rule:
        inherited = {}
    if not isinstance(rule, UserRule):
        raise TypeError(
            f"class {cls.__name__}: rule= takes a rule that emerging_optimizers.rule made, not"
            f" {type(rule).__name__}"
        )
    names = [h.name for h in rule.hyperparameters]
    for name in names:
        if name in _TAKEN:
            raise TypeError(
                f"class {cls.__name__}: the rule {rule.name} has a hyperparameter named {name}, which"
                " every optimizer has: rename it"
            )
    known = ("lr", *names, *_OWN_DEFAULTS, *SHARED_DEFAULTS)
    for name in defaults:
        if name not in known:
            raise TypeError(
                f"class {cls.__name__}: unknown argument {name!r}; expected {', '.join(known)}"
            )
    if any("__init__" in vars(base) and base is not BaseOptimizer for base in _between(cls)):
        raise TypeError(
            f"class {cls.__name__}: give rule= to a class that derives from ScalarOptimizer, and"
            " derive this one from that class"
        )
    cls._rule = rule
    cls._class_defaults = {**inherited, **defaults}  # type: ignore[attr-defined]
    if "__init__" not in vars(cls):
        _add_init(cls, rule, names)


def _between(cls: type[BaseOptimizer]) -> list[type]:
    """Return the classes between a class and `ScalarOptimizer` that are not of rules."""
    classes = []
    for base in cls.__mro__[1:]:
        if base.__name__ == "ScalarOptimizer":
            break
        if "_class_defaults" not in vars(base):
            classes.append(base)
    return classes


def _add_init(cls: Any, rule: UserRule, names: list[str]) -> None:
    """Add ``__init__(params, lr, *, hyperparameters, weight_decay, ..., options)``."""
    defaults = {**SHARED_DEFAULTS, **_OWN_DEFAULTS, **rule.signature.defaults, **cls._class_defaults}
    own = ("lr", *names, *_OWN_DEFAULTS)
    keywords = [n if n not in defaults else f"{n}=_{n}" for n in own]
    options = {n: v for n, v in cls._class_defaults.items() if n in SHARED_DEFAULTS}
    values = ", ".join(f"{name!r}: {name}" for name in own)
    text = (
        f"def __init__(self, params, {keywords[0]}, *, {', '.join(keywords[1:])}, **options):\n"
        f"    _init(self, params, {{{values}}}, {{**_options, **options}})\n"
    )
    base = next(base for base in cls.__mro__ if base.__name__ == "ScalarOptimizer")
    namespace: dict[str, Any] = {f"_{name}": defaults[name] for name in own if name in defaults}
    namespace.update(_init=base.__init__, _options=options)
    exec(compile(text, f"<class {cls.__name__}>", "exec"), namespace)
    init = namespace["__init__"]
    init.__qualname__ = f"{cls.__qualname__}.__init__"
    init.__module__ = cls.__module__
    init.__doc__ = f"Create the optimizer; see :class:`{cls.__name__}`."
    init.__signature__ = _signature(own, defaults)
    cls.__init__ = init


def _signature(own: tuple[str, ...], defaults: Mapping[str, Any]) -> inspect.Signature:
    """Return the signature, in which the options of all optimizers have names."""
    parameters = [inspect.Parameter(name, _POSITIONAL) for name in ("self", "params")]
    for name in (*own, *SHARED_DEFAULTS):
        kind = _POSITIONAL if name == "lr" else _KEYWORD
        default = defaults.get(name, inspect.Parameter.empty)
        parameters.append(inspect.Parameter(name, kind, default=default))
    return inspect.Signature(parameters)
