"""Rounding results to where they are stored: to nearest, once; and stochastically.

The latter is in PyTorch's integer operations.
"""

import math

import torch
from torch import Tensor

from ._values import has_value

_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF
_GOLDEN32 = 0x9E3779B9
_GOLDEN64 = 0x9E3779B97F4A7C15


def store(target: Tensor, values: Tensor) -> None:
    """Copy, rounding once: PyTorch rounds float64 to float32 and then to a 16-bit dtype."""
    if values.dtype == torch.float64 and target.dtype in (torch.bfloat16, torch.float16):
        # Round to odd first: then the second rounding alone decides the result.
        nearest = values.float()
        back = nearest.double()
        is_exact_or_odd = (back == values) | (nearest.view(torch.int32) & 1).bool()
        towards = torch.where(back < values, math.inf, -math.inf).float()
        values = torch.where(is_exact_or_odd, nearest, nearest.nextafter(towards))
    # `copy_` of fake CUDA tensors needs a PyTorch with CUDA.
    torch._foreach_copy_([target], [values])


# ---- stochastic rounding -------------------------------------------------------------------------


def draw_seed() -> int:
    """Draw the 64 random bits of a step from PyTorch's default CPU generator."""
    bits = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device="cpu")
    return int(bits) & _MASK64 if has_value(bits) else 0


def rounding_key(seed: int, position: int, step: int) -> int:
    """Mix what a parameter's random bits depend on, except the element's index, into 64 bits.

    Args:
        seed: The step's 64 random bits.
        position: The parameter's position in the optimizer, counted from 0 over all groups. For a
            shard that is not contiguous in its DTensor: plus 2**32 times the shard's number.
        step: The parameter's step number, counted from 1.
    """

    def mix(x: int) -> int:  # SplitMix64
        x = (x + _GOLDEN64) & _MASK64
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
        return x ^ (x >> 31)

    return mix(mix(mix(seed) ^ position) ^ step)


def random_bits(key: int, index: Tensor) -> Tensor:
    """Return 32 random bits for each element index, as int64 numbers.

    Args:
        key: From :func:`rounding_key`.
        index: The elements' indices, int64; for a contiguous shard, those in the full DTensor.
    """

    def hashed(x: Tensor) -> Tensor:
        # Modulo 2**32. A product that wraps around in int64 has the right low bits.
        x = (x ^ (x >> 16)).mul_(0x7FEB352D).bitwise_and_(_MASK32)
        x = (x ^ (x >> 15)).mul_(0x846CA68B).bitwise_and_(_MASK32)
        return x ^ (x >> 16)

    return hashed(hashed((index & _MASK32) ^ (key & _MASK32)) ^ _block(key, index))


def state_bits(key: int, index: Tensor) -> Tensor:
    """Return 32 weaker bits, for the rounding of states; the arguments are as above."""
    x = (index & _MASK32) ^ (key & _MASK32)
    x = (x ^ (x >> 16)).mul_(0x7FEB352D).bitwise_and_(_MASK32)
    x = (x ^ (x >> 15) ^ _block(key, index)).mul_(0x846CA68B).bitwise_and_(_MASK32)
    return x ^ (x >> 16)


def _block(key: int, index: Tensor) -> Tensor:
    """Return what the high bits of the key and of the index make of the hash."""
    return (index >> 32).mul_(_GOLDEN32).add_(key >> 32).bitwise_and_(_MASK32)


def element_indices(tensor: Tensor) -> Tensor:
    """Number the elements in the order of memory.

    In a dense tensor, the number is the offset from the first element. Any other tensor is numbered
    like the dense one with the same order of dimensions (``empty_like``).
    """
    strides = torch.empty_like(tensor, device="meta").stride()
    numbers = torch.arange(tensor.numel(), dtype=torch.int64, device=tensor.device)
    return numbers.as_strided(tensor.shape, strides)


def round_stochastically(values: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """Round float32 to one of its two neighbours in a half type, so that the mean is right.

    bfloat16 drops the 16 low bits of a float32 number, float16 the 13 low bits. As many random bits
    are added to the number's bits, as integers, before the low bits are cleared; a carry from the
    mantissa correctly goes into the exponent. A float16 number below 2**-14 is a multiple of
    2**-24: its magnitude in that unit is rounded up if its fraction exceeds the random bits, taken
    as a fraction. NaN, infinities and numbers of the half type are unchanged, so only a number
    beyond the largest finite one can become infinite.

    Args:
        values: float32.
        dtype: bfloat16 or float16.
        bits: 32 random bits for each element, from :func:`random_bits`.
    """
    dropped = 16 if dtype == torch.bfloat16 else 13
    noise = (bits >> (32 - dropped)).to(torch.int32)
    sums = values.contiguous().view(torch.int32).add(noise).bitwise_and_(-(1 << dropped))
    rounded = sums.view(torch.float32)
    if dtype == torch.float16:
        units = values.abs().mul_(2.0**24)
        whole = units.floor()
        chance = (bits >> 8).float().mul_(2.0**-24)
        tiny = torch.where(units - whole > chance, whole + 1, whole).mul_(2.0**-24)
        rounded = torch.where(values.abs() < 2.0**-14, tiny.copysign_(values), rounded)
    return torch.where(values.isfinite(), rounded, values).to(dtype)
