"""A parameter's state: its counter, its averages, its master, and what may be missing of them."""

import math
import numbers
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._values import read

if TYPE_CHECKING:
    from ._optimizer import ScalarOptimizer

HALF = (torch.bfloat16, torch.float16)
MASTER = "master_param"
MOST_STEPS = 2**53  # what float64 counts exactly


def has_master(group: dict[str, Any], param: Tensor) -> bool:
    return bool(group["master_weights"]) and param.dtype in HALF


def check_master_dtype(is_remainder: bool, master: Tensor) -> None:
    if is_remainder != (master.dtype == torch.int16):
        raise TypeError(
            f"a master_param has dtype {master.dtype}, but this optimizer stores"
            f" {'int16 remainders' if is_remainder else 'float32 masters'}:"
            " store_param_remainders has to be as where it was saved"
        )


# ---- counters ------------------------------------------------------------------------------------


def new_counter(step: float, device: torch.device) -> Tensor:
    # Not from a number in the host's memory, for which a device would be waited for.
    return torch.full((), step, dtype=torch.float32, device=device)


def set_counter(state: dict[str, Any], counter: Tensor) -> None:
    """Put a counter into a state: first, where the native step looks for it."""
    others = {name: value for name, value in state.items() if name != "step"}
    state.clear()
    state.update({"step": counter, **others})


def check_count(name: str, value: Any) -> None:
    """Raise for what is no number of steps. One on a device is not read."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} has {value.numel()} elements; expected 1")
        if value.is_complex() or value.layout != torch.strided:
            raise TypeError(
                f"{name} must be a number of steps, not a tensor of dtype {value.dtype} and layout"
                f" {value.layout}"
            )
        if type(value) not in (Tensor, torch.nn.Parameter) or not value.is_cpu:
            return
        value = read(value, 0.0)
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number of steps, not {type(value).__name__}")
    try:
        count = float(value)
    except OverflowError:  # an int beyond a double
        count = math.inf
    if not 0 <= count < MOST_STEPS:
        raise ValueError(f"{name} is {count:g}; expected a number of steps")


def split_counters(states: Iterable[Any]) -> None:
    """Give each state a counter that no other one has, where several share one.

    A counter that is shared would count the steps of all of its parameters.
    """
    taken = set()
    for state in states:
        step = state.get("step") if isinstance(state, dict) else None
        if type(step) is not Tensor or step.is_meta or step.layout != torch.strided:
            continue
        address = step.device, step.data_ptr()
        if address in taken:
            state["step"] = step.clone()
        taken.add(address)


# ---- what is missing -----------------------------------------------------------------------------


def is_absent(value: Any) -> bool:
    """Return whether a state is missing: torch's tools put ``{}`` for what they do not find."""
    return value is None or (isinstance(value, dict) and not value)


def is_begun(optimizer: "ScalarOptimizer", group: Mapping[str, Any], state: dict[str, Any]) -> bool:
    """Return whether there is any of a rule's states, so that none may be missing."""
    names = optimizer._rule_of(group).state_names
    return not all(is_absent(state.get(name)) for name in ("step", *names))


def check_complete(
    optimizer: "ScalarOptimizer", group: dict[str, Any], state: dict[str, Any], what: str
) -> None:
    """Raise where something is missing that would start anew beside what goes on.

    Args:
        optimizer: Whose state it is.
        group: The parameter's; its ``step`` counts where the state has none.
        state: The parameter's.
        what: What the state is called.
    """
    if not is_begun(optimizer, group, state):
        return
    has = ", ".join(repr(name) for name, value in state.items() if not is_absent(value))
    for name in optimizer._rule_of(group).state_names:
        if is_absent(state.get(name)):
            raise ValueError(f"{what} has no {name!r}; it has {has}")
    if is_absent(state.get("step")) and optimizer._needs_count(group):
        raise ValueError(
            f"{what} has no 'step', and neither has its group; set one of them to the number of"
            " steps that were taken"
        )
