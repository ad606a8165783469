"""Subprocesses of the GPU check: logged, limited in time, and stopped with their children."""

import contextlib
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Seconds that a process has to end after each signal. The first lets pytest and the benchmark
# write their results; the last cannot be ignored.
SIGNALS = ((signal.SIGINT, 4.0), (signal.SIGTERM, 2.0), (signal.SIGKILL, 2.0))
# The longest time that stopping takes.
GRACE = sum(seconds for _, seconds in SIGNALS)

_PR_SET_PDEATHSIG = 1


class Interrupted(BaseException):
    """The check itself was told to stop."""


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Raise ``Interrupted`` at the first signal that asks to stop; ignore those that follow."""

    def interrupt(number: int, _: object) -> None:
        for other in handlers:
            signal.signal(other, signal.SIG_IGN)
        raise Interrupted(signal.Signals(number).name)

    handlers = {
        number: signal.signal(number, interrupt)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def start(command: Sequence[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
    """Start a command in the repository's root, and append its output to a file."""
    folders = [ROOT, ROOT / "tools", ROOT / "benchmarks", ROOT / "tests"]
    path = [*map(str, folders), os.environ.get("PYTHONPATH")]
    defaults = {
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "PYTHONUNBUFFERED": "1",
        # Only the stage "build" compiles the package: an import must not, even if that failed.
        "EMERGING_OPTIMIZERS_JIT": "0",
    }
    with log.open("ab") as file:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **defaults, **environment},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that it can be stopped with its children
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def stop(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """Interrupt processes and their children; kill those that do not end."""
    processes = list(processes)
    for number, seconds in SIGNALS:
        for process in processes:
            # Even if it has ended: its children may still run.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, number)
        deadline = time.monotonic() + seconds
        while any(_is_alive(process) for process in processes) and time.monotonic() < deadline:
            time.sleep(0.02)


def _is_alive(process: subprocess.Popen[bytes]) -> bool:
    if process.poll() is None:
        return True
    try:
        os.killpg(process.pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


@dataclass
class Finished:
    """A process that has ended; its status is None if it was stopped for taking too long."""

    status: int | None
    output: str


@dataclass
class Session:
    """Where a call of the check writes, and how long the current stage may run.

    Attributes:
        output: The folder of the report and the log.
        deadline: The end of the stage, on the clock of ``time.monotonic``.
    """

    output: Path
    deadline: float = float("inf")

    @property
    def log(self) -> Path:
        """The file with the output of all processes."""
        return self.output / "log.txt"

    def note(self, line: str) -> None:
        """Print a line, and append it to the log."""
        print(line, flush=True)
        with self.log.open("a") as file:
            file.write(f"{line}\n")

    def run(self, command: Sequence[str], **environment: str) -> Finished:
        """Run a command until it ends or the stage's time is up."""
        self.note("$ " + shlex.join(command)[:200].partition("\n")[0])
        begin = self.log.stat().st_size
        process = start(command, self.log, **environment)
        status: int | None = None
        try:
            status = process.wait(max(0.0, self.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        finally:
            stop([process])
        with self.log.open("rb") as file:
            file.seek(begin)
            return Finished(status, file.read().decode(errors="replace"))


def tail(text: str, lines: int = 60) -> str:
    """Return the last lines of a text, each cut to 500 characters."""
    return "\n".join(line[:500] for line in text.splitlines()[-lines:])
