"""The libraries that a package ships for its rules, in a folder of its own.

build_rules.py writes them, with a list of what they were built from. They are as trusted as the
package's Python code, which lies beside them, so it is not checked who can have written them.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .. import _build, _build_cache, _library
from .._build_cache import BuildError
from .._distribution import __version__
from .build import text_key

FOLDER = "_emopt_rules"
LIST = "rules.json"

# While packages are built, the libraries that they have already are not used.
is_building = False
_said: set[str] = set()


class Package(NamedTuple):
    """A package that ships libraries.

    Attributes:
        name: Its name.
        folder: Its folder.
    """

    name: str
    folder: Path


class Text(NamedTuple):
    """What a rule's library is compiled from.

    Attributes:
        label: The rule's name in the package's list.
        name: The start of the library's file name, an identifier.
        source: The rule's C++ text.
        headers: The texts of the other headers that it depends on.
        options: Further options of the compiler, which do not change the library.
    """

    label: str
    name: str
    source: str
    headers: Sequence[str] = ()
    options: Sequence[str] = ()

    def file_name(self) -> str:
        """Return the library's file name, which depends on the text and its headers.

        Raises:
            BuildError: The headers of emerging_optimizers are missing.
        """
        return f"{self.name}-{text_key(self.source, self.headers)}{_build_cache.SUFFIX}"


def package_of_module(module: str) -> Package | None:
    """Return the package of a module, if it ships libraries."""
    spec = getattr(sys.modules.get(module), "__spec__", None)
    name = spec.parent or "" if spec is not None else ""
    while name:
        for folder in map(Path, getattr(sys.modules.get(name), "__path__", ())):
            if _has_list(folder):
                return Package(name, folder)
        name = name.rpartition(".")[0]
    return None


def package_of_file(path: Path) -> Package | None:
    """Return the imported package that a file belongs to, if it ships libraries.

    A folder that no package was imported from may be anybody's.
    """
    for folder in path.resolve().parents:
        if _has_list(folder):
            for name, module in list(sys.modules.items()):
                places = getattr(module, "__dict__", {}).get("__path__", ())
                if any(os.path.isdir(p) and os.path.samefile(p, folder) for p in places):
                    return Package(name, folder)
    return None


def _has_list(folder: Path) -> bool:
    return not is_building and (folder / FOLDER / LIST).is_file()


def find(package: Package, text: Text) -> Path | None:
    """Return the library that a package ships for a rule; None, and say why, if it cannot be used.

    A rule that was added after the package was built has none, which is not reported.
    """
    file = package.folder / FOLDER / LIST
    try:
        listed = json.loads(file.read_text(encoding="utf-8"))
        version, abi, name = listed["version"], listed["abi"], listed["rules"].get(text.label)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        reject(package, f"{file} cannot be read or is damaged")
        return None
    if name is None:
        return None
    try:
        own_abi, expected = _build.abi(_build_cache.csrc()), text.file_name()
    except BuildError as error:
        reject(package, error.reason)
        return None
    if abi != own_abi:
        reject(
            package,
            f"they were compiled for emerging_optimizers {version} (headers {abi}), and this is"
            f" {__version__} (headers {own_abi})",
        )
        return None
    if name != expected:
        reject(
            package, f"the rule {text.name}, or what it includes, has changed since it was built"
        )
        return None
    library = file.with_name(expected)
    fault = _library.fault(library)
    if fault:
        reject(package, f"{library} {fault}")
        return None
    return library


def reject(package: Package, reason: str) -> None:
    """Say, once, why libraries of a package are not used."""
    said = (
        f"the compiled rules of {package.name} are not used: {reason}. Rebuild the package: python"
        f" -m emerging_optimizers build-rules {package.name}"
    )
    if said not in _said:
        _said.add(said)
        _build_cache.say(said)
