"""Builds emerging_optimizers._C against the torch that is installed, and says what it chose.

EMERGING_OPTIMIZERS_NATIVE=0 leaves the compiled module out: the package then runs on plain PyTorch
operations. Without that variable it is left out where there is no C++ compiler; with =1 that is an
error.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

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


def native_module() -> list[cpp_extension.CppExtension]:
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
    say("the instruction set at run time. CUDA kernels: none in this version")
    openmp_compile, openmp_link = OPENMP_ARGS.get(sys.platform, ([], []))
    options = COMPILE_ARGS["msvc" if sys.platform == "win32" else "unix"]
    return [
        cpp_extension.CppExtension(
            "emerging_optimizers._C",
            files("engine/cpu/*.cpp") + files("bindings/*.cpp"),
            depends=files("**/*.h") + files("**/*.inl"),
            extra_compile_args=options + openmp_compile,
            extra_link_args=openmp_link,
        )
    ]


setup(ext_modules=native_module(), cmdclass={"build_ext": cpp_extension.BuildExtension})
