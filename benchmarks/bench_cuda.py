"""The update functions and optimizers on one GPU, against its copy bandwidth and PyTorch.

    python benchmarks/bench_cuda.py --json build/bench_cuda.json   # all of it, some minutes
    python benchmarks/bench_cuda.py --quick --rules adam lion      # only what the targets need

Each contender is checked first: this package against the formula in PyTorch's operations on the
same device and, bit for bit, against its own CPU kernel; the others against this package; steps of
optimizers against float64. Then all are timed in turn on the same tensors; see ``harness.py`` for
how. Bytes are those that the algorithm reads and writes, also of a contender that moves others,
whose title says so; the roof is ``copy_`` of a large tensor, in turn with the rest, by the bytes
that it reads and writes.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from contenders import CONTENDERS, Compiled, Contender, Eager, Foreach, Package, Step, check
from cuda_contenders import Copy, DeviceStep, Formula, FusedAdam, FusedAdamW, check_bits
from cuda_device import (
    ColdClock,
    Device,
    DeviceClock,
    Gpu,
    HostClock,
    QueueClock,
    StandIn,
    count_launches,
)
from cuda_steps import (
    OTHERS,
    OURS,
    SAME_WORK,
    STEPPED,
    STORAGES,
    StepCheck,
    Storage,
    StoredProblem,
    check_bits_of_step,
)
from gpu import why_no_gpu
from harness import (
    Comparison,
    Ratio,
    Verdict,
    compare,
    describe_run,
    format_ratio,
    format_table,
    report_targets,
    significant,
    write_json,
)
from problems import RULES, SHAPES, Problem, Rule, Shape

from emerging_optimizers._native import native

# ---- what is to be reached -----------------------------------------------------------------------

# Parts of the copy's bandwidth, with float32 states.
PART_OF_COPY = {
    "large": 0.90,
    "large-bfloat16": 0.90,
    "large-float16": 0.90,
    "gpt2": 0.85,
    "step-large": 0.90,
    "step-gpt2": 0.85,
}
# Operands at odd elements of their buffers: a part of the aligned operands' bandwidth.
PART_OF_ALIGNED = 0.80
# One call on 1000 tensors: its kernels, milliseconds of the host, part of torch._foreach's time.
LAUNCHES = 2
HOST_MILLISECONDS = 0.6
PART_OF_FOREACH = 1 / 3
# An optimizer's step: part of the time of torch.optim.AdamW(fused=True).
PART_OF_FUSED = 1.0


TITLES = {
    **{name: contender.title for name, contender in CONTENDERS.items()},
    **{c.name: c.title for c in (DeviceStep, FusedAdam, FusedAdamW)},
    **{stepper.name: stepper.title for stepper in (*OURS, *OTHERS)},
    "copy": "copy_ of a large tensor",
    "aligned": "this package, aligned",
    "offset-1": "this package, all operands at element 1",
    "odd-offsets": "this package, at different odd elements",
}


# ---- measuring -----------------------------------------------------------------------------------


@dataclass
class Result:
    """The times of some contenders, in turn, on one rule's problem."""

    case: str
    rule: str
    clock: str
    nbytes: int
    copied: int
    comparison: Comparison
    ours: str = "package"

    def bytes_of(self, name: str) -> int:
        """Return the bytes that a contender must move."""
        return self.copied if name == "copy" else self.nbytes

    def part_of_copy(self, name: str) -> Ratio | None:
        """Return a contender's bandwidth over that of the copy."""
        ratio = self.comparison.ratio("copy", name)
        return None if ratio is None else ratio.scaled(self.bytes_of(name) / self.copied)

    def figures(self) -> list[dict[str, Any]]:
        """Return the contenders' rows for the JSON report."""
        return [
            {
                "case": self.case,
                "rule": self.rule,
                "contender": name,
                "clock": self.clock,
                "rounds": len(samples.seconds),
                "calls_per_sample": samples.calls,
                "median_seconds": samples.median,
                "p10_seconds": samples.spread[0],
                "p90_seconds": samples.spread[1],
                "min_seconds": samples.minimum,
                "bytes": self.bytes_of(name),
                "gigabytes_per_second": self.bytes_of(name) / samples.median * 1e-9,
                "part_of_copy": self.part_of_copy(name),
                "compared_with": self.ours,
                "times_as_long": self.comparison.ratio(name, self.ours),
            }
            for name, samples in self.comparison.samples.items()
        ]

    def rows(self) -> list[list[str]]:
        """Return the contenders' rows for the reader."""
        return [
            [
                self.rule,
                TITLES[name],
                significant(samples.median * 1e3),
                " to ".join(significant(seconds * 1e3) for seconds in samples.spread),
                f"{self.bytes_of(name) / samples.median * 1e-9:.0f}",
                format_ratio(self.part_of_copy(name), scale=100, digits=1),
                "1"
                if name == self.ours
                else format_ratio(self.comparison.ratio(name, self.ours), digits=3),
                str(len(samples.seconds)),
            ]
            for name, samples in self.comparison.samples.items()
        ]


@dataclass
class Suite:
    """A run.

    Attributes:
        device: What is measured.
        budget: Seconds that the contenders of a rule share at a time.
        quick: Leave out the contenders that no target needs.
        results: All times.
        targets: Whether they are reached.
        launches: Kernels of one call on many tensors, by contender and rule.
        unavailable: Why contenders that need not work do not.
        errors: What went wrong, by case and rule.
    """

    device: Device
    budget: float
    quick: bool = False
    results: list[Result] = field(default_factory=list)
    targets: list[Verdict] = field(default_factory=list)
    launches: dict[str, dict[str, int | None]] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        is_real = isinstance(self.device, Gpu)
        # One tensor of 256 Mi elements and a copy of 4 GiB, or what the memory allows: five
        # operands, twice that for what checks and formulas hold, and the copy.
        large = (1 << 28) if is_real else (1 << 10)
        while is_real and 4 * large * 20 > self.device.memory:
            large //= 2
        self.copy = Copy(self.device, 16 * large)
        count = 1000 if is_real else 5
        self.shapes = {
            "large": Shape("large", _title(large), [(large,)], is_single=True),
            "offsets": Shape("offsets", _title(large // 4), [(large // 4,)], is_single=True),
            "gpt2": SHAPES["gpt2"] if is_real else Shape("gpt2", "smoke", [(7, 5), (9,)]),
            "many": Shape("many", f"{count} tensors of {count} elements", [(count,)] * count),
        }
        self.shapes["launches"] = self.shapes["step-many"] = self.shapes["many"]
        self.shapes["step-gpt2"] = self.shapes["gpt2"]
        self.shapes["step-large"] = SHAPES["large"] if is_real else self.shapes["large"]
        self.queue = QueueClock(self.device)
        self.alone = DeviceClock(self.device)
        self.cold = ColdClock(self.device)
        self.host = HostClock(self.device)

    def shape_of(self, case: str) -> Shape:
        """Return what a case measures."""
        return self.shapes[_place(case)]

    def prepare(self, problem: Problem, contenders: Sequence[Contender]) -> dict[str, Step]:
        """Return the steps of those contenders that work, all checked."""
        check_bits(problem)
        check(problem, [Formula()], {"formula": Formula().prepare(problem)})
        steps: dict[str, Step] = {}
        for contender in contenders:
            if not contender.has(problem.rule):
                continue
            try:
                step = contender.prepare(problem)
                check(problem, [contender], {contender.name: step})
            except Exception as error:
                if not isinstance(contender, Compiled | FusedAdam):
                    raise
                where = f"{contender.name}, {problem.rule.name}"
                self.unavailable[where] = _first_line(error)
            else:
                steps[contender.name] = step
        return steps

    def time(
        self,
        case: str,
        problem: Problem | StoredProblem,
        steps: dict[str, Any],
        clock: QueueClock | ColdClock | HostClock,
        ours: str = "package",
        budget: float | None = None,
    ) -> Result:
        """Time the steps in turn."""
        comparison = compare(dict(steps), budget or self.budget, clock)
        rule = problem.rule.name
        self.results.append(
            Result(case, rule, clock.name, problem.nbytes, self.copy.nbytes, comparison, ours)
        )
        return self.results[-1]

    def judge(
        self, target: str, rule: Rule, measured: Ratio | float | None, sign: str, limit: float
    ) -> None:
        """Note whether a target is reached."""
        value = measured.median if isinstance(measured, Ratio) else measured
        met = value is not None and (value >= limit if sign == ">=" else value <= limit)
        self.targets.append(Verdict(target, rule.name, f"{sign} {limit:.3g}", measured, met))

    def measure_bandwidth(self, case: str, rule: Rule) -> None:
        """Compare with the copy's bandwidth, and a step on the device with one on the host."""
        shape = self.shape_of(case)
        dtype, state_dtype = DTYPES.get(case, (torch.float32, torch.float32))
        problem = Problem(rule, shape, dtype, state_dtype=state_dtype, device=self.device.type)
        contenders: list[Contender] = [Package()]
        is_float32 = dtype == torch.float32
        if "step" in rule.options and is_float32:
            contenders.append(DeviceStep())
        if not self.quick and is_float32:
            contenders.append(Foreach())
        if not self.quick and rule.name == "adam" and dtype == state_dtype:
            contenders.append(FusedAdam())
        steps = self.prepare(problem, contenders)
        result = self.time(case, problem, steps | {"copy": self.copy.step}, self.alone)
        if case in PART_OF_COPY:
            title = CASES[case].format(shape.title)
            part = result.part_of_copy("package")
            self.judge(f"{title}: bandwidth / copy", rule, part, ">=", PART_OF_COPY[case])

    def measure_offsets(self, case: str, rule: Rule) -> None:
        """Compare operands that begin at odd elements of their buffers with aligned ones."""
        count = 2 + len(rule.states)
        offsets = {
            "aligned": [0] * count,
            "offset-1": [1] * count,
            "odd-offsets": [2 * operand + 1 for operand in range(count)],
        }
        problems = {
            name: Problem(rule, self.shapes[case], device=self.device.type, offsets=at)
            for name, at in offsets.items()
        }
        steps = {
            name: self.prepare(problem, [Package()])["package"]
            for name, problem in problems.items()
        }
        problem = problems["aligned"]
        steps["copy"] = self.copy.step
        result = self.time(case, problem, steps, self.alone, ours="aligned")
        for name in ("offset-1", "odd-offsets"):
            part = result.comparison.ratio("aligned", name)
            title = f"{self.shapes[case].title}, {name}: bandwidth / aligned"
            self.judge(title, rule, part, ">=", PART_OF_ALIGNED)

    def measure_many(self, case: str, rule: Rule) -> None:
        """Time a call on many small tensors: the host, both together, and the device."""
        shape = self.shapes[case]
        problem = Problem(rule, shape, device=self.device.type)
        fused = [FusedAdam(), FusedAdamW()] if rule.name == "adam" and not self.quick else []
        contenders: list[Contender] = [Package(), Foreach(), *fused]
        slow: list[Contender] = [] if self.quick else [Eager(), Compiled()]
        steps = self.prepare(problem, [*contenders, *slow])
        few = {name: steps[name] for name in steps if name not in ("eager", "compiled")}
        third = self.budget / 3
        on_host = self.time(case, problem, few, self.host, budget=third)
        of_call = on_host.comparison.samples["package"].median * 1e3
        self.judge(f"{shape.title}: host ms of a call", rule, of_call, "<=", HOST_MILLISECONDS)
        for clock, chosen in ((self.queue, steps), (self.cold, few)):
            result = self.time(case, problem, chosen, clock, budget=third)
            if "foreach" in steps:
                part = result.comparison.ratio("package", "foreach")
                title = f"{shape.title}: time / foreach, {clock.name}"
                self.judge(title, rule, part, "<=", PART_OF_FOREACH)

    def measure_launches(self, case: str, rule: Rule) -> None:
        """Count the kernels of a call on many small tensors."""
        shape = self.shapes[case]
        problem = Problem(rule, shape, device=self.device.type)
        for name, step in self.prepare(problem, [Package(), Foreach()]).items():
            of_name = self.launches.setdefault(name, {})
            of_name[rule.name] = count_launches(step, self.device)
        launches = self.launches["package"][rule.name]
        self.judge(f"{shape.title}: kernels of a call", rule, launches, "<=", LAUNCHES)
        if rule.name in STEPPED:
            of_step = StoredProblem(rule, shape, STORAGES["float32"], self.device.type)
            for name, step in self.prepare_steps(of_step).items():
                of_name = self.launches.setdefault(f"{name}, step", {})
                of_name[rule.name] = count_launches(step, self.device)

    def prepare_steps(self, problem: StoredProblem) -> dict[str, Callable[[], object]]:
        """Return the optimizers' steps, all checked; those of PyTorch's that work."""
        check_bits_of_step(problem)
        check_step = StepCheck(problem)
        steps: dict[str, Callable[[], object]] = {}
        for stepper in (*OURS, *OTHERS):
            if not stepper.has(problem):
                continue
            try:
                step = stepper.prepare(problem)
                check_step(stepper, step)
            except Exception as error:
                if stepper in OURS:
                    raise
                where = f"{stepper.name}, {problem.rule.name}, {problem.storage.title}"
                self.unavailable[where] = _first_line(error)
            else:
                steps[stepper.name] = step
        return steps

    def measure_step(self, case: str, rule: Rule) -> None:
        """Compare an optimizer's step with the copy's bandwidth and with those of PyTorch."""
        shape = self.shape_of(case)
        problem = StoredProblem(rule, shape, _storage(case), self.device.type)
        steps = self.prepare_steps(problem)
        steps["copy"] = self.copy.step
        result = self.time(case, problem, steps, self.alone)
        title = CASES[case].format(shape.title)
        part = result.part_of_copy("package")
        limit = PART_OF_COPY[_place(case)]
        self.judge(f"{title}: bandwidth / copy", rule, part, ">=", limit)
        self.judge_beside_fused(title, rule, result)

    def measure_step_of_many(self, case: str, rule: Rule) -> None:
        """Time an optimizer's step on many small parameters, as a call on many small tensors."""
        problem = StoredProblem(rule, self.shape_of(case), _storage(case), self.device.type)
        steps = self.prepare_steps(problem)
        title = CASES[case].format(problem.shape.title)
        for clock in (self.host, self.queue, self.cold):
            result = self.time(case, problem, steps, clock, budget=self.budget / 3)
            self.judge_beside_fused(f"{title}, {clock.name}", rule, result)

    def judge_beside_fused(self, title: str, rule: Rule, result: Result) -> None:
        """Note whether a step takes no longer than PyTorch's fused one, where there is one."""
        for name in SAME_WORK:
            if name in result.comparison.samples:
                part = result.comparison.ratio("package", name)
                self.judge(f"{title}: time / fused", rule, part, "<=", PART_OF_FUSED)

    def run(self, case: str, rule: Rule) -> None:
        """Measure a case; what goes wrong is noted, so that the rest is measured, too."""
        print(f"{case}, {rule.name} ...", file=sys.stderr, flush=True)
        measure = {
            "offsets": self.measure_offsets,
            "many": self.measure_many,
            "launches": self.measure_launches,
            "step-large": self.measure_step,
            "step-gpt2": self.measure_step,
            "step-many": self.measure_step_of_many,
        }
        try:
            measure.get(_place(case), self.measure_bandwidth)(case, rule)
        except Exception as error:
            self.errors[f"{case}, {rule.name}"] = _first_line(error)
            print(f"FAILED: {_first_line(error)}", file=sys.stderr, flush=True)

    def copy_bandwidth(self) -> list[float]:
        """Return the copy's gigabytes per second: the median of each time it took part."""
        taken = [result.comparison.samples.get("copy") for result in self.results]
        return [self.copy.nbytes / samples.median * 1e-9 for samples in taken if samples]

    def report(self, run: dict[str, Any]) -> dict[str, Any]:
        """Return everything for the JSON report."""
        return {
            "run": run,
            "budget_seconds": self.budget,
            "copy_bytes": self.copy.nbytes,
            "copy_gigabytes_per_second": self.copy_bandwidth(),
            "figures": [figure for result in self.results for figure in result.figures()],
            "launches": self.launches,
            "targets": self.targets,
            "unavailable": self.unavailable,
            "errors": self.errors,
        }


# The functions' cases in other dtypes than float32: of gradients and updates, and of states.
DTYPES = {
    "large-bfloat16": (torch.bfloat16, torch.float32),
    "large-float16": (torch.float16, torch.float32),
    "large-all-bfloat16": (torch.bfloat16, torch.bfloat16),
    "large-all-float16": (torch.float16, torch.float16),
}
# The steps' places, and how parameters are stored in the cases that their names end with.
_STEPS = ("step-large", "step-gpt2", "step-many")
_STORED = [name for name in STORAGES if name != "float32"]

# What is measured, and how a reader calls it; {} is what the shape is called. Launches come last,
# since a profiler that has run once may leave launches slower.
CASES = {
    "large": "{}, float32",
    "large-bfloat16": "{}, bfloat16 gradient and update, float32 states",
    "large-float16": "{}, float16 gradient and update, float32 states",
    "gpt2": "{}, float32",
    "offsets": "{}, float32, at odd elements of buffers",
    "many": "{}, float32",
    **dict.fromkeys(_STEPS, "{}, an optimizer's step"),
    "large-all-bfloat16": "{}, all bfloat16",
    "large-all-float16": "{}, all float16",
    **{
        f"{step}-{name}": f"{{}}, an optimizer's step, {STORAGES[name].title}"
        for step in _STEPS
        for name in _STORED
    },
    "launches": "{}, float32",
}


def _place(case: str) -> str:
    """Return the case of float32 in which the same is measured of the same shape."""
    return "-".join(case.split("-")[: 2 if case.startswith("step-") else 1])


def _storage(case: str) -> Storage:
    return STORAGES[case.removeprefix(_place(case)).removeprefix("-") or "float32"]


def _title(numel: int) -> str:
    return f"one tensor of {numel >> 20} Mi elements"


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


# ---- reporting -----------------------------------------------------------------------------------


def report_case(suite: Suite, case: str) -> str:
    """Return the tables of a case, one for each clock."""
    header = ["rule", "contender", "ms", "p10 to p90", "GB/s", "% of copy", "times ours", "rounds"]
    results = [result for result in suite.results if result.case == case]
    title = CASES[case].format(suite.shape_of(case).title)
    tables = []
    for clock in dict.fromkeys(result.clock for result in results):
        rows = [row for result in results if result.clock == clock for row in result.rows()]
        tables.append(f"\n{title}; {clock}\n\n{format_table(header, rows)}")
    return "\n".join(tables)


def why_not() -> str | None:
    """Say what keeps the suite from being run here; None where nothing does."""
    if (reason := why_no_gpu()) is not None:
        return reason
    if native is None or not native.cuda_architectures:
        return (
            "emerging_optimizers is compiled without CUDA kernels (python -m emerging_optimizers)"
        )
    return None


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--budget", type=float, default=1.0, help="seconds per case and rule")
    parser.add_argument("--quick", action="store_true", help="only what the targets compare")
    parser.add_argument("--json", type=Path, help="where to write every figure")
    # Runs every line on the CPU, on a few elements; the figures mean nothing.
    parser.add_argument("--smoke", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    """Run the suite."""
    arguments = parse_arguments()
    reason = None if arguments.smoke else why_not()
    if reason is not None:
        print(f"bench_cuda.py: nothing to measure: {reason}", file=sys.stderr)
        sys.exit(2)
    device = StandIn() if arguments.smoke else Gpu()
    run = {**describe_run(), "gpu": device.describe()}
    print("\n".join(f"{key}: {value}" for key, value in run.items()), flush=True)

    suite = Suite(device, arguments.budget, arguments.quick)
    for case in arguments.cases:
        for name in arguments.rules:
            if name in STEPPED or not case.startswith("step-"):
                suite.run(case, RULES[name])
        print(report_case(suite, case), flush=True)
        if arguments.json is not None:  # each time, so that an interrupted run leaves its figures
            write_json(arguments.json, suite.report(run))
    print(f"\nKernels of a call on many tensors: {suite.launches}")
    print(report_targets(suite.targets))
    for kind, found in (("not available", suite.unavailable), ("FAILED", suite.errors)):
        for where, what in found.items():
            print(f"\n{kind}: {where}: {what}")
    if suite.errors:
        sys.exit(1)


if __name__ == "__main__":
    main()
