"""Compile the driver, and run programs with a time limit."""

import ast
import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from variants import Variant

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

_running: set[subprocess.Popen[bytes]] = set()


def run(command: list[str], deadline: float, stdout: Path, stderr: Path) -> int | None:
    """Run a command; return its exit status, or None if it was stopped at the deadline."""
    with stdout.open("wb") as out, stderr.open("wb") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, start_new_session=True)
        _running.add(process)
        try:
            return process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return None
        finally:
            stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Stop a process and its children."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # it may hang in a driver call
            process.wait(10)
    _running.discard(process)


def stop_all() -> None:
    """Stop all running commands."""
    for process in list(_running):
        stop(process)


def nvcc_args() -> list[str]:
    """Return the package's compiler options, read from _build.py."""
    for node in ast.parse((ROOT / "emerging_optimizers" / "_build.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "NVCC_ARGS":
            return [arg for arg in ast.literal_eval(node.value) if "--threads" not in arg]
    raise LookupError("_build.py assigns no NVCC_ARGS")


def find_nvcc() -> str:
    """Return the path of nvcc."""
    folders = [
        os.path.join(os.environ[k], "bin") for k in ("CUDA_HOME", "CUDA_PATH") if k in os.environ
    ]
    folders += [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    found = shutil.which("nvcc", path=os.pathsep.join(folders))
    return found or sys.exit("drive: nvcc not found; set CUDA_HOME")


def run_briefly(command: list[str]) -> str:
    """Return a command's output; "" if it cannot be run."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout if answer.returncode == 0 else ""


def describe_machine(compiler: str) -> dict[str, str]:
    """Return the versions and hardware that the figures depend on."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    version = re.search(r"release .*|^.*\d\.\d.*$", run_briefly([compiler, "--version"]), re.M)
    return {
        "gpu": run_briefly(query).partition("\n")[0].strip(),
        "compiler": f"{Path(compiler).name}: {version[0] if version else ''}",
    }


def compiler(simulate: bool, architecture: str | None, csrc: Path) -> list[str]:
    """Return the command that compiles the driver, without macros and output file."""
    includes = [f"-I{folder}" for folder in (csrc, ROOT / "tests" / "cpp")]
    if simulate:
        command = [os.environ.get("CXX", "c++"), "-x", "c++", "-O1", "-ffp-contract=off"]
    else:
        if architecture is None:
            query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
            capability = run_briefly(query).partition("\n")[0].strip()
            architecture = f"sm_{capability.replace('.', '')}" if capability else "native"
        command = [find_nvcc(), f"-arch={architecture}", *nvcc_args(), "-Xptxas=-v"]
        command += ["--expt-relaxed-constexpr", "-Xcompiler=-ffp-contract=off"]
    return [*command, "-std=c++17", *includes, str(HERE / "driver.cu")]


def kernels_of(report: str) -> list[dict[str, Any]]:
    """Return each kernel's registers and spilled bytes, from ptxas's output."""
    kernels = []
    name, spilled = "", 0
    for line in report.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)'", line):
            pattern = r"5sweep.*?(Apply|Store)UpdateE([fd])Lm(\d+)ELb([01])EEELb([01])"
            kind = re.search(pattern, found[1])
            name = ""
            if kind is not None:
                real = {"f": "float32", "d": "float64"}[kind[2]]
                numbers = " codes" if kind[4] == "1" else " device" if kind[5] == "1" else ""
                name = f"{kind[1].lower()} {real} {kind[3]}{numbers}"
        elif found := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spilled = int(found[1]) + int(found[2])
        elif (found := re.search(r"Used (\d+) registers", line)) and name:
            kernels.append({"kernel": name, "registers": int(found[1]), "spilled": spilled})
    return sorted(kernels, key=lambda kernel: str(kernel["kernel"]))


def digest_of_sources(csrc: Path, compiler: str) -> str:
    """Return a hash of all files that the driver includes and of the compiler's version."""
    digest = hashlib.sha256(compiler.encode())
    for folder in (csrc, ROOT / "tests" / "cpp", HERE):
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".h", ".cu"):
                digest.update(path.read_bytes())
    return digest.hexdigest()


def compile_variant(variant: Variant, command: list[str], folder: Path, deadline: float) -> Path:
    """Compile the driver unless it is up to date; set the variant's `build`."""
    command = [*command, *(f"-D{name}={value}" for name, value in variant.macros.items())]
    program = folder / hashlib.sha256("\n".join(command).encode()).hexdigest()[:16]
    log = program.with_suffix(".log")
    begin = time.monotonic()
    if not program.exists():
        unfinished = program.with_suffix(".tmp")
        status = run([*command, "-o", str(unfinished)], deadline, Path(os.devnull), log)
        if status == 0:
            unfinished.replace(program)
        else:
            is_stopped = status is None or status < 0
            why = "stopped" if is_stopped else log.read_text(errors="replace")[-4000:]
            variant.build, variant.status = {"error": why}, "does not compile"
    if program.exists():
        kernels = kernels_of(log.read_text(errors="replace"))
        variant.build = {"seconds": round(time.monotonic() - begin, 1), "kernels": kernels}
    return program
