"""Builds the native kernels at the first import where no installed ones fit this torch.

What was built is kept in torch's folder of extensions (TORCH_EXTENSIONS_DIR), in a folder of its
own for all that it depends on, and loaded from there afterwards. EMERGING_OPTIMIZERS_JIT=0 switches
this off (_native.py).
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
# Seconds to wait while another process builds; a build with CUDA takes minutes.
_LIMIT = 1800.0
# Seconds after which a build folder is removed, even one of another machine.
_DAY = 86400.0


class BuildError(Exception):
    """The native kernels could not be built; carries the reason and the remedy."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason, remedy)
        self.reason = reason
        self.remedy = remedy


def load_module() -> ModuleType:
    """Return the module of native kernels, built now or at an earlier import.

    Raises:
        BuildError: It cannot be built.
    """
    # A library that was loaded and then rejected leaves its operators registered. Registering
    # them again would end the process.
    names = torch._C._dispatch_get_all_op_names()
    if any(name.startswith("emerging_optimizers::") for name in names):
        raise BuildError(
            "the operators of another build are loaded in this process", "Start a new process"
        )
    try:
        # A warning from torch's tools must not fail the build where warnings are errors.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            recipe = _build.recipe(_sources())
            return load_once(recipe, _folder(recipe))
    except BuildError:
        raise
    except Exception as error:  # the package works without native kernels
        raise BuildError(
            f"they could not be compiled ({type(error).__name__}: {error})",
            "Fix that, and they are compiled at the next import",
        ) from error


def load_once(recipe: _build.Recipe, folder: Path, limit: float = _LIMIT) -> ModuleType:
    """Return the module kept in a folder; the first process builds it.

    Args:
        recipe: How to build it.
        folder: Where the module is kept.
        limit: Seconds to wait while another process builds it.

    Raises:
        BuildError: It cannot be built.
    """
    folder = folder.absolute()
    library, fault = _kept(folder)
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
            raise _no_room(folder, error) from error
        lock = _acquire(file, limit)
        library, fault = _kept(folder)
        if library is not None and not fault:
            return _load(library)
        # Processes that waited report the builder's failure instead of repeating it.
        if lock.has_waited and _time_of(log) != before:
            raise _failure(log.read_text(errors="replace"), log)
        try:
            if library is not None:
                _say(f"{library} {fault}; it is compiled again")
                _remove(library)
            # Every build gets a new folder: a killed build leaves torch's lock file, on which torch
            # would wait forever, and possibly compilers that are still writing.
            _remove_killed(folder, lock.error is None)
            build = Path(tempfile.mkdtemp(prefix=_prefix(), dir=folder))
        except OSError as error:
            raise _no_room(folder, error) from error
        try:
            return _build_module(recipe, folder, build, log)
        finally:
            shutil.rmtree(build, ignore_errors=True)


def _acquire(file: TextIO, limit: float) -> _file_lock.Attempt:
    """Lock a file; where the file system has no locks, each process builds separately."""
    try:
        attempt = _file_lock.acquire(
            file,
            limit,
            lambda: _say(
                f"another process compiles the native kernels; waiting for it ({file.name})"
            ),
        )
    except TimeoutError:
        raise BuildError(
            f"another process holds {file.name} for more than {limit:g} seconds",
            "End that process, or wait for it, and import again",
        ) from None
    if attempt.error is not None:
        _say(
            f"{file.name} cannot be locked ({attempt.error.strerror}); other processes may"
            " compile, too"
        )
    return attempt


def _build_module(recipe: _build.Recipe, folder: Path, build: Path, log: Path) -> ModuleType:
    """Compile in the folder `build`, then move the library to `folder`, where it is kept."""
    # A torch without CUDA lacks nothing.
    lack = torch.version.cuda and recipe.why_no_cuda
    duration = "several minutes" if recipe.architectures else "about a minute"
    _say(
        f"compiling the native kernels for torch {torch.__version__}, which takes {duration}, once"
        f" (into {folder}; EMERGING_OPTIMIZERS_JIT=0 does without)"
        + (f", without CUDA kernels: {lack}" if lack else "")
    )
    try:
        module = _compile.compile_module(_NAME, recipe, build)
    except Exception as error:
        text = _build_output.output_of(error)
        # Without locks, another process may have finished the build. A library that was linked here
        # has been loaded already.
        library, fault = _kept(folder)
        if library is not None and not fault and not any(build.glob(f"{_NAME}*{_SUFFIX}")):
            return _load(library)
        with contextlib.suppress(OSError):  # a full disk
            log.write_text(text)
        raise _failure(text, log) from error
    try:
        # Renamed only when complete, so that no process finds a partial library under this name.
        library = Path(str(module.__file__))
        _library.seal(library)
        module.__file__ = str(library.replace(folder / library.name))
        log.unlink(missing_ok=True)
    except OSError as error:
        _say(f"what was compiled could not be kept in {folder} ({error})")
    return module


def _failure(text: str, log: Path) -> BuildError:
    """Return the error for a build that failed with this output."""
    what = f"Fix what {log} says" if log.exists() else "Fix that"
    if _build_output.was_killed(text):
        what += " (MAX_JOBS=1 takes the least memory)"
    return BuildError(
        f"they could not be compiled: {_build_output.first_error(text)}",
        f"{what}, and they are compiled at the next import; or set EMERGING_OPTIMIZERS_JIT=0",
    )


def _no_room(folder: Path, error: OSError) -> BuildError:
    return BuildError(
        f"they cannot be kept in {folder} ({type(error).__name__}: {error})",
        "Name a folder that can be written in TORCH_EXTENSIONS_DIR, and they are compiled at the"
        " next import",
    )


def _sources() -> Path:
    """Return the source folder: in an installed package, or beside it in the repository."""
    package = Path(__file__).parent
    for folder in (package / "csrc", package.parent / "csrc"):
        if folder.is_dir():
            return folder
    raise BuildError("their sources are not there", "Install the package again")


def _folder(recipe: _build.Recipe) -> Path:
    """Return the folder of a build, named by a hash of everything that it depends on."""
    key = hashlib.sha256()
    python = sysconfig.get_config_var("EXT_SUFFIX")  # its version and the processor's architecture
    options = (recipe.cxx_args, recipe.nvcc_args, recipe.link_args, recipe.architectures)
    key.update(repr((python, torch.version.cuda, options)).encode())
    for path in (*recipe.sources, *recipe.headers):
        key.update(path.read_bytes())
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if not root:
        if not os.environ.get("XDG_CACHE_HOME") and os.path.expanduser("~") == "~":
            raise BuildError(
                "there is no folder to keep them in, since there is no home directory",
                "Name one in TORCH_EXTENSIONS_DIR, and they are compiled at the next import",
            )
        from torch.utils import cpp_extension

        root = cpp_extension.get_default_build_root()
    version = __version__.partition("+")[0]  # without the torch that something was compiled for
    name = f"{version}-torch{torch.__version__}-{key.hexdigest()[:16]}"
    return Path(root) / "emerging_optimizers" / name


def _kept(folder: Path) -> tuple[Path | None, str]:
    """Return the library kept in a folder, if there is one, and what is wrong with it."""
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
    """Return the prefix of this machine's build folders; locks may not reach other machines."""
    return f"build-{platform.node()}-"


def _remove_killed(folder: Path, is_locked: bool) -> None:
    """Remove the folders of builds that were killed."""
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
            f"{library} does not load ({error})",
            "Remove that file, and they are compiled at the next import",
        ) from error
    return module


def _say(text: str) -> None:
    print(f"emerging_optimizers: {text}", file=sys.stderr, flush=True)


def _time_of(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None
