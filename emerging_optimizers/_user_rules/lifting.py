"""Python functions, run with proxies in place of numbers and tensors.

A rule is called as a copy of its function that has other globals: there, the functions of ``math``
and ``torch`` take proxies, and so do those functions of the user that it calls. The original and
its module are not touched. The copy needs no source text.
"""

import builtins
import dis
import functools
import importlib
import math
import re
import types
from collections.abc import Callable
from typing import Any

import torch

from .calls import OPERATIONS, call
from .graph import RuleError
from .proxies import Element, Number, Proxy, apply, as_number
from .refusals import refusal

# The functions of math that take per-step numbers.
_MATH = frozenset(
    re.findall(
        r"\w+",
        """
        acos acosh asin asinh atan atan2 atanh cbrt ceil copysign cos cosh erf erfc exp exp2 expm1
        fabs floor fmod hypot log log10 log1p log2 pow sin sinh sqrt tan tanh trunc
        """,
    )
)
_TORCH_MODULES = ("torch", "torch._C._VariableFunctions", "torch.nn.functional")
# Functions that make a tensor of a number.
_CONSTANTS = ("tensor", "as_tensor", "scalar_tensor")
_RANDOM = ("random", "numpy.random", "secrets")
_GENERATORS = ("Random", "SystemRandom", "RandomState", "Generator")


def _has_proxy(*arguments: Any, **options: Any) -> bool:
    return any(isinstance(value, Proxy) for value in (*arguments, *options.values()))


class _Float(type):
    """``float`` of a per-step number is that number."""

    def __call__(cls, value: Any = 0.0) -> Any:
        if not isinstance(value, Number):
            return float(value)
        return Number(value.trace, as_number(value.trace, value.node))

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, (float, Number))


class _LiftedFloat(metaclass=_Float):
    pass


def _type(value: Any, *rest: Any) -> Any:
    if isinstance(value, Proxy):
        raise RuleError(f"type() of {value!r}: use isinstance, or a hyperparameter")
    return type(value, *rest)


def _isinstance(value: Any, classes: Any) -> bool:
    """Return whether what a proxy stands for is of a class."""
    flat = classes if isinstance(classes, tuple) else (classes,)
    plain: dict[Any, Any] = {_LiftedFloat: float, _type: type}
    known: tuple[Any, ...] = tuple(plain.get(c, c) for c in flat)
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
        if len(values) == 1 and isinstance(values[0], (tuple, list)) and values[0]:
            values = tuple(values[0])
            options.pop("default", None)
        if options or not _has_proxy(*values):
            return plain(*values, **options)
        if any(isinstance(value, Proxy) and not isinstance(value, Number) for value in values):
            raise RuleError(
                f"{name}() of tensors: use torch.{name}imum(a, b), or clamp({other}=...) with a"
                " number"
            )
        return functools.reduce(lambda a, b: apply(name, a, b), values)

    return extreme


class Lifting:
    """Makes the copies for one rule."""

    def __init__(self) -> None:
        self._copies: dict[int, Any] = {}
        # The code of the functions that were copied: where errors are located.
        self.codes: set[types.CodeType] = set()
        self._builtins = {
            **vars(builtins),
            "__import__": self._import,
            "float": _LiftedFloat,
            "isinstance": _isinstance,
            "type": _type,
            "min": _extreme("min"),
            "max": _extreme("max"),
        }

    def lift(self, value: Any) -> Any:
        """Return a value as the rule sees it: functions take proxies, constants are unchanged."""
        if isinstance(value, types.ModuleType):
            return _Module(self, value)
        if isinstance(value, functools.partial):
            return functools.partial(self.lift(value.func), *value.args, **value.keywords)
        if isinstance(value, type):
            return value
        if _is_random(value) or _is_random(getattr(value, "__self__", None)):
            return _Random(value)
        if isinstance(value, types.MethodType) and isinstance(value.__func__, types.FunctionType):
            return types.MethodType(self.lift(value.__func__), value.__self__)
        if not callable(value):
            return value
        name = getattr(value, "__name__", "")
        module = getattr(value, "__module__", None) or ""
        if module == "math":
            return _math_function(name, value)
        if getattr(torch, name, None) is value or module in _TORCH_MODULES:
            return _torch_function(name, value)
        wrapped = getattr(value, "__wrapped__", None)
        if isinstance(wrapped, types.FunctionType) and not isinstance(value, types.FunctionType):
            return self.lift(wrapped)  # functools.cache
        is_users = isinstance(value, types.FunctionType) and not module.startswith("torch.")
        return self.copy(value) if is_users else value

    def copy(self, function: types.FunctionType) -> Callable[..., Any]:
        """Return a copy of a function, made at its first call."""
        found = self._copies.get(id(function))
        if found is None:
            found = self._copies[id(function)] = self._lazy_copy(function)
        return found

    def _lazy_copy(self, function: types.FunctionType) -> Callable[..., Any]:
        copied: Callable[..., Any] | None = None

        @functools.wraps(function)
        def call_copy(*arguments: Any, **options: Any) -> Any:
            nonlocal copied
            if copied is None:
                copied = self._make_copy(function)
            return copied(*arguments, **options)

        return call_copy

    def _make_copy(self, function: types.FunctionType) -> Callable[..., Any]:
        self.codes.add(function.__code__)
        _refuse_global(function.__code__)
        names = _names_in(function.__code__)
        found = {name: function.__globals__[name] for name in names & set(function.__globals__)}
        own = {name: self.lift(value) for name, value in found.items()}
        own["__builtins__"] = self._builtins
        own["__name__"] = function.__globals__.get("__name__", "")
        copied = types.FunctionType(
            function.__code__,
            own,
            function.__name__,
            function.__defaults__,
            tuple(map(self._lift_cell, function.__closure__ or ())),
        )
        copied.__kwdefaults__ = function.__kwdefaults__
        return copied

    def _lift_cell(self, cell: types.CellType) -> types.CellType:
        try:
            return types.CellType(self.lift(cell.cell_contents))
        except ValueError:  # not assigned yet
            return cell

    def _import(self, *arguments: Any, **options: Any) -> Any:
        return self.lift(importlib.__import__(*arguments, **options))


def _refuse_global(code: types.CodeType) -> None:
    """Raise for `global` and `nonlocal`: the copy of a function has variables of its own."""
    for step in dis.get_instructions(code):
        is_outer = step.opname == "STORE_DEREF" and step.argval in code.co_freevars
        if step.opname == "STORE_GLOBAL" or is_outer:
            raise RuleError(
                f"{code.co_name} assigns {step.argval}, a variable outside of it: a rule keeps"
                " nothing but its states"
            )


def _names_in(code: types.CodeType) -> set[str]:
    """Return the names that a function's code, and that of functions in it, may look up."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names_in(constant)
    return names


class _Module:
    """A module, whose functions take proxies."""

    def __init__(self, lifting: Lifting, module: types.ModuleType) -> None:
        self._lifting = lifting
        self._module = module

    def __getattr__(self, name: str) -> Any:
        if self._module.__name__ in _RANDOM:
            raise refusal(f"{self._module.__name__}.{name}", "random")
        return self._lifting.lift(getattr(self._module, name))


def _is_random(value: Any) -> bool:
    """Return whether a value is a generator of random numbers, of Python or numpy."""
    kind = type(value)
    return kind.__name__ in _GENERATORS and kind.__module__.partition(".")[0] in ("random", "numpy")


class _Random:
    """A generator of random numbers, or a method of one."""

    def __init__(self, value: Any) -> None:
        self._name = getattr(value, "__qualname__", type(value).__name__)

    def __getattr__(self, name: str) -> Any:
        raise refusal(f"{self._name}.{name}", "random")

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        raise refusal(self._name, "random")


def _math_function(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    def function(*values: Any) -> Any:
        if not _has_proxy(*values):
            return plain(*values)
        if any(isinstance(value, Proxy) and not isinstance(value, Number) for value in values):
            if name not in OPERATIONS:
                raise refusal(f"math.{name} of a tensor", name)
            raise RuleError(f"math.{name} of a tensor: use torch.{name} or the tensor's method")
        if name == "log" and len(values) == 2:
            top, bottom = (apply("log", v) if _has_proxy(v) else math.log(v) for v in values)
            return apply("/", top, bottom)
        if name in ("isnan", "isinf", "isfinite"):
            return OPERATIONS[name](*values)
        if name not in _MATH:
            raise RuleError(
                f"math.{name} is not available in rules: compute it outside, and pass the result as"
                " a hyperparameter"
            )
        return apply({"fabs": "abs"}.get(name, name), *values)

    return function


def _torch_function(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    def function(*arguments: Any, **options: Any) -> Any:
        operation = OPERATIONS.get(name.rstrip("_"))
        if name in _CONSTANTS and len(arguments) >= 1 and isinstance(arguments[0], Number):
            return arguments[0]
        if _has_proxy(*arguments, **options):
            if operation is None:
                raise refusal(f"torch.{name}", name)
            if not _has_element(*arguments, **options):
                raise RuleError(
                    f"torch.{name} of numbers: use operators, min(), max() or functions of math"
                )
            return call(operation, f"torch.{name}", plain, *arguments, **options)
        if refusal_of_random(name):
            raise refusal(f"torch.{name}", name)
        return plain(*arguments, **options)

    return function


def _has_element(*arguments: Any, **options: Any) -> bool:
    values = (*arguments, *options.values())
    return any(isinstance(value, Proxy) and not isinstance(value, Number) for value in values)


def refusal_of_random(name: str) -> bool:
    """Return whether a function of torch draws random numbers."""
    return name.startswith("rand") or name in ("bernoulli", "normal", "poisson", "manual_seed")
