"""Weights: what an update is applied to, a parameter or the float32 master that its state keeps."""

from typing import Any

import torch
from torch import Tensor

from ._dtensor import is_dtensor
from ._members import Member
from ._rule import store

HALF = (torch.bfloat16, torch.float16)
MASTER = "master_param"


class Masters:
    """Float32 copies of bfloat16 and float16 parameters, in their states."""

    def dtype(self, group: dict[str, Any], param: Tensor) -> torch.dtype:
        """Return the dtype of a parameter's state ``master_param``."""
        return torch.float32

    def new(self, group: dict[str, Any], param: Tensor) -> Tensor | None:
        """Return the ``master_param`` of a parameter with its present value, if it is to have one.

        It may be the parameter itself.
        """
        return param.detach().to(torch.float32) if has_master(group, param) else None

    def is_computed(self, group: dict[str, Any], param: Tensor) -> bool:
        """Return whether `read` has to compute the weight, as a new tensor."""
        return False

    def read(self, member: Member) -> Tensor:
        """Return a parameter's weight, this process's shard of it.

        It is the memory of the master or of the parameter, unless it has to be computed.
        """
        master = master_of(member)
        return as_local(member.param if master is None else master)

    def write(self, member: Member, weight: Tensor, is_still: Tensor | None = None) -> None:
        """Store a weight that `read` returned, once it was modified, and round it to the parameter.

        Where `is_still`, of one element, is true, the parameter is unchanged, bit for bit.
        """
        if master_of(member) is not None:
            param = as_local(member.param)
            rounded = weight.to(param.dtype)
            store(param, rounded if is_still is None else torch.where(is_still, param, rounded))


def has_master(group: dict[str, Any], param: Tensor) -> bool:
    return bool(group["master_weights"]) and param.dtype in HALF


def master_of(member: Member) -> Tensor | None:
    """Return the state that is a parameter's master, or the remainder of one."""
    return member.state.get(MASTER) if has_master(member.group, member.param) else None


def check_master_dtype(is_remainder: bool, master: Tensor) -> None:
    if is_remainder != (master.dtype == torch.int16):
        raise TypeError(
            f"a master_param has dtype {master.dtype}, but this optimizer stores"
            f" {'int16 remainders' if is_remainder else 'float32 masters'}:"
            " store_param_remainders has to be as where it was saved"
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
