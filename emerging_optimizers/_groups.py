"""Parameter groups: reading and checking their options and their rule's hyperparameters."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ._base import BaseOptimizer
from ._coded_states import EIGHT_BIT, names_with_codes
from ._dtensor import whole
from ._hyperparameters import (
    Hyperparameter,
    LearningRate,
    NonNegative,
    described,
    is_in_domain,
    read_flag,
    read_number,
    read_numbers,
    read_optional_flag,
)
from ._rule import GroupKey, GroupRule
from ._values import has_value, items_of
from ._weights import SPLIT

STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPE_SCALING = "use_shape_scaling"
WEIGHT_DECAY_METHODS = ("decoupled", "independent", "palm", "l2")

# What torch.optim's errors call them.
TITLES = {"lr": "learning rate", "eps": "epsilon value", "weight_decay": "weight_decay value"}

_OPTIONAL_FLAGS = ("fused", "foreach")
_FLAGS = (
    *_OPTIONAL_FLAGS,
    "maximize",
    "capturable",
    "master_weights",
    "stochastic_rounding",
    "differentiable",
)
# Of torch.optim's groups, which are loaded.
_FOREIGN_FLAGS = ("decoupled_weight_decay",)


def read_hyperparameter(
    group: Mapping[str, Any], key: GroupKey, hyperparameter: Hyperparameter
) -> Any:
    """Return one of a rule's hyperparameters, from where a group has it."""
    if isinstance(key, str):
        return hyperparameter.read(key, group[key])
    name, index, length = key
    return read_numbers(name, group[name], length)[index]


def read_hyperparameters(group: Mapping[str, Any], rule: GroupRule) -> dict[str, Any]:
    """Return the arguments of the rule's formula, except tensors and ``step``."""
    pairs = zip(rule.rule.hyperparameters, rule.keys, strict=True)
    return {wanted.name: read_hyperparameter(group, key, wanted) for wanted, key in pairs}


def scales_by_shape(group: Mapping[str, Any], rule: GroupRule) -> bool:
    """Return whether the update of a matrix is scaled by its shape."""
    pairs = zip(rule.rule.hyperparameters, rule.keys, strict=True)
    return any(
        bool(read_hyperparameter(group, key, wanted))
        for wanted, key in pairs
        if wanted.name == SHAPE_SCALING and wanted.kind == "flag"
    )


def find_unknown_numbers(group: Mapping[str, Any], rule: GroupRule) -> list[tuple[str, Any]]:
    """Return the hyperparameters that are tensors without a value, such as ``betas[0]``."""
    unknown = []
    pairs = zip(rule.rule.hyperparameters, rule.keys, strict=True)
    for key in ("lr", "weight_decay", *(key for wanted, key in pairs if wanted.kind != "any")):
        name = key if isinstance(key, str) else key[0]
        value = group[name]
        if type(value) in (float, int, bool):
            continue
        items = None if isinstance(value, Tensor) else items_of(value)
        if items is None:
            if not has_value(value):
                unknown.append((name, value))
        else:
            unknown += [(f"{name}[{i}]", x) for i, x in enumerate(items) if not has_value(x)]
    return unknown


def check_group(
    optimizer: BaseOptimizer, group: Mapping[str, Any], where: str = "", is_new: bool = False
) -> None:
    """Raise for a group with an invalid option or hyperparameter.

    Args:
        optimizer: The optimizer, whose rule declares hyperparameters and domains.
        group: The group, with all keys but ``params``.
        where: The group's name in messages, such as ``param_groups[1]``. "": no name.
        is_new: Whether the group is being added: no scheduler has set its learning rate yet, and
            values on a device may be read.
    """
    found = optimizer._rule_of(group)
    keys, rule = found.keys, found.rule
    values: dict[str, Any] = {"step": 1}
    name = ""
    try:
        name = "lr"
        _check_lr(group[name], is_new)
        name = "weight_decay"
        if not is_in_domain(read_number(name, group[name]), NonNegative):
            raise ValueError(f"Invalid {TITLES[name]}: {group[name]}")
        name = "weight_decay_method"
        _check_method(group[name])
        for wanted, key in zip(rule.hyperparameters, keys, strict=True):
            name = key if isinstance(key, str) else key[0]
            values[wanted.name] = read_hyperparameter(group, key, wanted)
            _check_hyperparameter(optimizer, group, key, wanted, values[wanted.name])
        name = ""
        rule.check_together(values)
        for name in flags_of(optimizer, group):
            read_group_flag(group, name)
        name = ""
        _check_combinations(optimizer, group)
        name = "state_dtype"
        _check_state_dtype(optimizer, group)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _located(error, where, name) from None


def check_flags(optimizer: BaseOptimizer, group: Mapping[str, Any], where: str) -> None:
    """Raise for a flag of a group that is not a bool, or another value that it may have."""
    for name in flags_of(optimizer, group):
        if group[name] is not False and group[name] is not True:
            try:
                read_group_flag(group, name)
            except TypeError as error:
                raise _located(error, where, name) from None


def check_state_dtypes(optimizer: BaseOptimizer, groups: Iterable[Mapping[str, Any]]) -> None:
    """Raise for a group with an invalid ``state_dtype``."""
    for i, group in enumerate(groups):
        try:
            _check_state_dtype(optimizer, group)
        except (TypeError, ValueError) as error:
            raise _located(error, f"param_groups[{i}]", "state_dtype") from None


def flags_of(optimizer: BaseOptimizer, group: Mapping[str, Any]) -> list[str]:
    """Return the keys of the flags that a group has."""
    found = optimizer._rule_of(group)
    keys, rule = found.keys, found.rule
    names = [
        key
        for wanted, key in zip(rule.hyperparameters, keys, strict=True)
        if wanted.kind == "flag" and isinstance(key, str) and key in group
    ]
    others = (*_FLAGS, *optimizer._own_flags)
    return names + [name for name in others if name in group and name not in keys]


def read_group_flag(group: Mapping[str, Any], name: str) -> bool | str | None:
    """Return a flag as a bool; or as None or "split", for flags that may be that."""
    value = group[name]
    if name in _OPTIONAL_FLAGS:
        return read_optional_flag(name, value)
    if name != "master_weights":
        return read_flag(name, value)
    is_split = isinstance(value, str) and value == SPLIT
    return SPLIT if is_split else read_flag(name, value, f"a bool or {SPLIT!r}")


def restore_flags(optimizer: BaseOptimizer, group: dict[str, Any]) -> None:
    """Turn flags of a saved group that are 0 or 1 into bools: earlier versions accepted these."""
    for name in (*flags_of(optimizer, group), *_FOREIGN_FLAGS):
        if type(group.get(name)) is int and group[name] in (0, 1):
            group[name] = bool(group[name])


def _located(error: Exception, where: str, name: str) -> Exception:
    """Return an error whose message ends with the place of what is wrong."""
    if not where:
        return error
    kinds = (TypeError, ValueError, RuntimeError)
    kind = next(kind for kind in kinds if isinstance(error, kind))
    return kind(f"{error} ({where}[{name!r}])" if name else f"{error} ({where})")


def _check_hyperparameter(
    optimizer: BaseOptimizer,
    group: Mapping[str, Any],
    key: GroupKey,
    wanted: Hyperparameter,
    value: Any,
) -> None:
    if wanted.kind in ("flag", "any") or value is None:
        return
    if isinstance(key, str) and wanted.kind != "numbers":
        if not is_in_domain(value, wanted.domain):
            raise ValueError(f"Invalid {TITLES.get(key, key)}: {group[key]}")
        return
    name, first = (key, 0) if isinstance(key, str) else key[:2]
    for i, number in enumerate(value if isinstance(value, tuple) else (value,), first):
        if not is_in_domain(number, wanted.domain):
            title = optimizer._beta_title if name == "betas" else name
            raise ValueError(f"Invalid {title} at index {i}: {group[name][i]}")


def _check_lr(lr: Any, is_new: bool) -> None:
    value = lr
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if lr.is_meta or not (is_new or lr.is_cpu):
            return  # no step waits for a device's number
        value = whole(lr)
    if not is_in_domain(read_number("lr", value), NonNegative if is_new else LearningRate):
        raise ValueError(f"Invalid {TITLES['lr']}: {lr}")


def _check_method(method: Any) -> None:
    if not isinstance(method, str):
        raise TypeError(f"weight_decay_method must be a str, not {described(method)}")
    if method not in WEIGHT_DECAY_METHODS:
        raise ValueError(
            f"Invalid weight_decay_method: {method!r}; expected one of"
            f" {', '.join(map(repr, WEIGHT_DECAY_METHODS))}"
        )


def _check_combinations(optimizer: BaseOptimizer, group: Mapping[str, Any]) -> None:
    name = type(optimizer).__name__
    if group["differentiable"]:
        raise ValueError(
            f"{name} does not support differentiable=True: its step records no autograd graph;"
            " torch.optim has optimizers that do"
        )
    rule = optimizer._rule_of(group).rule
    if not (rule.has_formula or group["fused"] is None or group["fused"]):
        raise ValueError(
            f"fused=False, but the rule {rule.name} is written in C++ and has no formula in"
            " PyTorch operations: use fused=None"
        )
    if group["fused"] and group.get("foreach"):
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    if group["master_weights"] and group["stochastic_rounding"]:
        raise ValueError(
            "master_weights and stochastic_rounding cannot be combined: with a float32 master,"
            " nothing is lost to rounding"
        )


def _check_allows_codes(
    optimizer: BaseOptimizer, group: Mapping[str, Any], key: str | None
) -> None:
    """Raise for ``"8bit"`` where no rule of the class allows it; `key`: for one state."""
    rule = optimizer._rule_of(group)
    allowed = names_with_codes(optimizer, rule)
    if (key in allowed) if key is not None else allowed:
        return
    what = "any state" if key is None else f"state {key!r}"
    cure = "annotate a state with eo.SignedState or eo.UnsignedState"
    if not rule.rule.has_formula:
        cure = "list codes in kStateCodes"
    raise ValueError(
        f'Invalid state_dtype: "8bit" is not allowed for {what} of the rule {rule.rule.name};'
        f" in a rule that you write, {cure}"
    )


def _check_state_dtype(optimizer: BaseOptimizer, group: Mapping[str, Any]) -> None:
    option = group["state_dtype"]
    # Also those of the class's other rules, so that one option fits all groups.
    names = (*optimizer._rule_of(group).state_names, *optimizer._all_state_names)
    states = tuple(dict.fromkeys(names))
    by_key = option if isinstance(option, (dict, Mapping)) else dict.fromkeys(states, option)
    for key, dtype in by_key.items():
        if key not in states:
            raise ValueError(
                f"Invalid state_dtype: {type(optimizer).__name__} has no state {key!r}; it has"
                f" {', '.join(map(repr, states))}"
            )
        if dtype is None:
            continue
        if isinstance(dtype, str) and dtype == EIGHT_BIT:
            _check_allows_codes(optimizer, group, None if option is dtype else key)
            continue
        if not isinstance(dtype, torch.dtype):
            raise TypeError(
                f'state_dtype must be a dtype, "8bit", a dict of them or None, not'
                f" {described(dtype)}"
            )
        if dtype not in STATE_DTYPES:
            raise ValueError(
                f"Invalid state_dtype: {dtype}; expected torch.float32, torch.bfloat16,"
                ' torch.float16 or "8bit"'
            )
