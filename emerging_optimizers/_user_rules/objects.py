"""Objects of users' classes, whose functions take proxies: schedules, groups of constants.

A rule sees a copy of an object, of a class derived from its own. The original is not touched.
"""

import abc
import functools
import types
from collections.abc import Callable
from typing import Any, Protocol

import torch

from .graph import RuleError
from .origins import is_class_of_user
from .outside import Outside

# Special methods that do not belong to objects of a class, or that the copies have anew.
_EXCEPT = ("__new__", "__init_subclass__", "__class_getitem__", "__getattribute__", "__setattr__")
# Classes of classes, of which one can be made that is derived from the user's.
_METACLASSES = (type, abc.ABCMeta, type(Protocol))


class Objects:
    """Makes the copies for one rule.

    Args:
        lift: Returns a value as the rule sees it.
        copy: The same for a function of a class.
        outside: Where the classes are remembered.
    """

    def __init__(
        self, lift: Callable[[Any], Any], copy: Callable[[Any], Any], outside: Outside
    ) -> None:
        self._lift = lift
        self._copy = copy
        self._outside = outside
        self._classes: dict[type, type] = {}
        # The originals, too, which keeps their ids.
        self._copies: dict[int, tuple[Any, Any]] = {}

    def lift_class(self, kind: type) -> type:
        """Return a class whose functions take proxies, if it is one of the user's."""
        found = self._classes.get(kind, kind)
        if found is not kind or not _is_users(kind):
            return found
        # Behind the class, for super().
        bases = [base for base in map(self.lift_class, kind.__bases__) if base not in kind.__mro__]
        try:
            derived = type(kind)(kind.__name__, (kind, *bases), self._access(kind))
        except TypeError:  # their objects have different layouts
            return kind
        self._classes[kind] = derived  # before its members, which may be of the class
        for name, member in vars(kind).items():
            lifted = self._member(name, member)
            if lifted is not member and name not in _EXCEPT:
                setattr(derived, name, lifted)
                if isinstance(lifted, functools.cached_property):
                    lifted.__set_name__(derived, name)
        self._outside.remember(derived)
        return derived

    def lift(self, value: Any) -> Any:
        """Return an object whose functions take proxies, if it is of a class of the user's."""
        known = self._copies.get(id(value))
        if known is not None:
            return known[1]
        kind = self.lift_class(type(value))
        if kind is type(value):
            return value
        if isinstance(value, tuple):
            copied: Any = tuple.__new__(kind, map(self._lift, value))
        elif isinstance(value, (dict, list)):
            copied = (dict if isinstance(value, dict) else list).__new__(kind)
        else:
            try:
                copied = object.__new__(kind)
            except TypeError:  # of a class that derives from another one in C
                return value
        self._copies[id(value)] = (value, copied)
        if isinstance(value, dict):
            dict.update(copied, {key: self._lift(item) for key, item in value.items()})
            self._outside.remember(copied)
        elif isinstance(value, list):
            list.extend(copied, map(self._lift, value))
            self._outside.remember(copied)
        stored: dict[str, Any] = {}
        if hasattr(value, "__dict__"):
            stored = object.__getattribute__(copied, "__dict__")
            stored.update(vars(value))
            if isinstance(value, torch.nn.Module):
                parts = value._modules.items()
                stored["_modules"] = {name: self._lift(part) for name, part in parts}
                for tensor in (*value.parameters(), *value.buffers()):
                    self._outside.remember(tensor)
        slots = []
        for base in type(value).__mro__:
            for name, member in vars(base).items():
                if isinstance(member, types.MemberDescriptorType) and hasattr(value, name):
                    member.__set__(copied, self._lift(getattr(value, name)))
                    slots.append(name)
        self._outside.remember_attributes(copied, stored, slots)
        return copied

    def _access(self, kind: type) -> dict[str, Any]:
        """Return the special methods that read and modify objects of a derived class."""
        lift, copies = self._lift, self._copies
        base: Any = kind

        def is_outside(value: Any) -> bool:
            return any(copied is value for _, copied in copies.values())

        def get(self: Any, name: str) -> Any:
            value = base.__getattribute__(self, name)
            is_stored = name in base.__getattribute__(self, "__dict__")
            return lift(value) if is_stored and is_outside(self) else value

        def assign(self: Any, name: str, value: Any) -> None:
            if is_outside(self):
                raise RuleError(
                    f"the rule assigns {name} of an object outside of it: a rule keeps nothing but"
                    " its states"
                )
            base.__setattr__(self, name, value)

        return {
            "__getattribute__": get,
            "__setattr__": assign,
            "__module__": kind.__module__,
            "__qualname__": kind.__qualname__,
        }

    def _member(self, name: str, member: Any) -> Any:
        """Return a member of a class as the rule sees it."""
        if isinstance(member, types.FunctionType):
            return self._copy(member)
        if isinstance(member, (staticmethod, classmethod)):
            return type(member)(self._lift(member.__func__))
        if isinstance(member, functools.cached_property):
            return functools.cached_property(self._lift(member.func))
        if isinstance(member, property):
            return property(*(f and self._lift(f) for f in (member.fget, member.fset, member.fdel)))
        lifted = member if name.startswith("__") else self._lift(member)
        is_bound = lifted is member or hasattr(member, "__get__")
        return lifted if is_bound else _Constant(lifted)


class _Constant:
    """A member of a class that its objects do not bind, whatever stands for it."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __get__(self, instance: Any, owner: Any) -> Any:
        return self._value


def _is_users(kind: type) -> bool:
    """Return whether a class is the user's, and can have one that is derived from it."""
    bases = [base for base in kind.__mro__ if is_class_of_user(base)]
    return (
        bool(bases)
        and type(kind) in _METACLASSES
        and not issubclass(kind, (BaseException, torch.Tensor))
        and not any("__init_subclass__" in vars(base) for base in bases)
    )
