"""Whatever lists the rules lists the registered ones: see docs/adding_a_rule.md.

Most lists are made from the registry. Those that are written by hand are compared with it here.
"""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from optimizers import MEGATRON, SETUPS
from oracle import ALL_RULES
from plugins import struct_of

import emerging_optimizers
from emerging_optimizers import ScalarOptimizer, megatron, scalar_optimizers
from emerging_optimizers._native import native
from emerging_optimizers.registry import get_optimizer_cls, get_optimizer_names

pytestmark = pytest.mark.builtin_rules("lists the built-in rules")

ROOT = Path(__file__).parent.parent
CLASSES = {
    cls.__name__: cls
    for cls in map(get_optimizer_cls, get_optimizer_names())
    if issubclass(cls, ScalarOptimizer) and cls.__module__.startswith(scalar_optimizers.__name__)
}
# The rules, by the stem of everything that belongs to them; and those with the rules that a class
# has besides, in the same files.
NAMES = {cls._rule.name for cls in CLASSES.values()}
BY_NAME = {r.name: r for cls in CLASSES.values() for r in (cls._rule, *cls._other_rules)}
ALL_NAMES = set(BY_NAME)
COMPILED = ALL_NAMES if native is None else set(native.rules)  # before any test loads others
FUNCTIONS = {f"calculate_{name}_update" for name in NAMES}
SHARED_HEADERS = {"all", "checks", "rule", "schedules", "traced"}


def _stems(pattern: str, suffix: str = "") -> set[str]:
    return {path.stem.removesuffix(suffix) for path in ROOT.glob(pattern)}


def _found(page: str, pattern: str) -> set[str]:
    return set(re.findall(pattern, (ROOT / page).read_text()))


def _classes_in(module: Any) -> set[str]:
    return {name for name in module.__all__ if hasattr(getattr(module, name), "_rule")}


def _functions_in(module: Any) -> set[str]:
    return {name for name in module.__all__ if inspect.isfunction(getattr(module, name))}


def _measured() -> set[str]:
    import problems

    return set(problems.RULES)


def _compared() -> set[str]:
    import build_bits

    return {name.split()[0] for name, _ in build_bits.all_cases()}


class Listing(NamedTuple):
    """A list of rules: what is in it, what should be, and what to add if something is missing."""

    find: Callable[[], set[str]]
    wanted: set[str]
    cure: str


_HEADERS = "csrc/rules/<stem>.h, the rule's struct"
_PUBLIC = "an import and an entry of __all__ in emerging_optimizers/scalar_optimizers/__init__.py"
_ORACLE = "a formula in tests/float64_rules.py and a row in the table of tests/oracle.py"
LISTINGS = {
    "modules": Listing(
        lambda: _stems("emerging_optimizers/scalar_optimizers/[!_]*.py") - {"base"},
        NAMES,
        "emerging_optimizers/scalar_optimizers/<stem>.py, with a class under @register_optimizer;"
        f" and {_PUBLIC}",
    ),
    "functions": Listing(lambda: _functions_in(scalar_optimizers), FUNCTIONS, _PUBLIC),
    "keyword-only functions": Listing(
        lambda: _functions_in(scalar_optimizers.update_functions),
        FUNCTIONS,
        "an import and an entry of __all__ in"
        " emerging_optimizers/scalar_optimizers/update_functions/__init__.py",
    ),
    "classes": Listing(lambda: _classes_in(scalar_optimizers), set(CLASSES), _PUBLIC),
    "top-level classes": Listing(lambda: _classes_in(emerging_optimizers), set(CLASSES), _PUBLIC),
    "classes for Megatron": Listing(
        lambda: {cls._rule.name for cls in MEGATRON.values()},
        NAMES,
        "a class in emerging_optimizers/megatron/optimizers.py",
    ),
    "headers": Listing(lambda: _stems("csrc/rules/*.h") - SHARED_HEADERS, NAMES, _HEADERS),
    "included headers": Listing(
        lambda: _found("csrc/rules/all.h", r'#include "(\w+)\.h"'),
        NAMES,
        "an #include in csrc/rules/all.h",
    ),
    "structs": Listing(
        lambda: _found("csrc/rules/all.h", r"APPLY\((\w+)\)"),
        {struct_of(name) for name in ALL_NAMES} - {None},
        "a line in EMOPT_FOR_EACH_RULE of csrc/rules/all.h",
    ),
    "units": Listing(lambda: _stems("csrc/units/*.cpp"), NAMES, "csrc/units/<stem>.cpp"),
    "CUDA units": Listing(
        lambda: _stems("csrc/units/*.cu", "_cuda"), NAMES, "csrc/units/<stem>_cuda.cu"
    ),
    "compiled rules": Listing(
        lambda: COMPILED,
        ALL_NAMES,
        "the compiled rule: build the extension again",
    ),
    "oracles": Listing(lambda: set(ALL_RULES), ALL_NAMES, _ORACLE),
    "tested classes": Listing(
        lambda: {setup.cls.__name__ for setup in SETUPS},
        set(CLASSES),
        "an Optimizer with the class's defaults in the rule's row in tests/oracle.py",
    ),
    "benchmarks": Listing(_measured, ALL_NAMES, "a rule that benchmarks/problems.py finds"),
    "comparison of builds": Listing(
        _compared,
        FUNCTIONS
        | {f"scalar_optimizers.{name}" for name in CLASSES}
        | {f"megatron.{name}" for name in megatron.optimizers.__all__},
        "values for its hyperparameters in benchmarks/build_bits.py",
    ),
    "README": Listing(
        lambda: _found("README.md", rf"\b({'|'.join(CLASSES)})\b"),
        set(CLASSES),
        "the class in README.md's table of rules",
    ),
}


@pytest.mark.parametrize("name", LISTINGS)
def test_list(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    find, wanted, cure = LISTINGS[name]
    found = find()
    assert not wanted - found, f"{name}: {sorted(wanted - found)} missing; add {cure}"
    assert not found - wanted, f"{name}: {sorted(found - wanted)} not registered; add a class"


@pytest.mark.parametrize("name", sorted(ALL_NAMES))
def test_row_of_the_oracle(name: str) -> None:
    """A row of the oracle's table describes the rule's function."""
    rule, row = BY_NAME[name], ALL_RULES[name]
    assert row.states == rule.states
    assert row.hyperparameters == rule.hyperparameter_names
    parameters = dict(inspect.signature(row.function).parameters)
    if not row.has_step and "step" in parameters:
        assert parameters.pop("step").default is None  # ignored
    assert list(parameters) == ["grad", *row.states, *row.hyperparameters, "out"]
    defaults = {n: p.default for n, p in parameters.items() if p.default is not p.empty}
    assert defaults == {**row.defaults, "out": None}
    for case in row.cases.values():
        assert set(row.complete(case)) == set(row.hyperparameters)
