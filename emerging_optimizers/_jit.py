"""Builds the native kernels at the first import if no compiled module fits the installed torch.

The library is cached in torch's extensions folder (TORCH_EXTENSIONS_DIR), in a folder named by a
hash of everything that it depends on. Later imports load it from there. EMERGING_OPTIMIZERS_JIT=0
disables this (_native.py).
"""

import contextlib
import hashlib
import importlib.util
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
import time
import warnings
from pathlib import Path
from types import ModuleType
from typing import TextIO

import torch

from . import _build, _build_output, _compile, _file_lock, _library
from ._distribution import __version__

_NAME = "emerging_optimizers_native"
_SUFFIX = ".pyd" if sys.platform == "win32" else ".so"
# Seconds to wait for another process that builds. A build with CUDA takes minutes.
_LIMIT = 1800.0
# Seconds after which a build's folder is abandoned, whichever machine made it.
_DAY = 86400.0


class BuildError(Exception):
    """The native kernels cannot be built.

    Attributes:
        reason: Why, as a clause.
        remedy: What to do, as a sentence without its period.
    """

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason, remedy)
        self.reason = reason
        self.remedy = remedy


def load_module() -> ModuleType:
    """Return the module of native kernels, which was built by an earlier import or is built now.

    Raises:
        BuildError: It cannot be built.
    """
    # A library that failed to import may have registered its operators before. Registering them
    # again would abort the process.
    names = torch._C._dispatch_get_all_op_names()
    if any(name.startswith("emerging_optimizers::") for name in names):
        raise BuildError(
            "this process has already registered the operators of another build",
            "Start a new process",
        )
    try:
        # A warning from torch's tools must not stop the build if warnings are turned into errors.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            recipe = _build.recipe(_sources())
            return load_once(recipe, _folder(recipe))
    except BuildError:
        raise
    except Exception as error:  # the package works without native kernels
        raise BuildError(
            f"compilation failed ({type(error).__name__}: {error})",
            "Fix this, and the next import compiles the kernels",
        ) from error


def load_once(recipe: _build.Recipe, folder: Path, limit: float = _LIMIT) -> ModuleType:
    """Return the module cached in a folder; build it if there is none.

    If several processes call this at once, the first one builds the module for all.

    Args:
        recipe: How to build it.
        folder: The folder of this module in the cache.
        limit: Seconds to wait for another process that builds it.

    Raises:
        BuildError: It cannot be built.
    """
    folder = folder.absolute()
    library, fault = _cached(folder)
    if library is not None and not fault:
        return _load(library)
    missing = _compile.missing_tool()
    if missing is not None:
        reason, remedy = missing
        raise BuildError(f"{library} {fault}, and {reason}" if fault else reason, remedy)
    log = folder / "error.txt"
    before = _time_of(log)
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((folder / "lock").open("a"))
        except OSError as error:
            raise _not_writable(folder, error) from error
        lock = _acquire(file, limit)
        library, fault = _cached(folder)
        if library is not None and not fault:
            return _load(library)
        # If the process that built it failed, this one would fail, too.
        if lock.has_waited and _time_of(log) != before:
            raise _failure(log.read_text(errors="replace"), log)
        try:
            if library is not None:
                _say(f"{library} {fault}; recompiling")
                _remove(library)
            # A killed build leaves its folder behind, with torch's lock file, for which torch would
            # wait forever, and with compilers that may still be writing. So each build uses a new
            # folder.
            _remove_killed(folder, lock.error is None)
            build = Path(tempfile.mkdtemp(prefix=_prefix(), dir=folder))
        except OSError as error:
            raise _not_writable(folder, error) from error
        try:
            return _build_module(recipe, folder, build, log)
        finally:
            shutil.rmtree(build, ignore_errors=True)


def _acquire(file: TextIO, limit: float) -> _file_lock.Attempt:
    """Lock a file. If the file system has no locks, each process builds for itself."""
    try:
        attempt = _file_lock.acquire(
            file,
            limit,
            lambda: _say(
                f"waiting for another process to compile the native kernels ({file.name})"
            ),
        )
    except TimeoutError:
        raise BuildError(
            f"another process has held {file.name} for more than {limit:g} seconds",
            "Wait for that process or end it, then import again",
        ) from None
    if attempt.error is not None:
        _say(
            f"{file.name} cannot be locked ({attempt.error.strerror}); other processes may"
            " compile at the same time"
        )
    return attempt


def _build_module(recipe: _build.Recipe, folder: Path, build: Path, log: Path) -> ModuleType:
    """Compile in a folder of this process, then move the library into the cache.

    Args:
        recipe: How to build it.
        folder: The folder of this module in the cache.
        build: The folder of this process.
        log: The file for the compiler's output if it fails.
    """
    # A torch without CUDA needs no CUDA kernels.
    lack = torch.version.cuda and recipe.why_no_cuda
    duration = "several minutes" if recipe.architectures else "about a minute"
    _say(
        f"compiling the native kernels for torch {torch.__version__} into {folder}; this takes"
        f" {duration} and happens once (EMERGING_OPTIMIZERS_JIT=0 disables it)"
        + (f"; no CUDA kernels: {lack}" if lack else "")
    )
    try:
        module = _compile.compile_module(_NAME, recipe, build)
    except Exception as error:
        text = _build_output.output_of(error)
        # Without locks, another process may have built it meanwhile. It cannot be loaded if the
        # library that was linked here has been, since both register the same operators.
        library, fault = _cached(folder)
        if library is not None and not fault and not any(build.glob(f"{_NAME}*{_SUFFIX}")):
            return _load(library)
        with contextlib.suppress(OSError):  # the disk may be full
            log.write_text(text)
        raise _failure(text, log) from error
    try:
        # Moved atomically when it is complete, so that no process loads an incomplete one.
        library = Path(str(module.__file__))
        _library.seal(library)
        module.__file__ = str(library.replace(folder / library.name))
        log.unlink(missing_ok=True)
    except OSError as error:
        _say(f"the compiled library could not be saved in {folder} ({error})")
    return module


def _failure(text: str, log: Path) -> BuildError:
    """Return the error of a failed build, from its output."""
    what = f"Fix the errors in {log}" if log.exists() else "Fix this"
    if _build_output.was_killed(text):
        what += " (MAX_JOBS=1 needs the least memory)"
    return BuildError(
        f"compilation failed: {_build_output.first_error(text)}",
        f"{what}, and the next import compiles the kernels; or set EMERGING_OPTIMIZERS_JIT=0",
    )


def _not_writable(folder: Path, error: OSError) -> BuildError:
    return BuildError(
        f"{folder} cannot be written ({type(error).__name__}: {error})",
        "Set TORCH_EXTENSIONS_DIR to a writable folder, and the next import compiles the kernels",
    )


def _sources() -> Path:
    """Return the folder of the C++ sources: in the installed package, or beside a checkout's."""
    package = Path(__file__).parent
    for folder in (package / "csrc", package.parent / "csrc"):
        if folder.is_dir():
            return folder
    raise BuildError("the C++ sources are missing", "Reinstall the package")


def _folder(recipe: _build.Recipe) -> Path:
    """Return the module's folder in the cache, named by a hash of what the build depends on."""
    key = hashlib.sha256()
    python = sysconfig.get_config_var(
        "EXT_SUFFIX"
    )  # Python's version and the processor's architecture
    options = (recipe.cxx_args, recipe.nvcc_args, recipe.link_args, recipe.architectures)
    key.update(repr((python, torch.version.cuda, options)).encode())
    for path in (*recipe.sources, *recipe.headers):
        key.update(path.read_bytes())
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if not root:
        if not os.environ.get("XDG_CACHE_HOME") and os.path.expanduser("~") == "~":
            raise BuildError(
                "there is no home directory for the compiled library",
                "Set TORCH_EXTENSIONS_DIR to a writable folder, and the next import compiles the"
                " kernels",
            )
        from torch.utils import cpp_extension

        root = cpp_extension.get_default_build_root()
    version = __version__.partition("+")[0]  # without the local part, which names a torch
    name = f"{version}-torch{torch.__version__}-{key.hexdigest()[:16]}"
    return Path(root) / "emerging_optimizers" / name


def _cached(folder: Path) -> tuple[Path | None, str]:
    """Return the library cached in a folder, or None, and what is wrong with it."""
    library, fault = None, ""
    for library in folder.glob(f"{_NAME}*{_SUFFIX}"):
        fault = _library.fault(library)
        if not fault:
            break
    return library, fault


def _remove(library: Path) -> None:
    if library.is_dir():
        shutil.rmtree(library)
    else:
        library.unlink(missing_ok=True)


def _prefix() -> str:
    """Return the prefix of this machine's build folders. Locks may not work across machines."""
    return f"build-{platform.node()}-"


def _remove_killed(folder: Path, is_locked: bool) -> None:
    """Remove the folders that killed builds left behind."""
    for build in folder.glob("build-*"):
        with contextlib.suppress(FileNotFoundError):
            is_old = time.time() - build.stat().st_mtime > _DAY
            if is_old or (is_locked and build.name.startswith(_prefix())):
                shutil.rmtree(build, ignore_errors=True)


def _load(library: Path) -> ModuleType:
    try:
        spec = importlib.util.spec_from_file_location(library.stem, library)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise BuildError(
            f"{library} cannot be loaded ({error})",
            "Delete it, and the next import compiles the kernels",
        ) from error
    return module


def _say(text: str) -> None:
    print(f"emerging_optimizers: {text}", file=sys.stderr, flush=True)


def _time_of(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None
