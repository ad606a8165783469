"""Compiles the C++ text of a rule to a shared library, or finds it in the cache.

One call of the C++ compiler, for the instruction set in use and without torch's headers, so it
takes seconds. The cache is the one of the build at the first import (_build_cache.py). A rule's
library is loaded only if nobody but this user and root can have written it. That is checked from
the folder `rules` on; whoever can replace that folder can also replace the native kernels beside
it.
"""

import hashlib
import platform
import re
import sys
from pathlib import Path

from .. import _build, _build_cache
from .._build_cache import BuildError
from .._native import native
from .library import THEN, RuleLibrary


def library_for(name: str, source: str) -> Path:
    """Return the shared library of a rule, which is compiled now unless it is in the cache.

    Args:
        name: The rule's name, an identifier.
        source: The rule's C++ text, which includes ``engine/rule_unit.h``.

    Raises:
        BuildError: It cannot be compiled, or others can write to its place in the cache.
    """
    return _build_cache.load_once(product_for(name, source))


def product_for(name: str, source: str) -> RuleLibrary:
    """Return the library of a rule, which may not have been compiled yet.

    Raises:
        BuildError: It cannot be compiled on this machine.
    """
    if sys.platform == "win32":
        raise BuildError(
            "rules are not compiled on Windows yet", "Use the Windows Subsystem for Linux"
        )
    csrc = _build_cache.csrc()
    options = _options(csrc)
    folder = _build_cache.root(THEN) / "rules" / f"{name}-{_key(source, options, csrc)}"
    return RuleLibrary(folder, name, source, [*options, f"-I{csrc}"])


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


def _key(source: str, options: list[str], csrc: Path) -> str:
    """Return a hash of what the library depends on. EMOPT_ABI covers most of the headers."""
    included = set(re.findall(r'^#include "([\w./]+)"', source, re.MULTILINE))
    headers = _build.hash_of_headers(
        [csrc / name for name in sorted(included - {"engine/rule_unit.h"})]
    )
    machine = (sys.platform, platform.machine())
    parts = (source, options, _build.compiler(), headers, machine)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
