"""Commands of setuptools for packages that ship their rules compiled, for ``setup.py``.

Example:
    >>> from emerging_optimizers.packaging import cmdclass
    >>> sorted(cmdclass)  # for setup(cmdclass=cmdclass)
    ['bdist_wheel', 'build']
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.errors import ExecError

__all__ = ["BuildRules", "RulesWheel", "cmdclass"]


class BuildRules(build):
    """Builds a package, and then the libraries of its rules.

    It comes last, since the package is imported for that. Editable installations have no libraries:
    there, rules change, and are compiled when they are used.
    """

    def run(self) -> None:
        """Build everything."""
        super().run()
        folder = Path(self.build_lib).absolute()
        packages = [
            name
            for name in self.distribution.packages or []
            if _is_package(folder, name) and not _is_package(folder, name.rpartition(".")[0])
        ]
        if not packages:
            raise ExecError("there is no package whose rules can be built: list it in packages=")
        # Imported from there, and in another process, since this one may have imported the sources.
        path = [str(folder), *(os.path.abspath(place) for place in sys.path if place)]
        done = subprocess.run(
            [sys.executable, "-m", "emerging_optimizers", "build-rules", *packages],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
            check=False,
        )
        if done.returncode:
            raise ExecError(f"the rules of {', '.join(packages)} were not built; see above")


def _is_package(folder: Path, name: str) -> bool:
    """Return whether there is a package of this name that is no namespace."""
    return bool(name) and folder.joinpath(*name.split("."), "__init__.py").is_file()


class RulesWheel(bdist_wheel):
    """Makes a wheel for this platform and, without extension modules, for any Python 3."""

    def finalize_options(self) -> None:
        """Decide that the wheel is for a platform."""
        # Asked for the folder that files are installed to, too.
        self.distribution.has_ext_modules = lambda: True  # type: ignore[method-assign]
        super().finalize_options()

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tags for Python, its ABI and the platform."""
        python, abi, platform = super().get_tag()
        if self.distribution.ext_modules:
            return python, abi, platform
        # The libraries call nothing of Python.
        return "py3", "none", platform


# For setup(cmdclass=...).
cmdclass: dict[str, type[Any]] = {"build": BuildRules, "bdist_wheel": RulesWheel}
