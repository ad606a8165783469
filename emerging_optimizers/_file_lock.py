"""Locks a file across processes.

The operating system holds the lock until the file is closed or the process ends, however it ends.
"""

import errno
import sys
import time
from collections.abc import Callable
from typing import NamedTuple, TextIO


class Attempt(NamedTuple):
    """The outcome of locking a file.

    Attributes:
        has_waited: Whether another process held the lock at first.
        error: Why the file cannot be locked, as on some network file systems; None if it is locked.
    """

    has_waited: bool
    error: OSError | None


def acquire(file: TextIO, limit: float, on_wait: Callable[[], None]) -> Attempt:
    """Lock an open file until it is closed.

    Args:
        file: The file, open for writing.
        limit: Seconds to wait for another process that holds the lock.
        on_wait: Called once, before the wait begins.

    Raises:
        TimeoutError: Another process holds the lock for longer than ``limit``.
    """
    deadline = time.monotonic() + limit
    has_waited = False
    while True:
        try:
            if _try_lock(file.fileno()):
                return Attempt(has_waited, None)
        except OSError as error:
            return Attempt(has_waited, error)
        if not has_waited:
            on_wait()
            has_waited = True
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.1)


# Returns False if another process holds the lock. Raises OSError if the file cannot be locked.
if sys.platform == "win32":
    import msvcrt

    def _try_lock(descriptor: int) -> bool:
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EDEADLK):
                return False
            raise
        return True

else:
    import fcntl

    def _try_lock(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
