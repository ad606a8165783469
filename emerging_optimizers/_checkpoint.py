"""Saving and loading: everything that can be wrong is found before anything changes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import _coded_states
from ._base import BaseOptimizer, members_of
from ._counters import check_complete, check_count, is_absent, new_counter, split_counters
from ._groups import check_group, restore_flags
from ._hyperparameters import as_saved
from ._members import Member, blame, find_param
from ._rule import GroupRule
from ._scalar_states import as_float32
from ._states import check_scalar_state, check_tensor, dtype_of
from ._step_overlap import check_loaded_states
from ._values import has_value
from ._weights import MASTER, check_not_cast, has_master

# How a group is stored and run; the last two are of `megatron` only. A loaded state dict sets
# hyperparameters, but none of these: it may come from another machine, or from an optimizer with
# another configuration.
KEPT_ON_LOAD = (
    "fused",
    "foreach",
    "capturable",
    "state_dtype",
    "master_weights",
    "stochastic_rounding",
    "use_decoupled_grad",
    "store_param_remainders",
)


class Saved:
    """A loaded state, hidden from torch, which would cast it to its parameter's dtype."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


# ---- saving --------------------------------------------------------------------------------------


def finish_state_dict(optimizer: BaseOptimizer, saved: dict[str, Any]) -> None:
    """Replace what state-dict tools do not accept in what ``torch`` has saved.

    ``state_dtype`` becomes text, and numpy's numbers become Python's.
    """
    for group in saved["param_groups"]:
        group.update({key: as_saved(group[key]) for key in optimizer.defaults if key in group})
        # The keys stay, those of a mapping too: tools look for what older checkpoints have.
        group["state_dtype"] = _dtype_text(group["state_dtype"])


def _dtype_text(state_dtype: Any) -> str | dict[str, Any] | None:
    if isinstance(state_dtype, Mapping):
        return {name: _dtype_text(dtype) for name, dtype in state_dtype.items()}
    return None if state_dtype is None else str(state_dtype)


# ---- loading: checks -----------------------------------------------------------------------------


def before_load(optimizer: BaseOptimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
    """Check a state dict, and return it as torch should load it; a pre-hook."""
    groups, states = state_dict["param_groups"], dict(state_dict["state"])
    if list(map(_num_params, groups)) != list(map(_num_params, optimizer.param_groups)):
        return None  # torch raises the error
    loaded = []
    for saved, group in zip(groups, optimizer.param_groups, strict=True):
        readable = dict(saved)
        restore_flags(optimizer, readable)
        if any(_is_empty_counter(readable.get("step"), param) for param in group["params"]):
            readable["step"] = None
        translated = optimizer._translate_group(readable)
        loaded.append(
            {
                **{k: v for k, v in translated.items() if k not in KEPT_ON_LOAD},
                **{k: group[k] for k in KEPT_ON_LOAD if k in group},
            }
        )
    defaults = _defaults(optimizer, optimizer.defaults)
    for i, (new, group, saved) in enumerate(
        zip(loaded, optimizer.param_groups, groups, strict=True)
    ):
        full = {**defaults, **new, "params": group["params"]}
        _check_group(optimizer, i, full)
        names = group.get("param_names")
        if all(isinstance(key, str) for key in new["params"]):
            names = new["params"]  # torch's tools know parameters by names
        full["param_names"] = new.get("param_names", names)
        for key, member in zip(new["params"], members_of(optimizer, full), strict=True):
            if key in states:
                states[key] = _without_empty_counter(states[key], member.param)
                if isinstance(states[key], dict):
                    states[key] = optimizer._translate_state(full, states[key])
                _check_state(optimizer, member._replace(state=states[key]), saved)
    hidden = {
        key: {k: Saved(v) if isinstance(v, Tensor) else v for k, v in values.items()}
        if isinstance(values, dict)
        else values
        for key, values in states.items()
    }
    return {**state_dict, "state": hidden, "param_groups": loaded}


def _without_empty_counter(state: Any, param: Tensor) -> Any:
    if not isinstance(state, dict) or not _is_empty_counter(state.get("step"), param):
        return state
    return {name: value for name, value in state.items() if name != "step"}


def _is_empty_counter(step: Any, param: Tensor) -> bool:
    """Return whether a counter has no value to continue from."""
    return not has_value(step) and has_value(param)


def _num_params(group: dict[str, Any]) -> int:
    return len(group["params"])


def _defaults(optimizer: BaseOptimizer, defaults: dict[str, Any]) -> dict[str, Any]:
    return {**optimizer._option_defaults, **defaults}


def _check_group(optimizer: BaseOptimizer, index: int, group: dict[str, Any]) -> None:
    check_group(optimizer, group, f"the loaded param_groups[{index}]")
    step = group.get("step")
    if not is_absent(step):
        check_count(f"the loaded param_groups[{index}]['step']", step)


def _check_state(optimizer: BaseOptimizer, member: Member, saved: dict[str, Any]) -> None:
    group, state = member.group, member.state
    what = "the loaded state"
    if not isinstance(state, dict):
        raise TypeError(f"{what} of {member.name} must be a dict, not {type(state).__name__}")
    check_complete(member, optimizer._counters.is_needed(group, member.rule), what)
    try:
        for name in member.rule.state_names:
            if not is_absent(state.get(name)):
                check_tensor(member, name, is_loaded=True)
                _coded_states.check_not_cast(optimizer, saved, member, name)
        if has_master(group, member.param) and not is_absent(state.get(MASTER)):
            check_tensor(member, MASTER, is_loaded=True)
            check_not_cast(saved, member)
        if not is_absent(state.get("step")):
            check_count("state 'step'", state["step"])
        for name in member.rule.scalar_names:
            if not is_absent(state.get(name)):
                check_scalar_state(member, name)
    except (TypeError, ValueError, RuntimeError) as error:
        raise blame(error, f"{what} of {member.name}") from None


# ---- loading: changes ----------------------------------------------------------------------------


def settle(optimizer: BaseOptimizer, new: dict[str, Any]) -> None:
    """Convert what was pickled, copied or loaded to the form that this optimizer uses.

    Args:
        optimizer: Not modified.
        new: The argument of its ``__setstate__``, possibly of an older version. Modified in place.
    """
    is_loaded = "defaults" not in new
    defaults = _defaults(optimizer, new.get("defaults") or optimizer.defaults)
    states = new["state"]
    for group in new["param_groups"]:
        for key, default in defaults.items():
            group.setdefault(key, default)
        restore_flags(optimizer, group)
        params = [param for param in group["params"] if param in states]
        rule = optimizer._rule_of(group)
        if is_loaded:
            for param in params:
                for name in [k for k, v in states[param].items() if is_absent(v)]:
                    del states[param][name]
            optimizer._counters.settle(group, rule, [states[param] for param in params])
        for param in params:
            _settle_state(optimizer, group, rule, param, states[param], is_loaded)
            states[param] = optimizer._as_stored(states[param])
    for values in states.values():
        # States that belong to no parameter stay as saved.
        if isinstance(values, dict):
            values.update({k: v.tensor for k, v in values.items() if isinstance(v, Saved)})
    if is_loaded:
        # A step without a gradient for one of them would not find that they are shared.
        split_counters(states.values(), optimizer._all_scalar_names)
        # Only now: some states have become copies.
        check_loaded_states(optimizer, new["param_groups"], states)


def _settle_state(
    optimizer: BaseOptimizer,
    group: dict[str, Any],
    rule: GroupRule,
    param: Tensor,
    state: dict[str, Any],
    is_loaded: bool,
) -> None:
    """Convert a state to the devices and dtypes that the optimizer uses."""
    step: Any = state.get("step")
    if not is_absent(step):
        if isinstance(step, Saved):
            step = step.tensor
        elif not isinstance(step, Tensor):
            step = new_counter(float(step), torch.device("cpu"))
        # A counter on its parameter's device may stay there, where it is counted without a read.
        on_device = group["capturable"] or step.device == param.device
        state["step"] = step.to(param.device if on_device else "cpu", torch.float32)
    for name in rule.scalar_names:
        number: Any = state.get(name)
        if not is_absent(number):
            counter = state.get("step")
            device = counter.device if isinstance(counter, Tensor) else torch.device("cpu")
            if isinstance(number, Saved):
                number = number.tensor
            elif not isinstance(number, Tensor):
                number = new_counter(as_float32(number), device)
            # A view would tell the step that something else refers to its memory.
            number = number.reshape(()) if number.dim() != 0 else number
            state[name] = number.to(device, torch.float32)
    for name, value in state.items():
        if isinstance(value, Saved):
            # States that the rule does not have stay as saved; and masters, which a step converts.
            is_known = name in rule.state_names
            dtype = dtype_of(optimizer, group, name, param) if is_known else None
            if value.tensor.dtype == torch.uint8:
                dtype = None  # codes
            state[name] = value.tensor.to(param.device, dtype or value.tensor.dtype)
    if is_loaded:
        try:
            _coded_states.convert(optimizer, group, param, state)
        except ValueError as error:
            raise blame(error, f"the loaded state of {find_param(optimizer, param)}") from None
    if not has_master(group, param):
        state.pop(MASTER, None)  # no step would update it
        master = optimizer._new_master(group, param)
        if master is not None:
            state[MASTER] = master
