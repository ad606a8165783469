"""AdamW steps that clip the gradients by their norm, on the CPU, against ``clip_grad_norm_``.

    python benchmarks/bench_clipping.py                        # all of it, some three minutes
    python benchmarks/bench_clipping.py --shapes 1000x1000 --json build/clipping.json

Each contender computes the norm of all gradients and takes a step with the clipped ones; all work
on the same tensors and take turns, see ``harness.py``. Each is checked first against float64, with
gradients that are clipped to half their norm.

``clip_grad_norm_`` scales the gradients in place, so that they would soon not be clipped any more.
In the timed calls, `max_norm` is therefore a thousandth below the norm that the gradients have by
then: each call clips, and each of ``clip_grad_norm_`` shrinks the gradients by as much.
"""

import argparse
import gc
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import (
    ColdClock,
    Comparison,
    Verdict,
    busy_warning,
    check_close,
    compare,
    describe_run,
    format_ratio,
    format_table,
    one_thread,
    report_targets,
    significant,
    write_json,
)
from problems import RULES, SHAPES, OptimizerProblem, Shape
from step_contenders import STEP_CONTENDERS
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from emerging_optimizers import clip_coefficient

OURS = "max_norm"
TITLES = {
    OURS: "`step(max_norm=...)`",
    "coefficient": "`clip_coefficient`, `step(grad_multiplier=...)`",
    "in_place": "`clip_grad_norm_`, our step",
    "fused": "`clip_grad_norm_`, `torch.optim.AdamW(fused=True)`",
    "unclipped": "our step without clipping",
}
NAMES = ("gpt2", "1000x1000", "1000x8")
BACK_TO_BACK, COLD = "back to back", "caches cold"
# At these shapes, the other contender takes at least so many times as long as ours.
TARGETS = (
    ("gpt2", "in_place", BACK_TO_BACK, 1.2),
    ("gpt2", "fused", BACK_TO_BACK, 1.35),
    ("1000x1000", "fused", BACK_TO_BACK, 5.0),
    ("1000x1000", "fused", COLD, 5.0),
)
MIN_ROUNDS = 31
CHECKED_STEPS = 3  # of `StepContender.expect`


@dataclass
class Clipper:
    """The norm that the gradients have, and the part of it that they are clipped to."""

    norm: float
    fraction: float = 1 - 1e-3

    def max_norm(self) -> float:
        """Return what the next call clips to."""
        return self.norm * self.fraction

    def clip_in_place(self, params: Sequence[Tensor]) -> None:
        """Clip, and remember the norm that results."""
        max_norm = self.norm * self.fraction
        clip_grad_norm_(params, max_norm)
        self.norm = max_norm


def norm_of(grads: Sequence[Tensor]) -> float:
    """Return the norm of all gradients, from their sums of squares in float64."""
    return math.sqrt(math.fsum(float(g.double().square().sum()) for g in grads))


def prepare(problem: OptimizerProblem, clipper: Clipper) -> dict[str, Callable[[], object]]:
    """Return one call of each contender, ours first."""
    params = problem.params

    def new_step(name: str = "package") -> Callable[..., object]:
        # Each contender has an optimizer with a counter of its own.
        return STEP_CONTENDERS[name].prepare(problem)

    clipped, multiplied, after, fused = new_step(), new_step(), new_step(), new_step("fused")

    def by_coefficient() -> None:
        multiplied(grad_multiplier=clip_coefficient(params, clipper.max_norm()).coefficient)

    def in_place() -> None:
        clipper.clip_in_place(params)
        after()

    def in_place_and_fused() -> None:
        clipper.clip_in_place(params)
        fused()

    return {
        OURS: lambda: clipped(max_norm=clipper.max_norm()),
        "coefficient": by_coefficient,
        "in_place": in_place,
        "fused": in_place_and_fused,
        "unclipped": new_step(),
    }


def check(
    problem: OptimizerProblem, clipper: Clipper, steps: Mapping[str, Callable[[], object]]
) -> None:
    """Raise unless a few steps that clip to half the norm are those of float64.

    The norm of ``clip_grad_norm_`` is a sum in float32: its steps are compared with those that take
    the gradients that it has clipped.
    """
    norm = clipper.norm
    grads = [grad.clone() for grad in problem.grads]
    initial = [[tensor.clone() for tensor in tensors] for tensors in problem.modified]
    clipper.fraction = 0.5
    for names, clip in (
        ((OURS, "coefficient"), lambda: torch._foreach_mul_(problem.grads, 0.5)),
        (("in_place", "fused"), lambda: clipper.clip_in_place(problem.params)),
    ):
        clip()
        with one_thread():
            expected = STEP_CONTENDERS["package"].expect(problem)
        for name in names:
            _copy(problem.modified, initial)
            for _ in range(CHECKED_STEPS):
                _copy([problem.grads], [grads])
                clipper.norm = norm
                steps[name]()
            for label, actual, wanted in zip(
                ("param", *problem.rule.states), problem.modified, expected, strict=True
            ):
                check_close(f"{name} at {problem.shape.name}: {label}", actual, wanted)
        _copy([problem.grads, *problem.modified], [grads, *initial])
        clipper.norm = norm
    clipper.norm, clipper.fraction = norm, Clipper.fraction


def _copy(lists: Sequence[Sequence[Tensor]], values: Sequence[Sequence[Tensor]]) -> None:
    for tensors, new in zip(lists, values, strict=True):
        torch._foreach_copy_(list(tensors), list(new))


def measure(shape: Shape, budget: float) -> dict[str, Comparison]:
    """Check the contenders, then time them: back to back, and at small tensors with cold caches."""
    print(f"{shape.name} ...", file=sys.stderr, flush=True)
    gc.collect()  # the tensors of the last problem
    with one_thread():
        problem = OptimizerProblem(RULES["adam"], shape)
    clipper = Clipper(norm_of(problem.grads))
    steps = prepare(problem, clipper)
    check(problem, clipper, steps)
    min_rounds = dict.fromkeys(steps, MIN_ROUNDS)
    comparisons = {BACK_TO_BACK: compare(steps, budget, min_rounds=min_rounds)}
    if shape.name != "gpt2":  # which no cache holds
        comparisons[COLD] = compare(steps, budget, ColdClock(), min_rounds)
    return comparisons


def report_shape(shape: Shape, comparisons: Mapping[str, Comparison]) -> str:
    """Return the table of a shape."""
    header = ["timing", "contender", "ms", "min ms", "times ours", "rounds"]
    rows = [
        [
            timing,
            TITLES[name],
            significant(samples.median * 1e3),
            significant(samples.minimum * 1e3),
            "1" if name == OURS else format_ratio(comparison.ratio(name, OURS)),
            str(len(samples.seconds)),
        ]
        for timing, comparison in comparisons.items()
        for name, samples in comparison.samples.items()
    ]
    return f"\n{shape.title}\n\n{format_table(header, rows)}{busy_warning(comparisons.values())}"


def verdicts(results: Mapping[str, Mapping[str, Comparison]]) -> list[Verdict]:
    """Return whether the targets of the measured shapes are reached."""
    reached = []
    for shape, theirs, timing, at_least in TARGETS:
        if shape in results:
            ratio = results[shape][timing].ratio(theirs, OURS)
            met = ratio is not None and ratio.median >= at_least
            title = f"{SHAPES[shape].title}, {timing}: {theirs} / {OURS}"
            reached.append(Verdict(title, "AdamW", f">= {at_least:g}", ratio, met))
    return reached


def figures(results: Mapping[str, Mapping[str, Comparison]]) -> list[dict[str, Any]]:
    """Return the contenders' rows for the JSON report."""
    return [
        {
            "shape": shape,
            "contender": name,
            "timing": timing,
            "rounds": len(samples.seconds),
            "calls_per_sample": samples.calls,
            "median_seconds": samples.median,
            "min_seconds": samples.minimum,
            "compared_with": OURS,
            "times_as_long": comparison.ratio(name, OURS),
            "processor_taken_by_others": comparison.taken_by_others,
        }
        for shape, comparisons in results.items()
        for timing, comparison in comparisons.items()
        for name, samples in comparison.samples.items()
    ]


def main() -> None:
    """Run the suite."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=30.0, help="seconds per table (default 30)")
    parser.add_argument("--json", type=Path, help="where to write every figure")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    run = describe_run()
    print("\n".join(f"{key}: {value}" for key, value in run.items()), flush=True)
    results = {}
    for name in arguments.shapes:
        results[name] = measure(SHAPES[name], arguments.budget)
        print(report_shape(SHAPES[name], results[name]), flush=True)
    reached = verdicts(results)
    print(report_targets(reached))
    if arguments.json is not None:
        report = {"run": run, "figures": figures(results), "targets": reached}
        write_json(arguments.json, {**report, "budget_seconds": arguments.budget})


if __name__ == "__main__":
    main()
