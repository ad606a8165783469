"""Python functions, run with proxies in place of numbers and tensors.

A rule is called as a copy of its function that has other globals: there, the functions of ``math``
and ``torch`` take proxies, and so do those functions of the user that it calls. The original and
its module are not touched. The copy needs no source text.
"""

import builtins
import dis
import functools
import importlib
import os
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from .._rule import Rule
from .builtin_functions import BUILTINS, has_proxy
from .graph import RuleError
from .libraries import math_function, numpy_function, torch_function
from .nested_rule import NestedRule
from .objects import Objects, is_of_a_library
from .outside import Outside
from .refusals import refusal

_TORCH_MODULES = ("torch", "torch._C._VariableFunctions", "torch.nn.functional")
_PACKAGE = f"{Path(__file__).parents[1]}{os.sep}"
_RANDOM = ("random", "numpy.random", "secrets")
_GENERATORS = ("Random", "SystemRandom", "RandomState", "Generator")
# What a rule may catch although native code never raises it.
_ARITHMETIC = {"ArithmeticError", "FloatingPointError", "OverflowError", "ZeroDivisionError"}


class Lifting:
    """Makes the copies for one rule."""

    def __init__(self) -> None:
        self._copies: dict[int, Any] = {}
        # What was made here, by its id.
        self._made: dict[int, Any] = {}
        # Containers outside of the rule, by their ids, and what the rule sees of them.
        self._containers: dict[int, tuple[Any, Any]] = {}
        self._outside = Outside()
        self._objects = Objects(self.lift, self.copy, self._outside)
        # The code of the functions that were copied: where errors are located.
        self.codes: set[types.CodeType] = set()
        # What the copies see as Python's built-in functions.
        self.builtins = {**vars(builtins), **BUILTINS, "__import__": self._import}

    def lift(self, value: Any) -> Any:
        """Return a value as the rule sees it: functions take proxies, constants are unchanged."""
        if id(value) in self._made or value is None or isinstance(value, (bool, int, float, str)):
            return value
        lifted = self._lift(value)
        if lifted is not value:
            self._made[id(lifted)] = lifted
        return lifted

    def _lift(self, value: Any) -> Any:
        if isinstance(value, types.ModuleType):
            return _Module(self, value)
        if isinstance(value, Rule) and hasattr(value, "signature"):
            return NestedRule(value, self.lift(value.formula) if value.has_formula else None)
        if isinstance(value, functools.partial):
            keywords = {name: self.lift(each) for name, each in value.keywords.items()}
            return functools.partial(self.lift(value.func), *map(self.lift, value.args), **keywords)
        if type(value) in (tuple, list, dict, set):
            return self._lift_container(value)
        if isinstance(value, type):
            return self._objects.lift_class(value)
        is_method = isinstance(value, (types.BuiltinMethodType, types.MethodType))
        if _is_random(value.__self__ if is_method else value):
            return _Random(value)
        if isinstance(value, types.MethodType) and isinstance(value.__func__, types.FunctionType):
            return types.MethodType(self.lift(value.__func__), self.lift(value.__self__))
        if callable(value):
            return self._lift_function(value)
        self._outside.remember(value)
        return self._objects.lift(value)

    def _lift_function(self, value: Any) -> Any:
        name = getattr(value, "__name__", "")
        module = getattr(value, "__module__", None) or type(value).__module__
        if module == "math":
            return math_function(name, value)
        if getattr(torch, name, None) is value or module in _TORCH_MODULES:
            return torch_function(name, value)
        if module.partition(".")[0] == "numpy":
            return numpy_function(name, value)
        if isinstance(value, types.FunctionType):
            if value.__code__.co_filename.startswith(_PACKAGE):
                return _compiled(name, value)
            is_users = not is_of_a_library(module) or hasattr(value, "__wrapped__")
            return self.copy(value) if is_users else value
        if isinstance(value, torch.jit.ScriptFunction):
            return _compiled(name, value)
        wrapped = getattr(value, "__wrapped__", None)
        if isinstance(wrapped, types.FunctionType):
            return self.lift(wrapped)  # functools.cache
        return self._objects.lift(value)

    def _lift_container(self, value: Any) -> Any:
        """Return a container whose items take proxies."""
        known = self._containers.get(id(value))
        if known is not None:
            return known[1]
        if not isinstance(value, tuple):
            self._outside.remember(value)
        self._containers[id(value)] = (value, value)  # it may hold itself
        items = value.values() if isinstance(value, dict) else value
        lifted = [self.lift(item) for item in items]
        if any(new is not old for new, old in zip(lifted, items, strict=True)):
            by_key = isinstance(value, dict)
            new = dict(zip(value, lifted, strict=True)) if by_key else type(value)(lifted)
            self._containers[id(value)] = (value, new)
            if not isinstance(new, tuple):
                self._outside.remember(new)
        return self._containers[id(value)][1]

    def check_outside(self) -> None:
        """Raise if the rule modified a container or a tensor that is not its own."""
        self._outside.check()

    def copy(self, function: types.FunctionType) -> Callable[..., Any]:
        """Return a copy of a function, made at its first call."""
        found = self._copies.get(id(function))
        if found is None:
            found = self._copies[id(function)] = self._lazy_copy(function)
            self._made[id(found)] = found
            self._outside.remember(found)
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
        _check_code(function.__code__)
        names = _names_in(function.__code__)
        found = {name: function.__globals__[name] for name in names & set(function.__globals__)}
        own = {name: self.lift(value) for name, value in found.items()}
        own["__builtins__"] = self.builtins
        own["__name__"] = function.__globals__.get("__name__", "")
        copied = types.FunctionType(
            function.__code__,
            own,
            function.__name__,
            self.lift(function.__defaults__),
            tuple(map(self._lift_cell, function.__code__.co_freevars, function.__closure__ or ())),
        )
        copied.__kwdefaults__ = self.lift(function.__kwdefaults__)
        return copied

    def _lift_cell(self, name: str, cell: types.CellType) -> types.CellType:
        if name == "__class__":  # of super()
            return cell
        try:
            return types.CellType(self.lift(cell.cell_contents))
        except ValueError:  # not assigned yet
            return cell

    def _import(self, *arguments: Any, **options: Any) -> Any:
        return self.lift(importlib.__import__(*arguments, **options))


def _check_code(code: types.CodeType) -> None:
    """Raise for what the copy of a function would do differently, without an error."""
    before = ""
    for step in _instructions(code):
        is_outer = step.opname == "STORE_DEREF" and step.argval in code.co_freevars
        if step.opname == "STORE_GLOBAL" or is_outer:
            raise RuleError(
                f"{code.co_name} assigns {step.argval}, a variable outside of it: a rule keeps"
                " nothing but its states"
            )
        is_caught = step.opname.endswith("EXC_MATCH") and before == "ValueError"
        if is_caught or (step.opname.startswith("LOAD") and step.argval in _ARITHMETIC):
            raise RuleError(
                f"{code.co_name} handles {before if is_caught else step.argval}, which native code"
                " never raises: test the operand first, with `if`"
            )
        before = step.argval


def _instructions(code: types.CodeType) -> Iterator[dis.Instruction]:
    """Yield the instructions of a function, and of functions in it."""
    yield from dis.get_instructions(code)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _instructions(constant)


def _names_in(code: types.CodeType) -> set[str]:
    """Return the names that a function's code, and that of functions in it, may look up."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names_in(constant)
    return names


class _Module:
    """A module, whose functions take proxies."""

    _lifting: Lifting
    _module: types.ModuleType

    def __init__(self, lifting: Lifting, module: types.ModuleType) -> None:
        vars(self).update(_lifting=lifting, _module=module)

    def __setattr__(self, name: str, value: Any) -> None:
        raise RuleError(
            f"the rule assigns {self._module.__name__}.{name}: a rule keeps nothing but its states"
        )

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


def _compiled(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of compiled code that refuses proxies."""

    def function(*arguments: Any, **options: Any) -> Any:
        if has_proxy(*arguments, **options):
            raise RuleError(
                f"{name} is compiled: write its formula in the rule, or call another rule"
            )
        return plain(*arguments, **options)

    return function
