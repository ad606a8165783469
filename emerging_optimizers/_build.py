"""What the compiled module is made from, and how.

For setup.py, which loads this file by its path before there is a package, and for the build at the
first import (_jit.py). So it imports nothing of the package, and torch only where it is asked for.

EMERGING_OPTIMIZERS_CUDA=0 leaves the CUDA kernels out. Without that variable they are left out
where torch has no CUDA, or there is no nvcc of its major version; with =1 that is an error.
TORCH_CUDA_ARCH_LIST names the GPUs to compile for; without it, those of this machine.
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
# No contraction here either, so that the bits are the CPU's. The next three are nvcc's defaults;
# named here, they also hold where NVCC_APPEND_FLAGS has --use_fast_math.
NVCC_ARGS = [
    "-O3",
    "--fmad=false",
    "--ftz=false",
    "--prec-div=true",
    "--prec-sqrt=true",
    "--threads=0",
]
# The kernels' arguments take more than 4096 bytes, and are constant: what is older has not that.
OLDEST_NVCC = (12, 1)
OLDEST_GPU = (7, 0)
# What is compiled for where no GPU is seen and none is named: A100, H100 and H200, B200. Each from
# the nvcc on that knows it.
USUAL_GPUS = {"8.0": OLDEST_NVCC, "9.0": OLDEST_NVCC, "10.0": (12, 8)}
# What the kernels include, which is not always where nvcc is.
CUDA_HEADERS = ("cuda_runtime.h", "nv/target")
# at::parallel_for is compiled into its caller: without OpenMP here it would be serial.
OPENMP_ARGS = {
    "linux": (["-fopenmp"], ["-fopenmp"]),
    "darwin": (["-Xpreprocessor", "-fopenmp"], []),
    "win32": (["/openmp"], []),
}


@dataclass(frozen=True)
class Recipe:
    """What a compiler and a linker are given.

    Attributes:
        sources: What is compiled.
        headers: What else it depends on.
        cxx_args: Options of the C++ compiler.
        nvcc_args: Options of nvcc.
        link_args: Options of the linker.
        architectures: The GPUs to compile for, as TORCH_CUDA_ARCH_LIST has them; "" without CUDA.
        why_no_cuda: What keeps CUDA out; "" with it.
    """

    sources: list[Path]
    headers: list[Path]
    cxx_args: list[str]
    nvcc_args: list[str]
    link_args: list[str]
    architectures: str
    why_no_cuda: str


def recipe(csrc: Path) -> Recipe:
    """Return how to build what lies in a folder on this machine, with the torch that is installed.

    Raises:
        RuntimeError: CUDA was insisted on, and cannot be had.
    """
    patterns = ["units/*.cpp", "engine/cpu/*.cpp", "bindings/*.cpp"]
    is_windows = sys.platform == "win32"
    openmp_compile, openmp_link = OPENMP_ARGS.get(sys.platform, ([], []))
    # PyTorch's headers then include only the operators that are used, which compiles faster.
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

    A rule in a library of its own fits a module of the same hash.
    """
    headers: dict[Path, str] = {}
    pending = [csrc / "engine" / "rule_unit.h"]
    while pending:
        header = pending.pop().resolve()
        if header in headers or not header.is_file():
            continue
        headers[header] = header.read_text(encoding="utf-8")
        for name in re.findall(r'"([\w./]+\.(?:h|inl))"', headers[header]):
            pending += [header.parent / name, header.parent / "cpu" / name]
    text = "".join(headers[header] for header in sorted(headers))
    return f"0x{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def compiler() -> str:
    """Return the C++ compiler's command, which may have several words."""
    return os.environ.get("CXX", "").strip() or ("cl" if sys.platform == "win32" else "c++")


def has_compiler() -> bool:
    """Whether the C++ compiler, or what is to start it, is there."""
    return shutil.which(_words(compiler())[0]) is not None


def compiler_variables(folder: Path) -> dict[str, str]:
    """Return variables with which torch and setuptools run the compilers that CXX and CC name.

    Torch takes CXX for one word; setuptools splits it. Both pass words of CC on to nvcc or to the
    C++ compiler. So a command of several words becomes a script, of one word.

    Args:
        folder: Where scripts are put, if there are any.
    """
    variables: dict[str, str] = {}
    if sys.platform == "win32":
        return variables
    for name, usual in (("CXX", "c++"), ("CC", "cc")):
        if name not in os.environ:
            continue
        command = os.environ[name].strip() or usual
        # The build runs in a folder of its own.
        words = [
            os.path.abspath(w) if "/" in w and os.path.isfile(w) else w for w in _words(command)
        ]
        if len(words) == 1 and shlex.quote(words[0]) == words[0]:
            variables[name] = words[0]
            continue
        # Named like the compiler, by whose name torch knows it; but not the same, for it is first
        # on the PATH.
        programs = [word for word in words if shutil.which(word)] or [usual]
        if os.pathsep in str(folder):  # which PATH cannot have
            folder = Path(tempfile.mkdtemp(prefix="emerging_optimizers-"))
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
        script = folder / (re.sub(r"[^\w+.-]", "_", Path(programs[-1]).name) + f"-of-{name}")
        folder.mkdir(parents=True, exist_ok=True)
        script.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        script.chmod(0o755)
        # By its name, since torch quotes no path for ninja, and torch 2.11 none for the shell.
        variables[name] = script.name
        path = os.environ.get("PATH", os.defpath)
        variables["PATH"] = os.pathsep.join([str(folder.absolute()), path])
        # torch would put ccache before the script, where the command may have it already.
        variables["TORCH_NO_COMPILER_WRAPPER"] = "1"
    return variables


def _words(command: str) -> list[str]:
    """Split a command as a shell does, unless all of it is one program's path, with spaces."""
    if shutil.which(command) is not None or sys.platform == "win32":
        return [command]
    try:
        words = shlex.split(command)
    except ValueError:  # a quote that does not end
        words = []
    if words and re.match(r"[A-Za-z_]\w*=", words[0]):
        words = ["env", *words]
    return words or [command]


def why_no_cuda() -> str | None:
    """Say what keeps the CUDA kernels from being compiled; None where nothing does."""
    import torch

    if os.environ.get("EMERGING_OPTIMIZERS_CUDA") == "0":
        return "EMERGING_OPTIMIZERS_CUDA=0"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    version = nvcc_version()
    if version is None:
        return f"there is no nvcc; torch was built with CUDA {torch.version.cuda} (set CUDA_HOME)"
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"nvcc is of CUDA {version}, but torch was built with CUDA {torch.version.cuda}"
    if _numbers(version) < OLDEST_NVCC:
        return f"nvcc is of CUDA {version}, older than 12.1"
    for header in CUDA_HEADERS:
        if not _finds_cuda_header(header):
            return f"there is no {header} where nvcc is (set CUDA_HOME)"
    if not architectures():
        return "all GPUs here are older than compute capability 7.0"
    return None


def nvcc_version() -> str | None:
    """Return "13.0", or None where there is no nvcc."""
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
    """Whether compilers will find it: an nvcc on the PATH may be a script, without."""
    from torch.utils import cpp_extension

    folders = [*cpp_extension.include_paths("cuda"), "/usr/include", "/usr/local/include"]
    for name in ("CPATH", "CPLUS_INCLUDE_PATH", "INCLUDE"):
        folders += os.environ.get(name, "").split(os.pathsep)
    # From CUDA 13 on, nvcc looks into the folder for what the toolkit has of CCCL by itself.
    return any(
        Path(folder, inner, header).is_file()
        for folder in folders
        if folder
        for inner in ("", "cccl")
    )


def architectures() -> str:
    """Return what to compile for: what the user says, else this machine's GPUs, else the usual."""
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
    # The driver's program first: torch would start CUDA in this process, which at an import is too
    # early, since processes that are forked afterwards could not use it.
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
