"""The GPU that ``bench_cuda.py`` measures, its clocks, and what takes its place without one."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import repeat
from typing import Any, ClassVar

import torch
from gpu import describe_gpu
from harness import Clock
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from emerging_optimizers._native import native

# ---- the device, and a stand-in for it -----------------------------------------------------------


class Device(ABC):
    """What the clocks need of a device.

    Attributes:
        type: As PyTorch calls it.
        memory: Bytes that are free.
        cache: Bytes of its last cache.
        shortest: Seconds that a sample of calls back to back takes at least.
    """

    type: ClassVar[str]
    shortest: ClassVar[float]
    memory: int
    cache: int

    @abstractmethod
    def mark(self) -> Any:
        """Note the time at which the device gets here."""

    @abstractmethod
    def seconds(self, start: Any, end: Any) -> float:
        """Return the time between two marks that the device has reached."""

    @abstractmethod
    def wait(self) -> None:
        """Wait until the device has done everything."""

    @abstractmethod
    def occupy(self, seconds: float) -> None:
        """Keep the device busy for at least so long, without memory."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return what a figure must be read with."""


class Gpu(Device):
    """The current CUDA device."""

    type = "cuda"
    shortest = 5e-3
    # More than any GPU's clock does in a second.
    _CYCLES_PER_SECOND = 3e9

    def __init__(self) -> None:
        self.memory = torch.cuda.mem_get_info()[0]
        self.cache = describe_gpu()["l2_bytes"]

    def mark(self) -> Any:
        """Record an event."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Return the time between two events."""
        return float(start.elapsed_time(end)) * 1e-3

    def wait(self) -> None:
        """Synchronise."""
        torch.cuda.synchronize()

    def occupy(self, seconds: float) -> None:
        """Enqueue a kernel that spins."""
        torch.cuda._sleep(int(seconds * self._CYCLES_PER_SECOND))

    def describe(self) -> dict[str, Any]:
        """Return the GPU's properties, and what the package was compiled for."""
        compiled = [] if native is None else list(native.cuda_architectures)
        return {**describe_gpu(), "compiled_architectures": compiled}


class StandIn(Device):
    """The CPU in a GPU's place, so that all the rest can be run where there is none."""

    type = "cpu"
    shortest = 0.0
    memory = 1 << 20
    cache = 1 << 12

    def mark(self) -> Any:
        """Read the clock."""
        return time.perf_counter()

    def seconds(self, start: Any, end: Any) -> float:
        """Return the difference."""
        return float(end - start)

    def wait(self) -> None:
        """Return: nothing is under way."""

    def occupy(self, seconds: float) -> None:
        """Return: nothing needs time to be enqueued."""

    def describe(self) -> dict[str, Any]:
        """Say that there is no GPU."""
        return {"name": "none: a smoke test, whose figures mean nothing"}


class QueueClock(Clock):
    """Calls back to back, by the device's clock, host and device working at the same time."""

    name = "calls back to back, host included"
    lead = 0.0

    def __init__(self, device: Device) -> None:
        self._device = device
        self.shortest = device.shortest

    def seconds(self, step: Callable[[], object], calls: int) -> float:
        """Return how long so many calls take."""
        if self.lead:
            self._device.occupy(self.lead)
        start = self._device.mark()
        for _ in repeat(None, calls):
            step()
        end = self._device.mark()
        self._device.wait()
        return self._device.seconds(start, end)


class DeviceClock(QueueClock):
    """The device alone, for calls that take it longer than the host.

    It is kept busy until the host is ahead of it, and so never waits. For operands several times
    as large as its cache: each call finds nothing there.
    """

    name = "device alone, calls back to back"
    lead = 5e-4


class ColdClock(Clock):
    """The device alone, its cache full of something else.

    Each call is enqueued whole while the device is kept busy, so that it never waits for the host.
    Reading fills the cache: what was written there would have to be written back meanwhile.
    """

    name = "device alone, cache cold"
    shortest = 0.0  # each call is timed by itself

    def __init__(self, device: Device) -> None:
        self._device = device
        self._other = torch.ones(device.cache, device=device.type)  # four times the cache's bytes
        self._sum = torch.empty((), device=device.type)

    def seconds(self, step: Callable[[], object], calls: int) -> float:
        """Return how long so many calls take."""
        device = self._device
        total = 0.0
        for _ in repeat(None, calls):
            begin = time.perf_counter()
            step()
            of_host = time.perf_counter() - begin
            device.wait()
            device.occupy(3 * of_host + 1e-3)
            torch.sum(self._other, dim=0, out=self._sum)
            start = device.mark()
            step()
            end = device.mark()
            device.wait()
            total += device.seconds(start, end)
        return total


class HostClock(Clock):
    """The host alone: until the call returns, with nothing in the device's queue."""

    name = "host alone, nothing queued"
    shortest = 0.0

    def __init__(self, device: Device) -> None:
        self._device = device

    def seconds(self, step: Callable[[], object], calls: int) -> float:
        """Return how long so many calls take."""
        total = 0
        for _ in repeat(None, calls):
            self._device.wait()
            start = time.perf_counter_ns()
            step()
            total += time.perf_counter_ns() - start
        self._device.wait()
        return total * 1e-9


def count_launches(step: Callable[[], object], device: Device) -> int | None:
    """Return how many kernels a call runs on the device; None where the profiler sees none."""
    activity = ProfilerActivity.CUDA if isinstance(device, Gpu) else ProfilerActivity.CPU
    names: list[str] = []
    for _ in range(2):  # the first time, the profiler itself is starting
        with profile(activities=[activity]) as profiler:
            step()
            device.wait()
        names = [e.name for e in profiler.events() if e.device_type == DeviceType.CUDA]
    return len([name for name in names if not name.startswith(("Memcpy", "Memset"))]) or None
