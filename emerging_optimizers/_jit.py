"""Builds the native kernels at the first import, where none are compiled that fit this torch.

What was built is kept in torch's folder of extensions (TORCH_EXTENSIONS_DIR), in a folder of its
own for all that it depends on, and loaded from there afterwards. EMERGING_OPTIMIZERS_JIT=0 switches
this off.
"""

import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

from . import _build
from ._config import __version__

_NAME = "emerging_optimizers_native"
_SUFFIX = ".pyd" if sys.platform == "win32" else ".so"
# Seconds that a process waits while others build; a build with CUDA takes minutes.
_LIMIT = 1800.0


class BuildError(Exception):
    """There are no native kernels: why, and what can be done about it."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason, remedy)
        self.reason = reason
        self.remedy = remedy


def load_module() -> ModuleType:
    """Return the module of native kernels, built now or at an earlier import.

    Raises:
        BuildError: It cannot be built.
    """
    if os.environ.get("EMERGING_OPTIMIZERS_JIT") == "0":
        raise BuildError(
            "EMERGING_OPTIMIZERS_JIT=0",
            "To have them, compile the package against this torch: `pip install"
            " --no-build-isolation .` in its source folder, and run from another one (or add"
            " `--editable`); or unset EMERGING_OPTIMIZERS_JIT",
        )
    # A library that was loaded and then refused has left its operators. A second registration of
    # the same ones would end the process.
    names = torch._C._dispatch_get_all_op_names()
    if any(name.startswith("emerging_optimizers::") for name in names):
        raise BuildError(
            "the operators of another build are loaded in this process", "Start a new process"
        )
    try:
        recipe = _build.recipe(_sources())
        return load_once(recipe, _folder(recipe))
    except BuildError:
        raise
    except Exception as error:  # whatever it is, the package works without
        raise BuildError(
            f"they could not be compiled ({type(error).__name__}: {error})",
            "Mend that, and they are compiled at the next import",
        ) from error


def load_once(recipe: _build.Recipe, folder: Path, limit: float = _LIMIT) -> ModuleType:
    """Return the module that a folder is for; the first of all processes builds it.

    Args:
        recipe: How to build it.
        folder: Where it is, or will be.
        limit: Seconds to wait for another process that builds it.

    Raises:
        BuildError: It cannot be built.
    """
    found = _library(folder)
    if found is not None:
        return _load(found)
    if not _build.has_compiler():
        raise BuildError(
            f"there is no C++ compiler ({_build.compiler()}) to build them with",
            "Install one, or name it in CXX, and they are compiled at the next import",
        )
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "error.txt"
    before = _time_of(log)
    with _locked(folder / "lock", limit) as has_waited:
        found = _library(folder)
        if found is not None:
            return _load(found)
        # Where many processes start at once, one failure is enough.
        if has_waited and _time_of(log) != before:
            raise _failure(log)
        return _compile(recipe, folder, log)


def _compile(recipe: _build.Recipe, folder: Path, log: Path) -> ModuleType:
    """Compile, while the folder is locked."""
    # A build that was killed leaves its folder, with torch's lock file, for which torch would wait
    # for ever; and its compilers, which may still be writing there. So each build has its own.
    for killed in folder.glob("build-*"):
        shutil.rmtree(killed, ignore_errors=True)
    build = Path(tempfile.mkdtemp(prefix="build-", dir=folder))
    # For a torch without CUDA nothing is missing.
    lack = torch.version.cuda and recipe.why_no_cuda
    duration = "several minutes" if recipe.architectures else "about a minute"
    _say(
        f"compiling the native kernels for torch {torch.__version__}, which takes {duration}, once"
        f" (into {folder}; EMERGING_OPTIMIZERS_JIT=0 does without)"
        + (f", without CUDA kernels: {lack}" if lack else "")
    )
    from torch.utils import cpp_extension  # takes a quarter of a second

    # The ninja of a virtual environment that is not activated.
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
    environment = {"PATH": path}
    if recipe.architectures:
        environment["TORCH_CUDA_ARCH_LIST"] = recipe.architectures
    try:
        with _environment(environment):
            module: ModuleType = cpp_extension.load(
                _NAME,
                [str(source) for source in recipe.sources],
                extra_cflags=recipe.cxx_args,
                extra_cuda_cflags=recipe.nvcc_args,
                extra_ldflags=recipe.link_args,
                build_directory=str(build),
            )
        # At once, and only now: what is there under this name is complete.
        library = Path(str(module.__file__))
        module.__file__ = str(library.replace(folder / library.name))
    except Exception as error:
        log.write_text(str(error))
        raise _failure(log) from error
    finally:
        shutil.rmtree(build, ignore_errors=True)
    log.unlink(missing_ok=True)
    return module


def _failure(log: Path) -> BuildError:
    """Return the error of a build, by what it wrote."""
    text = log.read_text()
    lines = re.findall(r"^.*\berror\b.*$", text, re.MULTILINE) or text.strip().splitlines()
    return BuildError(
        f"they could not be compiled: {lines[0].strip() if lines else 'no output'}",
        f"Mend what {log} says, and they are compiled at the next import; or set"
        " EMERGING_OPTIMIZERS_JIT=0",
    )


def _sources() -> Path:
    """Return the folder of the sources: in an installed package, or beside it in the repository."""
    package = Path(__file__).parent
    for folder in (package / "csrc", package.parent / "csrc"):
        if folder.is_dir():
            return folder
    raise BuildError("their sources are not there", "Install the package again")


def _folder(recipe: _build.Recipe) -> Path:
    """Return the folder for all that a build depends on."""
    key = hashlib.sha256()
    python = sysconfig.get_config_var("EXT_SUFFIX")  # its version and the processor's architecture
    options = (recipe.cxx_args, recipe.nvcc_args, recipe.link_args, recipe.architectures)
    key.update(repr((python, torch.version.cuda, options)).encode())
    for path in (*recipe.sources, *recipe.headers):
        key.update(path.read_bytes())
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if not root:
        from torch.utils import cpp_extension

        root = cpp_extension.get_default_build_root()
    version = __version__.partition("+")[0]  # without the torch that something was compiled for
    name = f"{version}-torch{torch.__version__}-{key.hexdigest()[:16]}"
    return Path(root) / "emerging_optimizers" / name


def _library(folder: Path) -> Path | None:
    return next(folder.glob(f"{_NAME}*{_SUFFIX}"), None)


def _load(library: Path) -> ModuleType:
    try:
        spec = importlib.util.spec_from_file_location(library.stem, library)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise BuildError(
            f"{library} does not load ({error})",
            "Remove that file, and they are compiled at the next import",
        ) from error
    return module


def _say(text: str) -> None:
    print(f"emerging_optimizers: {text}", file=sys.stderr, flush=True)


def _time_of(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables for a while."""
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
def _locked(path: Path, limit: float) -> Iterator[bool]:
    """Hold the operating system's lock on a file, which ends with the process that holds it.

    Yields:
        Whether another process held it at first.
    """
    with path.open("a") as file:
        deadline = time.monotonic() + limit
        has_waited = False
        while not _try_lock(file.fileno()):
            if not has_waited:
                _say(f"another process compiles the native kernels; waiting for it ({path})")
                has_waited = True
            if time.monotonic() > deadline:
                raise BuildError(
                    f"another process holds {path} for more than {limit:g} seconds",
                    "End that process, or wait for it, and import again",
                )
            time.sleep(0.1)
        yield has_waited


if sys.platform == "win32":
    import msvcrt

    def _try_lock(descriptor: int) -> bool:
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _try_lock(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
