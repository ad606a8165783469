"""The sources, compiler options and GPUs that the compiled module is built with.

Shared by setup.py, which loads this file by its path before the package exists, and by the build at
the first import (_jit.py). So it imports nothing from the package, and torch only in functions.

EMERGING_OPTIMIZERS_CUDA=0 builds without CUDA kernels. By default, they are built if torch has CUDA
and there is an nvcc of the same major version; with =1, it is an error if they cannot be.
TORCH_CUDA_ARCH_LIST names the GPUs to compile for. The default is the GPUs of this machine.
"""

import atexit
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

# No contraction into fused multiply-adds: each operation is rounded separately, so that every
# instruction set gives the same bits. -fno-math-errno and -fno-trapping-math let the compiler
# vectorize loops with square roots and comparisons; they change no result. Nor does the limit of
# unswitching, which moves a step's flags out of its loop: at GCC's default, 50 instructions, the
# loop of AdEMAMix's step is not vectorized (tests/test_vectorized.py). Debug information would make
# the module twenty times larger.
COMPILE_ARGS = {
    "unix": [
        "-O3",
        "-g0",
        "-ffp-contract=off",
        "-fno-math-errno",
        "-fno-trapping-math",
        "--param=max-unswitch-insns=200",
        "-fvisibility=hidden",
    ],
    "msvc": ["/O2", "/fp:precise"],
}
# No contraction here either, so that the bits are the same as on the CPU. The next three options
# are nvcc's defaults. Here they override --use_fast_math in NVCC_APPEND_FLAGS.
NVCC_ARGS = [
    "-O3",
    "--fmad=false",
    "--ftz=false",
    "--prec-div=true",
    "--prec-sqrt=true",
    "--threads=0",
]
# The kernels' arguments are __grid_constant__ and take more than 4096 bytes. Older versions of nvcc
# and older GPUs do not support that.
OLDEST_NVCC = (12, 1)
OLDEST_GPU = (7, 0)
# The GPUs to compile for if none is present and none is named: A100, H100 and H200, B200. Each with
# the oldest nvcc that supports it.
USUAL_GPUS = {"8.0": OLDEST_NVCC, "9.0": OLDEST_NVCC, "10.0": (12, 8)}
# The headers that the kernels include. They are not always installed with nvcc.
CUDA_HEADERS = ("cuda_runtime.h", "nv/target")
# at::parallel_for is a template, compiled here: without OpenMP it would be serial.
OPENMP_ARGS = {
    "linux": (["-fopenmp"], ["-fopenmp"]),
    "darwin": (["-Xpreprocessor", "-fopenmp"], []),
    "win32": (["/openmp"], []),
}


@dataclass(frozen=True)
class Recipe:
    """The inputs and options of a build.

    Attributes:
        sources: The files to compile.
        headers: The headers that they may include.
        cxx_args: Options for the C++ compiler.
        nvcc_args: Options for nvcc.
        link_args: Options for the linker.
        architectures: The GPUs to compile for, as in TORCH_CUDA_ARCH_LIST; "" without CUDA.
        why_no_cuda: Why the CUDA kernels are left out; "" if they are built.
    """

    sources: list[Path]
    headers: list[Path]
    cxx_args: list[str]
    nvcc_args: list[str]
    link_args: list[str]
    architectures: str
    why_no_cuda: str


def recipe(csrc: Path) -> Recipe:
    """Return how to build the sources in a folder on this machine for the installed torch.

    Raises:
        RuntimeError: ``EMERGING_OPTIMIZERS_CUDA=1``, but the CUDA kernels cannot be built.
    """
    patterns = ["units/*.cpp", "engine/cpu/*.cpp", "bindings/*.cpp"]
    is_windows = sys.platform == "win32"
    openmp_compile, openmp_link = OPENMP_ARGS.get(sys.platform, ([], []))
    # AT_PER_OPERATOR_HEADERS: include only the operators that are used, which compiles faster.
    defines = [f"-DEMOPT_ABI={abi(csrc)}", "-DAT_PER_OPERATOR_HEADERS"]
    cxx_args = [*COMPILE_ARGS["msvc" if is_windows else "unix"], *openmp_compile, *defines]
    nvcc_args = []
    reason = why_no_cuda()
    if reason is None:
        patterns += ["engine/cuda/*.cpp", "engine/cuda/*.cu", "units/*.cu"]
        cxx_args = [*cxx_args, "-DEMOPT_CUDA=1"]
        hidden = [] if is_windows else ["-Xcompiler=-fvisibility=hidden"]
        nvcc_args = [*NVCC_ARGS, *hidden, "-DEMOPT_CUDA=1"]
    elif os.environ.get("EMERGING_OPTIMIZERS_CUDA") == "1":
        raise RuntimeError(f"EMERGING_OPTIMIZERS_CUDA=1, but {reason}")
    return Recipe(
        sources=[path for pattern in patterns for path in sorted(csrc.glob(pattern))],
        headers=sorted([*csrc.rglob("*.h"), *csrc.rglob("*.inl")]),
        cxx_args=cxx_args,
        nvcc_args=nvcc_args,
        link_args=openmp_link,
        architectures=architectures() if reason is None else "",
        why_no_cuda=reason or "",
    )


def abi(csrc: Path) -> str:
    """Return a hash of the headers that a rule's unit shares with the module.

    A rule in a separate library works with a module of the same hash.
    """
    return f"0x{hash_of_headers([csrc / 'engine' / 'rule_unit.h'])}"


def hash_of_headers(first: list[Path]) -> str:
    """Return a hash of headers and of those that they include, as 16 hexadecimal digits."""
    headers: dict[Path, str] = {}
    pending = list(first)
    while pending:
        header = pending.pop().resolve()
        if header in headers or not header.is_file():
            continue
        headers[header] = header.read_text(encoding="utf-8")
        for name in re.findall(r'"([\w./]+\.(?:h|inl))"', headers[header]):
            pending += [header.parent / name, header.parent / "cpu" / name]
    text = "".join(headers[header] for header in sorted(headers))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def compiler() -> str:
    """Return the command of the C++ compiler, which may have several words."""
    return os.environ.get("CXX", "").strip() or ("cl" if sys.platform == "win32" else "c++")


def compiler_words() -> list[str]:
    """Return the words of the C++ compiler's command."""
    return _words(compiler())


def has_compiler() -> bool:
    """Return whether the C++ compiler, or the program that starts it, is installed."""
    return shutil.which(compiler_words()[0]) is not None


def compiler_variables(folder: Path) -> dict[str, str]:
    """Return the variables with which torch and setuptools run the compilers in CXX and CC.

    torch treats CXX as one word, and setuptools splits it. Both pass words of CC on to nvcc or to
    the C++ compiler. So a command of several words is wrapped in a script, whose name is one word.

    Args:
        folder: Where the scripts are written, if any.
    """
    variables: dict[str, str] = {}
    if sys.platform == "win32":
        return variables
    for name, usual in (("CXX", "c++"), ("CC", "cc")):
        if name not in os.environ:
            continue
        command = os.environ[name].strip() or usual
        # The build runs in another folder.
        words = [
            os.path.abspath(w) if "/" in w and os.path.isfile(w) else w for w in _words(command)
        ]
        if len(words) == 1 and shlex.quote(words[0]) == words[0]:
            variables[name] = words[0]
            continue
        # torch recognizes a compiler by its name, so the script's name contains it. It is not the
        # same name, since the script comes first on PATH.
        programs = [word for word in words if shutil.which(word)] or [usual]
        if os.pathsep in str(folder):  # cannot be put on PATH
            folder = Path(tempfile.mkdtemp(prefix="emerging_optimizers-"))
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
        script = folder / (re.sub(r"[^\w+.-]", "_", Path(programs[-1]).name) + f"-of-{name}")
        folder.mkdir(parents=True, exist_ok=True)
        script.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        script.chmod(0o755)
        # The name without the path: torch does not quote paths for ninja, nor torch 2.11 for the
        # shell.
        variables[name] = script.name
        path = os.environ.get("PATH", os.defpath)
        variables["PATH"] = os.pathsep.join([str(folder.absolute()), path])
        # torch would put ccache before the script, but the command may already contain it.
        variables["TORCH_NO_COMPILER_WRAPPER"] = "1"
    return variables


def _words(command: str) -> list[str]:
    """Split a command as a shell does, unless it is the path of one program, with spaces."""
    if shutil.which(command) is not None or sys.platform == "win32":
        return [command]
    try:
        words = shlex.split(command)
    except ValueError:  # an unclosed quote
        words = []
    if words and re.match(r"[A-Za-z_]\w*=", words[0]):
        words = ["env", *words]
    return words or [command]


def why_no_cuda() -> str | None:
    """Return why the CUDA kernels cannot be compiled; None if they can."""
    import torch

    if os.environ.get("EMERGING_OPTIMIZERS_CUDA") == "0":
        return "EMERGING_OPTIMIZERS_CUDA=0"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    version = nvcc_version()
    if version is None:
        return f"no nvcc was found; torch was built with CUDA {torch.version.cuda} (set CUDA_HOME)"
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"nvcc is from CUDA {version}, but torch was built with CUDA {torch.version.cuda}"
    if _numbers(version) < OLDEST_NVCC:
        return f"nvcc is from CUDA {version}, older than 12.1"
    for header in CUDA_HEADERS:
        if not _finds_cuda_header(header):
            return f"the CUDA toolkit has no {header} (set CUDA_HOME)"
    if not architectures():
        return "all GPUs of this machine are older than compute capability 7.0"
    return None


def nvcc_version() -> str | None:
    """Return nvcc's version, such as "13.0", or None if there is no nvcc."""
    from torch.utils import cpp_extension

    if cpp_extension.CUDA_HOME is None:
        return None
    nvcc = shutil.which("nvcc", path=str(Path(cpp_extension.CUDA_HOME) / "bin"))
    if nvcc is None:
        return None
    answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"release (\d+\.\d+)", answer.stdout)
    return found.group(1) if found else None


def _finds_cuda_header(header: str) -> bool:
    """Return whether compilers find a header. An nvcc on PATH may be a script without headers."""
    from torch.utils import cpp_extension

    folders = [*cpp_extension.include_paths("cuda"), "/usr/include", "/usr/local/include"]
    for name in ("CPATH", "CPLUS_INCLUDE_PATH", "INCLUDE"):
        folders += os.environ.get(name, "").split(os.pathsep)
    # CUDA 13 moved CCCL's headers to a subfolder, which nvcc searches by itself.
    return any(
        Path(folder, inner, header).is_file()
        for folder in folders
        if folder
        for inner in ("", "cccl")
    )


def architectures() -> str:
    """Return the GPUs to compile for: those the user names, this machine's, or the usual ones."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return os.environ["TORCH_CUDA_ARCH_LIST"]
    found = _gpus()
    if not found:
        nvcc = _numbers(nvcc_version() or "0")
        return ";".join(gpu for gpu, oldest in USUAL_GPUS.items() if nvcc >= oldest) + "+PTX"
    return ";".join(
        f"{major}.{minor}" for major, minor in sorted(found) if (major, minor) >= OLDEST_GPU
    )


def _gpus() -> set[tuple[int, ...]]:
    """Return the compute capabilities of this machine's GPUs."""
    # nvidia-smi first: torch would initialize CUDA, after which forked processes cannot use it, and
    # an import must not do that.
    program = shutil.which("nvidia-smi")
    if program is not None:
        command = [program, "--query-gpu=compute_cap", "--format=csv,noheader"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        found = re.findall(r"^\d+\.\d+$", answer.stdout, re.MULTILINE)
        if answer.returncode == 0 and found:
            return set(map(_numbers, found))
    import torch

    return {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))
