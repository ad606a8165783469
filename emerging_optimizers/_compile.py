"""Compiles and loads a module with torch's tools for C++ extensions, in this process."""

import contextlib
import os
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from . import _build, _build_cache

# What follows once an error is fixed.
THEN = "the next import compiles the kernels"


def missing_tool() -> tuple[str, str] | None:
    """Return which tool is missing and how to get it; None if all are installed."""
    missing = _build_cache.missing_compiler(THEN)
    if missing is None and shutil.which("ninja", path=_path()) is None:
        return "ninja was not found", f"Install it (`pip install ninja`), and {THEN}"
    return missing


def compile_module(name: str, recipe: _build.Recipe, folder: Path) -> ModuleType:
    """Compile, link and load a module.

    Args:
        name: The module's name.
        recipe: How to build it.
        folder: Where everything is written. No other process may use it.

    Raises:
        Exception: Whatever torch raises when the build or the import fails.
    """
    from torch.utils import cpp_extension  # takes a quarter of a second

    environment = {
        "PATH": _path(),
        "LC_ALL": "C",  # for messages in English
        "NINJA_STATUS": "[%f/%t] ",
        # torch warns of compilers whose names it does not know. The compiler itself reports what it
        # cannot compile.
        "TORCH_DONT_CHECK_COMPILER_ABI": "1",
    }
    if recipe.architectures:
        environment["TORCH_CUDA_ARCH_LIST"] = recipe.architectures
    with (
        _environment(environment),
        _environment(_build.compiler_variables(folder / "compilers")),
        _without_lock(cpp_extension),
    ):
        module: ModuleType = cpp_extension.load(
            name,
            [str(source) for source in recipe.sources],
            extra_cflags=recipe.cxx_args,
            extra_cuda_cflags=recipe.nvcc_args,
            extra_ldflags=recipe.link_args,
            build_directory=str(folder),
        )
    return module


def _path() -> str:
    """Return PATH and the folder of this Python's scripts, such as ninja.

    A virtual environment need not be activated.
    """
    return os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables temporarily."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _without_lock(cpp_extension: ModuleType) -> Iterator[None]:
    """Keep torch from locking the folder, which no other process uses.

    From 2.14 on, torch takes a lock that some file systems do not support.
    """
    lock = getattr(cpp_extension, "FileLock", None)
    if lock is None:
        yield
        return
    vars(cpp_extension)["FileLock"] = contextlib.nullcontext
    try:
        yield
    finally:
        vars(cpp_extension)["FileLock"] = lock
