"""Builds, tests and measures the package on this machine's GPU, in stages.

    python tools/gpu_check.py            # as many stages as fit nine minutes, in order
    python tools/gpu_check.py --resume   # the stages that have not passed yet
    python tools/gpu_check.py --list     # the stages, their limits, and what they check
    python tools/gpu_check.py --only build,bits
    python tools/gpu_check.py --skip wheel first-import bench --output build/gpu --budget inf

It needs torch with CUDA, a CUDA compiler, numpy and pytest, and downloads nothing. Tests that need
other packages are left out where those are missing, and the report says so. Each stage runs in
separate processes with a time limit. The --output folder holds report.json, rewritten after every
stage; tests.jsonl, with each test's outcome as soon as it is known; and log.txt, the output of all
processes. A later call with the same folder keeps the outcomes of the stages that it does not run.

Exit status: 0 if all requested stages passed or are unavailable here, 1 if one failed, 2 for an
invalid command line, 3 if there is no GPU, 4 if the check was interrupted, 5 if some stages were
not run for lack of time. A missed speed target is reported, but is not a failure.
"""

import argparse
import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from gpu_processes import GRACE, ROOT, Interrupted, Session, interruptible
from gpu_recorder import lines_of, read
from gpu_stages import STAGES, Stage, find_program
from gpu_tests import Outcome, judge, results_of

sys.path.append(str(ROOT / "benchmarks"))  # for the description of the GPU
from gpu import describe_gpu, why_no_gpu

OUTPUT = ROOT / "build" / "gpu-check"
BUDGET = 540.0
FAILED, NO_GPU, INTERRUPTED, NOT_RUN = 1, 3, 4, 5


# ---- the report ----------------------------------------------------------------------------------


def commit() -> dict[str, Any]:
    """Return the commit, and whether tracked files differ from it; None without git."""

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


def machine(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the hardware, software and command that the outcomes are for."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    packages = ("setuptools", "ninja", "numpy", "pytest", "hypothesis", "expecttest")
    programs = ("nvcc", "ncu", "compute-sanitizer", "ninja", "g++", "make")
    return {
        "gpu": describe_gpu(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": sys.version.partition(" ")[0],
        "packages": {package: version(package) for package in packages},
        "programs": {program: find_program(program) is not None for program in programs},
        **commit(),
        "date": now(),
        "command": shlex.join(["python", "tools/gpu_check.py", *arguments]),
    }


def now() -> str:
    """Return the date and time."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


class Report:
    """The outcomes of all stages so far, in a file that is always valid JSON."""

    def __init__(self, session: Session, about: dict[str, Any]) -> None:
        """Read the outcomes of earlier calls."""
        self.path = session.output / "report.json"
        self.machine = about
        self.stages: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            self.stages = json.loads(self.path.read_text())["stages"]
        for name, stage in self.stages.items():
            if stage["status"] == "running":  # the call was killed
                stage.update(interrupted(session, name, "the check was killed").as_dict())
        self.write()

    def put(self, name: str, outcome: Outcome) -> None:
        """Record the outcome of a stage."""
        read_with = {key: self.machine[key] for key in ("commit", "dirty", "torch")}
        gpu = self.machine["gpu"]["name"]
        self.stages[name] = {**outcome.as_dict(), "gpu": gpu, **read_with, "date": now()}
        self.write()

    def write(self) -> None:
        """Replace the report atomically."""
        order = [stage.name for stage in STAGES if stage.name in self.stages]
        stages = {name: self.stages[name] for name in order}
        text = json.dumps({"machine": self.machine, "stages": stages}, indent=1) + "\n"
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(text)
        temporary.replace(self.path)

    def has_passed(self, name: str) -> bool:
        """Whether a stage has passed at this commit on this GPU model."""
        stage = self.stages.get(name, {})
        is_same = stage.get("commit") == self.machine["commit"]
        is_same &= stage.get("gpu") == self.machine["gpu"]["name"]
        return is_same and stage.get("status") == "passed"

    def table(self) -> str:
        """Return the stages as a Markdown table."""
        rows = [("stage", "outcome", "s", ""), ("---", "---", "--:", "---")]
        rows += [
            (name, stage["status"], f"{stage['seconds']:.0f}", stage["summary"])
            for name, stage in json.loads(self.path.read_text())["stages"].items()
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = (
            " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            for row in rows
        )
        return "\n".join(f"| {line} |" for line in lines)


def interrupted(session: Session, name: str, why: str) -> Outcome:
    """Return the outcome of an interrupted stage, with the tests that it finished."""
    lines = lines_of(name, read(results_of(session)))
    outcome = judge(lines, has_failed=True) if lines else Outcome("interrupted")
    outcome.status = "interrupted"
    outcome.summary = "; ".join(filter(None, [why, outcome.summary]))
    return outcome


# ---- the call ------------------------------------------------------------------------------------


class _Stages(argparse.Action):
    """Stage names separated by commas or spaces."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        names = [name for value in values for name in value.split(",") if name]
        known = [stage.name for stage in STAGES]
        for name in names:
            if name not in known:
                parser.error(
                    f"{option_string}: no stage is called {name!r}; there are {', '.join(known)}"
                )
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or []), *names])


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="gpu_check.py",
        description=__doc__.partition("\n")[0],
        epilog="Exit status: " + __doc__.partition("Exit status: ")[2],
        allow_abbrev=False,
    )
    names: dict[str, Any] = {"nargs": "+", "action": _Stages, "metavar": "STAGE"}
    parser.add_argument("--only", **names, help="run these stages, in their order")
    parser.add_argument("--skip", **names, default=[], help="skip these stages")
    parser.add_argument("--list", action="store_true", help="list the stages and exit")
    parser.add_argument(
        "--resume", action="store_true", help="skip the stages that --output says have passed"
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=BUDGET,
        metavar="SECONDS",
        help="start no stage that could end later (%(default)g; inf for no limit)",
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder (build/gpu-check)")
    return parser.parse_args(arguments)


def list_stages() -> str:
    """Return one line per stage: its name, its limit, and what it checks."""
    return "\n".join(f"{stage.name:17}{stage.limit:4} s  {stage.tells}" for stage in STAGES)


def run_stage(stage: Stage, session: Session, report: Report) -> Outcome:
    """Run a stage; an exception is its failure."""
    session.deadline = time.monotonic() + stage.limit
    session.note(f"\n==== {stage.name}: {stage.tells} (at most {stage.limit} s)")
    report.put(stage.name, Outcome("running"))
    start = time.monotonic()
    try:
        outcome = stage.run(session)
    except Interrupted as signal:
        outcome = interrupted(session, stage.name, f"the check was interrupted ({signal})")
    except Exception as error:
        outcome = Outcome("failed", f"{type(error).__name__}: {error}")
    outcome.seconds = round(time.monotonic() - start, 1)
    report.put(stage.name, outcome)
    session.note(f"{stage.name}: {outcome.status}: {outcome.summary}")
    return outcome


def check(arguments: argparse.Namespace, session: Session, report: Report) -> int:
    """Run the stages that were asked for; return the exit status."""
    end = time.monotonic() + arguments.budget
    statuses = set()
    for stage in STAGES:
        if stage.name in arguments.skip or stage.name not in (arguments.only or [stage.name]):
            continue
        if arguments.resume and report.has_passed(stage.name):
            continue
        needed = report.stages.get(stage.needs or "", {}).get("status", "passed")
        if needed != "passed":
            why = "failed" if needed == "failed" else f"has not passed ({needed})"
            outcome = Outcome("not run", f"the stage {stage.needs} {why}")
            report.put(stage.name, outcome)
        elif time.monotonic() + stage.limit + GRACE > end:
            left = max(0.0, end - time.monotonic())
            outcome = Outcome("not run", f"no time: {left:.0f} s are left of {stage.limit}")
            # The outcome of an earlier call is more informative.
            if report.stages.get(stage.name, outcome.as_dict())["status"] == "not run":
                report.put(stage.name, outcome)
        else:
            outcome = run_stage(stage, session, report)
        statuses.add(outcome.status)
        if outcome.status == "not run":
            session.note(f"{stage.name}: not run: {outcome.summary}")
        if outcome.status == "interrupted":
            return INTERRUPTED
    if "failed" in statuses:
        return FAILED
    return NOT_RUN if "not run" in statuses else 0


def main(arguments: Sequence[str]) -> int:
    """Run the check; return the exit status."""
    parsed = parse_arguments(arguments)
    if parsed.list:
        print(list_stages())
        return 0
    reason = why_no_gpu()
    if reason is not None:
        print(f"gpu_check.py: nothing to check: {reason}", file=sys.stderr)
        return NO_GPU
    parsed.output.mkdir(parents=True, exist_ok=True)
    session = Session(parsed.output)
    with interruptible():
        report = None
        try:
            report = Report(session, machine(arguments))
            status = check(parsed, session, report)
        except Interrupted:  # between two stages
            status = INTERRUPTED
        if report is not None:
            session.note(f"\n{report.table()}\n\nReport: {report.path}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
