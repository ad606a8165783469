"""The optimizers' steps on the CPU, against those of PyTorch and DeepSpeed and against the roof.

    python benchmarks/bench_optimizers.py                      # all of it, some fifteen minutes
    python benchmarks/bench_optimizers.py --quick              # what the targets need, in four
    python benchmarks/bench_optimizers.py --rules adam lion --shapes 1000x1000 --json build/x.json

Each contender is checked first: a few steps against the same steps in float64. Then all are timed
in turn on the same parameters, gradients and states; see ``harness.py`` for how. Many small
parameters are timed in two ways, since what a step costs then depends on the caches: calls back to
back, and single calls, each after a sweep over other memory. Bytes are those that a step reads and
writes. DeepSpeed takes part where it is installed.
"""

import argparse
import gc
import importlib.metadata
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import (
    ColdClock,
    Comparison,
    Verdict,
    busy_warning,
    compare,
    describe_run,
    format_ratio,
    format_table,
    one_thread,
    peak_growth,
    report_targets,
    significant,
    write_json,
)
from problems import RULES, SHAPES, OptimizerProblem, Rule, Shape
from step_contenders import STEP_CONTENDERS, StepContender, check_steps, has_deepspeed

OURS = "package"
ONLY_OURS = tuple(name for name in RULES if name != "adam")

# ---- what is to be reached -----------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """At this shape, the other contender takes at least so many times as long as ours.

    Attributes:
        shape: The shape's name.
        theirs: The other contender's name.
        at_least: The ratio.
        rules: Those that it is for.
        rounds: Fewer are not enough to tell.
        is_cold: Whether it is for single calls, caches cold; else for calls back to back.
    """

    shape: str
    theirs: str
    at_least: float
    rules: Sequence[str] = ("adam",)
    rounds: int = 5
    is_cold: bool = False


TARGETS = (
    Target("gpt2", "fused", 0.97, rounds=31),
    Target("gpt2", "deepspeed", 0.97, rounds=31),
    Target("gpt2", "roof", 0.90, rounds=31),
    Target("gpt2", "roof", 0.90, ONLY_OURS),
    Target("gpt2", "loop", 3.0, ONLY_OURS),
    Target("large", "fused", 0.97, rounds=31),
    Target("large", "deepspeed", 0.97, rounds=31),
    Target("large", "roof", 0.90, rounds=31),
    Target("1000x1000", "fused", 8.0, rounds=31),
    Target("1000x8", "fused", 13.0, rounds=31),
    Target("1000x1000", "fused", 8.0, rounds=31, is_cold=True),
    Target("1000x8", "fused", 13.0, rounds=31, is_cold=True),
)
# A step may let the process grow by this part of the parameters' size.
MEMORY_SHAPE = "large"
MEMORY_LIMIT = 0.001

# The shapes at which a step is bound by memory's bandwidth, whatever the caches hold.
OUT_OF_CACHE = ("gpt2", "large")


def targets_at(rule: Rule, shape: Shape) -> list[Target]:
    """Return the targets for a rule at a shape."""
    return [t for t in TARGETS if t.shape == shape.name and rule.name in t.rules]


def chosen_contenders(
    rule: Rule, shape: Shape, names: Sequence[str] | None, quick: bool
) -> list[StepContender]:
    """Return who is measured, ours first."""
    if quick:
        names = [target.theirs for target in targets_at(rule, shape)]
    chosen = STEP_CONTENDERS if names is None else [OURS, *names]
    return [c for name, c in STEP_CONTENDERS.items() if name in chosen and c.has(rule)]


# ---- measuring -----------------------------------------------------------------------------------


@dataclass
class Result:
    """What was measured of a rule at a shape.

    Attributes:
        rule: The rule.
        shape: The shape.
        nbytes: Bytes that a step moves.
        comparison: Calls back to back.
        cold: Single calls, caches cold; where the shape leaves a difference.
        growth: By which part of the parameters' size the process grows in a step of ours.
    """

    rule: Rule
    shape: Shape
    nbytes: int
    comparison: Comparison
    cold: Comparison | None = None
    growth: float | None = None

    @property
    def comparisons(self) -> dict[str, Comparison]:
        """What was measured, by the way of timing."""
        cold = {} if self.cold is None else {"single calls, caches cold": self.cold}
        return {"back to back": self.comparison, **cold}

    def figures(self) -> list[dict[str, Any]]:
        """Return the contenders' rows for the JSON report."""
        return [
            {
                "shape": self.shape.name,
                "rule": self.rule.name,
                "optimizer": self.rule.optimizer.__name__,
                "contender": name,
                "timing": timing,
                "rounds": len(samples.seconds),
                "calls_per_sample": samples.calls,
                "median_seconds": samples.median,
                "min_seconds": samples.minimum,
                "bytes": self.nbytes,
                "gigabytes_per_second": self.nbytes / samples.median * 1e-9,
                "part_of_roof": comparison.ratio("roof", name),
                "compared_with": OURS,
                "times_as_long": comparison.ratio(name, OURS),
                "processor_taken_by_others": comparison.taken_by_others,
            }
            for timing, comparison in self.comparisons.items()
            for name, samples in comparison.samples.items()
        ]


def measure(rule: Rule, shape: Shape, contenders: Sequence[StepContender], budget: float) -> Result:
    """Check the contenders, then time them."""
    print(f"{shape.name}, {rule.name} ...", file=sys.stderr, flush=True)
    gc.collect()  # the tensors of the last problem
    with one_thread():
        problem = OptimizerProblem(rule, shape)
    steps = {contender.name: contender.prepare(problem) for contender in contenders}
    check_steps(problem, contenders, steps)
    min_rounds = {t.theirs: t.rounds for t in targets_at(rule, shape) if t.theirs in steps}
    result = Result(rule, shape, problem.nbytes, compare(steps, budget, min_rounds=min_rounds))
    if shape.name not in OUT_OF_CACHE:
        result.cold = compare(steps, budget, ColdClock(), min_rounds)
    if shape.name == MEMORY_SHAPE:
        growth = peak_growth(steps[OURS])
        result.growth = None if growth is None else growth / sum(p.nbytes for p in problem.params)
    return result


# ---- reporting -----------------------------------------------------------------------------------


def report_shape(shape: Shape, results: Sequence[Result]) -> str:
    """Return the table of a shape."""
    header = ["optimizer", "contender", "ms", "min ms", "GB/s", "% of roof", "times ours", "rounds"]
    has_cold = any(result.cold is not None for result in results)
    if has_cold:
        header += ["cold: ms", "times ours"]
    rows = []
    for result in results:
        for name, samples in result.comparison.samples.items():
            row = [
                result.rule.optimizer.__name__,
                STEP_CONTENDERS[name].title,
                significant(samples.median * 1e3),
                significant(samples.minimum * 1e3),
                f"{result.nbytes / samples.median * 1e-9:.2f}",
                format_ratio(result.comparison.ratio("roof", name), scale=100, digits=0),
                times_ours(result.comparison, name),
                str(len(samples.seconds)),
            ]
            if result.cold is not None:
                row.append(significant(result.cold.samples[name].median * 1e3))
                row.append(times_ours(result.cold, name))
            rows.append(row)
    warning = busy_warning(c for result in results for c in result.comparisons.values())
    return f"\n{shape.title}\n\n{format_table(header, rows)}{warning}"


def times_ours(comparison: Comparison, name: str) -> str:
    """Return a cell: how many times as long as ours a contender takes."""
    return "1" if name == OURS else format_ratio(comparison.ratio(name, OURS))


def verdicts(results: Sequence[Result], names: Sequence[str]) -> list[Verdict]:
    """Return every target of the contenders that were asked for.

    One whose contender is not installed is not measured.
    """
    reached = []
    for target in TARGETS:
        for result in results:
            if target not in targets_at(result.rule, result.shape) or target.theirs not in names:
                continue
            optimizer = result.rule.optimizer.__name__
            title = f"{result.shape.title}: {target.theirs} / {OURS}"
            comparison = result.comparison
            if target.is_cold:
                assert result.cold is not None
                title, comparison = f"{title}, caches cold", result.cold
            wanted = f">= {target.at_least:g}"
            ratio = comparison.ratio(target.theirs, OURS)
            met = ratio is not None and ratio.median >= target.at_least
            reached.append(Verdict(title, optimizer, wanted, ratio, met))
    for result in results:
        if result.growth is not None:
            title = f"{result.shape.title}: growth of memory / parameters"
            met = result.growth < MEMORY_LIMIT
            wanted = f"< {MEMORY_LIMIT:g}"
            optimizer = result.rule.optimizer.__name__
            reached.append(Verdict(title, optimizer, wanted, result.growth, met))
    return reached


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    shapes = [shape.name for shape in SHAPES.values() if not shape.is_single]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--shapes", nargs="+", choices=shapes, default=shapes)
    parser.add_argument("--contenders", nargs="+", choices=STEP_CONTENDERS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, help="seconds per shape and rule (default 8)")
    parser.add_argument("--quick", action="store_true", help="only what the targets compare")
    parser.add_argument("--json", type=Path, help="where to write every figure")
    arguments = parser.parse_args()
    if arguments.quick and arguments.contenders:
        parser.error("--quick chooses the contenders; leave out --contenders")
    if arguments.budget is None:
        arguments.budget = 1.0 if arguments.quick else 8.0
    return arguments


def main() -> None:
    """Run the suite."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    deepspeed = importlib.metadata.version("deepspeed") if has_deepspeed() else "not installed"
    run = {**describe_run(), "deepspeed": deepspeed}
    print("\n".join(f"{key}: {value}" for key, value in run.items()), flush=True)

    results: list[Result] = []
    for shape in (SHAPES[name] for name in arguments.shapes):
        of_shape = []
        for rule in (RULES[name] for name in arguments.rules):
            if arguments.quick and not targets_at(rule, shape) and shape.name != MEMORY_SHAPE:
                continue
            contenders = chosen_contenders(rule, shape, arguments.contenders, arguments.quick)
            of_shape.append(measure(rule, shape, contenders, arguments.budget))
        if of_shape:
            print(report_shape(shape, of_shape), flush=True)
        results += of_shape

    reached = verdicts(results, arguments.contenders or list(STEP_CONTENDERS))
    warning = busy_warning(c for result in results for c in result.comparisons.values())
    print(report_targets(reached) + warning)
    if arguments.json is not None:
        report = {
            "run": run,
            "budget_seconds": arguments.budget,
            "figures": [figure for result in results for figure in result.figures()],
            "targets": reached,
        }
        write_json(arguments.json, report)


if __name__ == "__main__":
    main()
