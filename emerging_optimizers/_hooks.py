"""Hooks around the update of weights, such as the one that keeps their norms."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ._members import Member
from ._weights import is_split, read_weight, write_weight


class WeightHook(ABC):
    """Runs before and after the update of weights, in groups that set its flag.

    Attributes:
        flag: The key of the flag in a group.
    """

    flag: str

    @abstractmethod
    def check_group(self, optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> None:
        """Check a new group that sets the flag."""

    @abstractmethod
    def joins(self, param: Tensor) -> bool:
        """Return whether a parameter takes part without a gradient, since processes communicate."""

    @abstractmethod
    def before_update(self, weights: Sequence[Tensor], params: Sequence[Tensor]) -> list[Any]:
        """Return what `after_update` needs: one item for each parameter.

        Args:
            weights: This process's shards of the weights, as real numbers.
            params: The parameters.
        """

    @abstractmethod
    def after_update(
        self, weights: Sequence[Tensor], params: Sequence[Tensor], kept: Sequence[Any]
    ) -> list[Tensor]:
        """Modify updated weights in place.

        Returns:
            For each weight a tensor of one element: whether it is unchanged.
        """


def before_update(hook: WeightHook, members: Sequence[Member]) -> list[Any]:
    """Run a hook before parameters are updated."""
    kept = []
    for batch in _batches(members):
        weights = [read_weight(member) for member in batch]
        kept += hook.before_update(weights, [member.param for member in batch])
    return kept


def after_update(hook: WeightHook, members: Sequence[Member], kept: Sequence[Any]) -> None:
    """Run a hook after parameters were updated, and store the weights."""
    remaining = iter(kept)
    for batch in _batches(members):
        weights = [read_weight(member) for member in batch]
        params = [member.param for member in batch]
        are_still = hook.after_update(weights, params, [next(remaining) for _ in batch])
        for member, weight, is_still in zip(batch, weights, are_still, strict=True):
            write_weight(member, weight, is_still)


def _batches(members: Sequence[Member]) -> Iterator[Sequence[Member]]:
    """Yield all members at once, or one by one if reading a weight allocates memory."""
    if any(is_split(member.group, member.param) for member in members):
        for member in members:
            yield [member]
    elif members:
        yield members
