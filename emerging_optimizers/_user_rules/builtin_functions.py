"""Python's built-in functions, where an argument may be a proxy."""

import builtins
import functools
import types
import typing
from collections.abc import Callable
from typing import Any

import torch

from .graph import RuleError
from .proxies import Element, Number, Proxy, apply, as_number


def has_proxy(*arguments: Any, **options: Any) -> bool:
    """Return whether an argument is a proxy."""
    return any(isinstance(value, Proxy) for value in (*arguments, *options.values()))


class _NumberType(type):
    """``float`` or ``int`` in a rule: of a per-step number, they make one."""

    plain: Any

    def __call__(cls, *arguments: Any, **options: Any) -> Any:
        if len(arguments) != 1 or options or not isinstance(arguments[0], Number):
            return cls.plain(*arguments, **options)
        (value,) = arguments
        number = Number(value.trace, as_number(value.trace, value.node))
        is_whole = cls.plain is float or value.node.kind == "flag"
        return number if is_whole else apply("trunc", number)

    def __instancecheck__(cls, value: Any) -> bool:
        return _isinstance(value, cls)

    def __subclasscheck__(cls, other: Any) -> bool:
        return issubclass(plain_type(other), cls.plain)

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls.plain, name)


_NUMBER_TYPES: dict[type, Any] = {
    kind: _NumberType(kind.__name__, (), {"plain": kind}) for kind in (float, int)
}


def plain_type(value: Any) -> Any:
    """Return the class that one in a rule stands for; any other value as it is."""
    if value is _type:
        return type
    return value.plain if isinstance(value, _NumberType) else value


def _type(value: Any, *rest: Any) -> Any:
    if isinstance(value, Proxy):
        raise RuleError(f"type() of {value!r}: use isinstance, or a hyperparameter")
    kind = type(value, *rest)
    return _NUMBER_TYPES.get(kind, kind)


def _isinstance(value: Any, classes: Any) -> bool:
    """Return whether what a proxy stands for is of a class."""
    if isinstance(classes, types.UnionType):
        classes = typing.get_args(classes)
    flat = classes if isinstance(classes, tuple) else (classes,)
    known: tuple[Any, ...] = tuple(map(plain_type, flat))
    if isinstance(value, Element):
        return issubclass(torch.Tensor, known)
    if isinstance(value, Number):
        outcomes = {issubclass(kind, known) for kind in (int, float)}
        if len(outcomes) > 1:
            raise RuleError("isinstance that tells an int from a float: a number may be either")
        return outcomes.pop()
    return isinstance(value, known)


def _extreme(name: str) -> Callable[..., Any]:
    plain = getattr(builtins, name)
    other = "max" if name == "min" else "min"

    def extreme(*values: Any, **options: Any) -> Any:
        if len(values) == 1 and isinstance(values[0], (tuple, list)) and has_proxy(*values[0]):
            values = tuple(values[0])
            options.pop("default", None)
        elif len(values) == 1:
            return plain(*values, **options)
        if options or not has_proxy(*values):
            return plain(*values, **options)
        if any(isinstance(value, Proxy) and not isinstance(value, Number) for value in values):
            raise RuleError(
                f"{name}() of tensors: use torch.{name}imum(a, b), or clamp({other}=...) with a"
                " number"
            )
        return functools.reduce(lambda a, b: apply(name, a, b), values)

    return extreme


def _power(base: Any, exp: Any, mod: Any = None) -> Any:
    if mod is None or not has_proxy(base, exp, mod):
        return pow(base, exp, mod)
    return base**exp % mod


BUILTINS: dict[str, Any] = {
    "float": _NUMBER_TYPES[float],
    "int": _NUMBER_TYPES[int],
    "isinstance": _isinstance,
    "type": _type,
    "min": _extreme("min"),
    "max": _extreme("max"),
    "pow": _power,
}
