"""What a rule reads from outside: it may not change it, because native code would not."""

import argparse
import array
import io
import types
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from .graph import RuleError

# `tensor.data` modifies a tensor without a trace, so the values of small ones are compared.
_MOST_VALUES = 1024


class Outside:
    """Objects that a rule reads, and what they held before it ran."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, Any, Callable[[Any], Any]]] = {}

    def remember(self, value: Any) -> None:
        """Remember what a container, tensor, array, class or function holds.

        Raises:
            RuleError: It is an iterator, which changes when it is read.
        """
        if hasattr(type(value), "__next__") and not isinstance(value, io.IOBase):
            raise RuleError(
                f"the rule reads a {type(value).__name__} outside of it, which changes: use a"
                " tuple, or make it in the rule"
            )
        contents = _reader(value)
        if contents is not None and id(value) not in self._known:
            self._known[id(value)] = (value, contents(value), contents)

    def remember_attributes(self, value: Any, stored: dict[str, Any], slots: list[str]) -> None:
        """Remember the attributes that an object has.

        Args:
            value: The object.
            stored: Its attributes that are in its ``__dict__``.
            slots: The names of others.
        """
        names = list(stored)

        def contents(value: Any) -> list[Any]:
            others = [object.__getattribute__(value, name) for name in slots]
            return [*map(stored.get, names), *others]

        self._known[id(stored)] = (value, contents(value), contents)

    def check(self) -> None:
        """Raise if something has changed; restore lists, dicts and sets."""
        changed = [
            (value, before)
            for value, before, contents in self._known.values()
            if not _is_same(contents(value), before)
        ]
        for value, before in changed:
            if isinstance(value, list):
                value[:] = before
            elif isinstance(value, set):
                value.clear()
                value.update(before)
            elif isinstance(value, dict):
                value.clear()
                value.update(zip(before[::2], before[1::2], strict=True))
        if changed:
            raise RuleError(
                f"the rule modifies {_described(changed[0][0])} outside of it: a rule keeps nothing"
                " but its states"
            )


def _described(value: Any) -> str:
    return str(getattr(value, "__name__", f"a {type(value).__name__}"))


def _reader(value: Any) -> Callable[[Any], Any] | None:
    """Return what tells whether a value has changed; None for one that cannot."""
    if isinstance(value, torch.Tensor):
        return _version_and_values
    if isinstance(value, torch.Generator):
        return lambda generator: str(generator.get_state().tolist())
    if isinstance(value, (bytearray, array.array)):
        return bytes
    if type(value).__name__ == "ndarray":
        return lambda array: array.tobytes()
    if isinstance(value, dict):
        return lambda mapping: [each for pair in mapping.items() for each in pair]
    if isinstance(value, (list, set, deque)):
        return list
    is_namespace = isinstance(value, (types.SimpleNamespace, argparse.Namespace))
    if isinstance(value, type) or is_namespace or callable(value):
        return lambda owner: [each for pair in vars(owner).items() for each in pair]
    return None


def _version_and_values(tensor: torch.Tensor) -> tuple[int | None, str]:
    """Return how often a tensor was modified in place, if that is known, and what it holds."""
    is_small = tensor.layout == torch.strided and tensor.is_cpu and tensor.numel() <= _MOST_VALUES
    version = None if tensor.is_inference() else tensor._version
    return version, str(tensor.detach().tolist()) if is_small else ""


def _is_same(after: Any, before: Any) -> bool:
    if not isinstance(before, list):
        return bool(after == before)
    same = (one is other for one, other in zip(after, before, strict=False))
    return len(after) == len(before) and all(same)
