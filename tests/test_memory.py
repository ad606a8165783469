"""The update functions allocate nothing, and take tensors of more than 2^31 elements."""

import pytest
import torch
from oracle import RULES, Rule
from support import (
    LAYOUT_SHAPE,
    LAYOUTS,
    MIXES,
    Operands,
    assert_equal_bits,
    call,
    check_call,
    every_rule,
    lay_out,
    make_operands,
    run_python,
)
from torch import Tensor

pytestmark = pytest.mark.on_devices("tests-functions")

_PEAK_MEMORY = """
import resource
import torch
from oracle import RULES

torch.set_num_threads(2)
rows = columns = 4096  # 16 Mi elements

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

buffers = [torch.zeros(columns, rows) for _ in range(3)]
grad = torch.zeros(columns, rows, dtype=torch.bfloat16)
for rule in RULES.values():
    small = [torch.zeros(512, 512) for _ in range(1 + len(rule.states))]
    rule.function(*small, **rule.usual, out=small[0])  # start threads, load libraries
for is_transposed in (False, True):
    for rule in RULES.values():
        operands = [grad, *buffers[: len(rule.states)]]
        if is_transposed:
            operands = [tensor.t() for tensor in operands]
        before = peak()
        rule.function(*operands, **rule.usual, out=operands[0])
        print(rule, is_transposed, peak() - before)
"""


@pytest.mark.once
def test_dense_calls_allocate_nothing_in_proportion() -> None:
    pytest.importorskip("resource")
    done = run_python(_PEAK_MEMORY)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * len(RULES)
    for line in lines:
        rule, is_transposed, growth = line.split()
        # A half-precision temporary of one operand would take 32 MiB.
        assert int(growth) < 16, f"{rule} (transposed: {is_transposed}): {growth} MiB"


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
@every_rule
@pytest.mark.parametrize(
    "layout",
    ["contiguous", "transposed", "permuted", "channels_last", "one channel", "odd offsets"],
)
def test_dense_calls_with_out_allocate_no_tensor(rule: Rule, layout: str) -> None:
    positions = [
        lay_out(make_operands(rule, LAYOUT_SHAPE, mix), LAYOUTS[layout]) for mix in MIXES.values()
    ]
    outs = [torch.empty_like(position.model) for position in positions]
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        for position, out in zip(positions, outs, strict=True):
            call(rule, rule.usual, position, out=out)
    allocations = [event for event in profile.events() if event.self_cpu_memory_usage > 0]
    assert not allocations, [(event.name, event.self_cpu_memory_usage) for event in allocations]


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    # The pattern's period is odd, so that an index that wraps around finds different values.
    rule, case = RULES["lion"], RULES["lion"].usual
    period = 1_000_003
    numel = 2**31 + 3 * period + 12345
    pattern = make_operands(rule, (period,), MIXES["bfloat16"])

    def repeat(values: Tensor) -> Tensor:
        result = torch.empty(numel, dtype=values.dtype)
        whole = numel // period
        result[: whole * period].view(whole, period).copy_(values)
        result[whole * period :].copy_(values[: numel - whole * period])
        return result

    grad, exp_avg = repeat(pattern.grad), repeat(pattern.states[0])
    wanted = check_call(rule, case, pattern)
    assert call(rule, case, Operands(grad, [exp_avg]), out=grad) is grad
    starts = [0, 1000, numel // period // 2, 2**30 // period, 2**31 // period - 1]
    starts += [2**31 // period, 2**31 // period + 1]
    for start in starts:
        window = slice(start * period, (start + 1) * period)
        assert_equal_bits(grad[window], wanted, f"update from {window.start}")
        assert_equal_bits(exp_avg[window], pattern.states[0], f"exp_avg from {window.start}")
    tail = numel % period
    assert_equal_bits(grad[-tail:], wanted[:tail], "the update's last elements")
    assert_equal_bits(exp_avg[-tail:], pattern.states[0][:tail], "exp_avg's last elements")
