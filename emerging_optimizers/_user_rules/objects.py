"""Objects of users' classes, whose functions take proxies: schedules, groups of constants.

A rule sees a copy of an object, of a class derived from its own. The original is not touched.
"""

import abc
import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

from .graph import RuleError
from .outside import Outside

# Special methods that do not belong to objects of a class, or that the copies have anew.
_EXCEPT = ("__new__", "__init_subclass__", "__class_getitem__", "__getattribute__", "__setattr__")
_LIBRARIES = ("builtins", "emerging_optimizers", "numpy", "torch")


def is_of_a_library(module: str) -> bool:
    """Return whether a module is Python's, or that of a library whose functions are known."""
    top = module.partition(".")[0]
    return top in _LIBRARIES or top in sys.stdlib_module_names


class Objects:
    """Makes the copies for one rule.

    Args:
        lift: Returns a value as the rule sees it.
        outside: Where the classes are remembered.
    """

    def __init__(self, lift: Callable[[Any], Any], outside: Outside) -> None:
        self._lift = lift
        self._outside = outside
        self._classes: dict[type, type] = {}
        # The originals, too, which keeps their ids.
        self._copies: dict[int, tuple[Any, Any]] = {}

    def lift_class(self, kind: type) -> type:
        """Return a class whose functions take proxies, if it is one of the user's."""
        if not _is_users(kind):
            return kind
        found = self._classes.get(kind)
        if found is None:
            found = self._classes[kind] = self._derive(kind)
        return found

    def lift(self, value: Any) -> Any:
        """Return an object whose functions take proxies, if it is of a class of the user's."""
        known = self._copies.get(id(value))
        if known is not None:
            return known[1]
        kind = self.lift_class(type(value))
        copied = value if kind is type(value) else self._copy(value, kind)
        self._copies[id(value)] = (value, copied)
        return copied

    def _copy(self, value: Any, kind: type) -> Any:
        if isinstance(value, tuple):
            return tuple.__new__(kind, map(self._lift, value))
        try:
            copied: Any = object.__new__(kind)
        except TypeError:  # of a class that derives from one in C
            return value
        vars(copied).update(getattr(value, "__dict__", {}))
        for base in type(value).__mro__:
            for name, member in vars(base).items():
                if isinstance(member, types.MemberDescriptorType) and hasattr(value, name):
                    member.__set__(copied, getattr(value, name))
        return copied

    def _derive(self, kind: type) -> type:
        own = {name: member for name, member in vars(kind).items() if name not in _EXCEPT}
        lifted = {name: self._member(name, member) for name, member in own.items()}
        # Behind the class, for super().
        bases = [base for base in map(self.lift_class, kind.__bases__) if base not in kind.__mro__]
        lift, copies = self._lift, self._copies
        base: Any = kind

        def is_outside(value: Any) -> bool:
            return any(copied is value for _, copied in copies.values())

        def get(self: Any, name: str) -> Any:
            value = base.__getattribute__(self, name)
            is_special = name.startswith("__") and name.endswith("__")
            if is_special or (
                not is_outside(self) and name in base.__getattribute__(self, "__dict__")
            ):
                return value
            return lift(value)

        def assign(self: Any, name: str, value: Any) -> None:
            if is_outside(self):
                raise RuleError(
                    f"the rule assigns {name} of an object outside of it: a rule keeps nothing but"
                    " its states"
                )
            base.__setattr__(self, name, value)

        namespace = {name: member for name, member in lifted.items() if member is not None}
        namespace |= {"__getattribute__": get, "__setattr__": assign}
        namespace |= {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
        derived = type(kind)(kind.__name__, (kind, *bases), namespace)
        self._outside.remember(derived)
        return derived

    def _member(self, name: str, member: Any) -> Any:
        """Return a member of a class as the rule sees it; None if that is the member itself."""
        if isinstance(member, types.FunctionType):
            return self._lift(member)
        if isinstance(member, (staticmethod, classmethod)):
            return type(member)(self._lift(member.__func__))
        if isinstance(member, functools.cached_property):
            return functools.cached_property(self._lift(member.func))
        if isinstance(member, property):
            return property(*(f and self._lift(f) for f in (member.fget, member.fset, member.fdel)))
        lifted = member if name.startswith("__") else self._lift(member)
        is_function = isinstance(lifted, types.FunctionType)
        return None if lifted is member else staticmethod(lifted) if is_function else lifted


def _is_users(kind: type) -> bool:
    """Return whether a class is the user's, and can have one that is derived from it."""
    bases = [base for base in kind.__mro__ if not is_of_a_library(base.__module__)]
    return (
        bool(bases)
        and type(kind) in (type, abc.ABCMeta)
        and not issubclass(kind, (BaseException, torch.Tensor))
        and not any("__init_subclass__" in vars(base) for base in bases)
    )
