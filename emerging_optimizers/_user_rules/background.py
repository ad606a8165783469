"""Builds rules' libraries in the background: in other processes, one after the other."""

import json
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

from .._build_cache import BuildError
from .library import THEN, RuleLibrary

_lock = threading.Lock()
_tasks: deque[Callable[[], None]] = deque()
_thread: threading.Thread | None = None


def run(task: Callable[[], None]) -> None:
    """Run a task in a thread, after the tasks before it."""
    global _thread
    with _lock:
        _tasks.append(task)
        # After a fork, the child has the queue without the thread.
        if _thread is None or not _thread.is_alive():
            _thread = threading.Thread(target=_work, name="emerging_optimizers-rules", daemon=True)
            _thread.start()


def _work() -> None:
    global _thread
    while True:
        with _lock:
            if not _tasks:
                _thread = None
                return
            task = _tasks.popleft()
        task()


def build(product: RuleLibrary) -> Path:
    """Build a library in another process, and wait for it.

    Raises:
        BuildError: It cannot be built.
    """
    description = {
        "folder": str(product.folder),
        "name": product.name,
        "source": product.source,
        "options": product.options,
    }
    command = [sys.executable, "-I", str(Path(__file__).with_name("worker.py"))]
    try:
        # In a session of its own, so that the terminal's signals do not end it.
        done = subprocess.run(
            command,
            input=json.dumps(description),
            capture_output=True,
            text=True,
            encoding="utf-8",
            start_new_session=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).splitlines()
        reason = f"the process that compiles it failed: {lines[-1]}"
        raise BuildError(reason, THEN.capitalize()) from error
    outcome = json.loads(done.stdout)
    sys.stderr.write(outcome["said"])
    if "library" not in outcome:
        raise BuildError(outcome["reason"], outcome["remedy"])
    return Path(outcome["library"])
