"""Calls NVRTC, the library that compiles CUDA C++ at run time. It needs no compiler of the host.

CUDA builds of torch bring it; otherwise it is in the toolkit, or in the package nvidia-cuda-nvrtc.
"""

import atexit
import ctypes
import ctypes.util
import functools
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .._build_cache import BuildError

_NAME = re.compile(r"libnvrtc(?:-[0-9a-f]+)?\.so(?:\.\d+)*")
_BUILTINS = re.compile(r"libnvrtc-builtins(?:-[0-9a-f]+)?\.so(?:\.\d+)*")
_TOOLKIT = "/usr/local/cuda"
_REMEDY = "Install the package nvidia-cuda-nvrtc of torch's CUDA version, or set CUDA_HOME"

# Held while a program is compiled, or its code is loaded: a process must not fork or end meanwhile.
# At its end, NVRTC and the driver are torn down, which can crash the thread that is using them.
LOCK = threading.RLock()
atexit.register(LOCK.acquire)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=LOCK.acquire, after_in_parent=LOCK.release, after_in_child=LOCK.release
    )


class Compiled(NamedTuple):
    """A compiled program.

    Attributes:
        cubin: The machine code.
        ptx: The code that it was assembled from.
        log: The compiler's output.
        seconds: The time that it took.
    """

    cubin: bytes
    ptx: str
    log: str
    seconds: float


@functools.cache
def find() -> Path | None:
    """Return the library's path, or None; the one of torch's CUDA version is preferred.

    On the system's path, it is found by its name alone.
    """
    found = [path for folder in _folders() for path in _libraries_in(folder)]
    if torch.version.cuda is not None:
        major = torch.version.cuda.partition(".")[0]
        found.sort(key=lambda path: f".so.{major}" not in path.name)
    if not found:
        name = ctypes.util.find_library("nvrtc")
        return None if name is None else Path(name)
    return found[0]


def _folders() -> Iterator[Path]:
    """Yield the folders that may have the library."""
    for entry in sys.path:
        if entry:
            yield from sorted(Path(entry, "nvidia").glob("*/lib"))
    yield Path(torch.__file__).parent / "lib"
    yield Path(sys.prefix, "lib")
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), _TOOLKIT):
        if home:
            yield from (Path(home, "lib64"), Path(home, "lib"))


def _libraries_in(folder: Path) -> list[Path]:
    """Return the libraries in a folder, the latest version first."""
    try:
        names = sorted(os.listdir(folder), reverse=True)
    except OSError:
        return []
    return [folder / name for name in names if _NAME.fullmatch(name)]


@functools.cache
def _load() -> ctypes.CDLL:
    """Load the library.

    Raises:
        BuildError: There is none, or it cannot be loaded.
    """
    path = find()
    if path is None:
        raise BuildError("NVRTC (libnvrtc.so) was not found", _REMEDY)
    try:
        # It would search for this one on the system's path only.
        for name in sorted(os.listdir(path.parent)) if path.is_absolute() else ():
            if _BUILTINS.fullmatch(name):
                ctypes.CDLL(str(path.parent / name))
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"NVRTC cannot be loaded ({error})", _REMEDY) from error
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library


def version() -> tuple[int, int]:
    """Return the library's version, that of CUDA.

    Raises:
        BuildError: There is none, or it cannot be loaded.
    """
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(_load().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


def architectures() -> list[int]:
    """Return the architectures that it compiles for: 90 for sm_90.

    Raises:
        BuildError: There is no library, or it cannot be loaded.
    """
    library = _load()
    count = ctypes.c_int()
    _check(library.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    values = (ctypes.c_int * count.value)()
    _check(library.nvrtcGetSupportedArchs(values))
    return list(values)


def compile_program(source: str, name: str, options: Sequence[str]) -> Compiled:
    """Compile a program. Other Python threads run meanwhile.

    Args:
        source: Its text.
        name: Its file's name in messages.
        options: The compiler's options.

    Raises:
        BuildError: There is no library, or it cannot be loaded.
        subprocess.CalledProcessError: The program cannot be compiled; has the compiler's output.
    """
    with LOCK:
        return _compile(source, name, options)


def _compile(source: str, name: str, options: Sequence[str]) -> Compiled:
    library = _load()
    program = ctypes.c_void_p()
    _check(
        library.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), name.encode(), 0, None, None
        )
    )
    try:
        words = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        start = time.perf_counter()
        status = library.nvrtcCompileProgram(program, len(options), words)
        seconds = time.perf_counter() - start
        log = _result(library, program, "ProgramLog")
        if status != 0:
            output = log.strip() or library.nvrtcGetErrorString(status)
            raise subprocess.CalledProcessError(status, ["nvrtc", *options, name], output)
        return Compiled(
            cubin=_result(library, program, "CUBIN"),
            ptx=_result(library, program, "PTX").rstrip(b"\0").decode(),
            log=log.rstrip(b"\0").decode(errors="replace"),
            seconds=seconds,
        )
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _result(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer: Any = ctypes.create_string_buffer(size.value)
    _check(getattr(library, f"nvrtcGet{what}")(program, buffer))
    return bytes(buffer.raw)


def _check(status: int) -> None:
    if status != 0:
        raise RuntimeError(f"NVRTC failed: {_load().nvrtcGetErrorString(status).decode()}")
