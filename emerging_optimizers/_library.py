"""Checks that a compiled library is complete before it is loaded.

Loading a truncated library kills the process: the loader maps as many bytes as the header claims,
and reading beyond the end of the file is a bus error. So the header is checked first. Libraries
built at the first import also end in a checksum, which detects any other damage.
"""

import errno
import os
import struct
import sys
import zlib
from pathlib import Path
from typing import BinaryIO

_IS_ELF = sys.platform not in ("win32", "darwin")
_SEAL = b"\nemerging_optimizers crc32 "
_SEAL_SIZE = len(_SEAL) + 8
_SHT_STRTAB = 3
# Bytes per read. A buffer of this size is reused, so that reading causes no page faults.
_PIECE = 1 << 16


def fault(path: Path, is_for_host: bool = True) -> str:
    """Return what is wrong with a library, as a predicate for its name; "" if it is complete.

    Args:
        path: The library.
        is_for_host: Whether it must be for the processor that torch runs on.
    """
    try:
        if path.is_dir():
            return "is a folder, not a library"
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                return "is empty"
            if not _IS_ELF:
                return ""
            return _elf_fault(file, size, is_for_host) or _checksum_fault(file, size)
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def seal(path: Path) -> None:
    """Append the checksum and flush the file to disk."""
    with path.open("r+b") as file:
        if _IS_ELF:  # other formats may not allow trailing bytes
            checksum = _checksum(file, os.fstat(file.fileno()).st_size)
            file.seek(0, os.SEEK_END)
            file.write(_SEAL + b"%08x" % checksum)
            file.flush()
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
                raise  # with any other error, the file system does not support fsync


def _elf_fault(file: BinaryIO, size: int, is_for_host: bool) -> str:
    header = file.read(64)
    if header[:4] != b"\x7fELF":
        return "is damaged: it has no ELF header"
    if len(header) < 64:
        return "is truncated"
    if is_for_host and not _fits_host(header):
        return "was compiled for another processor"
    if header[4] != 2:
        return ""
    (phoff, shoff), sizes = (
        struct.unpack_from("=QQ", header, 32),
        struct.unpack_from("=5H", header, 54),
    )
    phentsize, phnum, shentsize, shnum, shstrndx = sizes
    file.seek(phoff)
    segments = file.read(phentsize * phnum)
    end = max(phoff + phentsize * phnum, shoff + shentsize * shnum)
    for start in range(0, len(segments) - 55, max(phentsize, 56)):
        offset, _, _, length = struct.unpack_from("=4Q", segments, start + 8)
        end = max(end, offset + length)
    if size < end:
        return f"is truncated: it has {size} of at least {end} bytes"
    if shoff and shstrndx:
        # The section headers come last. Zeros there mean that the file was never filled.
        file.seek(shoff + shentsize * shstrndx + 4)
        if file.read(4) != struct.pack("=I", _SHT_STRTAB):
            return "is damaged: its section headers are invalid"
    return ""


def _fits_host(header: bytes) -> bool:
    import torch

    with open(torch._C.__file__, "rb") as other:
        expected = other.read(20)
    # Word size, byte order, processor.
    return (header[4:6], header[18:20]) == (expected[4:6], expected[18:20])


def _checksum_fault(file: BinaryIO, size: int) -> str:
    file.seek(max(size - _SEAL_SIZE, 0))
    end = file.read()
    if not end.startswith(_SEAL):
        return ""  # an installed module, or built by an earlier version
    checksum = b"%08x" % _checksum(file, size - _SEAL_SIZE)
    return "" if end[len(_SEAL) :] == checksum else "is damaged: its checksum does not match"


def _checksum(file: BinaryIO, size: int) -> int:
    file.seek(0)
    checksum = 0
    for start in range(0, size, _PIECE):
        checksum = zlib.crc32(file.read(min(_PIECE, size - start)), checksum)
    return checksum
