"""Compiles the CUDA kernels of a rule from its C++ text, or finds them in the cache.

NVRTC, or nvcc where that is missing, compiles one kernel in about a second, to the machine code of
one architecture: only the kernels that are launched are compiled. The text is that of the CPU's
library. engine/cuda/one_kernel takes the place of engine/rule_unit.h, and the stand-ins in
engine/cuda/nvrtc those of headers that NVRTC does not have.
"""

import hashlib
import itertools
import re
from pathlib import Path
from typing import NamedTuple

from .. import _build, _build_cache, _library
from .._build_cache import BuildError
from . import cuda_compiler
from .cuda_compiler import Compiler
from .library import RuleProduct

_THEN = "use the rule again"


class Kernel(NamedTuple):
    """One of a rule's kernels.

    Attributes:
        epilogue: What is done with updates: "StoreUpdate" or "ApplyUpdate". "Advance": the kernel
            advances scalar states instead.
        real: The arithmetic type: "float" or "double".
        is_large: Whether the arguments take more than 4096 bytes.
        needs_setup: Whether blocks compute the constants, from numbers on the device.
        has_codes: Whether states may be stored as 8-bit codes.
    """

    epilogue: str
    real: str
    is_large: bool
    needs_setup: bool
    has_codes: bool = False

    def symbol(self, rule: str) -> str:
        """Return the name of a rule's kernel in the machine code, which profilers show."""
        if self == ADVANCE:
            return f"emopt_{rule}_Advance"
        size = "large" if self.is_large else "small"
        setup = "_setup" if self.needs_setup else ""
        codes = "_codes" if self.has_codes else ""
        return f"emopt_{rule}_{self.epilogue}_{self.real}_{size}{setup}{codes}"


# Large launches are not compiled for float64 (engine/cuda/plan.h).
KERNELS = [
    Kernel(epilogue, real, is_large, needs_setup)
    for epilogue, (real, is_large), needs_setup in itertools.product(
        ("StoreUpdate", "ApplyUpdate"),
        (("float", False), ("float", True), ("double", False)),
        (False, True),
    )
]


# Only of rules whose states may be stored as codes.
WITH_CODES = [
    Kernel("ApplyUpdate", "float", is_large, needs_setup=True, has_codes=True)
    for is_large in (False, True)
]

# Only of rules with scalar states.
ADVANCE = Kernel("Advance", "float", is_large=False, needs_setup=False)


def kernels_of(*, has_codes: bool, has_scalars: bool) -> list[Kernel]:
    """Return the kernels of a rule.

    Args:
        has_codes: Whether any of its states may be stored as 8-bit codes.
        has_scalars: Whether it has scalar states.
    """
    return [*KERNELS, *(WITH_CODES if has_codes else []), *([ADVANCE] if has_scalars else [])]


def check_compiler() -> None:
    """Raise a BuildError if there is no compiler."""
    cuda_compiler.find()


def cubin_for(rule: str, source: str, kernel: Kernel, architecture: int) -> Path:
    """Return the file of a kernel, which is compiled now unless it is in the cache.

    Args:
        rule: The rule's name, an identifier.
        source: The rule's C++ text, which includes ``engine/rule_unit.h``.
        kernel: Which of its kernels.
        architecture: What to compile for: 90 for sm_90.

    Raises:
        BuildError: It cannot be compiled, or others can write to its place in the cache.
    """
    return _build_cache.load_once(_product(rule, source, kernel, architecture))


def find_cubin(rule: str, source: str, kernel: Kernel, architecture: int) -> Path | None:
    """Return the file of a kernel if it is in the cache; the arguments are those of `cubin_for`.

    Raises:
        BuildError: It cannot be compiled, or others can write to its place in the cache.
    """
    return _build_cache.find(_product(rule, source, kernel, architecture))


def _product(rule: str, source: str, kernel: Kernel, architecture: int) -> "_Cubin":
    compiler = cuda_compiler.find()
    if architecture not in compiler.architectures:
        raise BuildError(
            f"{compiler} does not compile for sm_{architecture}",
            "Install a torch for a CUDA version that supports this GPU",
        )
    csrc = _build_cache.csrc()
    options = kernel_options(rule, kernel, architecture)
    key = _key(source, options, csrc, compiler)
    folder = _build_cache.root(_THEN) / "rules" / f"{rule}-cuda-{key}"
    return _Cubin(folder, rule, source, kernel.symbol(rule), options, compiler)


class _Cubin(RuleProduct):
    """The machine code of one kernel."""

    then = retry = _THEN

    def __init__(
        self,
        folder: Path,
        rule: str,
        source: str,
        symbol: str,
        options: list[str],
        compiler: Compiler,
    ) -> None:
        super().__init__(folder, f"{symbol}.cubin")
        self.what = f"the kernel {symbol}"
        self.rule = rule
        self.source = source
        self.options = options
        self.compiler = compiler
        self.seconds = 0.0

    def missing_tool(self) -> tuple[str, str] | None:
        # NVRTC needs none; the folder's name has its version.
        return None if self.compiler.nvcc is None else _build_cache.missing_compiler(_THEN)

    def fault(self, library: Path) -> str:
        return _library.fault(library, is_for_host=False)

    def compile(self, folder: Path) -> Path:
        text = self.write_text(folder, self.rule, self.source)
        code, self.seconds = self.compiler.compile(text, self.options, _build_cache.csrc())
        cubin = folder / self.pattern
        cubin.touch(self.file_mode)
        cubin.write_bytes(code)
        return cubin

    def finish(self, library: Path) -> Path:
        _build_cache.say(f"compiled {self.what} in {self.seconds:.1f} s (cached in {self.folder})")
        return library


def kernel_options(rule: str, kernel: Kernel, architecture: int) -> list[str]:
    """Return the compiler's options, except for the headers' folders."""
    if kernel == ADVANCE:
        chosen = ["-DEMOPT_ADVANCE"]
    else:
        chosen = [
            f"-DEMOPT_EPILOGUE={kernel.epilogue}",
            f"-DEMOPT_REAL={kernel.real}",
            f"-DEMOPT_LAUNCH={'kLargeLaunch' if kernel.is_large else 'kSmallLaunch'}",
            f"-DEMOPT_NEEDS_SETUP={int(kernel.needs_setup)}",
            f"-DEMOPT_HAS_CODES={int(kernel.has_codes)}",
        ]
    return [
        f"--gpu-architecture=sm_{architecture}",
        "--std=c++17",
        # Those of the package's kernels that determine bits.
        *(flag for flag in _build.NVCC_ARGS if flag.startswith(("--fmad", "--ftz", "--prec"))),
        f"-DEMOPT_KERNEL={kernel.symbol(rule)}",
        *chosen,
    ]


def _key(source: str, options: list[str], csrc: Path, compiler: Compiler) -> str:
    """Return a hash of what a kernel depends on."""
    cuda = csrc / "engine" / "cuda"
    included = set(re.findall(r'^#include "([\w./]+)"', source, re.MULTILINE))
    first = [csrc / name for name in sorted(included - {"engine/rule_unit.h"})]
    headers = _build.hash_of_headers([cuda / "sweep_kernel.h", cuda / "padded_rule.h", *first])
    stand_ins = [
        path.read_text()
        for folder in ("nvrtc", "one_kernel")
        for path in sorted((cuda / folder).rglob("*"))
        if path.is_file()
    ]
    parts = (source, options, compiler.key, headers, stand_ins)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
