"""The place of this process's shard in its DTensor, which determines its random bits."""

import functools
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple


class ShardPlace(NamedTuple):
    """Determines the random bits of a shard's elements.

    Args:
        number: 0 if the shard is contiguous in its parameter; else 1 or more, different for each
            shard.
        first_index: The index of the shard's first element in the full parameter, in the order of
            memory, if the shard is contiguous in it; else 0.
    """

    number: int
    first_index: int


class StatePlace(NamedTuple):
    """The same for 8-bit states, whose groups of elements lie in rows.

    Args:
        number: 0 if the shard is contiguous in its parameter or a block of a matrix; else as above.
        first_index: The index of the shard's first element, unless the number is 1 or more.
        width: The length of a block's rows; 0 if the shard is no block.
        stride: The length of the parameter's rows, if the shard is a block.
    """

    number: int
    first_index: int
    width: int
    stride: int


def shard_place(param: Any) -> ShardPlace:
    """Return the place of this process's shard of a DTensor; it is the same for each replica."""
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


def state_place(param: Any) -> StatePlace:
    """Return the place of this process's shard of a DTensor with 8-bit states."""
    number, first_index = shard_place(param)
    local = param.to_local()
    first = None
    if number != 0 and param.is_contiguous() and local.is_contiguous():
        first = _first_index_of_block(
            tuple(param.shape),
            tuple(local.shape),
            tuple(param.device_mesh.shape),
            tuple(param.device_mesh.get_coordinate()),
            tuple(param.placements),
        )
    if first is None:
        return StatePlace(number, first_index, 0, 0)
    return StatePlace(0, first, local.shape[-1], param.shape[-1])


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
    """Return the index of a shard's first element in the parameter; None if it has gaps there."""
    ranges = _ranges(shape, mesh_shape, coordinate, placements)
    if ranges is None:
        return None
    if [sum(map(len, r)) for r in ranges] != list(local_shape):
        return None  # an unknown kind of placement
    order = sorted(range(len(shape)), key=lambda dim: -strides[dim])
    wide = [dim for dim in order if local_shape[dim] > 1]
    in_memory = [local_strides[dim] for dim in wide]
    if in_memory != sorted(in_memory, reverse=True):
        return None  # the shard has another order of dimensions
    if wide:
        outermost = order.index(wide[0])
        is_full = all(local_shape[dim] == shape[dim] for dim in order[outermost + 1 :])
        if not is_full or any(a.stop != b.start for a, b in pairwise(ranges[wide[0]])):
            return None
    first = 0
    for dim in order:
        first = first * shape[dim] + ranges[dim][0].start
    return first


@functools.cache
def _first_index_of_block(
    shape: tuple[int, ...],
    local_shape: tuple[int, ...],
    mesh_shape: tuple[int, ...],
    coordinate: tuple[int, ...],
    placements: tuple[Any, ...],
) -> int | None:
    """Return the index of the first element, if only the first and the last dimension are cut."""
    ranges = _ranges(shape, mesh_shape, coordinate, placements)
    if ranges is None or [sum(map(len, r)) for r in ranges] != list(local_shape):
        return None
    has_gaps = any(a.stop != b.start for pieces in ranges for a, b in pairwise(pieces))
    if has_gaps or shape[1:-1] != local_shape[1:-1]:
        return None
    first = 0
    for size, pieces in zip(shape, ranges, strict=True):
        first = first * size + pieces[0].start
    return first


def _ranges(
    shape: Sequence[int],
    mesh_shape: Sequence[int],
    coordinate: Sequence[int],
    placements: Sequence[Any],
) -> list[list[range]] | None:
    """Return the indices that a shard has, by dimension; None for an unknown kind of placement."""
    ranges = [[range(size)] for size in shape]
    for placement, size, at in zip(placements, mesh_shape, coordinate, strict=True):
        if placement.is_replicate():
            continue
        dim = getattr(placement, "dim", None)
        if dim is None:
            return None
        # The strided placement of FSDP2 with tensor parallelism shards each of several pieces.
        pieces = _chunks(ranges[dim], getattr(placement, "split_factor", 1))
        ranges[dim] = [r for piece in pieces for r in _chunks(piece, size)[at]]
    return ranges


def _chunks(ranges: Sequence[range], count: int) -> list[list[range]]:
    """Split into chunks as ``torch.chunk`` does: all but the last have the same length."""
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
