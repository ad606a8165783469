"""The loops of every rule, and those of norms, are vectorized."""

import platform
import re
import subprocess
from pathlib import Path

import pytest

from emerging_optimizers import _build

_TESTS = Path(__file__).parent
CSRC = _TESTS.parent / "csrc"
UNITS = CSRC / "units"


def vectorized_loops(unit: Path, folder: Path, loops: str = "element_loop") -> int:
    """Compile a unit; return how many vector loops those of a file become."""
    options = [*_build.COMPILE_ARGS["unix"], "-std=c++17", "-DEMOPT_ABI=0"]
    options += [f"-I{path}" for path in (CSRC, _TESTS / "cpp")]
    command = [_build.compiler(), *options, "-fopt-info-vec-optimized", "-c", str(unit)]
    command += ["-o", str(folder / f"{unit.stem}.o")]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return len(re.findall(rf"{loops}\.inl:\d+:\d+: optimized: loop vectorized", report))


def is_gcc() -> bool:
    command = [_build.compiler(), "-dM", "-E", "-x", "c++", "/dev/null"]
    macros = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return "__GNUC__" in macros and "__clang__" not in macros


@pytest.mark.slow
def test_every_rule_is_vectorized(tmp_path: Path) -> None:
    if not _build.has_compiler() or not is_gcc():
        pytest.skip("needs the reports of GCC")
    units = list(UNITS.glob("*.cpp"))
    counts = {unit.stem: vectorized_loops(unit, tmp_path) for unit in units}
    # Each rule has the loops of the smallest one; its flags add others.
    fewest = counts["lion"]
    assert fewest > 0
    wanted = {unit.stem: fewest * unit.read_text().count("EMOPT_RULE(") for unit in units}
    assert {name: count for name, count in counts.items() if count < wanted[name]} == {}


@pytest.mark.slow
def test_every_case_is_vectorized(tmp_path: Path) -> None:
    if not _build.has_compiler() or not is_gcc():
        pytest.skip("needs the reports of GCC")
    counts = {}
    for name in ("SignDescent", "PatientDescent"):
        unit = tmp_path / f"{name}.cpp"
        lines = [
            '#include "plugin_rules.h"',
            '#include "engine/rule_unit.h"',
            f"EMOPT_RULE({name})",
        ]
        unit.write_text("\n".join([*lines, ""]))
        counts[name] = vectorized_loops(unit, tmp_path)
    assert counts["PatientDescent"] >= 3 * counts["SignDescent"] > 0


@pytest.mark.slow
def test_norms_are_vectorized(tmp_path: Path) -> None:
    if not _build.has_compiler() or not is_gcc():
        pytest.skip("needs the reports of GCC")
    unit = CSRC / "engine" / "cpu" / "norm.cpp"
    # For each instruction set and dtype, two sums. Their largest element has other loops as well;
    # SSE2 has no comparison of 64-bit integers.
    fewest = 3 * 4 * 3 - 1 if platform.machine() == "x86_64" else 4 * 3
    assert vectorized_loops(unit, tmp_path, "norm_loop") >= fewest
