"""``benchmarks/compare_peer_states.py``: the committed figures, and the table that quotes them."""

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
RESULT = json.loads((ROOT / "benchmarks" / "results" / "peer-states.json").read_text())
VALUES: dict[tuple[str, str], Any] = {
    (figure["peer"], figure["what"]): figure["value"] for figure in RESULT["figures"]
}
OURS = "this package"
BITSANDBYTES = "bitsandbytes AdamW8bit"
TORCHAO = ("torchao AdamW8bit", "torchao AdamWFp8")


def row(title: str) -> list[str]:
    """Return the cells of this package, bitsandbytes and torchao."""
    page = (ROOT / "docs" / "mixed_precision.md").read_text()
    (line,) = [line for line in page.splitlines() if line.startswith(f"| {title} |")]
    return line.split(" | ")[1:4]


def test_versions() -> None:
    page = (ROOT / "docs" / "mixed_precision.md").read_text()
    for package in ("bitsandbytes", "torchao"):
        assert f"{package} {RESULT['run'][package]}" in page


def test_bytes() -> None:
    cells = row("bytes per element, both states of Adam")
    for cell, peer in zip(cells, (OURS, BITSANDBYTES, TORCHAO[0]), strict=True):
        assert cell.startswith(f"{VALUES[peer, 'bytes']:.2f}*")
    assert f"{VALUES[TORCHAO[1], 'bytes']:.2f}*" in cells[2]


def test_second_moments() -> None:
    ours, bitsandbytes, torchao = row("second moments that become 0")
    assert VALUES[OURS, "zero below"] is None
    assert ours == "none above 0"
    assert VALUES[BITSANDBYTES, "zero below"] is None
    assert f"1/{1 / VALUES[BITSANDBYTES, 'smallest']:,.0f}" in bitsandbytes
    for peer in TORCHAO:
        part = 1 / VALUES[peer, "zero below"]
        assert f"below 1/{float(f'{part:.2g}'):,.0f}" in torchao


@pytest.mark.parametrize("what", ["two processes", "resharded"])
def test_processes(what: str) -> None:
    for rows in (96, 100):
        assert VALUES[OURS, f"{what}, {rows} rows"] == "the same bits"
    for peer in TORCHAO:
        assert VALUES[peer, f"{what}, 96 rows"] == "the same bits"
        other = VALUES[peer, f"{what}, 100 rows"]
        assert other.startswith("differs" if what == "two processes" else "ValueError: Invalid")
    assert VALUES[BITSANDBYTES, "two processes, 96 rows"].startswith("RuntimeError")
