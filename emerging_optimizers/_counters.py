"""Step counters: how many updates a parameter has had. Scalar states lie beside them."""

import math
import numbers
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ._members import Member
from ._rule import GroupRule
from ._values import check_has_value, read

MOST_STEPS = 2**53  # what float64 counts exactly


class Counters:
    """Counts each parameter's steps in its state, as ``torch.optim`` does."""

    def start(self, group: dict[str, Any]) -> Any:
        """Return the count for a parameter whose state has no counter."""
        return 0

    def is_needed(self, group: dict[str, Any], rule: GroupRule) -> bool:
        """Return whether a begun state must have a counter, since updates depend on it."""
        return is_absent(group.get("step")) and "step" in rule.rule.hyperparameter_names

    def may_have_begun(self, group: dict[str, Any]) -> bool:
        """Return whether a group's states may be from earlier steps, and must be complete."""
        return True

    def place(self, member: Member, found_inf: Any) -> None:
        """Move a parameter's counter to the device and the dtype that the step needs.

        Args:
            member: The parameter. Its counter is a tensor.
            found_inf: The ``found_inf`` of a ``GradScaler``, or None.
        """
        step = member.state["step"]
        # With a `found_inf`, the counters of CUDA parameters move to the device, so that the host
        # need not know whether they advance.
        needs_device = member.group["capturable"] or found_inf is not None
        if needs_device and member.param.device.type == "cuda" and step.is_cpu:
            member.state["step"] = new_counter(read(step, 0.0), member.param.device)
        elif step.dtype != torch.float32:
            member.state["step"] = step.to(torch.float32)

    def take_group_step(self, optimizer: torch.optim.Optimizer, members: list[Member]) -> None:
        """Let begun states without a counter count from their group's ``step``, if it has one.

        The ``step`` is then removed from the optimizer's group.
        """
        if not members or is_absent(step := members[0].group.get("step")):
            return
        group, rule = members[0].group, members[0].rule
        for param in group["params"]:
            check_has_value("the group's 'step'", step, param)
        check_count("the group's 'step'", step)
        states = [state for param in group["params"] if (state := optimizer.state.get(param))]
        for other in optimizer.param_groups:  # of which `group` may be a copy
            if other["params"] is group["params"]:
                self.settle(other, rule, states)

    def settle(self, group: dict[str, Any], rule: GroupRule, states: list[dict[str, Any]]) -> None:
        """Make the counters of loaded states agree with their group's ``step``.

        Begun states without a counter count from the group's ``step``, which is then removed.
        """
        step = group.pop("step", None)
        for state in states:
            if is_begun(state, rule) and is_absent(state.get("step")):
                count = 0.0 if is_absent(step) else read(step, 1)
                set_counter(state, new_counter(count, torch.device("cpu")))


def place_scalars(member: Member) -> None:
    """Move a parameter's scalar states to the device of its counter."""
    device = member.state["step"].device
    for name in member.rule.scalar_names:
        value = member.state[name]
        if value.device != device or value.dtype != torch.float32:
            member.state[name] = value.to(device, torch.float32)


def is_number(rule: GroupRule, name: str) -> bool:
    """Return whether a key of a parameter's state is its counter's or a scalar state's."""
    return name == "step" or name in rule.scalar_names


def new_counter(step: float, device: torch.device) -> Tensor:
    # Not from a number in the host's memory, for which a device would be waited for.
    return torch.full((), step, dtype=torch.float32, device=device)


def set_counter(state: dict[str, Any], counter: Tensor) -> None:
    """Put a counter into a state: first, where the native step looks for it."""
    others = {name: value for name, value in state.items() if name != "step"}
    state.clear()
    state.update({"step": counter, **others})


def check_count(name: str, value: Any) -> None:
    """Raise for anything but a number of steps; one on a device is not read."""
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


def split_counters(states: Iterable[Any], scalar_names: Iterable[str]) -> None:
    """Replace a counter, or a scalar state, that several states share by one for each of them.

    A shared counter would count the steps of all of its parameters.
    """
    taken = set()
    names = ("step", *scalar_names)
    for state in states:
        for name in names:
            number = state.get(name) if isinstance(state, dict) else None
            if type(number) is not Tensor or number.is_meta or number.layout != torch.strided:
                continue
            address = number.device, number.data_ptr()
            if address in taken:
                state[name] = number.clone()
            taken.add(address)


def is_absent(value: Any) -> bool:
    """Return whether a state is missing. Torch's tools write ``{}`` for what they do not find."""
    return value is None or (isinstance(value, dict) and not value)


def is_begun(state: dict[str, Any], rule: GroupRule) -> bool:
    """Return whether a state has any of a rule's states or scalar states: none may be missing."""
    names = ("step", *rule.state_names, *rule.scalar_names)
    return not all(is_absent(state.get(name)) for name in names)


def check_complete(member: Member, is_counter_needed: bool, what: str = "the state") -> None:
    """Raise for a begun state that lacks something, which would silently start anew.

    Args:
        member: The parameter with the state.
        is_counter_needed: Whether ``step`` may not be missing, either.
        what: What an error calls the state.
    """
    state, names = member.state, (*member.rule.state_names, *member.rule.scalar_names)
    missing = [name for name in names if is_absent(state.get(name))]
    lacks_counter = is_absent(state.get("step"))
    if len(missing) == len(names) and lacks_counter:
        return
    if missing:
        has = ", ".join(repr(name) for name, value in state.items() if not is_absent(value))
        first = member.rule.rule.scalar_states.get(missing[0])
        advice = "" if first is None else f"; add a number (a new optimizer starts with {first:g})"
        raise ValueError(f"{what} of {member.name} has no {missing[0]!r}; it has {has}{advice}")
    if is_counter_needed and lacks_counter:
        raise ValueError(
            f"{what} of {member.name} has no 'step', and neither has its group; set one of them to"
            " the number of steps taken so far"
        )
