"""Runs workers in several real processes that talk over gloo."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import emerging_optimizers


def launch(worker: str, world_size: int, folder: Path, *arguments: str, timeout: int = 240) -> None:
    """Run a function of `distributed_workers` in each of `world_size` processes.

    All are killed where one fails or time is up; the error has what each of them wrote.

    Args:
        worker: The function's name.
        world_size: Number of processes.
        folder: Passed on, for files that outlive the processes.
        *arguments: Passed on.
        timeout: Seconds.
    """
    here = Path(__file__).parent
    path = os.pathsep.join([str(Path(emerging_optimizers.__file__).parent.parent), str(here)])
    with tempfile.TemporaryDirectory() as store, contextlib.ExitStack() as stack:
        outputs = [
            stack.enter_context(Path(store, f"rank{rank}").open("w+")) for rank in range(world_size)
        ]
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "distributed_workers", worker, str(folder), *arguments],
                env={
                    **os.environ,
                    "PYTHONPATH": path,
                    "RANK": str(rank),
                    "WORLD_SIZE": str(world_size),
                    "STORE": str(Path(store, "store")),
                    "OMP_NUM_THREADS": "1",
                },
                stdout=outputs[rank],
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(world_size)
        ]
        deadline = time.monotonic() + timeout
        try:
            while any(process.poll() is None for process in processes):
                failed = any(process.poll() not in (None, 0) for process in processes)
                if failed or time.monotonic() > deadline:
                    break
                time.sleep(0.05)
        finally:
            codes = [process.poll() for process in processes]
            for process in processes:
                process.kill()
                process.wait()
        written = []
        for rank, output in enumerate(outputs):
            output.seek(0)
            written.append(f"--- rank {rank}, exit status {codes[rank]}\n{output.read()}")
        assert codes == [0] * world_size, "\n".join(written)
