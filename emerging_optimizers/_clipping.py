"""Clipping by a coefficient, which a step applies to the gradients as it reads them."""

import inspect
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from ._base import BaseOptimizer, check_tensors, grads_of
from ._dtensor import whole
from ._grad_norm import PowerSum, power_sum
from ._hyperparameters import NonNegative, check_domain, read_number
from ._members import param_name
from ._values import HYPERPARAMETER, is_tracing, read

_is_compiling = torch.compiler.is_compiling


class Clipping(NamedTuple):
    """What :func:`clip_coefficient` returns.

    Attributes:
        total_norm: The norm of all gradients.
        coefficient: What the gradients are to be multiplied by.
    """

    total_norm: Tensor
    coefficient: Tensor


def clip_coefficient(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Clipping:
    r"""Return the norm of all gradients, and the coefficient that clips it to `max_norm`.

    .. math::
        \mathtt{coefficient} = \min\left(1,
            \frac{\mathtt{max\_norm}}{\mathtt{total\_norm} + 10^{-6}}\right)

    Takes the arguments of :func:`torch.nn.utils.clip_grad_norm_` except `foreach`, but does not
    modify gradients.
    Pass the coefficient to ``step(grad_multiplier=...)``, which multiplies each gradient on the
    fly. ``step(max_norm=...)`` does both, and is the one for gradients that are still scaled by a
    ``GradScaler``.

    Norms of order 1, 2 and infinity are native. Their sums are float64, in a fixed order: the bits
    do not depend on threads, instruction sets, alignment or the device. PyTorch operations compute
    other norms. On CUDA, the host does not wait. In a function that ``torch.compile`` compiles, the
    call is a graph break.

    The norm of DTensors is that of the full tensors. Processes communicate by one all-reduce for
    each mesh (for several, if parameters are sharded along several dimensions of it). All processes
    with parameters on a mesh must make the call, with or without gradients. A gradient that is
    placed otherwise than its parameter is redistributed first, as in a step; it must be there on
    all processes. Of ordinary tensors, such as the shards of FSDP1, each process counts its own.

    Args:
        parameters: A parameter, or an iterable of parameters. Their gradients may have any dtype
            and layout, and be on several devices. Parameters without a gradient are skipped.
        max_norm: The largest norm of the clipped gradients. A one-element tensor is read.
        norm_type: The order of the norm: a number, or "inf". 0 counts the elements that are not 0.
        error_if_nonfinite: Raise if the norm is NaN or infinite. This reads the norm: on CUDA, the
            host waits.

    Returns:
        ``(total_norm, coefficient)``, a named tuple of 0-dim tensors on the first gradient's
        device: float64 if a gradient is float64 or complex128, else float32. Both are computed in
        float64 and rounded once. The coefficient of a NaN is NaN; that of an infinite norm is 0,
        or tiny if only float32 overflows.

    Raises:
        TypeError: A parameter that is not a tensor, or an argument that is not a number.
        ValueError: A negative or NaN `max_norm`, or a NaN `norm_type`.
        RuntimeError: A norm that is not finite, with `error_if_nonfinite`.

    Example:
        >>> import torch
        >>> from emerging_optimizers import AdamW, clip_coefficient
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = AdamW([weight], lr=0.1)
        >>> weight.grad = torch.tensor([3.0, -4.0])
        >>> total_norm, coefficient = clip_coefficient([weight], max_norm=1.0)
        >>> total_norm, coefficient
        (tensor(5.), tensor(0.2000))
        >>> optimizer.step(grad_multiplier=coefficient)
        >>> weight.grad
        tensor([ 3., -4.])

    Reference:
        Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural networks",
        ICML 2013, https://arxiv.org/abs/1211.5063.
    """
    run = _between_graphs if _is_compiling() else _clip_coefficient
    return run(parameters, max_norm, norm_type, error_if_nonfinite)


def clip_for_step(
    optimizer: BaseOptimizer, max_norm: float, grad_multiplier: float | Tensor | None
) -> tuple[Tensor, float | Tensor]:
    """Return the norm of the gradients that a step uses, and the multiplier that clips them.

    Args:
        optimizer: The optimizer. A ``GradScaler`` may have set its ``grad_scale``.
        max_norm: The largest norm of the clipped gradients.
        grad_multiplier: Every gradient is multiplied by it, and then clipped.
    """
    max_norm = _read_max_norm(max_norm)
    groups = optimizer.param_groups
    params = [param for group in groups for param in group["params"]]
    grads = None
    if type(optimizer)._grad is not BaseOptimizer._grad:
        grads = [grad for group in groups for grad in grads_of(optimizer, group)]
    try:
        found = power_sum(params, grads, 2.0, lambda i: _name_in(optimizer, i))
    except (AttributeError, TypeError):
        for group in groups:
            check_tensors(optimizer, group)
        raise
    factor: float | Tensor = 1.0
    scale = getattr(optimizer, "grad_scale", None)
    if grad_multiplier is not None:
        grad_multiplier = _as_factor(grad_multiplier, found.total)
        if isinstance(grad_multiplier, Tensor):
            factor = grad_multiplier.abs()
        else:
            factor = abs(grad_multiplier)
    if scale is not None:
        factor = _divided(factor, _as_factor(whole(scale), found.total))
    norm, coefficient = _clip(found, 2.0, max_norm, factor)
    if grad_multiplier is None:
        return norm, coefficient
    if isinstance(grad_multiplier, Tensor) or not coefficient.is_cpu:
        return norm, coefficient.double() * grad_multiplier
    return norm, read(coefficient, HYPERPARAMETER) * grad_multiplier


# ---- the arguments -------------------------------------------------------------------------------


def _clip_coefficient(
    parameters: Any, max_norm: Any, norm_type: Any, error_if_nonfinite: bool
) -> Clipping:
    params = _as_list(parameters)
    max_norm = _read_max_norm(max_norm)
    order = math.inf if norm_type == "inf" else read_number("norm_type", norm_type)
    check_domain("norm_type", order, float)
    try:
        found = power_sum(params, None, order, lambda i: f"parameters[{i}]")
    except (AttributeError, TypeError):
        _check_tensors(params)
        raise
    clipping = _clip(found, order, max_norm, 1.0)
    if error_if_nonfinite:
        norm = read(clipping.total_norm, HYPERPARAMETER)
        if not math.isfinite(norm):
            raise RuntimeError(
                f"the gradients cannot be clipped: their norm of order {order:g} is {norm};"
                " error_if_nonfinite=False returns it"
            )
    return clipping


@_disable_dynamo
def _between_graphs(*arguments: Any) -> Clipping:
    return _clip_coefficient(*arguments)


def _as_list(parameters: Any) -> list[Tensor]:
    if isinstance(parameters, Tensor):
        return [parameters]
    params = list(parameters)
    if not params and inspect.isgenerator(parameters):
        warnings.warn(
            "parameters is an empty generator, so nothing is clipped; model.parameters() can be"
            " iterated over once",
            stacklevel=4,
        )
    return params


def _check_tensors(params: Sequence[Any]) -> None:
    for i, param in enumerate(params):
        if not isinstance(param, Tensor):
            kind = type(param).__name__
            raise TypeError(f"parameters[{i}] must be a Tensor, not {kind}") from None


def _read_max_norm(max_norm: Any) -> float:
    number = read_number("max_norm", max_norm)
    check_domain("max_norm", number, NonNegative)
    return number


def _name_in(optimizer: BaseOptimizer, position: int) -> str:
    """Name the parameter at a position in the optimizer."""
    for group in optimizer.param_groups:
        if position < len(group["params"]):
            return param_name(optimizer, group, position)
        position -= len(group["params"])
    raise IndexError(position)


# ---- the numbers ---------------------------------------------------------------------------------


def _clip(found: PowerSum, order: float, max_norm: float, factor: float | Tensor) -> Clipping:
    """Return the norm of gradients that are multiplied by a factor >= 0, and the coefficient."""
    dtype = torch.float64 if found.is_double else torch.float32
    norm = found.root(order)
    if type(norm) is Tensor and norm.is_cpu and not isinstance(factor, Tensor) and not is_tracing():
        # The host's arithmetic is faster than operations on tensors.
        number = norm.item() * factor
        coefficient = max_norm / (number + 1e-6)
        if coefficient > 1.0:  # a NaN stays
            coefficient = 1.0
        return Clipping(
            # Not `scalar_tensor`, which raises for a number that is too large for float32.
            torch.tensor(number, dtype=dtype, device="cpu"),
            torch.tensor(coefficient, dtype=dtype, device="cpu"),
        )
    norm = norm * factor
    return Clipping(norm.to(dtype), (max_norm / (norm + 1e-6)).clamp(max=1.0).to(dtype))


def _as_factor(value: float | Tensor, total: Tensor) -> float | Tensor:
    """Return a float; or a 0-dim float64 tensor, if the host would have to wait for the value."""
    if not isinstance(value, Tensor) or not value.is_cuda:
        return read(value, HYPERPARAMETER)
    device = total.device if total.is_cuda else value.device
    return value.detach().to(device, torch.float64).view(())


def _divided(factor: float | Tensor, scale: float | Tensor) -> float | Tensor:
    if isinstance(scale, Tensor) or scale != 0.0:
        return factor / scale
    return math.inf  # after many overflows, a scale is 0
