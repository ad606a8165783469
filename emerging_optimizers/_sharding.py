"""Where this process's shard of a DTensor is in the parameter: what its random bits depend on."""

import functools
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple


class ShardPlace(NamedTuple):
    """Which random bits the elements of a shard get.

    Args:
        number: 0 where the shard is contiguous in its parameter; else from 1 on, another one for
            each shard.
        first_index: The index of its first element in the whole parameter, in the order of the
            memory, where the shard is contiguous in that; else 0.
    """

    number: int
    first_index: int


def shard_place(param: Any) -> ShardPlace:
    """Return the place of this process's shard of a DTensor; the same one for each replica."""
    local = param.to_local()
    coordinate = param.device_mesh.get_coordinate()
    if coordinate is None or local.numel() == 0:
        return ShardPlace(0, 0)
    place = _place(
        tuple(param.shape),
        tuple(param.stride()),
        tuple(local.shape),
        tuple(local.stride()),
        tuple(param.device_mesh.shape),
        tuple(coordinate),
        tuple(param.placements),
    )
    # Complex numbers are updated as pairs of real ones.
    return place._replace(first_index=2 * place.first_index) if param.is_complex() else place


@functools.cache
def _place(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    local_shape: tuple[int, ...],
    local_strides: tuple[int, ...],
    mesh_shape: tuple[int, ...],
    coordinate: tuple[int, ...],
    placements: tuple[Any, ...],
) -> ShardPlace:
    number = 0
    for placement, size, at in zip(placements, mesh_shape, coordinate, strict=True):
        if not placement.is_replicate():
            number = number * size + at
    first = _first_index(
        shape, strides, local_shape, local_strides, mesh_shape, coordinate, placements
    )
    return ShardPlace(number + 1, 0) if first is None else ShardPlace(0, first)


def _first_index(
    shape: Sequence[int],
    strides: Sequence[int],
    local_shape: Sequence[int],
    local_strides: Sequence[int],
    mesh_shape: Sequence[int],
    coordinate: Sequence[int],
    placements: Sequence[Any],
) -> int | None:
    """Return the index of a shard's first element in the parameter; None where it has gaps."""
    ranges = [[range(size)] for size in shape]
    for placement, size, at in zip(placements, mesh_shape, coordinate, strict=True):
        if placement.is_replicate():
            continue
        dim = getattr(placement, "dim", None)
        if dim is None:
            return None
        # Of the strided placement of FSDP2 with tensor parallelism, each of some pieces is sharded.
        pieces = _chunks(ranges[dim], getattr(placement, "split_factor", 1))
        ranges[dim] = [r for piece in pieces for r in _chunks(piece, size)[at]]
    if [sum(map(len, r)) for r in ranges] != list(local_shape):
        return None  # a placement of a kind that is not known here
    order = sorted(range(len(shape)), key=lambda dim: -strides[dim])
    wide = [dim for dim in order if local_shape[dim] > 1]
    in_memory = [local_strides[dim] for dim in wide]
    if in_memory != sorted(in_memory, reverse=True):
        return None  # the shard is in another order
    if wide:
        outermost = order.index(wide[0])
        is_full = all(local_shape[dim] == shape[dim] for dim in order[outermost + 1 :])
        if not is_full or any(a.stop != b.start for a, b in pairwise(ranges[wide[0]])):
            return None
    first = 0
    for dim in order:
        first = first * shape[dim] + ranges[dim][0].start
    return first


def _chunks(ranges: Sequence[range], count: int) -> list[list[range]]:
    """Cut into chunks as ``torch.chunk`` does, of the same number of indices but for the last."""
    length = math.ceil(sum(map(len, ranges)) / count)
    chunks: list[list[range]] = [[] for _ in range(count)]
    done = 0
    for indices in ranges:
        while indices:
            chunk, filled = divmod(done, length)
            piece = indices[: length - filled]
            chunks[chunk].append(piece)
            indices = indices[len(piece) :]
            done += len(piece)
    return chunks
