"""A parameter of an optimizer, and how errors name it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._rule import GroupRule

_KINDS = (TypeError, ValueError, RuntimeError)


class Member(NamedTuple):
    """A parameter in its group, and everything that a step needs of it.

    Attributes:
        optimizer: The optimizer.
        group: The parameter's group, or a copy of it.
        param_index: The parameter's index in the group.
        param: The parameter.
        grad: Its gradient, if it has one.
        state: Its state. A new one is empty, and not the optimizer's yet.
        rule: The group's rule.
    """

    optimizer: torch.optim.Optimizer
    group: dict[str, Any]
    param_index: int
    param: Tensor
    grad: Tensor | None
    state: dict[str, Any]
    rule: GroupRule

    @property
    def name(self) -> str:
        return param_name(self.optimizer, self.group, self.param_index)


def param_name(optimizer: torch.optim.Optimizer, group: dict[str, Any], index: int) -> str:
    """Name a parameter: ``param_groups[1]['params'][0] ('encoder.weight')``.

    Args:
        optimizer: The optimizer.
        group: One of its groups, or a copy of one.
        index: The parameter's index in the group.
    """
    params = group["params"]
    found = (i for i, other in enumerate(optimizer.param_groups) if other["params"] is params)
    label = f"param_groups[{next(found, '?')}]['params'][{index}]"
    names = group.get("param_names") or ()
    return f"{label} ({names[index]!r})" if index < len(names) else label


def find_param(optimizer: torch.optim.Optimizer, param: Tensor) -> str:
    """Name a parameter of which only the tensor is known."""
    for group in optimizer.param_groups:
        for index, other in enumerate(group["params"]):
            if other is param:
                return param_name(optimizer, group, index)
    return "a parameter that is in none of the optimizer's groups"


def blame(error: Exception, name: str) -> Exception:
    """Return an error of the same type whose message begins with the parameter's name."""
    kind = next((kind for kind in _KINDS if isinstance(error, kind)), RuntimeError)
    return kind(f"{name}: {error}")
