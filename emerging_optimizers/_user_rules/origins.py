"""Where code comes from: the user, whose functions rules run as copies, or a library."""

import contextlib
import functools
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .graph import RuleError
from .proxies import Proxy

_PACKAGE = f"{Path(__file__).parents[1]}{os.sep}"
_TORCH = f"{Path(torch.__file__).parent}{os.sep}"
_PYTHON = f"{Path(os.__file__).parent}{os.sep}"
_OTHERS = (_PACKAGE, _TORCH, "<frozen", "<rule ", "<class ")


@functools.lru_cache(maxsize=1024)
def is_users(code: types.CodeType) -> bool:
    """Return whether code is the user's, and not of a library or generated."""
    return _is_users(code.co_filename)


def _is_users(file: str) -> bool:
    is_python = file.startswith(_PYTHON) and "site-packages" not in file
    return not is_python and not file.startswith(_OTHERS)


def is_class_of_user(kind: type) -> bool:
    """Return whether a class is the user's, and not of a library whose functions are known."""
    name = kind.__module__
    top = name.partition(".")[0]
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None:  # of the interactive interpreter, or built into Python
        return top not in sys.stdlib_module_names or top == "__main__"
    return top != "numpy" and _is_users(file)


@contextlib.contextmanager
def only_copies(builtins: dict[str, Any]) -> Iterator[None]:
    """Refuse functions of the user that run with proxies and are not copies.

    Args:
        builtins: What copies see as Python's built-in functions.
    """
    before: Any = sys.getprofile()
    is_native = before is not None and not callable(before)  # that of cProfile

    def check(frame: types.FrameType, event: str, argument: object) -> None:
        known = frame.f_builtins
        # Generated constructors of named tuples have no built-in functions.
        if event != "call" or known is builtins or not known or not is_users(frame.f_code):
            return
        code = frame.f_code
        if any(map(_is_proxy, frame.f_locals.values())):
            name = getattr(code, "co_qualname", code.co_name)
            raise RuleError(
                f"{name} cannot be traced where it is: make it a function of the module, or a"
                " method of a plain class"
            )

    if is_native:
        before.disable()
    sys.setprofile(check)
    try:
        yield
    finally:
        sys.setprofile(None if is_native else before)
        if is_native:
            before.enable()


def _is_proxy(value: Any) -> bool:
    if type(value) in (tuple, list):
        return any(isinstance(item, Proxy) for item in value)
    if type(value) is dict:
        return any(isinstance(item, Proxy) for item in value.values())
    return isinstance(value, Proxy)
