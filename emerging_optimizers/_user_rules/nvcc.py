"""Calls nvcc, which compiles the CUDA kernels of rules where NVRTC is missing.

It needs a C++ compiler, for its preprocessor.
"""

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

TOOLKIT = "/usr/local/cuda"
_SECONDS = 10  # for an answer


def find() -> list[Path]:
    """Return the paths of nvcc, from the toolkit and on the path of the system."""
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), TOOLKIT)
    folders = [str(Path(home, "bin")) for home in homes if home]
    folders += os.environ.get("PATH", "").split(os.pathsep)
    found = (shutil.which("nvcc", path=folder) for folder in dict.fromkeys(folders) if folder)
    return [Path(path) for path in found if path is not None]


@functools.cache
def version(nvcc: Path) -> tuple[int, int] | None:
    """Return its version, that of CUDA; None if it does not run."""
    found = re.search(r"release (\d+)\.(\d+)", _answer(nvcc, "--version"))
    return None if found is None else (int(found[1]), int(found[2]))


@functools.cache
def architectures(nvcc: Path) -> list[int]:
    """Return the architectures that it compiles for: 90 for sm_90."""
    return [int(number) for number in re.findall(r"sm_(\d+)\b", _answer(nvcc, "--list-gpu-code"))]


def _answer(nvcc: Path, option: str) -> str:
    try:
        done = subprocess.run(
            [nvcc, option], capture_output=True, text=True, check=False, timeout=_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def flags() -> tuple[str | None, str | None]:
    """Return the options that nvcc takes from the environment."""
    return os.environ.get("NVCC_PREPEND_FLAGS"), os.environ.get("NVCC_APPEND_FLAGS")


def compile_file(nvcc: Path, text: Path, options: Sequence[str]) -> bytes:
    """Return the machine code of a program.

    Raises:
        subprocess.CalledProcessError: It cannot be compiled; has the compiler's output.
    """
    cubin = text.with_suffix(".nvcc")
    # Its text has the suffix of C++.
    command = [str(nvcc), "--cubin", "-x", "cu", *options, str(text), "-o", str(cubin)]
    try:
        subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return cubin.read_bytes()
    finally:
        cubin.unlink(missing_ok=True)
