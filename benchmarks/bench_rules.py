"""Rules written in Python: their speed, and what defining and building them takes.

    python benchmarks/bench_rules.py                           # all of it, some eight minutes
    python benchmarks/bench_rules.py --shapes 1000x8 --json build/rules.json

Adam, written in Python, is compared with the package's Adam: calls of the update function with
``out=``, and steps of the optimizer. ADOPT and RAdam (``examples/rules``) are compared with the
roof, with a loop of PyTorch operations over the tensors, and with the formula under
``torch.compile``, tensor by tensor. Each contender is checked first, and all of a table are timed
in turn; see ``harness.py``. The last table is the distance between a rule and its formula in
PyTorch's float32 operations, over 20 steps from the same states.
"""

import argparse
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import (
    Comparison,
    Ratio,
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
from problems import SHAPES, Shape
from roof import prepare_roof
from torch import Tensor, nn

import emerging_optimizers as eo
from emerging_optimizers.scalar_optimizers import calculate_adam_update

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "rules"))
from adabelief import adabelief
from adan import adan
from adopt import Adopt, adopt
from cautious_adam import cautious_adam
from radam import RAdam, radam

OURS = "rule"
STEP = 1000
BETAS = (0.9, 0.999)
EPS = 1e-8
NAMES = ("large", "gpt2", "1000x1000", "1000x8")


@eo.rule
def adam(grad, exp_avg, exp_avg_sq, *, betas=BETAS, eps=EPS, step):
    """Return Adam's update."""
    beta1, beta2 = betas
    exp_avg = beta1 * exp_avg + (1 - beta1) * grad
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad * grad
    denominator = (exp_avg_sq / (1 - beta2**step)).sqrt() + eps
    return exp_avg / (1 - beta1**step) / denominator, exp_avg, exp_avg_sq


class Adam(eo.ScalarOptimizer, rule=adam, lr=1e-2):
    """Adam, by the rule."""


class Operands:
    """The tensors that all contenders of a table work on."""

    def __init__(self, shape: Shape) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal() -> list[Tensor]:
            return [torch.randn(size, generator=generator) for size in shape.sizes]

        self.grads = normal()
        self.exp_avgs = [tensor.mul_(0.1) for tensor in normal()]
        self.exp_avg_sqs = [tensor.square_().add_(0.1) for tensor in normal()]
        self.updates = [torch.zeros(size) for size in shape.sizes]

    @property
    def lists(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The gradients and the states."""
        return self.grads, self.exp_avgs, self.exp_avg_sqs

    def optimizer(self, cls: Any, **arguments: Any) -> Any:
        """Return an optimizer that has done many steps. Its parameters are the updates."""
        params = [nn.Parameter(update) for update in self.updates]
        for param, grad in zip(params, self.grads, strict=True):
            param.grad = grad
        optimizer = cls(params, lr=1e-2, **arguments)
        for param, average, square in zip(params, self.exp_avgs, self.exp_avg_sqs, strict=True):
            step = torch.tensor(float(STEP))
            optimizer.state[param] = {"step": step, "exp_avg": average, "exp_avg_sq": square}
        return optimizer

    def after(self, call: Callable[[], object]) -> list[Tensor]:
        """Return the modified tensors after a call; they are then as they were."""
        modified = [*self.updates, *self.exp_avgs, *self.exp_avg_sqs]
        before = [tensor.clone() for tensor in modified]
        call()
        after = [tensor.clone() for tensor in modified]
        for tensor, saved in zip(modified, before, strict=True):
            tensor.copy_(saved)
        return after


def loop_of(rule: Any, operands: Operands, *, is_compiled: bool = False) -> Callable[[], None]:
    """Return a loop over the tensors that applies the formula as it is written.

    Args:
        rule: The rule.
        operands: The tensors.
        is_compiled: Under ``torch.compile``, with the stores. The step number is a constant there:
            as an argument, it would make PyTorch compile again.
    """

    def apply(grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, update: Tensor) -> None:
        result = rule.formula(grad, exp_avg, exp_avg_sq, step=STEP)
        if isinstance(result, tuple):
            result, new_average, new_square = result
            exp_avg.copy_(new_average)
            exp_avg_sq.copy_(new_square)
        update.copy_(result)

    rows = list(zip(*operands.lists, operands.updates, strict=True))
    call: Any = torch.compile(apply, fullgraph=True) if is_compiled else apply

    @torch.no_grad()
    def run() -> None:
        for row in rows:
            call(*row)

    return run


# ---- the tables ----------------------------------------------------------------------------------


def function_of(rule: Any, operands: Operands) -> Callable[[], object]:
    """Return a call of a rule."""
    grads, exp_avgs, exp_avg_sqs = operands.lists
    return lambda: rule(grads, exp_avgs, exp_avg_sqs, step=STEP, out=operands.updates)


def built_in_function(operands: Operands) -> Callable[[], object]:
    """Return a call of the package's Adam."""
    arguments = (*operands.lists, BETAS, True, False, STEP, EPS)
    return lambda: calculate_adam_update(*arguments, out=operands.updates)


def adam_tables(shape: Shape, budget: float) -> dict[str, Comparison]:
    """Compare Adam in Python with the package's."""
    operands = Operands(shape)
    steps = {OURS: function_of(adam, operands), "built in": built_in_function(operands)}
    _check(f"adam, {shape.name}", operands, steps)
    tables = {"function": compare(steps, budget, min_rounds={"built in": 31})}
    optimizers = {OURS: operands.optimizer(Adam), "built in": operands.optimizer(eo.Adam)}
    steps = {name: optimizer.step for name, optimizer in optimizers.items()}
    _check(f"Adam, {shape.name}", operands, steps)
    tables["step"] = compare(steps, budget, min_rounds={"built in": 31})
    return tables


def other_tables(rule: Any, cls: Any, shape: Shape, budget: float) -> dict[str, Comparison]:
    """Compare a rule with the roof, or with formulas."""
    operands = Operands(shape)
    steps = {OURS: function_of(rule, operands)}
    if shape.name == "1000x1000":
        steps["loop"] = loop_of(rule, operands)
        steps["compiled"] = loop_of(rule, operands, is_compiled=True)
        _check(f"{rule.name}, {shape.name}", operands, steps)
        return {"function": compare(steps, budget)}
    steps["roof"] = prepare_roof(
        operands.grads, [operands.exp_avgs, operands.exp_avg_sqs], operands.updates
    )
    tables = {"function": compare(steps, budget, min_rounds={"roof": 31})}
    step = {OURS: operands.optimizer(cls).step}
    modified = [operands.updates, operands.exp_avgs, operands.exp_avg_sqs]
    step["roof"] = prepare_roof(operands.grads, modified)
    step[OURS]()
    tables["step"] = compare(step, budget, min_rounds={"roof": 31})
    return tables


def _check(what: str, operands: Operands, steps: dict[str, Callable[[], object]]) -> None:
    with one_thread():
        wanted = operands.after(steps[OURS])
        for name, step in steps.items():
            check_close(f"{what}, {name}", operands.after(step), wanted)


# ---- definition, build, next process -------------------------------------------------------------

_PROGRAM = """
import time
import torch
import emerging_optimizers as eo
import runpy, sys
eo.rule  # what only rules need is imported
start = time.perf_counter()
namespace = runpy.run_path(sys.argv[1])
defined = time.perf_counter()
namespace[sys.argv[2]].compile()
print(defined - start, time.perf_counter() - defined)
"""


def measure_build() -> dict[str, float]:
    """Return seconds: definition, the first use and the use in the next process (medians)."""
    path = Path(adopt.formula.__code__.co_filename)
    with tempfile.TemporaryDirectory() as folder:

        def run() -> tuple[float, float]:
            answer = subprocess.run(
                [sys.executable, "-c", _PROGRAM, str(path), adopt.name],
                check=True,
                capture_output=True,
                text=True,
                env=os.environ | {"TORCH_EXTENSIONS_DIR": folder},
            )
            defined, compiled = map(float, answer.stdout.split())
            return defined, compiled

        first = run()
        later = [run() for _ in range(5)]
    return {
        "definition": statistics.median(defined for defined, _ in [first, *later]),
        "first native use": first[1],
        "use in the next process": statistics.median(compiled for _, compiled in later),
    }


# ---- the distance from PyTorch's float32 ---------------------------------------------------------

_ELEMENTS = 1 << 16
_STEPS = 20


def measure_distance(rule: Any) -> dict[str, float]:
    """Compare updates with those of the formula in PyTorch's float32, from the same states.

    Returns:
        The part of the updates that are equal, and percentiles of the distance in units of the last
        place.
    """
    generator = torch.Generator().manual_seed(0)
    states = [torch.zeros(_ELEMENTS) for _ in rule.states]
    scalars = {name: torch.tensor(first) for name, first in rule.scalar_states.items()}
    distances = []
    for step in range(1, _STEPS + 1):
        grad = torch.randn(_ELEMENTS, generator=generator)
        grad *= 10.0 ** torch.randint(-3, 2, (_ELEMENTS,), generator=generator)
        values = {"step": step} if rule.signature.has_step else {}
        before = [state.clone() for state in states]
        scalars_before = {name: scalar.clone() for name, scalar in scalars.items()}
        update = rule(grad, *states, **values, **scalars)
        values |= rule.signature.defaults | scalars_before
        wanted = rule.compute_update(grad, before, values)
        if wanted is not None:
            distances.append((_ordered(update) - _ordered(wanted)).abs())
    all_distances = torch.cat(distances).double()
    return {
        "equal": float((all_distances == 0).double().mean()),
        "p99": float(all_distances.quantile(0.99)),
        "p99.9": float(all_distances.quantile(0.999)),
    }


def _ordered(values: Tensor) -> Tensor:
    """Number the float32 numbers in ascending order."""
    bits = values.view(torch.int32).to(torch.int64)
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def report_distances(distances: dict[str, dict[str, float]]) -> str:
    """Return the table of distances."""
    rows = [
        [name, "", f"{d['equal']:.1%}", f"{d['p99']:.0f}", f"{d['p99.9']:.0f}"]
        for name, d in distances.items()
    ]
    header = ["rule", "", "equal updates", "99 %: ulp", "99.9 %: ulp"]
    return f"\nDistance from PyTorch's float32\n\n{format_table(header, rows)}"


# ---- the report ----------------------------------------------------------------------------------

_SECONDS = {"definition": 0.020, "first native use": 10.0, "use in the next process": 0.050}


def report(shape: Shape, rule: str, tables: dict[str, Comparison]) -> str:
    """Return the table of a rule at a shape."""
    header = ["what", "contender", "ms", "times the rule's", "rounds"]
    rows = [
        [
            what,
            name,
            significant(samples.median * 1e3),
            format_ratio(comparison.ratio(name, OURS)),
            str(len(samples.seconds)),
        ]
        for what, comparison in tables.items()
        for name, samples in comparison.samples.items()
    ]
    return f"\n{rule}, {shape.title}\n\n{format_table(header, rows)}"


def verdict(rule: str, shape: Shape, what: str, ratio: Ratio | None, name: str) -> Verdict:
    """Return whether a rule is as fast as it should be."""
    at_least = {"built in": 0.97, "roof": 0.9, "loop": 15.0, "compiled": 10.0}[name]
    met = ratio is not None and ratio.median >= at_least
    title = f"{shape.title}, {what}: {name} / {OURS}"
    return Verdict(title, rule, f">= {at_least:g}", ratio, met)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=10.0, help="seconds per table")
    parser.add_argument("--json", type=Path, help="where to write every figure")
    return parser.parse_args()


def main() -> None:
    """Run the suite."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    run = describe_run()
    print("\n".join(f"{key}: {value}" for key, value in run.items()), flush=True)
    for rule in (adam, adopt, radam):
        rule.compile()
    figures: list[dict[str, Any]] = []
    verdicts: list[Verdict] = []
    comparisons: list[Comparison] = []

    def add(shape: Shape, rule: str, tables: dict[str, Comparison]) -> None:
        print(report(shape, rule, tables), flush=True)
        for what, comparison in tables.items():
            comparisons.append(comparison)
            for name, samples in comparison.samples.items():
                ratio = comparison.ratio(name, OURS)
                seconds = {"median_seconds": samples.median, "min_seconds": samples.minimum}
                place = {"shape": shape.name, "rule": rule, "what": what, "contender": name}
                figures.append({**place, **seconds, "times_as_long": ratio})
                if name != OURS:
                    verdicts.append(verdict(rule, shape, what, ratio, name))

    for shape in (SHAPES[name] for name in arguments.shapes):
        print(f"{shape.name} ...", file=sys.stderr, flush=True)
        add(shape, "Adam", adam_tables(shape, arguments.budget))
        if shape.name in ("gpt2", "1000x1000"):
            for rule, cls in ((adopt, Adopt), (radam, RAdam)):
                gc.collect()
                add(shape, cls.__name__, other_tables(rule, cls, shape, arguments.budget))
    measured = (adopt, radam, adabelief, cautious_adam, adan)
    distances = {rule.name: measure_distance(rule) for rule in measured}
    print(report_distances(distances))
    verdicts += _build_verdicts(measure_build())
    print(report_targets(verdicts) + busy_warning(comparisons))
    if arguments.json is not None:
        report_all = {"run": run, "figures": figures, "targets": verdicts, "distances": distances}
        write_json(arguments.json, report_all)


def _build_verdicts(seconds: dict[str, float]) -> Sequence[Verdict]:
    return [
        Verdict(
            f"{what}, seconds", "ADOPT", f"<= {_SECONDS[what]:g}", value, value <= _SECONDS[what]
        )
        for what, value in seconds.items()
    ]


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    print(f"\n{time.perf_counter() - start:.0f} s", file=sys.stderr)
