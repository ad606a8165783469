"""The native code of a rule: interpreted by the compiled module, until its library is built.

Or until it is loaded at the first use, from the rule's package (shipped.py) or from the cache.
"""

import atexit
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import _build_cache, _native
from .._build_cache import BuildError
from .._operators import USER_NAMESPACE, unused_stem
from . import background, shipped
from .assembler import Program
from .build import library_for, product_for
from .cuda_kernels import kernels_of
from .emitter import struct_name
from .library import THEN
from .runtime_kernels import RuntimeKernels

# By the C++ text: rules that are defined twice share their code. Operators cannot be removed.
_CODES: dict[str, "NativeCode"] = {}
# Held while a library is loaded: a process must not fork or end meanwhile.
_LOCK = threading.RLock()
atexit.register(_LOCK.acquire)


def _after_fork() -> None:
    _LOCK.release()
    background.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_after_fork
    )


def native_code(program: Program, source: str, has_codes: bool, module: str) -> "NativeCode":
    """Return the native code of a rule.

    Args:
        program: The rule's programs.
        source: Its C++ text.
        has_codes: Whether any of its states may be stored as 8-bit codes.
        module: The module that defines it, whose package may have its library.
    """
    with _LOCK:
        found = _CODES.get(source)
        if found is None:
            found = _CODES[source] = NativeCode(program, source, has_codes, module)
        return found


class NativeCode:
    """A rule's operator, which the module interprets at first.

    Attributes:
        stem: The operator is ``{stem}_update_``.
        handle: The compiled module's handle of the rule.
        eager: The compiled module's function for eager calls.
        kernels: Its CUDA kernels.
        is_compiled: Whether the compiled library has replaced the interpreter.
        why_not: Why it cannot be compiled, as far as that is known.
    """

    def __init__(self, program: Program, source: str, has_codes: bool, module: str = "") -> None:
        native: Any = _native.native
        self._name = program.name
        self._source = source
        self._module = module
        self.stem = unused_stem(program.name)
        self.handle: Any
        self.eager: Callable[..., Any]
        self.handle, self.eager = native._interpret_rule(USER_NAMESPACE, self.stem, *program)
        kernels = kernels_of(has_codes=has_codes, has_scalars=bool(program.scalar_states))
        self.kernels = RuntimeKernels(program.name, source, self.handle, kernels)
        self.is_compiled = False
        self.why_not: str | None = None
        self._is_started = False

    def compile(self) -> None:
        """Load the compiled library; build it now if neither package nor cache has it.

        Raises:
            RuntimeError: That is not possible.
        """
        if self.is_compiled or self._attach_shipped():
            return
        if os.environ.get("EMERGING_OPTIMIZERS_JIT") == "0":
            raise RuntimeError(self._refusal("EMERGING_OPTIMIZERS_JIT=0"))
        try:
            self._attach(library_for(self._name, self._source))
        except BuildError as error:
            raise RuntimeError(self._refusal(f"{error.reason}. {error.remedy}")) from error

    def _refusal(self, reason: str) -> str:
        return f"the rule {self._name} cannot be compiled: {reason}"

    def start_build(self) -> None:
        """Load the compiled library if there is one, else begin to build it; only once."""
        with _LOCK:
            if self._is_started:
                return
            self._is_started = True
        try:
            self._start_build()
        except (BuildError, OSError, RuntimeError) as error:
            self._stay_interpreted(error)
        except BaseException:
            self._is_started = False
            raise

    def _start_build(self) -> None:
        if self._attach_shipped():
            return
        if os.environ.get("EMERGING_OPTIMIZERS_JIT") == "0":
            self.why_not = "EMERGING_OPTIMIZERS_JIT=0"
            return
        product = product_for(self._name, self._source)
        library = _build_cache.find(product)
        if library is not None:
            self._attach(library)
            return

        def build() -> None:
            try:
                if not self.is_compiled:
                    self._attach(background.build(product))
                    product.announce()
            except (BuildError, OSError, RuntimeError) as error:
                self._stay_interpreted(error)

        background.run(build)

    def _attach_shipped(self) -> bool:
        """Load the library that the rule's package has; return whether there is a usable one."""
        package = shipped.package_of_module(self._module)
        if package is None:
            return False
        library = shipped.find(package, shipped.Text(self._name, self._name, self._source))
        if library is None:
            return False
        try:
            self._load(library)
        except RuntimeError as error:
            shipped.reject(package, str(error))
            return False
        return True

    def _attach(self, library: Path) -> None:
        """Load a library of the cache.

        Raises:
            BuildError: It cannot be loaded.
        """
        try:
            self._load(library)
        except RuntimeError as error:
            raise BuildError(str(error), f"Remove {library.parent}, and {THEN}") from error

    def _load(self, library: Path) -> None:
        with _LOCK:
            if not self.is_compiled:
                module: Any = _native.native
                module._attach_library(self.handle, str(library), struct_name(self._name))
                self.is_compiled = True
                self.why_not = None

    def _stay_interpreted(self, error: Exception) -> None:
        if isinstance(error, BuildError):
            self.why_not = f"{error.reason}. {error.remedy}"
        else:
            self.why_not = str(error)
        text = f"the rule {self._name} is interpreted, which takes longer: {self.why_not}"
        _build_cache.say(text)
