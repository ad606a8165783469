"""Checks the CUDA engine without a GPU: `make cuda-check`.

Compiles the kernels for several architectures, those of the built-in rules with nvcc and those of
some rules written in Python with NVRTC, and fails where

- nvcc or NVRTC warns, or the host code around the kernels does not compile;
- a kernel spills registers, uses local memory, or exceeds its register budget;
- operands are accessed outside vectors.h, or in vectors narrower than they could be, so that warps
  read or write partial sectors;
- a vector load of a tile comes after the first square root, division or store, and so waits for
  it, or a single element is widened where it is loaded;
- the loop exceeds its instruction budget;
- an operation could be contracted, or is not rounded as on the CPU.

Whether the kernels compute the right numbers is checked by the tests, on the host and on a GPU.
"""

import argparse
import functools
import itertools
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from cuda_code import check_code, check_resources, check_rounding
from cuda_sources import Kernel, Sources
from cuda_user_rules import MAX_SECONDS as MAX_SECONDS_OF_NVRTC
from cuda_user_rules import USER_RULES, compile_user_rules
from torch.utils import cpp_extension

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
MAX_SECONDS = 300  # nvcc's time, over all architectures


def find_tool(name: str) -> Path:
    """Find a tool in the PyPI packages, else in $CUDA_HOME, else on the PATH."""
    folders = [str(Path(sysconfig.get_path("platlib")) / "nvidia" / "cu13" / "bin")]
    if "CUDA_HOME" in os.environ:
        folders.append(str(Path(os.environ["CUDA_HOME"]) / "bin"))
    found = shutil.which(name, path=os.pathsep.join([*folders, os.environ.get("PATH", "")]))
    if found is None:
        sys.exit(f"cuda-check: no {name}; `make cuda-check` installs it, or set CUDA_HOME")
    return Path(found).resolve()


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command and capture its output."""
    return subprocess.run(command, capture_output=True, text=True, check=False)


def compile_all(commands: list[list[str]]) -> list[str]:
    """Run compilers, two at a time; return what each wrote to stderr."""
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(run, commands))
    failures = [f"{shlex.join(one.args)}\n{one.stderr}" for one in done if one.returncode != 0]
    if failures:
        sys.exit("\n".join(["cuda-check: does not compile", *failures]))
    return [one.stderr for one in done]


class Compiled(NamedTuple):
    """The units compiled for one architecture: ptxas' reports, and the paths of the cubins."""

    reports: list[str]
    cubins: list[Path]


def compile_kernels(
    sources: Sources, nvcc: Path, out: Path, architectures: Sequence[str]
) -> tuple[dict[str, Compiled], list[str]]:
    """Compile all units to cubins for each architecture; return them, and the PTX."""
    flags = [flag for flag in sources.build_constant("NVCC_ARGS") if "--threads" not in flag]
    flags += [*cpp_extension.COMMON_NVCC_FLAGS, "-lineinfo", "-Xptxas", "-v"]
    base = [str(nvcc), *flags, "-Werror", "all-warnings"]
    units = [sources.units / f"{stem}_cuda.cu" for stem in sources.stems]
    units += sorted(sources.cuda.glob("*.cu"))
    cubins = {a: [out / f"{unit.stem}.{a}.cubin" for unit in units] for a in architectures}
    commands = []
    for architecture, of_all in cubins.items():
        # In the oldest standard that a supported torch requires; for the newest chip, whose PTX is
        # kept, in the newest.
        is_newest = architecture == architectures[-1]
        kept = ["-std=c++20", "--keep", "--keep-dir", str(out)] if is_newest else ["-std=c++17"]
        for unit, cubin in zip(units, of_all, strict=True):
            more = [*kept, "-cubin", f"-arch={architecture}", "-o", str(cubin), str(unit)]
            commands.append([*base, *more])
    reports = iter(compile_all(commands))
    compiled = {
        a: Compiled(list(itertools.islice(reports, len(units))), cubins[a]) for a in architectures
    }
    return compiled, [(out / f"{unit.stem}.ptx").read_text() for unit in units]


def add_user_rules(
    sources: Sources, rules: Sequence[str], out: Path, compiled: dict[str, Compiled]
) -> tuple[list[str], list[str]]:
    """Compile kernels of users' rules, too; return the findings, and the PTX."""
    findings = []
    programs = []
    units = compile_user_rules(sources, rules, out, list(compiled))
    for unit in units:
        compiled[unit.architecture].reports.append(unit.report)
        compiled[unit.architecture].cubins.append(unit.cubin)
        if "warning" in unit.report:
            findings.append(f"NVRTC warns: {unit.report}")
    for unit in units:
        if unit.architecture == list(compiled)[-1]:
            programs.append(unit.ptx)
    slowest = max(units, key=lambda unit: unit.seconds)
    print(f"cuda-check: NVRTC took at most {slowest.seconds:.1f} s, for {slowest.cubin.stem}")
    if slowest.seconds > MAX_SECONDS_OF_NVRTC:
        findings.append(f"that is more than {MAX_SECONDS_OF_NVRTC} s")
    return findings, programs


def compile_around_kernels(sources: Sources, nvcc: Path) -> None:
    """Check the syntax of the host code: a torch without CUDA has the headers for it.

    The rest of the package is compiled with its CUDA parts for the tests' emulated devices.
    """
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    includes = [*cpp_extension.include_paths(), str(nvcc.parent.parent / "include")]
    flags = [*sources.build_constant("COMPILE_ARGS")["unix"], "-std=c++20", "-fsyntax-only"]
    flags += ["-DEMOPT_CUDA=1", "-DTORCH_EXTENSION_NAME=_C", "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE"]
    for folder in [*includes, sysconfig.get_path("include")]:
        flags += ["-isystem", folder]
    compile_all([[*compiler, *flags, str(unit)] for unit in sources.cuda.glob("*.cpp")])


def check_cubin(
    sources: Sources, nvdisasm: Path, cubin: Path
) -> tuple[dict[Kernel, int], list[str]]:
    """Disassemble a unit and check its code; see `check_code`."""
    command = [str(nvdisasm), "-c", "--print-line-info-inline", str(cubin)]
    return check_code(sources, run(command).stdout)


def main() -> int:
    """Run the check; return the exit status."""
    parser = argparse.ArgumentParser(description="Check the CUDA engine without a GPU.")
    parser.add_argument("--root", type=Path, default=Path(__file__).parent.parent)
    parser.add_argument("--rules", nargs="+", default=[], help="stems; without it, all")
    parser.add_argument("--user-rules", nargs="*", help="of examples/rules; without both, two")
    parser.add_argument("--architectures", nargs="+", default=ARCHITECTURES)
    arguments = parser.parse_args()
    sources = Sources(arguments.root.resolve(), arguments.rules)
    nvcc, nvdisasm = find_tool("nvcc"), find_tool("nvdisasm")
    print(f"cuda-check: {nvcc}\ncuda-check: {nvdisasm}", flush=True)
    findings: list[str] = []
    rows: defaultdict[Kernel, str] = defaultdict(str)
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        compiled, ptx = compile_kernels(sources, nvcc, Path(folder), arguments.architectures)
        seconds = time.monotonic() - start
        if seconds > MAX_SECONDS:
            findings.append(f"nvcc took {seconds:.0f} s, more than {MAX_SECONDS} s")
        user_rules = arguments.user_rules
        if user_rules is None and not arguments.rules:
            user_rules = USER_RULES
        if user_rules:
            more, programs = add_user_rules(sources, user_rules, Path(folder), compiled)
            findings += more
            ptx += programs
        if not arguments.rules:
            compile_around_kernels(sources, nvcc)
        for name, (reports, cubins) in compiled.items():
            registers, wrong = check_resources(sources, "".join(reports))
            lengths: dict[Kernel, int] = {}
            with ProcessPoolExecutor(2) as processes:
                check = functools.partial(check_cubin, sources, nvdisasm)
                for of_unit, more in processes.map(check, cubins):
                    lengths |= of_unit
                    wrong += more
            findings += [f"{name}, {finding}" for finding in wrong]
            for kernel, used in registers.items():
                rows[kernel] += f"{used:>3}, {lengths.get(kernel, 0):<9}"
        findings += check_rounding(sources, ptx)
    print("registers, instructions of the loop".rjust(92))
    print(" " * 57 + "".join(f"{name:<14}" for name in compiled))
    for kernel, row in sorted(rows.items()):
        print(f"{kernel!s:<57}{row}")
    for finding in findings:
        print(f"cuda-check: {finding}")
    fine = "no spill, no local memory, vectors fill sectors, loads first, no contraction"
    verdict = f"{len(findings)} findings" if findings else fine
    summary = f"{len(rows)} kernels, {len(compiled)} architectures, {seconds:.0f} s"
    print(f"cuda-check: {summary}: {verdict}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
