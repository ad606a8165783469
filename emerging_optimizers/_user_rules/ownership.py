"""Checks that nobody else can have written what is about to be loaded."""

import os
import stat
import sys
from pathlib import Path

from .._build_cache import BuildError

_REMEDY = "Remove it, or set TORCH_EXTENSIONS_DIR to a folder of your own"


def make_folders(folder: Path) -> None:
    """Create a folder of the cache and its parents. Other users can enter all but the last two."""
    for each in (*reversed(folder.parents), folder):
        if not each.is_dir():
            each.mkdir(0o700 if each.is_relative_to(folder.parent) else 0o755, exist_ok=True)


def check(path: Path) -> None:
    """Check that only this user and root can write a file or a folder, if it exists.

    A symbolic link must belong to one of them, and so must what it points to. Access control lists
    are not read.

    Raises:
        BuildError: Somebody else can write it.
    """
    if sys.platform == "win32":
        return
    try:
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode):  # anybody may write a link, as far as its mode tells
            _check_owner(path, status)
            status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise BuildError(f"{path} cannot be inspected ({error.strerror})", _REMEDY) from error
    _check_owner(path, status)
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BuildError(f"{path} can be written by other users ({_describe(status)})", _REMEDY)


def _check_owner(path: Path, status: os.stat_result) -> None:
    if status.st_uid not in (os.geteuid(), 0):
        raise BuildError(f"{path} belongs to another user ({_describe(status)})", _REMEDY)


def _describe(status: os.stat_result) -> str:
    import pwd  # takes a millisecond, and Windows has none

    try:
        owner = pwd.getpwuid(status.st_uid).pw_name
    except KeyError:
        owner = str(status.st_uid)
    return f"owner {owner}, mode {stat.S_IMODE(status.st_mode):03o}"
