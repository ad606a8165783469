"""The compiler of the CUDA kernels of rules: NVRTC, or nvcc where that is missing."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .._build_cache import BuildError
from . import nvcc, nvrtc

# What only NVRTC takes: functions that are constexpr run on the device; gnu::may_alias is unknown.
_NVRTC_OPTIONS = ("--device-as-default-execution-space", "--diag-suppress=1097")


class Compiler(NamedTuple):
    """A compiler of kernels.

    Attributes:
        name: "NVRTC" or "nvcc".
        version: Its version, that of CUDA.
        architectures: What it compiles for: 90 for sm_90.
        nvcc: The path of nvcc; None for NVRTC.
    """

    name: str
    version: tuple[int, int]
    architectures: list[int]
    nvcc: Path | None

    def __str__(self) -> str:
        major, minor = self.version
        return f"{self.name} {major}.{minor}"

    @property
    def key(self) -> tuple[Any, ...]:
        """What the machine code depends on."""
        return (self.name, self.version, () if self.nvcc is None else nvcc.flags())

    def compile(self, text: Path, options: Sequence[str], csrc: Path) -> tuple[bytes, float]:
        """Return a kernel's machine code, and the seconds that it took.

        Args:
            text: The file with the rule's C++ text.
            options: The compiler's options, without the headers' folders.
            csrc: The folder of the C++ sources.

        Raises:
            subprocess.CalledProcessError: The text cannot be compiled; has the compiler's output.
        """
        if self.nvcc is None:
            compiled = compile_by_nvrtc(text, options, csrc)
            return compiled.cubin, compiled.seconds
        start = time.perf_counter()
        cubin = nvcc.compile_file(self.nvcc, text, [*options, *_folders(csrc)])
        return cubin, time.perf_counter() - start


def compile_by_nvrtc(text: Path, options: Sequence[str], csrc: Path) -> nvrtc.Compiled:
    """Compile a kernel; the arguments are those of `Compiler.compile`."""
    stand_ins = f"-I{csrc / 'engine' / 'cuda' / 'nvrtc'}"
    words = [*_NVRTC_OPTIONS, *options, stand_ins, *_folders(csrc)]
    return nvrtc.compile_program(text.read_text("utf-8"), str(text), words)


def _folders(csrc: Path) -> list[str]:
    return [f"-I{csrc / 'engine' / 'cuda' / 'one_kernel'}", f"-I{csrc}"]


def find() -> Compiler:
    """Return the compiler.

    Raises:
        BuildError: There is none, or NVRTC cannot be loaded.
    """
    try:
        return Compiler("NVRTC", nvrtc.version(), nvrtc.architectures(), None)
    except BuildError:
        found = _find_nvcc()
        if found is None:
            raise
        return found


def _find_nvcc() -> Compiler | None:
    """Return nvcc, if it is of torch's CUDA version: the driver may not take another one's code."""
    wanted = None if torch.version.cuda is None else int(torch.version.cuda.split(".")[0])
    for path in nvcc.find():
        version = nvcc.version(path)
        if version is not None and wanted in (None, version[0]):
            return Compiler("nvcc", version, nvcc.architectures(path), path)
    return None
