"""Sums of gradients' magnitudes: their values, and bits that nothing but the values determines."""

import json
import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from support import DTYPES, run_python
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from emerging_optimizers._native import native

pytestmark = [
    pytest.mark.skipif(native is None, reason="there are no native kernels"),
    pytest.mark.builtin_rules("has no rule"),
    pytest.mark.on_devices("tests-functions"),
]

ORDERS = (1.0, 2.0, math.inf)
every_order = pytest.mark.parametrize("order", ORDERS)

LANES = 32
BLOCK = 4096
# Around the lanes, a block and the share of a thread.
SIZES = (1, 2, 8, 31, 32, 33, 63, 1000, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 37, 70001)


def norm_sum(params: Sequence[Tensor], grads: object, order: float) -> Tensor | None:
    """Call the native function."""
    assert native is not None
    found: tuple[Tensor, bool] | None = native.norm_sum(params, grads, order)
    return None if found is None else found[0]


def sum_of(grads: Sequence[Tensor], order: float) -> Tensor:
    """Return the sum over these gradients."""
    result = norm_sum(grads, list(grads), order)
    assert result is not None
    return result


def bits(value: Tensor | float | None) -> str:
    """Return the bits of a float64 scalar."""
    assert value is not None
    return struct.pack(">d", float(value)).hex()


def values(grads: Sequence[Tensor]) -> npt.NDArray[np.float64]:
    """Return all elements as float64, exactly."""
    flat = [grad.detach().double().cpu().reshape(-1) for grad in grads]
    return torch.cat([torch.empty(0, dtype=torch.float64, device="cpu"), *flat]).numpy()


def exact(grads: Sequence[Tensor], order: float) -> float:
    """Return the sum, correctly rounded; of float64 elements' rounded squares."""
    magnitudes = np.abs(values(grads))
    if order == math.inf:
        return float(magnitudes.max(initial=0.0))
    return math.fsum(magnitudes if order == 1 else magnitudes * magnitudes)


def mixed_grads(seed: int = 0) -> list[Tensor]:
    """Return gradients of all sizes and dtypes."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return [
        torch.randn(size, generator=generator, device="cpu")
        .to(DTYPES[(i + seed) % len(DTYPES)])
        .to(torch.get_default_device())
        for i, size in enumerate(SIZES)
    ]


# ---- values --------------------------------------------------------------------------------------


def assert_close(result: Tensor, wanted: float, order: float) -> None:
    """Assert that a norm differs from the exact one by at most one unit of float32."""
    assert result.dtype == torch.float64
    assert result.shape == ()
    root = math.sqrt if order == 2 else float
    got, expected = np.float32(root(result.item())), np.float32(root(wanted))
    assert abs(got - expected) <= np.spacing(expected), (got, expected)


@every_order
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_dtype(order: float, dtype: torch.dtype) -> None:
    for size in SIZES:
        grad = torch.randn(size).to(dtype)
        assert_close(sum_of([grad], order), exact([grad], order), order)


@every_order
def test_mixed_dtypes(order: float) -> None:
    for seed in range(4):
        grads = mixed_grads(seed)
        assert_close(sum_of(grads, order), exact(grads, order), order)


@every_order
@pytest.mark.parametrize("scale", [1e-45, 1e-39, 1e-20, 1e20, 1e38])
def test_magnitudes_beyond_float32(order: float, scale: float) -> None:
    grad = torch.randint(-3, 4, (5000,)).double().mul(scale).float()
    assert exact([grad], order) > 0
    result = sum_of([grad], order)
    assert result.item() == pytest.approx(exact([grad], order), rel=1e-13)


@every_order
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("special", [math.inf, -math.inf, math.nan], ids=str)
def test_infinities_and_nans(order: float, dtype: torch.dtype, special: float) -> None:
    for size in (1, 33, 9000):
        for index in {0, size // 2, size - 1}:
            grads = [torch.ones(7), torch.ones(size).to(dtype), torch.ones(9)]
            grads[1][index] = special
            wanted = math.nan if math.isnan(special) else math.inf
            assert bits(sum_of(grads, order)) == bits(wanted)
    both = torch.tensor([math.inf, math.nan, -math.inf, 1.0]).to(dtype)
    for shift in range(4):
        assert bits(sum_of([both.roll(shift), torch.ones(3)], order)) == bits(math.nan)


@every_order
def test_lists_without_elements(order: float) -> None:
    assert bits(sum_of([], order)) == bits(0.0)
    assert sum_of([], order).device.type == "cpu"
    empty = torch.empty(0, 3)
    assert bits(sum_of([empty], order)) == bits(0.0)
    assert sum_of([empty], order).device == empty.device
    grads = [torch.randn(3), torch.empty(0), torch.randn(5)]
    assert bits(sum_of(grads, order)) == bits(sum_of(grads[::2], order))


def test_complex_gradients_are_pairs() -> None:
    grad = torch.randn(1000, dtype=torch.complex64)
    pairs = torch.view_as_real(grad)
    assert bits(sum_of([grad], 2.0)) == bits(sum_of([pairs], 2.0))
    assert bits(sum_of([grad.conj()], 2.0)) == bits(sum_of([pairs], 2.0))
    for order in (1.0, math.inf):
        assert norm_sum([grad], [grad], order) is None


# ---- arguments -----------------------------------------------------------------------------------


class _Dispatching(Tensor):
    """A tensor that computes its values in Python."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise AssertionError("the native function must not call it")


@every_order
def test_the_parameters_own_gradients(order: float) -> None:
    grads = mixed_grads()
    params = [nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for param, grad in zip(params[1:], grads[1:], strict=True):  # the first has none
        param.grad = grad
    wanted = bits(sum_of(grads[1:], order))
    assert bits(norm_sum(params, None, order)) == wanted
    assert bits(norm_sum(tuple(params), [None, *grads[1:]], order)) == wanted
    assert bits(norm_sum(params, [None] * len(params), order)) == bits(0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128], ids=str)
def test_doubles_are_reported(dtype: torch.dtype) -> None:
    grads = [torch.ones(4), torch.ones(0, dtype=dtype), torch.ones(4, dtype=torch.bfloat16)]
    assert native is not None
    _, has_double = native.norm_sum(grads, grads, 2.0)
    assert has_double == (dtype != torch.float32)


@pytest.mark.once
def test_subclasses_of_parameters_are_left_to_python() -> None:
    """Processes communicate for a DTensor without a gradient, too."""
    param = Tensor._make_subclass(_Dispatching, torch.ones(4))
    assert norm_sum([torch.ones(4), param], None, 2.0) is None


@pytest.mark.once
def test_other_gradients_are_left_to_python() -> None:
    good = torch.ones(4)
    others = [
        torch.ones(4).to_sparse(),
        torch.ones(4, dtype=torch.int32),
        torch.ones(4).to(torch.float8_e4m3fn),
        torch.ones(4, device="meta"),
        torch.ones(4, 4)[:, ::2],
        torch.ones(1).expand(4),
        Tensor._make_subclass(_Dispatching, torch.ones(4)),
    ]
    for other in others:
        assert norm_sum([good, good], [good, other], 2.0) is None


@pytest.mark.once
def test_modes_see_every_operation() -> None:
    grad = torch.ones(4)
    with FakeTensorMode():
        assert norm_sum([grad], [grad], 2.0) is None


def test_wrong_arguments() -> None:
    good = torch.ones(4)
    for order in (0.0, 3.0, -math.inf, math.nan):
        with pytest.raises(ValueError, match=r"order is .*; expected 1, 2 or inf"):
            norm_sum([good], None, order)
    with pytest.raises(ValueError, match="there are 2 gradients for 1 parameters"):
        norm_sum([good], [good, good], 2.0)
    with pytest.raises(TypeError, match=r"params\[1\] must be a Tensor, not int"):
        norm_sum([good, 3], None, 2.0)  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"grads\[0\] must be a Tensor or None, not int"):
        norm_sum([good], [3], 2.0)
    with pytest.raises(TypeError, match="params must be a sequence of Tensors, not int"):
        norm_sum(3, None, 2.0)  # type: ignore[arg-type]


# ---- bits ----------------------------------------------------------------------------------------


def _add_lanes(numbers: npt.NDArray[np.float64]) -> float:
    """Add up a block: element i to lane i mod 32, then the lanes' upper half to the lower."""
    rows = np.zeros((-(-len(numbers) // LANES), LANES))
    rows.reshape(-1)[: len(numbers)] = numbers
    lanes = np.zeros(LANES)
    for row in rows:
        lanes = lanes + row
    while len(lanes) > 1:
        lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
    return float(lanes[0])


def _blocks(numbers: npt.NDArray[np.float64]) -> list[float]:
    return [_add_lanes(numbers[i : i + BLOCK]) for i in range(0, len(numbers), BLOCK)]


def model(grads: Sequence[Tensor], order: float) -> float:
    """Return the sum as engine/norm.h describes it."""
    total = 0.0
    for grad in grads:
        numbers = np.abs(values([grad]))
        groups = _blocks(np.array(_blocks(numbers * numbers if order == 2 else numbers)))
        of_tensor = 0.0
        for group in groups:
            of_tensor += group
        total += of_tensor
    return total


@pytest.mark.parametrize("order", [1.0, 2.0])
def test_the_order_of_additions(order: float) -> None:
    for seed in range(2):
        grads = mixed_grads(seed)
        assert bits(sum_of(grads, order)) == bits(model(grads, order))
        for grad in grads:
            assert bits(sum_of([grad], order)) == bits(model([grad], order))


def test_more_blocks_than_a_block_has_elements() -> None:
    # Equal blocks, so that the model is computed once. Their squares are not exact.
    block = torch.randn(BLOCK)
    count = 2 * BLOCK + 5
    of_blocks = np.full(count, _blocks(values([block]) ** 2)[0])
    wanted = 0.0
    for group in _blocks(of_blocks):
        wanted += group
    assert bits(sum_of([block.repeat(count)], 2.0)) == bits(wanted)


@every_order
def test_number_of_threads(order: float, num_threads: None) -> None:
    grads = [*mixed_grads(), torch.randn(500000), *mixed_grads(1)]
    results = set()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.add(bits(sum_of(grads, order)))
    assert len(results) == 1


@every_order
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_alignment(order: float, dtype: torch.dtype) -> None:
    for size in (1, 7, 33, 333, BLOCK + 70):
        grad = torch.randn(size).to(dtype)
        wanted = bits(sum_of([grad], order))
        buffer = torch.empty(size + 32, dtype=dtype)
        for offset in range(17):
            moved = buffer[offset : offset + size].copy_(grad)
            assert bits(sum_of([moved], order)) == wanted, (size, offset)


@pytest.mark.once
def test_misaligned_elements() -> None:
    memory = bytearray(4 * 100 + 1)
    grad = torch.frombuffer(memory, dtype=torch.float32, count=100, offset=1)
    grad.copy_(torch.randn(100))
    assert bits(sum_of([grad], 2.0)) == bits(sum_of([grad.clone()], 2.0))


@every_order
def test_dense_layouts_count_in_memory_order(order: float) -> None:
    memory = torch.randn(6 * 50 * 40)
    wanted = bits(sum_of([memory], order))
    dense = memory.view(6, 50, 40)
    for view in (dense, dense.transpose(0, 2), dense.permute(1, 2, 0), dense.view(6, 50, 40, 1)):
        assert bits(sum_of([view], order)) == wanted


def digests() -> dict[str, str]:
    """Return the sums' bits for each order, and the lengths and dtypes of the gradients."""
    found = {}
    for order in ORDERS:
        for seed in range(4):
            grads = mixed_grads(seed)
            found[f"{order}, {seed}"] = bits(sum_of(grads, order))
            for grad in grads:
                found[f"{order}, {len(grad)}, {grad.dtype}"] = bits(sum_of([grad], order))
        for dtype in DTYPES:
            # All positive bit patterns of 16 bits, and some of the longer types.
            words = torch.arange(0x7F80).to(torch.int16)
            grad = words.view(dtype) if dtype.itemsize == 2 else words.double().to(dtype)
            found[f"{order}, {dtype}"] = bits(sum_of([grad], order))
    return found


_PRINT_DIGESTS = """
import json
import test_norm_sums
from emerging_optimizers._native import native
print(json.dumps({"isa": native.active_isa(), "digests": test_norm_sums.digests()}))
"""


@pytest.mark.once
def test_instruction_sets() -> None:
    assert native is not None
    here = digests()
    for isa in {*native.supported_isas()} - {native.active_isa()}:
        done = run_python(_PRINT_DIGESTS, EMERGING_OPTIMIZERS_ISA=isa)
        assert done.returncode == 0, done.stderr
        there = json.loads(done.stdout)
        assert there["isa"] == isa
        different = [key for key in here if here[key] != there["digests"][key]]
        assert not different, f"{isa} differs from {native.active_isa()}: {different}"


# ---- CUDA devices --------------------------------------------------------------------------------


@pytest.mark.cuda
@every_order
def test_cuda_has_the_cpus_bits(order: float) -> None:
    for seed in range(4):
        grads = mixed_grads(seed)
        on_device = [grad.cuda() for grad in grads]
        total = sum_of(on_device, order)
        assert total.device == torch.device("cuda:0")
        assert bits(total) == bits(sum_of(grads, order))
        for grad, moved in zip(grads, on_device, strict=True):
            assert bits(sum_of([moved], order)) == bits(sum_of([grad], order))


@pytest.mark.cuda
@every_order
@pytest.mark.parametrize("count", [159, 160, 161, 1000, 1400])
def test_lists_of_several_launches(order: float, count: int) -> None:
    grads = [torch.randn(1 + i % 70) for i in range(count)]
    assert bits(sum_of([grad.cuda() for grad in grads], order)) == bits(sum_of(grads, order))


@pytest.mark.cuda
@every_order
def test_lists_over_devices(order: float) -> None:
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    grads = mixed_grads()
    grads[4][3] = 1e30  # so that the order of the additions shows
    wanted = bits(sum_of(grads, order))
    for shift in range(len(devices)):
        spread = [grad.to(devices[(i + shift) % len(devices)]) for i, grad in enumerate(grads)]
        total = sum_of(spread, order)
        assert total.device == torch.device(devices[shift])
        assert bits(total) == wanted


@pytest.mark.cuda
@pytest.mark.real
def test_the_host_does_not_wait() -> None:
    grads = [torch.randn(100000).cuda() for _ in range(10)]
    sum_of(grads, 2.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        total = sum_of(grads, 2.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert total.is_cuda


@pytest.mark.cuda
@pytest.mark.real
def test_graphs() -> None:
    grads = [torch.randn(100000).cuda() for _ in range(10)]
    sum_of(grads, 2.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total = sum_of(grads, 2.0)
    for grad in grads:
        grad.mul_(3.0)
    graph.replay()
    assert bits(total) == bits(sum_of(grads, 2.0))
