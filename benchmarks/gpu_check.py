"""Builds, tests and measures the package on this machine's GPU: the one command for such a machine.

    python benchmarks/gpu_check.py                    # or: make gpu-check PYTHON=python
    python benchmarks/gpu_check.py --skip sanitizer bench --output build/gpu.json

It needs torch with CUDA, a CUDA compiler, numpy, pytest and hypothesis, and fetches nothing. Each
step runs whatever became of those before it, and in a process of its own, so that one that crashes
takes nothing along. All outcomes and the benchmark's figures go into one JSON file, after every
step; the steps' full output goes to build/gpu-check. Exit status: 1 where a step failed (a
performance target that is missed is reported, and fails nothing), 2 where there is no GPU.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from gpu import describe_gpu, why_no_gpu

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / "build" / "gpu-check"

# What pytest is called with.
PYTESTS = {
    "cuda": ["-q", "tests/test_cuda.py", "tests/test_cuda_optimizers.py", "tests/test_megatron.py"],
    "functions": [
        "-q",
        "--device",
        "cuda",
        "tests/test_functions.py",
        "tests/test_identities.py",
        "tests/test_properties.py",
    ],
    "optimizers": [
        *("-q", "--device", "cuda", "tests/test_optimizers.py"),
        # It starts processes of its own, which use no GPU.
        *("--deselect", "tests/test_optimizers.py::test_distributed"),
        # Where what torch's own test utilities need is not installed, they cannot be imported.
        *(["tests/test_optimizer_conventions.py"] if find_spec("expecttest") else []),
    ],
    "megatron": ["-q", "-m", "cuda", "tests/test_megatron_core.py"],
}
# Tests that are skipped for this reason wait for an option; any other skipped one is a failure.
MAY_SKIP = "slow:"
# Seconds after which a process is stopped, so that the steps behind it get their turn.
LIMITS = {"build": 300, "tests": 180, "bits": 120, "sanitizer": 90, "bench": 300}

# A row of specials meets every row of specials of the other operands.
SPECIALS = (
    *(0.0, -0.0, 1.0, -1.0, float("inf"), -float("inf"), float("nan")),
    *(2.0**-149, -(2.0**-149), 2.0**-130, 2.0**-126, 1e-30, 3.4028234663852886e38),
)
ROWS, COLUMNS = 2048, 1031

# Each rule over sizes around every edge of the kernels' shares, at odd elements of buffers that end
# with the operand, in all mixes of dtypes that take a way of their own, and with a step on the
# device; then its optimizer, counting on the host and on the device. Each tensor has an allocation
# of its own, so that none hides an access beyond another.
SANITIZED = """
import torch
from contenders import Package
from problems import RULES, Problem, Shape

sizes = [1, 2, 3, 7, 8, 9, 17, 255, 257, 2047, 2049, 4096, 5000]
shape = Shape("sizes", "sizes", [(size,) for size in sizes])
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
device = "cuda" if torch.cuda.is_available() else "cpu"
for rule in RULES.values():
    lists = 2 + len(rule.states)
    for offsets in ([0] * lists, [1] * lists, [2 * i + 1 for i in range(lists)]):
        for dtype, states in ((F32, F32), (BF16, F32), (F16, BF16), (F64, F32), (F64, F64)):
            problem = Problem(rule, shape, dtype, state_dtype=states, offsets=offsets)
            for tensors in (problem.grads, *problem.states, problem.updates):
                for i, tensor in enumerate(tensors):
                    base = tensor if tensor._base is None else tensor._base
                    begin = tensor.storage_offset()
                    tensors[i] = base.to(device)[begin : begin + tensor.numel()]
            Package().prepare(problem)()
            if "step" in rule.options:
                values = rule.options | {"step": torch.tensor(3).to(device)}
                rule.function(*problem.arguments(), *values.values(), out=problem.updates)
    halves = ({"stochastic_rounding": True}, {"master_weights": True})
    for dtype, options in ((F32, {}), (BF16, halves[0]), (F16, halves[1]), (F64, {})):
        for capturable in (False, True):
            buffers = [torch.ones(size + 1, dtype=dtype, device=device) for size in sizes]
            params = [torch.nn.Parameter(buffer[1:]) for buffer in buffers]
            for param in params:
                param.grad = torch.ones_like(param)
            optimizer = rule.optimizer(params, fused=True, capturable=capturable, **options)
            for _ in range(2):
                optimizer.step()
if device == "cuda":
    torch.cuda.synchronize()
print("swept")
"""

# An installed package: where it lies, what it is made of, and that its kernels are in use.
INSTALLED = """
import sys
from pathlib import Path
import torch
import emerging_optimizers
from emerging_optimizers._native import native

assert Path(emerging_optimizers.__file__).parent.parent == Path(sys.path[0])
emerging_optimizers.show_config()
device = "cuda" if torch.cuda.is_available() else "cpu"
param = torch.nn.Parameter(torch.ones(1000, device=device))
param.grad = torch.ones_like(param)
emerging_optimizers.Lion([param], lr=0.5, weight_decay=0.0, fused=True).step()
assert param.eq(0.5).all()
print("stepped by", native.__file__)
"""


@dataclass
class Outcome:
    """What became of a step.

    Attributes:
        status: "passed", "failed", or "unavailable" where this machine cannot do it.
        seconds: How long it took.
        summary: A line for the reader.
        details: What else the report holds.
    """

    status: str
    seconds: float = 0.0
    summary: str = ""
    details: dict[str, Any] = field(default_factory=dict)


# ---- processes -----------------------------------------------------------------------------------


@dataclass
class Finished:
    """A process that has ended; its status is None where it was stopped for taking too long."""

    status: int | None
    output: str


def run(name: str, step: str, command: Sequence[str], **environment: str) -> Finished:
    """Run a command in the repository's root, and keep its output in a file."""
    path = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, path)), **environment}
    print(f"{name}: {shlex.join(command)[:160].partition(chr(10))[0]}", flush=True)
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"{name}.log"
    with (
        log.open("w") as file,
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that it can be stopped with all that it started
        ) as process,
    ):
        try:
            status = process.wait(LIMITS[step])
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return Finished(status, log.read_text(errors="replace"))


def judged(finished: Finished, summary: str, **details: Any) -> Outcome:
    """Return the outcome of a process that passed where its status is 0."""
    if finished.status == 0:
        return Outcome("passed", summary=summary, details=details)
    print(_tail(finished.output, 40), flush=True)
    how = "stopped for taking too long" if finished.status is None else f"exit {finished.status}"
    summary = f"{how}; {summary}" if summary else how
    return Outcome("failed", summary=summary, details={**details, "tail": _tail(finished.output)})


def _tail(text: str, lines: int = 60) -> str:
    return "\n".join(text.splitlines()[-lines:])


# ---- the steps -----------------------------------------------------------------------------------


def build(_: argparse.Namespace) -> Outcome:
    """Compile the package in place, for this machine's GPU alone."""
    environment = _for_this_gpu()
    architecture = environment["TORCH_CUDA_ARCH_LIST"]
    # --force, because setup.py does not see that it is another architecture or another compiler;
    # ninja then compiles only what has changed.
    finished = run(
        "build",
        "build",
        [sys.executable, "setup.py", "build_ext", "--inplace", "--force"],
        **environment,
    )
    config = run("config", "build", [sys.executable, "-m", "emerging_optimizers"])
    print(config.output, flush=True)
    is_in_use = re.search(
        rf"^CUDA: .*\bsm_{architecture.replace('.', '')}\b", config.output, re.MULTILINE
    )
    if finished.status == 0 and not is_in_use:  # it does not load, say: all would run on formulas
        finished.status = 1
    summary = f"for {architecture}"
    return judged(finished, summary, architecture=architecture, config=config.output)


def wheel(_: argparse.Namespace) -> Outcome:
    """Build a wheel as `make wheel` does, unpack it into an empty folder, and use it from there."""
    shutil.rmtree(LOGS / "wheel", ignore_errors=True)
    site = LOGS / "wheel" / "site"
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "."]
    built = run("wheel", "build", [*command, f"--wheel-dir={site.parent}"], **_for_this_gpu())
    wheels = list(site.parent.glob("*.whl"))
    if built.status != 0 or not wheels:
        return judged(Finished(built.status or 1, built.output), "no wheel")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index"]
    run("wheel-install", "build", [*command, f"--target={site}", str(wheels[0])])
    size = wheels[0].stat().st_size / 1e6
    finished = _use(site, "wheel-use")
    return judged(finished, f"{wheels[0].name}, {size:.1f} MB", size=size, used=finished.output)


def first_import(_: argparse.Namespace) -> Outcome:
    """Let the package that the wheel brought, without its module, compile itself when imported."""
    site = LOGS / "wheel" / "site"
    for module in site.glob("emerging_optimizers/_C.*"):
        module.unlink()
    extensions = LOGS / "wheel" / "extensions"
    finished = _use(site, "first-import", TORCH_EXTENSIONS_DIR=str(extensions), **_for_this_gpu())
    if finished.status == 0 and str(extensions) not in finished.output:
        finished.status = 1
    return judged(finished, "", used=finished.output)


def _for_this_gpu() -> dict[str, str]:
    major, minor = torch.cuda.get_device_capability()
    return {
        "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}",
        "EMERGING_OPTIMIZERS_NATIVE": "1",
        "EMERGING_OPTIMIZERS_CUDA": "1",
    }


def _use(site: Path, name: str, **environment: str) -> Finished:
    """Use the package that lies in a folder, and no other."""
    site.mkdir(parents=True, exist_ok=True)
    program = site / "use.py"
    program.write_text(INSTALLED)
    environment = {"PYTHONPATH": "", **environment}
    finished = run(name, "build", [sys.executable, str(program)], **environment)
    print(finished.output, flush=True)
    if finished.status == 0 and "stepped by" not in finished.output:
        finished.status = 1
    return finished


def run_tests(name: str) -> Outcome:
    """Run tests; one that is skipped has failed, since all of them are to run here."""
    LOGS.mkdir(parents=True, exist_ok=True)
    results = LOGS / f"tests-{name}.xml"
    results.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", f"--junitxml={results}", *PYTESTS[name]]
    finished = run(f"tests-{name}", "tests", command)
    if not results.exists():
        return judged(Finished(finished.status or 1, finished.output), "no results")
    cases = ElementTree.parse(results).getroot().findall(".//testcase")
    failed = [_id(case) for case in cases if {"failure", "error"} & {child.tag for child in case}]
    skips = [
        (_id(case), skip.get("message") or "") for case in cases for skip in case.iter("skipped")
    ]
    waiting = [where for where, message in skips if message.startswith(MAY_SKIP)]
    skipped = [f"{where}: {why}" for where, why in skips if not why.startswith(MAY_SKIP)]
    passed = len(cases) - len(failed) - len(skips)
    summary = f"{passed} passed, {len(failed)} failed, {len(skipped)} skipped"
    summary += f", {len(waiting)} left out as slow" if waiting else ""
    outcome = judged(finished, summary, passed=passed, failed=failed, skipped=skipped, slow=waiting)
    if skipped or not passed:
        outcome.status = "failed"
    return outcome


def _id(case: ElementTree.Element) -> str:
    return f"{case.get('classname')}::{case.get('name')}"


def bits(_: argparse.Namespace) -> Outcome:
    """Compare the bits of the two devices' kernels, in another process."""
    results = LOGS / "bits.json"
    results.unlink(missing_ok=True)
    finished = run("bits", "bits", [sys.executable, __file__, "--compare-bits", str(results)])
    rules = json.loads(results.read_text()) if results.exists() else {}
    differing = sum(rule["differing"] for rule in rules.values())
    elements = sum(rule["elements"] for rule in rules.values())
    summary = f"{differing} of {elements} elements differ"
    return judged(finished, summary, rules=rules)


def compare_bits(device: str = "cuda", rows: int = ROWS) -> dict[str, dict[str, Any]]:
    """Return what differs between a device's kernel and the CPU's, rule by rule."""
    from oracle import RULES
    from support import MIXES, call, has_equal_bits, make_operands

    report: dict[str, dict[str, Any]] = {}
    for rule in RULES.values():
        operands = make_operands(rule, (rows, COLUMNS), MIXES["float32"])
        combinations = torch.tensor(list(product(SPECIALS, repeat=1 + len(rule.states))))
        for tensor, values in zip(operands, combinations[: rows * COLUMNS].T, strict=True):
            tensor.view(-1)[: len(values)] = values
        row: dict[str, Any] = {"elements": 0, "differing": 0, "largest_ulp": 0, "cases": {}}
        for name, case in rule.cases.items():
            here, there = operands.clone(), operands.clone()
            there.grad, there.states = there.grad.to(device), [s.to(device) for s in there.states]
            wanted, got = call(rule, case, here), call(rule, case, there)
            of_case = {"differing": 0, "largest_ulp": 0}
            for a, b in zip((got, *there.states), (wanted, *here.states), strict=True):
                a = a.cpu()
                is_equal = has_equal_bits(a, b)
                row["elements"] += a.numel()
                if is_equal.all():
                    continue
                of_case["differing"] += int((~is_equal).sum())
                distance = (_ordinal(a[~is_equal]) - _ordinal(b[~is_equal])).abs().max()
                of_case["largest_ulp"] = max(of_case["largest_ulp"], int(distance))
            if of_case["differing"]:
                row["cases"][name] = of_case
                row["differing"] += of_case["differing"]
                row["largest_ulp"] = max(row["largest_ulp"], of_case["largest_ulp"])
        report[rule.name] = row
        print(rule.name, row, flush=True)
    return report


def _ordinal(values: torch.Tensor) -> torch.Tensor:
    """Return the place of each float32 in their order; neighbours differ by 1."""
    integers = values.contiguous().view(torch.int32).long()
    return torch.where(integers < 0, -(integers & 0x7FFFFFFF), integers)


def sanitizer(tool: str) -> Outcome:
    """Run every rule under one of compute-sanitizer's tools."""
    program = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer",
        path=os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin"),
    )
    if program is None:
        return Outcome("unavailable", summary="compute-sanitizer is not on PATH")
    # Without the last option, calls that PyTorch tries and does without would count as errors.
    options = ["--tool", tool, "--error-exitcode", "3"]
    options += ["--report-api-errors", "no"] if tool == "memcheck" else []
    finished = run(
        tool,
        "sanitizer",
        [program, *options, sys.executable, "-c", SANITIZED],
        PYTORCH_NO_CUDA_MEMORY_CACHING="1",
    )
    if "Device not supported" in finished.output:
        return Outcome(
            "unavailable",
            summary="compute-sanitizer: Device not supported",
            details={"tail": _tail(finished.output)},
        )
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY:.*", finished.output)
    if finished.status == 0 and "swept" not in finished.output:
        finished.status = 1
    return judged(finished, "; ".join(found))


def bench(arguments: argparse.Namespace) -> Outcome:
    """Run the CUDA suite; its figures become part of the report."""
    results = LOGS / "bench.json"
    results.unlink(missing_ok=True)
    # Relative, since the report holds the command.
    command = ["benchmarks/bench_cuda.py", "--budget", str(arguments.budget)]
    command += ["--json", os.path.relpath(results, ROOT)]
    finished = run("bench", "bench", [sys.executable, *command])
    figures = json.loads(results.read_text()) if results.exists() else {}
    targets = figures.get("targets", [])
    met = sum(target["met"] for target in targets)
    outcome = judged(finished, f"{met} of {len(targets)} targets met")
    outcome.details["figures"] = figures
    return outcome


STEPS: dict[str, Callable[[argparse.Namespace], Outcome]] = {
    "build": build,
    "wheel": wheel,
    "first-import": first_import,
    "tests-cuda": lambda _: run_tests("cuda"),
    "tests-functions": lambda _: run_tests("functions"),
    "tests-optimizers": lambda _: run_tests("optimizers"),
    # Where Megatron-Core is installed.
    **({"tests-megatron": lambda _: run_tests("megatron")} if find_spec("megatron") else {}),
    "bits": bits,
    "memcheck": lambda _: sanitizer("memcheck"),
    "racecheck": lambda _: sanitizer("racecheck"),
    "bench": bench,
}


# ---- the report ----------------------------------------------------------------------------------


def commit() -> dict[str, Any]:
    """Return the commit, and whether files differ from it; None where git does not know."""

    def git(*arguments: str) -> str | None:
        try:
            answer = subprocess.run(
                ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        return answer.stdout.strip()

    status = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def machine() -> dict[str, Any]:
    """Return what the outcomes must be read with."""
    return {
        "gpu": describe_gpu(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": sys.version.partition(" ")[0],
        **commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "benchmarks/gpu_check.py", *sys.argv[1:]]),
    }


def write(path: Path, report: dict[str, Any]) -> None:
    """Write the report as it stands."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, default=asdict) + "\n")


def report_steps(outcomes: dict[str, Outcome]) -> str:
    """Return the table of the steps, in Markdown."""
    rows = [("step", "outcome", "s", ""), ("---", "---", "--:", "---")]
    rows += [
        (name, outcome.status, f"{outcome.seconds:.0f}", outcome.summary)
        for name, outcome in outcomes.items()
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    return "\n".join(lines)


def report_missed(targets: Sequence[dict[str, Any]]) -> str:
    """Return a line for each target that was missed."""
    lines = []
    for target in targets:
        if not target["met"]:
            measured = target["measured"]
            value = measured["median"] if isinstance(measured, dict) else measured
            found = "not measured" if value is None else f"{value:.3g}"
            lines.append(
                f"MISSED: {target['rule']}: {target['target']} {target['wanted']}: {found}"
            )
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/cuda-<GPU>.json")
    parser.add_argument(
        "--skip",
        nargs="+",
        choices=STEPS,
        default=[],
        metavar="STEP",
        help=f"leave out some of: {', '.join(STEPS)}",
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=0.8,
        help="seconds that the benchmark takes per case and rule",
    )
    parser.add_argument("--compare-bits", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run the steps."""
    arguments = parse_arguments()
    reason = why_no_gpu()
    if reason is not None:
        print(f"gpu_check.py: nothing to check: {reason}", file=sys.stderr)
        sys.exit(2)
    if arguments.compare_bits is not None:
        rules = compare_bits()
        arguments.compare_bits.write_text(json.dumps(rules, indent=1))
        sys.exit(any(rule["differing"] for rule in rules.values()))

    about = machine()
    slug = re.sub(r"[^a-z0-9]+", "-", about["gpu"]["name"].lower()).strip("-")
    output = arguments.output or ROOT / "benchmarks" / "results" / f"cuda-{slug}.json"
    outcomes: dict[str, Outcome] = {}
    report: dict[str, Any] = {"machine": about, "steps": outcomes, "benchmark": {}}
    for name, step in STEPS.items():
        if name in arguments.skip:
            continue
        start = time.perf_counter()
        try:
            outcome = step(arguments)
        except Exception as error:
            outcome = Outcome("failed", summary=f"{type(error).__name__}: {error}")
        outcome.seconds = time.perf_counter() - start
        report["benchmark"] = outcome.details.pop("figures", report["benchmark"])
        outcomes[name] = outcome
        write(output, report)
    print(f"\n{report_steps(outcomes)}\n\n{report_missed(report['benchmark'].get('targets', []))}")
    print(f"\nReport: {output}")
    sys.exit(any(outcome.status == "failed" for outcome in outcomes.values()))


if __name__ == "__main__":
    main()
