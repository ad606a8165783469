"""How much the addresses of a step's operands, relative to each other, change its time.

    python benchmarks/bench_offsets.py                                # all rules, in 15 minutes
    python benchmarks/bench_offsets.py --rules adam --json build/bench_offsets.json
    python benchmarks/bench_offsets.py --rules adam --elements 50000  # in the caches

A processor may take a load for one of what an earlier store has written if their addresses have the
same low 12 bits; the load then waits. So a step must be as fast wherever its parameter, gradient
and states are, modulo 4096 bytes. They are views of one buffer here, at the same pages for each
offset. All offsets are timed in turn, and compared by the ratio of their time to the median of all
offsets in the same round. Each is checked first: the bits are those of tensors of their own.

The extremes of many medians are some percent apart by chance alone, as the control shows, in which
nothing is moved. So the best and the worst offset are chosen by one half of the rounds, and
compared in the other half.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import (
    Comparison,
    Verdict,
    WrongResultError,
    busy_warning,
    compare,
    describe_run,
    format_table,
    report_targets,
    significant,
    write_json,
)
from problems import RULES, OptimizerProblem, Rule, Shape
from step_contenders import STEP_CONTENDERS
from torch import Tensor

PAGE = 4096
# The best offset takes at least this part of the time of the worst one.
WANTED = 0.95
CHECKED_ELEMENTS = 140_001  # so long that a thread's share is swept as a large row is

# ---- where operands are --------------------------------------------------------------------------

CONTROL = "none"  # nothing is moved
# By how many times the offset each operand is moved: of the gradient, the parameter and the states.
MOVES: dict[str, Callable[[int], Sequence[int]]] = {
    CONTROL: lambda count: [0] * count,
    "each": lambda count: range(count),  # further than the one before it
    "gradient": lambda count: [1] + [0] * (count - 1),
    "parameter": lambda count: [0, 1] + [0] * (count - 2),
    "state": lambda count: [0] * (count - 1) + [1],  # the last one
}


class Operands:
    """A parameter, its gradient and its states, in one buffer.

    Attributes:
        problem: What is computed, on tensors of a single element.
        elements: Of each operand.
    """

    def __init__(self, rule: Rule, elements: int) -> None:
        """Fill the memory of each operand with one value."""
        self.problem = OptimizerProblem(rule, Shape("one", "one element", [(1,)]))
        self.elements = elements
        values = [self.problem.grads, *self.problem.modified]
        self._count = len(values)
        pages = -(-elements * 4 // PAGE) + self._count
        self._room = pages * PAGE // 4
        buffer = torch.empty(self._count * self._room + PAGE // 4)
        self._buffer = buffer[-buffer.data_ptr() % PAGE // 4 :]
        for k, (value,) in enumerate(values):
            self._buffer[k * self._room : (k + 1) * self._room] = value

    def at(self, move: str, offset: int) -> OptimizerProblem:
        """Return the problem on operands that are moved by so many bytes, modulo 4096."""
        factors = iter(enumerate(MOVES[move](self._count)))

        def place(_: list[Tensor]) -> list[Tensor]:
            k, factor = next(factors)
            begin = k * self._room + factor * offset % PAGE // 4
            return [self._buffer[begin : begin + self.elements]]

        return self.problem.mapped(place)


def check(rule: Rule, move: str, offsets: Sequence[int]) -> None:
    """Raise where an offset changes any bit."""
    given = OptimizerProblem(rule, Shape("checked", "checked", [(CHECKED_ELEMENTS,)]))
    separate = given.mapped(lambda tensors: [tensor.clone() for tensor in tensors])
    _step_of(separate)()
    operands = Operands(rule, CHECKED_ELEMENTS)
    for offset in offsets:
        moved = operands.at(move, offset)
        for to, from_ in zip(_tensors(moved), _tensors(given), strict=True):
            to.copy_(from_)
        _step_of(moved)()
        for actual, expected in zip(_tensors(moved), _tensors(separate), strict=True):
            if not torch.equal(actual.view(torch.int32), expected.view(torch.int32)):
                raise WrongResultError(f"{rule.name}: other bits at {offset} bytes ({move})")


def _tensors(problem: OptimizerProblem) -> Iterator[Tensor]:
    for tensors in (problem.grads, *problem.modified):
        yield from tensors


def _step_of(problem: OptimizerProblem) -> Callable[[], object]:
    return STEP_CONTENDERS["package"].prepare(problem)


# ---- measuring -----------------------------------------------------------------------------------


@dataclass
class Result:
    """What was measured of a rule, one operand or all of them being moved."""

    rule: Rule
    move: str
    comparison: Comparison

    def times(self, first: int = 0, every: int = 1) -> dict[int, float]:
        """Return each offset's time, relative to the median of all offsets in the same round.

        It is the median of the rounds from `first` on, at intervals of `every`.
        """
        samples = self.comparison.samples
        full = set.intersection(*(set(taken.seconds) for taken in samples.values()))
        middle = {
            i: statistics.median(taken.seconds[i] for taken in samples.values())
            for i in sorted(full)[first::every]
        }
        return {
            int(name): statistics.median(taken.seconds[i] / middle[i] for i in middle)
            for name, taken in samples.items()
        }

    def best_over_worst(self) -> float:
        """Return the best offset's time over the worst one's, in other rounds than chose them."""
        even, odd = self.times(0, 2), self.times(1, 2)
        ratios = [
            timed[min(chosen, key=chosen.__getitem__)] / timed[max(chosen, key=chosen.__getitem__)]
            for chosen, timed in ((even, odd), (odd, even))
        ]
        return statistics.geometric_mean(ratios)

    def extremes(self) -> float:
        """Return the shortest time over the longest one, with what chance adds to both."""
        times = self.times().values()
        return min(times) / max(times)

    def figure(self) -> dict[str, Any]:
        """Return the row for the JSON report."""
        samples = self.comparison.samples
        first = next(iter(samples.values()))
        return {
            "rule": self.rule.name,
            "moved": self.move,
            "rounds": len(first.seconds),
            "calls_per_sample": first.calls,
            "processor_taken_by_others": self.comparison.taken_by_others,
            "best_over_worst": self.best_over_worst(),
            "extremes": self.extremes(),
            # By offset.
            "relative_times": {at: round(time, 4) for at, time in self.times().items()},
            "min_seconds": {int(name): taken.minimum for name, taken in samples.items()},
        }


def measure(rule: Rule, move: str, elements: int, offsets: Sequence[int], budget: float) -> Result:
    """Check the offsets, then time them."""
    print(f"{rule.name}, {move} ...", file=sys.stderr, flush=True)
    check(rule, move, offsets)
    operands = Operands(rule, elements)
    steps = {str(offset): _step_of(operands.at(move, offset)) for offset in offsets}
    for step in steps.values():
        step()
    return Result(rule, move, compare(steps, budget))


# ---- reporting -----------------------------------------------------------------------------------


def report(results: Sequence[Result]) -> str:
    """Return the table of the best and the worst offsets."""
    header = ["rule", "moved", "ms", "best at", "worst at", "best / worst", "extremes", "rounds"]
    rows = []
    for result in results:
        times = result.times()
        best, worst = min(times, key=times.__getitem__), max(times, key=times.__getitem__)
        samples = result.comparison.samples
        rows.append(
            [
                result.rule.name,
                result.move,
                significant(samples[str(best)].median * 1e3),
                str(best),
                str(worst),
                f"{result.best_over_worst():.3f}",
                f"{result.extremes():.3f}",
                str(len(samples[str(best)].seconds)),
            ]
        )
    return f"\n{format_table(header, rows)}"


def verdicts(results: Sequence[Result]) -> list[Verdict]:
    """Return whether the worst offset is as fast as wanted, rule by rule."""
    reached = []
    for result in results:
        if result.move == CONTROL:
            continue
        ratio = result.best_over_worst()
        title = f"best / worst offset, moved: {result.move}"
        met = ratio >= WANTED
        reached.append(Verdict(title, result.rule.name, f">= {WANTED:g}", ratio, met))
    return reached


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--move", nargs="+", choices=MOVES, default=[CONTROL, "each", "parameter"])
    parser.add_argument("--elements", type=int, default=16 * 1024 * 1024, help="of each operand")
    parser.add_argument("--every", type=int, default=64, help="bytes from offset to offset")
    parser.add_argument("--below", type=int, default=PAGE, help="offsets are less than this")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds per rule and move")
    parser.add_argument("--json", type=Path, help="where to write every figure")
    arguments = parser.parse_args()
    if arguments.every % 4:
        parser.error("--every must be a multiple of 4 bytes, the size of an element")
    return arguments


@torch.no_grad()
def main() -> None:
    """Run the suite."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    run = describe_run()
    print("\n".join(f"{key}: {value}" for key, value in run.items()), flush=True)
    offsets = range(0, arguments.below, arguments.every)
    results = [
        measure(RULES[name], move, arguments.elements, offsets, arguments.budget)
        for name in arguments.rules
        for move in arguments.move
    ]
    print(report(results) + busy_warning(result.comparison for result in results))
    reached = verdicts(results)
    print(report_targets(reached))
    if arguments.json is not None:
        write_json(
            arguments.json,
            {
                "run": run,
                "elements": arguments.elements,
                "budget_seconds": arguments.budget,
                "figures": [result.figure() for result in results],
                "targets": reached,
            },
        )


if __name__ == "__main__":
    main()
