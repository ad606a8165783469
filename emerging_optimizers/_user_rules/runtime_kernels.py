"""The CUDA kernels of a rule: those that are used are built, while the formula runs."""

import os
import threading
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

from .. import _build_cache, _native
from .._build_cache import BuildError
from . import background, cuda_kernels, nvrtc
from .cuda_kernels import Kernel


def are_possible() -> bool:
    """Return whether the compiled module can launch kernels on CUDA devices."""
    return _native.native is not None and bool(_native.native.cuda_architectures)


class RuntimeKernels:
    """The kernels of a rule, on all devices.

    Args:
        rule: The rule's name.
        source: Its C++ text.
        handle: The compiled module's handle of the rule.
        kernels: All that it has.

    Attributes:
        why_not: Why some of them cannot be built; None as far as that is not known.
    """

    def __init__(self, rule: str, source: str, handle: Any, kernels: list[Kernel]) -> None:
        self._rule = rule
        self._source = source
        self._handle = handle
        self._kernels = kernels
        self.why_not: str | None = None
        self._lock = threading.Lock()
        self._asked: set[tuple[int, Kernel]] = set()
        self._attached: set[tuple[int, Kernel]] = set()

    def start(self) -> bool:
        """Load the kernels that were missing, or begin to build them in the background.

        Returns:
            Whether any was in the cache, and is loaded now.
        """
        wanted = self._take_missing()
        if not wanted:
            return False
        refusal = _refusal()
        if refusal is not None:
            self.why_not = refusal
            return False
        with self._lock:
            missing = [pair for pair in wanted if pair not in self._asked]
            self._asked.update(missing)
        is_any_loaded = False
        for device, kernel in missing:
            try:
                cubin = cuda_kernels.find_cubin(
                    self._rule, self._source, kernel, _architecture(device)
                )
                if cubin is not None:
                    self._attach(device, kernel, cubin.read_bytes())
                    is_any_loaded = True
                    continue
            except (BuildError, RuntimeError, OSError) as error:
                self._note(kernel, error)
                continue
            background.run(partial(self._try_to_build, device, kernel))
        return is_any_loaded

    def build_missing(self) -> bool:
        """Build the kernels that were missing now; return whether there were any.

        Raises:
            RuntimeError: A kernel cannot be built.
        """
        missing = self._take_missing()
        if missing:
            self._build_now(pair for pair in missing if not pair[1].is_large)
            for device, kernel in missing:
                if kernel.is_large:
                    self._try_to_build(device, kernel)
        return bool(missing)

    def build_all(self, device: torch.device) -> None:
        """Build all kernels for a device, unless they are in the cache, and load them.

        Raises:
            RuntimeError: That is not possible.
        """
        count = torch.cuda.device_count()
        index = device.index
        if index is None:
            index = torch.cuda.current_device() if count > 0 else 0
        if index >= count:
            raise RuntimeError(
                f"the rule {self._rule} cannot be compiled: there is no device cuda:{index}"
                f" (torch.cuda.device_count() is {count}); name another one"
            )
        self._build_now((index, kernel) for kernel in self._kernels)

    def _take_missing(self) -> list[tuple[int, Kernel]]:
        """Return the kernels that were missing since the last call."""
        if not are_possible() or _is_capturing():
            return []  # nothing is loaded during a capture
        module: Any = _native.native
        found = []
        for device, names in module._wanted_kernels(self._handle):
            small = Kernel(*names)
            # The large one is for calls with many tensors, which it makes faster.
            for kernel in (small, small._replace(is_large=True)):
                if kernel in self._kernels:
                    found.append((device, kernel))
        return found

    def _try_to_build(self, device: int, kernel: Kernel) -> None:
        try:
            self._build(device, kernel)
        except Exception as error:  # in the background, there is nobody to raise it to
            self._note(kernel, error)

    def _build_now(self, wanted: Iterable[tuple[int, Kernel]]) -> None:
        refusal = _refusal()
        if refusal is not None:
            raise RuntimeError(f"the rule {self._rule} cannot be compiled: {refusal}")
        try:
            for device, kernel in wanted:  # NVRTC compiles one after the other in any case
                self._build(device, kernel)
        except BuildError as error:
            raise RuntimeError(
                f"the rule {self._rule} cannot be compiled: {error.reason}. {error.remedy}"
            ) from error

    def _build(self, device: int, kernel: Kernel) -> None:
        if (device, kernel) in self._attached:
            return
        cubin = cuda_kernels.cubin_for(self._rule, self._source, kernel, _architecture(device))
        self._attach(device, kernel, cubin.read_bytes())

    def _attach(self, device: int, kernel: Kernel, code: bytes) -> None:
        module: Any = _native.native
        name = kernel.symbol(self._rule)
        with nvrtc.LOCK:
            if (device, kernel) not in self._attached:
                module._attach_kernel(self._handle, device, tuple(kernel), name, code)
                self._attached.add((device, kernel))
        self.why_not = None

    def _note(self, kernel: Kernel, error: Exception) -> None:
        """Tell why a kernel is missing, unless small launches take its place."""
        if kernel.is_large:
            return
        if isinstance(error, BuildError):
            self.why_not = f"{error.reason}. {error.remedy}"
        elif isinstance(error, (RuntimeError, OSError)):
            self.why_not = str(error)
        else:
            self.why_not = f"{type(error).__name__}: {error}"
        _build_cache.say(
            f"the rule {self._rule} runs its formula where a kernel is missing: {self.why_not}"
        )


def _refusal() -> str | None:
    """Return why no kernel can be built or loaded."""
    if os.environ.get("EMERGING_OPTIMIZERS_JIT") == "0":
        return "EMERGING_OPTIMIZERS_JIT=0"
    try:
        cuda_kernels.check_compiler()
    except BuildError as error:
        return f"{error.reason}. {error.remedy}"
    return None


def _architecture(device: int) -> int:
    """Return the architecture of a device: 90 for sm_90."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _is_capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]
