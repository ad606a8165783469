"""CUDA kernels of users' rules for emulated devices: compiled for the host, instead of by NVRTC."""

import hashlib
import os
import subprocess
from pathlib import Path

from emulation import _ARGS, _ROOT

from emerging_optimizers import _build, _build_cache
from emerging_optimizers._build_cache import BuildError
from emerging_optimizers._user_rules.cuda_kernels import Kernel, kernel_options

_FOLDER = _ROOT / "build" / "emulation" / "kernels"


def check_compiler() -> None:
    """Raise a BuildError if there is no C++ compiler."""
    missing = _build_cache.missing_compiler("use the rule again")
    if missing is not None:
        raise BuildError(*missing)


def find_cubin(rule: str, source: str, kernel: Kernel, architecture: int) -> Path | None:
    """Return a file with the path of a kernel's library, if that has been built."""
    path = _path(rule, source, kernel, architecture)
    return path if path.exists() else None


def cubin_for(rule: str, source: str, kernel: Kernel, architecture: int) -> Path:
    """Return a file with the path of a kernel's library, which is built now if need be."""
    path = _path(rule, source, kernel, architecture)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        text, library = path.with_suffix(".cpp"), path.with_suffix(f".{os.getpid()}.so")
        text.write_text(source)
        command = [*_build.compiler_words(), *_options(rule, kernel, architecture), str(text)]
        subprocess.run([*command, "-o", str(library)], check=True)
        path.write_text(str(library))
    return path


def _options(rule: str, kernel: Kernel, architecture: int) -> list[str]:
    tests = _ROOT / "tests" / "cpp"
    defines = [o for o in kernel_options(rule, kernel, architecture) if o.startswith("-D")]
    folders = [f"-I{folder}" for folder in (tests / "host_kernel", _ROOT / "csrc", tests)]
    return ["-std=c++20", "-shared", "-fPIC", *_ARGS, *defines, *folders]


def _path(rule: str, source: str, kernel: Kernel, architecture: int) -> Path:
    folders = (_ROOT / "csrc" / "engine", _ROOT / "csrc" / "rules", _ROOT / "tests" / "cpp")
    headers = [path.read_text() for folder in folders for path in sorted(folder.rglob("*.h"))]
    parts = (source, headers, _options(rule, kernel, architecture))
    key = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    return _FOLDER / f"{kernel.symbol(rule)}-{key}.path"
