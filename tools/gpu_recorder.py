"""A pytest plugin that writes each test's outcome to a file as soon as it is known.

    python -m pytest -p gpu_recorder --record results.jsonl --record-as STAGE --shard 3/12 ...

Each line is a JSON object. Several processes may append to one file; each runs its shard of the
tests, except those that already have an outcome in this stage. After a failure that makes the GPU
unusable for the process, it ends with the status ``RESTART``, to be restarted for the other tests.
"""

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

RESTART = 77
# After these errors the CUDA context is lost: all later tests of the process would fail, too.
LOST_CONTEXT = ("CUDA error", "AcceleratorError", "cudaError")


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file, except one that was cut off."""
    lines = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def lines_of(stage: str, lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines of a stage's last run."""
    found: list[dict[str, Any]] = []
    for line in lines:
        if line["stage"] == stage:
            if line["event"] == "begin":
                found.clear()
            found.append(line)
    return found


def append(path: Path, stage: str, event: str, **values: Any) -> None:
    """Append a line in a single write."""
    line = json.dumps({"stage": stage, "event": event, "time": time.time(), **values})
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(descriptor, f"{line}\n".encode())
    finally:
        os.close(descriptor)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    parser.addoption("--record", type=Path, required=True, help="the file of outcomes")
    parser.addoption("--record-as", required=True, help="the stage that outcomes belong to")
    parser.addoption("--shard", required=True, help="which of how many shards to run: 0/12")


def pytest_configure(config: pytest.Config) -> None:
    """Start recording."""
    config.pluginmanager.register(_Recorder(config))


class _Recorder:
    def __init__(self, config: pytest.Config) -> None:
        self.path: Path = config.getoption("--record")
        self.stage: str = config.getoption("--record-as")
        self.shard, self.shards = map(int, config.getoption("--shard").split("/"))
        self.outcome, self.message = "passed", ""

    def write(self, event: str, **values: Any) -> None:
        append(self.path, self.stage, event, shard=self.shard, **values)

    @pytest.hookimpl(trylast=True)  # after -k and -m
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        lines = lines_of(self.stage, read(self.path))
        done = {line["test"] for line in lines if line["event"] == "end"}
        self.write("collected", count=len(items))
        mine = [item for item in items[self.shard :: self.shards] if item.nodeid not in done]
        config.hook.pytest_deselected(items=[item for item in items if item not in mine])
        items[:] = mine

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.outcome != "passed":
            outcome = "error" if report.failed else "skipped"
            self.write("end", test=report.nodeid, outcome=outcome, message=_message(report))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.outcome, self.message = "passed", ""
        self.start = time.perf_counter()
        self.write("start", test=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.outcome != "passed" and self.outcome != "failed":
            self.outcome, self.message = report.outcome, _message(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        seconds = round(time.perf_counter() - self.start, 3)
        self.write("end", test=nodeid, outcome=self.outcome, seconds=seconds, message=self.message)
        if self.outcome == "failed" and any(words in self.message for words in LOST_CONTEXT):
            pytest.exit("the CUDA context is lost", returncode=RESTART)


def _message(report: pytest.CollectReport | pytest.TestReport) -> str:
    """Return why a test was skipped, or the end of its error report."""
    if report.skipped and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    return report.longreprtext[-4000:]
