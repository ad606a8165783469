"""The 8-bit states of a shard, in the form that Megatron-Core's checkpoints expect."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._coded_states import is_coded
from .._codes import scale_key, scale_shape
from .._counters import is_absent
from .._rule import GroupRule


class ShardState(dict[str, Any]):
    """A parameter's state with 8-bit codes. Iteration skips their scales; `keys` does not.

    Megatron-Core iterates over a state, and saves each tensor as if it had the shard's length.
    """

    def __iter__(self) -> Iterator[str]:
        scales = {scale_key(name) for name in self.keys() if is_coded(self, name)}
        return iter([name for name in self.keys() if name not in scales])


def fill_allocated(state: dict[str, Any], rule: GroupRule) -> dict[str, Any]:
    """Return a state with zeros in place of codes that have neither scales nor a ``step``.

    Before Megatron-Core sets the states of a new optimizer one by one, it has the optimizer load
    uninitialized tensors of the dtypes in its configuration.

    Args:
        state: A loaded state. Not modified.
        rule: The rule of its group.
    """
    filled = dict(state)
    if not is_absent(state.get("step")):
        return filled
    for name, code in zip(rule.state_names, rule.rule.codes, strict=True):
        if not is_coded(state, name) or scale_key(name) in state:
            continue
        codes: Tensor = state[name]
        filled[name] = torch.zeros_like(codes, dtype=torch.float32 if code is None else codes.dtype)
        if code is not None:
            filled[scale_key(name)] = codes.new_zeros(scale_shape(codes.shape))
    return filled
