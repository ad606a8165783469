"""Workers of the distributed tests of mixed precision."""

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from distributed_workers import CASES
from support import assert_equal_bits
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from emerging_optimizers import AdamW

SCALE = 2.0**10
Trained = tuple[list[float], list[Tensor], set[float]]


def train_with_fsdp1(rank: int, folder: Path, use_orig_params: str) -> None:
    """After an infinity in one process, all processes skip the step and halve the scale."""
    options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}

    def train(cls: Any, unscale: bool = False, **more: Any) -> Trained:
        return _train(rank, lambda p: cls(p, **options, **more), use_orig_params == "True", unscale)

    wanted_scales, wanted, _ = train(torch.optim.AdamW)
    assert wanted_scales == [SCALE, SCALE / 2, SCALE / 2, SCALE / 4, SCALE / 4]
    for fused in (None, False, True):
        # A fused step does not combine found_inf over processes: unscale_ does.
        scales, params, steps = train(AdamW, fused=fused, unscale=fused is True)
        assert scales == wanted_scales, (fused, scales)
        assert steps == {3.0}, (fused, steps)
        for got, expected in zip(params, wanted, strict=True):
            torch.testing.assert_close(got, expected)
            first = got.clone()
            dist.broadcast(first, 0)
            assert_equal_bits(got, first, f"fused={fused}")
    for name, make, takes_matrices_only, _ in CASES:
        if takes_matrices_only:
            continue  # shards are flat
        scales, _, steps = _train(
            rank, lambda p, make=make: make(p, lr=0.01), use_orig_params == "True", False
        )
        assert scales == wanted_scales, (name, scales)
        assert steps == {3.0}, (name, steps)


def _train(rank: int, make: Any, use_orig_params: bool, unscale: bool) -> Trained:
    """Return the scales, the parameters gathered on each process, and the step counts."""
    torch.manual_seed(0)
    model = FullyShardedDataParallel(
        nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)),
        device_id=torch.device("cpu"),
        use_orig_params=use_orig_params,
    )
    optimizer = make(model.parameters())
    scaler = ShardedGradScaler("cpu", init_scale=SCALE)
    scales = []
    for step in range(5):
        generator = torch.Generator().manual_seed(2 * step + rank)
        loss = model(torch.randn(6, 4, generator=generator)).square().mean()
        scaler.scale(loss).backward()
        # One rank after another.
        if step in (1, 3) and rank == step // 2:
            grads = [p.grad for p in model.parameters() if p.grad is not None and p.grad.numel()]
            grads[-1].view(-1)[0] = math.inf
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    with FullyShardedDataParallel.summon_full_params(model):
        params = [p.detach().clone() for p in model.parameters()]
    return scales, params, {state["step"].item() for state in optimizer.state.values()}
