"""Checks the CUDA engine without a GPU: `make cuda-check`.

Compiles the kernels for several architectures, and fails where

- nvcc has a warning, or the sources around the kernels do not compile;
- a kernel spills registers, has local memory, or uses more registers than its budget;
- operands are accessed elsewhere than in vectors.h, or its vectors are not as wide as they can be,
  so that warps would read or write less than whole sectors;
- a load of a tile's vectors stands behind the first square root, division or store, where it would
  wait for them, or a single element is widened where it is loaded;
- the loop has more instructions than its budget;
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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils import cpp_extension

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
MAX_SECONDS = 300  # of nvcc, for all architectures together
# Registers of a thread: 65536 are shared by blocks of 256 threads, and handed out in eights. By the
# arithmetic type, whether a block computes the constants (which then take registers), and whether a
# row has six operands (AdEMAMix's, with a weight).
REGISTERS = {
    ("float32", False, False): 64,  # four blocks on a multiprocessor
    ("float32", False, True): 80,  # three: a thread has a fourth more in flight, and 64 spill
    ("float32", True, False): 80,  # three: 14 constants more, and 64 spill
    ("float32", True, True): 128,  # two
    ("float64", False, False): 128,  # two: values take twice the registers
    ("float64", False, True): 136,  # one, which could have 255
    ("float64", True, False): 168,  # one
    ("float64", True, True): 192,  # one
}
ADVANCE_REGISTERS = 32
# Instructions of the loop for each operand of a row, over all dtypes: 10 % more than any has.
# A block that computes the constants has a loop for each value of a rule's flags.
INSTRUCTIONS = {
    ("StoreUpdate", "float32", False): 210,
    ("StoreUpdate", "float32", True): 245,
    ("ApplyUpdate", "float32", False): 245,
    ("ApplyUpdate", "float32", True): 345,
    ("StoreUpdate", "float64", False): 430,
    ("StoreUpdate", "float64", True): 465,
    ("ApplyUpdate", "float64", False): 425,
    ("ApplyUpdate", "float64", True): 550,
}
# Lines that call these hold their code, which contracts: warm-up schedules, once per launch.
LIBRARY_CALL = re.compile(r"::(log|pow)\(")


class Kernel(NamedTuple):
    """One instance of a kernel; the one that advances counters has no more than its name."""

    rule: str
    epilogue: str = ""
    real: str = ""
    launch_bytes: int = 0
    needs_setup: bool = False

    def __str__(self) -> str:
        setup = "setup" if self.needs_setup else ""
        parts = (self.rule, self.epilogue, self.real, self.launch_bytes or "", setup)
        return " ".join(str(part) for part in parts if part)


ADVANCE = Kernel("advance")


def kernel_of(symbol: str) -> Kernel | None:
    if re.search(r"7advanceE", symbol):
        return ADVANCE
    found = re.search(r"LaunchINS_\d+(\w+?)ENS_\d+(\w+?)E([fd])Lm(\d+)EEELb([01])", symbol)
    if found is None:
        return None
    real = {"f": "float32", "d": "float64"}[found[3]]
    return Kernel(found[1], found[2], real, int(found[4]), found[5] == "1")


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

    def __init__(self, root: Path, rules: Sequence[str]) -> None:
        self.root = root
        self.places: dict[tuple[str, str], str] = {}
        self.csrc = root / "csrc"
        self.cuda = self.csrc / "engine" / "cuda"
        self.units = self.csrc / "units"
        self.stems = rules or sorted(p.stem[:-5] for p in self.units.glob("*_cuda.cu"))
        tuning = (self.cuda / "tuning.h").read_text()
        sizes = (int(n) for n in re.findall(r"k(?:Small|Large)Launch = (\d+)", tuning))
        small, large = sizes
        epilogues = dict(
            re.findall(
                r"^struct (\w+) \{\n  static constexpr int kIndex = \d+;\n"
                r"  static constexpr int kOperands = (\d+);",
                (self.csrc / "engine" / "epilogue.h").read_text(),
                re.MULTILINE,
            )
        )
        # Of each kernel, the operands of a row: the update, the gradient, the states, and what the
        # epilogue adds.
        self.operands = {}
        instances = (("float32", small), ("float32", large), ("float64", small))
        for stem in self.stems:
            pattern = r"^struct (\w+) \{.*?kStates\[\] = \{(.*?)\}"
            text = (self.csrc / "rules" / f"{stem}.h").read_text()
            for rule, states in re.findall(pattern, text, re.MULTILINE | re.DOTALL):
                for (name, own), instance, needs_setup in itertools.product(
                    epilogues.items(), instances, (False, True)
                ):
                    count = 2 + states.count('"') // 2 + int(own)
                    self.operands[Kernel(rule, name, *instance, needs_setup)] = count
        # The only places that access global memory: vectors of a tile, and single elements beside
        # them; by the callers' lines, since nvcc mistakes the file of some of those in vectors.h.
        chunk = "engine/cuda/chunk.h"
        self.vectors = self.lines_with(chunk, r"\.(load|store)_vectors\(")
        self.singles = self.lines_with(chunk, r"\.(load|store)_singles\(")
        self.loads_of_singles = self.function("engine/cuda/vectors.h", "load_singles")
        self.singles |= self.loads_of_singles
        # Each counter, and scalars, once for a block before it sweeps.
        self.advance = self.function(chunk, "advance_counters")
        self.scalars = self.function(chunk, "read_scalar")
        self.step = self.function(chunk, "step_and_store")

    def may_access(self, instruction: str, places: list[str]) -> bool:
        """Whether a single element may be accessed there."""
        if instruction not in ("LDG", "STG"):
            return False
        if not self.singles.isdisjoint(places) or not self.advance.isdisjoint(places):
            return True
        return instruction == "LDG" and not self.scalars.isdisjoint(places)

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

    def lines_with(self, file: str, pattern: str) -> set[str]:
        """Return the lines in which something is, by their names."""
        lines = enumerate((self.csrc / file).read_text().splitlines(), start=1)
        result = {f"{file}:{i}" for i, line in lines if re.search(pattern, line)}
        if not result:
            raise LookupError(f"{file} has no {pattern}")
        return result

    def function(self, file: str, name: str) -> set[str]:
        """Return the lines of a function, by their names."""
        lines = (self.csrc / file).read_text().splitlines()
        starts = ((i, re.match(rf"( *)EMOPT_FN [\w ]+ {name}\(", x)) for i, x in enumerate(lines))
        start, found = next((i, found) for i, found in starts if found is not None)
        end = lines.index(found[1] + "}", start)
        return {f"{file}:{i + 1}" for i in range(start, end + 1)}


class Compiled(NamedTuple):
    """Units as an architecture has them: ptxas' reports, and where the cubins are."""

    reports: list[str]
    cubins: list[Path]


def compile_kernels(
    sources: Sources, nvcc: Path, out: Path, architectures: Sequence[str]
) -> tuple[dict[str, Compiled], str]:
    """Compile all units to cubins for each architecture; return them, and the PTX."""
    flags = [flag for flag in sources.build_constant("NVCC_ARGS") if "--threads" not in flag]
    flags += [*cpp_extension.COMMON_NVCC_FLAGS, "-lineinfo", "-Xptxas", "-v"]
    base = [str(nvcc), *flags, "-Werror", "all-warnings"]
    units = [sources.units / f"{stem}_cuda.cu" for stem in sources.stems]
    units.append(sources.cuda / "advance.cu")
    cubins = {a: [out / f"{unit.stem}.{a}.cubin" for unit in units] for a in architectures}
    commands = []
    for architecture, of_all in cubins.items():
        # By the oldest standard that a supported torch asks for; for the newest chip, whose PTX is
        # kept, by the newest one.
        is_newest = architecture == architectures[-1]
        kept = ["-std=c++20", "--keep", "--keep-dir", str(out)] if is_newest else ["-std=c++17"]
        for unit, cubin in zip(units, of_all, strict=True):
            more = [*kept, "-cubin", f"-arch={architecture}", "-o", str(cubin), str(unit)]
            commands.append([*base, *more])
    reports = iter(compile_all(commands))
    compiled = {
        a: Compiled(list(itertools.islice(reports, len(units))), cubins[a]) for a in architectures
    }
    return compiled, "".join((out / f"{unit.stem}.ptx").read_text() for unit in units)


def compile_around_kernels(sources: Sources, nvcc: Path) -> None:
    """Compile all that is no kernel, without code: a torch without CUDA has the headers."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    includes = [*cpp_extension.include_paths(), str(nvcc.parent.parent / "include")]
    flags = [*sources.build_constant("COMPILE_ARGS")["unix"], "-std=c++20", "-fsyntax-only"]
    flags += ["-DEMOPT_CUDA=1", "-DTORCH_EXTENSION_NAME=_C", "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE"]
    for folder in [*includes, sysconfig.get_path("include")]:
        flags += ["-isystem", folder]
    patterns = ("bindings/*.cpp", "engine/cpu/*.cpp", "engine/cuda/*.cpp", "units/*.cpp")
    units = [unit for pattern in patterns for unit in sorted(sources.csrc.glob(pattern))]
    compile_all([[*compiler, *flags, str(unit)] for unit in units])


def budget(sources: Sources, kernel: Kernel) -> int:
    if kernel == ADVANCE:
        return ADVANCE_REGISTERS
    has_six = sources.operands.get(kernel, 0) > 5
    return REGISTERS[kernel.real, kernel.needs_setup, has_six]


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


class Instruction(NamedTuple):
    """An instruction of a kernel.

    Attributes:
        name: "LDG", say.
        modifiers: What follows the name, "E" and "128", say.
        operands: What it works on.
        places: Where it comes from, innermost first.
    """

    name: str
    modifiers: list[str]
    operands: str
    places: list[str]

    def is_in(self, places: set[str]) -> bool:
        return not places.isdisjoint(self.places)


class Code(NamedTuple):
    """A kernel's instructions, and where its labels stand among them."""

    instructions: list[Instruction]
    labels: dict[str, int]


def read_disassembly(sources: Sources, disassembly: str) -> dict[Kernel, Code]:
    kernels: dict[Kernel, Code] = {}
    code: Code | None = None
    places: list[str] = []
    caller: tuple[str, str] | None = None  # of the last frame
    for line in disassembly.splitlines():
        if found := re.match(r"\s*//## File (.*)", line):
            # One line for each frame; they stand for all instructions up to the next such lines.
            frame, *callers = re.findall(r'"([^"]*)", line (\d+)', found[1])
            places = (
                [*places, sources.place(*frame)] if frame == caller else [sources.place(*frame)]
            )
            caller = callers[0] if callers else None
        elif found := re.match(r"\s*\.section\s+\.text\.(\w+)", line):
            kernel = kernel_of(found[1])
            code = kernels.setdefault(kernel, Code([], {})) if kernel is not None else None
            places = []
        elif code is not None and (found := re.match(r"(\.L_x_\d+):", line)):
            code.labels[found[1]] = len(code.instructions)
        elif code is not None and (
            found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)(.*)", line)
        ):
            name, *modifiers = found[1].split(".")
            code.instructions.append(Instruction(name, modifiers, found[2], places))
    return kernels


def check_accesses(sources: Sources, kernel: Kernel, code: Code) -> Counter[str]:
    """Find accesses to memory by anything but vectors that fill sectors, and the known others."""
    wrong: Counter[str] = Counter()
    for one in code.instructions:
        what = ".".join([one.name, *one.modifiers])
        if one.name in ("LDL", "STL"):
            wrong[f"{what}, local memory"] += 1
        # Without a letter for the memory (LD, ST) they may be of any.
        if not re.fullmatch(r"(LD|ST|ATOM|RED)G?|LDGSTS", one.name):
            continue
        what += f" of {' in '.join(one.places[:2]) or 'no line'}"
        if one.is_in(sources.vectors):
            # Of a 2-byte type, 64 bits are all that a thread holds; what follows 8 bytes after
            # another was cut in two, and takes half of each sector.
            is_half = "64" in one.modifiers and re.search(r"\+0x[0-9a-f]*8\]", one.operands)
            if is_half or not {"64", "128"} & set(one.modifiers):
                wrong[f"{what}, less than a vector"] += 1
        elif not sources.may_access(one.name, one.places):
            wrong[f"{what}, outside of the few places for single elements"] += 1
    return wrong


def check_order(sources: Sources, kernel: Kernel, code: Code) -> Counter[str]:
    """Find loads of a tile that stand behind what has to wait for others."""
    wrong: Counter[str] = Counter()
    runs: list[int] = []  # of loads with nothing between them
    is_run = False
    for one in code.instructions:
        if one.name == "LDG" and one.is_in(sources.vectors):
            runs = [*runs[:-1], runs[-1] + 1] if is_run else [*runs, 1]
            is_run = True
        elif one.name == "STG" or (one.name == "MUFU" and one.is_in(sources.step)):
            is_run = False
    # Of each operand that is read, by the size of its type; and the parameters of split masters.
    operands = sources.operands[kernel] - 1
    may_be_split = kernel.epilogue == "ApplyUpdate" and kernel.real == "float32"
    wanted = operands * (2 if kernel.real == "float32" else 4) + may_be_split
    if not runs or any(run != wanted for run in runs):
        wrong[f"{runs} loads of vectors in a row, not {wanted}: some wait for a result"] += 1
    for one in code.instructions:
        if re.search(r"\b0xffff\b", one.operands) and one.is_in(sources.loads_of_singles):
            wrong[f"{one.name} of {' in '.join(one.places[:2])}: waits for a single element"] += 1
    stores = sum(one.name == "STG" and one.is_in(sources.vectors) for one in code.instructions)
    if stores < operands:
        wrong[f"{stores} stores of vectors, fewer than {operands}"] += 1
    return wrong


def loop_length(sources: Sources, code: Code) -> int:
    """Return the number of instructions of the loop over tiles, 0 if there is none.

    That is the longest way back over a store.
    """
    longest = 0
    for i, one in enumerate(code.instructions):
        target = re.search(r"\.L_x_\d+", one.operands) if one.name == "BRA" else None
        begin = code.labels.get(target[0], i) if target else i
        body = code.instructions[begin : i + 1]
        if len(body) > longest and any(b.name == "STG" and b.is_in(sources.step) for b in body):
            longest = len(body)
    return longest


def check_code(sources: Sources, disassembly: str) -> tuple[dict[Kernel, int], list[str]]:
    """Read a disassembly; return the length of each kernel's loop, and what is wrong."""
    lengths: dict[Kernel, int] = {}
    findings = []
    for kernel, code in read_disassembly(sources, disassembly).items():
        wrong = check_accesses(sources, kernel, code)
        lengths[kernel] = loop_length(sources, code)
        if kernel in sources.operands:
            wrong += check_order(sources, kernel, code)
            allowed = INSTRUCTIONS[kernel.epilogue, kernel.real, kernel.needs_setup]
            allowed *= sources.operands[kernel]
            if not 0 < lengths[kernel] <= allowed:
                wrong[f"{lengths[kernel]} instructions in the loop, more than {allowed}"] += 1
        findings += [f"{kernel}: {finding}" for finding in listed(wrong)]
    return lengths, findings


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
        if seen[name] == 0 and "adam" in sources.stems:
            wrong[f"PTX: no {name}"] += 1
    return listed(wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description="Check the CUDA engine without a GPU.")
    parser.add_argument("--root", type=Path, default=Path(__file__).parent.parent)
    parser.add_argument("--rules", nargs="+", default=[], help="stems; without it, all")
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
        if not arguments.rules:
            compile_around_kernels(sources, nvcc)
        for name, (reports, cubins) in compiled.items():
            registers, wrong = check_resources(sources, "".join(reports))
            lengths: dict[Kernel, int] = {}
            shown = [[str(nvdisasm), "-c", "--print-line-info-inline", str(c)] for c in cubins]
            with ThreadPoolExecutor(2) as pool:
                texts = list(pool.map(run, shown))
            for text in texts:
                of_unit, more = check_code(sources, text.stdout)
                lengths |= of_unit
                wrong += more
            findings += [f"{name}, {finding}" for finding in wrong]
            for kernel, used in registers.items():
                rows[kernel] += f"{used:>3}, {lengths.get(kernel, 0):<9}"
        findings += check_rounding(sources, ptx)
    print("registers, instructions of the loop".rjust(87))
    print(" " * 52 + "".join(f"{name:<14}" for name in compiled))
    for kernel, row in sorted(rows.items()):
        print(f"{kernel!s:<52}{row}")
    for finding in findings:
        print(f"cuda-check: {finding}")
    fine = "no spill, no local memory, vectors fill sectors, loads first, no contraction"
    verdict = f"{len(findings)} findings" if findings else fine
    summary = f"{len(rows)} kernels, {len(compiled)} architectures, {seconds:.0f} s"
    print(f"cuda-check: {summary}: {verdict}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
