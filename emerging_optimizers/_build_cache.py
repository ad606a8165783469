"""Builds a library once for all processes, and keeps it in a cache.

The cache is in torch's extensions folder (TORCH_EXTENSIONS_DIR). Each library has a folder there,
named by a hash of everything that it depends on. A file in it is locked while a process builds, so
that others wait and share its success or its failure. Each attempt builds in a folder of its own,
and the complete library is moved into place.
"""

import contextlib
import os
import platform
import shutil
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TextIO, TypeVar

from . import _build, _build_output, _file_lock, _library

SUFFIX = ".pyd" if sys.platform == "win32" else ".so"
# Seconds to wait for another process that builds. A build with CUDA takes minutes.
LIMIT = 1800.0
# Seconds after which a build's folder is abandoned, whichever machine made it.
_DAY = 86400.0

Result = TypeVar("Result")


class BuildError(Exception):
    """A library cannot be built.

    Attributes:
        reason: Why, as a clause.
        remedy: What to do, as a sentence without its period.
    """

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason, remedy)
        self.reason = reason
        self.remedy = remedy


class CompilationError(BuildError):
    """The compiler failed.

    Attributes:
        output: What it printed.
        log: The file that has this.
    """

    def __init__(self, reason: str, remedy: str, output: str, log: Path) -> None:
        super().__init__(reason, remedy)
        self.output = output
        self.log = log


class Product(ABC, Generic[Result]):
    """A library that is built, or found in the cache.

    Attributes:
        folder: Its folder in the cache, which is absolute.
        pattern: A pattern of the library's file name.
        what: What it is, in messages.
        then: What happens once an error is fixed, as a clause.
        retry: What to do once another process is done, as an imperative.
        if_killed: Advice if the compiler was killed, in parentheses; it most likely lacked memory.
        file_mode: The permissions of the files that are created, before the umask.
    """

    what: str
    then: str
    retry: str
    if_killed = ""
    file_mode = 0o666

    def __init__(self, folder: Path, pattern: str) -> None:
        self.folder = folder.absolute()
        self.pattern = pattern

    @abstractmethod
    def missing_tool(self) -> tuple[str, str] | None:
        """Return which tool is missing and how to get it; None if all are installed."""

    @abstractmethod
    def compile(self, folder: Path) -> Path:
        """Compile in a folder that no other process uses, and return the library's path there.

        Raises:
            Exception: The build failed. A ``subprocess.CalledProcessError`` has the output.
        """

    @abstractmethod
    def load(self, library: Path) -> Result:
        """Return what a library in the cache provides.

        Raises:
            BuildError: It cannot be loaded.
        """

    @abstractmethod
    def finish(self, library: Path) -> Result:
        """Return what the library provides that was compiled and is now in the cache."""

    @abstractmethod
    def finish_unsaved(self, error: OSError) -> Result:
        """Return what the compiled library provides, although it cannot be moved to the cache.

        Raises:
            BuildError: It is of no use then.
        """

    def fault(self, library: Path) -> str:
        """Return what is wrong with a library in the cache, as a predicate for its name."""
        return _library.fault(library)

    def make_folder(self) -> None:
        """Create the folder in the cache."""
        self.folder.mkdir(parents=True, exist_ok=True)

    def check(self) -> None:
        """Check that what is in the cache may be loaded.

        Raises:
            BuildError: Somebody else may have written it.
        """


def load_once(product: Product[Result], limit: float = LIMIT) -> Result:
    """Return what a library in the cache provides; build it if there is none.

    If several processes call this at once, the first one builds the library for all.

    Args:
        product: The library.
        limit: Seconds to wait for another process that builds it.

    Raises:
        BuildError: It cannot be built.
    """
    folder = product.folder
    library, fault = _cached(product)
    if library is not None and not fault:
        return product.load(library)
    _check_tools(product, library, fault)
    log = folder / "error.txt"
    before = _time_of(log)
    with contextlib.ExitStack() as stack:
        try:
            product.make_folder()
            product.check()
            (folder / "lock").touch(product.file_mode)
            file = stack.enter_context((folder / "lock").open("a"))
        except OSError as error:
            raise not_writable(product, error) from error
        lock = _acquire(product, file, limit)
        library, fault = _cached(product)
        if library is not None and not fault:
            return product.load(library)
        # If the process that built it failed, this one would fail, too.
        if lock.has_waited and _time_of(log) != before:
            raise _failure(product, log.read_text(errors="replace"), log)
        try:
            if library is not None:
                say(f"{library} {fault}; recompiling")
                _remove(library)
            # A killed build leaves its folder behind, with torch's lock file, for which torch would
            # wait forever, and with compilers that may still be writing. So each build uses a new
            # folder.
            _remove_killed(folder, lock.error is None)
            build = Path(tempfile.mkdtemp(prefix=_prefix(), dir=folder))
        except OSError as error:
            raise not_writable(product, error) from error
        try:
            return _build_product(product, build, log)
        finally:
            shutil.rmtree(build, ignore_errors=True)


def find(product: Product[Result]) -> Result | None:
    """Return what a library in the cache provides; None if it must be built first.

    Raises:
        BuildError: Others may have written it, or it cannot be built.
    """
    library, fault = _cached(product)
    if library is not None and not fault:
        return product.load(library)
    _check_tools(product, library, fault)
    return None


def _check_tools(product: Product[Result], library: Path | None, fault: str) -> None:
    """Raise if a library cannot be built because a tool is missing."""
    missing = product.missing_tool()
    if missing is not None:
        reason, remedy = missing
        raise BuildError(f"{library} {fault}, and {reason}" if fault else reason, remedy)


def _acquire(product: Product[Result], file: TextIO, limit: float) -> _file_lock.Attempt:
    """Lock a file. If the file system has no locks, each process builds for itself."""
    try:
        attempt = _file_lock.acquire(
            file,
            limit,
            lambda: say(f"waiting for another process to compile {product.what} ({file.name})"),
        )
    except TimeoutError:
        raise BuildError(
            f"another process has held {file.name} for more than {limit:g} seconds",
            f"Wait for that process or end it, then {product.retry}",
        ) from None
    if attempt.error is not None:
        say(
            f"{file.name} cannot be locked ({attempt.error.strerror}); other processes may"
            " compile at the same time"
        )
    return attempt


def _build_product(product: Product[Result], build: Path, log: Path) -> Result:
    """Compile in a folder of this process, then move the library into the cache.

    Args:
        product: The library.
        build: The folder of this process.
        log: The file for the compiler's output if it fails.
    """
    try:
        library = product.compile(build)
    except Exception as error:
        text = _build_output.output_of(error)
        # Without locks, another process may have built it meanwhile. It cannot be loaded if the
        # library that was linked here has been, since both register the same operators.
        cached, fault = _cached(product)
        if cached is not None and not fault and not any(build.glob(product.pattern)):
            return product.load(cached)
        with contextlib.suppress(OSError):  # the disk may be full
            log.touch(product.file_mode)
            log.write_text(text)
        raise _failure(product, text, log) from error
    try:
        # Moved atomically when it is complete, so that no process loads an incomplete one.
        _library.seal(library)
        library = library.replace(product.folder / library.name)
        log.unlink(missing_ok=True)
    except OSError as error:
        return product.finish_unsaved(error)
    return product.finish(library)


def _failure(product: Product[Result], text: str, log: Path) -> BuildError:
    """Return the error of a failed build, from its output."""
    what = f"Fix the errors in {log}" if log.exists() else "Fix this"
    if _build_output.was_killed(text):
        what += product.if_killed
    return CompilationError(
        f"compilation failed: {_build_output.first_error(text)}",
        f"{what}, and {product.then}; or set EMERGING_OPTIMIZERS_JIT=0",
        text,
        log,
    )


def not_writable(product: Product[Result], error: OSError) -> BuildError:
    """Return the error of a folder in which nothing can be saved."""
    return BuildError(
        f"{product.folder} cannot be written ({type(error).__name__}: {error})",
        f"Set TORCH_EXTENSIONS_DIR to a writable folder, and {product.then}",
    )


def missing_compiler(then: str) -> tuple[str, str] | None:
    """Return that the C++ compiler is missing and how to get it; None if it is installed."""
    if _build.has_compiler():
        return None
    return (
        f"no C++ compiler ({_build.compiler()}) was found",
        f"Install one or set CXX, and {then}",
    )


def csrc() -> Path:
    """Return the folder of the C++ sources: in the installed package, or beside a checkout's."""
    package = Path(__file__).parent
    for folder in (package / "csrc", package.parent / "csrc"):
        if folder.is_dir():
            return folder
    raise BuildError("the C++ sources are missing", "Reinstall the package")


def root(then: str) -> Path:
    """Return the package's folder in torch's extensions folder.

    Args:
        then: What happens once an error is fixed, as a clause.
    """
    folder = os.environ.get("TORCH_EXTENSIONS_DIR")
    if not folder:
        if not os.environ.get("XDG_CACHE_HOME") and os.path.expanduser("~") == "~":
            raise BuildError(
                "there is no home directory for the compiled library",
                f"Set TORCH_EXTENSIONS_DIR to a writable folder, and {then}",
            )
        folder = _default_root()
    return Path(folder) / "emerging_optimizers"


def _default_root() -> str:
    """Return what torch.utils.cpp_extension's ``get_default_build_root`` does.

    Importing that takes a quarter of a second.
    """
    try:
        from torch import _appdirs

        user_cache_dir: Callable[..., str] = _appdirs.user_cache_dir
        return os.path.realpath(user_cache_dir(appname="torch_extensions"))
    except (ImportError, AttributeError):  # a later version of torch
        from torch.utils import cpp_extension

        return cpp_extension.get_default_build_root()


def _cached(product: Product[Result]) -> tuple[Path | None, str]:
    """Return the library in the cache, or None, and what is wrong with it."""
    product.check()
    library, fault = None, ""
    for library in product.folder.glob(product.pattern):
        fault = product.fault(library)
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


def say(text: str) -> None:
    """Print a line to the standard error stream, if there is one."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):  # closed
            print(f"emerging_optimizers: {text}", file=sys.stderr, flush=True)


def _time_of(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None
