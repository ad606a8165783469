"""Operands, calls and expected results for the tests of the update functions."""

import inspect
import math
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import interpreters
import numpy as np
import pytest
import torch
from oracle import ALL_RULES, IS_USER, RULES, Array, Expected, Rule, Value, is_square
from torch import Tensor

import emerging_optimizers
from emerging_optimizers._native import native

Case = Mapping[str, Any]

needs_native = pytest.mark.skipif(native is None, reason="there are no native kernels")
every_rule = pytest.mark.parametrize("rule", list(RULES.values()), ids=str)
every_rule_with_states = pytest.mark.parametrize(
    "rule", [rule for rule in RULES.values() if rule.states], ids=str
)
every_case = pytest.mark.parametrize(
    ("rule", "case_name"),
    [
        pytest.param(rule, name, id=f"{rule}-{name}")
        for rule in ALL_RULES.values()
        for name in rule.cases
    ],
)

# ---- dtypes --------------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_F32, _F64, _BF16, _F16 = DTYPES


@dataclass(frozen=True)
class Mix:
    """The dtypes at one position: the gradient's, and those of up to three states."""

    grad: torch.dtype
    states: tuple[torch.dtype, torch.dtype, torch.dtype]

    def of(self, rule: Rule) -> tuple[torch.dtype, ...]:
        """The dtypes of a rule's states: the last ones, so that few states get mixes, too."""
        return self.states[len(self.states) - len(rule.states) :]


MIXES = {
    "float32": Mix(_F32, (_F32, _F32, _F32)),
    "float64": Mix(_F64, (_F64, _F64, _F64)),
    "bfloat16": Mix(_BF16, (_BF16, _BF16, _BF16)),
    "float16": Mix(_F16, (_F16, _F16, _F16)),
    "bfloat16 grad, float32 states": Mix(_BF16, (_F32, _F32, _F32)),
    "float32 grad, bfloat16 states": Mix(_F32, (_BF16, _BF16, _BF16)),
    "float16 grad, bfloat16 states": Mix(_F16, (_BF16, _BF16, _BF16)),
    "mixed states": Mix(_BF16, (_BF16, _F16, _F32)),
    "float32 grad, one float64 state": Mix(_F32, (_F32, _F32, _F64)),
    "bfloat16 grad, one bfloat16 state": Mix(_BF16, (_F64, _F32, _BF16)),
    "float64 grad, half states": Mix(_F64, (_F16, _F16, _BF16)),
}
every_mix = pytest.mark.parametrize("mix", list(MIXES.values()), ids=list(MIXES))
every_half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)

# The significant bits and the smallest normal exponent of each type.
_FORMATS = {_F32: (24, -126), _F64: (53, -1022), _BF16: (8, -126), _F16: (11, -14)}

# The error of the arithmetic, relative to the size of the terms.
_UNITS = {_F32: 6 * 2.0**-23, _F64: 256 * 2.0**-52}


def ulp(values: Array, dtype: torch.dtype) -> Array:
    """The spacing of `dtype`'s numbers at each value; near 0, that of subnormals."""
    digits, lowest = _FORMATS[dtype]
    exponents = np.where(values == 0, lowest, np.frexp(values)[1] - 1)
    return np.ldexp(1.0, np.maximum(exponents, lowest) - (digits - 1))


def overflow_threshold(dtype: torch.dtype) -> float:
    """The smallest value that rounds to infinity: half an ulp above the largest number."""
    largest = torch.finfo(dtype).max
    return largest + float(ulp(np.array(largest), dtype)) / 2


def round_once(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float64 to `dtype` directly, to nearest even.

    PyTorch converts float64 to a half type through float32, which rounds twice.
    """
    assert values.dtype == _F64
    if dtype == _F64:
        return values.clone()
    exact = to_numpy(values)
    with np.errstate(all="ignore"):
        spacing = ulp(exact, dtype)
        rounded = np.rint(exact / spacing) * spacing
    rounded = np.where(np.isfinite(exact), rounded, exact)
    beyond = np.isfinite(exact) & (np.abs(exact) >= overflow_threshold(dtype))
    rounded = np.where(beyond, np.copysign(np.inf, exact), np.copysign(rounded, exact))
    # From here on, all conversions are exact: each value is a number of the type.
    rounded = np.ascontiguousarray(rounded)
    return torch.from_numpy(rounded).reshape(values.shape).to(values.device, dtype)


def arithmetic_dtype(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The dtype in which a position with operands of these dtypes is computed."""
    return _F64 if _F64 in dtypes else _F32


# ---- operands ------------------------------------------------------------------------------------


@dataclass
class Operands:
    """The tensors of a call at one position: a gradient, and states, which are modified."""

    grad: Tensor
    states: list[Tensor]

    def clone(self) -> "Operands":
        return Operands(self.grad.detach().clone(), [s.detach().clone() for s in self.states])

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.grad, *self.states))

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return tuple(tensor.dtype for tensor in self)

    @property
    def update_dtype(self) -> torch.dtype:
        return torch.promote_types(self.grad.dtype, self.model.dtype)

    @property
    def model(self) -> Tensor:
        """The tensor as which an update is laid out."""
        return self.states[0] if self.states else self.grad


def make_operands(rule: Rule, shape: Sequence[int], mix: Mix, seed: int = 0) -> Operands:
    """A gradient and states as in training, with hard cases among them.

    Both signs, eight decades, zeros in each operand, and averages that cancel the gradient.
    """
    device = torch.get_default_device()
    generator = torch.Generator("cpu").manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(tuple(shape), dtype=_F64, generator=generator, device="cpu")

    decades = torch.rand(tuple(shape), dtype=_F64, generator=generator, device="cpu") * 8 - 6
    magnitude = 10**decades
    grad = normal() * magnitude
    grad.view(-1)[3::7] = 0
    states: list[Tensor] = []
    for name, dtype in zip(rule.states, mix.of(rule), strict=True):
        state = normal() * magnitude
        if is_square(name):
            state = (state * state).clamp_(max=torch.finfo(_F16).max / 2)
            state.view(-1)[5::13] = 0
        elif name == "grad_avg":
            # Such that the variance is positive.
            state = state.sign() * states[0].to("cpu", _F64).sqrt() / 2
        else:
            state.view(-1)[5::11] = 0
            state.view(-1)[2::9] = grad.view(-1)[2::9] * (-(1 - 0.9) / 0.9)
        states.append(state.to(device, dtype))
    return Operands(grad.to(device, mix.grad), states)


_SPECIALS = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-40, 1e-20, 3e38, -1.0, 65504.0)


def with_specials(rule: Rule, mix: Mix, seed: int) -> Operands:
    """Ordinary values with NaN, infinities, zeros, subnormals and overflows in every operand."""
    operands = make_operands(rule, (3, 1367), mix, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in zip(("grad", *rule.states), operands, strict=True):
        specials = torch.tensor(_SPECIALS, dtype=torch.float64).to(tensor.dtype)
        chosen = specials[torch.randint(len(specials), tensor.shape, generator=generator)]
        if is_square(name):
            chosen = chosen.abs()
        is_special = torch.rand(tensor.shape, generator=generator) < 0.2
        tensor.copy_(torch.where(is_special, chosen, tensor))
    return operands


def calls_in_python(rule: Rule) -> tuple[Any, str, Any]:
    """What to patch so that eager calls do not enter the compiled module at once."""
    implementation = rule.implementation
    if IS_USER:
        return implementation, "_eager", implementation._call
    module = inspect.getmodule(implementation.formula)
    return module, "_call", implementation._call


def call(rule: Rule, case: Case, operands: Operands | Sequence[Operands], out: Any = None) -> Any:
    """Call the rule's function on a position, or on a list of them."""
    if isinstance(operands, Operands):
        return rule.function(operands.grad, *operands.states, **case, out=out)
    grads = [position.grad for position in operands]
    states = [[position.states[i] for position in operands] for i in range(len(rule.states))]
    return rule.function(grads, *states, **case, out=out)


# ---- layouts of the operands ---------------------------------------------------------------------

# Each takes dense 4-D values, the operand's index (0 is the gradient) and the last index.
Layout = Callable[[Tensor, int, int], Tensor]


def _contiguous(values: Tensor, index: int, last: int) -> Tensor:
    return values.contiguous()


def _transposed(values: Tensor, index: int, last: int) -> Tensor:
    return values.transpose(0, -1).contiguous().transpose(0, -1)


def _permuted(values: Tensor, index: int, last: int) -> Tensor:
    return values.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2)


def _channels_last(values: Tensor, index: int, last: int) -> Tensor:
    return values.contiguous(memory_format=torch.channels_last)


def _one_channel(values: Tensor, index: int, last: int) -> Tensor:
    """Strides that differ only in a dimension of size 1."""
    values = values[:, :1].contiguous()
    return values if index == 0 else values.contiguous(memory_format=torch.channels_last)


def _odd_offset(values: Tensor, index: int, last: int) -> Tensor:
    buffer = torch.full((values.numel() + 32,), 7.0, dtype=values.dtype)
    offset = 2 * index + 1
    return buffer[offset : offset + values.numel()].view(values.shape).copy_(values)


def _strided_slice(values: Tensor, index: int, last: int) -> Tensor:
    buffer = torch.full((*values.shape[:-1], 2 * values.shape[-1]), 7.0, dtype=values.dtype)
    return buffer[..., ::2].copy_(values)


def _expanded_grad(values: Tensor, index: int, last: int) -> Tensor:
    return values if index else values[:1].clone().expand(values.shape)


def _scalar_grad(values: Tensor, index: int, last: int) -> Tensor:
    return values if index else values[0, 0, 0, 0].clone().expand(values.shape)


def _grad_laid_out_otherwise(values: Tensor, index: int, last: int) -> Tensor:
    return values if index else _transposed(values, index, last)


def _first_state_laid_out_otherwise(values: Tensor, index: int, last: int) -> Tensor:
    return values if index != 1 else _channels_last(values, index, last)


def _last_state_not_dense(values: Tensor, index: int, last: int) -> Tensor:
    return values if index != last else _strided_slice(values, index, last)


def _first_state_not_dense(values: Tensor, index: int, last: int) -> Tensor:
    return values if index != 1 else _strided_slice(values, index, last)


def _all_different(values: Tensor, index: int, last: int) -> Tensor:
    kinds: list[Layout] = [_strided_slice, _transposed, _odd_offset, _permuted]
    return kinds[index](values, index, last)


LAYOUTS: dict[str, Layout] = {
    "contiguous": _contiguous,
    "transposed": _transposed,
    "permuted": _permuted,
    "channels_last": _channels_last,
    "one channel": _one_channel,
    "odd offsets": _odd_offset,
    "strided slices": _strided_slice,
    "expanded grad": _expanded_grad,
    "grad of one element": _scalar_grad,
    "grad laid out otherwise": _grad_laid_out_otherwise,
    "first state laid out otherwise": _first_state_laid_out_otherwise,
    "last state not dense": _last_state_not_dense,
    "first state not dense": _first_state_not_dense,
    "all different": _all_different,
}

LAYOUT_SHAPE = (3, 4, 5, 6)


def lay_out(operands: Operands, layout: Layout) -> Operands:
    last = len(operands.states)
    grad, *states = (layout(tensor, index, last) for index, tensor in enumerate(operands))
    return Operands(grad, states)


# ---- expected results ----------------------------------------------------------------------------


def to_numpy(tensor: Tensor) -> Array:
    return tensor.detach().cpu().double().contiguous().numpy()


def assert_near(got: Tensor, wanted: Any, tolerance: float) -> None:
    np.testing.assert_allclose(to_numpy(got), wanted, rtol=tolerance, atol=tolerance)


def expected_of(rule: Rule, case: Case, before: Operands) -> Expected:
    grad, *states = (to_numpy(tensor) for tensor in before)
    return rule.oracle(grad, *states, **case)


def assert_within(got: Tensor, expected: Value, arithmetic: torch.dtype, label: str) -> None:
    """Assert an error within that of the arithmetic, plus one rounding to a shorter type."""
    found, (wanted, size) = to_numpy(got), expected
    assert found.shape == wanted.shape, f"{label}: shape {found.shape}, not {wanted.shape}"
    with np.errstate(all="ignore"):
        bound = _UNITS[arithmetic] * size
        error = np.where(found == wanted, 0.0, np.abs(found - wanted))
        if _FORMATS[got.dtype][0] < _FORMATS[arithmetic][0]:
            # A finite number may round to infinity.
            can_overflow = np.abs(wanted) + bound >= overflow_threshold(got.dtype)
            has_overflowed = np.isinf(found) & (np.sign(found) == np.sign(wanted))
            error = np.where(has_overflowed & can_overflow, 0.0, error)
            bound = bound + ulp(np.where(np.isfinite(found), found, 0.0), got.dtype) / 2
        is_right = (error <= bound) | (np.isnan(found) & np.isnan(wanted))
        if is_right.all():
            return
        excess = np.where(is_right, -1.0, error / bound)
        excess = np.where(np.isnan(excess), np.inf, excess)
    worst = tuple(int(i) for i in np.unravel_index(np.argmax(excess), excess.shape))
    raise AssertionError(
        f"{label} is wrong at {np.count_nonzero(~is_right)} of {is_right.size} elements. Worst at"
        f" index {worst}: got {float(found[worst])!r}, wanted {float(wanted[worst])!r}, error"
        f" {error[worst]:.3g} = {excess[worst]:.3g} times the bound {bound[worst]:.3g}"
    )


def _with_open_signs(got: Tensor, expected: Expected, arithmetic: torch.dtype) -> Value:
    """The expected signs; where the float64 value is too close to 0, any sign is accepted."""
    assert expected.before_sign is not None
    value, size = expected.before_sign
    with np.errstate(all="ignore"):
        error = _UNITS[arithmetic] * size
        is_certain = (np.abs(value) > error) | (error == 0) | ~np.isfinite(value)
    any_sign = np.sign(to_numpy(got)) * expected.scale
    update = np.where(is_certain, expected.update.value, any_sign)
    return Value(update, np.where(is_certain, expected.update.size, np.abs(any_sign)))


def assert_close_to_oracle(
    rule: Rule,
    case: Case,
    before: Operands,
    update: Tensor,
    states: Sequence[Tensor],
    label: str = "",
) -> None:
    """Assert that the update and every state agree with the float64 formula applied to `before`."""
    expected = expected_of(rule, case, before)
    arithmetic = arithmetic_dtype(before.dtypes)
    label = f"{rule} {label} {dict(case)}"
    wanted = expected.update
    if expected.before_sign is not None:
        wanted = _with_open_signs(update, expected, arithmetic)
    assert_within(update, wanted, arithmetic, f"{label}: update ({update.dtype})")
    for name, state, value in zip(rule.states, states, expected.states, strict=True):
        assert_within(state, value, arithmetic, f"{label}: {name} ({state.dtype})")


def has_equal_bits(a: Tensor, b: Tensor) -> Tensor:
    """Where two tensors have the same bits, or both have a NaN."""
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[a.element_size()]
    bits_a, bits_b = (t.detach().contiguous().view(integer) for t in (a, b))
    return (bits_a == bits_b) | (a.isnan() & b.isnan())


def assert_equal_bits(got: Tensor, wanted: Tensor, label: str) -> None:
    assert got.dtype == wanted.dtype, f"{label}: {got.dtype}, not {wanted.dtype}"
    assert got.shape == wanted.shape, f"{label}: {tuple(got.shape)}, not {tuple(wanted.shape)}"
    same = has_equal_bits(got, wanted)
    if bool(same.all()):
        return
    index = tuple((~same).nonzero()[0].tolist())
    raise AssertionError(
        f"{label} differs at {int((~same).sum())} of {same.numel()} elements. First at index"
        f" {index}: got {got[index].item()!r}, wanted {wanted[index].item()!r}"
    )


def assert_equal_results(
    rule: Rule,
    got: tuple[Tensor, Operands],
    wanted: tuple[Tensor, Operands],
    label: str = "",
) -> None:
    """Assert that two calls, each as (update, operands), have the same bits."""
    (update, operands), (wanted_update, wanted_operands) = got, wanted
    assert_equal_bits(update, wanted_update, f"{rule} {label}: update")
    for name, state, other in zip(
        rule.states, operands.states, wanted_operands.states, strict=True
    ):
        assert_equal_bits(state, other, f"{rule} {label}: {name}")


def _surroundings(tensor: Tensor, contents: Tensor) -> Tensor | None:
    """A copy of the buffer under a view, with `contents` in place of the view."""
    base = tensor._base
    if base is None or 0 in tensor.stride():
        return None
    buffer = base.detach().clone()
    view = buffer.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    view.copy_(contents)
    return buffer


def check_call(
    rule: Rule,
    case: Case,
    operands: Operands | Sequence[Operands],
    out: Any = None,
    label: str = "",
) -> Any:
    """Call a rule, check all that holds for every call, and return the updates."""
    is_single = isinstance(operands, Operands)
    positions: Sequence[Operands] = [operands] if isinstance(operands, Operands) else operands
    outs: Sequence[Tensor | None] = [None] * len(positions)
    if out is not None:
        outs = [out] if is_single else out
    before = [position.clone() for position in positions]
    buffers = [
        [_surroundings(t, b) for t, b in zip(p, q, strict=True)]
        for p, q in zip(positions, before, strict=True)
    ]
    returned = call(rule, case, operands, out)
    if out is not None:
        assert returned is out
    elif not is_single:
        assert type(returned) is list
    updates = [returned] if is_single else returned
    assert len(updates) == len(positions)
    for i, (position, old) in enumerate(zip(positions, before, strict=True)):
        update, given = updates[i], outs[i]
        where = label if is_single else f"{label}[{i}]"
        where += f" shape {tuple(position.grad.shape)}"
        if given is None:
            assert update.dtype == position.update_dtype
            assert update.shape == position.grad.shape
            assert update.stride() == torch.empty_like(position.model).stride()
        if given is not position.grad:
            assert_equal_bits(position.grad, old.grad, f"{rule} {where}: grad")
        assert not update.requires_grad
        assert_close_to_oracle(rule, case, old, update, position.states, where)
        for tensor, contents, buffer in zip(position, old, buffers[i], strict=True):
            if buffer is not None and tensor is not given:
                after = _surroundings(tensor, contents)
                assert after is not None
                assert_equal_bits(after, buffer, f"{rule} {where}: memory around an operand")
    return returned


# ---- other processes -----------------------------------------------------------------------------


def without_torchs_own(written: str) -> list[str]:
    """Return the lines of a process, except those of a CUDA build of torch without a GPU."""
    return [line for line in written.splitlines() if "No CUDA runtime is found" not in line]


def run_python(
    code: str, package: Path | None = None, **environment: str
) -> "subprocess.CompletedProcess[str]":
    """Run code in a fresh interpreter that finds the tests, and the package or a copy of it."""
    path = [str(package or Path(emerging_optimizers.__file__).parent.parent)]
    path += [str(Path(__file__).parent)]
    # A copy takes precedence over the path.
    folder = package or Path.cwd()
    return interpreters.run(code, folder, os.pathsep.join(path), {**os.environ, **environment})
