"""Calls nvcc, which compiles the CUDA kernels of rules where NVRTC is missing.

It needs a C++ compiler, for its preprocessor.
"""

import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

TOOLKIT = "/usr/local/cuda"


@functools.cache
def find() -> Path | None:
    """Return nvcc's path, or None."""
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), TOOLKIT)
    folders = [str(Path(home, "bin")) for home in homes if home]
    path = os.pathsep.join([*folders, os.environ.get("PATH", "")])
    found = shutil.which("nvcc", path=path)
    return None if found is None else Path(found)


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
        return subprocess.run([nvcc, option], capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""


def compile_file(nvcc: Path, text: Path, options: Sequence[str]) -> bytes:
    """Return the machine code of a program.

    Raises:
        subprocess.CalledProcessError: It cannot be compiled; has the compiler's output.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        # Its text has the suffix of C++.
        command = [str(nvcc), "--cubin", "-x", "cu", *options, str(text), "-o", str(cubin)]
        subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return cubin.read_bytes()
