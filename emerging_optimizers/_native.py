"""Loads the compiled module that fits the installed torch, or compiles one."""

import contextlib
import importlib
import mmap
import os
import sys
import warnings
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

import torch

from . import _library

_NAME = f"{__package__}._C"
# The text in the library before the version of its torch (bindings/module.cpp).
_BUILT_FOR = b"emerging_optimizers is built for torch "


class _BrokenLibraryError(ImportError):
    """The installed library is truncated or damaged."""


def _compiled() -> ModuleType:
    """Return the installed module.

    Raises:
        ImportError: None is installed, or it does not fit.
    """
    if _NAME not in sys.modules:
        # In this folder only: another copy of the package, installed as editable, offers its own.
        spec = PathFinder.find_spec(_NAME, [os.path.dirname(__file__)])
        if spec is None or spec.origin is None:
            raise ImportError("no compiled module is installed")
        fault = _library.fault(Path(spec.origin))
        if fault:
            raise _BrokenLibraryError(f"{spec.origin} {fault}; reinstall the package")
        version = _built_for(spec.origin)
        # Before loading: code for another torch may crash, and operators stay registered.
        if version.split(".")[:2] != torch.__version__.split(".")[:2]:
            raise ImportError(
                f"compiled for torch {version}, but this is torch {torch.__version__}"
            )
    return importlib.import_module(_NAME)


def _built_for(library: str) -> str:
    with (
        contextlib.suppress(ValueError),  # an empty file cannot be mapped
        open(library, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        start = data.find(_BUILT_FOR)
        if start >= 0:
            start += len(_BUILT_FOR)
            return data[start : data.find(b"\0", start)].decode()
    return "unknown"


def _find() -> tuple[ModuleType | None, str]:
    """Return the module and an empty string, or None and the reason."""
    try:
        return _compiled(), ""
    except ImportError as error:
        reason = str(error)
        is_broken = isinstance(error, _BrokenLibraryError)
    module = None
    if os.environ.get("EMERGING_OPTIMIZERS_JIT") == "0":
        reason += "; EMERGING_OPTIMIZERS_JIT=0"
    else:
        from . import _build_cache, _jit  # only imports without a compiled module need it

        try:
            module = _jit.load_module()
        except _build_cache.BuildError as error:
            warnings.warn(
                "emerging_optimizers runs without its native kernels and falls back to PyTorch"
                f" operations: {reason}; {error.reason}. {error.remedy}.",
                RuntimeWarning,
                stacklevel=3,
            )
            return None, f"{reason}; {error.reason}"
        sys.modules[_NAME] = module
    if is_broken:
        print(f"emerging_optimizers: {reason}", file=sys.stderr, flush=True)
    return module, reason if module is None else ""


native, reason = _find()
if native is not None:
    native.active_isa()  # raises for an invalid EMERGING_OPTIMIZERS_ISA now, not in the first step
