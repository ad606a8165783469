"""Runs workers in several processes that communicate over gloo."""

import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path
from unittest import mock

import emerging_optimizers

# A server imports what all workers need once; the workers are forked from it.
_WORKERS = [
    "amp_workers",
    "clipping_workers",
    "coded_workers",
    "distributed_workers",
    "dtensor_workers",
    "fault_workers",
    "scalar_workers",
]
_FORK = multiprocessing.get_context("forkserver")
_FORK.set_forkserver_preload([*_WORKERS, "torch._dynamo"])


def launch(
    worker: str,
    world_size: int,
    folder: Path,
    *arguments: str,
    timeout: int = 240,
    killed: int | None = None,
) -> None:
    """Run a function in each of `world_size` processes.

    If one fails or the time is up, all are killed, and the error has the output of each.

    Args:
        worker: The function's name, after that of its module if this is not `distributed_workers`.
        world_size: Number of processes.
        folder: Passed to the function, for files that outlive the processes.
        *arguments: Passed to the function.
        timeout: Seconds.
        killed: The process that must end by SIGKILL; the others must not finish then.
    """
    module, _, name = worker.rpartition(".")
    here = Path(__file__).parent
    path = os.pathsep.join([str(Path(emerging_optimizers.__file__).parent.parent), str(here)])
    with tempfile.TemporaryDirectory() as scratch:
        store = Path(scratch, "store")
        outputs = [Path(scratch, f"rank{rank}") for rank in range(world_size)]
        function = (module or "distributed_workers", name, str(folder), *arguments)
        processes = [
            _FORK.Process(target=_work, args=(rank, world_size, store, outputs[rank], *function))
            for rank in range(world_size)
        ]
        with mock.patch.dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS="1"):
            for process in processes:
                process.start()
        deadline = time.monotonic() + timeout
        try:
            while any(process.is_alive() for process in processes):
                failed = any(process.exitcode not in (None, 0) for process in processes)
                if failed or time.monotonic() > deadline:
                    break
                time.sleep(0.02)
        finally:
            codes = [process.exitcode for process in processes]
            for process in processes:
                process.kill()
                process.join()
        written = [
            f"--- rank {rank}, exit status {codes[rank]}\n{output.read_text()}"
            for rank, output in enumerate(outputs)
            if output.exists()
        ]
        if killed is None:
            assert codes == [0] * world_size, "\n".join(written)
        else:
            assert codes[killed] == -signal.SIGKILL, "\n".join(written)
            assert 0 not in codes, "\n".join(written)


def _work(
    rank: int,
    world_size: int,
    store: Path,
    output: Path,
    module: str,
    name: str,
    folder: str,
    *arguments: str,
) -> None:
    """Join the process group, and call the function."""
    file = output.open("w")
    for stream in (1, 2):
        os.dup2(file.fileno(), stream)
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=60),
        )
        getattr(importlib.import_module(module), name)(rank, Path(folder), *arguments)
        dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
