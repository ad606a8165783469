"""Float32 masters of bfloat16 parameters, stored as the 16 bits that the parameters lack."""

import torch
from torch import Tensor

from ._rounding import store


def split_master(master: Tensor, param: Tensor, remainder: Tensor) -> None:
    """Store a float32 master as a bfloat16 parameter and the 16 bits that this leaves.

    The parameter gets the high 16 bits, plus 1 where the low 16 bits are 0x8000 or more: it is the
    master, rounded to nearest, ties away from zero. The remainder gets the low 16 bits. This is
    TransformerEngine's encoding.

    Args:
        master: A float32 tensor. Every NaN in it becomes 0x7FC00000.
        param: A bfloat16 tensor of its shape; overwritten.
        remainder: An int16 tensor of its shape; overwritten.

    Example:
        >>> import torch
        >>> from emerging_optimizers.megatron import merge_master, split_master
        >>> master = torch.tensor([1.0, 1.00390625, 3.14159274])
        >>> param, remainder = master.bfloat16(), torch.empty(3, dtype=torch.int16)
        >>> split_master(master, param, remainder)
        >>> remainder
        tensor([     0, -32768,   4059], dtype=torch.int16)
        >>> torch.equal(merge_master(param, remainder), master)
        True
    """
    master.nan_to_num_(nan=torch.nan, posinf=torch.inf, neginf=-torch.inf)
    bits = master.view(torch.int32)
    store(remainder, bits)
    store(param.view(torch.int16), torch.add(bits, 0x8000).bitwise_right_shift_(16))


def merge_master(param: Tensor, remainder: Tensor, master: Tensor | None = None) -> Tensor:
    """Return the float32 master that :func:`split_master` stored.

    Args:
        param: A bfloat16 tensor.
        remainder: An int16 tensor of its shape.
        master: A float32 tensor of its shape, to overwrite. None: a new one.
    """
    if master is None:
        master = torch.empty_like(param, dtype=torch.float32, requires_grad=False)
    # Where the parameter was rounded up, it has 1 too much, and the remainder is negative.
    bits = master.view(torch.int32)
    store(bits, param.view(torch.int16))
    bits.mul_(0x10000).add_(remainder.to(torch.int32))
    return master
