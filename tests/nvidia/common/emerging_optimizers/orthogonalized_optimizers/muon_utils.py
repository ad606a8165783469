from typing import Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from emerging_optimizers import triton_kernels

NSCoeffT = Literal["simple", "quintic"]
_COEFFICIENTS = {
    "simple": [(3.4445, -4.7750, 2.0315)],
    "quintic": [
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ],
}


def newton_schulz(x: Tensor, steps: int, coefficient_type: NSCoeffT = "quintic") -> Tensor:
    is_tall = x.size(-2) > x.size(-1)
    y = (x.mT if is_tall else x) / x.norm().clamp_min(1e-7)
    table = _COEFFICIENTS[coefficient_type]
    for step in range(steps):
        a, b, c = table[step % len(table)]
        gram = triton_kernels.tsyrk_ex(y)
        y = a * y + (b * gram + c * gram @ gram) @ y
    return y.mT if is_tall else y


def newton_schulz_tp(
    x: Tensor,
    steps: int,
    coefficient_type: NSCoeffT,
    tp_group: ProcessGroup,
    partition_dim: int | None = None,
    mode: Literal["duplicated", "distributed"] = "duplicated",
) -> Tensor:
    if partition_dim is None:
        return newton_schulz(x, steps, coefficient_type)
    shards = [torch.empty_like(x) for _ in range(tp_group.size())]
    torch.distributed.all_gather(shards, x, tp_group)
    full = newton_schulz(torch.cat(shards, partition_dim), steps, coefficient_type)
    return full.chunk(tp_group.size(), partition_dim)[tp_group.rank()]
