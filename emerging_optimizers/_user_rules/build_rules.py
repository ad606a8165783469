"""Compiles the rules of packages into their folders, for ``build-rules`` of ``__main__.py``."""

import importlib
import json
import pkgutil
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from .. import _build, _build_cache
from .._build_cache import BuildError
from .._distribution import __version__
from . import shipped
from .build import build, product_for
from .cpp_rule import CppRule
from .shipped import FOLDER, LIST, Text
from .user_rule import UserRule, all_rules

_THEN = "build the package's rules again"


def build_rules(names: Sequence[str]) -> list[Path]:
    """Compile the rules that packages define, for all instruction sets, into their folders.

    Args:
        names: The names of the packages, which are imported with all their modules.

    Returns:
        The libraries.

    Raises:
        BuildError: There is no such package, it has no rules, or they cannot be compiled.
    """
    shipped.is_building = True
    libraries = [library for name in names for library in _build_package(name)]
    if not libraries:
        raise BuildError(
            f"no rules were found in {', '.join(names)}",
            "Define them in modules, which are imported to find them, not in functions",
        )
    return libraries


def _build_package(name: str) -> list[Path]:
    package = _import_package(name)
    place = Path(package.__path__[0])
    texts = [text for rule in all_rules() if (text := _text_of(rule, name, place)) is not None]
    folder = place / FOLDER
    if not texts:
        shutil.rmtree(folder, ignore_errors=True)
        return []
    try:
        return _write_libraries(folder, texts)
    except OSError as error:
        raise BuildError(
            f"{folder} cannot be written ({error.strerror})",
            "Build the rules where the package can be written, and install that",
        ) from error


def _write_libraries(folder: Path, texts: Sequence[Text]) -> list[Path]:
    folder.mkdir(exist_ok=True)
    listed = {text.label: text.file_name() for text in texts}
    for text in texts:
        # In the cache, so that rules that did not change are not compiled again.
        product = product_for(
            text.name, text.source, text.options, text.headers, _THEN, is_for_any=True
        )
        library = build(product)
        _write(folder / listed[text.label], library.read_bytes())
    contents = {"version": __version__, "abi": _build.abi(_build_cache.csrc()), "rules": listed}
    _write(folder / LIST, f"{json.dumps(contents, indent=2)}\n".encode())
    for path in folder.iterdir():
        if path.is_file() and path.name not in (LIST, *listed.values()):
            path.unlink()
    return [folder / file for file in dict.fromkeys(listed.values())]


def _import_package(name: str) -> ModuleType:
    """Import a package and its modules, except for those that run as scripts or lack others."""
    try:
        package = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the package lacks another one
        raise BuildError(
            f"there is no package {name} in {', '.join(filter(None, sys.path))}",
            "Install it, or go to the folder that has it",
        ) from None
    if getattr(package, "__file__", None) is None or not hasattr(package, "__path__"):
        raise BuildError(
            f"{name} is a module or a namespace", "Name a package that has an __init__.py"
        )
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if module.name.endswith(".__main__"):
            continue
        try:
            importlib.import_module(module.name)
        except (ImportError, SystemExit) as error:
            _build_cache.say(
                f"{module.name} cannot be imported, so rules that it defines are left out:"
                f" {type(error).__name__}: {error}"
            )
    return package


def _text_of(rule: object, package: str, folder: Path) -> Text | None:
    """Return what the library of a rule is compiled from; None if it is not the package's."""
    if isinstance(rule, CppRule):
        return rule.text_in(folder)
    if isinstance(rule, UserRule) and f"{rule.place[0]}.".startswith(f"{package}."):
        return Text(rule.name, rule.name, rule.source)
    return None


def _write(path: Path, contents: bytes) -> None:
    """Replace a file at once: processes may be using the one that is there."""
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(contents)
    new.replace(path)
