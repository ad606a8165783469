"""Scalar states: numbers that an optimizer carries from step to step, one for each parameter.

They are 0-dim float32 tensors beside a parameter's step counter, and lie on its device. A rule that
a user wrote may have some.
"""

import ctypes
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ._checks import Operand, dtype_text, has_no_memory, layout_text
from ._dtensor import is_dtensor
from ._overlap import find_sharing, memory_of
from ._values import is_recording, read

# ---- of calls ------------------------------------------------------------------------------------


def check_kinds(scalars: dict[str, Any]) -> dict[str, Tensor]:
    """Return the scalar states of a call; raise for what is none."""
    for name, value in scalars.items():
        _check_kind(name, value)
    return scalars


def _check_kind(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a 0-dim tensor of dtype float32, not {type(value).__name__}"
        )
    if is_dtensor(value):
        raise TypeError(f"{name} is a DTensor; expected a plain tensor, the same on all processes")
    if value.layout != torch.strided or value.is_nested:
        raise TypeError(
            f"{name} has layout {layout_text(value)}; expected a strided (dense) tensor"
        )
    if not torch.compiler.is_compiling() and value.is_neg():
        raise RuntimeError(f"{name} is a lazily negated view; pass resolve_neg() of it")
    if value.dim() != 0 or value.dtype != torch.float32:
        raise TypeError(
            f"{name} is a tensor of dtype {dtype_text(value.dtype)} with {value.dim()} dimensions;"
            " expected a 0-dim tensor of dtype float32"
        )


def check_arguments(
    scalars: Mapping[str, Tensor], operands: Sequence[Operand], step: Tensor | None
) -> None:
    """Raise for scalar states of a call that are on other devices, or share memory."""
    grads = operands[0]
    names = list(scalars)
    for name, tensor in scalars.items():
        _check_kind(name, tensor)
        for position, grad in enumerate(grads.tensors):
            if tensor.device != grad.device and not tensor.is_cpu:
                error = ValueError if tensor.is_meta == grad.is_meta else TypeError
                raise error(
                    f"{name} is on {tensor.device} but {grads.at(position)} is on {grad.device}"
                )
        if not torch.compiler.is_compiling() and has_no_memory(tensor):
            raise ValueError(f"{name} has no memory: its storage was resized to 0")
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"{name} is an inference tensor, which cannot be modified outside of inference mode"
            )
        first = scalars[names[0]]
        if tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device} but {names[0]} is on {first.device}")
        if step is not None and tensor.is_cpu and not step.is_cpu:
            raise ValueError(
                f"{name} is on {tensor.device} but step is on {step.device}; move it there, since"
                " its new value may depend on the step"
            )
    if scalars and not torch.compiler.is_compiling():
        others = [tensor for operand in operands for tensor in operand.tensors]
        _check_memory(scalars, others if step is None else [*others, step])


def _check_memory(scalars: Mapping[str, Tensor], others: Iterable[Tensor]) -> None:
    tensors = [*scalars.values(), *others]
    found = [memory_of(tensor) for tensor in tensors]
    used = [(memory, i < len(scalars)) for i, memory in enumerate(found) if memory is not None]
    names = [name for name, memory in zip(scalars, found, strict=False) if memory is not None]
    for i, _, _ in find_sharing(used):
        if i < len(names):
            raise ValueError(
                f"{names[i]} shares memory with another tensor of the call, and is modified in"
                " place; give it separate memory (.clone())"
            )


def read_scalar(tensor: Tensor, otherwise: float) -> Any:
    """Return the value of a scalar state for a formula; `otherwise` if it has none."""
    # A graph must not contain the value that it is recorded with.
    return tensor.item() if is_recording() else read(tensor, otherwise)


def write_scalar(tensor: Tensor, number: Any) -> None:
    """Set a scalar state to what a formula returned."""
    tensor.fill_(number if is_recording() else as_float32(number))


# ---- of optimizers -------------------------------------------------------------------------------


def check_scalar(name: str, value: Any) -> None:
    """Raise for anything but one real number, a number or a tensor."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"state {name!r} has {value.numel()} elements; expected 1")
        is_real = value.is_floating_point() and value.layout == torch.strided
        if not is_real or is_dtensor(value):
            raise TypeError(
                f"state {name!r} must be one floating-point number, not a {type(value).__name__}"
                f" of dtype {value.dtype} and layout {value.layout}"
            )
    elif isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"state {name!r} must be a number, not {type(value).__name__}")
    else:
        try:
            float(value)
        except OverflowError:
            raise ValueError(f"state {name!r} is an int beyond the range of a float") from None


def as_float32(number: Any) -> float:
    """Round a number to float32: beyond its range, to infinity."""
    return ctypes.c_float(number).value
