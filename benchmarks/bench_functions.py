"""The update functions, against the same formulas in PyTorch and against the roof.

    python benchmarks/bench_functions.py                       # all of it, some ten minutes
    python benchmarks/bench_functions.py --quick               # what the targets need, in two
    python benchmarks/bench_functions.py --rules adam lion --shapes 1000x1000 --json build/x.json

Each contender is checked against this package first, then all are timed in turn on the same
tensors; see ``harness.py`` for how. Bytes are those that the algorithm reads and writes.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from contenders import CONTENDERS, Contender, Package, check
from harness import (
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
from problems import RULES, SHAPES, Problem, Rule, Shape
from torch import Tensor

# ---- what is to be reached -----------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """At this shape, the other contender takes at least so many times as long as ours."""

    shape: str
    ours: str
    theirs: str
    at_least: float


TARGETS = (
    Target("large", "package", "roof", 0.90),
    Target("gpt2", "package", "roof", 0.90),
    Target("1000x1000", "package", "compiled", 25.0),
    Target("1000x1000", "package", "foreach", 5.0),
    Target("1000x8", "package", "eager", 25.0),
    Target("single", "package-new", "eager", 2.5),
)
# A call with out= may let the process grow by this part of the gradient's size.
MEMORY_SHAPE = "large"
MEMORY_LIMIT = 0.01


def chosen_contenders(shape: Shape, names: Sequence[str] | None, quick: bool) -> list[Contender]:
    """Return who is measured at a shape. The first one is what the others are compared with."""
    ours = "package-new" if shape.is_single else "package"
    if quick:
        names = [name for t in TARGETS if t.shape == shape.name for name in (t.ours, t.theirs)]
    elif names is None:
        # A list's new updates cost page faults and allocations, not this package's arithmetic; and
        # 8 elements are no bandwidth.
        left_out = "roof" if shape.is_single else "package-new"
        names = [name for name in CONTENDERS if name != left_out]
    return [CONTENDERS[name] for name in dict.fromkeys([ours, *names])]


# ---- measuring -----------------------------------------------------------------------------------


@dataclass
class Result:
    """What was measured of a rule at a shape."""

    rule: Rule
    shape: Shape
    nbytes: int
    ours: str
    comparison: Comparison
    growth: float | None = None

    def figures(self) -> list[dict[str, Any]]:
        """Return the contenders' rows for the JSON report."""
        return [
            {
                "shape": self.shape.name,
                "rule": self.rule.name,
                "contender": name,
                "rounds": len(samples.seconds),
                "calls_per_sample": samples.calls,
                "median_seconds": samples.median,
                "min_seconds": samples.minimum,
                "bytes": self.nbytes,
                "gigabytes_per_second": self.nbytes / samples.median * 1e-9,
                "part_of_roof": self.comparison.ratio("roof", name),
                "compared_with": self.ours,
                "times_as_long": self.comparison.ratio(name, self.ours),
                "processor_taken_by_others": self.comparison.taken_by_others,
            }
            for name, samples in self.comparison.samples.items()
        ]


def measure(rule: Rule, shape: Shape, contenders: Sequence[Contender], budget: float) -> Result:
    """Check the contenders, then time them."""
    print(f"{shape.name}, {rule.name} ...", file=sys.stderr, flush=True)
    contenders = [contender for contender in contenders if contender.has(rule)]
    with one_thread():
        problem = Problem(rule, shape)
    steps = {contender.name: contender.prepare(problem) for contender in contenders}
    check(problem, contenders, steps)
    comparison = compare(steps, budget)
    result = Result(rule, shape, problem.nbytes, contenders[0].name, comparison)
    if shape.name == MEMORY_SHAPE:
        growth = peak_growth(Package().prepare(problem))
        result.growth = None if growth is None else growth / sum(g.nbytes for g in problem.grads)
    return result


# ---- memory on every dense path ------------------------------------------------------------------

# Layouts and dtypes that the CPU engine treats differently from a contiguous float32 tensor.
_SIDE = 4096


def _dense_paths() -> dict[str, list[Tensor]]:
    """Return, for each path, a gradient, two states and an update."""
    flat = [torch.rand(_SIDE * _SIDE + 3) for _ in range(4)]
    square = [tensor[:-3].view(_SIDE, _SIDE) for tensor in flat]
    bfloat16 = [tensor.bfloat16() for tensor in square]
    return {
        "float32, contiguous": square,
        "float32, transposed": [tensor.t() for tensor in square],
        "float32, at odd elements of a buffer": [tensor[3:] for tensor in flat],
        "float32, channels last": [
            tensor.view(64, 64, 64, 64).to(memory_format=torch.channels_last) for tensor in square
        ],
        "bfloat16 gradient and update, float32 states": [
            bfloat16[0],
            *square[1:3],
            bfloat16[3],
        ],
        "bfloat16": bfloat16,
        "float16": [tensor.half() for tensor in square],
        "float64": [tensor.double() for tensor in square],
    }


def measure_dense_paths(rule: Rule) -> dict[str, float | None]:
    """Return by which part of the gradient's size the process grows in a call, path by path."""
    result: dict[str, float | None] = {}
    for name, (grad, *states, update) in _dense_paths().items():

        def step(tensors: tuple[Tensor, ...] = (grad, *states), update: Tensor = update) -> None:
            rule.function(*tensors, *rule.values, out=update)

        step()
        growth = peak_growth(step)
        result[name] = None if growth is None else growth / grad.nbytes
    return result


# ---- reporting -----------------------------------------------------------------------------------


def report_shape(shape: Shape, results: Sequence[Result]) -> str:
    """Return the table of a shape."""
    header = ["rule", "contender", "ms", "min ms", "GB/s", "% of roof", "times ours", "rounds"]
    rows = []
    for result in results:
        for name, samples in result.comparison.samples.items():
            of_roof = result.comparison.ratio("roof", name)
            times_ours = result.comparison.ratio(name, result.ours)
            rows.append(
                [
                    result.rule.name,
                    CONTENDERS[name].title,
                    significant(samples.median * 1e3),
                    significant(samples.minimum * 1e3),
                    f"{result.nbytes / samples.median * 1e-9:.2f}",
                    format_ratio(of_roof, scale=100, digits=0),
                    "1" if name == result.ours else format_ratio(times_ours),
                    str(len(samples.seconds)),
                ]
            )
    warning = busy_warning(result.comparison for result in results)
    return f"\n{shape.title}\n\n{format_table(header, rows)}{warning}"


def verdicts(results: Sequence[Result]) -> list[Verdict]:
    """Return every target that was measured, rule by rule."""
    reached = []
    for target in TARGETS:
        for result in results:
            ratio = result.comparison.ratio(target.theirs, target.ours)
            if result.shape.name != target.shape or ratio is None:
                continue
            title = f"{result.shape.title}: {target.theirs} / {target.ours}"
            wanted = f">= {target.at_least:g}"
            met = ratio.median >= target.at_least
            reached.append(Verdict(title, result.rule.name, wanted, ratio, met))
    for result in results:
        if result.growth is not None:
            title = f"{result.shape.title}: growth of memory / gradient"
            met = result.growth < MEMORY_LIMIT
            wanted = f"< {MEMORY_LIMIT:g}"
            reached.append(Verdict(title, result.rule.name, wanted, result.growth, met))
    return reached


def report_memory(paths: dict[str, float | None]) -> str:
    """Return the table of the dense paths."""
    rows = [[name, "-" if growth is None else f"{growth:.5f}"] for name, growth in paths.items()]
    return f"\nGrowth of memory / gradient\n\n{format_table(['dense path', 'growth'], rows)}"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS)
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


@torch.no_grad()
def main() -> None:
    """Run the suite."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    run = describe_run()
    print("\n".join(f"{key}: {value}" for key, value in run.items()), flush=True)

    results: list[Result] = []
    for shape in (SHAPES[name] for name in arguments.shapes):
        contenders = chosen_contenders(shape, arguments.contenders, arguments.quick)
        of_shape = [
            measure(RULES[name], shape, contenders, arguments.budget) for name in arguments.rules
        ]
        print(report_shape(shape, of_shape), flush=True)
        results += of_shape

    paths: dict[str, float | None] = {}
    if MEMORY_SHAPE in arguments.shapes:
        paths = measure_dense_paths(RULES["adam"])
        print(report_memory(paths))
    reached = verdicts(results)
    print(report_targets(reached) + busy_warning(result.comparison for result in results))
    if arguments.json is not None:
        report = {
            "run": run,
            "budget_seconds": arguments.budget,
            "figures": [figure for result in results for figure in result.figures()],
            "memory": paths,
            "targets": reached,
        }
        write_json(arguments.json, report)


if __name__ == "__main__":
    main()
