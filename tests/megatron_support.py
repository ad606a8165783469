"""Classes, parameters and gradients for the tests of `megatron`."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from optimizers import MEGATRON, make_grads
from torch import Tensor

from emerging_optimizers.megatron import merge_master

CLASSES = list(MEGATRON.values())
every_class = pytest.mark.parametrize("cls", CLASSES)
devices = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda, id="cuda")]
)
BF16, F32 = torch.bfloat16, torch.float32
OPTIONS: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1}
# As Megatron constructs it for bfloat16 parameters: with masters and decoupled gradients.
AWARE: dict[str, Any] = {**OPTIONS, "master_weights": True, "use_decoupled_grad": True}


def make_params(
    dtype: torch.dtype = BF16,
    device: str = "cpu",
    sizes: Sequence[int | tuple[int, ...]] = (37, 1, 0, 130),
) -> list[Tensor]:
    """Usually flat tensors, no `nn.Parameter`, like Megatron's shards."""
    generator = torch.Generator("cpu").manual_seed(7)
    return [torch.randn(n, generator=generator).to(device, dtype) for n in sizes]


def decouple_grads(params: Sequence[Tensor], step: int, dtype: torch.dtype = F32) -> None:
    for param, grad in zip(params, make_grads([p.float() for p in params], step), strict=True):
        param.decoupled_grad = grad.to(param.device, dtype)  # type: ignore[attr-defined]


def run(optimizer: Any, steps: Sequence[int], dtype: torch.dtype = F32) -> None:
    for step in steps:
        decouple_grads(
            [p for group in optimizer.param_groups for p in group["params"]], step, dtype
        )
        optimizer.step()


def masters(optimizer: Any) -> list[Tensor]:
    """The float32 masters, merged if only their remainders are stored."""
    found = []
    for param in (p for group in optimizer.param_groups for p in group["params"]):
        master = optimizer.get_unscaled_state(param, "master_param")
        found.append(merge_master(param, master) if master.dtype == torch.int16 else master)
    return found
