"""Numbers in tensors, which may have none: meta tensors, and those of a ``FakeTensorMode``.

A step of such tensors makes the states that a real one makes, so that memory can be estimated.
"""

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

PLAIN_TYPES = (Tensor, torch.nn.Parameter)
# What takes the place of a hyperparameter that has no value: in all domains, and such that nothing
# is left out of a step because of it.
HYPERPARAMETER = 0.5
# Those that tracers set, below which operations are no more than recorded.
_TRACING_MODES = tuple(
    getattr(torch._C._TorchDispatchModeKey, name) for name in ("FAKE", "PROXY", "FUNCTIONAL")
)
_get_mode = torch._C._get_dispatch_mode


def is_tracing() -> bool:
    """Return whether a ``FakeTensorMode`` or another tracer of PyTorch sees each operation."""
    return any(_get_mode(key) is not None for key in _TRACING_MODES)


def is_fake(value: Any) -> bool:
    """Return whether something is a tensor, or a wrapper of one, that a ``FakeTensorMode`` made."""
    if type(value) in PLAIN_TYPES and not torch._is_functional_tensor(value):
        return False
    # Where it was not imported, there can be none.
    module = sys.modules.get("torch._subclasses.fake_tensor")
    return module is not None and module.is_fake(value)


def has_value(value: Any) -> bool:
    """Return whether the value of a number is known, if it is a tensor at all."""
    if not isinstance(value, Tensor):
        return True
    if value.is_meta:
        return False
    return not is_fake(value) or getattr(value, "constant", None) is not None


def check_has_value(name: str, value: Any, param: Tensor) -> None:
    """Raise for a tensor without a value that is to be used with a parameter that has values."""
    if not has_value(value) and has_value(param):
        raise ValueError(
            f"{name} is a tensor without a value (of the meta device, or of a FakeTensorMode), but"
            " the parameter has values"
        )


def have_values(values: Iterable[Any]) -> bool:
    """Return whether the values of all of these numbers are known."""
    return all(map(has_value, values))


def read(value: Any, otherwise: float) -> float:
    """Return a number as a float, or `otherwise` where it is a tensor without a value."""
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
    """Return what a sequence has; None where the object is none, as a number of numpy is not."""
    if not hasattr(value, "__getitem__") or isinstance(value, (str, dict)):
        return None
    try:
        return tuple(value)
    except TypeError:
        return None
