"""Optimizers by name, for programs that read the name from a configuration."""

from collections.abc import Callable
from typing import TypeVar

from torch.optim import Optimizer

_OptimizerClass = TypeVar("_OptimizerClass", bound=type[Optimizer])

# In the order of registration. The optimizers of this package register themselves.
_CLASSES: dict[str, type[Optimizer]] = {}


def register_optimizer(name: str) -> Callable[[_OptimizerClass], _OptimizerClass]:
    """Return a class decorator that registers an optimizer under a name.

    Args:
        name: The name, which no other class has.

    Raises:
        ValueError: Another class has the name.

    Example:
        >>> import torch
        >>> from emerging_optimizers.registry import get_optimizer_cls, register_optimizer
        >>> @register_optimizer("sgd")
        ... class SGD(torch.optim.SGD):
        ...     pass
        >>> get_optimizer_cls("sgd") is SGD
        True
    """

    def register(cls: _OptimizerClass) -> _OptimizerClass:
        known = _CLASSES.setdefault(name, cls)
        if known is not cls:
            raise ValueError(f"optimizer name {name!r} is taken by {known.__qualname__}")
        return cls

    return register


def get_optimizer_names() -> list[str]:
    """Return all registered names, in alphabetical order.

    Example:
        >>> from emerging_optimizers.registry import get_optimizer_names
        >>> "lion" in get_optimizer_names()
        True
    """
    return sorted(_CLASSES)


def get_optimizer_cls(name: str) -> type[Optimizer]:
    """Return the class that is registered under a name.

    Args:
        name: The name, such as "adamw". The error for an unknown name lists all.

    Raises:
        ValueError: No class is registered under the name.

    Example:
        >>> from emerging_optimizers.registry import get_optimizer_cls
        >>> get_optimizer_cls("lion").__name__
        'Lion'
    """
    if name not in _CLASSES:
        raise ValueError(
            f"no optimizer is named {name!r}; there are {', '.join(get_optimizer_names())}"
        )
    return _CLASSES[name]
