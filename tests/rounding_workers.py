"""Workers of the tests of stochastic rounding on DTensors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from optimizers import make_grads
from support import assert_equal_bits
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from emerging_optimizers import AdamW, Lion, megatron

SHAPES = [(8, 6), (7, 5), (3, 2), (1, 9), (33,), (5, 300)]


def _place(whole: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    return distribute_tensor(whole.clone(), mesh, placements, src_data_rank=None)


def _params(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.rand(shape, generator=generator).to(dtype) + 0.5 for shape in SHAPES]


def _make(kind: str, params: Sequence[Any], fused: bool | None) -> Any:
    # Steps of less than half the spacing of the numbers, so that the random bits decide.
    if kind == "megatron":
        optimizer = megatron.FusedAdam(params, lr=1e-4, weight_decay=0.1)
        optimizer.param_groups[0].update(stochastic_rounding=True, fused=fused)
        return optimizer
    cls = Lion if kind == "Lion" else AdamW
    return cls(params, lr=1e-4, weight_decay=0.1, stochastic_rounding=True, fused=fused)


def _fitting(placements: Sequence[Placement], whole: Tensor) -> list[Placement]:
    return [Replicate() if getattr(p, "dim", 0) >= whole.dim() else p for p in placements]


def _run(
    kind: str, dtype: torch.dtype, fused: bool | None, mesh: Any = None, placements: Any = None
) -> list[nn.Parameter]:
    wholes = _params(dtype)
    where = [None if placements is None else _fitting(placements, w) for w in wholes]
    params = [
        nn.Parameter(w.clone() if p is None else _place(w, mesh, p))
        for w, p in zip(wholes, where, strict=True)
    ]
    optimizer = _make(kind, params, fused)
    torch.manual_seed(11)
    for step in (1, 2, 3):
        grads = make_grads(wholes, step)
        for param, grad, p in zip(params, grads, where, strict=True):
            param.grad = grad if p is None else _place(grad, mesh, p)
        optimizer.step()
    return params


def round_shards(rank: int, folder: Path) -> None:
    """Contiguous shards round as on one process; other shards use different random bits each."""
    count = dist.get_world_size()
    line = init_device_mesh("cpu", (count,))
    plane = init_device_mesh("cpu", (2, count // 2))
    contiguous: list[tuple[DeviceMesh, list[Placement]]] = [
        (line, [Shard(0)]),
        (line, [Replicate()]),
        (plane, [Replicate(), Shard(0)]),
        (plane, [Shard(0), Replicate()]),
        (plane, [Shard(0), Shard(0)]),
        (plane, [_StridedShard(0, split_factor=count // 2), Shard(0)]),
    ]
    for dtype in (torch.bfloat16, torch.float16):
        for kind in ("AdamW", "Lion", "megatron"):
            for fused in (None, False):
                wanted = _run(kind, dtype, fused)
                for mesh, placements in contiguous:
                    got = _run(kind, dtype, fused, mesh, placements)
                    for whole, param, shape in zip(wanted, got, SHAPES, strict=True):
                        local = param.to_local()  # type: ignore[operator]
                        share = _place(whole.detach(), mesh, param.placements).to_local()  # type: ignore[attr-defined]
                        label = f"{kind} {dtype} {fused} {placements} {shape}"
                        assert_equal_bits(local.detach(), share, label)
    for fused in (None, False):
        draw_independently(line, plane, fused)
        keep_the_order_of_memory(line, fused)


def _drawn(param: Any, fused: bool | None) -> Tensor:
    """Which of a process's elements a step of half the spacing rounds up."""
    optimizer = Lion([param], lr=2.0**-8, weight_decay=0.0, stochastic_rounding=True, fused=fused)
    param.grad = -torch.ones_like(param)
    torch.manual_seed(3)
    optimizer.step()
    moved: Tensor = param.to_local().detach() != 1.0
    assert 0.4 < moved.float().mean().item() < 0.6
    return moved


def _gathered(mine: Tensor) -> list[Tensor]:
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(found, mine)
    return found


def draw_independently(line: DeviceMesh, plane: DeviceMesh, fused: bool | None) -> None:
    """Shards of columns: replicas round alike, different shards independently."""
    whole = torch.ones(64, 32, dtype=torch.bfloat16)
    drawn = _gathered(_drawn(_place(whole, line, [Shard(1)]), fused))
    for i, one in enumerate(drawn):
        for other in drawn[:i]:
            assert 0.4 < (one == other).float().mean().item() < 0.6
    drawn = _gathered(_drawn(_place(whole, plane, [Shard(1), Replicate()]), fused))
    for i, one in enumerate(drawn):
        for j, other in enumerate(drawn):
            same = (one == other).float().mean().item()
            is_replica = plane.mesh[0].tolist().count(i) == plane.mesh[0].tolist().count(j)
            assert same == 1.0 if is_replica else 0.4 < same < 0.6


def keep_the_order_of_memory(line: DeviceMesh, fused: bool | None) -> None:
    """In a transposed parameter, shards of columns are contiguous, and round as such."""
    count, at = line.size(), line.get_local_rank()
    width = 32 // count

    def transposed(columns: int, placement: Placement) -> DTensor:
        local = torch.ones(columns, 64, dtype=torch.bfloat16).t()
        return DTensor.from_local(local, line, [placement], run_check=False)

    wanted = _drawn(transposed(32, Replicate()), fused)
    columns = transposed(width, Shard(1))
    assert columns.stride() == (1, 64)
    share = wanted[:, at * width : (at + 1) * width]
    assert torch.equal(_drawn(columns, fused), share)
    one, other, *_ = _gathered(_drawn(transposed(32, Shard(0)), fused).contiguous())
    assert 0.4 < (one == other).float().mean().item() < 0.6
