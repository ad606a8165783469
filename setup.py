"""Builds emerging_optimizers._C against the installed torch, and prints what it builds.

EMERGING_OPTIMIZERS_NATIVE=0 leaves the compiled module out; the first import then compiles it. By
default, it is left out if there is no C++ compiler; with =1, that is an error. All other options
are in emerging_optimizers/_build.py. EMERGING_OPTIMIZERS_ALLOW_CLASH=1 builds although NVIDIA's
package is installed.
"""

import importlib.metadata
import importlib.util
import os
import shlex
import sys
from pathlib import Path

import setuptools
from setuptools.command.build_py import build_py
from setuptools.command.egg_info import egg_info

try:
    import torch
    from torch.utils import cpp_extension
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    sys.exit(
        "emerging-optimizers-native is compiled against your torch, but this build environment has"
        " none. Install torch first, then build without isolation:\n"
        '    pip install torch "setuptools>=77" ninja\n'
        "    pip install --no-build-isolation ."
    )

if os.environ.get("EMERGING_OPTIMIZERS_ALLOW_CLASH") != "1":
    # There is no isolation, so these are the distributions of the environment to install into.
    for namesake in importlib.metadata.distributions(name="emerging-optimizers"):
        folder = shlex.quote(str(Path(sys.prefix, "emerging-optimizers-native")))
        sys.exit(
            "NVIDIA's distribution emerging-optimizers is installed in this environment, in"
            f" {namesake.locate_file('')}. It has the same import name. Installed in the same"
            " folder, this package would overwrite some of its files. Install this one beside it,"
            " in a folder of its own:\n"
            "    EMERGING_OPTIMIZERS_ALLOW_CLASH=1 pip install --no-build-isolation --no-deps"
            f" --upgrade --target {folder} .\n"
            "Then put that folder first on the path, before Python starts:\n"
            f"    export PYTHONPATH={folder}${{PYTHONPATH:+:$PYTHONPATH}}"
        )

ROOT = Path(__file__).parent
MODULE = "emerging_optimizers._C"

spec = importlib.util.spec_from_file_location("_build", ROOT / "emerging_optimizers" / "_build.py")
assert spec is not None
assert spec.loader is not None
_build = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = _build
spec.loader.exec_module(_build)


class BuildPython(build_py):
    """Copies the C++ sources into the package, for the build at the first import.

    In the repository, and so in an editable installation, they are beside the package.
    """

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            self.copy_tree("csrc", str(Path(self.build_lib) / "emerging_optimizers" / "csrc"))


class EggInfo(egg_info):
    """Appends the torch version and the kernels to a wheel's version, such as "+torch213cpu".

    A source distribution works with any torch.
    """

    def finalize_options(self) -> None:
        makes_wheel = {"bdist_wheel", "dist_info", "editable_wheel"} & set(
            self.distribution.commands
        )
        if makes_wheel and self.distribution.ext_modules:
            major, minor = torch.__version__.split(".")[:2]
            has_cuda = _build.why_no_cuda() is None
            kernels = "cu" + torch.version.cuda.replace(".", "") if has_cuda else "cpu"
            self.tag_build = f"+torch{major}{minor}{kernels}"
        super().finalize_options()


def say(text: str) -> None:
    print(f"emerging_optimizers: {text}")


def relative(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def native_module() -> list[setuptools.Extension]:
    wanted = os.environ.get("EMERGING_OPTIMIZERS_NATIVE", "")
    compiler = _build.compiler()
    if wanted == "0":
        say("no native kernels (EMERGING_OPTIMIZERS_NATIVE=0)")
        return []
    if wanted != "1" and not _build.has_compiler():
        say(f"no native kernels, since no C++ compiler ({compiler}) was found; set CXX to name one")
        return []
    os.environ.update(_build.compiler_variables(ROOT / "build" / "compilers"))
    say(f"CPU kernels for torch {torch.__version__}, compiled with {compiler}")
    say("EMERGING_OPTIMIZERS_ISA selects the instruction set at run time")
    try:
        recipe = _build.recipe(ROOT / "csrc")
    except RuntimeError as error:
        sys.exit(f"emerging_optimizers: {error}")
    arguments = {
        "depends": relative(recipe.headers),
        "extra_compile_args": {"cxx": recipe.cxx_args, "nvcc": recipe.nvcc_args},
        "extra_link_args": recipe.link_args,
    }
    if recipe.why_no_cuda:
        say(f"no CUDA kernels: {recipe.why_no_cuda}")
        return [cpp_extension.CppExtension(MODULE, relative(recipe.sources), **arguments)]
    os.environ["TORCH_CUDA_ARCH_LIST"] = recipe.architectures
    nvcc = _build.nvcc_version()
    say(
        f"CUDA kernels for {recipe.architectures} (TORCH_CUDA_ARCH_LIST), compiled with nvcc {nvcc}"
    )
    return [cpp_extension.CUDAExtension(MODULE, relative(recipe.sources), **arguments)]


setuptools.setup(
    ext_modules=native_module(),
    cmdclass={
        "build_ext": cpp_extension.BuildExtension,
        "build_py": BuildPython,
        "egg_info": EggInfo,
    },
)
