"""Checks the output of the CUDA compilers: ptxas' report, the disassembly and the PTX."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from cuda_sources import ADVANCE, Kernel, Sources, kernel_of

# Registers per thread. A multiprocessor has 65536 for its blocks of 256 threads, and allocates them
# in eights. The keys: the arithmetic type, whether a block computes the constants (which then take
# registers), and whether a row has six operands (AdEMAMix's, with a weight).
REGISTERS = {
    ("float32", False, False): 64,  # four blocks on a multiprocessor
    ("float32", False, True): 80,  # three: a thread has a fourth more in flight, and spills with 64
    ("float32", True, False): 80,  # three: 14 more constants, and it spills with 64
    ("float32", True, True): 128,  # two
    ("float64", False, False): 128,  # two: values take twice the registers
    ("float64", False, True): 136,  # one, which could have 255
    ("float64", True, False): 168,  # one
    ("float64", True, True): 192,  # one
}
SPILLED_WITH_CODES = 8  # bytes; less harm than a block less on a multiprocessor
ADVANCE_REGISTERS = 32
ADVANCE_SCALARS_REGISTERS = 64  # a rule's own arithmetic, in float64, perhaps with powers
NORM_REGISTERS = 40  # six blocks
# Instructions of the loop per operand of a row, over all dtypes: 10 % above the largest measured.
# A block that computes the constants has one loop for each value of a rule's flags.
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
INSTRUCTIONS_WITH_CODES = 590
INSTRUCTIONS_OF_USERS = 1.1  # times as many for rules written in Python, which may be longer
# A floating-point operation in PTX.
_OPERATION = re.compile(r"\s*(?:@!?%\w+\s+)?([a-z]\w*(?:\.\w+)*\.f(?:16|32|64)\w*)\s")


def listed(findings: Counter[str]) -> list[str]:
    """Return each finding once, with how often it occurs."""
    return [what if n == 1 else f"{what} ({n} times)" for what, n in findings.items()]


def budget(sources: Sources, kernel: Kernel) -> int:
    """Return how many registers a kernel may use."""
    if kernel == ADVANCE:
        return ADVANCE_REGISTERS
    if kernel in sources.advance_scalars:
        return ADVANCE_SCALARS_REGISTERS
    if kernel in sources.norms:
        return NORM_REGISTERS
    has_six = sources.operands.get(kernel, 0) > 5
    return REGISTERS[kernel.real, kernel.needs_setup, has_six]


def spilled(kernel: Kernel | None) -> int:
    """Return how many bytes of registers a kernel may spill."""
    return SPILLED_WITH_CODES if kernel and kernel.has_codes else 0


def check_resources(sources: Sources, report: str) -> tuple[dict[Kernel, int], list[str]]:
    """Read ptxas' report; return each kernel's registers, and the findings."""
    registers: dict[Kernel, int] = {}
    findings = []
    function = ""
    for line in report.splitlines():
        if found := re.search(r"(?:entry function|Function properties for) '?(\w+)", line):
            function = found[1]
        kernel = kernel_of(function)
        if "bytes stack frame" in line and any(
            int(n) > spilled(kernel) for n in re.findall(r"\d+", line)
        ):
            findings.append(f"{kernel or function}: {line.strip()}")
        if kernel is not None and (found := re.search(r"Used (\d+) registers", line)):
            registers[kernel] = int(found[1])
    for kernel, used in registers.items():
        allowed = budget(sources, kernel)
        if used > allowed:
            findings.append(f"{kernel}: {used} registers, more than {allowed}")
    wanted = {*sources.operands, *sources.norms, *sources.advance_scalars, ADVANCE}
    findings += [f"{kernel}: no such kernel" for kernel in sorted(wanted - registers.keys())]
    findings += [f"{kernel}: not expected" for kernel in sorted(registers.keys() - wanted)]
    return registers, findings


class Instruction(NamedTuple):
    """An instruction of a kernel's code.

    Attributes:
        name: Such as "LDG".
        modifiers: What follows the name, such as "E" and "128".
        operands: The text of its operands.
        places: Its source lines, from the innermost inlined function outwards.
    """

    name: str
    modifiers: list[str]
    operands: str
    places: list[str]

    def is_in(self, places: set[str]) -> bool:
        """Whether one of its source lines is among these places."""
        return not places.isdisjoint(self.places)


class Code(NamedTuple):
    """A kernel's instructions, and the position of each label among them."""

    instructions: list[Instruction]
    labels: dict[str, int]


def read_disassembly(sources: Sources, disassembly: str) -> dict[Kernel, Code]:
    """Return the code of each kernel in nvdisasm's output."""
    kernels: dict[Kernel, Code] = {}
    code: Code | None = None
    places: list[str] = []
    caller: tuple[str, str] | None = None  # of the previous frame
    for line in disassembly.splitlines():
        if found := re.match(r"\s*//## File (.*)", line):
            # One line per frame; they apply to all instructions up to the next such lines.
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


def is_vector_of_codes(kernel: Kernel, one: Instruction) -> bool:
    """Whether an access may be to the four bytes of a thread, and is not half of a vector."""
    is_word = one.modifiers == ["E"]
    return kernel.has_codes and is_word and not re.search(r"\+0x[0-9a-f]*4\]", one.operands)


def check_accesses(sources: Sources, kernel: Kernel, code: Code) -> Counter[str]:
    """Find memory accesses other than vectors that fill sectors and the few known exceptions."""
    wrong: Counter[str] = Counter()
    for one in code.instructions:
        what = ".".join([one.name, *one.modifiers])
        if one.name in ("LDL", "STL") and spilled(kernel) == 0:
            wrong[f"{what}, local memory"] += 1
        # Without a letter for the memory space (LD, ST), it may be any.
        if not re.fullmatch(r"(LD|ST|ATOM|RED)G?|LDGSTS", one.name):
            continue
        what += f" of {' in '.join(one.places[:2]) or 'no line'}"
        if one.is_in(sources.vectors):
            # Of a 2-byte type, a thread holds 64 bits in all. An access 8 bytes after another one
            # is a vector that was split in two, and covers half of each sector.
            is_half = "64" in one.modifiers and re.search(r"\+0x[0-9a-f]*8\]", one.operands)
            if is_half or not (
                {"64", "128"} & set(one.modifiers) or is_vector_of_codes(kernel, one)
            ):
                wrong[f"{what}, less than a vector"] += 1
        elif not sources.may_access(one.name, one.places):
            wrong[f"{what}, outside of the few places for single elements"] += 1
    return wrong


def check_order(sources: Sources, kernel: Kernel, code: Code) -> Counter[str]:
    """Find loads of a tile that come after an instruction that waits for other loads."""
    wrong: Counter[str] = Counter()
    runs: list[int] = []  # lengths of uninterrupted runs of loads
    is_run = False
    for one in code.instructions:
        if one.name == "LDG" and one.is_in(sources.vectors):
            runs = [*runs[:-1], runs[-1] + 1] if is_run else [*runs, 1]
            is_run = True
        elif one.name == "STG" or (one.name == "MUFU" and one.is_in(sources.step)):
            is_run = False
    # One for each type size of each operand that is read, also of codes, and one for parameters of
    # split masters.
    operands = sources.operands[kernel] - 1
    may_be_split = kernel.epilogue == "ApplyUpdate" and kernel.real == "float32"
    wanted = operands * (2 if kernel.real == "float32" else 4) + may_be_split
    wanted += sources.num_codes.get(kernel, 0)
    if not runs or any(run != wanted for run in runs):
        wrong[f"{runs} loads of vectors in a row, not {wanted}: some wait for a result"] += 1
    for one in code.instructions:
        if re.search(r"\b0xffff\b", one.operands) and one.is_in(sources.loads_of_singles):
            wrong[f"{one.name} of {' in '.join(one.places[:2])}: waits for a single element"] += 1
    stores = sum(one.name == "STG" and one.is_in(sources.vectors) for one in code.instructions)
    if stores < operands:
        wrong[f"{stores} stores of vectors, fewer than {operands}"] += 1
    return wrong


def check_sums(sources: Sources, code: Code) -> Counter[str]:
    """Find loads of a norm that come after an addition, and so wait for other loads."""
    runs: list[int] = []
    is_run = False
    for one in code.instructions:
        if one.name == "LDG" and one.is_in(sources.grads):
            runs = [*runs[:-1], runs[-1] + 1] if is_run else [*runs, 1]
            is_run = True
        elif one.name in ("DADD", "DMUL", "DSETP"):  # ptxas may convert one before the last load
            is_run = False
    wanted = sources.norm_loads
    if runs and all(run == wanted for run in runs):
        return Counter()
    return Counter({f"{runs} loads in a row, not {wanted}: some wait for a result": 1})


def loop_length(sources: Sources, code: Code) -> int:
    """Return the number of instructions in the loop over tiles, 0 if there is none.

    That is the longest backward branch over a store.
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
    """Read a disassembly; return the length of each kernel's loop, and the findings."""
    lengths: dict[Kernel, int] = {}
    findings = []
    for kernel, code in read_disassembly(sources, disassembly).items():
        wrong = check_accesses(sources, kernel, code)
        lengths[kernel] = loop_length(sources, code)
        if kernel.rule in ("sum_blocks", "sum_tensors"):
            wrong += check_sums(sources, code)
        if kernel in sources.operands:
            wrong += check_order(sources, kernel, code)
            per_operand = INSTRUCTIONS[kernel.epilogue, kernel.real, kernel.needs_setup]
            if kernel.has_codes:
                per_operand = INSTRUCTIONS_WITH_CODES
            if kernel.is_users:
                per_operand = int(per_operand * INSTRUCTIONS_OF_USERS)
            allowed = per_operand * sources.operands[kernel]
            if not 0 < lengths[kernel] <= allowed:
                wrong[f"{lengths[kernel]} instructions in the loop, more than {allowed}"] += 1
        findings += [f"{kernel}: {finding}" for finding in listed(wrong)]
    return lengths, findings


def check_rounding(sources: Sources, programs: Iterable[str]) -> list[str]:
    """Read PTX: ptxas may contract every operation that does not name its rounding."""
    wrong: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    for ptx in programs:
        files = dict(re.findall(r'\.file\s+(\d+)\s+"(.*)"', ptx))
        function = place = ""
        for line in ptx.splitlines():
            if found := re.search(r"\.(?:entry|func).* (\w+)\($", line):
                function = found[1]
            elif found := re.match(r"\s*\.loc\s+(\d+) (\d+)", line):
                place = sources.place(files[found[1]], found[2])
            elif found := _OPERATION.match(line):
                seen[found[1]] += 1
                for fault in _rounding_faults(sources, found[1], function, place):
                    where = kernel_of(function) or function
                    wrong[f"PTX, {where}: {found[1]} of {place}, {fault}"] += 1
    for name in ("add.rn.f32", "mul.rn.f32", "div.rn.f32", "sqrt.rn.f32"):
        if seen[name] == 0 and "adam" in sources.stems:
            wrong[f"PTX: no {name}"] += 1
    return listed(wrong)


def _rounding_faults(sources: Sources, operation: str, function: str, place: str) -> Iterator[str]:
    name, *modifiers = operation.split(".")
    if name in ("add", "sub", "mul", "div", "sqrt") and "rn" not in modifiers:
        yield "which names no rounding"
    if name in ("fma", "mad") or not {"approx", "full", "ftz"}.isdisjoint(modifiers):
        # The math library has no line numbers: it is a function, or on its caller's line.
        is_library = function.startswith("__internal_") or sources.calls_library(place)
        if modifiers[-1] != "f64" or not is_library:
            yield "contracted or not exactly rounded"
