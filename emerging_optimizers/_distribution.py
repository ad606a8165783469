"""The installed distribution: its version, and the clash with NVIDIA's package."""

import importlib.metadata
from pathlib import Path

_NAME = "emerging-optimizers-native"
_NAMESAKE = "emerging-optimizers"

try:
    __version__ = importlib.metadata.version(_NAME)
except importlib.metadata.PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"


def name_clash(folder: Path = Path(__file__).parent) -> str | None:
    """Return a message if NVIDIA's pure-Python package is installed in the same folder, else None.

    Both distributions are imported as ``emerging_optimizers``, and installers silently let one
    overwrite files of the other.
    """
    for distribution in importlib.metadata.distributions(name=_NAMESAKE):
        if Path(str(distribution.locate_file(folder.name))).resolve() == folder.resolve():
            return (
                f"The distribution {_NAMESAKE} {distribution.version} (NVIDIA's pure-Python"
                f" package) is installed in the same folder as {_NAME}: {folder}. They overwrite"
                " each other's files and cannot be used side by side. Keep one of them:\n"
                f"    pip uninstall -y {_NAMESAKE} {_NAME}\n"
                f"    pip install --no-build-isolation {_NAME}"
            )
    return None


def explain_import_error(error: ImportError) -> ImportError:
    """Return the error, followed by the name clash if there is one."""
    clash = name_clash()
    return error if clash is None else ImportError(f"{error}\n{clash}")
