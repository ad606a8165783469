"""Checks of tensors, for calls that the native kernels do not check.

These are calls on devices without native kernels, and all calls if nothing is compiled. The
messages are those of the native checks; one table of tests compares the two.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _overlap
from ._values import items_of

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def dtype_text(dtype: torch.dtype) -> str:
    """Return a dtype's name as the native errors have it."""
    return str(dtype).removeprefix("torch.")


class Operand(NamedTuple):
    """One tensor argument: a single tensor, or a list of them.

    Attributes:
        name: The name of the single form: ``exp_avg``, also for ``exp_avgs``.
        tensors: The tensors; one where a single tensor was passed.
        is_single: Whether a single tensor was passed.
        in_place: Whether the tensors are modified.
    """

    name: str
    tensors: Sequence[Tensor]
    is_single: bool
    in_place: bool

    @property
    def label(self) -> str:
        """The argument in messages: ``exp_avg`` for a tensor, ``exp_avgs`` for a list."""
        return self.name if self.is_single or self.name == "out" else f"{self.name}s"

    def at(self, position: int) -> str:
        """Return the tensor's name in messages: ``exp_avg``, or ``exp_avgs[3]`` in a list."""
        return self.name if self.is_single else f"{self.label}[{position}]"


def read_operand(name: str, value: Any, grads: Operand | None = None) -> Operand:
    """Return the operand that a user passed.

    Args:
        name: The name of the single form.
        value: A tensor or a sequence of tensors.
        grads: The gradients, which the operand must match. None: these are the gradients.
    """
    in_place = grads is not None
    if isinstance(value, Tensor):
        operand = Operand(name, [value], True, in_place)
    else:
        items = items_of(value)
        if items is None:
            raise TypeError(
                f"{name} must be a Tensor or a sequence of Tensors, not {type(value).__name__}"
            )
        operand = Operand(name, list(items), False, in_place)
        for position, tensor in enumerate(operand.tensors):
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"{operand.at(position)} must be a Tensor, not {type(tensor).__name__}"
                )
    if grads is not None:
        _check_same_kind(operand, grads)
        _check_length(operand, grads)
    return operand


def check_operands(operands: Sequence[Operand], use_shape_scaling: bool) -> None:
    """Raise for tensors that no rule can update. The gradients come first."""
    check_lengths(operands)
    grads = operands[0]
    for position in range(len(grads.tensors)):
        _check_position(operands, position)
        grad = grads.tensors[position]
        if grad.is_meta != grads.tensors[0].is_meta:
            _check_device(grads, position, grads, 0)
        if use_shape_scaling:
            check_is_matrix(grads, position)
    if not torch.compiler.is_compiling():
        _check_aliases(operands)


def check_step_device(step: Tensor, grads: Operand) -> None:
    """Raise for a step without a value, on the meta device, if the gradients have values."""
    if grads.tensors and step.is_meta and not grads.tensors[0].is_meta:
        raise TypeError(f"step is on meta but {grads.at(0)} is on {grads.tensors[0].device}")


def _check_same_kind(operand: Operand, grads: Operand) -> None:
    if operand.is_single != grads.is_single:
        kind, grad_kind = (
            "a single Tensor" if o.is_single else "a sequence" for o in (operand, grads)
        )
        raise ValueError(
            f"{operand.name} is {kind} but grad is {grad_kind}; pass all of them as Tensors, or"
            " all as sequences of Tensors"
        )


def check_lengths(operands: Sequence[Operand]) -> None:
    """Raise for lists that differ in length from the gradients."""
    for operand in operands:
        _check_length(operand, operands[0])


def _check_length(operand: Operand, grads: Operand) -> None:
    if len(operand.tensors) != len(grads.tensors):
        raise ValueError(
            f"{operand.label} has {len(operand.tensors)} tensors but {grads.label} has"
            f" {len(grads.tensors)}"
        )


def check_is_matrix(grads: Operand, position: int) -> None:
    """Raise for a gradient that ``use_shape_scaling`` cannot scale."""
    num_dimensions = grads.tensors[position].dim()
    if num_dimensions != 2:
        raise ValueError(
            f"{grads.at(position)} has {num_dimensions} dimensions; use_shape_scaling needs 2"
        )


def layout_text(tensor: Tensor) -> str:
    """Return a tensor's layout as the native errors name it."""
    return "nested" if tensor.is_nested else _LAYOUTS.get(tensor.layout, str(tensor.layout))


def check_storage(operand: Operand, position: int) -> None:
    """Raise for an unsupported layout or dtype."""
    tensor, name = operand.tensors[position], operand.at(position)
    if tensor.layout != torch.strided or tensor.is_nested:
        raise TypeError(
            f"{name} has layout {layout_text(tensor)}; expected a strided (dense) tensor"
        )
    if tensor.dtype not in DTYPES:
        raise TypeError(
            f"{name} has dtype {dtype_text(tensor.dtype)}; expected float32, float64, bfloat16 or"
            " float16"
        )


_LAYOUTS = {
    torch.sparse_coo: "Sparse",
    torch.sparse_csr: "SparseCsr",
    torch.sparse_csc: "SparseCsc",
    torch.sparse_bsr: "SparseBsr",
    torch.sparse_bsc: "SparseBsc",
}


def _check_device(operand: Operand, position: int, other: Operand, other_position: int) -> None:
    tensor, beside = operand.tensors[position], other.tensors[other_position]
    if tensor.device != beside.device:
        error = ValueError if tensor.is_meta == beside.is_meta else TypeError
        raise error(
            f"{operand.at(position)} is on {tensor.device} but {other.at(other_position)} is on"
            f" {beside.device}"
        )


def _check_position(operands: Sequence[Operand], position: int) -> None:
    for operand in operands:
        check_storage(operand, position)
    for operand in operands:
        tensor = operand.tensors[position]
        name = operand.at(position)
        _check_device(operand, position, operands[0], position)
        check_shape(operand, position, operands[0])
        if not torch.compiler.is_compiling() and has_no_memory(tensor):
            raise ValueError(f"{name} has no memory: its storage was resized to 0")
        if operand.in_place and tensor.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"{name} is an inference tensor, which cannot be modified outside of inference mode"
            )
        if operand.in_place:
            _check_self_overlap(name, tensor)


def check_shape(operand: Operand, position: int, grads: Operand) -> None:
    """Raise for a shape other than the gradient's."""
    shape, grad_shape = operand.tensors[position].shape, grads.tensors[position].shape
    if shape != grad_shape:
        raise ValueError(
            f"{operand.at(position)} has shape {tuple(shape)} but {grads.at(position)} has shape"
            f" {tuple(grad_shape)}"
        )


def has_no_memory(tensor: Tensor) -> bool:
    # On other devices, a tensor may have no storage.
    if tensor.device.type not in ("cpu", "cuda") or tensor.numel() == 0:
        return False
    # The address comes first: a storage's Python object, once made, lives as long as the storage.
    return not _overlap.address_of(tensor) and tensor.untyped_storage().nbytes() == 0


def _check_self_overlap(name: str, tensor: Tensor) -> None:
    """Raise for a tensor in which two indices share an element."""
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


def _check_aliases(operands: Sequence[Operand]) -> None:
    """Raise if a modified tensor shares memory with another. An update may be its gradient."""
    # The order in which messages name operands: modified ones first, and the update before states.
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
        operand.at(position) for operand, position in (places[index] for index in indices)
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
    """Return whether the two are an update and its gradient, with equal memory layouts."""
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
