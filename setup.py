"""Builds emerging_optimizers._C against the torch that is installed, and says what it chose."""

import sys
from pathlib import Path

from setuptools import setup

try:
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
SOURCES = sorted(
    str(path.relative_to(ROOT))
    for folder in ("csrc/engine/cpu", "csrc/bindings")
    for path in (ROOT / folder).glob("*.cpp")
)

# No contraction into fused multiply-adds: each operation is rounded by itself, so every instruction
# set gives the same bits. The two other flags let loops with a square root or a comparison become
# vector loops; they change no result.
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


def extension() -> cpp_extension.CppExtension:
    compiler = "msvc" if sys.platform == "win32" else "unix"
    openmp_compile, openmp_link = OPENMP_ARGS.get(sys.platform, ([], []))
    print(f"emerging_optimizers: compiling for torch {cpp_extension.torch.__version__}")
    print("emerging_optimizers: CPU engine with every instruction set of the target")
    print("emerging_optimizers: CUDA engine: no (this version has none)")
    return cpp_extension.CppExtension(
        "emerging_optimizers._C",
        SOURCES,
        extra_compile_args=COMPILE_ARGS[compiler] + openmp_compile,
        extra_link_args=openmp_link,
    )


setup(ext_modules=[extension()], cmdclass={"build_ext": cpp_extension.BuildExtension})
