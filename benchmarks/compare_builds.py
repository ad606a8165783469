"""Two builds of the package against each other: the same bits, and as fast?

    python benchmarks/compare_builds.py OLD NEW [--rounds 200] [--only step]
    python benchmarks/compare_builds.py OLD NEW --bits

OLD and NEW are folders that hold a compiled ``emerging_optimizers``: two clones, each after
``make install``. A process cannot load both, so each has one of its own. They are used by the
package's public names alone.

Times: the two processes are timed in turn, one waiting while the other runs. Printed are the median
and the quartiles of the paired ratios new / old, and the ratio of the medians. Where in memory a
process has its code and its tensors changes its times by some percent, so several pairs of
processes share the rounds. With cold caches, other memory is swept before each call, which alone is
timed.

Bits: all results of the cases in `build_bits.py`, on each instruction set that the CPU has. Where
both are NaN, they count as the same.
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from io import StringIO
from itertools import zip_longest
from pathlib import Path
from typing import IO

# How many tensors, of how many elements; "single" is one that is not in a list.
SHAPES = {
    "single": (1, 8),
    "1x8": (1, 8),
    "10x8": (10, 8),
    "100x8": (100, 8),
    "1000x8": (1000, 8),
    "1000x1000": (1000, 1000),
    "1x100000": (1, 100_000),
    "10x4Mi": (10, 4 << 20),
}
# A function that allocates its results or gets `out`, or a step of an optimizer; the shapes; the
# orders of tensors in memory; the caches.
CASES = (
    ("function", ("single", "1x8", "10x8", "100x8", "1000x8"), ("ordered",), ("warm",)),
    ("out", ("single", "1x8", "10x8", "100x8"), ("ordered",), ("warm",)),
    ("out", ("1000x8", "1000x1000"), ("ordered", "shuffled"), ("warm",)),
    ("step", ("1x8", "1x100000", "10x4Mi"), ("ordered",), ("warm",)),
    ("step", ("1000x8", "1000x1000"), ("ordered", "shuffled"), ("warm", "cold")),
)
Case = tuple[str, str, str, str]
# Seconds of one sample with warm caches, which is the mean of several calls.
SAMPLE = 2e-3


# ---- in a build's process ------------------------------------------------------------------------


def make_call(kind: str, shape: str, order: str, optimizer: str) -> Callable[[], object]:
    """Return a call of Adam's update function, or an optimizer's step, on tensors of one shape."""
    import torch

    from emerging_optimizers import scalar_optimizers
    from emerging_optimizers.scalar_optimizers import calculate_adam_update

    torch.manual_seed(0)
    is_shuffled = order == "shuffled"
    count, numel = SHAPES[shape]
    if kind == "step":
        params = [torch.nn.Parameter(torch.randn(numel)) for _ in range(count)]
        for param in params:
            param.grad = torch.randn(numel)
        if is_shuffled:
            random.Random(0).shuffle(params)
        cls = getattr(scalar_optimizers, optimizer)
        step: Callable[[], object] = cls(params, lr=1e-4, weight_decay=0.1).step
        return step
    lists = [[torch.rand(numel) for _ in range(count)] for _ in range(4)]
    if is_shuffled:
        for i, tensors in enumerate(lists):
            random.Random(i).shuffle(tensors)
    operands = [tensors[0] if shape == "single" else tensors for tensors in lists]
    grads, exp_avgs, exp_avg_sqs, updates = operands
    out = updates if kind == "out" else None
    arguments = ((0.9, 0.999), True, False, 3, 1e-8)
    return lambda: calculate_adam_update(grads, exp_avgs, exp_avg_sqs, *arguments, out=out)


def cache_bytes() -> int:
    """Return the size of the CPU's largest cache, or more where it is not known."""
    largest = 64 << 20
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    folders = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [text.read_text().strip() for text in folders]
    known = [int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units]
    return max(known, default=largest)


def work(optimizer: str) -> None:
    """Answer each line, ``kind shape order caches calls``, with the seconds that a call took."""
    import torch

    torch.set_num_threads(min(2, torch.get_num_threads()))
    other = torch.zeros(0)
    calls: dict[tuple[str, ...], Callable[[], object]] = {}
    for line in sys.stdin:
        kind, shape, order, caches, text = line.split()
        count = int(text)
        if (kind, shape, order) not in calls:
            calls.clear()
            calls[kind, shape, order] = make_call(kind, shape, order, optimizer)
        call = calls[kind, shape, order]
        if caches == "cold":
            if not other.numel():
                other = torch.zeros(5 * cache_bytes() // 2 // 4)
                call()
            other.add_(1)
        else:
            call()  # what the other process left in the caches is not this one's
        start = time.perf_counter()
        for _ in range(count):
            call()
        print((time.perf_counter() - start) / count, flush=True)


def write_bits(_: str) -> None:
    """Print digests of all results; see `build_bits.py`."""
    from build_bits import write_digests

    write_digests()


def check_build(folder: Path) -> None:
    """Raise where the package is not that in a folder, compiled."""
    import emerging_optimizers

    config = StringIO()
    with redirect_stdout(config):
        emerging_optimizers.show_config()
    if f"module: {folder}" not in config.getvalue():
        raise SystemExit(f"{folder} has no compiled module for this Python; {config.getvalue()}")


# ---- processes -----------------------------------------------------------------------------------


def start(
    folder: Path, job: str, stdout: int | IO[str], optimizer: str = "", **variables: str
) -> "subprocess.Popen[str]":
    """Start a process that uses the build in a folder."""
    folder = folder.resolve()
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "EMERGING_OPTIMIZERS_JIT": "0",
        **variables,
    }
    command = [sys.executable, __file__, "--worker", job, str(folder), optimizer]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=stdout, text=True, env=environment
    )


class Build:
    """A process with one build, whose calls are timed."""

    def __init__(self, folder: Path, optimizer: str) -> None:
        self._folder = folder
        self._process = start(folder, "time", subprocess.PIPE, optimizer)

    def time(self, case: Case, calls: int) -> float:
        """Return the seconds that one of several calls took."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(*case, calls, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"the process of {self._folder} has ended")
        return float(answer)


# ---- times ---------------------------------------------------------------------------------------


def timed_cases() -> Iterator[Case]:
    """Yield the rows of the table."""
    for kind, shapes, orders, all_caches in CASES:
        for shape in shapes:
            for caches in all_caches:
                for order in orders:
                    yield kind, shape, order, caches


def compare_times(pairs: Sequence[tuple[Build, Build]], case: Case, rounds: int) -> str:
    """Return one line of the table."""
    for pair in pairs:
        for build in pair:
            build.time(case, 1)
    calls = 1 if case[-1] == "cold" else max(1, round(SAMPLE / pairs[0][0].time(case, 5)))
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(rounds):
        pair = pairs[i % len(pairs)]
        for k in (0, 1) if i // len(pairs) % 2 else (1, 0):
            times[k].append(pair[k].time(case, calls))
    ratios = [b / a for a, b in zip(*times, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    medians = [statistics.median(seconds) for seconds in times]
    microseconds = " ".join(f"{seconds * 1e6:10.2f}" for seconds in medians)
    return (
        f"{' '.join(case):32} {microseconds} {median:9.3f} ({low:.3f} to {high:.3f})"
        f" {medians[1] / medians[0]:9.3f}"
    )


def print_times(
    old: Path, new: Path, optimizer: str, only: Sequence[str], rounds: int, num_pairs: int
) -> None:
    """Print the table."""
    pairs = [(Build(old, optimizer), Build(new, optimizer)) for _ in range(num_pairs)]
    header = f"{'old, us':>10} {'new, us':>10} {'new/old (quartiles)':>26} {'of medians':>11}"
    print(f"{'':32} {header}")
    for case in timed_cases():
        if all(word in case for word in only):
            print(compare_times(pairs, case, rounds), flush=True)


# ---- bits ----------------------------------------------------------------------------------------


def isas() -> list[str]:
    """Return the names of the instruction sets to compare on."""
    import torch

    best = torch.backends.cpu.get_cpu_capability()
    names = {"AVX2": ["avx2"], "AVX512": ["avx2", "avx512"]}
    return ["baseline", *names.get(best, [])]


def print_bits(old: Path, new: Path, names: Sequence[str]) -> bool:
    """Print the cases whose results differ, and return whether all are the same."""
    is_same = True
    for isa in names:
        began = time.monotonic()
        # Threads that spin would take the other process's core.
        variables = {"EMERGING_OPTIMIZERS_ISA": isa, "OMP_WAIT_POLICY": "passive"}
        lists: list[list[list[str]]] = []
        with tempfile.TemporaryFile("w+") as first, tempfile.TemporaryFile("w+") as second:
            files = (first, second)
            pairs = zip((old, new), files, strict=True)
            processes = [start(folder, "bits", file, **variables) for folder, file in pairs]
            for folder, file, process in zip((old, new), files, processes, strict=True):
                process.communicate()
                file.seek(0)
                lists.append([line.rstrip("\n").split("\t") for line in file])
                if process.returncode:
                    case = lists[-1][-1][0] if lists[-1] else "(none)"
                    print(f"{folder}: ended with {process.returncode} after the case {case}")
                    is_same = False
        differing = 0
        for a, b in zip_longest(*lists):
            if a is None or b is None or a[0] != b[0]:
                print(f"{isa}: the case {a and a[0]} in OLD is {b and b[0]} in NEW")
                is_same = False
                break
            if a != b:
                differing += 1
                errors = " | ".join(line[1] for line in (a, b) if ":" in line[1])
                print(f"{isa}: {a[0]}: {errors or 'differs'}")
        is_same = is_same and not differing
        num_errors = sum(":" in line[1] for line in lists[0])
        print(
            f"{isa}: {len(lists[0])} cases, {differing} differ, {num_errors} raise errors in OLD;"
            f" {time.monotonic() - began:.0f} s",
            flush=True,
        )
    return is_same


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--bits", action="store_true", help="compare results instead of times")
    parser.add_argument("--isa", nargs="+", help="compare results on these instruction sets alone")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=3, help="of processes")
    parser.add_argument("--optimizer", default="AdamW", help="the class whose steps are timed")
    words = sorted({word for case in timed_cases() for word in case})
    parser.add_argument(
        "--only", choices=words, nargs="+", default=[], help="rows with all these words"
    )
    arguments = parser.parse_args()
    if arguments.bits:
        raise SystemExit(not print_bits(arguments.old, arguments.new, arguments.isa or isas()))
    print_times(
        arguments.old,
        arguments.new,
        arguments.optimizer,
        arguments.only,
        arguments.rounds,
        arguments.pairs,
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        check_build(Path(sys.argv[3]))
        {"time": work, "bits": write_bits}[sys.argv[2]](sys.argv[4])
    else:
        main()
