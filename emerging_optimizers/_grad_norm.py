"""Sums of the powers of gradients' elements, over tensors, devices and processes.

The norm of order p is the p-th root of the sum of `|g|^p`. Sums are float64.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ._dtensor import is_dtensor, reduced
from ._fallback_step import placed_like
from ._native import native
from ._values import PLAIN_TYPES, has_value

_NATIVE_ORDERS = (1.0, 2.0, math.inf)
_DOUBLES = (torch.float64, torch.complex128)
_PLAIN_TYPES = frozenset(PLAIN_TYPES)


class PowerSum(NamedTuple):
    """What a norm is the root of.

    Attributes:
        total: The sum of `|g|^p`; the largest `|g|` for p = inf, the smallest for -inf, and the
            number of elements that are not 0 for p = 0. A 0-dim float64 tensor on the first
            gradient's device, or on the CPU if that has no float64.
        is_double: Whether a gradient is float64 or complex128.
    """

    total: Tensor
    is_double: bool

    def root(self, order: float) -> Tensor:
        if order == 2.0:
            return self.total.sqrt()
        if order in (0.0, 1.0) or math.isinf(order):
            return self.total
        return self.total.pow(1.0 / order)


def power_sum(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None] | None,
    order: float,
    name_of: Callable[[int], str],
) -> PowerSum:
    """Return the sum over all gradients. Processes communicate for each mesh of DTensors.

    Args:
        params: The parameters.
        grads: Their gradients, if these are not in ``param.grad``.
        order: The norm's order.
        name_of: Names the parameter at an index, for errors.
    """
    if grads is None and native is not None and order in _NATIVE_ORDERS:
        # Without making Python objects of gradients. It leaves DTensors, even without a gradient.
        found = native.norm_sum(params, None, order)
        if found is not None:
            return PowerSum(*found)
    with torch.no_grad():
        if grads is None:
            grads = [param.grad for param in params]
        if _PLAIN_TYPES.issuperset(map(type, params)):
            return _sum_here([grad for grad in grads if grad is not None], order)
        return _sum_with_meshes(params, grads, order, name_of)


# ---- one process ---------------------------------------------------------------------------------


def _sum_here(grads: Sequence[Tensor], order: float) -> PowerSum:
    """Return the sum over tensors of this process."""
    if native is not None and order in _NATIVE_ORDERS:
        found = native.norm_sum(grads, grads, order)
        if found is not None:
            return PowerSum(*found)
    # It leaves some layouts, and some norms of complex numbers.
    is_double = any(grad.dtype in _DOUBLES for grad in grads)
    grads = [_as_real(grad, order) for grad in grads]
    if native is not None and order in _NATIVE_ORDERS:
        grads = [grad.contiguous() for grad in grads]
        found = native.norm_sum(grads, grads, order)
        if found is not None:
            return PowerSum(found[0], is_double)
    return PowerSum(_sum_by_operations(grads, order), is_double)


def _sum_by_operations(grads: Sequence[Tensor], order: float) -> Tensor:
    filled = [grad for grad in grads if grad.numel() != 0]
    if not filled:
        nothing = math.inf if order == -math.inf else 0.0
        device = grads[0].device if grads else "cpu"
        return torch.full((), nothing, dtype=torch.float64, device=device)
    norms = torch._foreach_norm(filled, order, torch.float64)
    device = norms[0].device
    if any(norm.device != device for norm in norms):
        norms = tuple(norm.to(device) for norm in norms)
    values = torch.stack(norms)
    if math.isinf(order):
        return values.amax() if order > 0 else values.amin()
    return values.sum() if order in (0.0, 1.0) else values.pow(order).sum()


def _as_real(grad: Tensor, order: float) -> Tensor:
    """Return a gradient's elements, or their absolute values, as a tensor of real numbers."""
    if grad.is_mps:
        grad = grad.cpu()  # there is no float64
    if grad.dtype.itemsize == 1 or not (grad.is_floating_point() or grad.is_complex()):
        grad = grad.double()  # PyTorch has no norms of float8; a step refuses integers by name
    if grad.layout is torch.strided and not grad.is_complex():
        return grad.resolve_neg() if grad.is_neg() else grad
    if grad.layout is not torch.strided:
        grad = (grad.coalesce() if grad.layout is torch.sparse_coo else grad).values()
    grad = grad.resolve_conj().resolve_neg()
    if not grad.is_complex():
        return grad
    if order == 2.0:  # the square of an absolute value is a sum of two squares
        return torch.view_as_real(grad)
    return grad.to(torch.complex128).abs()


# ---- several processes ---------------------------------------------------------------------------


class _OnMesh(NamedTuple):
    """The DTensors on one mesh, and the local tensors of those that have a gradient."""

    params: list[Any]
    local_grads: list[tuple[Any, Tensor]]


def _sum_with_meshes(
    params: Sequence[Any],
    grads: Sequence[Tensor | None],
    order: float,
    name_of: Callable[[int], str],
) -> PowerSum:
    present: list[Tensor] = []
    meshes: dict[Any, _OnMesh] = {}
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        if grad is not None and is_dtensor(param) != is_dtensor(grad):
            _refuse_kinds(param, grad, name_of(i))
        if not is_dtensor(param):
            if grad is not None:
                present.append(grad)
            continue
        on_mesh = meshes.setdefault(param.device_mesh, _OnMesh([], []))
        on_mesh.params.append(param)
        if grad is not None:
            grad = reduced(placed_like(grad, param))
            on_mesh.local_grads.append((grad, grad.to_local()))
    sums = [_sum_here(present, order)] if present or not meshes else []
    sums += [_sum_over(mesh, on_mesh, order) for mesh, on_mesh in meshes.items()]
    first = next((grad for grad in grads if grad is not None), None)
    device = sums[0].total.device if first is None or first.is_mps else first.device
    total = sums[0].total.to(device)
    for other in sums[1:]:
        total = _combine(total, other.total.to(device), order)
    return PowerSum(total, any(found.is_double for found in sums))


def _combine(a: Tensor, b: Tensor, order: float) -> Tensor:
    if math.isinf(order):
        return torch.maximum(a, b) if order > 0 else torch.minimum(a, b)
    return a + b


def _refuse_kinds(param: Any, grad: Any, name: str) -> NoReturn:
    kind, grad_kind = (
        "DTensor" if is_dtensor(tensor) else type(tensor).__name__ for tensor in (param, grad)
    )
    raise TypeError(f"{name} is a {kind} but its gradient is a {grad_kind}")


def _sum_over(mesh: Any, on_mesh: _OnMesh, order: float) -> PowerSum:
    """Return the sum over the DTensors of a mesh: the same bits on all of its processes."""
    coordinate = mesh.get_coordinate()
    # Replicas along a dimension are summed over only if another parameter is sharded along it.
    summed = [i for i in range(mesh.ndim) if any(_is_sharded(p, i) for p in on_mesh.params)]
    counted = [
        local
        for grad, local in on_mesh.local_grads
        if coordinate is not None
        and all(coordinate[i] == 0 or _is_sharded(grad, i) for i in summed)
    ]
    # Other processes may have other gradients.
    tensors = (*on_mesh.params, *(local for _, local in on_mesh.local_grads))
    is_double = any(tensor.dtype in _DOUBLES for tensor in tensors)
    total, _ = _sum_here(counted, order)
    if coordinate is not None and has_value(total):
        if total.device.type != mesh.device_type:
            total = total.to(mesh.device_type)
        for i in summed:
            total = _all_reduce(total, mesh.get_group(i), order)
    return PowerSum(total, is_double)


def _is_sharded(tensor: Any, mesh_dim: int) -> bool:
    return not tensor.placements[mesh_dim].is_replicate()


def _all_reduce(total: Tensor, group: Any, order: float) -> Tensor:
    if not math.isinf(order):
        torch.distributed.all_reduce(total, torch.distributed.ReduceOp.SUM, group)
        return total
    # The largest of several numbers may lose a NaN, so a flag is sent with them.
    sign = 1.0 if order > 0 else -1.0
    is_nan = total.isnan()
    pair = torch.stack([is_nan.double(), torch.where(is_nan, -math.inf, sign * total)])
    torch.distributed.all_reduce(pair, torch.distributed.ReduceOp.MAX, group)
    return torch.where(pair[0] > 0.0, math.nan, sign * pair[1])
