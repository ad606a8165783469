"""The compiled library of a rule, as a product of the cache. Imports no torch: see worker.py."""

import os
import subprocess
import time
from pathlib import Path

from .. import _build, _build_cache
from . import ownership

THEN = "call the rule's compile()"


class RuleProduct(_build_cache.Product[Path]):
    """What is built from a rule's text, in a folder that only this user can write."""

    file_mode = 0o600

    def make_folder(self) -> None:
        ownership.make_folders(self.folder)  # others may find the native kernels beside the rules

    def check(self) -> None:
        for path in (self.folder.parent, self.folder, self.folder / self.pattern):
            ownership.check(path)

    def write_text(self, folder: Path, name: str, source: str) -> Path:
        """Write the text beside the product: the compiler's errors and debuggers refer to it."""
        text = folder / f"{name}.cpp"
        text.touch(self.file_mode)
        text.write_text(source, encoding="utf-8")
        return text.replace(self.folder / text.name)

    def load(self, library: Path) -> Path:
        return library

    def finish(self, library: Path) -> Path:
        return library

    def finish_unsaved(self, error: OSError) -> Path:
        raise _build_cache.not_writable(self, error) from error


class RuleLibrary(RuleProduct):
    """The library of one rule.

    Args:
        folder: Its folder in the cache.
        name: The rule's name.
        source: The rule's C++ text.
        options: The compiler's options.
        then: What happens once an error is fixed, as a clause.

    Attributes:
        seconds: How long the compiler took; 0 if the library was in the cache.
    """

    def __init__(
        self, folder: Path, name: str, source: str, options: list[str], then: str = THEN
    ) -> None:
        super().__init__(folder, f"{name}{_build_cache.SUFFIX}")
        self.what = f"the rule {name}"
        self.then = self.retry = then
        self.name = name
        self.source = source
        self.options = options
        self.seconds = 0.0

    def missing_tool(self) -> tuple[str, str] | None:
        if os.environ.get("EMERGING_OPTIMIZERS_JIT") == "0":
            return f"EMERGING_OPTIMIZERS_JIT=0, and {self.folder} has no library", "Unset it"
        return _build_cache.missing_compiler(self.then)

    def compile(self, folder: Path) -> Path:
        text = self.write_text(folder, self.name, self.source)
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

    def announce(self) -> None:
        """Print that the library was compiled, if it was."""
        if self.seconds:
            _build_cache.say(
                f"compiled {self.what} in {self.seconds:.1f} s (cached in {self.folder})"
            )
