"""The 8-bit codes of states against their definition, in float64."""

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from emerging_optimizers._codes import (
    E4M3,
    GROUP,
    UE5M3,
    Code,
    code_noise,
    code_of,
    code_seed,
    decode,
    encode,
    scale_shape,
)
from emerging_optimizers._rounding import rounding_key, state_bits

pytestmark = [
    pytest.mark.on_devices("tests-states"),
    pytest.mark.builtin_rules("has no rule"),
]

every_code = pytest.mark.parametrize("code", [E4M3, UE5M3], ids=lambda code: code.name)
# float32's largest number needs the last one; a new state has the scale 0.
SCALES = range(248)
LARGEST = 3.4028234663852886e38
LARGEST_NOISE = (0xFFFF << 4) + 8

# ---- the definition ------------------------------------------------------------------------------


@functools.cache
def numbers_of(code: Code) -> Any:
    """The numbers of all codes with a scale of 1."""
    count = 128 if code.is_signed else 256
    numbers = [
        (c % 8) / 8 * 2.0 ** (1 - code.bias)
        if c < 8
        else (1 + c % 8 / 8) * 2.0 ** (c // 8 - code.bias)
        for c in range(count - 1)
    ]
    numbers.append(math.nan)
    return np.array(numbers + [-x for x in numbers] if code.is_signed else numbers)


def decoded_by_hand(codes: Any, scales: Any, code: Code) -> Any:
    """The float32 numbers of codes, each with the scale that is given for it."""
    powers = np.where(scales == 0, 0.0, np.ldexp(1.0, scales.astype(int) - 127))
    with np.errstate(over="ignore"):
        return (numbers_of(code)[codes] * powers).astype(np.float32)


def scale_by_hand(group: Any, code: Code) -> int:
    """The smallest scale with which the largest number is no larger than that of a code."""
    is_valid = np.isfinite(group) & (code.is_signed | ~(group < 0))
    largest = np.abs(group[is_valid]).max(initial=0.0)
    limit = np.nanmax(numbers_of(code))
    return next(s for s in range(1, 256) if largest <= limit * 2.0 ** (s - 127))


def encoded_by_hand(group: Any, code: Code, noise: Any = None) -> tuple[list[int], int]:
    """The codes of at most 32 numbers, and their scale."""
    scale = scale_by_hand(group, code)
    codes = []
    for i, x in enumerate(group.tolist()):
        sign = 0x80 if code.is_signed and math.copysign(1.0, x) < 0 else 0
        if not math.isfinite(x) or (x < 0 and not code.is_signed):
            codes.append((0x7F if code.is_signed else 0xFF) | sign)
            continue
        scaled = abs(x) * 2.0 ** (127 - scale)
        smallest_normal = 2.0 ** (1 - code.bias)
        # As a code and a fraction, of which 20 bits count.
        if scaled < smallest_normal:
            place = np.rint(scaled / smallest_normal * 2**23) / 2**20
        else:
            fraction, exponent = math.frexp(scaled)
            place = (exponent - 1 + code.bias) * 8 + (2 * fraction - 1) * 8
        rounded = np.rint(place) if noise is None else math.floor(place + noise[i] / 2**20)
        if not code.is_signed and x > 0:
            rounded = max(rounded, 1)
        codes.append(int(rounded) | sign)
    return codes, scale


def check_encode(values: Tensor, code: Code, noise: Tensor | None = None) -> None:
    """Compare codes and scales of rows with the definition."""
    codes, scales = encode(values, code, noise)
    assert codes.dtype == scales.dtype == torch.uint8
    assert codes.shape == values.shape
    assert scales.shape == scale_shape(values.shape)
    rows = values.double().cpu().reshape(-1, values.shape[-1]).numpy()
    noises = None if noise is None else noise.cpu().reshape(rows.shape).tolist()
    found, found_scales = codes.cpu().reshape(rows.shape), scales.cpu().reshape(len(rows), -1)
    for r, row in enumerate(rows):
        for g, begin in enumerate(range(0, row.size, GROUP)):
            group = slice(begin, begin + GROUP)
            wanted, scale = encoded_by_hand(
                row[group], code, None if noises is None else noises[r][group]
            )
            assert found_scales[r, g] == scale, (r, g)
            got = found[r, group].tolist()
            # The sign of a NaN is not defined.
            nan = 0x7F if code.is_signed else 0xFF
            assert [c & 0x7F if c & nan == nan else c for c in got] == [
                c & 0x7F if c & nan == nan else c for c in wanted
            ], (r, g)


def random_noise(values: Tensor) -> Tensor:
    """Noise of all sizes, with the smallest and the largest."""
    noise = torch.randint(0, 1 << 20, values.shape, dtype=torch.int32)
    noise.view(-1)[::5] = 0
    noise.view(-1)[1::5] = (1 << 20) - 1
    noise.view(-1)[2::5] = 1 << 19
    return noise


# ---- values --------------------------------------------------------------------------------------

SPECIALS = [
    *(0.0, -0.0, 2.0**-149, 2.0**-126, -(2.0**-149), 2.0**-127, 1e-40, 2.0**-20, 1.0, -1.0),
    *(1.75, 1.8125, 1.875, math.nextafter(1.75, 2), 448.0, 464.0, 480.0, 114688.0, 3e38),
    *(LARGEST, -LARGEST, math.inf, -math.inf, math.nan),
]


def groups() -> dict[str, Tensor]:
    """Rows of one group, by what is special about them."""
    generator = torch.Generator("cpu").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu")

    decades = torch.rand(60, GROUP, generator=generator, device="cpu") * 90 - 45
    chosen = torch.randint(len(SPECIALS), (60, GROUP), generator=generator, device="cpu")
    specials = torch.tensor(SPECIALS, dtype=torch.float64, device="cpu").float()
    huge = normal(20, GROUP) * 1e-3
    huge[:, 7] = torch.logspace(-2, 38, 20, device="cpu")
    one_code = torch.arange(1, 61, device="cpu").view(60, 1) / 8 * torch.ones(GROUP, device="cpu")
    zeros = torch.zeros(2, GROUP, device="cpu")
    zeros[1] = -0.0
    between = decode(
        torch.arange(GROUP, device="cpu").repeat(7, 1).add(32 * torch.arange(7).view(7, 1)).byte(),
        torch.full((7, 1), 127, dtype=torch.uint8, device="cpu"),
        UE5M3,
    )
    ties = (between + between.roll(-1, -1)) / 2
    return {
        "normal": normal(30, GROUP),
        "decades": (10.0 ** decades.double()).float() * normal(60, GROUP).sign(),
        "specials": specials[chosen],
        "finite specials": specials[chosen % (len(SPECIALS) - 3)],
        "a huge one": huge,
        "alike": one_code,
        "zeros": zeros,
        "denormal": normal(4, GROUP) * 2.0**-140,
        "ties": ties[:, :-1].repeat(1, 2)[:, :GROUP],
        "just beside ties": torch.nextafter(ties, torch.tensor(math.inf, device="cpu")),
        "infinite": torch.full((1, GROUP), math.inf, device="cpu"),
        "negative": -normal(3, GROUP).abs(),
        "largest": torch.full((2, GROUP), LARGEST, device="cpu"),
    }


GROUPS = groups()
every_kind = pytest.mark.parametrize("kind", GROUPS)

# ---- tests ---------------------------------------------------------------------------------------


@every_code
def test_decode(code: Code) -> None:
    codes = torch.arange(256).byte().view(8, GROUP)
    for scale in SCALES:
        scales = torch.full((8, 1), scale, dtype=torch.uint8)
        got = decode(codes, scales, code)
        assert got.dtype == torch.float32
        wanted = decoded_by_hand(np.arange(256), np.full(256, scale), code).reshape(8, GROUP)
        found = got.cpu().numpy()
        np.testing.assert_array_equal(found, wanted, err_msg=str(scale))
        is_number = ~np.isnan(wanted)
        np.testing.assert_array_equal(np.signbit(found)[is_number], np.signbit(wanted)[is_number])


@pytest.mark.once
def test_e4m3_is_that_of_torch() -> None:
    codes = torch.arange(256).byte().view(8, GROUP)
    theirs = codes.view(torch.float8_e4m3fn).float()
    scales = torch.full((8, 1), 127, dtype=torch.uint8)
    torch.testing.assert_close(decode(codes, scales, E4M3), theirs, rtol=0, atol=0, equal_nan=True)
    # The other way, in groups whose scale is 1.
    values = torch.randn(200, GROUP) * 2.0 ** torch.randint(-14, 8, (200, GROUP))
    values.clamp_(-448, 448)[:, 0] = 448
    got, scales = encode(values, E4M3)
    assert set(scales.unique().tolist()) == {127}
    assert torch.equal(got, values.to(torch.float8_e4m3fn).view(torch.uint8))


@every_code
@every_kind
def test_encode_to_nearest(code: Code, kind: str) -> None:
    check_encode(GROUPS[kind].to(torch.get_default_device()), code)


@every_code
@every_kind
def test_encode_stochastically(code: Code, kind: str) -> None:
    values = GROUPS[kind].to(torch.get_default_device())
    check_encode(values, code, random_noise(values))


@every_code
@pytest.mark.parametrize("length", [1, 31, 32, 33, 63, 64, 95, 100])
def test_short_last_groups(code: Code, length: int) -> None:
    values = torch.randn(3, length).mul_(100).abs_()
    values[:, -1] = 1e6
    check_encode(values, code)
    check_encode(values, code, random_noise(values))
    check_encode(values[0], code)
    # Padding is not part of the result.
    codes, scales = encode(values, code)
    again = decode(codes, scales, code)
    assert again.shape == values.shape
    for row in range(3):
        alone = decode(*encode(values[row], code), code)
        assert torch.equal(alone, again[row])


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 32), (2, 0, 64)])
def test_empty(shape: tuple[int, ...]) -> None:
    codes, scales = encode(torch.zeros(shape), E4M3)
    assert codes.shape == shape
    assert scales.shape == scale_shape(torch.Size(shape))
    assert decode(codes, scales, E4M3).shape == shape


@every_code
@pytest.mark.parametrize("kind", ["transposed", "slice", "every other", "expanded", "offset"])
def test_not_contiguous(code: Code, kind: str) -> None:
    wide = torch.randn(70, 130, 2).mul_(10).abs_()
    values = {
        "transposed": wide[:64, :, 0].t(),
        "slice": wide[3:9, 5:75, 0],
        "every other": wide[:5, :128:2, 1],
        "expanded": wide[0, :40, 0].expand(6, 40),
        "offset": wide.flatten()[1:97].view(3, 32),
    }[kind]
    noise = random_noise(values)
    check_encode(values, code)
    check_encode(values, code, noise)
    # The order of the noise does not matter, either.
    turned = noise.transpose(0, 1).contiguous().transpose(0, 1)
    for a, b in zip(encode(values, code, noise), encode(values, code, turned), strict=True):
        assert torch.equal(a, b)
    codes, scales = encode(values, code)
    spread = torch.zeros(codes.shape[0], 2 * codes.shape[1], dtype=torch.uint8)[:, ::2]
    spread.copy_(codes)
    assert torch.equal(decode(spread, scales, code), decode(codes, scales, code))


@every_code
def test_numbers_of_codes_are_kept(code: Code) -> None:
    """Whatever the noise and the scale that the codes had."""
    finite = torch.tensor([c for c in range(256) if c & code.nan != code.nan]).byte()
    # Any set of codes, and those below one of them.
    sets = [finite[torch.randint(len(finite), (GROUP,))] for _ in range(20)]
    sets += [finite[begin : begin + GROUP] for begin in range(0, 224, 8)]
    codes = torch.stack(sets)
    for scale in SCALES:
        values = decode(codes, torch.full((len(sets), 1), scale, dtype=torch.uint8), code)
        assert values.isnan().sum() == 0
        values[values.isinf()] = 0.0  # beyond float32
        for noise in (None, 8, LARGEST_NOISE):
            noises = None if noise is None else torch.full(codes.shape, noise, dtype=torch.int32)
            again = decode(*encode(values, code, noises), code)
            assert torch.equal(again, values), (scale, noise)


@every_code
@every_kind
def test_errors(code: Code, kind: str) -> None:
    """Rounding gives one of the two neighbours: within 1/8, or a step of the smallest codes."""
    values = GROUPS[kind].to(torch.get_default_device())
    is_number = values.isfinite() & (values.abs() <= 1.75 * 2.0**127)
    is_number &= (values >= 0) | code.is_signed
    for noise in (None, random_noise(values)):
        codes, scales = encode(values, code, noise)
        got = decode(codes, scales, code)
        assert torch.equal(got.isnan(), ~values.isfinite() | ((values < 0) & (not code.is_signed)))
        unit = torch.ldexp(torch.ones(scales.shape, dtype=torch.float64), scales.int() - 127)
        smallest = unit * code.smallest_normal / 8
        bound = torch.maximum(values.double().abs() / 8, smallest)
        bound = bound / 2 if noise is None and code.is_signed else bound
        error = (got.double() - values.double()).abs()
        assert (error <= bound)[is_number].all()
        if not code.is_signed:
            assert ((got == 0) == (values == 0))[is_number].all()


@every_code
@pytest.mark.parametrize("largest", [1.0, 1e4, 1e-3])
def test_mean(code: Code, largest: float) -> None:
    """Of stochastic rounding with the bits that a step uses."""
    count = 1 << 15
    numbers = torch.rand(GROUP) * torch.logspace(0, -4, GROUP)
    numbers[0] = largest
    scale = scale_by_hand(numbers.double().cpu().numpy(), code)
    smallest_normal = code.smallest_normal * 2.0 ** (scale - 127)
    # Positive numbers below the smallest unsigned code become that code.
    is_unbiased = (numbers >= smallest_normal / 8) | code.is_signed
    assert is_unbiased.any()
    bits = state_bits(rounding_key(0, 3, 5), torch.arange(count * GROUP).view(count, GROUP))
    for state in (0, 1):
        noise = code_noise(bits, state)
        got = decode(*encode(numbers.expand(count, GROUP), code, noise), code).double()
        powers = 2.0 ** numbers.double().log2().floor()
        spacing = powers.clamp(min=smallest_normal) / 8
        error = (got.mean(0) - numbers.double()) / spacing
        assert error[is_unbiased].abs().max() < 5 * 0.5 / math.sqrt(count)


@every_code
@pytest.mark.once
def test_all_noise_together_has_the_right_mean(code: Code) -> None:
    """Each of the 2^16 amounts of noise once: the mean errs by at most half of its resolution."""
    bits = torch.arange(1 << 16)
    noise = code_noise(bits, 0).view(-1, 1).expand(-1, 2)
    for value in (1.0, 1.0001, 1.3, 1.77, 1.874, 0.3 * code.smallest_normal, 2.0**-7):
        values = torch.tensor([[value, 256.0]]).expand(1 << 16, 2)
        got = decode(*encode(values, code, noise), code).double()[:, 0]
        scale = 2.0 ** (scale_by_hand(values[0].double().numpy(), code) - 127)
        step = max(2.0 ** math.floor(math.log2(value)), code.smallest_normal * scale) / 8
        assert abs(got.mean().item() - values[0, 0].item()) <= step * 2.0**-17, value
        assert got.unique().numel() <= 2


@pytest.mark.once
def test_noise() -> None:
    bits = torch.tensor([0, 0x12345678, 0xFFFFFFFF, 0xFFFF0000, 0x0000FFFF])
    low, high = 0xFFFF0 + 8, 8
    assert code_noise(bits, 0).tolist() == [8, 0x56788, low, high, low]
    assert code_noise(bits, 1).tolist() == [8, 0x12348, low, low, high]
    for state in range(5):
        assert torch.equal(code_noise(bits, state), code_noise(bits, state % 2))
        assert code_seed(state) == state // 2
    assert code_noise(bits, 0).dtype == torch.int32
    # Two states share the bits of an element, but not the same ones.
    many = state_bits(rounding_key(0, 0, 1), torch.arange(100_000))
    pair = torch.stack([code_noise(many, 0), code_noise(many, 1)]).double()
    assert torch.corrcoef(pair)[0, 1].abs() < 5 / math.sqrt(100_000)


@pytest.mark.once
def test_bits_are_independent() -> None:
    """Of elements, steps and parameters; each bit is 1 in half of the cases."""
    count = 1 << 16
    index = torch.arange(count)
    keys = [rounding_key(0, position, step) for position in (0, 1) for step in (1, 2, 1000)]
    rows = torch.stack([state_bits(key, index) for key in keys])
    of_bits = (rows.unsqueeze(-1) >> torch.arange(32)) & 1
    assert (of_bits.double().mean((0, 1)) - 0.5).abs().max() < 5 * 0.5 / math.sqrt(rows.numel())
    limit = 5 / math.sqrt(count)
    halves = torch.cat([rows & 0xFFFF, rows >> 16]).double()
    assert torch.corrcoef(halves).fill_diagonal_(0).abs().max() < limit
    for distance in (1, 2, 31, 32, 4096):
        for row in halves:
            pair = torch.stack([row[:-distance], row[distance:]])
            assert torch.corrcoef(pair)[0, 1].abs() < limit
    # An element's bits over the steps, which one parameter sees.
    steps = torch.stack([state_bits(rounding_key(0, 5, t), index[:64]) for t in range(1, 4097)])
    series = (steps & 0xFFFF).double()
    for distance in (1, 2, 3):
        moved = (series[distance:] - 32767.5) * (series[:-distance] - 32767.5)
        assert (moved.mean(0) / (65536**2 / 12)).abs().max() < 5 / math.sqrt(4096)
    # Beyond 2^32 elements, others.
    assert not torch.equal(state_bits(keys[0], index + 2**32), rows[0])


@pytest.mark.once
def test_bits_by_definition() -> None:
    key, index = rounding_key(1, 2, 3), (5 << 32) + 77
    low, high = key % 2**32, (key >> 32) + 0x9E3779B9 * 5
    x = 77 ^ low
    x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
    x = ((x ^ (x >> 15) ^ (high % 2**32)) * 0x846CA68B) % 2**32
    assert state_bits(key, torch.tensor([index])).tolist() == [x ^ (x >> 16)]


def test_annotations() -> None:
    assert code_of(Tensor) is None
    assert code_of(float) is None
    assert E4M3.nan == 0x7F
    assert UE5M3.nan == 0xFF
