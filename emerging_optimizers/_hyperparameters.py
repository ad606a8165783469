"""Hyperparameters: reading them, and their domains.

The signature of a rule's formula declares its hyperparameters and their domains. The compiled
module reads them by itself, with the same messages.
"""

import contextlib
import math
from collections.abc import Callable
from numbers import Integral
from types import NoneType
from typing import Any, Literal, NamedTuple, NewType, get_args

import torch
from torch import Tensor

from ._values import HYPERPARAMETER, has_value, items_of, read

# The types of hyperparameters, as the formulas' signatures name them.
Beta = NewType("Beta", float)  # [0, 1)
NonNegative = NewType("NonNegative", float)  # [0, inf]
WarmupSteps = NewType("WarmupSteps", int)  # >= 0; None is the same as 0
Step = NewType("Step", int)
# In a user's rule: no hyperparameter, but a number that an optimizer carries from step to step.
ScalarState = NewType("ScalarState", float)
# That of a group, which a scheduler may have set: from `_LOWEST_RATE` on.
LearningRate = NewType("LearningRate", float)

# Schedulers reach 0 by sums that rounding takes below it: LinearLR to about -1e-20.
_LOWEST_RATE = -1e-12

_STEP_DTYPES = (torch.int64, torch.float32)


class Hyperparameter(NamedTuple):
    """A hyperparameter, as a formula's signature describes it."""

    name: str
    kind: Literal["flag", "step", "warm-up", "number", "optional", "numbers", "any"]
    domain: Any = None
    length: int = 1

    @classmethod
    def from_annotation(cls, name: str, annotation: Any) -> "Hyperparameter":
        if annotation is bool:
            return cls(name, "flag")
        if annotation is Step:
            return cls(name, "step")
        if annotation == WarmupSteps | None:
            return cls(name, "warm-up", WarmupSteps)
        arguments = get_args(annotation)
        if NoneType in arguments:
            (domain,) = (argument for argument in arguments if argument is not NoneType)
            return cls(name, "optional", domain)
        if arguments:
            return cls(name, "numbers", arguments[0], len(arguments))
        return cls(name, "number", annotation)

    def read(self, name: str, value: Any) -> Any:
        """Return a value as the formula takes it; for all kinds but ``step``."""
        if self.kind == "any":
            return value  # of a function that checks it by itself
        if self.kind == "flag":
            return read_flag(name, value)
        if self.kind == "numbers":
            return read_numbers(name, value, self.length)
        if self.kind == "number":
            return read_number(name, value)
        if self.kind == "optional":
            return None if value is None else read_number(name, value, "a number or None")
        return None if value is None else read_whole_number(name, value, _WARMUP)


_WARMUP = "a whole number or None"


# ---- readers -------------------------------------------------------------------------------------


def _number_text(value: float) -> str:
    return repr(float(value)).removesuffix(".0")


def _as_float(value: Any) -> float | None:
    """Return a number as a float; None for anything else, or beyond a float's range."""
    if isinstance(value, float):
        return value
    if torch.compiler.is_compiling() and isinstance(value, int):
        return float(value)  # a symbolic number has no attributes to look for
    is_text = isinstance(value, (str, bytes))  # numpy's text converts to a float
    if is_text or _is_meta(value):
        return None
    if not (hasattr(value, "__float__") or hasattr(value, "__index__")):
        return None
    try:
        return read(value, HYPERPARAMETER)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None


def _is_meta(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta


def described(value: Any) -> str:
    """Describe an unexpected value: by its type, and by its value if that is short."""
    name = type(value).__name__
    if isinstance(value, str):
        return f"{name} ({str(value)!r})" if len(value) <= _MAX_TEXT else name
    if isinstance(value, (bool, int, float)) and abs(value) < _MAX_INT:
        return f"{name} ({value!r})"
    return name


_MAX_TEXT = 40
_MAX_INT = 10**15


def _advice(value: Any) -> str:
    """Return the cure, for an error message, if a number was passed as text."""
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        return ""
    try:
        float(value)
    except ValueError:
        return ""
    text = value.strip()
    mantissa, mark, exponent = text.replace("E", "e").partition("e")
    if not mark or "_" in text:
        return "; convert it with float()"
    number = mantissa if "." in mantissa else f"{mantissa}.0"
    signed = exponent if exponent[0] in "+-" else f"+{exponent}"
    if f"{number}e{signed}" == text.replace("E", "e"):
        return "; convert it with float()"
    return f"; YAML reads {text} as text: write {number}e{signed}, or convert it with float()"


def read_number(name: str, value: Any, expected: str = "a number") -> float:
    """Return as a float what Python takes for a number."""
    number = _as_float(value)
    if number is None:
        raise TypeError(f"{name} must be {expected}, not {described(value)}{_advice(value)}")
    return number


_BOOLS = ("bool", "bool_")  # of Python, and of numpy


def is_flag(value: Any) -> bool:
    """Return whether a value is a bool, Python's or numpy's."""
    return type(value).__name__ in _BOOLS


def read_flag(name: str, value: Any, expected: str = "a bool") -> bool:
    """Return a bool for a bool, numpy's included."""
    if not is_flag(value):
        raise TypeError(f"{name} must be {expected}, not {described(value)}{_advice(value)}")
    return bool(value)


def read_optional_flag(name: str, value: Any) -> bool | None:
    """Return a bool, or None for None."""
    return None if value is None else read_flag(name, value, "a bool or None")


def read_whole_number(name: str, value: Any, expected: str) -> int:
    """Return an int for an int or an integral float."""
    if isinstance(value, int):
        return _in_int64(name, value)
    if not has_value(value) and not _is_meta(value):
        return 1
    if hasattr(value, "__index__") and not _is_meta(value):
        # Arrays and tensors have it, too, and refuse where they are of floats.
        with contextlib.suppress(TypeError):
            return _in_int64(name, int(value.__index__()))
    number = _as_float(value)
    if number is None:
        raise TypeError(f"{name} must be {expected}, not {described(value)}{_advice(value)}")
    if math.isnan(number):
        raise ValueError(f"{name} is nan; expected a whole number")
    if not number.is_integer():
        raise TypeError(f"{name} is {_number_text(number)}; expected a whole number")
    return _in_int64(name, int(number))


def _in_int64(name: str, value: int) -> int:
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} is beyond the range of int64")
    return value


def read_numbers(name: str, values: Any, count: int) -> tuple[float, ...]:
    """Return a tuple of floats for a sequence of ``count`` numbers."""
    items = items_of(values)
    if items is None:
        raise TypeError(f"{name} must be a sequence of numbers, not {described(values)}")
    numbers = tuple(read_number(f"{name}[{i}]", value) for i, value in enumerate(items))
    if len(numbers) != count:
        raise ValueError(f"{name} has {len(numbers)} values; expected {count}")
    return numbers


def as_saved(value: Any) -> Any:
    """Return a hyperparameter with Python's numbers: torch.load refuses numpy's."""
    if value is None or isinstance(value, Tensor) or type(value) in (bool, int, float, str, bytes):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # not str(), for which an enum has another text
    items = items_of(value)
    if items is not None:
        kind = list if isinstance(value, list) else tuple
        return kind(map(as_saved, items))
    if is_flag(value):
        return bool(value)
    if isinstance(value, Integral):
        return int(value)
    number = _as_float(value)
    return value if number is None else float(number)


def read_step_tensor(step: Tensor) -> float:
    """Return the value of a 0-dim tensor."""
    if step.dim() != 0 or step.dtype not in _STEP_DTYPES:
        raise TypeError(
            f"step is a tensor of dtype {str(step.dtype).removeprefix('torch.')} with {step.dim()}"
            " dimensions; expected an int or a 0-dim tensor of dtype int64 or float32"
        )
    return step.item() if torch.compiler.is_compiling() or has_value(step) else 1


# ---- domains -------------------------------------------------------------------------------------


class _Domain(NamedTuple):
    contains: Callable[[float], bool]
    expected: str


_DOMAINS = {
    Beta: _Domain(lambda value: 0.0 <= value < 1.0, "0 <= {name} < 1"),
    NonNegative: _Domain(lambda value: value >= 0.0, "{name} >= 0"),
    WarmupSteps: _Domain(lambda value: value >= 0.0, "{name} >= 0"),
    LearningRate: _Domain(lambda value: value >= _LOWEST_RATE, "{name} >= 0"),
    float: _Domain(lambda value: not math.isnan(value), "a number"),
    int: _Domain(lambda value: float(value).is_integer(), "a whole number"),
}


def is_in_domain(value: float, domain: Any) -> bool:
    """Return whether a value is in a domain."""
    return _DOMAINS[domain].contains(value)


def check_domain(name: str, value: float, domain: Any) -> None:
    """Raise for an argument outside of its domain."""
    if not is_in_domain(value, domain):
        expected = _DOMAINS[domain].expected.format(name=name)
        raise ValueError(f"{name} is {_number_text(value)}; expected {expected}")


def check_step(step: int, correct_bias: bool, lowest: int = 0) -> None:
    """Raise for a number that no step has.

    Args:
        step: The number.
        correct_bias: Whether the rule divides by a bias correction, which is 0 at step 0.
        lowest: The lowest step without one.
    """
    if step >= 2**63:
        raise ValueError("step is beyond the range of int64")
    if correct_bias and step < 1:
        raise ValueError(
            f"step is {step}; expected step >= 1 (with bias correction, steps count from 1)"
        )
    if step < lowest:
        reason = " (steps count from 1)" if lowest == 1 else ""
        raise ValueError(f"step is {step}; expected step >= {lowest}{reason}")
