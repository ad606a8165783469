"""The installed distributions: this package's version, and NVIDIA's package of the same name."""

import contextlib
import importlib
import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

_NAME = "emerging-optimizers-native"
_NAMESAKE = "emerging-optimizers"
FOLDER = Path(__file__).parent

try:
    __version__ = importlib.metadata.version(_NAME)
except importlib.metadata.PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"


class Namesake(NamedTuple):
    """NVIDIA's pure-Python package, which has the same import name.

    Attributes:
        version: The version of its distribution.
        folder: The folder of its modules.
    """

    version: str
    folder: Path

    def has_both(self) -> bool:
        """Return whether this package, or a copy of it, is installed in the same folder."""
        return (self.folder / Path(__file__).name).exists()

    def modules(self) -> list[str]:
        """Return the names of the modules that this package does not have."""
        return sorted(_modules(self.folder) - _modules(FOLDER))

    def describe(self, name: str) -> Any:
        """Return what NVIDIA's package says of itself, as ``__shortversion__``; None if nothing."""
        if not name.startswith("__"):
            return None
        with contextlib.suppress(Exception):
            return getattr(importlib.import_module(".package_info", __package__), name, None)
        return None

    def package_version(self) -> str:
        """Return the version of the modules. The metadata of an editable one may be older."""
        return self.describe("__version__") or self.version


def _modules(folder: Path) -> set[str]:
    return {
        entry.stem
        for entry in folder.iterdir()
        if (entry.suffix == ".py" or entry.is_dir()) and not entry.name.startswith(("__", "."))
    }


def _namesakes() -> Iterator[Namesake]:
    """Yield the installations of NVIDIA's package, in the order of the path."""
    # Invalid entries of the path, and what an interrupted installation leaves, must not make the
    # import fail.
    with contextlib.suppress(Exception):
        for distribution in importlib.metadata.distributions(name=_NAMESAKE):
            with contextlib.suppress(Exception):
                for folder in _folders(distribution):
                    if distribution.version and (folder / "__init__.py").exists():
                        yield Namesake(distribution.version, folder.absolute())
                        break


def _folders(distribution: importlib.metadata.Distribution) -> list[Path]:
    """Return the folders that may have a distribution's modules."""
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    if not origin.get("dir_info", {}).get("editable"):
        return [Path(str(distribution.locate_file(FOLDER.name)))]
    from urllib.parse import urlsplit
    from urllib.request import url2pathname

    project = Path(url2pathname(urlsplit(origin["url"]).path))
    return [project / FOLDER.name, project / "src" / FOLDER.name]


# The one that is used beside this package.
namesake = next((found for found in _namesakes() if not found.has_both()), None)


def name_clash() -> str | None:
    """Return a message if NVIDIA's package and this one share a folder, else None.

    Installers silently let one distribution overwrite files of the other.
    """
    found = next((found for found in _namesakes() if found.has_both()), None)
    if found is None:
        return None
    return (
        f"The distribution {_NAMESAKE} {found.version} (NVIDIA's pure-Python package) is installed"
        f" in the same folder as {_NAME}: {found.folder}. Each overwrites files of the other."
        f" Uninstall both, then install one of them, or {_NAMESAKE} and, in a folder of its own"
        f" that comes first on the path, {_NAME} (the dot is a clone or a wheel of it):\n"
        f"    PYTHONPATH= pip uninstall -y {_NAMESAKE} {_NAME}\n"
        f"    pip install {_NAMESAKE}\n"
        "    EMERGING_OPTIMIZERS_ALLOW_CLASH=1 pip install --no-build-isolation --no-deps"
        " --upgrade --target FOLDER .\n"
        "    export PYTHONPATH=FOLDER${PYTHONPATH:+:$PYTHONPATH}"
    )


def explain_import_error(error: ImportError) -> ImportError:
    """Return the error, followed by the name clash if there is one."""
    clash = name_clash()
    return error if clash is None else ImportError(f"{error}\n{clash}")
