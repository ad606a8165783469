"""The ``step`` of a group, which counts for all of its parameters; their counters follow it.

It is an int, or an int32 tensor if steps are counted on a device.
"""

from typing import Any

import torch
from torch import Tensor

from .._base import BaseOptimizer, members_of
from .._checkpoint import Saved
from .._counters import (
    MOST_STEPS,
    Counters,
    check_complete,
    check_count,
    is_absent,
    is_begun,
    new_counter,
)
from .._groups import check_flags
from .._members import Member
from .._rule import GroupRule
from .._step import has_native_step
from .._values import check_has_value, read


class GroupSteps(Counters):
    """Counts the steps of a group; the counters in its parameters' states follow."""

    def start(self, group: dict[str, Any]) -> Any:
        """Return the count for a parameter whose state has no counter."""
        step = group.get("step")
        return 0 if is_absent(step) or _is_on_device(step) else step

    def is_needed(self, group: dict[str, Any], rule: GroupRule) -> bool:
        """Return whether a begun state must have a counter."""
        # Without a key, the group's step is 0: Megatron-Core loads only states that it has
        # allocated.
        return "step" in group and super().is_needed(group, rule)

    def may_have_begun(self, group: dict[str, Any]) -> bool:
        """Return whether a group's states may be from earlier steps, and must be complete."""
        # Before the first step, Megatron-Core gives parameters an exp_avg and an exp_avg_sq.
        step = group.get("step", 0)
        return isinstance(step, Tensor) or step != 0

    def place(self, member: Member, found_inf: Any) -> None:
        """Put a parameter's counter where its group is counted, with the group's step."""
        step, counter = member.group["step"], member.state["step"]
        on_device = isinstance(step, Tensor)
        device = member.param.device if on_device else torch.device("cpu")
        if counter.dtype != torch.float32 or counter.device != device:
            counter = torch.empty((), dtype=torch.float32, device=device)
            member.state["step"] = counter
        if on_device:
            torch._foreach_copy_([counter], [step])
        else:
            counter.fill_(step)

    def take_group_step(self, optimizer: torch.optim.Optimizer, members: list[Member]) -> None:
        """Do nothing: `place` sets the counters to the group's step."""

    def settle(self, group: dict[str, Any], rule: GroupRule, states: list[dict[str, Any]]) -> None:
        """Set the group's step from the loaded states, if it has none; remove their counters."""
        begun = [state for state in states if is_begun(state, rule)]
        step = group.pop("step", None)
        if is_absent(step):
            step = max(map(_count_of, begun), default=None)
        if step is None:
            return
        group["step"] = int(read(step, 1))
        for state in begun:
            # Megatron-Core copies all that a state has, but has no step to copy.
            state.pop("step", None)


def _count_of(state: dict[str, Any]) -> float:
    """Return how many steps a loaded state counts; 0 where it has no counter."""
    step = state.get("step")
    return 0.0 if step is None else read(step.tensor if isinstance(step, Saved) else step, 1)


def _is_on_device(step: Any) -> bool:
    return isinstance(step, Tensor) and not step.is_cpu


def read_steps(optimizer: BaseOptimizer, found_inf: Any) -> None:
    """Make all groups' steps ints or tensors on devices, and let counters on devices follow.

    Args:
        optimizer: The optimizer. Users may have set its groups' steps to anything.
        found_inf: The ``found_inf`` of a ``GradScaler``, or None.
    """
    if found_inf is None and all(map(_is_settled, optimizer.param_groups)):
        return  # the usual case
    for i, group in enumerate(optimizer.param_groups):
        check_flags(optimizer, group, f"param_groups[{i}]")
    is_decided_there = isinstance(found_inf, Tensor) and found_inf.is_cuda
    new_steps = [
        step
        if type(step := group.get("step")) is int and 0 <= step < MOST_STEPS
        else _read(optimizer, i, group)
        for i, group in enumerate(optimizer.param_groups)
    ]
    for group, step in zip(optimizer.param_groups, new_steps, strict=True):
        device = None
        if is_decided_there or group["capturable"] or _is_on_device(step):
            device = _device_of(group, found_inf if is_decided_there else None)
        if device is None:
            group["step"] = int(read(step, 1))
            continue
        if not _is_on_device(step):
            step = torch.full((), int(read(step, 1)), dtype=torch.int32, device=device)
        group["step"] = step
        follow(optimizer, group, group["params"])


def count(optimizer: BaseOptimizer, found_inf: Tensor | None) -> None:
    """Count a step of all groups, unless ``found_inf`` skipped it."""
    is_on_host = found_inf is None or not found_inf.is_cuda
    for group in optimizer.param_groups:
        step = group["step"]
        if type(step) is not int:
            is_taken = 1 if found_inf is None else (found_inf.reshape(()) == 0).to(step.device)
            step.add_(is_taken)
            missed = [p for p in group["params"] if optimizer._grad(group, p) is None]
            follow(optimizer, group, missed)
        elif found_inf is not None and read(found_inf, 0.0) != 0.0:
            continue
        else:
            group["step"] = step + 1
            if is_on_host and has_native_step(optimizer, group):
                continue
            # The native step has advanced no counters, or not those without a gradient.
            follow(optimizer, group, group["params"])


def follow(optimizer: BaseOptimizer, group: dict[str, Any], params: list[Tensor]) -> None:
    """Set parameters' counters to their group's step, without moving them."""
    step = group["step"]
    counters = []
    for param in params:
        counter = optimizer.state.get(param, {}).get("step")
        if isinstance(counter, Tensor):
            counters.append(counter)
    if not counters:
        return
    with torch.no_grad():
        if isinstance(step, Tensor):
            torch._foreach_copy_(counters, [step] * len(counters))
        else:
            for counter in counters:
                counter.fill_(step)


def _is_settled(group: dict[str, Any]) -> bool:
    step = group.get("step")
    return type(step) is int and 0 <= step < MOST_STEPS and group["capturable"] is False


def _read(optimizer: BaseOptimizer, index: int, group: dict[str, Any]) -> Any:
    """Return a group's step, or the largest of its parameters' counters if it is None."""
    step = group.get("step")
    if not is_absent(step):
        name = f"param_groups[{index}]['step']"
        for param in group["params"]:
            check_has_value(name, step, param)
        check_count(name, step)
        return step if _is_on_device(step) else int(read(step, 1))
    largest = 0
    for member in members_of(optimizer, group):
        if not member.state:
            continue
        if "step" in group:
            check_complete(member, optimizer._counters.is_needed(group, member.rule))
        counter = member.state.get("step")
        if not is_absent(counter):
            check_has_value(f"{member.name}: state 'step'", counter, member.param)
            check_count(f"{member.name}: state 'step'", counter)
            largest = max(largest, int(read(counter, 1)))
    return largest


def _device_of(group: dict[str, Any], found_inf: Tensor | None) -> torch.device | None:
    """Return the device that counts a group's steps; None for the host."""
    if group["params"]:
        device: torch.device = group["params"][0].device
        return device if device.type == "cuda" else None
    # The group's parameters are in other processes, which count on their devices.
    if found_inf is not None:
        return found_inf.device
    return torch.device("cuda") if torch.cuda.is_available() else None


def finish_state_dict(optimizer: BaseOptimizer, saved: dict[str, Any]) -> None:
    """Write the groups' steps into a state dict: as ints, and as a counter in each state."""
    for group, saved_group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        step = group.get("step")
        if is_absent(step):
            states = [optimizer.state.get(param, {}) for param in group["params"]]
            counters = [s["step"] for s in states if not is_absent(s.get("step"))]
            step = max((int(read(c, 1)) for c in counters), default=None)
        if step is not None:
            saved_group["step"] = step = int(read(step, 1))
        for param, key in zip(group["params"], saved_group["params"], strict=True):
            state = optimizer.state.get(param)
            if not state:
                continue
            counter = state.get("step")
            device = counter.device if isinstance(counter, Tensor) else torch.device("cpu")
            others = {name: value for name, value in state.items() if name != "step"}
            saved["state"][key] = {"step": new_counter(float(step or 0), device), **others}
