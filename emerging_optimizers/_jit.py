"""Builds the native kernels at the first import if no compiled module fits the installed torch.

The library is cached (_build_cache.py), and later imports load it. EMERGING_OPTIMIZERS_JIT=0
disables this (_native.py).
"""

import hashlib
import importlib.util
import sysconfig
import warnings
from pathlib import Path
from types import ModuleType

import torch

from . import _build, _build_cache, _compile
from ._build_cache import BuildError
from ._distribution import __version__

_NAME = "emerging_optimizers_native"


class _Kernels(_build_cache.Product[ModuleType]):
    """The module of native kernels."""

    what = "the native kernels"
    then = _compile.THEN
    retry = "import again"
    if_killed = " (MAX_JOBS=1 needs the least memory)"

    def __init__(self, recipe: _build.Recipe, folder: Path) -> None:
        super().__init__(folder, f"{_NAME}*{_build_cache.SUFFIX}")
        self.recipe = recipe

    def missing_tool(self) -> tuple[str, str] | None:
        return _compile.missing_tool()

    def compile(self, folder: Path) -> Path:
        # A torch without CUDA needs no CUDA kernels.
        lack = torch.version.cuda and self.recipe.why_no_cuda
        duration = "several minutes" if self.recipe.architectures else "about a minute"
        _build_cache.say(
            f"compiling the native kernels for torch {torch.__version__} into {self.folder}; this"
            f" takes {duration} and happens once (EMERGING_OPTIMIZERS_JIT=0 disables it)"
            + (f"; no CUDA kernels: {lack}" if lack else "")
        )
        self.module = _compile.compile_module(_NAME, self.recipe, folder)
        return Path(str(self.module.__file__))

    def load(self, library: Path) -> ModuleType:
        return _load(library)

    def finish(self, library: Path) -> ModuleType:
        self.module.__file__ = str(library)
        return self.module

    def finish_unsaved(self, error: OSError) -> ModuleType:
        _build_cache.say(f"the compiled library could not be saved in {self.folder} ({error})")
        return self.module


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
            recipe = _build.recipe(_build_cache.csrc())
            return load_once(recipe, _folder(recipe))
    except BuildError:
        raise
    except Exception as error:  # the package works without native kernels
        raise BuildError(
            f"compilation failed ({type(error).__name__}: {error})",
            f"Fix this, and {_compile.THEN}",
        ) from error


def load_once(recipe: _build.Recipe, folder: Path, limit: float = _build_cache.LIMIT) -> ModuleType:
    """Return the module cached in a folder; build it if there is none.

    If several processes call this at once, the first one builds the module for all.

    Args:
        recipe: How to build it.
        folder: The folder of this module in the cache.
        limit: Seconds to wait for another process that builds it.

    Raises:
        BuildError: It cannot be built.
    """
    return _build_cache.load_once(_Kernels(recipe, folder), limit)


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
    version = __version__.partition("+")[0]  # without the local part, which names a torch
    name = f"{version}-torch{torch.__version__}-{key.hexdigest()[:16]}"
    return _build_cache.root(_compile.THEN) / name


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
            f"Delete it, and {_compile.THEN}",
        ) from error
    return module
