"""The stages of the GPU check, the most informative ones first."""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from gpu_processes import ROOT, Finished, Session, tail
from gpu_tests import Outcome, run_tests

# The wheel and its installation: not part of the results.
BUILT = ROOT / "build" / "gpu-check-wheel"


def _marked(stage: str) -> list[str]:
    """Return the test files whose marker names a stage."""
    marker = f'pytest.mark.on_devices("{stage}")'
    paths = sorted((ROOT / "tests").glob("test_*.py"))
    return [f"tests/{path.name}" for path in paths if marker in path.read_text()]


# The arguments of pytest.
TESTS: dict[str, Sequence[str]] = {
    "tests-cuda": (
        *_marked("tests-cuda"),
        *("tests/test_cuda_graphs.py", "tests/test_docs.py::test_cuda_code"),
    ),
    "tests-functions": ("--device", "cuda", *_marked("tests-functions")),
    "tests-optimizers": ("--device", "cuda", *_marked("tests-optimizers")),
    "tests-states": ("--device", "cuda", *_marked("tests-states")),
    "tests-large": (
        *("--slow", "-k", "more_than_two_to_the_31", "--device", "cuda"),
        *("tests/test_cuda.py", "tests/test_memory.py"),
    ),
    "megatron": ("-m", "cuda", "tests/test_megatron_core.py"),
}

# Checks an installed package: its folder, its configuration, and that its kernels are used.
INSTALLED = """
import sys
from pathlib import Path
import torch
import emerging_optimizers
from emerging_optimizers._native import native

assert Path(emerging_optimizers.__file__).parent.parent == Path(sys.path[0])
emerging_optimizers.show_config()
param = torch.nn.Parameter(torch.ones(1000, device="cuda"))
param.grad = torch.ones_like(param)
emerging_optimizers.Lion([param], lr=0.5, weight_decay=0.0, fused=True).step()
assert param.eq(0.5).all()
print("stepped by", native.__file__)
"""


@dataclass(frozen=True)
class Stage:
    """One of the check's stages.

    Attributes:
        name: What the command line calls it.
        tells: What it checks.
        limit: Seconds after which it is stopped.
        run: The function that runs it.
        needs: The stage that must have passed before.
    """

    name: str
    tells: str
    limit: int
    run: Callable[[Session], Outcome]
    needs: str | None = "build"


def judged(finished: Finished, summary: str, **details: Any) -> Outcome:
    """Return the outcome of a process: "passed" if its status is 0."""
    if finished.status == 0:
        return Outcome("passed", summary, details)
    print(tail(finished.output, 40), flush=True)
    how = "stopped for taking too long" if finished.status is None else f"exit {finished.status}"
    summary = f"{how}; {summary}" if summary else how
    return Outcome("failed", summary, {**details, "tail": tail(finished.output)})


def find_program(name: str) -> str | None:
    """Find a program of the CUDA toolkit, on the PATH or in CUDA's folder."""
    folder = os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    return shutil.which(name) or shutil.which(name, path=folder)


def _for_this_gpu() -> dict[str, str]:
    major, minor = torch.cuda.get_device_capability()
    return {
        "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}",
        "EMERGING_OPTIMIZERS_NATIVE": "1",
        "EMERGING_OPTIMIZERS_CUDA": "1",
    }


def _figures(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or {} if it is missing or incomplete."""
    try:
        figures = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return figures if isinstance(figures, dict) else {}


# ---- building ------------------------------------------------------------------------------------


def build(session: Session) -> Outcome:
    """Compile the package in place, for this machine's GPU only."""
    environment = _for_this_gpu()
    architecture = environment["TORCH_CUDA_ARCH_LIST"]
    # --force, because setup.py does not notice another architecture or another compiler; ninja then
    # compiles only what has changed.
    command = [sys.executable, "setup.py", "build_ext", "--inplace", "--force"]
    finished = session.run(command, **environment)
    if finished.status != 0:
        return judged(finished, f"for {architecture}", architecture=architecture)
    config = session.run([sys.executable, "-m", "emerging_optimizers"])
    print(config.output, flush=True)
    sm = rf"^CUDA: .*\bsm_{architecture.replace('.', '')}\b"
    if config.status != 0 or not re.search(sm, config.output, re.MULTILINE):
        summary = f"for {architecture}: compiled, but not in use"
        return Outcome("failed", summary, {"tail": tail(finished.output + config.output)})
    return Outcome("passed", f"for {architecture}", {"config": config.output})


def wheel(session: Session) -> Outcome:
    """Build a wheel as `make wheel` does, unpack it into an empty folder, and use it from there."""
    shutil.rmtree(BUILT, ignore_errors=True)
    site = BUILT / "site"
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "."]
    built = session.run([*command, f"--wheel-dir={BUILT}"], **_for_this_gpu())
    wheels = list(BUILT.glob("*.whl"))
    if built.status != 0 or not wheels:
        return judged(Finished(built.status or 1, built.output), "no wheel")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index"]
    installed = session.run([*command, f"--target={site}", str(wheels[0])])
    if installed.status != 0:
        return judged(installed, "the wheel cannot be installed")
    size = wheels[0].stat().st_size / 1e6
    finished = _use(session, site)
    return judged(finished, f"{wheels[0].name}, {size:.1f} MB", used=tail(finished.output))


def first_import(session: Session) -> Outcome:
    """Remove the compiled module from the installed wheel, and let an import compile it."""
    site = BUILT / "site"
    if not (site / "emerging_optimizers").exists():
        return Outcome("not run", "there is no wheel: run the stage wheel first")
    for module in site.glob("emerging_optimizers/_C.*"):
        module.unlink()
    extensions = BUILT / "extensions"
    shutil.rmtree(extensions, ignore_errors=True)
    environment = {"TORCH_EXTENSIONS_DIR": str(extensions), "EMERGING_OPTIMIZERS_JIT": "1"}
    finished = _use(session, site, **environment, **_for_this_gpu())
    if finished.status == 0 and str(extensions) not in finished.output:
        finished.status = 1
    return judged(finished, "", used=tail(finished.output))


def _use(session: Session, site: Path, **environment: str) -> Finished:
    """Use the package that is installed in a folder."""
    program = site / "use.py"
    program.write_text(INSTALLED)
    finished = session.run([sys.executable, str(program)], **{"PYTHONPATH": "", **environment})
    if finished.status == 0 and "stepped by" not in finished.output:
        finished.status = 1
    return finished


# ---- correctness ---------------------------------------------------------------------------------


def bits(session: Session) -> Outcome:
    """Compare the GPU's results with the CPU's, bit for bit."""
    results = session.output / "bits.json"
    results.unlink(missing_ok=True)
    finished = session.run([sys.executable, "tools/gpu_bits.py", str(results.resolve())])
    rules = _figures(results)
    differing = sum(rule["differing"] for rule in rules.values())
    elements = sum(rule["elements"] for rule in rules.values())
    summary = f"{len(rules)} rules, {differing} of {elements} elements differ"
    outcome = judged(finished, summary, rules=rules)
    if not elements:
        outcome.status = "failed"
    return outcome


def pytests(name: str, session: Session, shards: int = 0) -> Outcome:
    """Run a stage's tests."""
    return run_tests(session, name, TESTS[name], shards)


def megatron(session: Session) -> Outcome:
    """Run the tests of Megatron-Core, if it is installed; they share one process group."""
    if find_spec("megatron") is None:
        return Outcome("unavailable", "megatron-core is not installed")
    return pytests("megatron", session, shards=1)


def sanitizer(tool: str, session: Session) -> Outcome:
    """Run every rule under a tool of compute-sanitizer."""
    program = find_program("compute-sanitizer")
    if program is None:
        return Outcome("unavailable", "there is no compute-sanitizer")
    # Without the last option, API calls whose failure PyTorch handles would count as errors.
    options = ["--tool", tool, "--error-exitcode", "3"]
    options += ["--report-api-errors", "no"] if tool == "memcheck" else []
    finished = session.run(
        [program, *options, sys.executable, "tools/gpu_sanitized.py"],
        PYTORCH_NO_CUDA_MEMORY_CACHING="1",
    )
    if "Device not supported" in finished.output:
        summary = "compute-sanitizer: Device not supported"
        return Outcome("unavailable", summary, {"tail": tail(finished.output)})
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY:.*", finished.output)
    if finished.status == 0 and "swept" not in finished.output:
        finished.status = 1
    return judged(finished, "; ".join(found))


# ---- speed ---------------------------------------------------------------------------------------


def bench(name: str, script: str, arguments: Sequence[str], session: Session) -> Outcome:
    """Run a benchmark, and add its figures to the report, even if it is stopped."""
    results = session.output / f"{name}.json"
    results.unlink(missing_ok=True)
    command = [f"benchmarks/{script}", *arguments, "--json", str(results.resolve())]
    finished = session.run([sys.executable, *command])
    figures = _figures(results)
    targets = figures.get("targets", [])
    met = sum(target["met"] for target in targets)
    outcome = judged(finished, f"{met} of {len(targets)} targets met")
    missed = missed_targets(targets)
    for line in missed:
        session.note(line)
    outcome.details |= {"missed": missed, "figures": figures}
    return outcome


def missed_targets(targets: Sequence[dict[str, Any]]) -> list[str]:
    """Return one line per missed target."""
    lines = []
    for target in targets:
        if not target["met"]:
            measured = target["measured"]
            value = measured["median"] if isinstance(measured, dict) else measured
            found = "not measured" if value is None else f"{value:.3g}"
            lines.append(
                f"MISSED: {target['rule']}: {target['target']} {target['wanted']}: {found}"
            )
    return lines


def variants(session: Session) -> Outcome:
    """Time variants of the kernel, in programs without torch."""
    if find_program("nvcc") is None:
        return Outcome("unavailable", "there is no nvcc")
    folder = session.output / "variants"
    (folder / "drive.json").unlink(missing_ok=True)
    command = ["benchmarks/cuda/drive.py", "--output", str(folder.resolve())]
    finished = session.run([sys.executable, *command, "--seconds", str(VARIANTS_SECONDS)])
    figures = _figures(folder / "drive.json")
    return judged(finished, "" if figures else "no figures", figures=figures)


# The driver stops by itself after VARIANTS_SECONDS.
VARIANTS_LIMIT = 330
VARIANTS_SECONDS = 300

STAGES = (
    Stage("build", "does it compile for this GPU, and is it then in use", 240, build, None),
    Stage("bits", "are all rules bit-identical to the CPU, specials included", 90, bits),
    Stage(
        "tests-cuda",
        "conversions, streams, graphs, launches, Megatron's optimizer, the documentation's code",
        240,
        partial(pytests, "tests-cuda"),
    ),
    Stage(
        "speed",
        "the targets: fractions of the copy bandwidth, launches, host time",
        280,
        partial(bench, "speed", "bench_cuda.py", ("--quick", "--budget", "0.4")),
    ),
    Stage(
        "speed-8bit",
        "the targets of steps with 8-bit states",
        90,
        partial(
            bench, "speed-8bit", "bench_coded_states.py", ("--device", "cuda", "--budget", "15")
        ),
    ),
    Stage(
        "variants", "which constants of tuning.h this GPU prefers", VARIANTS_LIMIT, variants, None
    ),
    Stage(
        "tests-functions",
        "the update functions, on the GPU",
        150,
        partial(pytests, "tests-functions"),
    ),
    Stage(
        "tests-optimizers",
        "the optimizers and torch's conventions, on the GPU",
        240,
        partial(pytests, "tests-optimizers"),
    ),
    Stage(
        "tests-states",
        "loading, shared states and memory, steps of a group, on the GPU",
        150,
        partial(pytests, "tests-states"),
    ),
    Stage(
        "tests-large",
        "tensors of more than 2^31 elements",
        120,
        partial(pytests, "tests-large", shards=1),
    ),
    Stage("megatron", "Megatron-Core's distributed optimizer", 120, megatron),
    Stage("memcheck", "accesses beyond a tensor", 150, partial(sanitizer, "memcheck")),
    Stage("racecheck", "races within a block", 150, partial(sanitizer, "racecheck")),
    Stage("wheel", "does a wheel work in an empty folder", 300, wheel, None),
    Stage(
        "first-import", "does the package compile itself when imported", 300, first_import, "wheel"
    ),
    Stage(
        "bench",
        "every case of the benchmark, against all contenders",
        500,
        partial(bench, "bench", "bench_cuda.py", ("--budget", "0.8")),
    ),
)
