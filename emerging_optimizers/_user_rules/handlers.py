"""Exceptions of Python's arithmetic that a rule would handle: native code never raises them.

A handler is found in the tables of the code that runs. Python 3.10 has none; there, names of
exceptions in the code decide (lifting.py).
"""

import contextlib
import dis
import functools
import sys
import types
from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from .graph import RUN, RuleError

HAS_TABLES = sys.version_info >= (3, 11)
_FOLDER = str(Path(__file__).parent)
# What the `with` statements that suppress errors handle.
_SUPPRESSED: ContextVar[tuple[type[BaseException], ...]] = ContextVar("suppressed", default=())

# The generators whose `with` statements run.
_SUSPENDED: ContextVar[tuple[types.FrameType, ...]] = ContextVar("suspended", default=())


class Suppress(contextlib.suppress):
    """``contextlib.suppress`` in a rule."""

    def __init__(self, *exceptions: type[BaseException]) -> None:
        super().__init__(*exceptions)
        self._classes = exceptions

    def __enter__(self) -> None:
        self._token = _SUPPRESSED.set((*_SUPPRESSED.get(), *self._classes))

    def __exit__(self, *error: Any) -> bool:
        _SUPPRESSED.reset(self._token)
        return bool(super().__exit__(*error))


class GeneratorContext(contextlib._GeneratorContextManager[Any]):
    """A function with ``contextlib.contextmanager`` in a rule."""

    def __enter__(self) -> Any:
        entered = super().__enter__()
        frame = getattr(self.gen, "gi_frame", None)
        self._token = _SUSPENDED.set((*_SUSPENDED.get(), frame) if frame else _SUSPENDED.get())
        return entered

    def __exit__(self, *error: Any) -> bool:
        _SUSPENDED.reset(self._token)
        return bool(super().__exit__(*error))


# What takes the places of classes of contextlib.
CONTEXTS: dict[Any, type] = {
    contextlib.suppress: Suppress,
    contextlib._GeneratorContextManager: GeneratorContext,
}


def check_no_handler(*errors: type[BaseException]) -> None:
    """Raise if the running rule would handle one of these errors, here."""
    frames = list(_SUSPENDED.get())
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != RUN:
        if not frame.f_code.co_filename.startswith(_FOLDER):
            frames.append(frame)
        frame = frame.f_back
    for frame in frames:
        name = _handled(frame, errors)
        if name is not None:
            raise refusal_of_handler(frame.f_code.co_name, name)
    if _catches(_SUPPRESSED.get(), errors):
        raise refusal_of_handler("contextlib.suppress", _names(_SUPPRESSED.get()))


def refusal_of_handler(where: str, name: str) -> RuleError:
    """Return the error for a handler."""
    return RuleError(
        f"{where} handles {name}, which native code never raises: test the operand first, with `if`"
    )


def _handled(frame: types.FrameType, errors: Sequence[type[BaseException]]) -> str | None:
    """Return what handles one of the errors in a frame; None if nothing does."""
    if not getattr(frame.f_code, "co_exceptiontable", b""):
        return None
    entries, instructions = _tables(frame.f_code)
    at, seen = frame.f_lasti, set()
    while True:
        # The handler of the innermost `try`, and then that of what its errors are raised in.
        target = next((entry[2] for entry in entries if entry[0] <= at < entry[1]), None)
        if target is None or target in seen:
            return None
        seen.add(target)
        name = _handler(frame, instructions, target, errors)
        if name is not None:
            return name
        at = target


@functools.lru_cache(maxsize=256)
def _tables(
    code: types.CodeType,
) -> tuple[list[tuple[int, int, int]], dict[int, dis.Instruction]]:
    """Return the ranges that have handlers, and the instructions by their offsets."""
    entries: Any = getattr(dis.Bytecode(code), "exception_entries", ())
    ranges = [(entry.start, entry.end, entry.target) for entry in entries]
    return ranges, {step.offset: step for step in dis.get_instructions(code)}


def _handler(
    frame: types.FrameType,
    instructions: dict[int, dis.Instruction],
    target: int,
    errors: Sequence[type[BaseException]],
) -> str | None:
    """Return what a handler handles of the errors; None if nothing, as for `finally`."""
    steps = sorted(offset for offset in instructions if offset >= target)
    if instructions[target].opname != "PUSH_EXC_INFO" or len(steps) < 2:
        return None
    if instructions[steps[1]].opname == "POP_TOP":
        return "every error"
    stack: list[Any] = []
    i = 1
    while i < len(steps):
        step = instructions[steps[i]]
        i += 1
        if step.opname == "CHECK_EXC_MATCH":
            found = stack.pop() if stack else BaseException
            classes = found if isinstance(found, tuple) else (found,)
            if _catches(classes, errors):
                return _names(classes)
            i = steps.index(instructions[steps[i]].argval)  # the next `except`
            if instructions[steps[i]].opname == "POP_TOP":
                return "every error"
            stack.clear()
        elif not _evaluate(step, stack, frame):
            return None
    return None


def _evaluate(step: dis.Instruction, stack: list[Any], frame: types.FrameType) -> bool:
    """Compute the classes that an `except` names; return False if it is something else."""
    if step.opname == "LOAD_ATTR" and stack:
        stack.append(getattr(stack.pop(), step.argval, BaseException))
    elif step.opname.startswith("LOAD_") and isinstance(step.argval, str):
        scopes = (frame.f_locals, frame.f_globals, frame.f_builtins)
        stack.append(next((s[step.argval] for s in scopes if step.argval in s), BaseException))
    elif step.opname == "BUILD_TUPLE":
        assert step.arg is not None
        items = stack[len(stack) - step.arg :]
        stack[len(stack) - step.arg :] = [tuple(items)]
    else:
        return step.opname in ("CACHE", "NOP", "EXTENDED_ARG", "NOT_TAKEN", "RESUME")
    return True


def _catches(classes: Sequence[Any], errors: Sequence[type[BaseException]]) -> bool:
    known = tuple(each for each in classes if isinstance(each, type))
    return any(issubclass(error, known) for error in errors)


def _names(classes: Sequence[Any]) -> str:
    return " and ".join(each.__name__ for each in classes if isinstance(each, type))
