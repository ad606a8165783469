"""Weights: what updates apply to, a parameter or the float32 master in its state."""

from typing import Any

import torch
from torch import Tensor

from ._dtensor import is_dtensor
from ._members import Member
from ._rounding import store

HALF = (torch.bfloat16, torch.float16)
MASTER = "master_param"


class Masters:
    """Float32 copies of bfloat16 and float16 parameters, in their states."""

    def dtype(self, group: dict[str, Any], param: Tensor) -> torch.dtype:
        """Return the dtype of a parameter's state ``master_param``."""
        return torch.float32

    def new(self, group: dict[str, Any], param: Tensor) -> Tensor | None:
        """Return a new ``master_param`` with the parameter's value, if it should have one.

        It may be the parameter itself.
        """
        return param.detach().to(torch.float32) if has_master(group, param) else None

    def is_computed(self, group: dict[str, Any], param: Tensor) -> bool:
        """Return whether `read` computes the weight, as a new tensor."""
        return False

    def read(self, member: Member) -> Tensor:
        """Return this process's shard of a parameter's weight.

        It is a view of the master or of the parameter, unless it has to be computed.
        """
        master = master_of(member)
        return as_local(member.param if master is None else master)

    def write(self, member: Member, weight: Tensor, is_still: Tensor | None = None) -> None:
        """Store a modified weight that `read` returned, and round it to the parameter.

        Args:
            member: The parameter.
            weight: The weight.
            is_still: A tensor of one element. If it is true, nothing is stored.
        """
        if master_of(member) is not None:
            param = as_local(member.param)
            rounded = weight.to(param.dtype)
            store(param, rounded if is_still is None else torch.where(is_still, param, rounded))


def has_master(group: dict[str, Any], param: Tensor) -> bool:
    return bool(group["master_weights"]) and param.dtype in HALF


def master_of(member: Member) -> Tensor | None:
    """Return a parameter's master, or the remainder of it, from its state."""
    return member.state.get(MASTER) if has_master(member.group, member.param) else None


def check_master_dtype(is_remainder: bool, master: Tensor) -> None:
    if is_remainder != (master.dtype == torch.int16):
        raise TypeError(
            f"a master_param has dtype {master.dtype}, but this optimizer stores"
            f" {'int16 remainders' if is_remainder else 'float32 masters'}:"
            " set store_param_remainders as it was when the state was saved"
        )


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
