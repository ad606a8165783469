"""Compiles the C++ text of a rule to a shared library, or finds it in the cache.

One call of the C++ compiler, for the instruction set in use and without torch's headers, so it
takes seconds. The cache is the one of the build at the first import (_build_cache.py). A rule's
library is loaded only if nobody but this user and root can have written it. That is checked from
the folder `rules` on; whoever can replace that folder can also replace the native kernels beside
it.
"""

import hashlib
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .. import _build, _build_cache
from .._build_cache import BuildError
from .._native import native
from . import ownership

_THEN = "call the rule's compile() again"


def library_for(
    name: str,
    source: str,
    options: Sequence[str] = (),
    headers: Sequence[str] = (),
    then: str = _THEN,
) -> Path:
    """Return the shared library of a rule, which is compiled now unless it is in the cache.

    Args:
        name: The rule's name, an identifier.
        source: The rule's C++ text, which includes ``engine/rule_unit.h``.
        options: Further options of the compiler, which do not change the library.
        headers: The texts of the other headers that it depends on.
        then: What happens once an error is fixed, as a clause.

    Raises:
        BuildError: It cannot be compiled, or others can write to its place in the cache.
    """
    if sys.platform == "win32":
        raise BuildError(
            "rules are not compiled on Windows yet", "Use the Windows Subsystem for Linux"
        )
    csrc = _build_cache.csrc()
    shared = _options(csrc)
    key = _key(source, shared, csrc, headers)
    folder = _build_cache.root(then) / "rules" / f"{name}-{key}"
    options = [*shared, *options, f"-I{csrc}"]
    return _build_cache.load_once(_RuleLibrary(folder, name, source, options, then))


class _RuleLibrary(_build_cache.Product[Path]):
    """The library of one rule."""

    retry = "use the rule again"
    file_mode = 0o600

    def __init__(self, folder: Path, name: str, source: str, options: list[str], then: str) -> None:
        super().__init__(folder, f"{name}{_build_cache.SUFFIX}")
        self.what = f"the rule {name}"
        self.then = then
        self.name = name
        self.source = source
        self.options = options
        self.seconds = 0.0

    def missing_tool(self) -> tuple[str, str] | None:
        if os.environ.get("EMERGING_OPTIMIZERS_JIT") == "0":
            return f"EMERGING_OPTIMIZERS_JIT=0, and {self.folder} has no library", "Unset it"
        return _build_cache.missing_compiler(self.then)

    def make_folder(self) -> None:
        rules = self.folder.parent
        for folder in (*reversed(rules.parents), rules, self.folder):
            if not folder.is_dir():
                # Other users may find the native kernels beside the rules.
                folder.mkdir(0o700 if folder.is_relative_to(rules) else 0o755, exist_ok=True)

    def check(self) -> None:
        for path in (self.folder.parent, self.folder, self.folder / self.pattern):
            ownership.check(path)

    def compile(self, folder: Path) -> Path:
        # The text stays beside the library: the compiler's errors and debuggers refer to it.
        text = folder / f"{self.name}.cpp"
        text.touch(self.file_mode)
        text.write_text(self.source, encoding="utf-8")
        text = text.replace(self.folder / text.name)
        library = folder / self.pattern
        command = [*_build.compiler_words(), *self.options, str(text), "-o", str(library)]
        start = time.perf_counter()
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "LC_ALL": "C"},  # for messages in English
            check=False,
        )
        self.seconds = time.perf_counter() - start
        if done.returncode:
            end = "Killed" if done.returncode == -9 else f"exit status {done.returncode}"
            output = done.stdout or f"the compiler printed nothing ({end})".encode()
            raise subprocess.CalledProcessError(done.returncode, command, output)
        library.chmod(0o700)
        return library

    def load(self, library: Path) -> Path:
        return library

    def finish(self, library: Path) -> Path:
        _build_cache.say(f"compiled {self.what} in {self.seconds:.1f} s (cached in {self.folder})")
        return library

    def finish_unsaved(self, error: OSError) -> Path:
        raise _build_cache.not_writable(self, error) from error


def _options(csrc: Path) -> list[str]:
    """Return the compiler's options, except for the headers' folder."""
    assert native is not None  # without kernels, a rule's formula runs
    return [
        "-std=c++20",
        "-shared",
        "-fPIC",
        *_build.COMPILE_ARGS["unix"],
        f"-DEMOPT_ABI={_build.abi(csrc)}",
        "-DEMOPT_CUDA=0",
        f"-DEMOPT_ONLY_ISA_{native.active_isa()}",
    ]


def _key(source: str, options: list[str], csrc: Path, others: Sequence[str]) -> str:
    """Return a hash of what the library depends on. EMOPT_ABI covers most of the headers."""
    included = set(re.findall(r'^#include "([\w./]+)"', source, re.MULTILINE))
    headers = _build.hash_of_headers(
        [csrc / name for name in sorted(included - {"engine/rule_unit.h"})]
    )
    machine = (sys.platform, platform.machine())
    parts = (source, options, _build.compiler(), headers, machine, *others)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
