"""Optimizer classes of users' rules: ``class Adopt(ScalarOptimizer, rule=adopt, lr=1e-3)``."""

import inspect
from collections.abc import Mapping
from typing import Any

from .._base import SHARED_DEFAULTS
from .._optimizer import ScalarOptimizer
from .signature import Signature, check_default

# Arguments of every optimizer. No hyperparameter may have these names, or those of `_TAKEN`.
_OWN_DEFAULTS = {"weight_decay": 0.0, "weight_decay_method": "decoupled"}
_TAKEN = ("lr", "initial_lr", "foreach", "param_names", *_OWN_DEFAULTS, *SHARED_DEFAULTS)
_POSITIONAL = inspect.Parameter.POSITIONAL_OR_KEYWORD
_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def complete_class(cls: Any, rule: str, signature: Signature, defaults: Mapping[str, Any]) -> None:
    """Give a class an ``__init__`` with a rule's hyperparameters.

    Args:
        cls: The class.
        rule: The rule's name.
        signature: The rule's arguments.
        defaults: Defaults of the class's arguments, which override the rule's.

    Raises:
        TypeError: The rule's arguments clash with the optimizer's, a default is for an unknown
            argument or of another type, or a base defines ``__init__``.
        ValueError: A hyperparameter's default is outside its domain.
    """
    names = [h.name for h in signature.hyperparameters if h.kind != "step"]
    for name in names:
        if name in _TAKEN:
            raise TypeError(
                f"class {cls.__name__}: the rule {rule} has a hyperparameter named {name}, which"
                " every optimizer has: rename it"
            )
    known = ("lr", *names, *_OWN_DEFAULTS, *SHARED_DEFAULTS)
    for name in defaults:
        if name not in known:
            raise TypeError(
                f"class {cls.__name__}: unknown argument {name!r}; expected {', '.join(known)}"
            )
    for hyperparameter in signature.hyperparameters:
        if hyperparameter.name in defaults:
            check_default(hyperparameter, defaults[hyperparameter.name])
    for base in cls.__mro__[1 : cls.__mro__.index(ScalarOptimizer)]:
        if "__init__" in vars(base) and "_class_defaults" not in vars(base):
            raise TypeError(
                f"class {cls.__name__}: {base.__name__} defines __init__, which takes no"
                " hyperparameters of a rule; derive a class from ScalarOptimizer with rule=..., and"
                f" then another from {base.__name__} and that one"
            )
    if "__init__" in vars(cls):
        raise TypeError(
            f"class {cls.__name__}: __init__ is made from the rule; define another one in a class"
            " that derives from this one"
        )
    inherited = getattr(cls, "_class_defaults", {}) if _rule_name(cls) == rule else {}
    cls._class_defaults = {**inherited, **defaults}
    _add_init(cls, signature, names)


def _rule_name(cls: Any) -> str | None:
    return cls._rule.name if hasattr(cls, "_rule") else None


def _add_init(cls: Any, signature: Signature, names: list[str]) -> None:
    """Add ``__init__(params, lr, *, hyperparameters, weight_decay, ..., options)``."""
    defaults = {**SHARED_DEFAULTS, **_OWN_DEFAULTS, **signature.defaults, **cls._class_defaults}
    own = ("lr", *names, *_OWN_DEFAULTS)
    arguments = [f"{name}=_default_{name}" if name in defaults else name for name in own]
    values = ", ".join(f"{name!r}: {name}" for name in own)
    text = (
        f"def __init__(self, params, {arguments[0]}, *, {', '.join(arguments[1:])}, **_given):\n"
        f"    _init(self, params, {{{values}}}, {{**_options, **_given}})\n"
    )
    given = [name for name in own if name in defaults]
    namespace: dict[str, Any] = {f"_default_{name}": defaults[name] for name in given}
    namespace["_init"] = ScalarOptimizer.__init__
    namespace["_options"] = {n: v for n, v in cls._class_defaults.items() if n in SHARED_DEFAULTS}
    exec(compile(text, f"<class {cls.__name__}>", "exec"), namespace)
    init = namespace["__init__"]
    init.__qualname__ = f"{cls.__qualname__}.__init__"
    init.__module__ = cls.__module__
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
