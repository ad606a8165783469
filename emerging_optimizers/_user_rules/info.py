"""What is known about a rule: its arguments, its memory traffic, and the time that this takes."""

import functools
import statistics
import time
from typing import Any, NamedTuple

import torch

from .tracer import Trace

# Bytes of the tensor that is timed: too large for caches.
_BYTES = 256 << 20
_BYTES_OF_FLOAT32 = 4


class Info(NamedTuple):
    """What is known about a rule.

    Attributes:
        name: Its name.
        states: Its states.
        scalar_states: Its scalar states, which take no memory traffic, and their first values.
        hyperparameters: Its hyperparameters and their defaults; those without one are missing.
        reads: The tensors that a call reads.
        writes: The tensors that a call writes.
        bytes_per_element: The bytes that a call moves for each element, if all are float32.
        step_bytes_per_element: The same for an optimizer's step, which also reads and writes the
            parameter, and stores no update.
        bandwidth: The memory bandwidth that was measured on the CPU, in GB/s.
        step_time_per_million: The milliseconds that a step of a million elements takes at that
            bandwidth, from memory.
    """

    name: str
    states: tuple[str, ...]
    scalar_states: dict[str, float]
    hyperparameters: dict[str, Any]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    bytes_per_element: int
    step_bytes_per_element: int
    bandwidth: float
    step_time_per_million: float

    def __str__(self) -> str:
        return (
            f"{self.name}: reads {', '.join(self.reads)}; writes {', '.join(self.writes)};"
            f" {self.bytes_per_element} bytes an element, {self.step_bytes_per_element} in a step:"
            f" {self.step_time_per_million:.3g} ms for a million elements at"
            f" {self.bandwidth:.3g} GB/s"
        )


def describe(trace: Trace) -> Info:
    """Return what is known about a rule."""
    signature = trace.signature
    # The kernels read the gradient and all states, and write all states.
    reads = (signature.grad, *signature.states)
    writes = (*signature.states, "update")
    step_bytes = _BYTES_OF_FLOAT32 * (len(reads) + len(writes) + 1)
    bandwidth = _bandwidth()
    return Info(
        name=signature.name,
        states=signature.states,
        scalar_states=dict(signature.scalar_states),
        hyperparameters=dict(signature.defaults),
        reads=reads,
        writes=writes,
        bytes_per_element=_BYTES_OF_FLOAT32 * (len(reads) + len(writes)),
        step_bytes_per_element=step_bytes,
        bandwidth=bandwidth / 1e9,
        step_time_per_million=step_bytes * 1e6 / bandwidth * 1e3,
    )


@functools.cache
def _bandwidth() -> float:
    """Return the bytes a second that adding to a tensor in place reads and writes."""
    tensor = torch.ones(_BYTES // _BYTES_OF_FLOAT32)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        tensor.add_(1.0)
        times.append(time.perf_counter() - start)
    return 2 * _BYTES / statistics.median(times)
