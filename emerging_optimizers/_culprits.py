"""Errors of optimizers name the parameter that they are about. Nothing here runs without one."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from ._optimizer import ScalarOptimizer

_KINDS = (TypeError, ValueError, RuntimeError)


def param_name(optimizer: "ScalarOptimizer", group: dict[str, Any], index: int) -> str:
    """Name a parameter: ``param_groups[1]['params'][0] ('encoder.weight')``.

    Args:
        optimizer: Whose it is.
        group: One of the optimizer's groups, or a copy of one.
        index: The parameter's in the group.
    """
    params = group["params"]
    found = (i for i, own in enumerate(optimizer.param_groups) if own["params"] is params)
    label = f"param_groups[{next(found, '?')}]['params'][{index}]"
    names = group.get("param_names") or ()
    return f"{label} ({names[index]!r})" if index < len(names) else label


def find_param(optimizer: "ScalarOptimizer", param: Tensor) -> str:
    """Name a parameter of which only the tensor is known."""
    for group in optimizer.param_groups:
        for index, own in enumerate(group["params"]):
            if own is param:
                return param_name(optimizer, group, index)
    return "a parameter that is in none of the optimizer's groups"


def blame(error: Exception, name: str) -> Exception:
    """Return an error of the same kind that begins with the parameter's name."""
    kind = next((kind for kind in _KINDS if isinstance(error, kind)), RuntimeError)
    return kind(f"{name}: {error}")


def check_tensors(optimizer: "ScalarOptimizer", group: dict[str, Any]) -> None:
    """Raise for parameters, and gradients, that are no tensors."""
    for index, param in enumerate(group["params"]):
        if not isinstance(param, Tensor):
            name = param_name(optimizer, group, index)
            raise TypeError(f"{name} must be a Tensor, not {type(param).__name__}")
        grad: Any = optimizer._grad(group, param)
        if grad is not None and not isinstance(grad, Tensor):
            name = param_name(optimizer, group, index)
            raise TypeError(f"{name}: its gradient must be a Tensor, not {type(grad).__name__}")
