"""Weights: what updates apply to, a parameter or its float32 master, which may be split."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ._dtensor import is_dtensor
from ._members import Member
from ._rounding import store
from ._split_masters import merge_master, split_master
from ._values import read

HALF = (torch.bfloat16, torch.float16)
MASTER = "master_param"
# The value of the option `master_weights` that splits the masters of bfloat16 parameters.
SPLIT = "split"


def has_master(group: dict[str, Any], param: Tensor) -> bool:
    return bool(group["master_weights"]) and param.dtype in HALF


def is_split(group: dict[str, Any], param: Tensor) -> bool:
    """Return whether only the remainder of a parameter's master is stored."""
    option = group["master_weights"]
    # The other key is of `megatron` only.
    is_wanted = option == SPLIT or (option and group.get("store_param_remainders", False))
    return bool(is_wanted) and param.dtype == torch.bfloat16


def master_of(member: Member) -> Tensor | None:
    """Return a parameter's master, or the remainder of it, from its state."""
    return member.state.get(MASTER) if has_master(member.group, member.param) else None


def new_master(group: dict[str, Any], param: Tensor) -> Tensor | None:
    """Return a new ``master_param`` with the parameter's value, if it should have one."""
    if is_split(group, param):
        return torch.zeros_like(param, dtype=torch.int16, requires_grad=False)
    return param.detach().to(torch.float32) if has_master(group, param) else None


def check_master_dtype(master: Tensor, param: Tensor) -> None:
    """Raise for a ``master_param`` that is no master of a parameter, and no remainder of one."""
    expected = [torch.float32, *([torch.int16] if param.dtype == torch.bfloat16 else [])]
    if master.dtype not in expected:
        raise TypeError(
            f"state {MASTER!r} has dtype {master.dtype}; expected {' or '.join(map(str, expected))}"
        )


def check_not_cast(saved: Mapping[str, Any], member: Member) -> None:
    """Raise for a loaded master whose values are those of a remainder.

    ``torch.distributed.checkpoint`` casts what it loads, without a word.

    Args:
        saved: The group that was saved.
        member: The parameter, with its loaded state.
    """
    master = member.state[MASTER]
    if master.dtype != torch.float32 or not is_split(
        {"master_weights": False, **saved}, member.param
    ):
        return
    master = as_local(master)
    # No weights are like that. Those that were merged by hand may be 0 or 1.
    is_cast = (master == master.to(torch.int16)).all() & (master.abs() > 256).any()
    if read(is_cast, 0.0):
        raise ValueError(
            f"state {MASTER!r} has remainders that were cast to {master.dtype}: load with"
            f" master_weights={SPLIT!r}, as they were saved, and change the group's option"
            " afterwards"
        )


def convert_master(member: Member) -> None:
    """Store a parameter's master as its group asks; a loaded one may be stored in the other way.

    A step does it, no load: a model may be loaded after its optimizer, and a remainder is of the
    parameter that it was saved with. A master that is split rounds the parameter again, like a
    step: ties away from zero, and not to even.
    """
    group, param, master = member.group, member.param, master_of(member)
    if master is None or (master.dtype == torch.int16) == is_split(group, param):
        return
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():  # type: ignore[no-untyped-call]
        raise RuntimeError(
            f"a CUDA graph cannot capture the step that converts a {MASTER} to"
            f" master_weights={group['master_weights']!r}: take one step before the capture"
        )
    dtype = torch.int16 if master.dtype == torch.float32 else torch.float32
    converted = torch.empty_like(param, dtype=dtype, requires_grad=False)
    if dtype == torch.float32:
        merge_master(as_local(param), as_local(master), as_local(converted))
    else:
        # A state dict may have the same tensor.
        split_master(as_local(master).clone(), as_local(param), as_local(converted))
    member.state[MASTER] = converted


# ---- what a step updates -------------------------------------------------------------------------


def read_weight(member: Member) -> Tensor:
    """Return this process's shard of a parameter's weight.

    It is a view of the master or of the parameter; a new tensor, if the master is split.
    """
    param, master = as_local(member.param), master_of(member)
    if master is None:
        return param
    master = as_local(master)
    return merge_master(param, master) if master.dtype == torch.int16 else master


def write_weight(member: Member, weight: Tensor, is_still: Tensor | None = None) -> None:
    """Store a modified weight that `read_weight` returned, and round it to the parameter.

    Args:
        member: The parameter.
        weight: The weight.
        is_still: A tensor of one element. If it is true, nothing is stored.
    """
    param, master = as_local(member.param), master_of(member)
    if master is None:
        return
    if master.dtype != torch.int16:
        rounded = weight.to(param.dtype)
        store(param, rounded if is_still is None else torch.where(is_still, param, rounded))
        return
    stored = param, as_local(master)
    if is_still is None:
        return split_master(weight, *stored)
    changed = tuple(map(torch.empty_like, stored))
    split_master(weight, *changed)
    for old, new in zip(stored, changed, strict=True):
        store(old, torch.where(is_still, old, new))


def as_local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor, as real numbers."""
    tensor = local_shard(tensor)
    if tensor.is_complex():
        # A gradient can be a view with its conjugation still to be done.
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor


def local_shard(tensor: Any) -> Tensor:
    local: Tensor = tensor.to_local() if is_dtensor(tensor) else tensor
    return local
