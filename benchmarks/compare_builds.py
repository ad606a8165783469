"""Two builds of the package against each other: is the new one as fast as the old one?

    python benchmarks/compare_builds.py OLD NEW [--rounds 200] [--only 1000x8]

OLD and NEW are folders that hold a compiled ``emerging_optimizers``: two clones, each after
``make install``. A process cannot load both, so each has one of its own; they are timed in turn,
one waiting while the other runs. Printed are the median and the quartiles of the paired ratios new
/ old, and the ratio of the minima.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

SHAPES = {"1x8": (1, 8), "1000x8": (1000, 8), "1000x1000": (1000, 1000)}
KINDS = ("function", "step")
# Seconds of one sample, which is the mean of several calls.
SAMPLE = 2e-3


def make_call(kind: str, shape: str, is_shuffled: bool) -> Callable[[], object]:
    """Return a call of Adam's update function, or a step of AdamW, on lists of one shape."""
    import random

    import torch

    from emerging_optimizers import AdamW
    from emerging_optimizers.scalar_optimizers import calculate_adam_update

    torch.manual_seed(0)
    count, numel = SHAPES[shape]
    if kind == "step":
        params = [torch.nn.Parameter(torch.randn(numel)) for _ in range(count)]
        for param in params:
            param.grad = torch.randn(numel)
        if is_shuffled:
            random.Random(0).shuffle(params)
        return AdamW(params, lr=1e-4).step
    lists = [[torch.rand(numel) for _ in range(count)] for _ in range(4)]
    if is_shuffled:
        for i, tensors in enumerate(lists):
            random.Random(i).shuffle(tensors)
    grads, exp_avgs, exp_avg_sqs, out = lists
    arguments = ((0.9, 0.999), True, False, 3, 1e-8)
    return lambda: calculate_adam_update(grads, exp_avgs, exp_avg_sqs, *arguments, out=out)


def work() -> None:
    """Answer each line, ``kind shape shuffled calls``, with the seconds that a call took."""
    import torch

    torch.set_num_threads(min(2, torch.get_num_threads()))
    calls: dict[tuple[str, ...], Callable[[], object]] = {}
    for line in sys.stdin:
        *case, count = line.split()
        kind, shape, shuffled = case
        if tuple(case) not in calls:
            calls.clear()
            calls[tuple(case)] = make_call(kind, shape, shuffled == "shuffled")
        call = calls[tuple(case)]
        call()  # what the other process left in the caches is not this one's
        start = time.perf_counter()
        for _ in range(int(count)):
            call()
        print((time.perf_counter() - start) / int(count), flush=True)


class Build:
    """A process with one build."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, __file__, "--worker"]
        environment = {**os.environ, "PYTHONPATH": str(folder.resolve())}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def time(self, case: tuple[str, str, str], calls: int) -> float:
        """Return the seconds that one of several calls took."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(*case, calls, file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())


def compare(old: Build, new: Build, case: tuple[str, str, str], rounds: int) -> str:
    """Return one line of the table."""
    for build in (old, new):
        build.time(case, 1)
    calls = max(1, round(SAMPLE / old.time(case, 5)))
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(rounds):
        for k in (0, 1) if i % 2 else (1, 0):
            times[k].append((old, new)[k].time(case, calls))
    ratios = [b / a for a, b in zip(*times, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    minima = min(times[1]) / min(times[0])
    microseconds = statistics.median(times[0]) * 1e6
    return (
        f"{' '.join(case):34} {microseconds:9.1f} us {median:7.3f} ({low:.3f} to {high:.3f})"
        f" {minima:7.3f}"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--only", choices=SHAPES, help="one shape")
    arguments = parser.parse_args()
    old, new = Build(arguments.old), Build(arguments.new)
    print(f"{'':34} {'old':>12} {'new/old (quartiles)':>24} {'minima':>7}")
    for kind in KINDS:
        for shape in SHAPES:
            for order in ("ordered", "shuffled"):
                if arguments.only in (None, shape) and (order == "ordered" or shape != "1x8"):
                    print(compare(old, new, (kind, shape, order), arguments.rounds), flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        work()
    else:
        main()
