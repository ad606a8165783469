"""What an installation says of itself, and of what is wrong with it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import emerging_optimizers
from emerging_optimizers import _config
from emerging_optimizers._native import native

PACKAGE = Path(emerging_optimizers.__file__).parent


def run_module(path: Path | None = None) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "emerging_optimizers"]
    return subprocess.run(command, cwd=path, capture_output=True, text=True, check=False)


def test_import_of_distributed_tensors_is_left_to_others() -> None:
    code = "import sys, emerging_optimizers; print('torch.distributed.tensor' in sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_show_config(capsys: pytest.CaptureFixture[str]) -> None:
    emerging_optimizers.show_config()
    text = capsys.readouterr().out
    assert text.startswith(f"emerging_optimizers {emerging_optimizers.__version__}\n")
    assert f"torch: {torch.__version__} (built for {native.torch_version})\n" in text
    assert f"{', '.join(native.compiled_isas())} compiled, {native.active_isa()} in use\n" in text
    assert f"CUDA: {', '.join(native.cuda_architectures) or 'no'}\n" in text
    assert f"threads: {torch.get_num_threads()}\n" in text


def test_module_prints_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    emerging_optimizers.show_config()
    result = run_module()
    assert result.stdout.splitlines()[:-1] == capsys.readouterr().out.splitlines()[:-1]
    assert result.stderr == ""


def test_built_for_this_torch() -> None:
    assert torch.__version__.startswith(native.torch_version)


def test_instruction_set_is_one_of_the_compiled() -> None:
    assert native.active_isa() in native.supported_isas()
    assert set(native.supported_isas()) <= set(native.compiled_isas())


def test_module_for_another_torch_is_not_used() -> None:
    code = "import torch; torch.__version__ = '9.9.0'; import emerging_optimizers as package;"
    command = [sys.executable, "-c", code + "package.show_config()"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    reason = f"compiled for torch {native.torch_version}, but this is torch 9.9.0"
    assert f"none in use, plain PyTorch is used ({reason})" in result.stdout
    warning = "RuntimeWarning: emerging_optimizers runs without its native kernels, on plain"
    assert f"{warning} PyTorch: {reason}" in result.stderr


# ---- what setup.py chooses -----------------------------------------------------------------------

SETUP = PACKAGE.parent / "setup.py"
needs_source = pytest.mark.skipif(not SETUP.exists(), reason="runs in a source tree")
needs_torch_without_cuda = pytest.mark.skipif(
    torch.version.cuda is not None, reason="torch has CUDA"
)


def run_setup(**environment: str) -> "subprocess.CompletedProcess[str]":
    """Let setup.py choose, and build nothing."""
    return subprocess.run(
        [sys.executable, str(SETUP), "--version"],
        cwd=SETUP.parent,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@needs_source
@needs_torch_without_cuda
def test_cuda_is_left_out_where_torch_has_none() -> None:
    reason = f"torch {torch.__version__} is built without CUDA"
    assert f"no CUDA kernels: {reason}\n" in run_setup(EMERGING_OPTIMIZERS_CUDA="").stdout
    insisted = run_setup(EMERGING_OPTIMIZERS_CUDA="1")
    assert insisted.returncode != 0
    assert insisted.stderr == f"emerging_optimizers: EMERGING_OPTIMIZERS_CUDA=1, but {reason}\n"


@needs_source
def test_cuda_can_be_switched_off() -> None:
    done = run_setup(EMERGING_OPTIMIZERS_CUDA="0")
    assert done.returncode == 0
    assert "no CUDA kernels: EMERGING_OPTIMIZERS_CUDA=0\n" in done.stdout


# ---- the other distribution of this name ---------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with this package, into which NVIDIA's distribution was installed as well."""
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    metadata = tmp_path / "emerging_optimizers-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: emerging-optimizers\nVersion: 0.1.0\n"
    )
    return tmp_path


def test_clash_is_named(site: Path) -> None:
    result = run_module(site)
    assert result.returncode == 0, result.stderr
    assert (
        "The distribution emerging-optimizers 0.1.0 (NVIDIA's pure-Python package)" in result.stdout
    )
    assert "pip uninstall -y emerging-optimizers emerging-optimizers-native" in result.stdout


def test_clash_is_named_when_the_import_fails(site: Path) -> None:
    (site / PACKAGE.name / "scalar_optimizers" / "__init__.py").write_text(
        "from .something_else import name\n"
    )
    result = run_module(site)
    assert result.returncode != 0
    error = result.stderr[result.stderr.rindex("ImportError") :]
    assert "something_else" in error
    assert "pip uninstall -y emerging-optimizers emerging-optimizers-native" in error


def test_no_clash_here() -> None:
    assert _config.name_clash() is None
