"""Which tensors of a step share memory, for the parameters that the fallback updates.

A state must not share memory with any other tensor. Parameters may: they are updated one after the
other, in their order. ``csrc/bindings/step_overlap.h`` is the same for a native step, without the
messages.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import Tensor

from ._base import BaseOptimizer, members_of
from ._counters import is_number
from ._members import Member, param_name
from ._overlap import Memory, are_apart, find_sharing, memory_of, span_of
from ._states import operands_of
from ._weights import local_shard

# The index of a group, and that of a parameter in it.
Place: TypeAlias = tuple[int, int]


class _Operand(NamedTuple):
    # Scalar states are counters here: a shared one is replaced by separate ones, too.
    role: Literal["parameter", "gradient", "state", "counter"]
    key: str  # of a state
    place: Place


def check_overlap(
    optimizer: BaseOptimizer, groups: Sequence[dict[str, Any]]
) -> list[tuple[Place, Place]]:
    """Raise for a state of a parameter with a gradient that shares memory.

    Args:
        optimizer: The optimizer.
        groups: All its groups.

    Returns:
        Pairs of parameters, in their order, of which the second must be updated after the first.

    Raises:
        ValueError: A state that shares memory with another tensor, of any group.
    """
    if _are_surely_apart(optimizer, groups):
        return []
    return _check(optimizer, groups, _operands(optimizer, groups))


def _are_surely_apart(optimizer: BaseOptimizer, groups: Sequence[dict[str, Any]]) -> bool:
    """Return whether all tensors are ordinary and share no memory, as is usual."""
    spans = []
    for group in groups:
        for member in members_of(optimizer, group):
            if member.grad is None:
                continue
            for tensor in (member.param, member.grad, *operands_of(member).values()):
                span = span_of(tensor)
                if span is None:
                    return False
                spans.append(span)
    return are_apart(spans)


def check_loaded_states(
    optimizer: BaseOptimizer, groups: Sequence[dict[str, Any]], states: Mapping[Tensor, Any]
) -> None:
    """Raise a ValueError for a state that shares memory with another one or with a parameter.

    Args:
        optimizer: The optimizer, which does not have these states yet.
        groups: The loaded groups, with this optimizer's parameters.
        states: The loaded states, by parameter.
    """
    _check(optimizer, groups, _loaded_operands(optimizer, groups, states))


def _check(
    optimizer: BaseOptimizer,
    groups: Sequence[dict[str, Any]],
    found: Iterable[tuple[_Operand, Tensor]],
) -> list[tuple[Place, Place]]:
    operands: list[_Operand] = []
    used: list[tuple[Memory, bool]] = []
    for operand, tensor in found:
        memory = memory_of(local_shard(tensor))
        if memory is not None:
            operands.append(operand)
            used.append((memory, operand.role != "gradient"))
    pairs = set()
    worst = None
    for i, j, is_certain in find_sharing(used):
        first, second = operands[i], operands[j]
        if {first.role, second.role} <= {"parameter", "gradient"}:
            if first.place != second.place:
                pairs.add((first.place, second.place))
        elif first.role != second.role or first.role != "counter" or used[i] != used[j]:
            worst = (not is_certain, j, i) if worst is None else min(worst, (not is_certain, j, i))
    if worst is not None:
        is_uncertain, j, i = worst
        _refuse(optimizer, groups, operands[i], operands[j], is_uncertain)
    return sorted(pairs)


def find_followers(
    pairs: Iterable[tuple[Place, Place]], left: Mapping[int, Collection[int]]
) -> set[Place]:
    """Return the parameters that only the fallback can update in the right order.

    They share memory with parameters before them that the fallback updates.

    Args:
        pairs: What `check_overlap` returned.
        left: What is left to the fallback: by the index of a group, indices of its parameters.
    """
    found: set[Place] = set()
    for first, second in sorted(pairs, key=lambda pair: pair[1]):
        if first in found or first[1] in left.get(first[0], ()):
            found.add(second)
    return {place for place in found if place[1] not in left.get(place[0], ())}


def _operands(
    optimizer: BaseOptimizer, groups: Sequence[dict[str, Any]]
) -> Iterator[tuple[_Operand, Tensor]]:
    """Yield the tensors of all parameters that have a gradient, by parameter."""
    seen = set()
    for i, group in enumerate(groups):
        for member in members_of(optimizer, group):
            if member.grad is None:
                continue
            place = (i, member.param_index)
            yield _Operand("parameter", "", place), member.param
            yield _Operand("gradient", "", place), member.grad
            if id(member.param) in seen:
                continue  # with the same states
            seen.add(id(member.param))
            yield from _states(member, place)


def _loaded_operands(
    optimizer: BaseOptimizer, groups: Sequence[dict[str, Any]], states: Mapping[Tensor, Any]
) -> Iterator[tuple[_Operand, Tensor]]:
    seen = set()
    for i, group in enumerate(groups):
        for member in members_of(optimizer, group):
            if id(member.param) in seen:
                continue  # with the same states
            seen.add(id(member.param))
            place = (i, member.param_index)
            yield _Operand("parameter", "", place), member.param
            yield from _states(member._replace(state=states.get(member.param, {})), place)


def _states(member: Member, place: Place) -> Iterator[tuple[_Operand, Tensor]]:
    for key, value in operands_of(member).items():
        if isinstance(value, Tensor):
            role: Literal["counter", "state"] = (
                "counter" if is_number(member.rule, key) else "state"
            )
            yield _Operand(role, key, place), value


def _refuse(
    optimizer: BaseOptimizer,
    groups: Sequence[dict[str, Any]],
    first: _Operand,
    second: _Operand,
    is_uncertain: bool,
) -> None:
    if second.role in ("parameter", "gradient"):
        first, second = second, first

    def name(operand: _Operand) -> str:
        i, k = operand.place
        param = param_name(optimizer, groups[i], k)
        if operand.role == "parameter":
            return param
        if operand.role == "gradient":
            return f"the gradient of {param}"
        return f"state {operand.key!r} of {param}"

    if is_uncertain:
        raise ValueError(
            f"cannot tell whether {name(second)} shares memory with {name(first)}; make the state"
            " contiguous"
        )
    raise ValueError(
        f"{name(second)} shares memory with {name(first)}, and a state is modified in place; give"
        " the state separate memory (.clone())"
    )
