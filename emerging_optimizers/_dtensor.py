"""DTensors: an update of each process's own parts, by one call of the operator on them.

``torch.distributed`` takes a second to import, so that is done only where someone else has.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _checks
from ._checks import Operand
from ._values import PLAIN_TYPES

_MODULE = "torch.distributed.tensor"


def are_imported() -> bool:
    """Return whether there can be any DTensors."""
    return _MODULE in sys.modules


def is_dtensor(tensor: Any) -> bool:
    if type(tensor) in PLAIN_TYPES:
        return False
    module = sys.modules.get(_MODULE)
    return module is not None and isinstance(tensor, module.DTensor)


def whole(value: Any) -> Any:
    """Return a DTensor as the tensor that all processes have parts of; anything else as it is."""
    return value.full_tensor() if isinstance(value, Tensor) and is_dtensor(value) else value  # type: ignore[attr-defined]


def register(operator: Any, function: Callable[..., None]) -> None:
    """Let ``function``, with the operator's arguments, do what it does with DTensors.

    A sharding strategy, PyTorch's other way to say this, would have users see each error as a
    RuntimeError, and lists with tensors that are no DTensors refused.
    """

    def dispatch(cls: type, called: Any, types: Any, args: Any, kwargs: Any = None) -> None:
        function(*args, **(kwargs or {}))

    torch.library.register_torch_dispatch(operator, sys.modules[_MODULE].DTensor, dispatch)


@torch.no_grad()
def parts_of(operands: Sequence[Operand], single: bool) -> list[Operand]:
    """Return the operands with this process's parts in place of DTensors, after checking those.

    Gradients are redistributed to where their states are. Processes communicate for nothing else,
    and only after each of them has found that all DTensors fit.

    Args:
        operands: The gradients, the states, then the updates.
        single: Messages are about a call on single tensors.
    """
    _checks.check_lengths(operands, single)
    dtensor = sys.modules[_MODULE].DTensor
    lists: list[list[Any]] = [list(operand.tensors) for operand in operands]
    positions = []
    for i, tensors in enumerate(zip(*lists, strict=True)):
        are_dtensors = [isinstance(tensor, dtensor) for tensor in tensors]
        if any(are_dtensors):
            if not all(are_dtensors):
                _refuse_kinds(operands, i, single)
            _check_position(operands, i, single)
            positions.append(i)
    grads, states = lists[:2]
    for i in positions:
        if grads[i].placements != states[i].placements:
            grads[i] = grads[i].redistribute(placements=states[i].placements)
        for parts in lists:
            parts[i] = parts[i].to_local()
    return [operand._replace(tensors=parts) for operand, parts in zip(operands, lists, strict=True)]


def increment_versions(tensors: Iterable[Tensor]) -> None:
    """Tell autograd of the DTensors whose parts are modified: each has its own version counter."""
    torch.autograd.graph.increment_version(filter(is_dtensor, tensors))


def _refuse_kinds(operands: Sequence[Operand], position: int, single: bool) -> None:
    grad_kind, *kinds = (
        "DTensor" if is_dtensor(operand.tensors[position]) else "Tensor" for operand in operands
    )
    for operand, kind in zip(operands[1:], kinds, strict=True):
        if kind != grad_kind:
            raise TypeError(
                f"{_checks.position_name(operand.name, position, single)} is a {kind} but"
                f" {_checks.position_name('grad', position, single)} is a {grad_kind}; pass all of"
                " a position as DTensors, or none"
            )


def _check_position(operands: Sequence[Operand], position: int, single: bool) -> None:
    """Raise for DTensors that differ. Their dtypes and layouts are checked as their parts' are."""

    def name(operand: Operand) -> str:
        return _checks.position_name(operand.name, position, single)

    grads, states = operands[:2]
    grad: Any = grads.tensors[position]
    state: Any = states.tensors[position]
    mesh, placements = grad.device_mesh, state.placements
    if any(placement.is_partial() for placement in placements):
        raise ValueError(
            f"{name(states)} has placements {placements}; what is modified in place must be"
            " sharded or replicated"
        )
    for operand in operands[1:]:
        tensor: Any = operand.tensors[position]
        if tensor.device_mesh != mesh:
            raise ValueError(
                f"{name(operand)} is on {tensor.device_mesh} but {name(grads)} is on {mesh}"
            )
        _checks.check_shape(operand, position, grads, single)
        if tensor.placements != placements:
            raise ValueError(
                f"{name(operand)} has placements {tensor.placements} but {name(states)} has"
                f" placements {placements}"
            )
