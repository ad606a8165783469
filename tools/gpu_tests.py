"""Runs pytest in parallel processes for the GPU check, and judges each test's outcome.

The processes share only the file of outcomes, so no plugin has to be installed. A crash or a hang
costs one test: the process is restarted for the others.
"""

import json
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from subprocess import Popen
from typing import Any

from gpu_processes import ROOT, Session, start, stop
from gpu_recorder import RESTART, append

# Seconds after which a test is stopped.
TEST_LIMIT = 100.0
MAX_PROCESSES = 12
# How often a stage restarts processes.
MAX_RESTARTS = 20
# All passed, some failed, collection errors, no tests: the recorded outcomes decide.
PYTEST_STATUSES = (0, 1, 2, 5)

# The reasons for which a test may be skipped on a machine with a GPU and compiled kernels: it needs
# an option, or does not apply to its parameters. Any other skip is a failure.
DELIBERATE = re.compile(
    r"slow: |of gradients only|of one beta only|the rule has no states|for tensors on the CPU"
    r"|there is no native step for it|found with all other memory that is shared"
    r"|compiles by c\+\+|the copies have kernels only on emulated devices"
)

# Optional packages: test files that need a missing one are left out.
OPTIONAL = ("hypothesis", "expecttest")


@dataclass
class Outcome:
    """The outcome of a stage.

    Attributes:
        status: "passed", "failed", "interrupted", "unavailable" if this machine cannot run it,
            or "not run".
        summary: One line for the reader.
        details: Further entries of the report.
        seconds: How long it took.
    """

    status: str
    summary: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return the entries of the report."""
        return asdict(self)


@dataclass
class _Shard:
    number: int
    process: "Popen[bytes]"


def results_of(session: Session) -> Path:
    """Return the path of the file of outcomes."""
    return session.output / "tests.jsonl"


def run_tests(session: Session, stage: str, arguments: Sequence[str], shards: int = 0) -> Outcome:
    """Run tests in parallel processes until the stage's time is up."""
    if find_spec("pytest") is None:
        return Outcome("unavailable", "pytest is not installed")
    arguments, left_out = _without_missing(arguments)
    if not any(".py" in argument for argument in arguments):
        return Outcome("unavailable", "; ".join(left_out))
    cores = os.cpu_count() or 1
    shards = shards or min(cores, MAX_PROCESSES)
    results = results_of(session)
    append(results, stage, "begin")
    lines = _Lines(results)

    def begin(number: int) -> _Shard:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_recorder"]
        command += ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
        command += ["-o", f"faulthandler_timeout={0.8 * TEST_LIMIT:g}"]
        command += ["--record", str(results.resolve()), "--record-as", stage]
        command += ["--shard", f"{number}/{shards}", *arguments]
        if number == 0:
            session.note("$ " + " ".join(command[1:]) + f"  # and {shards - 1} other shards")
        environment = {
            "OMP_NUM_THREADS": str(max(1, cores // shards)),
            # No installed plugin is needed, and some change the order of tests.
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        }
        return _Shard(number, start(command, session.log, **environment))

    running: list[_Shard] = []
    problems: list[str] = []
    restarts = 0
    try:
        running += [begin(number) for number in range(shards)]
        while running:
            time.sleep(0.1)
            if time.monotonic() > session.deadline:
                problems.append("stopped for taking too long")
                break
            statuses = [shard.process.poll() for shard in running]
            lines.read()  # after poll: processes that have ended have written everything
            for shard, status in zip(list(running), statuses, strict=True):
                test, since = lines.test_of(shard.number)
                if status is None and (test is None or time.time() - since < TEST_LIMIT):
                    continue
                running.remove(shard)
                stop([shard.process])
                if test is not None:
                    outcome, message = "crashed", f"its process ended with {_status(status)}"
                    if status is None:
                        outcome, message = "hung", f"stopped after {TEST_LIMIT:g} s"
                    end = {"test": test, "outcome": outcome, "message": message}
                    append(results, stage, "end", shard=shard.number, **end)
                elif status not in (RESTART, *PYTEST_STATUSES):
                    problems.append(f"a process ended with {_status(status)}")
                if test is not None or status == RESTART:
                    restarts += 1
                    if restarts <= MAX_RESTARTS:
                        running.append(begin(shard.number))
    finally:
        stop(shard.process for shard in running)
    lines.read()
    return judge(lines.lines, [*problems, *left_out], has_failed=bool(problems))


class _Lines:
    """The lines that a stage's run adds to the file of outcomes, read as it grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = path.stat().st_size
        self.lines: list[dict[str, Any]] = []

    def read(self) -> None:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            text = file.read()
        text = text[: text.rfind(b"\n") + 1]
        self.offset += len(text)
        self.lines += map(json.loads, text.splitlines())

    def test_of(self, shard: int) -> tuple[str | None, float]:
        """Return the test that a shard is running, and when it started."""
        for line in reversed(self.lines):
            if line.get("shard") == shard and line["event"] in ("start", "end"):
                return (line["test"] if line["event"] == "start" else None), line["time"]
        return None, 0.0


def _without_missing(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Leave out test files that need a missing package; return the others, and why."""
    kept, left_out = [], []
    for argument in arguments:
        path = ROOT / argument.partition("::")[0]
        text = path.read_text() if path.suffix == ".py" and path.exists() else ""
        missing = [
            name
            for name in OPTIONAL
            if re.search(rf'^(import|from) {name}\b|importorskip\("{name}"', text, re.MULTILINE)
            and find_spec(name) is None
        ]
        if missing:
            left_out.append(f"left out {path.name}: {missing[0]} is not installed")
        else:
            kept.append(argument)
    return kept, left_out


def _status(status: int | None) -> str:
    if status is None or status >= 0:
        return f"exit status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


def judge(
    lines: Sequence[dict[str, Any]], notes: Sequence[str] = (), has_failed: bool = False
) -> Outcome:
    """Judge a stage by the lines of its last run."""
    ends = {line["test"]: line for line in lines if line["event"] == "end"}
    started = [line["test"] for line in lines if line["event"] == "start"]
    collected = max((line["count"] for line in lines if line["event"] == "collected"), default=0)
    cut = [test for test in dict.fromkeys(started) if test not in ends]
    counts = Counter(line["outcome"] for line in ends.values())
    skips = {test: line["message"] for test, line in ends.items() if line["outcome"] == "skipped"}
    forbidden = {test: why for test, why in skips.items() if not DELIBERATE.match(why)}
    failed = {
        test: f"{line['outcome']}: {line['message']}"
        for test, line in ends.items()
        if line["outcome"] not in ("passed", "skipped")
    }
    # Files that could not be collected have an outcome, but are no tests.
    not_run = collected - sum(test in ends for test in dict.fromkeys(started)) - len(cut)
    parts = [f"{counts['passed']} passed"]
    parts += [
        f"{counts[how]} {how}" for how in ("failed", "error", "crashed", "hung") if counts[how]
    ]
    on_purpose = len(skips) - len(forbidden)
    parts += [f"{on_purpose} skipped on purpose"] if on_purpose else []
    parts += [f"{len(forbidden)} skipped that must run"] if forbidden else []
    parts += [f"{len(cut)} cut short"] if cut else []
    parts += [f"{not_run} not run"] if not_run > 0 else []
    has_failed |= bool(failed or forbidden or cut or not_run > 0 or not counts["passed"])
    slowest = sorted(ends.values(), key=lambda line: -line.get("seconds", 0.0))[:10]
    return Outcome(
        "failed" if has_failed else "passed",
        "; ".join([", ".join(parts), *notes]),
        {
            "passed": counts["passed"],
            "failed": failed,
            "skipped_that_must_run": forbidden,
            "skipped": dict(Counter(skips.values())),
            "cut_short": cut,
            "not_run": max(0, not_run),
            "slowest": {line["test"]: line.get("seconds", 0.0) for line in slowest},
        },
    )
