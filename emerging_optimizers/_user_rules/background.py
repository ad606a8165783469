"""Builds rules' libraries in the background: in other processes, one after the other."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .._build_cache import BuildError, load_once
from .library import RuleLibrary

_lock = threading.Lock()
_tasks: deque[Callable[[], None]] = deque()
_thread: threading.Thread | None = None


def run(task: Callable[[], None]) -> None:
    """Run a task in a thread, after the tasks before it."""
    global _thread
    with _lock:
        _tasks.append(task)
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


def after_fork() -> None:
    """Forget the parent's tasks, which its thread does."""
    global _lock, _thread
    _lock = threading.Lock()
    _tasks.clear()
    _thread = None


def build(product: RuleLibrary) -> Path:
    """Build a library in another process, and wait for it.

    Raises:
        BuildError: It cannot be built.
    """
    # In an application that contains Python, `executable` is the application, or missing.
    outcome = None
    if sys.executable and not getattr(sys, "frozen", False):
        with contextlib.suppress(OSError, ValueError, subprocess.CalledProcessError):
            outcome = _ask_worker(product)
    if outcome is None:
        return load_once(product)  # at least the compiler is another process
    if "library" not in outcome:
        raise BuildError(outcome["reason"], outcome["remedy"])
    product.seconds = outcome["seconds"]
    return Path(outcome["library"])


def _ask_worker(product: RuleLibrary) -> dict[str, Any]:
    """Return what worker.py writes, which it does even if this process ends before.

    Files, not pipes: a process that is forked meanwhile would keep a pipe open.
    """
    description = {
        "folder": str(product.folder),
        "name": product.name,
        "source": product.source,
        "options": product.options,
    }
    with tempfile.TemporaryFile("w+") as question, tempfile.TemporaryFile("w+") as answer:
        json.dump(description, question)
        question.seek(0)
        subprocess.run(
            [sys.executable, "-I", "-B", str(Path(__file__).with_name("worker.py"))],
            stdin=question,
            stdout=answer,
            stderr=subprocess.DEVNULL,
            # Another program than Python must not build rules in turn.
            env={**os.environ, "EMERGING_OPTIMIZERS_JIT": "0"},
            start_new_session=True,  # the terminal's signals do not end it
            check=True,
        )
        answer.seek(0)
        outcome: dict[str, Any] = json.load(answer)
    return outcome
