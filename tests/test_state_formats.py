"""``benchmarks/compare_state_formats.py``: another library's codes, and the committed figures."""

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "state-formats.json"


@pytest.fixture
def formats(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import compare_state_formats

    return compare_state_formats


def test_dynamic_map(formats: Any) -> None:
    """The map's properties that its paper gives."""
    for is_signed in (False, True):
        numbers = formats.create_dynamic_map(is_signed)
        assert numbers.unique().numel() == 256
        assert numbers[-1] == 1
        assert (numbers < 0).sum() == (127 if is_signed else 0)
        above = numbers[numbers > 0]
        assert 1e-7 < above[0] < 1e-6
        in_decades = [((above > 10.0**-k) & (above < 10.0 ** (1 - k))).sum() for k in range(1, 8)]
        assert in_decades == [
            2**k for k in range(6 if is_signed else 7, -1 if is_signed else 0, -1)
        ]


def test_documented_figures(formats: Any) -> None:
    result = json.loads(RESULT.read_text())
    figures = [formats.Figure(**figure) for figure in result["figures"]]
    page = (ROOT / "docs" / "numerics.md").read_text()
    for beta2 in (0.99, 0.999):
        assert formats.table(figures, beta2) in page
    targets = [formats.Verdict(**target) for target in result["targets"]]
    assert targets == formats.verdicts(figures)
    assert len(targets) == 2 * len(formats.LIMITS)
    assert all(target.met for target in targets)
