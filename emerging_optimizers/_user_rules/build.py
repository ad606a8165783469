"""Compiles the C++ text of a rule to a shared library, or finds it in the cache.

One call of the C++ compiler, for the instruction set in use and without torch's headers, so it
takes only seconds. The cache is the one of the build at the first import (_build_cache.py). A
rule's library is loaded only if nobody but this user and root can have written it. That is checked
from the folder `rules` on; whoever can replace that folder can also replace the native kernels
beside it.
"""

import hashlib
import platform
import re
import sys
from collections.abc import Sequence
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
    return build(product_for(name, source))


def build(product: RuleLibrary) -> Path:
    """Return a library, which is compiled now unless it is in the cache; print that it was.

    Raises:
        BuildError: It cannot be compiled, or others can write to its place in the cache.
    """
    library = _build_cache.load_once(product)
    product.announce()
    return library


def product_for(
    name: str,
    source: str,
    options: Sequence[str] = (),
    headers: Sequence[str] = (),
    then: str = THEN,
    is_for_any: bool = False,
) -> RuleLibrary:
    """Return the library of a rule, which may not have been compiled yet.

    Args:
        name: The rule's name, an identifier.
        source: The rule's C++ text, which includes ``engine/rule_unit.h``.
        options: Further options of the compiler, which do not change the library.
        headers: The texts of the other headers that it depends on.
        then: What happens once an error is fixed, as a clause.
        is_for_any: Whether it has all instruction sets of this platform, not only the one in use.

    Raises:
        BuildError: It cannot be compiled on this machine.
    """
    if sys.platform == "win32":
        raise BuildError(
            "rules are not compiled on Windows yet", "Use the Windows Subsystem for Linux"
        )
    csrc = _build_cache.csrc()
    shared = _options(csrc, is_for_any)
    key = _key(source, shared, csrc, headers)
    folder = _build_cache.root(then) / "rules" / f"{name}-{key}"
    return RuleLibrary(folder, name, source, [*shared, *options, f"-I{csrc}"], then)


def text_key(source: str, headers: Sequence[str] = ()) -> str:
    """Return a hash of what a library depends on wherever it is compiled, except for EMOPT_ABI.

    Args:
        source: The rule's C++ text.
        headers: The texts of the other headers that it depends on.

    Raises:
        BuildError: The package's headers are missing.
    """
    parts = (source, _build.COMPILE_ARGS["unix"], _included(source, _build_cache.csrc()), *headers)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _options(csrc: Path, is_for_any: bool) -> list[str]:
    """Return the compiler's options, except for the headers' folder."""
    options = [
        "-std=c++20",
        "-shared",
        "-fPIC",
        *_build.COMPILE_ARGS["unix"],
        f"-DEMOPT_ABI={_build.abi(csrc)}",
        "-DEMOPT_CUDA=0",
    ]
    if not is_for_any:
        assert native is not None  # without kernels, a rule's formula runs
        options.append(f"-DEMOPT_ONLY_ISA_{native.active_isa()}")
    return options


def _key(source: str, options: list[str], csrc: Path, others: Sequence[str]) -> str:
    """Return a hash of what the library depends on. EMOPT_ABI covers most of the headers."""
    machine = (sys.platform, platform.machine())
    parts = (source, options, _build.compiler(), _included(source, csrc), machine, *others)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _included(source: str, csrc: Path) -> str:
    """Return a hash of the headers that a text includes, except for those of EMOPT_ABI."""
    included = set(re.findall(r'^#include "([\w./]+)"', source, re.MULTILINE))
    return _build.hash_of_headers(
        [csrc / name for name in sorted(included - {"engine/rule_unit.h"})]
    )
