"""What `cuda_check` reads from the sources of a checkout: kernels, lines, flags."""

import ast
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Lines with such a call contain the library's code, which contracts: warm-ups, once per launch.
LIBRARY_CALL = re.compile(r"::(log|pow)\(")


class Kernel(NamedTuple):
    """One instance of a kernel; those that are no rule's have a name, and perhaps a size.

    A kernel of a user's rule has no size: only one is compiled. The epilogue of the one that
    advances scalar states is "Advance".
    """

    rule: str
    epilogue: str = ""
    real: str = ""
    launch_bytes: int = 0
    needs_setup: bool = False
    has_codes: bool = False

    @property
    def is_users(self) -> bool:
        """Whether NVRTC compiles it, for a rule written in Python."""
        return self.epilogue != "" and self.launch_bytes == 0

    def __str__(self) -> str:
        setup = "codes" if self.has_codes else "setup" if self.needs_setup else ""
        parts = (self.rule, self.epilogue, self.real, self.launch_bytes or "", setup)
        return " ".join(str(part) for part in parts if part)


ADVANCE = Kernel("advance")
ADD_TENSORS = Kernel("add_tensors")
_REALS = {"f": "float32", "float": "float32", "d": "float64", "double": "float64"}
_SUMS = ("sum_blocks", "sum_tensors")


def kernel_of(symbol: str) -> Kernel | None:
    """Return the kernel with this mangled name, if it is one."""
    if re.search(r"7advanceE", symbol):
        return ADVANCE
    if re.search(r"11add_tensorsE", symbol):
        return ADD_TENSORS
    if norm := re.search(r"(sum_blocks|sum_tensors)I\w*10NormLaunchILm(\d+)E", symbol):
        return Kernel(norm[1], launch_bytes=int(norm[2]))
    pattern = r"emopt_(\w+?)_(\w+Update)_(float|double)_small(_setup)?(_codes)?$"
    if user := re.search(pattern, symbol):
        setup, codes = (user[i] is not None for i in (4, 5))
        return Kernel(user[1], user[2], _REALS[user[3]], 0, setup, codes)
    if user := re.search(r"emopt_(\w+)_Advance$", symbol):
        return Kernel(user[1], "Advance")
    pattern = r"LaunchINS_\d+(\w+?)ENS_\d+(\w+?)E([fd])Lm(\d+)ELb([01])EEELb([01])"
    found = re.search(pattern, symbol)
    if found is None:
        return None
    codes, setup = (found[i] == "1" for i in (5, 6))
    return Kernel(found[1], found[2], _REALS[found[3]], int(found[4]), setup, codes)


class Sources:
    """The kernels, source lines and compiler flags of a checkout."""

    def __init__(self, root: Path, rules: Sequence[str]) -> None:
        self.root = root
        self.places: dict[tuple[str, str], str] = {}
        self.csrc = root / "csrc"
        self.cuda = self.csrc / "engine" / "cuda"
        self.units = self.csrc / "units"
        self.stems = rules or sorted(p.stem[:-5] for p in self.units.glob("*_cuda.cu"))
        tuning = (self.cuda / "tuning.h").read_text()
        sizes = [int(n) for n in re.findall(r"k(?:Small|Large)Launch = (\d+)", tuning)]
        small, large = sizes
        self.epilogues = dict(
            re.findall(
                r"^struct (\w+) \{\n  static constexpr int kIndex = \d+;\n"
                r"  static constexpr int kOperands = (\d+);",
                (self.csrc / "engine" / "epilogue.h").read_text(),
                re.MULTILINE,
            )
        )
        # The operands of a row of each kernel: the update, the gradient, the states, and those that
        # the epilogue adds.
        self.operands: dict[Kernel, int] = {}
        self.num_codes: dict[Kernel, int] = {}  # of the states that may be stored as codes
        instances = (("float32", small), ("float32", large), ("float64", small))
        for stem in self.stems:
            pattern = (
                r"^struct (\w+)[ :\w]* \{.*?kStates\[\] = \{(.*?)\};"
                r"(?:\n  static constexpr StateCode kStateCodes\[\] = \{(.*?)\};)?"
            )
            text = (self.csrc / "rules" / f"{stem}.h").read_text()
            for rule, states, codes in re.findall(pattern, text, re.MULTILINE | re.DOTALL):
                for (name, added), instance, needs_setup in itertools.product(
                    self.epilogues.items(), instances, (False, True)
                ):
                    count = 2 + states.count('"') // 2 + int(added)
                    self.operands[Kernel(rule, name, *instance, needs_setup)] = count
                self._expect_codes(rule, states.count('"') // 2, codes.count("igned"), sizes)
        # The kernels of norms.
        self.norms = {Kernel(name, launch_bytes=n) for name in _SUMS for n in sizes} | {ADD_TENSORS}
        # Those that advance users' scalar states.
        self.advance_scalars: set[Kernel] = set()
        # The only places that access global memory: vectors of a tile, and the single elements next
        # to them. Found by the callers' lines, because nvcc misattributes some lines of vectors.h.
        chunk, held = "engine/cuda/chunk.h", "engine/cuda/held.h"
        self.vectors = self.lines_with(held, r"\.(load|store)_vectors\(")
        self.singles = self.lines_with(held, r"(load|store)_singles<")
        # The scales of groups: a byte for the threads of each.
        self.scales = self.lines_with(held, r"\*scale_at\(")
        self.loads_of_singles = self.function("engine/cuda/vectors.h", "load_singles")
        self.singles |= self.loads_of_singles
        self.singles |= self.function("engine/cuda/vectors.h", "store_singles")
        # Each counter and scalar, once per block, before its loop. NVRTC may merge reads of
        # scalars, which then have no caller.
        self.advance = self.function(chunk, "advance_counters")
        self.advance |= self.function(chunk, "advance_scalars")
        self.scalars = self.function("engine/cuda/setup.h", "read_scalar")
        self.scalars |= self.function("engine/host_or_device_scalar.h", "read")
        self.step = self.function(held, "step") | self.function(held, "store")
        # A norm's gradients, and the sums of blocks and tensors. nvcc gives some stores of a
        # sum the line of the last addition.
        self.grads = self.function("engine/cuda/norm_work.h", "sum_of_lane")
        self.sums = self.lines_with("engine/cuda/norm.cu", r"_sums\[.*;|\*all\.sum = |_shfl_")
        found = re.search(r"kNormLoads = (\d+)", tuning)
        self.norm_loads = int(found[1]) if found else 0

    def _expect_codes(self, rule: str, states: int, codes: int, sizes: Sequence[int]) -> None:
        """Expect the kernels of a rule's states that are stored as codes, if any may be."""
        for size in sizes if codes else ():
            kernel = Kernel(rule, "ApplyUpdate", "float32", size, True, True)
            self.operands[kernel] = 2 + states + int(self.epilogues["ApplyUpdate"])
            self.num_codes[kernel] = codes

    def add_user_rule(self, name: str, states: int, codes: int, has_scalars: bool) -> None:
        """Expect a user's rule, whose kernels NVRTC compiles."""
        self._expect_codes(name, states, codes, [0])
        if has_scalars:
            self.advance_scalars.add(Kernel(name, "Advance"))
        for (epilogue, added), real, needs_setup in itertools.product(
            self.epilogues.items(), ("float32", "float64"), (False, True)
        ):
            kernel = Kernel(name, epilogue, real, needs_setup=needs_setup)
            self.operands[kernel] = 2 + states + int(added)

    def may_access(self, instruction: str, places: list[str]) -> bool:
        """Whether this instruction may access a single element at these places."""
        if instruction not in ("LDG", "STG"):
            return False
        if not self.singles.isdisjoint(places) or not self.advance.isdisjoint(places):
            return True
        if not (self.sums | self.scales).isdisjoint(places):
            return True
        return instruction == "LDG" and not (self.scalars | self.grads).isdisjoint(places)

    def build_constant(self, name: str) -> Any:
        """Return a literal that _build.py assigns: the check compiles with the same flags."""
        for node in ast.parse((self.root / "emerging_optimizers" / "_build.py").read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
                return ast.literal_eval(node.value)
        raise LookupError(f"_build.py assigns no {name}")

    def place(self, file: str, line: str) -> str:
        """Name a line as "engine/cuda/chunk.h:89"."""
        if (file, line) not in self.places:  # a disassembly repeats few places many times
            self.places[file, line] = f"{os.path.relpath(file, self.csrc)}:{line}"
        return self.places[file, line]

    def calls_library(self, place: str) -> bool:
        """Whether a line calls a function of the CUDA math library."""
        file, line = place.split(":")
        text = (self.csrc / file).read_text().splitlines()[int(line) - 1]
        return LIBRARY_CALL.search(text) is not None

    def lines_with(self, file: str, pattern: str) -> set[str]:
        """Return the names of the lines that match a pattern."""
        lines = enumerate((self.csrc / file).read_text().splitlines(), start=1)
        result = {f"{file}:{i}" for i, line in lines if re.search(pattern, line)}
        if not result:
            raise LookupError(f"{file} has no {pattern}")
        return result

    def function(self, file: str, name: str) -> set[str]:
        """Return the names of a function's lines."""
        lines = (self.csrc / file).read_text().splitlines()
        starts = ((i, re.match(rf"( *)EMOPT_FN [\w ]+ {name}\(", x)) for i, x in enumerate(lines))
        start, found = next((i, found) for i, found in starts if found is not None)
        end = lines.index(found[1] + "}", start)
        return {f"{file}:{i + 1}" for i in range(start, end + 1)}
