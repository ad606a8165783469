"""Compiles and calls the roof loop of ``roof.cpp``."""

import ctypes
import functools
import hashlib
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import torch  # its OpenMP runtime is in the process first, so that the loop shares its threads
from torch import Tensor

_SOURCE = Path(__file__).with_name("roof.cpp")
_BUILD = Path(__file__).parents[1] / "build" / "benchmarks"
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-fPIC", "-shared")


def compiler() -> str:
    """Return the command that compiles the loop."""
    return os.environ.get("CXX", "g++")


@functools.cache
def _library() -> ctypes.CDLL:
    """Compile the loop for this machine, unless that has been done, and load it."""
    identity = "\0".join([_SOURCE.read_text(), compiler(), *_FLAGS, cpu_model()])
    path = _BUILD / f"roof-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        _BUILD.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        subprocess.run([compiler(), *_FLAGS, str(_SOURCE), "-o", str(unfinished)], check=True)
        unfinished.replace(path)
    library = ctypes.CDLL(str(path))
    library.roof.argtypes = [
        ctypes.c_int,
        ctypes.c_bool,
        ctypes.c_int64,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int,
    ]
    return library


def cpu_model() -> str:
    """Return the processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def prepare_roof(
    grads: Sequence[Tensor],
    modified: Sequence[Sequence[Tensor]],
    updates: Sequence[Tensor] | None = None,
) -> Callable[[], None]:
    """Return a call that sweeps the roof loop over the tensors, on PyTorch's number of threads.

    Args:
        grads: Read.
        modified: Read and written: one to three lists of states for an update function, for an
            optimizer's step the list of parameters before them.
        updates: Written; for an update function.
    """
    columns = (grads, *modified, *([] if updates is None else [updates]))
    for tensor in (tensor for column in columns for tensor in column):
        if tensor.dtype != torch.float32 or not tensor.is_contiguous() or not tensor.is_cpu:
            raise ValueError("the roof loop takes contiguous float32 tensors on the CPU")
    num_states = len(modified) - (updates is None)
    if not 1 <= num_states <= 3:
        raise ValueError(f"the roof loop takes 1 to 3 states, not {num_states}")
    rows = list(zip(*columns, strict=True))
    numel = (ctypes.c_int64 * len(rows))(*(row[0].numel() for row in rows))
    addresses = [tensor.data_ptr() for row in rows for tensor in row]
    operands = (ctypes.c_void_p * len(addresses))(*addresses)
    what = (len(modified), updates is not None)
    where = (len(rows), numel, operands)
    num_threads = torch.get_num_threads()
    loop = _library().roof

    def sweep() -> None:
        loop(*what, *where, num_threads)

    return sweep
