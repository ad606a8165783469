"""The random bits that the shards of a DTensor use."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import launch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from emerging_optimizers._sharding import ShardPlace, _place


def shard(whole: torch.Tensor, placement: Any, count: int, at: int) -> torch.Tensor:
    """A process's shard along one dimension of a mesh, in the memory order of `whole`."""
    if isinstance(placement, Replicate):
        return whole
    factor = placement.split_factor if isinstance(placement, _StridedShard) else 1
    pieces = []
    for piece in chunks(whole, factor, placement.dim):
        pieces.append(chunks(piece, count, placement.dim)[at])
    joined = torch.cat(pieces, placement.dim)
    return torch.empty_strided(joined.shape, dense_like(joined.shape, whole)).copy_(joined).long()


def chunks(tensor: torch.Tensor, count: int, dim: int) -> list[torch.Tensor]:
    found = list(tensor.chunk(count, dim)) if tensor.size(dim) else [tensor]
    nothing = tensor.narrow(dim, 0, 0)
    return found + [nothing] * (count - len(found))


def dense_like(shape: Any, like: torch.Tensor) -> list[int]:
    strides, step = [0] * like.dim(), 1
    for dim in sorted(range(like.dim()), key=lambda d: (like.stride(d), -d)):
        strides[dim] = step
        step *= max(shape[dim], 1)
    return strides


PLACEMENTS: list[tuple[Any, ...]] = [
    (Replicate(),),
    (Shard(0),),
    (Shard(1),),
    (Shard(0), Replicate()),
    (Replicate(), Shard(1)),
    (Shard(0), Shard(0)),
    (Shard(0), Shard(1)),
    (Shard(1), Shard(0)),
    (_StridedShard(0, split_factor=2), Shard(0)),
    (_StridedShard(0, split_factor=3), Shard(0)),
    (_StridedShard(0, split_factor=2),),
    (Shard(0), Replicate(), Shard(0)),
]


@pytest.mark.parametrize("placements", PLACEMENTS, ids=str)
def test_places(placements: tuple[Any, ...]) -> None:
    """Contiguous shards have the index of their first element, others a unique number."""
    shapes: list[tuple[int, ...]] = [(8, 6), (7, 5), (1, 9), (9, 1), (3, 2), (5, 3, 4)]
    sizes = itertools.product((1, 2, 3), repeat=len(placements))
    for mesh, shape in itertools.product(sizes, shapes):
        numbers = torch.arange(math.prod(shape))
        last_to_first = numbers.view(shape[::-1]).permute(*range(len(shape))[::-1])
        for whole in (numbers.view(shape), last_to_first):
            of_shards: dict[Any, ShardPlace] = {}
            for coordinate in itertools.product(*map(range, mesh)):
                local = whole
                for placement, count, at in zip(placements, mesh, coordinate, strict=True):
                    local = shard(local, placement, count, at)
                if local.numel() == 0:
                    continue
                place = _place(
                    tuple(whole.shape), whole.stride(), tuple(local.shape), local.stride(),
                    mesh, coordinate, placements,
                )  # fmt: skip
                indices = local.as_strided((local.numel(),), (1,))
                is_contiguous = bool(indices.diff().eq(1).all())
                label = (mesh, shape, whole.stride(), coordinate)
                wanted = (0, indices[0].item()) if is_contiguous else (place.number, 0)
                assert place == wanted, label
                assert (place.number == 0) == is_contiguous, label
                key = tuple(indices.tolist())
                assert of_shards.setdefault(key, place) == place, label  # a replica
            if not all(number == 0 for number, _ in of_shards.values()):
                assert len(set(of_shards.values())) == len(of_shards), (mesh, shape)


def test_places_that_are_not_known() -> None:
    """Partial sums, and local tensors that do not fit their placement, are independent."""
    for placements, local_shape in [((Partial(),), (4, 2)), ((Shard(0),), (3, 2))]:
        places = [
            _place((4, 2), (2, 1), local_shape, (2, 1), (2,), (at,), placements) for at in (0, 1)
        ]
        assert places == [(1, 0), (2, 0)]
    # A shard whose memory order differs from the parameter's.
    assert _place((4, 2), (2, 1), (2, 2), (1, 2), (2,), (1,), (Shard(0),)) == (2, 0)


def test_bits_of_shards(tmp_path: Path) -> None:
    for world_size in (2, 4):
        launch("rounding_workers.round_shards", world_size, tmp_path)
