"""States that are stored as 8-bit codes, each with its scales as a second tensor beside it."""

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ._base import BaseOptimizer
from ._codes import GROUP, Code, code_noise, code_seed, decode, encode, scale_key, scale_shape
from ._dtensor import is_dtensor
from ._hyperparameters import is_flag
from ._members import Member, find_param
from ._rounding import rounding_key, state_bits, store
from ._rule import GroupRule
from ._sharding import StatePlace, state_place
from ._values import read
from ._weights import local_shard

EIGHT_BIT = "8bit"

# Parameters with fewer elements have nothing to gain.
_FEWEST = 4096

# ---- which ---------------------------------------------------------------------------------------


def option_of(group: Mapping[str, Any], name: str) -> Any:
    """Return what a group asks for as the dtype of a state."""
    option = group["state_dtype"]
    return option.get(name) if isinstance(option, Mapping) else option


def is_to_be_coded(
    optimizer: BaseOptimizer, group: Mapping[str, Any], name: str, param: Tensor
) -> bool:
    """Return whether a new state of a parameter is stored as codes."""
    if option_of(group, name) != EIGHT_BIT or code_in(optimizer._rule_of(group), name) is None:
        return False
    return has_groups(optimizer, param) and _passes(optimizer, param)


def has_groups(optimizer: BaseOptimizer, param: Tensor) -> bool:
    """Return whether the states of a parameter can be codes; the same on every mesh."""
    if param.is_complex() or param.dtype == torch.float64:
        return False
    if optimizer._has_flat_shards and param.dim() == 1:
        return True
    return param.dim() >= 2 and param.numel() >= _FEWEST and param.shape[-1] % GROUP == 0


def code_in(rule: GroupRule, name: str) -> Code | None:
    """Return the format in which a rule allows a state to be stored."""
    return dict(zip(rule.state_names, rule.rule.codes, strict=True)).get(name)


def names_with_codes(optimizer: BaseOptimizer, *rules: GroupRule) -> set[str]:
    """Return the states that some of the class's rules, or of other ones, allow to be codes."""
    return {
        name
        for rule in (*getattr(optimizer, "_group_rules", {}).values(), *rules)
        for name, code in zip(rule.state_names, rule.codes, strict=True)
        if code is not None
    }


def check_filter(function: Any) -> Any:
    """Return a `state_dtype_filter`, if it is one."""
    if function is not None and not callable(function):
        raise TypeError(
            "state_dtype_filter must be a function of a parameter's name and the parameter, not"
            f" {type(function).__name__}"
        )
    return function


def read_filter(optimizer: BaseOptimizer, group: Mapping[str, Any]) -> None:
    """Ask for each parameter of a new group whether its states may be codes."""
    names = group.get("param_names") or [None] * len(group["params"])
    before = dict(optimizer._filtered)
    try:
        for name, param in zip(names, group["params"], strict=True):
            _ask(optimizer, name, param)
    except BaseException:
        optimizer._filtered = before
        raise


def _passes(optimizer: BaseOptimizer, param: Tensor) -> bool:
    if param in optimizer._filtered:
        return optimizer._filtered[param]
    # Megatron-Core replaces parameters by shards.
    return _ask(optimizer, None, param)


def _ask(optimizer: BaseOptimizer, name: str | None, param: Tensor) -> bool:
    function: Callable[[str | None, Tensor], Any] | None = optimizer._state_dtype_filter
    if function is None:
        return True
    result = function(name, param)
    if not is_flag(result):  # numpy's, too
        raise TypeError(
            f"state_dtype_filter returned {type(result).__name__} for"
            f" {find_param(optimizer, param) if name is None else repr(name)}; expected a bool"
        )
    optimizer._filtered[param] = bool(result)
    return optimizer._filtered[param]


# ---- new ones ------------------------------------------------------------------------------------


def new_codes(param: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes and the scales of a state that is 0."""
    codes = torch.zeros_like(
        param, dtype=torch.uint8, memory_format=torch.preserve_format, requires_grad=False
    )
    check_groups(codes)
    local = local_shard(codes)
    scales = local.new_zeros(scale_shape(local.shape))
    return codes, _sharded_like(codes, scales, scale_shape(codes.shape))


def check_groups(codes: Tensor) -> None:
    """Raise for a DTensor whose shards cut groups; on all processes, if on any."""
    if not is_dtensor(codes):
        return
    length = codes.shape[-1]
    for placement, size in zip(codes.placements, codes.device_mesh.shape, strict=True):  # type: ignore[attr-defined]
        if getattr(placement, "dim", None) == codes.dim() - 1:
            length = math.ceil(length / size)
    if length % GROUP:
        raise ValueError(
            f"its last dimension is sharded in pieces of {length}, which cuts a group of {GROUP}"
            " elements that share a scale: shard another dimension, or exclude the parameter by"
            " state_dtype_filter"
        )


def _sharded_like(like: Any, local: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor of which each process has a part, if another one is a DTensor."""
    if not is_dtensor(like):
        return local
    strides = torch.empty(shape, device="meta").stride()
    dtensor: Any = sys.modules["torch.distributed.tensor"].DTensor
    placed: Tensor = dtensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=torch.Size(shape),
        stride=strides,
    )  # fmt: skip
    return placed


# ---- reading and writing -------------------------------------------------------------------------


def is_coded(state: Mapping[str, Any], name: str) -> bool:
    """Return whether a state is stored as codes."""
    value = state.get(name)
    return isinstance(value, Tensor) and value.dtype == torch.uint8


def is_any_coded(member: Member) -> bool:
    return any(is_coded(member.state, name) for name in member.rule.state_names)


def decoded(state: Mapping[str, Any], name: str, code: Code) -> Tensor:
    """Return this process's shard of a coded state, as new float32 numbers."""
    return decode(local_shard(state[name]), local_shard(state[scale_key(name)]), code)


def set_coded(
    state: Mapping[str, Any], name: str, code: Code, values: Tensor, noise: Tensor | None = None
) -> None:
    """Store numbers in this process's shard of a coded state; see `encode`."""
    codes, scales = encode(values.float(), code, noise)
    store(local_shard(state[name]), codes)
    store(local_shard(state[scale_key(name)]), scales)


def noise_of(member: Member, state: int, position: int, step: int) -> Tensor:
    """Return the noise with which a parameter's state is rounded after a step.

    Args:
        member: The parameter.
        state: The state's number.
        position: The parameter's position in the optimizer.
        step: The parameter's step number.
    """
    local = local_shard(member.param)
    place = StatePlace(0, 0, 0, 0)
    if is_dtensor(member.param):
        place = state_place(member.param)
    key = rounding_key(code_seed(state), place.number << 32 | position, step)
    index = torch.arange(local.numel(), dtype=torch.int64, device=local.device)
    if place.width:
        index = index // place.width * place.stride + index % place.width
    bits = state_bits(key, index.add_(place.first_index).view(local.shape))
    return code_noise(bits, state)


# ---- loading -------------------------------------------------------------------------------------


def check_not_cast(
    optimizer: BaseOptimizer, saved: Mapping[str, Any], member: Member, name: str
) -> None:
    """Raise for a loaded state whose values are codes.

    ``torch.distributed.checkpoint`` casts what it loads, without a word.

    Args:
        optimizer: The optimizer.
        saved: The group that was saved.
        member: The parameter, with its loaded state.
        name: The state's key.
    """
    value = member.state[name]
    if option_of({"state_dtype": None, **saved}, name) != EIGHT_BIT or not (
        value.is_floating_point() and has_groups(optimizer, member.param)
    ):
        return
    values = local_shard(value).float()
    # No averages are like that.
    is_cast = (values == values.clamp(0, 255).round()).all() & (values > 1).any()
    if read(is_cast, 0.0):
        raise ValueError(
            f"state {name!r} has 8-bit codes that were cast to {value.dtype}: load with"
            ' state_dtype="8bit", as they were saved, and pass the state dict of that optimizer'
        )


# ---- converting ----------------------------------------------------------------------------------


def convert(
    optimizer: BaseOptimizer,
    group: Mapping[str, Any],
    param: Tensor,
    state: dict[str, Any],
) -> None:
    """Convert loaded states to codes, or from them, as a group asks.

    Args:
        optimizer: The optimizer.
        group: The parameter's group.
        param: The parameter.
        state: Its state, on its device. Modified in place.
    """
    rule = optimizer._rule_of(group)
    for name, code in zip(rule.state_names, rule.rule.codes, strict=True):
        if code is None or not isinstance(state.get(name), Tensor):
            continue
        is_wanted = is_to_be_coded(optimizer, group, name, param)
        if is_coded(state, name) and not is_wanted:
            codes, local = state[name], decoded(state, name, code)
            dtype = wide_dtype(option_of(group, name), param) or param.dtype
            state[name] = _sharded_like(codes, local.to(dtype), tuple(codes.shape))
            del state[scale_key(name)]
        elif is_wanted and not is_coded(state, name):
            wide = local_shard(state[name])
            state[name], state[scale_key(name)] = new_codes(param)
            set_coded(state, name, code, wide)


def wide_dtype(option: Any, param: Tensor) -> torch.dtype | None:
    """Return the dtype of a state that is not stored as codes; None for the parameter's."""
    if param.is_complex():
        return None
    if option == EIGHT_BIT:
        return None if param.dtype == torch.float64 else torch.float32
    dtype: torch.dtype | None = option
    return dtype
