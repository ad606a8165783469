"""How the suites check, time and report: nothing here knows what a contender computes.

A figure is a ratio of two contenders' times, taken in one process with the contenders in turn, so
that what slows the machine down slows both. Its spread over the rounds is reported beside it.
"""

import contextlib
import gc
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field
from datetime import datetime, timezone
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from roof import compiler, cpu_model
from torch import Tensor

from emerging_optimizers import _distribution
from emerging_optimizers._native import native

# So many rounds are taken of the slowest contender, whatever the budget.
_MIN_ROUNDS = 5
# A machine of which other processes use more than this is not one to measure on.
_BUSY = 0.05


# ---- timing --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ratio:
    """A ratio of two contenders' times.

    Attributes:
        median: Of the ratios of all rounds in which both took part.
        p10: A tenth of these ratios are lower.
        p90: A tenth of them are higher.
        of_minima: Fastest sample over fastest sample. Where other processes take the processor away
            this is the one to trust: they only ever make a sample longer.
    """

    median: float
    p10: float
    p90: float
    of_minima: float

    @classmethod
    def of(cls, over: Sequence[float], under: Sequence[float]) -> "Ratio":
        """Summarise the times of at least two rounds."""
        ratios = [a / b for a, b in zip(over, under, strict=True)]
        deciles = statistics.quantiles(ratios, n=10, method="inclusive")
        return cls(statistics.median(ratios), deciles[0], deciles[-1], min(over) / min(under))

    def scaled(self, factor: float) -> "Ratio":
        """Return the ratio of something that is proportional to time."""
        return Ratio(*(value * factor for value in astuple(self)))


@dataclass
class Samples:
    """One contender's times.

    Attributes:
        calls: Calls that a sample consists of.
        seconds: Of one call, by round.
        spent: Seconds of all samples together.
    """

    calls: int
    seconds: dict[int, float] = field(default_factory=dict)
    spent: float = 0.0

    @property
    def spread(self) -> tuple[float, float]:
        """Seconds of a call that a tenth of the rounds stay below, and a tenth are above."""
        deciles = statistics.quantiles(self.seconds.values(), n=10, method="inclusive")
        return deciles[0], deciles[-1]

    @property
    def median(self) -> float:
        """Seconds of a call in the median round."""
        return statistics.median(self.seconds.values())

    @property
    def minimum(self) -> float:
        """Seconds of a call in the fastest round."""
        return min(self.seconds.values())


class Comparison:
    """The times of contenders that took turns.

    Attributes:
        samples: The times, by contender.
        taken_by_others: The part of the machine's processor time that other processes used
            meanwhile; None where not known.
    """

    def __init__(self, samples: dict[str, Samples], taken_by_others: float | None) -> None:
        self.samples = samples
        self.taken_by_others = taken_by_others

    def ratio(self, numerator: str, denominator: str) -> Ratio | None:
        """Return how many times as long the first takes, round by round.

        None where one of them did not take part.
        """
        if numerator not in self.samples or denominator not in self.samples:
            return None
        over = self.samples[numerator].seconds
        under = self.samples[denominator].seconds
        rounds = over.keys() & under.keys()
        return Ratio.of([over[i] for i in rounds], [under[i] for i in rounds])


class Clock:
    """How a sample is timed: on the host, calls back to back."""

    # A sample is at least this many seconds long, so that neither the clock nor a call's jitter is
    # what is measured.
    shortest = 1e-3

    def seconds(self, step: Callable[[], object], calls: int) -> float:
        """Return how long so many calls take."""
        start = time.perf_counter_ns()
        for _ in repeat(None, calls):
            step()
        return (time.perf_counter_ns() - start) * 1e-9


class ColdClock(Clock):
    """How a step is timed that follows a forward and a backward pass: on its own, caches cold."""

    shortest = 0.0  # a sample is one call

    def __init__(self) -> None:
        # Larger than the caches of the machines that this is for.
        self._others = torch.zeros(32 * 1024 * 1024)

    def seconds(self, step: Callable[[], object], calls: int) -> float:
        """Return how long so many calls take, the sweeps before each of them not counted."""
        seconds = 0.0
        for _ in repeat(None, calls):
            self._others.add_(1.0)  # on all threads, so that the caches of each core are swept
            seconds += super().seconds(step, 1)
        return seconds


def compare(
    steps: Mapping[str, Callable[[], object]],
    budget: float,
    clock: Clock | None = None,
    min_rounds: Mapping[str, int] | None = None,
) -> Comparison:
    """Time the steps in turn, A B C, C B A and so on, for about ``budget`` seconds.

    The first one is part of every round. Another one sits out the later rounds once it has used up
    its share of the budget, so that a slow contender leaves time for many rounds of the fast ones,
    and has taken part in 5 of them, or in as many as `min_rounds` says for it. Every step must have
    run before.
    """
    clock = clock or Clock()
    needed = dict.fromkeys(steps, _MIN_ROUNDS) | dict(min_rounds or {})
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        processor = ProcessorTime.now()
        samples = {name: Samples(_calls_per_sample(step, clock)) for name, step in steps.items()}
        first, *others = steps
        share = budget / len(steps)
        deadline = time.perf_counter() + budget
        number = 0
        while True:
            is_late = time.perf_counter() > deadline
            due = [
                name
                for name in others
                if len(samples[name].seconds) < needed[name]
                or (not is_late and samples[name].spent < share)
            ]
            if not due and (others or is_late) and number >= _MIN_ROUNDS:
                return Comparison(samples, processor.taken_by_others())
            turns = [first, *due]
            for name in turns if number % 2 == 0 else reversed(turns):
                taken = samples[name]
                seconds = clock.seconds(steps[name], taken.calls)
                taken.seconds[number] = seconds / taken.calls
                taken.spent += seconds
            number += 1
    finally:
        if was_enabled:
            gc.enable()


def _calls_per_sample(step: Callable[[], object], clock: Clock) -> int:
    calls = 1
    while True:
        seconds = clock.seconds(step, calls)
        if seconds < 100 * clock.shortest:  # else it is a long call, not one that was interrupted
            seconds = min(seconds, *(clock.seconds(step, calls) for _ in range(4)))
        if seconds >= clock.shortest:
            return calls
        calls = math.ceil(calls * min(8.0, 1.2 * clock.shortest / seconds))


@dataclass(frozen=True)
class ProcessorTime:
    """Seconds of all cores together since the machine started; None where not known."""

    total: float | None
    busy: float
    own: float

    @classmethod
    def now(cls) -> "ProcessorTime":
        """Read the clocks."""
        own = time.process_time()
        try:
            fields = Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
        except OSError:
            return cls(None, 0.0, own)
        ticks = [int(value) / os.sysconf("SC_CLK_TCK") for value in fields]
        idle, waiting = ticks[3:5]
        return cls(sum(ticks), sum(ticks) - idle - waiting, own)

    def used(self) -> float:
        """Return what this process used since."""
        return time.process_time() - self.own

    def taken_by_others(self, used: float | None = None) -> float | None:
        """Return the part of all that passed since, which other processes used.

        `used` is what those did that are measured, where this is not the only one.
        """
        now = ProcessorTime.now()
        if self.total is None or now.total is None or now.total == self.total:
            return None
        others = (now.busy - self.busy) - (now.own - self.own if used is None else used)
        return max(0.0, others / (now.total - self.total))


# ---- correctness ---------------------------------------------------------------------------------

# Rounding errors, in units of the last place of 1, that a formula of ten operations on values of
# about 1 may be off by.
_ULPS = 32
# Signs of values within rounding of 0 may turn over: fewer than one in so many.
_ELEMENTS_PER_TURNED_SIGN = 100_000
# Compared at a time: so many that the comparison stays in the cache, on other devices so many that
# launches do not count.
_PIECE = 1 << 18
_DEVICE_PIECE = 1 << 24


class WrongResultError(AssertionError):
    """A contender does not compute what it is timed for."""


def check_close(
    what: str, actual: Sequence[Tensor], expected: Sequence[Tensor], is_sign: bool = False
) -> None:
    """Raise where tensors differ by more than rounding.

    Args:
        what: Names the tensors in the error.
        actual: What was computed.
        expected: What that must be.
        is_sign: Allow a few signs of almost 0 to have turned over.
    """
    differing, total, largest = 0, 0, 0.0
    with one_thread():
        for a, b in _pieces(actual, expected):
            total += a.numel()
            rounding = _ULPS * torch.finfo(a.dtype).eps
            difference = (a - b).abs_()
            if difference.max() <= rounding:
                continue
            differing += int((~(difference <= rounding * (1 + b.abs()))).sum())
            largest = max(largest, difference.max().item())
    if differing > (total // _ELEMENTS_PER_TURNED_SIGN if is_sign else 0):
        raise WrongResultError(
            f"{what}: {differing} of {total} elements differ by more than rounding, by {largest:g}"
        )


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Keep PyTorch to the calling thread.

    On a busy machine, threads that wait for each other at the end of each of many short operations
    take many times as long as one thread.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _pieces(a: Sequence[Tensor], b: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    for one, other in zip(a, b, strict=True):
        size = _PIECE if one.is_cpu else _DEVICE_PIECE
        yield from zip(one.reshape(-1).split(size), other.reshape(-1).split(size), strict=True)


# ---- memory --------------------------------------------------------------------------------------


def peak_growth(step: Callable[[], object]) -> int | None:
    """Return by how many bytes the process grows at most during a call; None where not known."""
    status = Path("/proc/self/status")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is in use
        before = _kibibytes(status.read_text(), "VmRSS")
        step()
        return max(0, _kibibytes(status.read_text(), "VmHWM") - before) * 1024
    except OSError:
        return None


def _kibibytes(status: str, key: str) -> int:
    (line,) = (line for line in status.splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1])


# ---- reporting -----------------------------------------------------------------------------------


def describe_run() -> dict[str, Any]:
    """Return what a figure must be read with: machine, versions, threads, date and command."""
    script = Path(sys.argv[0])
    return {
        "cpu": cpu_model(),
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "package": _distribution.__version__,
        "instruction_set": native.active_isa() if native is not None else None,
        "roof_compiler": _compiler_version(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", f"{script.parent.name}/{script.name}", *sys.argv[1:]]),
    }


def _compiler_version() -> str | None:
    try:
        answer = subprocess.run([compiler(), "--version"], capture_output=True, text=True)
    except OSError:
        return None
    return answer.stdout.partition("\n")[0] or None


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an aligned table in Markdown; columns from the third on are numbers."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        aligned = (
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join(aligned)} |"

    ruler = ["-" * width if i < 2 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join(map(line, [header, ruler, *rows]))


def format_ratio(ratio: Ratio | None, scale: float = 1.0, digits: int = 2) -> str:
    """Return ``median (p10 to p90)``."""
    if ratio is None:
        return "-"
    median, p10, p90 = (
        f"{value * scale:.{digits}f}" for value in (ratio.median, ratio.p10, ratio.p90)
    )
    return f"{median} ({p10} to {p90})"


def significant(value: float) -> str:
    """Return some three digits that count."""
    return f"{value:.1f}" if value >= 100 else f"{value:.2f}" if value >= 1 else f"{value:.4f}"


def busy_warning(comparisons: Iterable[Comparison]) -> str:
    """Return a paragraph that says so where other processes disturbed the measurement."""
    shares = [comparison.taken_by_others for comparison in comparisons]
    largest = max((share for share in shares if share is not None), default=0.0)
    if largest < _BUSY:
        return ""
    return (
        f"\n\nOther processes used up to {largest:.0%} of the processor time meanwhile: trust the"
        " minima, or better, measure again."
    )


@dataclass
class Verdict:
    """Whether a rule reaches a target."""

    target: str
    rule: str
    wanted: str
    measured: Ratio | float | None
    met: bool


def report_targets(reached: Sequence[Verdict]) -> str:
    """Return the table of the targets."""
    header = ["target", "rule", "wanted", "measured", "of minima", ""]
    rows = []
    for verdict in reached:
        if isinstance(verdict.measured, Ratio):
            measured = [format_ratio(verdict.measured), f"{verdict.measured.of_minima:.2f}"]
        else:
            measured = ["-" if verdict.measured is None else f"{verdict.measured:.4g}", ""]
        met = "met" if verdict.met else "not measured" if verdict.measured is None else "MISSED"
        rows.append([verdict.target, verdict.rule, verdict.wanted, *measured, met])
    return f"\nTargets\n\n{format_table(header, rows)}"


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write a report; dataclasses in it become objects."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, default=asdict) + "\n")
