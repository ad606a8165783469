"""CUDA kernels of users' rules: compiled by NVRTC, one at a time, and cached.

`make cuda-check` inspects the machine code, and `tests/cpp/test_cuda_erased.cpp` runs the kernels'
code on the host. NVRTC needs no GPU; without it (the extra "cuda-check" installs it), only its
absence is tested.
"""

import ctypes.util
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support import run_python

from emerging_optimizers import _build, _build_cache, _library
from emerging_optimizers._build_cache import BuildError
from emerging_optimizers._user_rules import cuda_compiler, nvcc, nvrtc
from emerging_optimizers._user_rules.cuda_kernels import KERNELS, Kernel, cubin_for, kernels_of
from emerging_optimizers._user_rules.user_rule import UserRule

EXAMPLES = Path(__file__).parent.parent / "examples" / "rules"
APPLY = Kernel("ApplyUpdate", "float", is_large=False, needs_setup=False)
SM_90 = 90
EM_CUDA = 190

needs_nvrtc = pytest.mark.skipif(nvrtc.find() is None, reason="needs NVRTC")


def adopt() -> UserRule:
    spec = importlib.util.spec_from_file_location("nvrtc_adopt", EXAMPLES / "adopt.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rule = module.adopt
    assert isinstance(rule, UserRule)
    return rule


SOURCE = adopt().source


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of all rules in an empty cache."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    yield tmp_path / "extensions" / "emerging_optimizers" / "rules"
    nvcc.version.cache_clear()
    nvcc.architectures.cache_clear()
    nvrtc.find.cache_clear()
    nvrtc._load.cache_clear()


def error_of(source: str = SOURCE, architecture: int = SM_90) -> BuildError:
    with pytest.raises(BuildError) as caught:
        cubin_for("adopt", source, APPLY, architecture)
    return caught.value


# ---- finding NVRTC -------------------------------------------------------------------------------


def libraries(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).touch()


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No library and no compiler is found but those that a test adds."""
    nvcc.version.cache_clear()
    nvcc.architectures.cache_clear()
    nvrtc.find.cache_clear()
    nvrtc._load.cache_clear()
    monkeypatch.setattr(sys, "path", ["", str(tmp_path / "packages")])
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(nvrtc, "_TOOLKIT", str(tmp_path / "cuda"))
    monkeypatch.setattr(ctypes.util, "find_library", {}.get)
    monkeypatch.setattr(nvcc, "TOOLKIT", str(tmp_path / "cuda"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_PATH", raising=False)


@pytest.mark.usefixtures("nowhere")
def test_missing() -> None:
    error = error_of()
    assert error.reason == "NVRTC (libnvrtc.so) was not found"
    assert "nvidia-cuda-nvrtc" in error.remedy


@pytest.mark.usefixtures("nowhere")
@pytest.mark.parametrize("cuda", ["12.8", "13.0"])
def test_that_of_torch_is_preferred(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda: str
) -> None:
    packages = tmp_path / "packages" / "nvidia"
    libraries(packages / "cu13" / "lib", "libnvrtc.so.13", "libnvrtc-builtins.so.13.0")
    libraries(packages / "cuda_nvrtc" / "lib", "libnvrtc.alt.so.12", "libnvrtc.so.12")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    found = nvrtc.find()
    assert found is not None
    assert found.name == f"libnvrtc.so.{cuda[:2]}"


@pytest.mark.usefixtures("nowhere")
@pytest.mark.parametrize(
    ("folder", "name"),
    [("torch/lib", "libnvrtc-0123abcd.so.12"), ("toolkit/lib64", "libnvrtc.so.12.8.93")],
)
def test_that_in_torch_or_in_a_toolkit(tmp_path: Path, folder: str, name: str) -> None:
    libraries(tmp_path / folder, "libnvrtc-builtins.so", "libnvrtc_static.a", name)
    assert nvrtc.find() == tmp_path / folder / name


@pytest.mark.usefixtures("nowhere")
def test_that_on_the_path_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes.util, "find_library", {"nvrtc": "libnvrtc.so.99"}.get)
    assert error_of().reason.startswith("NVRTC cannot be loaded (libnvrtc.so.99")


@pytest.mark.usefixtures("nowhere")
def test_it_cannot_be_loaded(tmp_path: Path) -> None:
    libraries(tmp_path / "toolkit" / "lib64", "libnvrtc.so")
    error = error_of()
    assert error.reason.startswith("NVRTC cannot be loaded (")
    assert "libnvrtc.so" in error.reason


# ---- compiling -----------------------------------------------------------------------------------


def test_names() -> None:
    assert len(KERNELS) == len({kernel.symbol("adopt") for kernel in KERNELS}) == 12
    assert APPLY in KERNELS
    assert APPLY.symbol("adopt") == "emopt_adopt_ApplyUpdate_float_small"
    setup = APPLY._replace(is_large=True, needs_setup=True)
    assert setup.symbol("adopt") == "emopt_adopt_ApplyUpdate_float_large_setup"
    symbols = [kernel.symbol("adopt") for kernel in kernels_of(has_codes=True, has_scalars=True)]
    assert len(set(symbols)) == 15
    assert symbols[12] == "emopt_adopt_ApplyUpdate_float_small_setup_codes"


@needs_nvrtc
def test_compiled_once(cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cubin = cubin_for("adopt", SOURCE, APPLY, SM_90)
    code = cubin.read_bytes()
    assert code[:4] == b"\x7fELF"
    assert int.from_bytes(code[18:20], "little") == EM_CUDA
    assert b".text.emopt_adopt_ApplyUpdate_float_small\0" in code
    assert cubin.parent.parent == cache
    assert re.fullmatch(r"adopt-cuda-[0-9a-f]{16}", cubin.parent.name)
    assert cubin.stat().st_mode & 0o077 == 0
    assert (cubin.parent / "adopt.cpp").read_text() == SOURCE
    (said,) = capfd.readouterr().err.splitlines()
    assert "compiled the kernel emopt_adopt_ApplyUpdate_float_small in " in said
    assert cubin_for("adopt", SOURCE, APPLY, SM_90) == cubin
    assert capfd.readouterr().err == ""


@needs_nvrtc
def test_kernels_are_apart() -> None:
    first = cubin_for("adopt", SOURCE, APPLY, SM_90)
    others = {
        cubin_for("adopt", SOURCE, APPLY._replace(needs_setup=True), SM_90),
        cubin_for("adopt", SOURCE, APPLY, 80),
        cubin_for("adopt", SOURCE.replace("0.25", "0.125"), APPLY, SM_90),
    }
    assert len({first, *others}) == 4
    assert len({cubin.parent for cubin in (first, *others)}) == 4


@needs_nvrtc
@pytest.mark.parametrize(
    "header",
    [
        "rules/traced.h",
        "engine/epilogue.h",
        "engine/cuda/padded_rule.h",
        "engine/cuda/sweep_kernel.h",
        "engine/cuda/nvrtc/utility",
        "engine/cuda/one_kernel/engine/rule_unit.h",
        "rules/lion.h",
        "engine/cpu/isa.h",
    ],
)
def test_it_depends_on_the_headers_that_it_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, header: str
) -> None:
    csrc = tmp_path / "csrc"
    shutil.copytree(_build_cache.csrc(), csrc)
    monkeypatch.setattr(_build_cache, "csrc", lambda: csrc)
    folders = []
    monkeypatch.setattr(_build_cache, "load_once", lambda product: folders.append(product.folder))
    for _ in range(2):
        cubin_for("adopt", SOURCE, APPLY, SM_90)
        with (csrc / header).open("a") as file:
            file.write("\n")
    is_used = header not in ("rules/lion.h", "engine/cpu/isa.h")
    assert (folders[0] != folders[1]) is is_used


@needs_nvrtc
def test_damaged_cubin_is_compiled_again(capfd: pytest.CaptureFixture[str]) -> None:
    cubin = cubin_for("adopt", SOURCE, APPLY, SM_90)
    code = cubin.read_bytes()
    for damaged in (code[:1000], code[:500] + b"x" + code[501:], b"", b"text"):
        cubin.write_bytes(damaged)
        assert cubin_for("adopt", SOURCE, APPLY, SM_90) == cubin
        assert cubin.read_bytes() == code
        assert "; recompiling" in capfd.readouterr().err
    assert _library.fault(cubin, is_for_host=False) == ""
    assert _library.fault(cubin) == "was compiled for another processor"


@needs_nvrtc
def test_error_is_located(cache: Path) -> None:
    line = SOURCE[: SOURCE.index("exp_avg_sq = grad * grad;")].count("\n") + 1
    broken = SOURCE.replace("exp_avg_sq = grad * grad;", "exp_avg_sq = grad * gradient;")
    error = error_of(broken)
    (folder,) = cache.iterdir()
    assert error.reason == (
        f'compilation failed: {folder}/adopt.cpp({line}): error: identifier "gradient" is undefined'
    )
    assert f"Fix the errors in {folder}/error.txt" in error.remedy


@needs_nvrtc
def test_limits_are_checked() -> None:
    assert "at most 256 bytes" in error_of(SOURCE.replace("eps;", "eps[32];", 1)).reason
    assert "at most 512 bytes" in error_of(SOURCE.replace("k[6]", "k[128]")).reason


@needs_nvrtc
def test_unknown_architecture() -> None:
    error = error_of(architecture=20)
    major, minor = nvrtc.version()
    assert error.reason == f"NVRTC {major}.{minor} does not compile for sm_20"


@needs_nvrtc
def test_current_folder_is_not_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tuple", "cstdint", "rules/traced.h", "engine/rule_unit.h"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("#error in the current folder\n")
    monkeypatch.chdir(tmp_path)
    cubin_for("adopt", SOURCE, APPLY, SM_90)


@needs_nvrtc
def test_cubin_of_another_user_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cubin = cubin_for("adopt", SOURCE, APPLY, SM_90)
    cubin.chmod(0o622)
    assert "can be written by other users" in error_of().reason


@needs_nvrtc
def test_only_the_asked_kernel_is_compiled(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    compile_by_nvrtc = cuda_compiler.compile_by_nvrtc

    def recording(text: Path, options: list[str], csrc: Path) -> nvrtc.Compiled:
        asked.extend(option for option in options if "EMOPT_KERNEL" in option)
        return compile_by_nvrtc(text, options, csrc)

    monkeypatch.setattr(cuda_compiler, "compile_by_nvrtc", recording)
    kernel = Kernel("StoreUpdate", "double", is_large=False, needs_setup=True)
    cubin_for("adopt", SOURCE, kernel, SM_90)
    assert asked == ["-DEMOPT_KERNEL=emopt_adopt_StoreUpdate_double_small_setup"]
    assert len(list(cache.iterdir())) == 1


# ---- ends and forks ------------------------------------------------------------------------------

_COMPILING = """
import os, threading, time
from emerging_optimizers._user_rules import nvrtc

begun = threading.Event()

def compile(*arguments):
    begun.set()
    time.sleep(0.5)
    os.write(1, b"compiled\\n")

nvrtc._compile = compile
compile_one = lambda: nvrtc.compile_program("", "rule.cpp", [])
threading.Thread(target=lambda: [compile_one() for _ in range(3)], daemon=True).start()
begun.wait()
"""

_FORK = """
child = os.fork()
if child == 0:
    compile_one()
    os._exit(0)
_, status = os.waitpid(child, 0)
os._exit(os.waitstatus_to_exitcode(status))
"""


def test_an_end_waits_for_the_kernel_in_progress() -> None:
    done = run_python(_COMPILING)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("compiled\n")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_fork_during_a_compilation() -> None:
    """The child can compile, too."""
    done = run_python(_COMPILING + _FORK, PYTHONWARNINGS="ignore")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("compiled\n") >= 2


# ---- nvcc, where NVRTC is missing ----------------------------------------------------------------

# It writes its arguments instead of machine code.
_NVCC = """#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release 12.9, V12.9.86" ;;
  --list-gpu-code) printf "sm_75\\nsm_90\\n" ;;
  *) for last; do :; done; echo "$@" > "$last" ;;
esac
"""


@pytest.fixture
def only_nvcc(nowhere: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A toolkit has a compiler of CUDA 12, and no NVRTC."""
    path = tmp_path / "toolkit" / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(_NVCC)
    path.chmod(0o755)
    monkeypatch.setattr(_build, "has_compiler", lambda: True)  # which is not called
    monkeypatch.setattr(_library, "fault", lambda *_, **__: "")  # it is not machine code
    return path


@pytest.mark.usefixtures("only_nvcc")
@pytest.mark.parametrize("cuda", [None, "12.4"])
def test_nvcc_takes_its_place(monkeypatch: pytest.MonkeyPatch, cuda: str | None) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    words = cubin_for("adopt", SOURCE, APPLY, SM_90).read_text().split()
    assert words[:3] == ["--cubin", "-x", "cu"]
    assert "--gpu-architecture=sm_90" in words
    assert "--fmad=false" in words
    assert "-DEMOPT_KERNEL=emopt_adopt_ApplyUpdate_float_small" in words
    assert not any(word in words for word in cuda_compiler._NVRTC_OPTIONS)
    folders = [word.removeprefix("-I") for word in words if word.startswith("-I")]
    assert [Path(folder, "engine", "rule_unit.h").is_file() for folder in folders] == [True, True]
    assert not any(folder.endswith("nvrtc") for folder in folders)
    assert error_of(architecture=80).reason == "nvcc 12.9 does not compile for sm_80"


def test_nvcc_of_torchs_version_is_found_on_the_path(
    only_nvcc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    other = tmp_path / "nvcc"
    other.write_text(_NVCC.replace("12.9", "13.1"))
    other.chmod(0o755)
    found = cuda_compiler.find()
    assert (found.nvcc, str(found)) == (other, "nvcc 13.1")


def test_nvcc_that_hangs(only_nvcc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvcc, "_SECONDS", 0.2)
    only_nvcc.write_text("#!/bin/sh\nwhile :; do :; done\n")
    assert error_of().reason == "NVRTC (libnvrtc.so) was not found"


@pytest.mark.usefixtures("only_nvcc")
def test_nvcc_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_build, "has_compiler", lambda: False)
    assert error_of().reason.startswith("no C++ compiler (")


@pytest.mark.usefixtures("only_nvcc")
def test_options_of_the_environment_are_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = cubin_for("adopt", SOURCE, APPLY, SM_90)
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-G")
    assert cubin_for("adopt", SOURCE, APPLY, SM_90) != plain


@pytest.mark.usefixtures("only_nvcc")
def test_nvcc_of_another_cuda_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert error_of().reason == "NVRTC (libnvrtc.so) was not found"


def test_errors_of_nvcc(only_nvcc: Path) -> None:
    failing = 'echo "kernel.cpp(3): error: no"; exit 2'
    only_nvcc.write_text(_NVCC.replace('echo "$@" > "$last"', failing))
    assert "kernel.cpp(3): error: no" in error_of().reason


@needs_nvrtc
@pytest.mark.skipif(not nvcc.find(), reason="needs nvcc")
def test_both_make_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same name; what nvcc compiles for sm_90 is machine code, too."""
    by_nvrtc = cubin_for("adopt", SOURCE, APPLY, SM_90)
    monkeypatch.setattr(nvrtc, "_folders", lambda: iter(()))
    monkeypatch.setattr(ctypes.util, "find_library", {}.get)
    nvrtc.find.cache_clear()
    nvrtc._load.cache_clear()
    if cuda_compiler._find_nvcc() is None:
        pytest.skip("nvcc is of another CUDA version than torch")
    by_nvcc = cubin_for("adopt", SOURCE, APPLY, SM_90)
    assert by_nvcc != by_nvrtc
    for cubin in (by_nvrtc, by_nvcc):
        assert b"emopt_adopt_ApplyUpdate_float_small" in cubin.read_bytes()
