"""Finds tensors that share memory, for calls that do not reach the native checks.

It compares addresses, sizes and strides, as ``csrc/bindings/memory_overlap.cpp`` does: two storages
may use the same memory, and two views of one storage may be disjoint.
"""

import math
from bisect import insort
from collections.abc import Iterator, Sequence
from itertools import pairwise, starmap
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._values import PLAIN_TYPES, is_fake

# Candidates that a search tries before it gives up: as many as the native one for a pair, fewer for
# a call.
_WORK_OF_PAIR = 100_000
_WORK_OF_CALL = 1_000_000

_Dimensions = tuple[tuple[int, int], ...]


class Memory(NamedTuple):
    """The memory of a tensor: contiguous runs of bytes at multiples of strides.

    Args:
        device: The device that the addresses belong to.
        begin: The address of the first byte.
        end: The address after the last byte.
        run: The length of a run in bytes.
        dimensions: Strides in bytes and sizes, sorted by stride; empty if the memory has no gaps.
    """

    device: torch.device
    begin: int
    end: int
    run: int
    dimensions: _Dimensions


class _Work:
    """The number of candidates that a search may still try."""

    def __init__(self, left: int) -> None:
        self.left = left


def address_of(tensor: Tensor) -> int:
    """Return the address of the first element; 0 if the tensor has none."""
    if tensor.is_meta or tensor.layout != torch.strided or is_fake(tensor):
        return 0
    try:
        address = tensor.data_ptr()
    except (RuntimeError, NotImplementedError):  # of another device, or a wrapper
        return 0
    is_freed = address == tensor.storage_offset() * tensor.element_size()
    return 0 if is_freed else address


def span_of(tensor: Any) -> tuple[int, int] | None:
    """Return the addresses of a tensor's first byte and after its last, if it is ordinary.

    Ordinary tensors are contiguous, have memory and are of no subclass. Most are, and this takes a
    fraction of the time of `memory_of`.
    """
    if type(tensor) not in PLAIN_TYPES or torch._is_functional_tensor(tensor):
        return None
    if tensor.layout is not torch.strided or tensor.is_nested or not tensor.is_contiguous():
        return None
    try:
        begin = tensor.data_ptr()
    except (RuntimeError, NotImplementedError):  # of another device
        return None
    if begin == tensor.storage_offset() * tensor.element_size():
        return None  # its storage has no memory
    return begin, begin + tensor.nbytes


def are_apart(spans: list[tuple[int, int]]) -> bool:
    """Sort the ranges and return whether no two intersect."""
    spans.sort()
    return all(first[1] <= second[0] for first, second in pairwise(spans))


def memory_of(tensor: Tensor) -> Memory | None:
    """Return the memory of a tensor; None if it has no address or no elements."""
    begin = address_of(tensor)
    if begin == 0:
        return None
    item = tensor.element_size()
    if tensor.is_contiguous():
        size = tensor.numel() * item
        return Memory(tensor.device, begin, begin + size, size, ())
    run = reach = item
    outer: list[tuple[int, int]] = []
    for stride, size in _dimensions(tensor):
        if stride == 0:
            continue
        stride *= item
        reach += stride * (size - 1)
        if not outer and stride <= run:
            run += stride * (size - 1)
        elif outer and stride == outer[-1][0] * outer[-1][1]:
            outer[-1] = (outer[-1][0], outer[-1][1] * size)
        else:
            outer.append((stride, size))
    return Memory(tensor.device, begin, begin + reach, run, tuple(outer))


def share_memory(a: Memory, b: Memory, work: _Work) -> bool | None:
    """Return whether two tensors have a byte in common; None if the search gives up."""
    if a.begin >= b.end or b.begin >= a.end:
        return False
    if not a.dimensions and not b.dimensions:
        return True
    # They share an address if strides of both, each times an index, add up to the distance from a's
    # first byte to b's last. Offsets in b are counted from its last byte.
    terms = [(stride, size - 1) for stride, size in a.dimensions + b.dimensions]
    return _Equation(terms, a.run + b.run - 2).solve(b.end - 1 - a.begin, work)


def overlaps_itself(tensor: Tensor) -> bool | None:
    """Return whether two indices have the same address; None if the search gives up."""
    if tensor.numel() <= 1:
        return False
    dimensions = _dimensions(tensor)
    if dimensions[0][0] == 0:
        return True
    # Let d be the dimension of the largest stride in which two indices differ, by 1 or more. They
    # have the same address if the smaller strides make up for it. Those reach equally far in both
    # directions; offsets are counted from the lowest.
    reach = 0
    work = _Work(_WORK_OF_PAIR)
    worst: bool | None = False
    for d, (stride, size) in enumerate(dimensions):
        if stride <= reach:
            smaller = [(other, 2 * (count - 1)) for other, count in dimensions[:d]]
            result = _Equation([(stride, size - 2), *smaller], 0).solve(reach - stride, work)
            if result:
                return True
            worst = None if result is None else worst
        reach += stride * (size - 1)
    return worst


def _dimensions(tensor: Tensor) -> list[tuple[int, int]]:
    """Return the strides and sizes of dimensions longer than 1, sorted by stride."""
    pairs = zip(tensor.stride(), tensor.shape, strict=True)
    return sorted((stride, size) for stride, size in pairs if size > 1)


def find_sharing(used: Sequence[tuple[Memory, bool]]) -> Iterator[tuple[int, int, bool]]:
    """Find pairs of tensors that share memory where at least one is modified.

    Views that interleave, such as the columns of a matrix, are sorted by their addresses modulo
    their strides' common divisor, so that not every pair of them is compared.

    Args:
        used: For each tensor, its memory and whether it is modified.

    Yields:
        The smaller index, the larger index, and whether it is certain. A pair may come twice.
    """
    work = _Work(_WORK_OF_CALL)
    for group in _groups(used):
        divisor = math.gcd(*(stride for i in group for stride, _ in used[i][0].dimensions))
        dense = [i for i in group if not used[i][0].dimensions]
        intervals = [(used[i][0].begin, used[i][0].end, i) for i in dense]
        for i, j in _intersecting(used, intervals, False):
            yield min(i, j), max(i, j), True
        if divisor == 0:
            continue
        intervals = [part for i in group for part in _remainders(used[i][0], i, divisor)]
        for i, j in _intersecting(used, intervals, True):
            work.left -= 1
            result = share_memory(used[i][0], used[j][0], work)
            if result is not False or work.left < 0:
                yield min(i, j), max(i, j), bool(result)
            if work.left < 0:
                return


def _groups(used: Sequence[tuple[Memory, bool]]) -> Iterator[list[int]]:
    """Yield groups of two or more tensors whose ranges overlap, on each device."""
    end = 0
    group: list[int] = []
    for i in sorted(range(len(used)), key=lambda i: used[i][0].begin):
        memory = used[i][0]
        if memory.begin >= end:
            if len(group) > 1:
                yield from _by_device(used, group)
            group = []
        group.append(i)
        end = max(end, memory.end)
    if len(group) > 1:
        yield from _by_device(used, group)


def _by_device(used: Sequence[tuple[Memory, bool]], group: list[int]) -> Iterator[list[int]]:
    of_device: dict[torch.device, list[int]] = {}
    for i in group:
        of_device.setdefault(used[i][0].device, []).append(i)
    yield from of_device.values()


def _remainders(memory: Memory, index: int, divisor: int) -> Iterator[tuple[int, int, int]]:
    """Yield the ranges of a tensor's addresses modulo a common divisor of all strides."""
    begin = memory.begin % divisor
    end = begin + memory.run
    if memory.run >= divisor:
        yield 0, divisor, index
        return
    yield begin, min(end, divisor), index
    if end > divisor:
        yield 0, end - divisor, index


def _intersecting(
    used: Sequence[tuple[Memory, bool]], intervals: list[tuple[int, int, int]], with_gaps: bool
) -> Iterator[tuple[int, int]]:
    """Yield pairs of intersecting intervals, of which one is modified and, on request, has gaps."""
    # The intervals that may not have ended, by whether they are modified and have gaps, sorted by
    # their ends.
    still: dict[tuple[bool, bool], list[tuple[int, int]]] = {}
    for begin, end, i in sorted(intervals):
        memory, is_modified = used[i]
        has_gaps = bool(memory.dimensions)
        for (other_is_modified, other_has_gaps), others in still.items():
            if not (is_modified or other_is_modified):
                continue
            if with_gaps and not (has_gaps or other_has_gaps):
                continue
            while others and others[0][0] <= begin:
                others.pop(0)
            for _, j in others:
                yield i, j
        insort(still.setdefault((is_modified, has_gaps), []), (end, i))


class _Equation:
    """Whether a sum of terms can lie in a range. Each term is a step times a number up to a bound.

    Args:
        terms: Steps and bounds. The numbers are integers from 0 to the bound.
        slack: The range is from ``target - slack`` to ``target``.
    """

    def __init__(self, terms: Sequence[tuple[int, int]], slack: int) -> None:
        kept: list[tuple[int, int]] = []
        for step, bound in sorted(terms):
            if bound == 0:
                continue
            if not kept and step <= slack + 1:
                slack += step * bound  # no gaps
            elif kept and kept[-1][0] == step:
                kept[-1] = (step, kept[-1][1] + bound)
            else:
                kept.append((step, bound))
        self._terms = kept[::-1]
        self._slack = slack
        # For the terms from each one on: the largest sum, and the common divisor of the steps.
        rests = [self._terms[d:] for d in range(len(kept) + 1)]
        self._reach = [slack + sum(starmap(int.__mul__, rest)) for rest in rests]
        self._divisor = [math.gcd(*(step for step, _ in rest)) for rest in rests]

    def solve(self, target: int, work: _Work) -> bool | None:
        """Return whether there is a solution; None if the search gives up."""
        if not 0 <= target <= self._reach[0]:
            return False
        own = _Work(min(work.left, _WORK_OF_PAIR))
        before = own.left
        result = self._search(0, target, own)
        work.left -= before - own.left
        return result

    def _search(self, d: int, target: int, work: _Work) -> bool | None:
        """Search the terms from the d-th on, from the largest step to the smallest."""
        if d == len(self._terms):
            return True
        step, bound = self._terms[d]
        x = max(0, -((self._reach[d + 1] - target) // step))
        last = min(bound, target // step)
        while x <= last:
            more = self._next_candidate(d, target - x * step)
            if more is None or x + more > last:
                return False
            x += more
            work.left -= 1
            if work.left < 0:
                return None
            result = self._search(d + 1, target - x * step, work)
            if result is not False:
                return result
            x += 1
        return False

    def _next_candidate(self, d: int, target: int) -> int | None:
        """Return after how many steps the remainder is one that the other terms allow."""
        divisor = self._divisor[d + 1]
        if divisor == 0:
            return 0
        rest = target % divisor
        if rest <= self._slack:
            return 0
        return _first_multiple(self._terms[d][0] % divisor, divisor, rest - self._slack, rest)


def _first_multiple(a: int, m: int, low: int, high: int) -> int | None:
    """Return the least t >= 0 with low <= a t mod m <= high, as Euclid's algorithm finds it."""
    if low == 0:
        return 0
    if a == 0:
        return None
    if 2 * a > m:
        return _first_multiple(m - a, m, m - high, m - low)
    t = -(-low // a)
    if t * a <= high:
        return t
    turns = _first_multiple(-m % a, a, low % a, high % a)
    return None if turns is None else -(-(low + m * turns) // a)
