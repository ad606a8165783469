"""Conversions between the 16-bit types and the types of the arithmetic, on CUDA devices.

Each operand of a kernel is converted by separate code: gradients are widened; updates, states,
parameters and the parameters of master weights are rounded. Each conversion is tested with every
number of a 16-bit type, or with all numbers around its rounding boundaries, through public
functions whose hyperparameters make the formula the identity. Expected are the bits of the number
rounded once, to nearest even; for a NaN, any NaN.

Without a GPU, the tests run on emulated devices: ``pytest --device emulated``.
"""

import functools
import math

import pytest
import torch
from support import assert_equal_bits, has_equal_bits, overflow_threshold, round_once
from torch import Tensor
from torch.nn import Parameter

from emerging_optimizers import Adam, Lion
from emerging_optimizers.scalar_optimizers import calculate_adam_update, calculate_lion_update

pytestmark = [pytest.mark.on_devices("tests-cuda"), pytest.mark.cuda]

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# Rounds to 1 in float32, but is a valid beta, because it is less in float64.
ALMOST_1 = 1 - 2.0**-53

every_short = pytest.mark.parametrize("short", [BF16, F16], ids=str)
every_wide = pytest.mark.parametrize("wide", [F32, F64], ids=str)
# Vectors of elements, or single elements.
every_way = pytest.mark.parametrize("offset", [0, 1], ids=["vectors", "elements"])


@functools.cache
def all_numbers(short: torch.dtype) -> Tensor:
    """Every number of a 16-bit type, including the NaNs."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(short)


@functools.cache
def near_boundaries(short: torch.dtype, wide: torch.dtype) -> Tensor:
    """Every number of a 16-bit type, all midpoints, and the neighbours of both.

    The neighbours are one ulp of `wide` away; in float64 also one ulp of float32, and as close that
    rounding to float32 first would yield the midpoint.
    """
    numbers = all_numbers(short).double()
    numbers = numbers[numbers.isfinite()].unique()  # sorted; one of the two zeros
    # Beyond the largest number, the next boundary is that of infinity.
    following = 2 * overflow_threshold(short) - torch.finfo(short).max
    ends = torch.tensor([following], dtype=F64)
    numbers = torch.cat([-ends, numbers, ends])
    middles = (numbers[1:] + numbers[:-1]) / 2
    exact = torch.cat([numbers, middles])
    beside = [exact.to(wide)]
    for dtype in {F32, wide}:
        for direction in (-math.inf, math.inf):
            towards = torch.tensor(direction, dtype=dtype)
            beside.append(torch.nextafter(exact.to(dtype), towards).to(wide))
    if wide == F64:
        beside += [exact * (1 + 2.0**-40), exact * (1 - 2.0**-40)]
    largest = torch.finfo(wide).max
    others = [0.0, -0.0, math.inf, -math.inf, math.nan, largest, -largest]
    others += [torch.finfo(F32).smallest_normal, 2.0**-149, -(2.0**-149)]  # the last ulp of float32
    if wide == F64:
        others += [5e-324, -5e-324, 1e-60, -1e-60, 1e300, -1e300]
        others += [s * 2.0**128 * (1 + d) for s in (1, -1) for d in (-(2.0**-25), 0.0, 2.0**-30)]
    return torch.cat([*beside, torch.tensor(others, dtype=F64).to(wide), _nans(wide)])


def _nans(wide: torch.dtype) -> Tensor:
    """NaNs with only the lowest, only the highest or all bits of the mantissa set."""
    integer, mantissa = (torch.int32, 23) if wide == F32 else (torch.int64, 52)
    bits = torch.iinfo(integer)
    infinity = bits.max - (2**mantissa - 1)
    positive = [infinity + 1, infinity + 2 ** (mantissa - 1), bits.max]
    return torch.tensor([*positive, *(bits.min + p for p in positive)], dtype=integer).view(wide)


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the expected result; PyTorch's conversion from float64 would round twice."""
    return round_once(values.double(), dtype)


def test_right_answers() -> None:
    """For float32, the expected results are those of PyTorch on the CPU."""
    for short in (BF16, F16):
        values = near_boundaries(short, F32)
        assert_equal_bits(rounded(values, short), values.to(short), f"to {short}")
        wide = all_numbers(short).float()
        assert_equal_bits(wide.to(short), all_numbers(short), f"{short} and back")
        assert len(values) > 2**17
    beside = near_boundaries(F16, F64)
    assert not has_equal_bits(rounded(beside, F16), beside.to(F32).to(F16)).all()


def cut(values: Tensor, device: str, offset: int = 0) -> Tensor:
    """A copy of values that starts at an element of a buffer."""
    buffer = torch.zeros(offset + values.numel(), dtype=values.dtype, device=device)
    return buffer[offset:].copy_(values)


def check(label: str, results: dict[str, Tensor], wanted: Tensor) -> None:
    for device, result in results.items():
        assert_equal_bits(result.cpu(), wanted, f"{label}, on {device}")


# The gradient becomes the state; the old state, -0, does not change it.
def state_of(grad: Tensor, dtype: torch.dtype, offset: int) -> dict[str, Tensor]:
    results = {}
    for device in ("cpu", "cuda"):
        exp_avg = cut(torch.full(grad.shape, -0.0, dtype=dtype), device, offset)
        calculate_lion_update(cut(grad, device), exp_avg, momentum_beta=0.0, momentum_beta2=0.0)
        results[device] = exp_avg
    return results


# The state becomes the update: the gradient, -0, adds nothing, and the denominator is 1.
def update_of(exp_avg: Tensor, dtype: torch.dtype, offset: int) -> dict[str, Tensor]:
    results = {}
    for device in ("cpu", "cuda"):
        like = torch.zeros(exp_avg.shape, dtype=F32, device=device)
        update = cut(torch.full(exp_avg.shape, 7.0, dtype=dtype), device, offset)
        state = cut(exp_avg, device)
        calculate_adam_update(
            -like, state, like, (ALMOST_1, 0.5), False, False, step=1, eps=1.0, out=update
        )
        assert_equal_bits(state.cpu(), exp_avg, f"the state, on {device}")
        results[device] = update
    return results


# ---- widening ------------------------------------------------------------------------------------


@every_short
@every_wide
@every_way
def test_a_gradient_is_widened(short: torch.dtype, wide: torch.dtype, offset: int) -> None:
    grad = all_numbers(short)
    check(f"{short} to {wide}", state_of(grad, wide, offset), grad.to(wide))


@every_short
@every_way
def test_a_state_is_widened(short: torch.dtype, offset: int) -> None:
    exp_avg = all_numbers(short)
    check(f"{short}", update_of(exp_avg, F32, offset), exp_avg.float())


@every_short
@every_way
def test_a_step_widens_the_gradient(short: torch.dtype, offset: int) -> None:
    grad = all_numbers(short)
    for device in ("cpu", "cuda"):
        param = Parameter(torch.zeros(grad.shape, dtype=short, device=device))
        param.grad = cut(grad, device, offset)
        optimizer = Lion([param], lr=0.0, betas=(0.0, 0.0), fused=True, state_dtype=F32)
        optimizer.step()  # creates the state
        state = optimizer.state[param]["exp_avg"].fill_(-0.0)
        optimizer.step()
        assert_equal_bits(state.cpu(), grad.float(), f"{short}, on {device}")
        assert not param.detach().any()


@every_short
@every_way
def test_one_short_type_is_converted_to_the_other(short: torch.dtype, offset: int) -> None:
    grad = all_numbers(short)
    other = F16 if short == BF16 else BF16
    check(f"{short} to {other}", state_of(grad, other, offset), rounded(grad, other))


# ---- rounding ------------------------------------------------------------------------------------


@every_short
@every_wide
@every_way
def test_a_state_is_rounded(short: torch.dtype, wide: torch.dtype, offset: int) -> None:
    grad = near_boundaries(short, wide)
    check(f"{wide} to {short}", state_of(grad, short, offset), rounded(grad, short))


@every_short
@every_way
def test_an_update_is_rounded(short: torch.dtype, offset: int) -> None:
    exp_avg = near_boundaries(short, F32)
    check(f"to {short}", update_of(exp_avg, short, offset), rounded(exp_avg, short))


@every_short
@every_way
@pytest.mark.parametrize("master_weights", [False, True])
def test_a_parameter_is_rounded(short: torch.dtype, offset: int, master_weights: bool) -> None:
    """A weight of -0 minus the update, which is the state, as in `update_of`."""
    values = near_boundaries(short, F32)
    for device in ("cpu", "cuda"):
        param = Parameter(cut(torch.full(values.shape, -0.0, dtype=short), device, offset))
        optimizer = _adam(param, master_weights)
        with torch.device(device):
            param.grad = torch.full_like(param, -0.0)
            optimizer.step()  # creates the states
        param.data.fill_(-0.0)
        state = optimizer.state[param]
        state["exp_avg"].copy_(-values)
        if master_weights:
            state["master_param"].fill_(-0.0)
        optimizer.step()
        assert_equal_bits(param.detach().cpu(), rounded(values, short), f"{short}, on {device}")
        if master_weights:
            assert_equal_bits(state["master_param"].cpu(), values, f"the master, on {device}")


@every_short
@every_way
def test_a_zero_update_keeps_the_parameter(short: torch.dtype, offset: int) -> None:
    values = all_numbers(short)
    for device in ("cpu", "cuda"):
        param = Parameter(cut(values, device, offset))
        param.grad = torch.zeros_like(param)
        _adam(param).step()
        assert_equal_bits(param.detach().cpu(), values, f"{short}, on {device}")


def _adam(param: Parameter, master_weights: bool = False) -> Adam:
    return Adam(
        [param],
        lr=1.0,
        betas=(ALMOST_1, 0.5),
        eps=1.0,
        correct_bias=False,
        fused=True,
        state_dtype=F32,
        master_weights=master_weights,
    )


# ---- every float32 number ------------------------------------------------------------------------


@pytest.mark.real
@every_short
def test_every_float32_is_rounded(short: torch.dtype) -> None:
    """Compares with PyTorch on the device; `test_a_state_is_rounded` tests the boundaries."""
    count = 2**26
    exp_avg = torch.empty(count, dtype=short, device="cuda")
    update = torch.empty_like(exp_avg)
    offsets = torch.arange(count, dtype=torch.int64, device="cuda")
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for begin in range(-(2**31), 2**31, count):
        grad = (offsets + begin).to(torch.int32).view(F32)
        exp_avg.fill_(-0.0)
        calculate_lion_update(grad, exp_avg, momentum_beta=0.0, momentum_beta2=0.0, out=update)
        differing += (~has_equal_bits(exp_avg, grad.to(short))).sum()
    assert differing.item() == 0
