"""Operands that share memory are rejected; views without a common byte work."""

import random
import re
from collections.abc import Callable

import pytest
import torch
from oracle import RULES
from support import MIXES, call, make_operands, run_python
from test_errors import alias, assert_refused, make_lists, path  # noqa: F401
from torch import Tensor

from emerging_optimizers import _overlap

LION, ADAM = RULES["lion"], RULES["adam"]


# ---- functions -----------------------------------------------------------------------------------


def _views(first: int, second: int, size: int = 12) -> tuple[Tensor, Tensor]:
    buffer = torch.rand(max(first, second) + size)
    return buffer[first : first + size].view(3, 4), buffer[second : second + size].view(3, 4)


def _other_dtype() -> tuple[Tensor, Tensor]:
    buffer = torch.rand(20)
    return buffer[8:].view(3, 4), buffer.view(torch.bfloat16)[7:19].view(3, 4)


def _other_storage() -> tuple[Tensor, Tensor]:
    buffer = torch.rand(20)
    other = torch.from_numpy(buffer.numpy())
    assert other.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
    return buffer[:12].view(3, 4), other[5:17].view(3, 4)


def _interleaved() -> tuple[Tensor, Tensor]:
    buffer = torch.rand(40)
    return buffer.as_strided((3, 4), (8, 2)), buffer.as_strided((3, 4), (12, 3), 1)


def _between() -> tuple[Tensor, Tensor]:
    buffer = torch.rand(3, 8)
    return buffer[:, ::2], buffer.view(-1)[6:18].view(3, 4)


SHARED: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "one element later": lambda: _views(0, 1),
    "earlier": lambda: _views(7, 0),
    "only the last element": lambda: _views(0, 11),
    "another dtype": _other_dtype,
    "another storage": _other_storage,
    "strides that differ": _interleaved,
    "between the elements": _between,
    "columns that overlap": lambda: (lambda m: (m[:, :4], m[:, 3:7]))(torch.rand(3, 9)),
}

# The two operands that are replaced; the message names the second one first.
PLACES = {
    "out and another grad": (("out", 2), ("grad", 1)),
    "out and grad": (("out", 2), ("grad", 2)),
    "states": (("state", 1), ("state", 3)),
    "state and grad": (("state", 2), ("grad", 2)),
    "out and state": (("out", 0), ("state", 3)),
}


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("make", SHARED.values(), ids=SHARED)
def test_shared_memory_is_rejected(
    path: str,  # noqa: F811
    make: Callable[[], tuple[Tensor, Tensor]],
    places: tuple[tuple[str, int], tuple[str, int]],
) -> None:
    lists = make_lists(ADAM)
    names = []
    for (name, position), tensor in zip(places, make(), strict=True):
        key = "exp_avg_sq" if name == "state" else name
        lists[key][position] = tensor
        names.append(f"{key}[{position}]" if key == "out" else f"{key}s[{position}]")
    assert_refused(ValueError, alias(*names), lists, lambda: ADAM.function(**lists, **ADAM.usual))


def test_example(path: str) -> None:  # noqa: F811
    n = 5000
    buffer, exp_avg = torch.zeros(n + 8), torch.zeros(n)
    lists = {"grad": buffer[:n], "exp_avg": exp_avg, "out": buffer[8:]}
    function = LION.function
    refused = lambda: function(buffer[:n], exp_avg, **LION.usual, out=buffer[8:])  # noqa: E731
    assert_refused(ValueError, alias("out", "grad"), lists, refused)
    # Adjacent operands are fine; so is `out` that is `grad`.
    function(torch.zeros(n), exp_avg, **LION.usual, out=buffer[:n])
    function(buffer[:n], exp_avg, **LION.usual, out=buffer[:n])


APART: dict[str, Callable[[int], list[Tensor]]] = {
    "columns": lambda n: list(torch.zeros(12, n).T),
    "blocks of columns": lambda n: list(torch.zeros(3, 4 * n).split(4, 1)),
    "flat buffer": lambda n: [t.view(3, 4) for t in torch.zeros(1 + 12 * n)[1:].split(12)],
}


@pytest.mark.parametrize("is_shuffled", [False, True], ids=["in order", "shuffled"])
@pytest.mark.parametrize("kind", APART)
def test_views_without_a_common_byte(path: str, kind: str, is_shuffled: bool) -> None:  # noqa: F811
    # All operands in one buffer: the modified ones, and the gradients.
    count = 1 + len(ADAM.states) + 1
    views = APART[kind](5 * count)
    if is_shuffled:
        random.Random(0).shuffle(views)
    shape = views[0].shape
    positions = [make_operands(ADAM, shape, MIXES["float32"], seed) for seed in range(5)]
    wanted = [call(ADAM, ADAM.usual, position.clone()) for position in positions]
    lists = [views[5 * k : 5 * k + 5] for k in range(count)]
    for operands, *tensors in zip(positions, *lists, strict=True):
        for tensor, value in zip(tensors, operands, strict=False):
            tensor.copy_(value)
    grads, *states, outs = lists
    ADAM.function(grads, *states, **ADAM.usual, out=outs)
    for out, update in zip(outs, wanted, strict=True):
        torch.testing.assert_close(out, update, rtol=1e-6, atol=0)


def test_real_and_imaginary_parts(path: str) -> None:  # noqa: F811
    numbers = torch.rand(50, dtype=torch.complex64)
    grad, exp_avg = torch.rand(50), torch.rand(50)
    wanted = LION.function(grad, exp_avg.clone(), momentum_beta=0.9)
    numbers.real.copy_(exp_avg)
    LION.function(grad, numbers.real, momentum_beta=0.9, out=numbers.imag)
    assert torch.equal(numbers.imag, wanted)


def test_gradients_may_overlap(path: str) -> None:  # noqa: F811
    buffer = torch.rand(30)
    grads = [buffer[:20], buffer[10:], buffer[:20], buffer[:1].expand(20)]
    states = [torch.rand(20) for _ in grads]
    wanted = [
        LION.function(g.clone(), s.clone(), momentum_beta=0.9)
        for g, s in zip(grads, states, strict=True)
    ]
    for update, other in zip(LION.function(grads, states, momentum_beta=0.9), wanted, strict=True):
        assert torch.equal(update, other)


def test_empty_tensors_never_alias(path: str) -> None:  # noqa: F811
    buffer = torch.rand(20)
    grads, states = [buffer[:20], buffer[3:3]], [torch.rand(20), buffer[3:3]]
    LION.function(grads, states, momentum_beta=0.9, out=[torch.empty(20), buffer[5:5]])


def test_many_columns_are_decided_quickly(path: str) -> None:  # noqa: F811
    n = 400
    matrices = [torch.rand(7, n) for _ in range(3)]
    grads, states, outs = ([*m.T] for m in matrices)
    wanted = LION.function(matrices[0].clone(), matrices[1].clone(), momentum_beta=0.9)
    LION.function(grads, states, momentum_beta=0.9, out=outs)
    assert torch.equal(matrices[2], wanted)
    states[7] = states[9]
    with pytest.raises(ValueError, match=re.escape(alias("exp_avgs[7]", "exp_avgs[9]"))):
        LION.function(grads, states, momentum_beta=0.9, out=outs)


def test_huge_views_are_decided_quickly(path: str) -> None:  # noqa: F811
    # Views of 2^31 elements and more on few bytes: a list of their elements would take gigabytes.
    tiny = torch.rand(8)
    for shape, strides in [((2**31, 2), (0, 1)), ((2**16, 2**16), (0, 0)), ((1, 2**33), (1, 0))]:
        huge = tiny.as_strided(shape, strides)
        with pytest.raises(ValueError, match=r"^exp_avg overlaps itself in memory"):
            LION.function(huge, huge, momentum_beta=0.9, out=huge)


def test_undecided_overlaps_are_rejected(
    path: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Whether subsets of 16 large numbers have equal sums is hard to decide.
    generator = random.Random(0)
    strides = [generator.randrange(2**24, 2**25) for _ in range(16)]
    middle = sum(strides) // 2
    buffer = torch.empty(2 * middle + 2, dtype=torch.bfloat16)  # pages never touched
    hard = buffer.as_strided((2,) * 16, strides)
    with pytest.raises(ValueError, match=r"^cannot tell whether exp_avg overlaps itself in memory"):
        LION.function(hard, hard, momentum_beta=0.9, out=hard)
    if path == "native":
        return  # the C++ test covers pairs
    monkeypatch.setattr(_overlap, "_WORK_OF_PAIR", 100)
    states = [buffer[middle : middle + 1], torch.zeros((2,) * 16)]
    message = "cannot tell whether grads[1] shares memory with exp_avgs[0], and exp_avgs[0] is"
    with pytest.raises(ValueError, match=re.escape(message)):
        LION.function([torch.zeros(1), hard], states, momentum_beta=0.9)


# ---- without the compiled module -----------------------------------------------------------------

_ALONE = """
import sys, warnings
sys.modules["emerging_optimizers._C"] = None
warnings.simplefilter("ignore")
import torch
from emerging_optimizers._native import native
from emerging_optimizers import _overlap
from emerging_optimizers.scalar_optimizers import calculate_lion_update
assert native is None
buffer, exp_avg = torch.zeros(108), torch.zeros(100)
try:
    calculate_lion_update(buffer[:100], exp_avg, 0.9, 0.99, out=buffer[8:])
except ValueError as error:
    print(error)
matrix = torch.rand(100, 3)
calculate_lion_update(matrix[:, 0], matrix[:, 1], 0.9, 0.99, out=matrix[:, 2])
print(sorted(set(matrix[:, 2].tolist())))
"""


def test_without_the_compiled_module() -> None:
    done = run_python(_ALONE, EMERGING_OPTIMIZERS_JIT="0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [alias("out", "grad"), "[1.0]"]
