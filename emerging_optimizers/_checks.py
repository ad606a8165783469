"""The native kernels' checks of tensors, for the calls that those do not see.

These are the calls on devices without native kernels, and all calls where nothing was compiled. The
messages are the same; one table of tests holds the two together.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _overlap
from ._values import items_of

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _dtype_text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Operand(NamedTuple):
    """One tensor argument: a list, named as its single form is."""

    name: str
    tensors: Sequence[Tensor]
    in_place: bool


def list_name(name: str, single: bool) -> str:
    """Spell the argument's name: ``exp_avg`` for a tensor, ``exp_avgs`` for a list."""
    return name if single or name == "out" else f"{name}s"


def position_name(name: str, position: int, single: bool) -> str:
    """Spell the name of what is at a position: ``exp_avg``, or ``exp_avgs[3]`` of a list."""
    return name if single else f"{list_name(name, single)}[{position}]"


def check_operands(operands: Sequence[Operand], single: bool, use_shape_scaling: bool) -> None:
    """Raise for tensors that no rule can be applied to. The gradient comes first."""
    check_lengths(operands, single)
    grads = operands[0]
    for position in range(len(grads.tensors)):
        _check_position(operands, position, single)
        grad = grads.tensors[position]
        if grad.is_meta != grads.tensors[0].is_meta:
            _check_device(grads, position, grads, 0, single)
        if use_shape_scaling:
            check_is_matrix(grads, position, single)
    if not torch.compiler.is_compiling():
        _check_aliases(operands, single)


def check_step_device(step: Tensor, grads: Operand, single: bool) -> None:
    """Raise for a step on the meta device, which has no value, beside gradients with values."""
    if grads.tensors and step.is_meta and not grads.tensors[0].is_meta:
        raise TypeError(
            f"step is on meta but {position_name(grads.name, 0, single)} is on"
            f" {grads.tensors[0].device}"
        )


def check_lengths(operands: Sequence[Operand], single: bool) -> None:
    """Raise for lists that are not as long as the gradients'."""
    grads = operands[0]
    for operand in operands:
        if len(operand.tensors) != len(grads.tensors):
            raise ValueError(
                f"{list_name(operand.name, single)} has {len(operand.tensors)} tensors but"
                f" {list_name(grads.name, single)} has {len(grads.tensors)}"
            )


def check_is_matrix(grads: Operand, position: int, single: bool) -> None:
    """Raise for a gradient whose update has no shape to be scaled by."""
    num_dimensions = grads.tensors[position].dim()
    if num_dimensions != 2:
        raise ValueError(
            f"{position_name(grads.name, position, single)} has {num_dimensions} dimensions;"
            " use_shape_scaling needs 2"
        )


def check_storage(name: str, tensor: Tensor, position: int, single: bool) -> None:
    """Raise for a layout or a dtype that cannot be computed with."""
    name = position_name(name, position, single)
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else _LAYOUTS.get(tensor.layout, str(tensor.layout))
        raise TypeError(f"{name} has layout {layout}; expected a strided (dense) tensor")
    if tensor.dtype not in DTYPES:
        raise TypeError(
            f"{name} has dtype {_dtype_text(tensor.dtype)}; expected float32, float64, bfloat16 or"
            " float16"
        )


_LAYOUTS = {
    torch.sparse_coo: "Sparse",
    torch.sparse_csr: "SparseCsr",
    torch.sparse_csc: "SparseCsc",
    torch.sparse_bsr: "SparseBsr",
    torch.sparse_bsc: "SparseBsc",
}


def _check_device(
    operand: Operand, position: int, other: Operand, other_position: int, single: bool
) -> None:
    tensor, beside = operand.tensors[position], other.tensors[other_position]
    if tensor.device != beside.device:
        error = ValueError if tensor.is_meta == beside.is_meta else TypeError
        raise error(
            f"{position_name(operand.name, position, single)} is on {tensor.device} but"
            f" {position_name(other.name, other_position, single)} is on {beside.device}"
        )


def _check_position(operands: Sequence[Operand], position: int, single: bool) -> None:
    for operand in operands:
        check_storage(operand.name, operand.tensors[position], position, single)
    for operand in operands:
        tensor = operand.tensors[position]
        name = position_name(operand.name, position, single)
        _check_device(operand, position, operands[0], position, single)
        check_shape(operand, position, operands[0], single)
        if not torch.compiler.is_compiling() and has_no_memory(tensor):
            raise ValueError(f"{name} has no memory: its storage was resized to 0")
        if operand.in_place and tensor.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"{name} is an inference tensor, which cannot be modified outside of inference mode"
            )
        if operand.in_place:
            _check_self_overlap(name, tensor)


def check_shape(operand: Operand, position: int, grads: Operand, single: bool) -> None:
    """Raise for a shape that is not the gradient's."""
    shape, grad_shape = operand.tensors[position].shape, grads.tensors[position].shape
    if shape != grad_shape:
        raise ValueError(
            f"{position_name(operand.name, position, single)} has shape {tuple(shape)} but"
            f" {position_name(grads.name, position, single)} has shape {tuple(grad_shape)}"
        )


def has_no_memory(tensor: Tensor) -> bool:
    # Of other devices, tensors need not have a storage that could be looked at.
    if tensor.device.type not in ("cpu", "cuda") or tensor.numel() == 0:
        return False
    # Where there is an address, no object is made of the storage: it would stay as long as that.
    return not _overlap.address_of(tensor) and tensor.untyped_storage().nbytes() == 0


def _check_self_overlap(name: str, tensor: Tensor) -> None:
    """Raise for a tensor of which two indices are one element."""
    if tensor.is_contiguous():
        return
    overlaps = _overlap.overlaps_itself(tensor)
    layout = f"shape {tuple(tensor.shape)} and strides {tensor.stride()}"
    if overlaps is None:
        raise ValueError(
            f"cannot tell whether {name} overlaps itself in memory: it has {layout}; pass a copy of"
            " it (.clone())"
        )
    if overlaps:
        raise ValueError(
            f"{name} overlaps itself in memory (an expanded tensor, with {layout}), so it cannot be"
            " modified in place; pass a copy of it (.clone())"
        )


def _check_aliases(operands: Sequence[Operand], single: bool) -> None:
    """Raise where what is modified shares memory with another operand, but as an update may."""
    # In the order in which messages name two of them: first what is modified, the update first.
    modified = sorted((o for o in operands if o.in_place), key=lambda o: o.name != "out")
    read = [operand for operand in operands if not operand.in_place]
    places, used = [], []
    for lists in (modified, read):
        for position in range(len(operands[0].tensors)):
            for operand in lists:
                memory = _overlap.memory_of(operand.tensors[position])
                if memory is not None:
                    places.append((operand, position))
                    used.append((memory, operand.in_place))
    worst = None
    for first, second, is_certain in _overlap.find_sharing(used):
        if not _is_own_update(places[first], places[second]):
            pair = (not is_certain, second, first)
            worst = pair if worst is None else min(pair, worst)
    if worst is None:
        return
    is_uncertain, *indices = worst
    second_name, first_name = (
        position_name(operand.name, position, single)
        for operand, position in (places[index] for index in indices)
    )
    if is_uncertain:
        raise ValueError(
            f"cannot tell whether {second_name} shares memory with {first_name}, and {first_name}"
            " is modified in place; pass contiguous tensors"
        )
    raise ValueError(
        f"{second_name} shares memory with {first_name}, and {first_name} is modified in place;"
        " pass a different tensor for each (only `out` may be `grad`)"
    )


def _is_own_update(first: tuple[Operand, int], second: tuple[Operand, int]) -> bool:
    """Return whether the two are an update and its gradient, and one view."""
    if (first[0].name, second[0].name) != ("out", "grad") or first[1] != second[1]:
        return False
    out, grad = (operand.tensors[position] for operand, position in (first, second))
    return (
        out.data_ptr() == grad.data_ptr()
        and out.dtype == grad.dtype
        and _strides_that_count(out) == _strides_that_count(grad)
    )


def _strides_that_count(tensor: Tensor) -> list[int]:
    pairs = zip(tensor.stride(), tensor.shape, strict=True)
    return [stride for stride, size in pairs if size > 1]


def read_tensors(name: str, value: Any) -> tuple[bool, list[Tensor]]:
    """Return whether a single tensor was passed, and the list of tensors."""
    if isinstance(value, Tensor):
        return True, [value]
    items = items_of(value)
    if items is None:
        raise TypeError(
            f"{name} must be a Tensor or a sequence of Tensors, not {type(value).__name__}"
        )
    tensors = list(items)
    for position, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{position_name(name, position, False)} must be a Tensor, not"
                f" {type(tensor).__name__}"
            )
    return False, tensors


def check_same_kind(grad_is_single: bool, name: str, is_single: bool) -> None:
    """Raise where a list is mixed with a single tensor."""
    if is_single != grad_is_single:
        this, grad = (
            "a single Tensor" if single else "a sequence" for single in (is_single, grad_is_single)
        )
        raise ValueError(
            f"{name} is {this} but grad is {grad}; pass all of them as Tensors, or all as sequences"
            " of Tensors"
        )
