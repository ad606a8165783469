"""The ``step`` of a group of :mod:`emerging_optimizers.megatron`, which counts for its parameters.

It is an int as long as the host counts, and an int32 tensor on a device where counters are there.
The parameters' counters follow it.
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
    """Counts the steps of a group; the counters in states follow."""

    def start(self, group: dict[str, Any]) -> Any:
        """Return the count of a parameter whose state has none."""
        step = group.get("step")
        return 0 if is_absent(step) or _is_on_device(step) else step

    def is_needed(self, group: dict[str, Any], rule: GroupRule) -> bool:
        """Return whether a begun state must have a counter."""
        # Without a key, the group's step is 0: Megatron-Core loads only states that it has
        # allocated.
        return "step" in group and super().is_needed(group, rule)

    def may_have_begun(self, group: dict[str, Any]) -> bool:
        """Return whether a group's states may be of earlier steps, so that none may be missing."""
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
        """Leave counters alone: `place` lets them follow the group."""

    def settle(self, group: dict[str, Any], rule: GroupRule, states: list[dict[str, Any]]) -> None:
        """Take the group's step from the loaded states, if it has none; remove their counters."""
        begun = [state for state in states if is_begun(state, rule)]
        step = group.pop("step", None)
        if is_absent(step):
            step = max(map(_count_of, begun), default=None)
        if step is None:
            return
        group["step"] = int(read(step, 1))
        for state in begun:
            # Megatron-Core copies what is in a state, and has no step to copy.
            state.pop("step", None)


def _count_of(state: dict[str, Any]) -> float:
    """Return how many steps a loaded state counts; 0 where it has no counter."""
    step = state.get("step")
    return 0.0 if step is None else read(step.tensor if isinstance(step, Saved) else step, 1)


def _is_on_device(step: Any) -> bool:
    return isinstance(step, Tensor) and not step.is_cpu


def read_steps(optimizer: BaseOptimizer, found_inf: Any) -> None:
    """Bring all groups' steps into one of the two forms, and counters on devices up to them.

    Args:
        optimizer: Its groups' steps may be whatever was put there.
        found_inf: What a ``GradScaler`` says, if there is one.
    """
    if found_inf is None and all(map(_is_settled, optimizer.param_groups)):
        return  # mostly so
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
    """Count a step of all groups, but for one that ``found_inf`` makes them skip."""
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
            # The native step has counted for none of them, or not for those without a gradient.
            follow(optimizer, group, group["params"])


def follow(optimizer: BaseOptimizer, group: dict[str, Any], params: list[Tensor]) -> None:
    """Set parameters' counters to their group's step, where that is."""
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
    """Return what a group's step says, or else the largest of its parameters' counters."""
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
    """Return where a group is counted, if not on the host."""
    if group["params"]:
        device: torch.device = group["params"][0].device
        return device if device.type == "cuda" else None
    # Its parameters are on other processes' devices, which count there.
    if found_inf is not None:
        return found_inf.device
    return torch.device("cuda") if torch.cuda.is_available() else None


def finish_state_dict(optimizer: BaseOptimizer, saved: dict[str, Any]) -> None:
    """Put into a state dict what its groups' steps say: as ints, and as a counter of each state."""
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
