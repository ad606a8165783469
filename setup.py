"""Builds emerging_optimizers._C against the torch that is installed, and says what it chose.

EMERGING_OPTIMIZERS_NATIVE=0 leaves the compiled module out: the package then runs on plain PyTorch
operations. Without that variable it is left out where there is no C++ compiler; with =1 that is an
error.

EMERGING_OPTIMIZERS_CUDA=0 leaves the CUDA kernels out. Without that variable they are left out
where torch has no CUDA, or there is no nvcc of its major version; with =1 that is an error.
TORCH_CUDA_ARCH_LIST names the GPUs to compile for; without it, those of this machine.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools

try:
    import torch
    from torch.utils import cpp_extension
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    sys.exit(
        "emerging-optimizers-native compiles against the torch that you run it with, and there is"
        " none in this build environment. Install torch first, then build without isolation:\n"
        "    pip install torch\n"
        "    pip install --no-build-isolation ."
    )

ROOT = Path(__file__).parent
MODULE = "emerging_optimizers._C"

# No contraction into fused multiply-adds: each operation is rounded by itself, so every instruction
# set gives the same bits. The two other flags let loops with a square root or a comparison become
# vector loops; they change no result. Debug information would make the module twenty times larger.
COMPILE_ARGS = {
    "unix": [
        "-O3",
        "-g0",
        "-ffp-contract=off",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-fvisibility=hidden",
    ],
    "msvc": ["/O2", "/fp:precise"],
}
# No contraction here either, so that the bits are the CPU's; division and square root are correctly
# rounded by default.
NVCC_ARGS = ["-O3", "--fmad=false", "--threads=0"]
# The kernels' arguments take more than 4096 bytes, and are constant: what is older has not that.
OLDEST_NVCC = (12, 1)
OLDEST_GPU = (7, 0)
# at::parallel_for is compiled into its caller: without OpenMP here it would be serial.
OPENMP_ARGS = {
    "linux": (["-fopenmp"], ["-fopenmp"]),
    "darwin": (["-Xpreprocessor", "-fopenmp"], []),
    "win32": (["/openmp"], []),
}


def files(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(pattern))


def say(text: str) -> None:
    print(f"emerging_optimizers: {text}")


def nvcc_version() -> str | None:
    """Return "13.0", or None where there is no nvcc."""
    if cpp_extension.CUDA_HOME is None:
        return None
    nvcc = shutil.which("nvcc", path=str(Path(cpp_extension.CUDA_HOME) / "bin"))
    if nvcc is None:
        return None
    answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"release (\d+\.\d+)", answer.stdout)
    return found.group(1) if found else None


def why_no_cuda() -> str | None:
    """Say what keeps the CUDA kernels from being compiled; None where nothing does."""
    if os.environ.get("EMERGING_OPTIMIZERS_CUDA") == "0":
        return "EMERGING_OPTIMIZERS_CUDA=0"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    version = nvcc_version()
    if version is None:
        return f"there is no nvcc; torch was built with CUDA {torch.version.cuda} (set CUDA_HOME)"
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"nvcc is of CUDA {version}, but torch was built with CUDA {torch.version.cuda}"
    if numbers(version) < OLDEST_NVCC:
        return f"nvcc is of CUDA {version}, older than 12.1"
    if not architectures():
        return "all GPUs here are older than compute capability 7.0"
    return None


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def architectures() -> str:
    """Return what to compile for: what the user says, else this machine's GPUs, else the usual."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return os.environ["TORCH_CUDA_ARCH_LIST"]
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    if not found:
        return "8.0;9.0+PTX"
    return ";".join(
        f"{major}.{minor}" for major, minor in sorted(found) if (major, minor) >= OLDEST_GPU
    )


def native_module() -> list[setuptools.Extension]:
    wanted = os.environ.get("EMERGING_OPTIMIZERS_NATIVE", "")
    compiler = os.environ.get("CXX") or ("cl" if sys.platform == "win32" else "c++")
    if wanted == "0":
        say("no native kernels (EMERGING_OPTIMIZERS_NATIVE=0)")
        return []
    if wanted != "1" and shutil.which(compiler.split()[0]) is None:
        say(
            f"no native kernels, because there is no C++ compiler ({compiler}); set CXX to name one"
        )
        return []
    say(
        f"CPU kernels for torch {torch.__version__}, by {compiler}; EMERGING_OPTIMIZERS_ISA chooses"
    )
    say("the instruction set at run time")
    openmp_compile, openmp_link = OPENMP_ARGS.get(sys.platform, ([], []))
    cxx_args = COMPILE_ARGS["msvc" if sys.platform == "win32" else "unix"] + openmp_compile
    sources = files("engine/cpu/*.cpp") + files("bindings/*.cpp")
    common = {
        "depends": files("**/*.h") + files("**/*.inl"),
        "extra_link_args": openmp_link,
    }
    reason = why_no_cuda()
    if reason is not None:
        if os.environ.get("EMERGING_OPTIMIZERS_CUDA") == "1":
            sys.exit(f"emerging_optimizers: EMERGING_OPTIMIZERS_CUDA=1, but {reason}")
        say(f"no CUDA kernels: {reason}")
        return [cpp_extension.CppExtension(MODULE, sources, extra_compile_args=cxx_args, **common)]
    os.environ["TORCH_CUDA_ARCH_LIST"] = architectures()
    say(f"CUDA kernels, by nvcc {nvcc_version()}, for {architectures()} (TORCH_CUDA_ARCH_LIST)")
    hidden = [] if sys.platform == "win32" else ["-Xcompiler=-fvisibility=hidden"]
    nvcc_args = NVCC_ARGS + hidden
    return [
        cpp_extension.CUDAExtension(
            MODULE,
            sources + files("engine/cuda/*.cpp") + files("engine/cuda/*.cu"),
            define_macros=[("EMOPT_CUDA", "1")],
            extra_compile_args={"cxx": cxx_args, "nvcc": nvcc_args},
            **common,
        )
    ]


setuptools.setup(ext_modules=native_module(), cmdclass={"build_ext": cpp_extension.BuildExtension})
