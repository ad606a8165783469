"""This package beside NVIDIA's, which has the same import name.

Simulated installations of NVIDIA's (nvidia_package.py), each in a fresh interpreter that finds this
package first.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import interpreters
import nvidia_package
import pytest
import torch
from nvidia_package import MODULES, VERSIONS
from support import needs_native

import emerging_optimizers

pytestmark = pytest.mark.builtin_rules("it is about modules")

PACKAGE = Path(emerging_optimizers.__file__).parent
OURS = PACKAGE.parent
TESTS = Path(__file__).parent
# What both packages have, and private modules.
SHARED = ["registry", "scalar_optimizers", "scalar_optimizers.lion", "megatron", "_native", "_jit"]
every_version = pytest.mark.parametrize("version", VERSIONS)


def start(code: str, *path: Path, **environment: str) -> Any:
    """Run code in an interpreter that finds packages in some folders, in this order."""
    entries = os.pathsep.join(map(str, [*path, TESTS]))
    return interpreters.run(code, TESTS, entries, {**os.environ, **environment})


def ask(call: str, *path: Path, **environment: str) -> Any:
    """Call a function of beside_workers.py, and return what it prints."""
    done = start(f"import beside_workers; beside_workers.{call}", *path, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """An empty folder to install into."""
    folder = tmp_path / "site"
    folder.mkdir()
    return folder


# ---- which module comes from where ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "kind"),
    [
        ("0.3.0", "regular"),
        ("0.3.0", "editable"),
        ("0.5.0a0", "regular"),
        ("0.5.0a0", "editable in src"),
    ],
)
def test_modules(version: str, kind: str, tmp_path: Path, site: Path) -> None:
    if kind == "regular":
        theirs = nvidia_package.install(site, version)
    else:
        project = tmp_path / "a project, 100 %"  # which a URL encodes
        source = "src" if kind == "editable in src" else ""
        theirs = nvidia_package.install_editable(site, project, version, source)
    names = [name for name in MODULES[version] if name != "contrib"]
    names += ["contrib.muown"] if "contrib" in MODULES[version] else []
    seen = ask(f"locate({[*SHARED, *names]!r})", OURS, site)

    folders = {name: Path(file).parents for name, file in seen["files"].items()}
    assert [name for name in SHARED if PACKAGE not in folders[name]] == []
    assert [name for name in names if theirs not in folders[name]] == []
    assert seen["path"] == [str(PACKAGE), str(theirs)]
    assert seen["version"] == version
    assert seen["described"] == [version.removesuffix("a0"), "emerging_optimizers", None, None]
    assert {"muon", "psgd_pro", "soap", "lion", "adamw"} <= set(seen["names"])
    assert len(set(seen["walked"])) == len(seen["walked"])
    walked = {name.split(".")[1] for name in seen["walked"]}
    assert set(MODULES[version]) - {"contrib"} <= walked  # which has no __init__.py


@every_version
def test_theirs_alone(version: str, site: Path) -> None:
    """The simulation is complete: without this package, all modules are found in it."""
    theirs = nvidia_package.install(site, version)
    seen = ask(f"locate({['registry', 'scalar_optimizers', 'soap', 'psgd']!r})", site)
    assert all(theirs in Path(file).parents for file in seen["files"].values())


def test_ours_alone(site: Path) -> None:
    seen = ask(f"locate({SHARED!r})", OURS, site)
    assert seen["path"] == [str(PACKAGE)]
    assert seen["version"] == emerging_optimizers.__version__
    assert seen["described"] == [None] * 4


def test_another_copy_is_not_used(tmp_path: Path, site: Path) -> None:
    """Its compiled module may be for another version."""
    copy = tmp_path / "copy" / PACKAGE.name
    (copy / "only_there").mkdir(parents=True)
    (copy / "__init__.py").touch()
    (copy / "only_there" / "__init__.py").touch()
    nvidia_package.install(site, "0.3.0")
    done = start("import emerging_optimizers.only_there", OURS, copy.parent, site)
    assert "No module named 'emerging_optimizers.only_there'" in done.stderr


def test_damaged_installations_are_left_out(tmp_path: Path) -> None:
    moved = {"url": (tmp_path / "nowhere").as_uri(), "dir_info": {"editable": True}}
    origins = {"invalid JSON": "{", "another JSON": '["editable"]', "moved": json.dumps(moved)}
    sites = []
    for damage in ("no modules", "no version", "no metadata", *origins):
        site = tmp_path / damage
        files = {"direct_url": origins[damage]} if damage in origins else {}
        metadata = nvidia_package.write_metadata(site, "0.1.0", **files) / "METADATA"
        if damage == "no version":
            metadata.write_text("Name: emerging-optimizers\n")
        elif damage == "no metadata":
            metadata.unlink()
        if damage != "no modules":
            nvidia_package.write_package(site, "0.3.0")
        sites.append(site)
    assert ask("locate([])", OURS, *sites)["path"] == [str(PACKAGE)]

    whole = tmp_path / "whole"
    theirs = nvidia_package.install(whole, "0.5.0a0")
    seen = ask("locate(['psgd'])", OURS, *sites, whole)
    assert seen["path"] == [str(PACKAGE), str(theirs)]
    assert seen["version"] == "0.5.0a0"


def test_version_of_an_updated_clone(tmp_path: Path, site: Path) -> None:
    """The metadata of an editable installation is from its time; NVIDIA's modules say the truth."""
    nvidia_package.install_editable(site, tmp_path / "project", "0.5.0a0")
    (metadata,) = site.glob("*.dist-info/METADATA")
    metadata.write_text("Name: emerging-optimizers\nVersion: 0.3.0\n")
    assert ask("locate([])", OURS, site)["version"] == "0.5.0a0"
    assert "NVIDIA's package: emerging-optimizers 0.5.0a0, in " in start(SHOW, OURS, site).stdout


def test_relative_path(site: Path) -> None:
    """A program may change its folder after the import."""
    theirs = nvidia_package.install(site, "0.3.0")
    code = f"""
import os, sys
os.chdir({str(site.parent)!r})
sys.path.append({site.name!r})
import emerging_optimizers
os.chdir("/")
import emerging_optimizers.psgd
print(emerging_optimizers.__path__[1])
"""
    done = start(code, OURS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(theirs)


def test_invalid_entries_of_the_path(site: Path) -> None:
    """Imports pass over them, but searching the metadata raises there."""
    theirs = nvidia_package.install(site, "0.3.0")
    code = """
import sys
sys.path.append(None)
import emerging_optimizers
print(emerging_optimizers.__path__[1:])
"""
    for path, wanted in (([OURS], []), ([OURS, site], [str(theirs)])):
        done = start(code, *path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == str(wanted)


def test_zip_files_are_left_out(tmp_path: Path, site: Path) -> None:
    nvidia_package.install(site, "0.3.0")
    archive = Path(shutil.make_archive(str(tmp_path / "site"), "zip", site))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert ask("locate([])", OURS, archive, empty)["path"] == [str(PACKAGE)]


# ---- what an installation says -------------------------------------------------------------------

SHOW = "import runpy; runpy.run_module('emerging_optimizers', run_name='__main__')"


def test_show_config(site: Path) -> None:
    theirs = nvidia_package.install(site, "0.5.0a0")
    shown = start(SHOW, OURS, site).stdout.splitlines()
    assert shown[:3] == [
        f"emerging_optimizers {emerging_optimizers.__version__}",
        f"distribution: emerging-optimizers-native, in {PACKAGE}",
        f"NVIDIA's package: emerging-optimizers 0.5.0a0, in {theirs}:"
        f" {', '.join(MODULES['0.5.0a0'])}",
    ]
    alone = start(SHOW, OURS, site.parent).stdout.splitlines()
    assert [shown[0], *shown[3:]] == alone


def test_both_in_another_folder(site: Path) -> None:
    """Modules of either may be missing there, so that none is used."""
    theirs = nvidia_package.install(site, "0.3.0")
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(PACKAGE, theirs, dirs_exist_ok=True, ignore=ignored)
    shown = start(SHOW, OURS, site).stdout
    assert "NVIDIA's package: " not in shown
    assert f"installed in the same folder as emerging-optimizers-native: {theirs}." in shown


SETUP = OURS / "setup.py"


@pytest.mark.skipif(not SETUP.exists(), reason="runs in a source tree")
def test_build_is_refused(site: Path) -> None:
    nvidia_package.install(site, "0.3.0")
    code = "import sys, runpy; sys.argv = ['setup.py', '--version']; runpy.run_path('setup.py')"

    def run_setup(allowed: str) -> Any:
        entries = os.pathsep.join(map(str, [OURS, site]))
        variables = {"EMERGING_OPTIMIZERS_NATIVE": "0", "EMERGING_OPTIMIZERS_ALLOW_CLASH": allowed}
        return interpreters.run(code, OURS, entries, {**os.environ, **variables})

    done = run_setup("0")
    assert done.returncode == 1
    assert done.stdout == ""  # nothing was built
    lines = done.stderr.splitlines()[-4:]
    assert f"emerging-optimizers is installed in this environment, in {site}. It" in lines[0]
    assert lines[1].startswith("    EMERGING_OPTIMIZERS_ALLOW_CLASH=1 pip install ")
    folder = lines[1].partition(" --target ")[2].removesuffix(" .")
    assert lines[3] == f"    export PYTHONPATH={folder}${{PYTHONPATH:+:$PYTHONPATH}}"
    assert run_setup("1").returncode == 0


# ---- programs that use both ----------------------------------------------------------------------


@needs_native
def test_muon_and_adamw(site: Path) -> None:
    nvidia_package.install(site, "0.3.0")
    seen = ask("train_with_muon()", OURS, site)
    assert seen["losses"][-1] < 0.2 * seen["losses"][0]
    assert seen["modules"] == ["emerging_optimizers.orthogonalized_optimizers.muon"]
    assert seen["states"] == [["momentum_buffer"], ["exp_avg", "exp_avg_sq", "step"]]


def test_soap_with_our_update_function(site: Path) -> None:
    """One step: the next would make much of its last bits, in eigenvectors of almost nothing."""
    theirs = nvidia_package.install(site, "0.3.0")
    reference = theirs / "scalar_optimizers" / "update_functions" / "adam.py"
    stepped = ask(f"step_with_soap('soap.soap', {str(reference)!r})", OURS, site)
    (ours, params), (_, wanted) = stepped
    assert PACKAGE in Path(ours).parents
    for param, value in zip(params, wanted, strict=True):
        torch.testing.assert_close(torch.tensor(param), torch.tensor(value))


@every_version
def test_imports_of_newer_megatron(version: str, site: Path) -> None:
    nvidia_package.install(site, version)
    seen = ask("import_as_megatron()", OURS, site)
    assert seen["lion"] == "emerging_optimizers.scalar_optimizers.lion"
    assert seen["is_0_2"]
    assert {"lr", "betas"} <= set(seen["table"]["lion"]) & set(seen["table"]["soap"])
    # Megatron would give the parameters of its own Adam to Muon.
    assert {"adam", "sgd"} & set(seen["table"]) == set()


def test_muon_of_megatron(site: Path) -> None:
    """Megatron-Core 0.16's Muon, on the host. Not here: tensor parallelism, and CUDA."""
    if not os.environ.get("CI"):
        pytest.importorskip("megatron.core")
    nvidia_package.install(site, "0.3.0")
    classes = ["TensorParallelMuon", "FusedAdam"]
    made = ask("run_megatron()", OURS, site)
    assert made == [[classes, False], [classes, False], [classes, True]]
