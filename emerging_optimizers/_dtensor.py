"""DTensors: each process updates its local tensors, by one call of the operator.

``torch.distributed`` takes a second to import, so it is used only where it is already imported.
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
    """Return whether DTensors can exist: whether their module is imported."""
    return _MODULE in sys.modules


def is_dtensor(tensor: Any) -> bool:
    if type(tensor) in PLAIN_TYPES:
        return False
    module = sys.modules.get(_MODULE)
    return module is not None and isinstance(tensor, module.DTensor)


def whole(value: Any) -> Any:
    """Return a DTensor as its full tensor; anything else as it is."""
    return value.full_tensor() if isinstance(value, Tensor) and is_dtensor(value) else value  # type: ignore[attr-defined]


def reduced(grads: Any) -> Any:
    """Return gradients without partial sums, for updates that are placed like them."""
    if not are_imported():
        return grads
    if isinstance(grads, (list, tuple)):
        return [reduced(grad) for grad in grads]
    if not is_dtensor(grads) or not any(p.is_partial() for p in grads.placements):
        return grads
    replicate = sys.modules[_MODULE].Replicate()
    placements = [replicate if p.is_partial() else p for p in grads.placements]
    return grads.redistribute(placements=placements)


def register(operator: Any, function: Callable[..., None]) -> None:
    """Call ``function``, with the operator's arguments, where an argument is a DTensor.

    A sharding strategy, PyTorch's other mechanism, would turn each error into a RuntimeError, and
    refuse lists that also have ordinary tensors.
    """

    def dispatch(cls: type, called: Any, types: Any, args: Any, kwargs: Any = None) -> None:
        function(*args, **(kwargs or {}))

    torch.library.register_torch_dispatch(operator, sys.modules[_MODULE].DTensor, dispatch)


@torch.no_grad()
def local_operands(operands: Sequence[Operand]) -> list[Operand]:
    """Check DTensors, and return the operands with the local tensors instead of them.

    Gradients are redistributed to the placements of their states. Processes communicate for nothing
    else, and only after each of them has found that all DTensors fit.

    Args:
        operands: The gradients, the states, then the updates.
    """
    _checks.check_lengths(operands)
    dtensor = sys.modules[_MODULE].DTensor
    lists: list[list[Any]] = [list(operand.tensors) for operand in operands]
    positions = []
    for i, tensors in enumerate(zip(*lists, strict=True)):
        are_dtensors = [isinstance(tensor, dtensor) for tensor in tensors]
        if any(are_dtensors):
            if not all(are_dtensors):
                _refuse_kinds(operands, i)
            _check_position(operands, i)
            positions.append(i)
    grads, states = lists[:2]
    for i in positions:
        if grads[i].placements != states[i].placements:
            grads[i] = grads[i].redistribute(placements=states[i].placements)
        for column in lists:
            column[i] = column[i].to_local()
    return [o._replace(tensors=column) for o, column in zip(operands, lists, strict=True)]


def increment_versions(tensors: Iterable[Tensor]) -> None:
    """Increment the version counters of DTensors whose local tensors were modified."""
    torch.autograd.graph.increment_version(filter(is_dtensor, tensors))


def _refuse_kinds(operands: Sequence[Operand], position: int) -> None:
    grad_kind, *kinds = (
        "DTensor" if is_dtensor(operand.tensors[position]) else "Tensor" for operand in operands
    )
    for operand, kind in zip(operands[1:], kinds, strict=True):
        if kind != grad_kind:
            raise TypeError(
                f"{operand.at(position)} is a {kind} but {operands[0].at(position)} is a"
                f" {grad_kind}; pass all of a position as DTensors, or none"
            )


def _check_position(operands: Sequence[Operand], position: int) -> None:
    """Raise for DTensors that differ. Dtypes and layouts are checked later, on local tensors."""
    grads, states = operands[:2]
    grad: Any = grads.tensors[position]
    state: Any = states.tensors[position]
    mesh, placements = grad.device_mesh, state.placements
    if any(placement.is_partial() for placement in placements):
        raise ValueError(
            f"{states.at(position)} has placements {placements}; what is modified in place must be"
            " sharded or replicated"
        )
    for operand in operands[1:]:
        tensor: Any = operand.tensors[position]
        if tensor.device_mesh != mesh:
            raise ValueError(
                f"{operand.at(position)} is on {tensor.device_mesh} but {grads.at(position)} is on"
                f" {mesh}"
            )
        _checks.check_shape(operand, position, grads)
        if tensor.placements != placements:
            raise ValueError(
                f"{operand.at(position)} has placements {tensor.placements} but"
                f" {states.at(position)} has placements {placements}"
            )
