"""Checks the CUDA engine without a GPU: `make cuda-check`.

Compiles the kernels for several architectures, and fails where

- nvcc has a warning, or the sources around the kernels do not compile;
- a kernel spills registers, has local memory, or uses more registers than its budget;
- vectors.h accesses global memory by less than 16 bytes, or anything else does at all, but for the
  loop over ends, the reading of numbers and counters, and the advance of counters;
- an operation could be contracted, or is not rounded as the CPU's.

Whether the kernels compute the right numbers is for the tests, on the host and on a GPU.
"""

import argparse
import ast
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils import cpp_extension

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
MAX_SECONDS = 300  # of nvcc, for all architectures together
VECTOR_BYTES = 16
# Registers of a thread, by the epilogue. float32: three blocks of 256 threads on a multiprocessor,
# with its 65536 registers, leave 85 for each, handed out in eights; two, where a thread also holds
# the weight, leave 128.
FLOAT32_BUDGET = {"StoreUpdate": 80, "ApplyUpdate": 128}
# float64, also by the operands of a row: of each, a thread holds 8 elements of 2 registers.
FLOAT64_BUDGET = {
    ("StoreUpdate", 3): 128,  # Lion, Signum: 48 of values; two blocks on a multiprocessor
    ("StoreUpdate", 4): 128,  # the rules with two moments: 64 of values; two blocks
    ("StoreUpdate", 5): 192,  # AdEMAMix: 80 of values, with which 128 spill; one block, up to 255
    ("ApplyUpdate", 4): 176,  # one block each from here on
    ("ApplyUpdate", 5): 200,
    ("ApplyUpdate", 6): 224,
}
ADVANCE_BUDGET = 32
# Lines that call these hold their code, which contracts: warm-up schedules, once per launch.
LIBRARY_CALL = re.compile(r"::(log|pow)\(")


class Kernel(NamedTuple):
    """One instance of a kernel; the one that advances counters has no more than its name."""

    rule: str
    epilogue: str = ""
    real: str = ""
    launch_bytes: int = 0

    def __str__(self) -> str:
        parts = (self.rule, self.epilogue, self.real, self.launch_bytes or "")
        return " ".join(str(part) for part in parts if part)


ADVANCE = Kernel("advance")


def kernel_of(symbol: str) -> Kernel | None:
    if re.search(r"7advanceE", symbol):
        return ADVANCE
    found = re.search(r"LaunchINS_\d+(\w+?)ENS_\d+(\w+?)E([fd])Lm(\d+)", symbol)
    if found is None:
        return None
    return Kernel(found[1], found[2], {"f": "float32", "d": "float64"}[found[3]], int(found[4]))


def find_tool(name: str) -> Path:
    """Find a tool: that of the PyPI packages, else the toolkit in $CUDA_HOME, else on the PATH."""
    folders = [str(Path(sysconfig.get_path("platlib")) / "nvidia" / "cu13" / "bin")]
    if "CUDA_HOME" in os.environ:
        folders.append(str(Path(os.environ["CUDA_HOME"]) / "bin"))
    found = shutil.which(name, path=os.pathsep.join([*folders, os.environ.get("PATH", "")]))
    if found is None:
        sys.exit(f"cuda-check: no {name}; `make cuda-check` installs it, or set CUDA_HOME")
    return Path(found).resolve()


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def compile_all(commands: list[list[str]]) -> list[str]:
    """Run compilers, two at a time; return what each wrote to stderr."""
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(run, commands))
    failures = [f"{shlex.join(one.args)}\n{one.stderr}" for one in done if one.returncode != 0]
    if failures:
        sys.exit("\n".join(["cuda-check: does not compile", *failures]))
    return [one.stderr for one in done]


def listed(findings: Counter[str]) -> list[str]:
    return [what if n == 1 else f"{what} ({n} times)" for what, n in findings.items()]


class Sources:
    """What the check needs to know from the sources of a checkout."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.places: dict[tuple[str, str], str] = {}
        self.csrc = root / "csrc"
        self.cuda = self.csrc / "engine" / "cuda"
        tuning = (self.cuda / "tuning.h").read_text()
        self.held = int(re.findall(r"kHeld = (\d+)", tuning)[0])  # elements of each operand
        small, large = (int(n) for n in re.findall(r"k(?:Small|Large)Launch = (\d+)", tuning))
        epilogues = dict(
            re.findall(
                r"^struct (\w+) \{\n  static constexpr int kOperands = (\d+);",
                (self.csrc / "engine" / "epilogue.h").read_text(),
                re.MULTILINE,
            )
        )
        # Of each kernel, the operands of a row: the update, the gradient, the states, and what the
        # epilogue adds.
        self.operands = {}
        for header in sorted((self.csrc / "rules").glob("*.h")):
            pattern = r"^struct (\w+) \{.*?kStates\[\] = \{(.*?)\}"
            rules = re.findall(pattern, header.read_text(), re.MULTILINE | re.DOTALL)
            for (rule, states), (epilogue, own) in itertools.product(rules, epilogues.items()):
                for instance in (("float32", small), ("float32", large), ("float64", small)):
                    count = 2 + states.count('"') // 2 + int(own)
                    self.operands[Kernel(rule, epilogue, *instance)] = count
        # The only places that access global memory by single elements: for each of a block's, ...
        self.ends = self.function("engine/cuda/chunk.h", "sweep_ends")
        # ... for each counter, ...
        self.advance = self.function("engine/cuda/chunk.h", "advance_counters")
        # ... and once for a block, before it sweeps.
        self.setup = self.function("engine/cuda/chunk.h", "step_of")
        self.setup |= self.function("engine/number.h", "read")
        self.sweep = self.function("engine/cuda/chunk.h", "sweep_chunk")

    def may_access(self, instruction: str, places: list[str]) -> bool:
        """Whether a single element may be accessed there."""
        if instruction not in ("LDG", "STG"):
            return False
        if not self.sweep.isdisjoint(places):
            return not self.ends.isdisjoint(places)
        is_read_once = instruction == "LDG" and not self.setup.isdisjoint(places)
        return is_read_once or not self.advance.isdisjoint(places)

    def build_constant(self, name: str) -> Any:
        """Return a literal that _build.py assigns, so that both compile with the same flags."""
        for node in ast.parse((self.root / "emerging_optimizers" / "_build.py").read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
                return ast.literal_eval(node.value)
        raise LookupError(f"_build.py assigns no {name}")

    def place(self, file: str, line: str) -> str:
        """Name a line as "engine/cuda/chunk.h:89"."""
        if (file, line) not in self.places:  # a disassembly names few places, many times
            self.places[file, line] = f"{os.path.relpath(file, self.csrc)}:{line}"
        return self.places[file, line]

    def calls_library(self, place: str) -> bool:
        file, line = place.split(":")
        text = (self.csrc / file).read_text().splitlines()[int(line) - 1]
        return LIBRARY_CALL.search(text) is not None

    def function(self, file: str, name: str) -> set[str]:
        """Return the lines of a function, by their names."""
        lines = (self.csrc / file).read_text().splitlines()
        starts = ((i, re.match(rf"( *)EMOPT_FN [\w ]+ {name}\(", x)) for i, x in enumerate(lines))
        start, found = next((i, found) for i, found in starts if found is not None)
        end = lines.index(found[1] + "}", start)
        return {f"{file}:{i + 1}" for i in range(start, end + 1)}


def compile_kernels(sources: Sources, nvcc: Path, out: Path) -> dict[str, str]:
    """Compile the kernels to sm_*.cubin and kernels.ptx; return the report on each cubin."""
    flags = [flag for flag in sources.build_constant("NVCC_ARGS") if "--threads" not in flag]
    flags += [*cpp_extension.COMMON_NVCC_FLAGS, "-lineinfo", "-Xptxas", "-v"]
    base = [str(nvcc), *flags, "-Werror", "all-warnings", str(sources.cuda / "kernels.cu")]
    # By the oldest standard that a supported torch asks for, and by the newest.
    old, new = [*base, "-std=c++17"], [*base, "-std=c++20"]
    commands = [[*old, "-cubin", f"-arch={a}", "-o", f"{out / a}.cubin"] for a in ARCHITECTURES]
    newest = ARCHITECTURES[-1].replace("sm", "compute")
    commands.append([*new, "-ptx", f"-arch={newest}", "-o", str(out / "kernels.ptx")])
    return dict(zip(ARCHITECTURES, compile_all(commands), strict=False))


def compile_around_kernels(sources: Sources, nvcc: Path) -> None:
    """Compile what sees both torch and CUDA, without code: a torch without CUDA has the headers."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    includes = [*cpp_extension.include_paths(), str(nvcc.parent.parent / "include")]
    flags = [*sources.build_constant("COMPILE_ARGS")["unix"], "-std=c++20", "-fsyntax-only"]
    flags += ["-DEMOPT_CUDA=1", "-DTORCH_EXTENSION_NAME=_C", "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE"]
    for folder in [*includes, sysconfig.get_path("include")]:
        flags += ["-isystem", folder]
    units = sorted(sources.csrc.glob("bindings/*.cpp")) + sorted(sources.cuda.glob("*.cpp"))
    compile_all([[*compiler, *flags, str(unit)] for unit in units])


def budget(sources: Sources, kernel: Kernel) -> int:
    if kernel == ADVANCE:
        return ADVANCE_BUDGET
    if kernel.real == "float32":
        return FLOAT32_BUDGET.get(kernel.epilogue, 0)
    return FLOAT64_BUDGET.get((kernel.epilogue, sources.operands.get(kernel, 0)), 0)


def check_resources(sources: Sources, report: str) -> tuple[dict[Kernel, int], list[str]]:
    """Read ptxas' report; return the registers of each kernel, and what is wrong."""
    registers: dict[Kernel, int] = {}
    findings = []
    function = ""
    for line in report.splitlines():
        if found := re.search(r"(?:entry function|Function properties for) '?(\w+)", line):
            function = found[1]
        kernel = kernel_of(function)
        if "bytes stack frame" in line and any(int(n) != 0 for n in re.findall(r"\d+", line)):
            findings.append(f"{kernel or function}: {line.strip()}")
        if kernel is not None and (found := re.search(r"Used (\d+) registers", line)):
            registers[kernel] = int(found[1])
    for kernel, used in registers.items():
        allowed = budget(sources, kernel)
        if used > allowed:
            findings.append(f"{kernel}: {used} registers, more than {allowed}")
    wanted = {*sources.operands, ADVANCE}
    findings += [f"{kernel}: no such kernel" for kernel in sorted(wanted - registers.keys())]
    findings += [f"{kernel}: not expected" for kernel in sorted(registers.keys() - wanted)]
    return registers, findings


def check_accesses(
    sources: Sources, disassembly: str, kernels: set[Kernel]
) -> tuple[dict[Kernel, Counter[str]], list[str]]:
    """Read a disassembly; return the 16-byte loads and stores of each kernel, and what is wrong."""
    vectors: dict[Kernel, Counter[str]] = {kernel: Counter() for kernel in kernels}
    wrong: Counter[str] = Counter()
    kernel: Kernel | None = None
    places: list[str] = []  # where the instruction comes from, innermost first
    is_new_place = True
    for line in disassembly.splitlines():
        if found := re.match(r"\s*//## File (.*)", line):
            # One line for each frame; it stands for all instructions up to the next such lines.
            places = [] if is_new_place else places
            places.append(sources.place(*re.findall(r'"([^"]*)", line (\d+)', found[1])[0]))
            is_new_place = False
        elif found := re.match(r"\s*\.section\s+\.text\.(\w+)", line):
            kernel, places = kernel_of(found[1]), []
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", line):
            is_new_place = True
            name, *modifiers = found[1].split(".")
            if re.fullmatch(r"LDL|STL", name):
                wrong[f"{kernel}: {found[1]}, local memory"] += 1
            # Without a letter for the memory (LD, ST) they may be of any.
            if not re.fullmatch(r"(LD|ST|ATOM|RED)G?|LDGSTS", name):
                continue
            what = f"{kernel}: {found[1]} of {' in '.join(places[:2]) or 'no line'}"
            if any(place.startswith("engine/cuda/vectors.h:") for place in places):
                if str(8 * VECTOR_BYTES) not in modifiers:
                    wrong[f"{what}, not of {VECTOR_BYTES} bytes"] += 1
                elif kernel in vectors:
                    vectors[kernel][name] += 1
            elif not sources.may_access(name, places):
                wrong[f"{what}, outside vectors.h and the few places for single elements"] += 1
    for kernel, counts in vectors.items():
        if kernel not in sources.operands:
            continue
        # At the least: what a thread holds of each operand that is read in the arithmetic type, and
        # of each that is written; an update may be float64 whatever the arithmetic is.
        operand = sources.held * {"float32": 4, "float64": 8}[kernel.real] // VECTOR_BYTES
        update = sources.held * 8 // VECTOR_BYTES
        loads = (sources.operands[kernel] - 1) * operand
        for name, least in (("LDG", loads), ("STG", loads - operand + update)):
            if counts[name] < least:
                wrong[f"{kernel}: {counts[name]} {name} in vectors.h, fewer than {least}"] += 1
    return vectors, listed(wrong)


def check_rounding(sources: Sources, ptx: str) -> list[str]:
    """Read the PTX: ptxas keeps each operation that names its rounding, and may contract others."""
    files = dict(re.findall(r'\.file\s+(\d+)\s+"(.*)"', ptx))
    wrong: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    function = place = ""
    for line in ptx.splitlines():
        if found := re.search(r"\.(?:entry|func).* (\w+)\($", line):
            function = found[1]
        elif found := re.match(r"\s*\.loc\s+(\d+) (\d+)", line):
            place = sources.place(files[found[1]], found[2])
        elif found := re.match(r"\s*(?:@!?%\w+\s+)?([a-z]\w*(?:\.\w+)*\.f(?:16|32|64)\w*)\s", line):
            name, *modifiers = found[1].split(".")
            seen[found[1]] += 1
            what = f"PTX, {kernel_of(function) or function}: {found[1]} of {place}"
            if name in ("add", "sub", "mul", "div", "sqrt") and "rn" not in modifiers:
                wrong[f"{what}, which names no rounding"] += 1
            if name in ("fma", "mad") or not {"approx", "full", "ftz"}.isdisjoint(modifiers):
                # The library's code has no lines: it is on those that call it, or a function.
                is_library = function.startswith("__internal_") or sources.calls_library(place)
                if modifiers[-1] != "f64" or not is_library:
                    wrong[f"{what}, contracted or not exactly rounded"] += 1
    for name in ("add.rn.f32", "mul.rn.f32", "div.rn.f32", "sqrt.rn.f32"):
        if seen[name] == 0:
            wrong[f"PTX: no {name}"] += 1
    return listed(wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description="Check the CUDA engine without a GPU.")
    parser.add_argument("--root", type=Path, default=Path(__file__).parent.parent)
    sources = Sources(parser.parse_args().root.resolve())
    nvcc, nvdisasm = find_tool("nvcc"), find_tool("nvdisasm")
    print(f"cuda-check: {nvcc}\ncuda-check: {nvdisasm}", flush=True)
    findings: list[str] = []
    registers: dict[str, dict[Kernel, int]] = {}
    vectors: dict[str, dict[Kernel, Counter[str]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        start = time.monotonic()
        reports = compile_kernels(sources, nvcc, out)
        seconds = time.monotonic() - start
        if seconds > MAX_SECONDS:
            findings.append(f"nvcc took {seconds:.0f} s, more than {MAX_SECONDS} s")
        compile_around_kernels(sources, nvcc)
        for name, report in reports.items():
            registers[name], wrong = check_resources(sources, report)
            text = run([str(nvdisasm), "-c", "--print-line-info-inline", f"{out / name}.cubin"])
            vectors[name], more = check_accesses(sources, text.stdout, set(registers[name]))
            findings += [f"{name}, {finding}" for finding in wrong + more]
        findings += check_rounding(sources, (out / "kernels.ptx").read_text())
    rows: defaultdict[Kernel, str] = defaultdict(str)
    for name, used in registers.items():
        for kernel, counts in vectors[name].items():
            rows[kernel] += f"{used[kernel]:>3}, {counts['LDG']:>2} + {counts['STG']:<4}"
    print("registers, 16-byte loads + stores".rjust(71))
    print(" " * 38 + "".join(f"{name:<14}" for name in registers))
    for kernel, row in sorted(rows.items()):
        print(f"{kernel!s:<38}{row}")
    for finding in findings:
        print(f"cuda-check: {finding}")
    fine = "no spill, no local memory, vectors of 16 bytes, no contraction"
    verdict = f"{len(findings)} findings" if findings else fine
    summary = f"{len(rows)} kernels, {len(registers)} architectures, {seconds:.0f} s"
    print(f"cuda-check: {summary}: {verdict}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
