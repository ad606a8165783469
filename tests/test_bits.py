"""Bits do not depend on list partition, thread count, memory alignment or instruction set."""

import hashlib
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from oracle import ALL_RULES, Rule
from support import (
    DTYPES,
    MIXES,
    Case,
    Mix,
    Operands,
    assert_equal_results,
    call,
    every_case,
    every_mix,
    every_rule,
    make_operands,
    run_python,
    with_specials,
)
from torch import Tensor

from emerging_optimizers._native import native

needs_native = pytest.mark.skipif(native is None, reason="there are no native kernels")
needs_proc = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")

_SMALL = (1, 127, 0, 4097, 129, 333, 128, 2, 1367, 16, 255)
# The large ones span several threads' shares of 16384 elements.
_LARGE = (1, 127, 0, 40000, 129, 16385, 4097, 128, 50001, 2, 16384)

# The mixes of dtypes that the sizes are tested with.
rotations = pytest.mark.parametrize("rotation", [0, 3, 6])


def _positions(rule: Rule, sizes: Sequence[int], rotation: int = 0) -> list[Operands]:
    mixes = list(MIXES.values())
    return [
        make_operands(rule, (1, size), mixes[(i + rotation) % len(mixes)], seed=i)
        for i, size in enumerate(sizes)
    ]


# ---- list partition ------------------------------------------------------------------------------


@every_case
def test_one_list_or_each_tensor_alone(rule: Rule, case_name: str) -> None:
    case = rule.cases[case_name]
    together = _positions(rule, _SMALL)
    alone = [position.clone() for position in together]
    updates = call(rule, case, together)
    for i, position in enumerate(alone):
        update = call(rule, case, position)
        assert_equal_results(rule, (updates[i], together[i]), (update, position), f"[{i}]")


@every_rule
@rotations
def test_list_partitions(rule: Rule, rotation: int) -> None:
    original = _positions(rule, _LARGE, rotation)
    whole = [position.clone() for position in original]
    updates = call(rule, rule.usual, whole)
    for cut in (1, 4):
        parts = [position.clone() for position in original]
        results = call(rule, rule.usual, parts[:cut]) + call(rule, rule.usual, parts[cut:])
        for i in range(len(original)):
            got, wanted = (results[i], parts[i]), (updates[i], whole[i])
            assert_equal_results(rule, got, wanted, f"[{i}], cut at {cut}")


# ---- threads -------------------------------------------------------------------------------------


@every_rule
@rotations
def test_number_of_threads(rule: Rule, rotation: int, num_threads: None) -> None:
    results = {}
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        listed = _positions(rule, _LARGE, rotation)
        single = make_operands(rule, (70001,), list(MIXES.values())[rotation])
        updates = [*call(rule, rule.usual, listed), call(rule, rule.usual, single)]
        results[threads] = list(zip(updates, [*listed, single], strict=True))
    for threads in (2, 3):
        for i, (got, wanted) in enumerate(zip(results[threads], results[1], strict=True)):
            assert_equal_results(rule, got, wanted, f"[{i}], {threads} threads")


def _busy_time_by_thread() -> dict[str, int]:
    """The CPU time of each thread of this process, in clock ticks."""
    times = {}
    for task in os.listdir("/proc/self/task"):
        try:
            text = Path(f"/proc/self/task/{task}/stat").read_text()
        except OSError:  # the thread has ended
            continue
        # The name, in parentheses, may contain spaces. User and system time are fields 14 and 15.
        fields = text.rpartition(")")[2].split()
        times[task] = int(fields[11]) + int(fields[12])
    return times


@needs_native
@needs_proc
@every_rule
def test_two_threads_do_the_work(rule: Rule, num_threads: None) -> None:
    # Measures CPU time, which does not depend on what else is running, as wall time does.
    torch.set_num_threads(2)
    operands = make_operands(rule, (1 << 20,), MIXES["float32"])
    out = torch.empty(1 << 20)
    call(rule, rule.usual, operands, out=out)
    before = _busy_time_by_thread()
    end = time.process_time() + 0.3  # 30 ticks of the usual 10 ms, shared by the threads
    while time.process_time() < end:
        call(rule, rule.usual, operands, out=out)
    after = _busy_time_by_thread()
    busy = sorted(after[task] - before.get(task, 0) for task in after)
    assert len(busy) > 1
    assert busy[-2] >= busy[-1] / 3, f"clock ticks of each thread: {busy}"


@needs_native
@needs_proc
def test_one_openmp_runtime_is_loaded() -> None:
    # A second one would have its own thread pool, which ignores torch.set_num_threads.
    done = run_python(
        "import torch\n"
        "from oracle import RULES\n"
        "tensors = [torch.zeros(100000) for _ in range(3)]\n"
        "RULES['adam'].function(*tensors, **RULES['adam'].usual)\n"
        "print(open('/proc/self/maps').read())"
    )
    assert done.returncode == 0, done.stderr
    files = {line.split()[-1] for line in done.stdout.splitlines() if "/" in line}
    names = ("libgomp", "libomp", "libiomp")
    runtimes = {os.path.realpath(file) for file in files if Path(file).name.startswith(names)}
    assert len(runtimes) == 1, runtimes


# ---- memory alignment ----------------------------------------------------------------------------


def _at_offset(tensor: Tensor, offset: int) -> Tensor:
    buffer = torch.empty(tensor.numel() + 32, dtype=tensor.dtype)
    return buffer[offset : offset + tensor.numel()].view(tensor.shape).copy_(tensor)


@every_rule
@every_mix
def test_memory_alignment(rule: Rule, mix: Mix) -> None:
    # Sizes with and without a remainder at any vector width, and more than one tile.
    for size in (1, 7, 31, 64, 333):
        aligned = make_operands(rule, (size,), mix)
        original = aligned.clone()
        update = call(rule, rule.usual, aligned)
        for offset in range(17):
            for stagger in (0, 1, 5):  # all operands alike, and each different
                grad, *states = (
                    _at_offset(tensor, (offset + i * stagger) % 17)
                    for i, tensor in enumerate(original)
                )
                out = _at_offset(update, (offset + (1 + len(states)) * stagger) % 17).fill_(7)
                moved = Operands(grad, states)
                call(rule, rule.usual, moved, out=out)
                label = f"{size} elements, offset {offset}, stagger {stagger}"
                assert_equal_results(rule, (out, moved), (update, aligned), label)


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_operands_near_each_other(rule: Rule, dtype: torch.dtype, num_threads: None) -> None:
    """Where loads would wait for stores, large rows are swept in another order than short ones."""
    torch.set_num_threads(1)
    size, page = 65536 + 777, 4096 // dtype.itemsize
    originals = make_operands(rule, (size,), Mix(dtype, (dtype,) * 3))
    short = originals.clone()
    chunks = zip(*(tensor.split(1000) for tensor in short), strict=True)
    updates = call(rule, rule.usual, [Operands(grad, states) for grad, *states in chunks])
    room = (size // page + 2) * page
    tensors = [*originals, torch.zeros(size, dtype=dtype)]
    for elements in (16, 17, page - 16):
        buffer = torch.full((room * (len(tensors) + 1),), 7, dtype=dtype)
        begins = [k * room + k * elements % page for k in range(len(tensors))]
        moved = [buffer[begin : begin + size] for begin in begins]
        for to, from_ in zip(moved, tensors, strict=True):
            to.copy_(from_)
        grad, *states, out = moved
        call(rule, rule.usual, Operands(grad, states), out=out)
        label = f"{dtype}, {elements} elements from operand to operand"
        assert_equal_results(
            rule, (out, Operands(grad, states)), (torch.cat(updates), short), label
        )
        assert buffer[begins[0] + size : begins[1]].eq(7).all(), label


# ---- instruction set -----------------------------------------------------------------------------


def _digest(tensors: list[Tensor]) -> str:
    """A hash of all bits; all NaNs count as the same."""
    digest = hashlib.sha256()
    for tensor in tensors:
        canonical = torch.where(tensor.isnan(), torch.full_like(tensor, math.nan), tensor)
        digest.update(canonical.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _digest_of_case(rule: Rule, case: Case, original: Operands) -> str:
    operands = original.clone()
    update = call(rule, case, operands)
    rounded = []
    for dtype in DTYPES:
        out = torch.empty_like(update, dtype=dtype)
        rounded.append(call(rule, case, original.clone(), out=out))
    return _digest([update, *operands.states, *rounded])


def digests() -> dict[str, str]:
    """Hashes of the results of each rule, case and mix of dtypes."""
    found = {}
    for rule in ALL_RULES.values():
        for seed, (mix_name, mix) in enumerate(MIXES.items()):
            operands = with_specials(rule, mix, seed)
            for case_name, case in rule.cases.items():
                key = f"{rule}, {case_name}, {mix_name}"
                found[key] = _digest_of_case(rule, case, operands)
    return found


_PRINT_DIGESTS = """
import json
import torch
import test_bits
torch.set_num_threads(1)
from emerging_optimizers._native import native
print(json.dumps({"isa": native and native.active_isa(), "digests": test_bits.digests()}))
"""


@pytest.mark.builtin_rules("test_rule_bits.py compares them")
@needs_native
def test_instruction_sets(num_threads: None) -> None:
    assert native is not None
    torch.set_num_threads(1)  # more threads gain nothing with small tensors
    supported = native.supported_isas()
    assert native.active_isa() in supported
    assert set(supported) <= set(native.compiled_isas())
    here = digests()
    for isa in supported:
        done = run_python(_PRINT_DIGESTS, EMERGING_OPTIMIZERS_ISA=isa)
        assert done.returncode == 0, done.stderr
        there = json.loads(done.stdout)
        assert there["isa"] == isa
        different = [key for key in here if here[key] != there["digests"][key]]
        assert not different, f"{isa} differs from {native.active_isa()}: {different}"


@pytest.mark.builtin_rules("has no rule")
@needs_native
def test_unknown_instruction_set_is_an_error() -> None:
    # Falling back silently would change the speed: whoever forces an instruction set wants it.
    done = run_python("import emerging_optimizers", EMERGING_OPTIMIZERS_ISA="nonsense")
    assert "EMERGING_OPTIMIZERS_ISA" in done.stderr
    assert "nonsense" in done.stderr
    assert "baseline" in done.stderr, "the message lists what there is"
    assert done.returncode != 0, f"it was imported all the same: {done.stderr}"


@pytest.mark.builtin_rules("has no rule")
@needs_native
def test_empty_instruction_set_is_the_default() -> None:
    assert native is not None
    done = run_python(
        "from emerging_optimizers._native import native; print(native.active_isa())",
        EMERGING_OPTIMIZERS_ISA="",
    )
    assert done.stdout.strip() == native.supported_isas()[-1], done.stderr
