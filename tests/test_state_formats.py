"""The codes of ``benchmarks/compare_state_formats.py``, and its committed figures."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "state-formats.json"
LARGEST_NOISE = (0xFFFF << 4) + 8

every_code = pytest.mark.parametrize("code_name", ["E4M3", "E5M3"])


@pytest.fixture
def formats(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import compare_state_formats

    return compare_state_formats


def no_scale(values: Tensor) -> Tensor:
    return torch.full((*values.shape[:-1], 1), 127, dtype=torch.int32)


def bits(values: Tensor) -> Tensor:
    """The bits of numbers; those of NaN are unspecified."""
    return torch.where(values.isnan(), math.nan, values).view(torch.int32)


def test_e4m3_is_the_type_of_torch(formats: Any) -> None:
    codes = torch.arange(256)
    expected = codes.to(torch.uint8).view(torch.float8_e4m3fn).float()
    assert bits(formats.E4M3.decode(codes, no_scale(codes))).equal(bits(expected))
    # To nearest, ties aside, which go away from 0 here and to even there.
    torch.manual_seed(0)
    values = torch.randn(4096) * 2.0 ** torch.randint(-12, 8, (4096,))
    values.clamp_(-448, 448)
    mine = formats.E4M3.encode(values, no_scale(values), formats.HALF)
    assert mine.to(torch.uint8).equal(values.to(torch.float8_e4m3fn).view(torch.uint8))


def test_e5m3(formats: Any) -> None:
    numbers = [
        (1 + code % 8 / 8) * 2.0 ** (code // 8 - 15) if code >= 8 else code / 8 * 2.0**-14
        for code in range(255)
    ]
    assert formats.E5M3.values.tolist()[:-1] == numbers
    assert math.isnan(formats.E5M3.values[-1])


# With the next scale, the largest numbers are beyond float32.
@pytest.mark.parametrize(
    ("code_name", "scale"),
    [*((name, s) for name in ("E4M3", "E5M3") for s in (1, 2, 127, 238)), ("E4M3", 246)],
)
def test_every_code_is_encoded_as_itself(formats: Any, code_name: str, scale: int) -> None:
    code = getattr(formats, code_name)
    codes = torch.arange(256)
    values = code.decode(codes, torch.tensor([scale], dtype=torch.int32))
    assert values[values.isfinite()].unique().numel() == (253 if code.is_signed else 255)
    assert code.scale(values).item() == scale
    for noise in (8, formats.HALF, LARGEST_NOISE):
        again = code.encode(values, torch.tensor([scale], dtype=torch.int32), noise)
        assert again.tolist() == codes.tolist()


@every_code
def test_rounding_gives_one_of_the_neighbours(formats: Any, code_name: str) -> None:
    code = getattr(formats, code_name)
    torch.manual_seed(0)
    values = torch.randn(2000, 32).exp2().pow(6)
    scale = code.scale(values)
    down, up = (
        code.decode(code.encode(values, scale, noise), scale) for noise in (8, LARGEST_NOISE)
    )
    unit = 2.0 ** (scale - 127)
    # Numbers that 16 random bits cannot tell from the code below are not rounded up.
    missed = values.maximum(code.smallest_normal * unit) * 2.0**-20
    assert (up.isfinite() & (up >= values - missed)).all()
    is_normal = values >= code.smallest_normal * unit
    assert is_normal.any()
    assert not is_normal.all()
    assert ((up - values) / values)[is_normal].max() <= 1 / 8
    assert ((up - values) / unit)[~is_normal].max() <= code.smallest_normal / 8
    # At least code 1, so that an element that is not 0 has a second moment to divide by.
    smallest = 0.0 if code.is_signed else code.smallest_normal / 8
    assert (down <= values.maximum(smallest * unit)).all()
    assert (down >= smallest * unit).all()


@every_code
def test_mean_of_rounding(formats: Any, code_name: str) -> None:
    """With 16 random bits, the mean is the number itself, within one part in 2^17 of a step."""
    code = getattr(formats, code_name)
    noise = (torch.arange(1 << 16, dtype=torch.int32) << 4) + 8
    for value in (1.0, 1.0001, 1.3, 1.77, 1.874, 0.3 * code.smallest_normal):
        values = torch.full((1 << 16,), value)
        rounded = code.decode(code.encode(values, no_scale(values), noise), no_scale(values))
        step = max(2.0 ** math.floor(math.log2(value)), code.smallest_normal) / 8
        assert abs(rounded.double().mean().item() - values[0].item()) <= step * 2.0**-17


@every_code
@pytest.mark.parametrize("value", [0.0, 2.0**-149, 2.0**-126, 1.0, 1.75, 1.76, 3.4028235e38])
def test_the_largest_number_is_not_rounded_to_nan(
    formats: Any, code_name: str, value: float
) -> None:
    code = getattr(formats, code_name)
    values = torch.tensor([value, 0.0])
    scale = code.scale(values)
    assert 1 <= scale.item() <= 255
    for noise in (8, LARGEST_NOISE):
        assert code.encode(values, scale, noise)[0] < code.nan
    if scale.item() > 1:
        # 1.75 times the power of two, or times the one below that.
        assert code.encode(values, scale, 8)[0] >= code.nan - 9


@every_code
def test_numbers_that_are_not_finite(formats: Any, code_name: str) -> None:
    code = getattr(formats, code_name)
    values = torch.tensor([math.nan, math.inf, 1.0])
    scale = code.scale(values)
    assert scale.equal(code.scale(torch.tensor([1.0])))
    stored = code.decode(code.encode(values, scale, 8), scale)
    assert stored.isnan().tolist() == [True, True, False]
    assert stored[2] == 1


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
