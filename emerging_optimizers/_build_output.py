"""Finds the first error in the output of a failed build."""

import re
import subprocess
import sys

# Terminal escapes for colors and links.
_ESCAPES = re.compile(r"\x1b(?:\[[0-9;:]*[A-Za-z]|\].*?(?:\x07|\x1b\\))")
# Ninja's report of a failed command: this line, the command, then its output.
_FAILED = re.compile(r"^FAILED: (?:\[code=(\d+)\])?.*\n.*(?:\n|\Z)", re.MULTILINE)
_NEXT = re.compile(r"^(?:\[\d+/\d+\] |ninja: (?:build stopped|subcommand failed))", re.MULTILINE)
# Lines that quote source code, name a location, or are warnings.
_CONTEXT = re.compile(
    r"\s|In file included from|.*: (?:[Ii]n (?:\w+ )*(?:function|constructor|destructor|lambda)\b"
    r"|In instantiation of|In substitution of|[Aa]t global scope|(?:warning|note|remark)\b)"
    r"|\S+\(\d+\): warning "
)
# "error" alone also occurs in options and file names.
_ERROR = re.compile(
    r"\b(?i:error|fatal)(?: [A-Z#]+\d+(?:-D)?)?\s*:|\bundefined (?:reference|symbol)"
    r"|\bcannot find\b|\bmultiple definition of\b|\bunresolved external\b"
)
# The compiler's summary, which follows the linker's error.
_SUMMARY = re.compile(r".*\berror: (?:ld returned|linker command failed)")
_LONGEST = 500


def output_of(error: BaseException) -> str:
    """Return the output of the failed command if there was one, else the error's message."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, subprocess.CalledProcessError) and cause.output:
            encoding = "oem" if sys.platform == "win32" else "utf-8"
            return _ESCAPES.sub("", cause.output.decode(encoding, errors="replace"))
        cause = cause.__cause__ or cause.__context__
    return str(error) or type(error).__name__


def first_error(text: str) -> str:
    """Return the line with the first error."""
    failed = _FAILED.search(text)
    code = ""
    if failed is not None:
        code = failed[1] or ""
        text = _NEXT.split(text[failed.end() :], maxsplit=1)[0]
        text = text.partition("\nFAILED: ")[0]
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines if not _CONTEXT.match(line)]
    errors = [line for line in told if _ERROR.search(line) and not _SUMMARY.match(line)]
    for line in (*errors, *told, *lines):
        line = line.strip()
        return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ..."
    return "the compiler printed nothing" + (f" (exit status {code})" if code else "")


def was_killed(text: str) -> bool:
    """Return whether a compiler was killed, most likely because memory ran out."""
    return re.search(r"\[code=137\]|\bKilled\b|out of memory|bad_alloc", text) is not None
