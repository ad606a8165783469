"""Simulated installations of NVIDIA's package, in its structures of version 0.3.0 and the newest.

nvidia/ has modules that are written for these tests: small, and without the Python 3.12 that
NVIDIA's need. `OrthogonalizedOptimizer` has the arguments that Megatron-Core 0.16 passes.
"""

import json
import shutil
from pathlib import Path

NAME = "emerging_optimizers"
VERSIONS = ["0.3.0", "0.5.0a0"]
_COMMON = [
    "mixin",
    "orthogonalized_optimizers",
    "package_info",
    "psgd",
    "soap",
    "triton_kernels",
    "utils",
]
_NEW = ["contrib", "embedding_optimizers", "legacy_soap", "shampoo", "weight_update_hooks"]
# What only NVIDIA's package has.
MODULES = {"0.3.0": _COMMON, "0.5.0a0": sorted([*_COMMON, *_NEW])}
_FILES = Path(__file__).parent / "nvidia"


def write_package(folder: Path, version: str) -> Path:
    """Write the modules into a folder; return the package's folder."""
    package = folder / NAME
    for source in (_FILES / "common", _FILES / version):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source / NAME, package, dirs_exist_ok=True, ignore=ignored)
    if "legacy_soap" in MODULES[version]:  # 0.3.0's SOAP under another name
        shutil.copytree(_FILES / "0.3.0" / NAME / "soap", package / "legacy_soap")
        for path in (package / "legacy_soap").glob("*.py"):
            text = path.read_text().replace(f"{NAME}.soap", f"{NAME}.legacy_soap")
            path.write_text(text.replace('("soap")', '("legacy_soap")'))
    return package


def write_metadata(site: Path, version: str, **files: str) -> Path:
    """Write a distribution's metadata; files are named without their suffix, `.json`."""
    folder = site / f"{NAME}-{version}.dist-info"
    folder.mkdir(parents=True)
    text = f"Metadata-Version: 2.4\nName: emerging-optimizers\nVersion: {version}\n"
    (folder / "METADATA").write_text(text)
    for name, text in files.items():
        (folder / f"{name}.json").write_text(text)
    return folder


def install(site: Path, version: str) -> Path:
    """Install it as a wheel does; return the package's folder."""
    write_metadata(site, version)
    return write_package(site, version)


def install_editable(site: Path, project: Path, version: str, source: str = "") -> Path:
    """Install a project as editable, and return the package's folder, which is in `source`."""
    origin = {"url": project.as_uri(), "dir_info": {"editable": True}}
    write_metadata(site, version, direct_url=json.dumps(origin))
    return write_package(project / source, version)
