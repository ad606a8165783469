"""Interpreted rules: their speed, and the step in which compiled code takes over.

    python benchmarks/bench_interpreter.py                  # all of examples/rules, on one thread
    python benchmarks/bench_interpreter.py --rules adopt radam --json build/bench_interpreter.json

Each rule is called with ``out=``: compiled, interpreted, and as a loop of PyTorch operations over
the tensors, by its formula. Compiled and interpreted results are checked to have the same
bits; all contenders are then timed in turn (``harness.py``).

For the second table, an optimizer takes steps while its rule is built in the background. The steps
during and after which the compiled code is loaded are compared with the median of the ten around
them.
"""

import argparse
import importlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import (
    Comparison,
    Ratio,
    Verdict,
    WrongResultError,
    busy_warning,
    compare,
    describe_run,
    format_ratio,
    format_table,
    report_targets,
    significant,
    write_json,
)
from problems import SHAPES, Shape
from torch import Tensor, nn

import emerging_optimizers as eo
from emerging_optimizers._user_rules import UserRule

GALLERY = Path(__file__).parents[1] / "examples" / "rules"
INTERPRETED, COMPILED, LOOP = "interpreted", "compiled", "loop"
STEP = 1000
# The interpreter's time relative to the compiled rule's, at most; the loop's relative to it, at
# least.
MOST = {"large": 3.0, "1000x1000": 5.0}
LEAST = 5.0
# Milliseconds that the step in which the code is replaced may take beyond the median.
MOST_EXCESS = 1.0


def rules_by_name() -> dict[str, UserRule]:
    """Return the rules of the gallery."""
    sys.path.insert(0, str(GALLERY))
    names = sorted(path.stem for path in GALLERY.glob("*.py") if not path.stem.startswith("_"))
    modules = {name: importlib.import_module(name) for name in names}
    return {name: getattr(module, name) for name, module in modules.items()}


# ---- speed ---------------------------------------------------------------------------------------


class Operands:
    """The tensors that all contenders of a table work on."""

    def __init__(self, rule: UserRule, shape: Shape) -> None:
        generator = torch.Generator().manual_seed(0)

        def random() -> list[Tensor]:
            return [torch.rand(size, generator=generator).add_(0.1) for size in shape.sizes]

        self.rule = rule
        self.grads = [grad.sub_(0.6) for grad in random()]
        self.states = [random() for _ in rule.states]
        self.updates = [torch.zeros(size) for size in shape.sizes]
        self.values = {"step": STEP} if rule.signature.has_step else {}
        self.values |= {name: torch.tensor(v) for name, v in rule.scalar_states.items()}

    def call_of(self, rule: UserRule) -> Callable[[], object]:
        """Return a call of a rule."""
        return lambda: rule(self.grads, *self.states, **self.values, out=self.updates)

    def loop(self) -> Callable[[], None]:
        """Return a loop over the tensors that applies the formula."""
        values = {**self.rule.signature.defaults, **self.values}
        rows = list(zip(self.updates, self.grads, *self.states, strict=True))

        @torch.no_grad()
        def run() -> None:
            for update, grad, *states in rows:
                self.rule._apply_formula(update, grad, states, values)

        return run

    def after(self, call: Callable[[], object]) -> list[Tensor]:
        """Return the modified tensors after a call; they are then as they were."""
        modified = [*self.updates, *(state for states in self.states for state in states)]
        modified += [self.values[name] for name in self.rule.scalar_states]
        before = [tensor.clone() for tensor in modified]
        call()
        after = [tensor.clone() for tensor in modified]
        for tensor, saved in zip(modified, before, strict=True):
            tensor.copy_(saved)
        return after


def measure(rule: UserRule, shape: Shape, budget: float) -> Comparison:
    """Compare the contenders."""
    operands = Operands(rule, shape)
    steps = {
        INTERPRETED: operands.call_of(rule._interpreted()),
        COMPILED: operands.call_of(rule),
        LOOP: operands.loop(),
    }
    results = zip(operands.after(steps[INTERPRETED]), operands.after(steps[COMPILED]), strict=True)
    if not all(torch.equal(*map(_bits, pair)) for pair in results):
        raise WrongResultError(f"{rule.name}, {shape.name}: the bits of interpreter and compiler")
    return compare(steps, budget)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32)


# ---- the switch ----------------------------------------------------------------------------------

_RULE = """
@eo.rule
def switched_{number}(grad, exp_avg, exp_avg_sq, *, betas=(0.9, 0.999), eps=1e-8, step):
    exp_avg.lerp_(grad, 1 - betas[0])
    exp_avg_sq.lerp_(grad * grad, 1 - betas[1])
    scale = (1 - betas[1] ** step) ** 0.5 / (1 - betas[0] ** step)
    return {number} * scale * exp_avg / (exp_avg_sq.sqrt() + eps)
"""


def measure_switch(number: int, folder: str) -> tuple[float, float]:
    """Return the milliseconds of the slowest step at a switch, and of the median around it."""
    namespace: dict[str, Any] = {"eo": eo}
    exec(_RULE.format(number=number), namespace)
    rule = namespace[f"switched_{number}"]

    class Switched(eo.ScalarOptimizer, rule=rule, lr=1e-3):
        """Adam."""

    params = [nn.Parameter(torch.randn(1000)) for _ in range(1000)]
    for param in params:
        param.grad = torch.randn(1000)
    optimizer = Switched(params)
    os.environ["TORCH_EXTENSIONS_DIR"] = folder
    seconds: list[float] = []
    switch: int | None = None
    while switch is None or len(seconds) < switch + 8:
        start = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        if switch is None and rule.is_compiled:
            switch = len(seconds) - 1
        time.sleep(0.002)
    # The library was loaded during this step, or in the pause after it.
    at = seconds[switch : switch + 2]
    around = [*seconds[switch - 5 : switch], *seconds[switch + 2 : switch + 7]]
    return max(at) * 1e3, statistics.median(around) * 1e3


# ---- the report ----------------------------------------------------------------------------------


def report(name: str, shape: Shape, comparison: Comparison) -> str:
    """Return the lines of a rule at a shape."""
    rows = [
        [
            contender,
            significant(samples.median * 1e3),
            format_ratio(comparison.ratio(contender, INTERPRETED)),
            str(len(samples.seconds)),
        ]
        for contender, samples in comparison.samples.items()
    ]
    header = ["contender", "ms", "times the interpreter's", "rounds"]
    return f"\n{name}, {shape.title}\n\n{format_table(header, rows)}"


def verdicts_of(name: str, shape: Shape, comparison: Comparison) -> list[Verdict]:
    """Return whether the interpreter is fast enough."""

    def verdict(over: str, under: str, wanted: str, is_met: Callable[[float], bool]) -> Verdict:
        ratio: Ratio | None = comparison.ratio(over, under)
        met = ratio is not None and is_met(ratio.median)
        return Verdict(f"{shape.title}: {over} / {under}", name, wanted, ratio, met)

    most = MOST[shape.name]
    return [
        verdict(INTERPRETED, COMPILED, f"<= {most:g}", lambda value: value <= most),
        verdict(LOOP, INTERPRETED, f">= {LEAST:g}", lambda value: value >= LEAST),
    ]


def parse_arguments(names: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rules", nargs="+", choices=names, default=names)
    parser.add_argument("--shapes", nargs="+", choices=list(MOST), default=list(MOST))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=4.0, help="seconds per table")
    parser.add_argument("--switches", type=int, default=5, help="how many are measured")
    parser.add_argument("--json", type=Path, help="where to write every figure")
    return parser.parse_args()


def main() -> None:
    """Run the suite."""
    rules = rules_by_name()
    arguments = parse_arguments(list(rules))
    torch.set_num_threads(arguments.threads)
    run = describe_run()
    print("\n".join(f"{key}: {value}" for key, value in run.items()), flush=True)
    figures: list[dict[str, Any]] = []
    verdicts: list[Verdict] = []
    comparisons: list[Comparison] = []
    for name in arguments.rules:
        rules[name].compile()
    for shape in (SHAPES[name] for name in arguments.shapes):
        for name in arguments.rules:
            comparison = measure(rules[name], shape, arguments.budget)
            print(report(name, shape, comparison), flush=True)
            comparisons.append(comparison)
            verdicts += verdicts_of(name, shape, comparison)
            for contender, samples in comparison.samples.items():
                seconds = {"median_seconds": samples.median, "min_seconds": samples.minimum}
                place = {"shape": shape.name, "rule": name, "contender": contender}
                ratio = comparison.ratio(contender, INTERPRETED)
                figures.append({**place, **seconds, "times_as_long": ratio})
    with tempfile.TemporaryDirectory() as folder:
        switches = [measure_switch(2 + i, folder) for i in range(arguments.switches)]
    for slowest, around in switches:
        print(f"switch: {slowest:.2f} ms, around it {around:.2f} ms")
        met = slowest - around <= MOST_EXCESS
        excess = slowest - around
        verdicts.append(Verdict("switch, ms more", "Adam", f"<= {MOST_EXCESS:g}", excess, met))
    print(report_targets(verdicts) + busy_warning(comparisons))
    if arguments.json is not None:
        whole = {"run": run, "figures": figures, "switches": switches, "targets": verdicts}
        write_json(arguments.json, whole)


if __name__ == "__main__":
    main()
