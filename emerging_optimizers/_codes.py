"""8-bit codes of states: small floating-point numbers, times a power of two that a group shares.

A group is 32 consecutive elements of a tensor's last dimension. ``csrc/engine/codes.h`` has the
same codes, bit for bit.
"""

import math
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

GROUP = 32

_DROPPED = 20  # bits of float32's mantissa
_HALF = 1 << (_DROPPED - 1)
_INFINITY = 0x7F800000


class Code(NamedTuple):
    """A format as IEEE 754 has it: with subnormals, and 3 bits of mantissa.

    The largest code is a NaN, which stands for infinities as well.

    Attributes:
        name: Its usual name.
        bias: The exponent's bias.
        is_signed: Whether the first bit is the sign.
    """

    name: str
    bias: int
    is_signed: bool

    @property
    def nan(self) -> int:
        return 0x7F if self.is_signed else 0xFF

    @property
    def largest_exponent(self) -> int:
        return (15 if self.is_signed else 31) - self.bias

    @property
    def smallest_normal(self) -> float:
        return 2.0 ** (1 - self.bias)

    @property
    def rebias(self) -> int:
        """What makes a code the exponent and the mantissa of a float32 number."""
        return (127 - self.bias) << 3


# OCP's E4M3, as in torch.float8_e4m3fn; and E5M3 without a sign, whose square root covers as many
# powers of two.
E4M3 = Code("e4m3", 7, True)
UE5M3 = Code("ue5m3", 15, False)

# The types of states that may be stored as codes, in the signature of a rule: of any sign, and of
# states that are never negative.
SignedState = Annotated[Tensor, E4M3]
UnsignedState = Annotated[Tensor, UE5M3]


def code_of(annotation: Any) -> Code | None:
    """Return the format that the type of a state allows."""
    notes = getattr(annotation, "__metadata__", ())
    return next((note for note in notes if isinstance(note, Code)), None)


def scale_key(name: str) -> str:
    """Return the key of a state's scales."""
    return f"{name}_scale"


def scale_shape(shape: torch.Size) -> tuple[int, ...]:
    """Return the shape of the scales of codes of some shape."""
    return (*shape[:-1], math.ceil(shape[-1] / GROUP))


def decode(codes: Tensor, scales: Tensor, code: Code) -> Tensor:
    """Return the float32 numbers that codes stand for.

    Args:
        codes: uint8.
        scales: uint8, of the shape that `scale_shape` returns. A scale `s` is ``2**(s - 127)``.
        code: The format.
    """
    magnitude = _in_groups(codes).to(torch.int32)
    is_negative = (magnitude > 0x7F) & code.is_signed
    magnitude = magnitude & code.nan
    is_subnormal = magnitude < 8
    bits = torch.where(is_subnormal, magnitude + 8, magnitude).add_(code.rebias)
    values = bits.bitwise_left_shift_(_DROPPED).view(torch.float32)
    values = torch.where(is_subnormal, values - code.smallest_normal, values)
    values = values * (scales.to(torch.int32) << 23).view(torch.float32).unsqueeze(-1)
    values = torch.where(is_negative, -values, values)
    values = values.masked_fill_(magnitude == code.nan, math.nan)
    return _without_groups(values, codes.shape)


def encode(values: Tensor, code: Code, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the codes of float32 numbers, and their scales.

    The scale is the smallest power of two with which not even the group's largest number may be
    rounded up to the NaN. Infinities become NaN, and so do negative numbers without a sign to
    store. A number that can only be 0 or more becomes 0 only if it is.

    Args:
        values: float32, with at least one dimension.
        code: The format.
        noise: For stochastic rounding: int32 numbers below 2**20, of the shape of `values`. A
            number that has a code is unchanged. None: round to nearest even.
    """
    grouped = _in_groups(values).contiguous()
    if code.is_signed:
        magnitude = grouped.view(torch.int32) & 0x7FFFFFFF
    else:
        magnitude = (grouped + 0.0).view(torch.int32)  # -0 becomes 0; others with a sign are < 0
    is_finite = (magnitude >= 0) & (magnitude < _INFINITY)
    largest = torch.where(is_finite, magnitude, 0).amax(-1, keepdim=True)
    scales = ((largest + 0x1FFFFF) >> 23).sub_(code.largest_exponent).clamp_(min=1)
    reciprocals = (254 - scales).bitwise_left_shift_(23).view(torch.float32)
    scaled = magnitude.view(torch.float32) * reciprocals
    is_subnormal = scaled < code.smallest_normal
    # The sum of a subnormal number and the smallest normal one is as coarse as its code.
    bits = torch.where(is_subnormal, scaled + code.smallest_normal, scaled).view(torch.int32)
    if noise is None:
        bits = bits + (_HALF - 1 + (bits >> _DROPPED & 1))
    else:
        bits = bits + _in_groups(noise)
    codes = (bits >> _DROPPED).sub_(code.rebias).sub_(is_subnormal.to(torch.int32), alpha=8)
    if not code.is_signed:
        codes = torch.where((codes == 0) & (magnitude != 0), 1, codes)
    codes = torch.where(is_finite, codes, code.nan)
    if code.is_signed:
        codes = torch.where(grouped.signbit(), codes | 0x80, codes)
    return _without_groups(codes.to(torch.uint8), values.shape), scales.squeeze(-1).to(torch.uint8)


def code_noise(bits: Tensor, state: int) -> Tensor:
    """Return the noise with which a state's numbers are rounded.

    Args:
        bits: 32 random bits for each element, which two states share.
        state: The state's number.
    """
    half = bits & 0xFFFF if state % 2 == 0 else bits >> 16
    return ((half << 4) + 8).to(torch.int32)


def code_seed(state: int) -> int:
    """Return the seed of a state's random bits."""
    return state // 2


def _in_groups(tensor: Tensor) -> Tensor:
    """Return a tensor with one more dimension, that of groups; the last is filled up with 0."""
    missing = -tensor.shape[-1] % GROUP
    if missing:
        tensor = torch.nn.functional.pad(tensor, (0, missing))
    return tensor.view(*tensor.shape[:-1], tensor.shape[-1] // GROUP, GROUP)


def _without_groups(grouped: Tensor, shape: torch.Size) -> Tensor:
    return grouped.flatten(-2)[..., : shape[-1]]
