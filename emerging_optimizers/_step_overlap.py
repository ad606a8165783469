"""What of an optimizer's step shares memory, for the parameters that the fallback steps.

States must not share memory with anything. Parameters may: they are stepped one after the other, in
their order. ``csrc/bindings/step_overlap.h`` does the same for a native step, but for the messages.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from torch import Tensor

from ._culprits import param_name
from ._dtensor import is_dtensor
from ._overlap import Memory, find_sharing, memory_of

if TYPE_CHECKING:
    from ._optimizer import ScalarOptimizer

# The index of a group, and that of a parameter in it.
Place: TypeAlias = tuple[int, int]


class _Operand(NamedTuple):
    role: Literal["parameter", "gradient", "state", "counter"]
    key: str  # of a state
    place: Place


def check_overlap(
    optimizer: "ScalarOptimizer", groups: Sequence[dict[str, Any]]
) -> list[tuple[Place, Place]]:
    """Raise for a state of a parameter with a gradient that shares memory.

    Args:
        optimizer: Whose states they are.
        groups: All its groups.

    Returns:
        Pairs of parameters, in their order, of which the second is to be stepped after the first.

    Raises:
        ValueError: A state that shares memory with another tensor, of any group.
    """
    return _check(optimizer, groups, _operands(optimizer, groups))


def check_loaded_states(
    optimizer: "ScalarOptimizer", groups: Sequence[dict[str, Any]], states: Mapping[Tensor, Any]
) -> None:
    """Raise a ValueError for a state that shares memory with another one or with a parameter.

    Args:
        optimizer: What is loaded is not yet in it.
        groups: Those that are loaded, with this optimizer's parameters.
        states: What is loaded, by parameter.
    """
    _check(optimizer, groups, _loaded_operands(optimizer, groups, states))


def _check(
    optimizer: "ScalarOptimizer",
    groups: Sequence[dict[str, Any]],
    found: Iterable[tuple[_Operand, Tensor]],
) -> list[tuple[Place, Place]]:
    operands: list[_Operand] = []
    used: list[tuple[Memory, bool]] = []
    for operand, tensor in found:
        memory = memory_of(tensor.to_local() if is_dtensor(tensor) else tensor)  # type: ignore[attr-defined]
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
    """Return what has to be stepped after parameters that the fallback steps, and so by it.

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
    optimizer: "ScalarOptimizer", groups: Sequence[dict[str, Any]]
) -> Iterator[tuple[_Operand, Tensor]]:
    """Yield the tensors of all parameters that have a gradient, by parameter."""
    seen = set()
    for i, group in enumerate(groups):
        for j, (param, grad) in enumerate(
            zip(group["params"], optimizer._grads(group), strict=True)
        ):
            if grad is None:
                continue
            place = (i, j)
            yield _Operand("parameter", "", place), param
            yield _Operand("gradient", "", place), grad
            if id(param) in seen:
                continue  # with the same states
            seen.add(id(param))
            yield from _states(optimizer, group, param, optimizer.state.get(param, {}), place)


def _loaded_operands(
    optimizer: "ScalarOptimizer", groups: Sequence[dict[str, Any]], states: Mapping[Tensor, Any]
) -> Iterator[tuple[_Operand, Tensor]]:
    seen = set()
    for i, group in enumerate(groups):
        for j, param in enumerate(group["params"]):
            if id(param) in seen:
                continue  # with the same states
            seen.add(id(param))
            yield _Operand("parameter", "", (i, j)), param
            yield from _states(optimizer, group, param, states.get(param, {}), (i, j))


def _states(
    optimizer: "ScalarOptimizer",
    group: dict[str, Any],
    param: Tensor,
    state: Mapping[str, Any],
    place: Place,
) -> Iterator[tuple[_Operand, Tensor]]:
    for key, value in optimizer._operands_of(group, param, state).items():
        if isinstance(value, Tensor):
            yield _Operand("counter" if key == "step" else "state", key, place), value


def _refuse(
    optimizer: "ScalarOptimizer",
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
        " the state memory of its own (.clone())"
    )
