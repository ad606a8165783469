"""The values of tuning.h's constants that drive.py compares."""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SHIPPED = "shipped"


@dataclass
class Variant:
    """Values of tuning.h's constants, and their results.

    Attributes:
        name: Its name on the command line.
        macros: The macros that override tuning.h's defaults.
        expected: The expected effect.
        build: The compilation: its seconds and the kernels' registers, or the error.
        runs: The driver's figures by case, one dictionary per run.
        status: "not run", "measured", or an error.
    """

    name: str
    macros: dict[str, str]
    expected: str = ""
    build: dict[str, Any] = field(default_factory=dict)
    runs: list[dict[str, dict[str, Any]]] = field(default_factory=list)
    status: str = "not run"


def _variant(name: str, expected: str, **numbers: int) -> Variant:
    return Variant(name, {f"EMOPT_{k.upper()}": str(v) for k, v in numbers.items()}, expected)


# Sorted by the expected difference, largest first. With the shipped one they are 16, one per core.
# (blocks=6 leaves 40 registers, with which Adam spills.)
VARIANTS = (
    _variant("held8-blocks2", "half the warps: 0 to 5 % slower, more on 16-bit", held=8, blocks=2),
    _variant("held8-blocks3", "more in flight; 80 registers: spills a little", held=8, blocks=3),
    _variant("prefetch", "0 to 3 %", prefetch=1),
    _variant("prefetch-blocks3", "registers for the next tile", prefetch=1, blocks=3),
    _variant("prefetch-blocks2", "the same, with half the warps", prefetch=1, blocks=2),
    _variant("blocks3", "less in flight: slower where memory is not full", blocks=3),
    _variant("blocks2", "half in flight: slower", blocks=2),
    _variant("blocks5", "more warps for conversions; 48 registers", blocks=5),
    _variant("chunk2", "more starts of blocks: slower with numbers on the device", max_chunk=2),
    _variant("chunk4", "about the same", max_chunk=4),
    _variant("chunk16", "fewer starts of blocks, a longer tail", max_chunk=16),
    _variant("streaming", "1 to 2 % on large operands", streaming=1),
    _variant("streaming-chunk16", "both", streaming=1, max_chunk=16),
    _variant("streaming-prefetch-blocks3", "all", streaming=1, prefetch=1, blocks=3),
    _variant("held8-blocks2-chunk4", "a chunk as large as shipped", held=8, blocks=2, max_chunk=4),
)


def shipped_numbers(csrc: Path) -> dict[str, str]:
    """Return the macros of tuning.h with their defaults."""
    text = (csrc / "engine" / "cuda" / "tuning.h").read_text()
    return dict(re.findall(r"#ifndef (EMOPT_\w+)\n#define \1 (\w+)", text))


def select(csrc: Path, only: Sequence[str] | None, also: Sequence[str]) -> list[Variant]:
    """Return the shipped constants, and the variants that differ from all before them."""
    numbers = shipped_numbers(csrc)
    extra = []
    for text in also:
        name, _, macros = text.partition("=")
        extra.append(Variant(name, dict(m.partition("=")[::2] for m in macros.split(","))))
    named = [v for v in VARIANTS if only is None or v.name in only]
    shipped = " ".join(f"{name}={value}" for name, value in numbers.items())
    variants = [Variant(SHIPPED, {}, f"tuning.h: {shipped}")]
    seen = [numbers]
    for variant in [*named, *extra]:
        if numbers | variant.macros not in seen:
            seen.append(numbers | variant.macros)
            variants.append(copy.deepcopy(variant))
    return variants
