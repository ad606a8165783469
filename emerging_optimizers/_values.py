"""Numbers in tensors that may have no value: meta tensors, and those of a ``FakeTensorMode``.

A step on such tensors creates the same states as a real step, so that memory can be estimated.
"""

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

PLAIN_TYPES = (Tensor, torch.nn.Parameter)
# Used for a hyperparameter without a value. It is in all domains, and not 0, which would skip work.
HYPERPARAMETER = 0.5
# The modes of tracers: under them, operations are only recorded.
_TRACING_MODES = tuple(
    getattr(torch._C._TorchDispatchModeKey, name) for name in ("FAKE", "PROXY", "FUNCTIONAL")
)
_get_mode = torch._C._get_dispatch_mode


def is_tracing() -> bool:
    """Return whether a ``FakeTensorMode`` or another tracer of PyTorch sees each operation."""
    return any(_get_mode(key) is not None for key in _TRACING_MODES)


def is_recording() -> bool:
    """Return whether a tracer of PyTorch records operations in a graph."""
    proxy = torch._C._TorchDispatchModeKey.PROXY
    return torch.compiler.is_compiling() or _get_mode(proxy) is not None


def is_fake(value: Any) -> bool:
    """Return whether something is a fake tensor, or a wrapper of one."""
    if type(value) in PLAIN_TYPES and not torch._is_functional_tensor(value):
        return False
    # Without this module, there are no fake tensors.
    module = sys.modules.get("torch._subclasses.fake_tensor")
    return module is not None and module.is_fake(value)


def has_value(value: Any) -> bool:
    """Return whether a number has a value, which only tensors may lack."""
    if not isinstance(value, Tensor):
        return True
    if value.is_meta:
        return False
    return not is_fake(value) or getattr(value, "constant", None) is not None


def check_has_value(name: str, value: Any, param: Tensor) -> None:
    """Raise for a tensor without a value, if the parameter has values."""
    if not has_value(value) and has_value(param):
        raise ValueError(
            f"{name} is a tensor without a value (of the meta device, or of a FakeTensorMode), but"
            " the parameter has values"
        )


def have_values(values: Iterable[Any]) -> bool:
    """Return whether all of these numbers have a value."""
    return all(map(has_value, values))


def read(value: Any, otherwise: float) -> float:
    """Return a number as a float, or `otherwise` if it has no value."""
    if not isinstance(value, Tensor):
        return float(value)
    if not has_value(value):
        return otherwise
    constant = getattr(value, "constant", None) if is_fake(value) else None
    # A real tensor is not to be read through a mode that takes fake ones only.
    fake = torch._C._TorchDispatchModeKey.FAKE
    mode = torch._C._unset_dispatch_mode(fake)
    try:
        number = value if constant is None else constant
        return float(number.detach() if number.requires_grad else number)  # or torch warns
    finally:
        if mode is not None:
            torch._C._set_dispatch_mode(mode)


def items_of(value: Any) -> tuple[Any, ...] | None:
    """Return the items of a sequence; None for anything else, such as one of numpy's numbers."""
    if not hasattr(value, "__getitem__") or isinstance(value, (str, dict)):
        return None
    try:
        return tuple(value)
    except TypeError:
        return None
