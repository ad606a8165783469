"""Optimizers by name, for programs that read the name from a configuration."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch.optim import Optimizer

from ._distribution import namesake
from ._optimizer import ScalarOptimizer

_OptimizerClass = TypeVar("_OptimizerClass", bound=type[Optimizer])

# By lower-case name. The optimizers of this package register themselves.
_CLASSES: dict[str, type[Optimizer]] = {}
# Beside NVIDIA's package, Megatron-Core reads the list. It makes these optimizers itself. If they
# were listed, it would pass their parameters to another optimizer, such as Muon.
_MEGATRON_NAMES = ("adam", "sgd")
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def register_optimizer(name: str) -> Callable[[_OptimizerClass], _OptimizerClass]:
    """Return a class decorator that registers an optimizer under a name.

    Args:
        name: The name, which no other class has. Upper and lower case are the same.

    Raises:
        ValueError: Another class has the name.

    Example:
        >>> import torch
        >>> from emerging_optimizers.registry import get_optimizer_cls, register_optimizer
        >>> @register_optimizer("sgd")
        ... class SGD(torch.optim.SGD):
        ...     pass
        >>> get_optimizer_cls("SGD") is SGD
        True
    """

    def register(cls: _OptimizerClass) -> _OptimizerClass:
        known = _CLASSES.setdefault(name.lower(), cls)
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


def get_optimizer_name_list() -> list[str]:
    """Return the registered names, as the function of NVIDIA's package does.

    Where NVIDIA's package is in use, "adam" and "sgd" are omitted: Megatron-Core has its own, and
    takes all others from this list. :func:`get_optimizer_names` always returns all names.

    Example:
        >>> from emerging_optimizers.registry import get_optimizer_name_list
        >>> "lion" in get_optimizer_name_list()
        True
    """
    left_out = () if namesake is None else _MEGATRON_NAMES
    return [name for name in get_optimizer_names() if name not in left_out]


def get_optimizer_cls(name: str) -> type[Optimizer]:
    """Return the class that is registered under a name.

    Args:
        name: The name, such as "adamw", in upper or lower case. The error for an unknown name
            lists all.

    Raises:
        ValueError: No class is registered under the name.

    Example:
        >>> from emerging_optimizers.registry import get_optimizer_cls
        >>> get_optimizer_cls("lion").__name__
        'Lion'
    """
    known = _CLASSES.get(name.lower())
    if known is None:
        raise ValueError(
            f"no optimizer is named {name!r}; there are {', '.join(get_optimizer_names())}."
            " Import the module that registers it, or check the spelling"
        )
    return known


def validate_optimizer_args(opt_cls: type[Optimizer], kwargs: Mapping[str, Any]) -> None:
    """Raise for keyword arguments that an optimizer's constructor does not have.

    If a constructor passes ``**options`` on, those of its base class are valid, too. Every name is
    valid for a class outside this package whose ``**options`` do not go to such a base class.

    Args:
        opt_cls: The class, registered or not.
        kwargs: The arguments. Their values do not matter. ``params`` is always valid.

    Raises:
        TypeError: The constructor does not have an argument. The error lists those that it has.

    Example:
        >>> from emerging_optimizers import Lion
        >>> from emerging_optimizers.registry import validate_optimizer_args
        >>> validate_optimizer_args(Lion, {"lr": 1e-4, "master_weights": True})
    """
    valid = _argument_names(opt_cls)
    if valid is None:
        return
    unknown = [name for name in kwargs if name not in valid and name != "params"]
    if unknown:
        raise TypeError(
            f"{opt_cls.__name__} has no argument {', '.join(map(repr, unknown))}; expected"
            f" {', '.join(name for name in valid if name != 'params')}"
        )


def get_configured_optimizer_cls(name: str, **kwargs: Any) -> Callable[..., Optimizer]:
    """Return the class that is registered under a name, with some of its arguments.

    Args:
        name: The name, as for :func:`get_optimizer_cls`.
        **kwargs: Keyword arguments of the class.

    Returns:
        A function that makes the optimizer from the parameters and, optionally, more arguments.

    Raises:
        ValueError: No class is registered under the name.
        TypeError: The class does not have an argument.

    Example:
        >>> import torch
        >>> from emerging_optimizers.registry import get_configured_optimizer_cls
        >>> make_optimizer = get_configured_optimizer_cls("lion", lr=0.1)
        >>> make_optimizer([torch.zeros(2)]).param_groups[0]["lr"]
        0.1
    """
    cls = get_optimizer_cls(name)
    validate_optimizer_args(cls, kwargs)
    return functools.partial(cls, **kwargs)


def _argument_names(cls: type[Optimizer]) -> dict[str, None] | None:
    """Return the names of a constructor's arguments, in order; None if any name is valid."""
    names: dict[str, None] = {}
    for base in cls.__mro__:
        if base is ScalarOptimizer:
            return {**names, **dict.fromkeys(getattr(cls, "_option_defaults", ()))}
        if base is Optimizer:
            return None
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        names.update((parameter.name, None) for parameter in parameters if parameter.kind in _NAMED)
        if all(parameter.kind != inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            return names
    return names
