"""What an installation says of itself, and of what is wrong with it."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import run_python, without_torchs_own
from torch.utils import cpp_extension

import emerging_optimizers
from emerging_optimizers import _build, _distribution
from emerging_optimizers._native import native

PACKAGE = Path(emerging_optimizers.__file__).parent


RUN_MODULE = "import runpy; runpy.run_module('emerging_optimizers', run_name='__main__')"


def test_import_of_distributed_tensors_is_left_to_others() -> None:
    done = run_python(
        "import sys, emerging_optimizers; print('torch.distributed.tensor' in sys.modules)"
    )
    assert done.stdout == "False\n", done.stderr


def test_show_config(capsys: pytest.CaptureFixture[str]) -> None:
    emerging_optimizers.show_config()
    text = capsys.readouterr().out
    assert text.startswith(f"emerging_optimizers {emerging_optimizers.__version__}\n")
    assert f"torch: {torch.__version__} (built for {native.torch_version})\n" in text
    assert f"{', '.join(native.compiled_isas())} compiled, {native.active_isa()} in use\n" in text
    assert f"CUDA: {', '.join(native.cuda_architectures) or 'no'}\n" in text
    assert f"threads: {torch.get_num_threads()}\n" in text


def test_module_prints_the_same() -> None:
    # Both in a new process, which looks for the distribution where it was started first.
    shown = run_python("import emerging_optimizers; emerging_optimizers.show_config()")
    command = [sys.executable, "-m", "emerging_optimizers"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stdout.splitlines()[:-1] == shown.stdout.splitlines()[:-1]
    assert result.stdout.startswith("emerging_optimizers ")
    assert result.stderr == ""


def test_built_for_this_torch() -> None:
    assert torch.__version__.startswith(native.torch_version)


def test_instruction_set_is_one_of_the_compiled() -> None:
    assert native.active_isa() in native.supported_isas()
    assert set(native.supported_isas()) <= set(native.compiled_isas())


def test_module_for_another_torch_is_not_used() -> None:
    code = "import torch; torch.__version__ = '9.9.0'; import emerging_optimizers as package;"
    result = run_python(code + "package.show_config()", EMERGING_OPTIMIZERS_JIT="0")
    reason = f"compiled for torch {native.torch_version}, but this is torch 9.9.0"
    reason += "; EMERGING_OPTIMIZERS_JIT=0"
    assert f"none, falling back to PyTorch operations ({reason})" in result.stdout
    assert without_torchs_own(result.stderr) == []


# ---- what setup.py chooses -----------------------------------------------------------------------

SETUP = PACKAGE.parent / "setup.py"
needs_source = pytest.mark.skipif(not SETUP.exists(), reason="runs in a source tree")
needs_torch_without_cuda = pytest.mark.skipif(
    torch.version.cuda is not None, reason="torch has CUDA"
)


def run_setup(**environment: str) -> "subprocess.CompletedProcess[str]":
    """Let setup.py choose, and build nothing."""
    code = "import sys, runpy; sys.argv = ['setup.py', '--version']; runpy.run_path('setup.py')"
    return run_python(code, package=SETUP.parent, **environment)


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


@needs_source
def test_setup_without_torch_says_what_to_type() -> None:
    code = f"import sys, runpy; sys.modules['torch'] = None; runpy.run_path({str(SETUP)!r})"
    done = run_python(code)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.endswith("    pip install --no-build-isolation .\n"), done.stderr


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Pretend that torch was built with CUDA 13.0, beside an nvcc of a version."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in ("EMERGING_OPTIMIZERS_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)

    def install(version: str) -> None:
        write_program(tmp_path / "bin" / "nvcc", f"Cuda compilation tools, release {version}, V1")
        (tmp_path / "include" / "cccl" / "nv").mkdir(parents=True)
        (tmp_path / "include" / "cuda_runtime.h").touch()
        (tmp_path / "include" / "cccl" / "nv" / "target").touch()

    return install


def write_program(path: Path, output: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{output}'\n")
    path.chmod(0o755)


CSRC = SETUP.parent / "csrc"


@needs_source
def test_cuda_is_built_where_it_can_be(
    toolkit: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    toolkit("13.1")
    recipe = _build.recipe(CSRC)
    assert recipe.why_no_cuda == ""
    assert recipe.architectures == "8.0;9.0;10.0+PTX"
    assert "-DEMOPT_CUDA=1" in recipe.cxx_args
    assert {"-DEMOPT_CUDA=1", "--fmad=false", "--ftz=false"} <= set(recipe.nvcc_args)
    assert "adam_cuda.cu" in {path.name for path in recipe.sources}

    monkeypatch.setattr(torch.version, "cuda", "12.6")
    write_program(tmp_path / "bin" / "nvcc", "Cuda compilation tools, release 12.6, V1")
    assert (
        _build.recipe(CSRC).architectures == "8.0;9.0+PTX"
    )  # without B200, which it does not know

    write_program(tmp_path / "bin" / "nvidia-smi", "9.0\n6.1\n9.0")
    assert _build.recipe(CSRC).architectures == "9.0"
    write_program(tmp_path / "bin" / "nvidia-smi", "6.1")
    assert _build.why_no_cuda() == "all GPUs of this machine are older than compute capability 7.0"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    assert _build.recipe(CSRC).architectures == "8.0;9.0+PTX"
    monkeypatch.setenv("EMERGING_OPTIMIZERS_CUDA", "0")
    recipe = _build.recipe(CSRC)
    assert recipe.why_no_cuda == "EMERGING_OPTIMIZERS_CUDA=0"
    assert (recipe.architectures, recipe.nvcc_args) == ("", [])
    assert "adam_cuda.cu" not in {path.name for path in recipe.sources}


@pytest.mark.parametrize(
    ("nvcc", "reason"),
    [
        (None, "no nvcc was found; torch was built with CUDA 13.0 (set CUDA_HOME)"),
        ("13.0", "the CUDA toolkit has no cuda_runtime.h (set CUDA_HOME)"),
        ("13.0", "the CUDA toolkit has no nv/target (set CUDA_HOME)"),
        ("12.8", "nvcc is from CUDA 12.8, but torch was built with CUDA 13.0"),
    ],
)
def test_cuda_toolkit_that_does_not_fit(
    toolkit: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    nvcc: str | None,
    reason: str,
) -> None:
    if nvcc is not None:
        toolkit(nvcc)
        missing = "cccl" if "nv/target" in reason else ""
        shutil.rmtree(tmp_path / "include" / missing)
        if any(
            map(_build._finds_cuda_header, _build.CUDA_HEADERS if not missing else ["nv/target"])
        ):
            pytest.skip("there is a toolkit where all compilers look")
    assert _build.why_no_cuda() == reason
    monkeypatch.setenv("EMERGING_OPTIMIZERS_CUDA", "1")
    with pytest.raises(RuntimeError) as caught:
        _build.recipe(CSRC)
    assert str(caught.value) == f"EMERGING_OPTIMIZERS_CUDA=1, but {reason}"


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
    result = run_python(RUN_MODULE, package=site)
    assert result.returncode == 0, result.stderr
    assert (
        "The distribution emerging-optimizers 0.1.0 (NVIDIA's pure-Python package)" in result.stdout
    )
    assert "pip uninstall -y emerging-optimizers emerging-optimizers-native" in result.stdout


def test_clash_is_named_when_the_import_fails(site: Path) -> None:
    (site / PACKAGE.name / "scalar_optimizers" / "__init__.py").write_text(
        "from .something_else import name\n"
    )
    result = run_python(RUN_MODULE, package=site)
    assert result.returncode != 0
    error = result.stderr[result.stderr.rindex("ImportError") :]
    assert "something_else" in error
    assert "pip uninstall -y emerging-optimizers emerging-optimizers-native" in error


def test_no_clash_here() -> None:
    assert _distribution.name_clash() is None
