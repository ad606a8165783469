"""Tensors that are constants of a rule: they can be moved to an argument's dtype and device."""

from typing import Any

import torch

from .calls import known


class Constant(torch.Tensor):
    """A tensor from outside of a rule, or made of constants in it."""

    def to(self, *arguments: Any, **options: Any) -> Any:
        """Return the tensor with the dtype and the device that a trace has."""
        return super().to(*map(known, arguments), **{n: known(v) for n, v in options.items()})


def as_constant(value: Any) -> Any:
    """Return a tensor as a constant, which shares its memory; any other value as it is."""
    is_plain = type(value) in (torch.Tensor, torch.nn.Parameter)
    return value.detach().as_subclass(Constant) if is_plain else value
