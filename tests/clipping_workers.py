"""Workers of the distributed tests of clipping."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed_workers import backward, full, make_model, shard
from support import assert_equal_bits
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from emerging_optimizers import AdamW, clip_coefficient, megatron
from emerging_optimizers.scalar_optimizers import SingleMomentumOptimizer

ORDERS = (2.0, 1.0, math.inf, 3.0, -math.inf, 0.0)
Place = tuple[DeviceMesh, Sequence[Placement]] | None


def clip(rank: int, folder: Path) -> None:
    """The norms of a single process, on all processes."""
    world_size = dist.get_world_size()
    line = init_device_mesh("cpu", (world_size,))
    plane = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("data", "tensor"))
    clip_placed(rank, line, plane)
    clip_values_that_are_not_finite(rank, line)
    clip_without_gradients(rank, line)
    clip_fsdp2(rank, line, plane)
    refuse_mixed_kinds(line)


def place(whole: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """Distribute a tensor that all processes have."""
    return distribute_tensor(whole.clone(), mesh, placements, src_data_rank=None)


def whole_grads(shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def make_placed(grads: Sequence[Tensor], places: Sequence[Place]) -> list[Any]:
    params: list[Any] = []
    for grad, where in zip(grads, places, strict=True):
        if where is None:
            params.append(nn.Parameter(torch.ones_like(grad)))
            params[-1].grad = grad.clone()
        else:
            params.append(nn.Parameter(place(torch.ones_like(grad), *where)))
            params[-1].grad = place(grad, *where)
    return params


def make_whole(grads: Sequence[Tensor]) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.ones_like(grad)) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    return params


def same_everywhere(value: Tensor) -> None:
    """Check that all processes have the same bits."""
    first = value.clone()
    dist.broadcast(first, 0)
    assert_equal_bits(value, first, "of rank 0")


def check(params: Sequence[Any], grads: Sequence[Tensor], label: str) -> None:
    """Compare with the undistributed gradients, in every order."""
    for order in ORDERS:
        norm, coefficient = clip_coefficient(params, 0.5, order)
        wanted = clip_coefficient(make_whole(grads), 0.5, order)
        assert not isinstance(norm, DTensor)
        for got, expected in zip((norm, coefficient), wanted, strict=True):
            assert got.dtype == expected.dtype, (label, order)
            ulp = np.spacing(np.float32(expected.item()))
            assert abs(got.item() - expected.item()) <= ulp, (label, order, got, expected)
            same_everywhere(got)


def clip_placed(rank: int, line: DeviceMesh, plane: DeviceMesh) -> None:
    """Every placement: uneven, empty, replicated, partial; on several meshes at once."""
    tensor = plane["tensor"]
    replicate, rows, columns = Replicate(), Shard(0), Shard(1)
    strided = _StridedShard(0, split_factor=plane.size(1))
    shapes = [(5, 3), (1, 4), (4, 7), (3, 2), (7, 2), (6, 2), (3, 5), (8, 3), (4, 4)]
    kinds: dict[str, list[Place]] = {
        "sharded": [(line, [rows])] * 9,
        "some are replicated": [(line, [rows]), (line, [replicate]), (line, [columns])] * 2
        + [(line, [replicate])] * 3,
        "all are replicated": [(line, [replicate])] * 9,
        "HSDP": [(plane, [replicate, rows])] * 9,
        "two dimensions": [
            (plane, [rows, replicate]),
            (plane, [replicate, columns]),
            (plane, [rows, columns]),
            (plane, [replicate, replicate]),
            (plane, [rows, rows]),
            (plane, [strided, rows]),
            (plane, [rows, columns]),
            (plane, [strided, rows]),
            (plane, [columns, rows]),
        ],
        "several meshes": [
            None,
            (plane, [replicate, rows]),
            (line, [rows]),
            (tensor, [rows]),
            None,
            (plane, [rows, replicate]),
            (line, [replicate]),
            (tensor, [replicate]),
            (line, [columns]),
        ],
    }
    for label, places in kinds.items():
        grads = whole_grads(shapes)
        if label == "sharded":
            grads[4] = grads[4].double()
        params = make_placed(grads, places)
        before = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in params]
        kept = [tensor.clone() for tensor in before]
        check(params, grads, label)
        for one, other in zip(before, kept, strict=True):
            assert_equal_bits(one, other, "gradient")

    # Gradients that are partial sums, or placed otherwise than their parameters.
    grads = whole_grads(shapes)
    params = make_placed(grads, [(line, [rows]), (line, [columns]), (line, [replicate])] * 3)
    for i in (0, 2, 4):
        share = grads[i] if rank == 0 else torch.zeros_like(grads[i])
        params[i].grad = DTensor.from_local(share, line, [Partial()])
    params[1].grad = place(grads[1], line, [replicate])
    params[3].grad = place(grads[3], plane, [replicate, rows])
    check(params, grads, "placed otherwise")
    params.reverse()
    check(params, grads[::-1], "in another order")


def clip_values_that_are_not_finite(rank: int, line: DeviceMesh) -> None:
    world_size = dist.get_world_size()
    for where in (0, world_size - 1):
        for value in (math.inf, math.nan):
            grad = torch.ones(2 * world_size, 2)
            grad[2 * where, 1] = value
            grad[1 - where % 2] = 3.0
            (param,) = make_placed([grad], [(line, [Shard(0)])])
            for order in (1.0, 2.0, 3.0, math.inf):
                norm, coefficient = clip_coefficient(param, 1.0, order)
                torch.testing.assert_close(norm.item(), value, equal_nan=True)
                torch.testing.assert_close(coefficient.item(), 1 / value, equal_nan=True)
            norm = clip_coefficient(param, 1.0, -math.inf).total_norm
            torch.testing.assert_close(
                norm.item(), 1.0 if value == math.inf else value, equal_nan=True
            )
            with pytest.raises(RuntimeError, match="error_if_nonfinite=False"):
                clip_coefficient(param, 1.0, error_if_nonfinite=True)
            optimizer = AdamW([param], lr=0.1)
            optimizer.step(max_norm=1.0)
            assert full(param).isnan().any()


def clip_without_gradients(rank: int, line: DeviceMesh) -> None:
    """Processes without gradients, or with an overflow of their own, join the all-reduce."""
    grads = whole_grads([(4, 2), (5, 3)])
    wanted = clip_coefficient(make_whole(grads), 0.5)
    for fused in (None, False):
        for make in (AdamW, megatron.FusedAdam, SGD):
            for absent in ([], [0, 1]):
                params = make_placed(grads, [(line, [Shard(0)])] * 2)
                optimizer = make(params, lr=0.1)
                optimizer.param_groups[0]["fused"] = fused
                if rank == 1 and absent:
                    for param in params:
                        param.grad = None
                elif rank == 1:
                    optimizer.found_inf = torch.tensor(1.0)
                optimizer.step(max_norm=0.5)
                norm = optimizer.grad_norm
                assert norm is not None
                same_everywhere(norm)
                if not absent:
                    assert abs(norm - wanted.total_norm) <= 1e-6
                assert not full(params[0]).eq(1.0).all()
                if rank == 1:
                    assert params[0].to_local().eq(1.0).all()


def calculate_sgd_update(grad: Tensor, exp_avg: Tensor, *, momentum: float, step: int) -> Tensor:
    return exp_avg.mul_(momentum).add_(grad)


class SGD(SingleMomentumOptimizer):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(
            params,
            {"lr": lr, "momentum": 0.9},
            update_fn=calculate_sgd_update,
            update_kwarg_names=("momentum",),
        )


def clip_fsdp2(rank: int, line: DeviceMesh, plane: DeviceMesh) -> None:
    """Training: the norms of one process with the gathered gradients, and of torch."""
    for kind in ("float32", "HSDP", "mixed precision", "2-D"):
        sizes = {"hidden": 12} if kind == "2-D" else {}
        model, other = (make_model(True, **sizes) for _ in range(2))
        if kind == "HSDP":
            fully_shard(model, mesh=plane)
        else:
            shard(model, kind)
        params, others = list(model.parameters()), list(other.parameters())
        optimizer, alone = (AdamW(p, lr=0.003, weight_decay=0.1) for p in (params, others))
        for step in range(3):
            # Processes of one tensor-parallel group have the same data.
            backward(model, step, rank // (2 if kind == "2-D" else 1))
            for p, q in zip(params, others, strict=True):
                q.grad = full(p.grad)
            wanted = clip_coefficient(others, 0.05)
            optimizer.step(max_norm=0.05)
            alone.step(grad_multiplier=wanted.coefficient)
            norm: Any = optimizer.grad_norm
            ulp = np.spacing(np.float32(wanted.total_norm.item()))
            assert abs(norm.item() - wanted.total_norm.item()) <= ulp, kind
            same_everywhere(norm)
            if kind != "2-D":  # torch refuses DTensors on two meshes
                grads = [p.grad for p in params if p.grad is not None]
                theirs: Any = nn.utils.get_total_norm(grads)
                torch.testing.assert_close(norm, theirs.full_tensor(), rtol=1e-5, atol=0.0)
            optimizer.zero_grad()
        for p, q in zip(params, others, strict=True):
            torch.testing.assert_close(full(p), full(q), rtol=1e-5, atol=1e-6)


def refuse_mixed_kinds(line: DeviceMesh) -> None:
    (param,) = make_placed([torch.ones(2)], [(line, [Shard(0)])])
    optimizer = megatron.FusedAdam([param], lr=0.1, use_decoupled_grad=True)
    param.decoupled_grad = torch.ones(2)
    with pytest.raises(
        TypeError, match=r"\['params'\]\[0\] is a DTensor but its gradient is a Tensor"
    ):
        optimizer.step(max_norm=1.0)
