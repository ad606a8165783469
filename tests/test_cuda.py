"""The update functions on CUDA devices: the CPU's bits, and streams, graphs and device steps.

Without a GPU, most of it runs on emulated devices: ``pytest --device emulated``.
"""

from typing import Any

import pytest
import torch
from oracle import RULES, Rule
from support import (
    LAYOUT_SHAPE,
    LAYOUTS,
    MIXES,
    Layout,
    Mix,
    Operands,
    assert_close_to_oracle,
    assert_equal_bits,
    assert_equal_results,
    call,
    every_case,
    every_mix,
    every_rule,
    lay_out,
    make_operands,
    with_specials,
)
from torch import Tensor

from emerging_optimizers._native import native

pytestmark = [
    pytest.mark.builtin_rules("test_cuda_user_rules.py has those of users' rules"),
    pytest.mark.on_devices("tests-cuda"),
    pytest.mark.cuda,
]

FLOAT32 = MIXES["float32"]
# Around the elements of a thread, half a tile, a tile and a chunk of the engine.
SIZES = (0, 1, 7, 8, 9, 15, 17, 1023, 1025, 2047, 2048, 2049, 8191, 8192, 8193, 20001)

rules_with_step = pytest.mark.parametrize(
    "rule", [rule for rule in RULES.values() if "step" in rule.usual], ids=str
)


def to(operands: Operands, device: str) -> Operands:
    """Copies on another device, with the same strides and offsets."""

    def copy(tensor: Tensor) -> Tensor:
        base = tensor if tensor._base is None else tensor._base
        there = base.detach().to(device, copy=True)
        return there.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    grad, *states = map(copy, operands)
    return Operands(grad, states)


def assert_same_as_on_cpu(
    rule: Rule, case: dict[str, Any], here: Operands, out_dtype: torch.dtype | None = None
) -> None:
    there = to(here, "cuda")
    out = out_there = None
    if out_dtype is not None:
        out = torch.full_like(here.grad, 7.0, dtype=out_dtype)
        out_there = out.to("cuda")
    wanted = call(rule, case, here, out)
    update = call(rule, case, there, out_there)
    assert update.is_cuda
    assert update.stride() == wanted.stride()
    label = f"{case} {tuple(here.grad.shape)} {here.dtypes}"
    assert_equal_results(rule, (update.cpu(), to(there, "cpu")), (wanted, here), label)


def devices() -> list[str]:
    return ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]


def test_kernels_are_compiled_in() -> None:
    # Otherwise the tests below would pass with the fallback.
    assert native is not None
    assert native.cuda_architectures


# ---- the CPU's bits ------------------------------------------------------------------------------


@every_case
def test_bits_of_the_cpu(rule: Rule, case_name: str) -> None:
    for seed, mix in enumerate(MIXES.values()):
        assert_same_as_on_cpu(rule, rule.cases[case_name], with_specials(rule, mix, seed))


@every_rule
@every_mix
def test_sizes(rule: Rule, mix: Mix) -> None:
    for size in SIZES:
        assert_same_as_on_cpu(rule, rule.usual, make_operands(rule, (size,), mix, seed=size))


@every_rule
@every_mix
@pytest.mark.parametrize("offsets", ["equal", "different"])
def test_offsets(rule: Rule, mix: Mix, offsets: str) -> None:
    for seed, offset in enumerate((1, 2, 3, 5, 8, 13)):
        for size in (1, 9, 2100, 9000):
            arranged = []
            for k, tensor in enumerate(make_operands(rule, (size,), mix, seed)):
                start = offset + (2 * k + 1 if offsets == "different" else 0)
                buffer = torch.full((start + size + 3,), 7.0, dtype=tensor.dtype)
                buffer[start : start + size] = tensor
                arranged.append(buffer[start : start + size])
            assert_same_as_on_cpu(rule, rule.usual, Operands(arranged[0], arranged[1:]))


@every_rule
@pytest.mark.parametrize("layout", list(LAYOUTS.values()), ids=list(LAYOUTS))
def test_layouts(rule: Rule, layout: Layout) -> None:
    for seed, mix in enumerate(MIXES.values()):
        operands = lay_out(make_operands(rule, LAYOUT_SHAPE, mix, seed), layout)
        assert_same_as_on_cpu(rule, rule.usual, operands)


@every_rule
@every_mix
def test_out_of_any_dtype(rule: Rule, mix: Mix) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        operands = make_operands(rule, (3, 1111), mix)
        assert_same_as_on_cpu(rule, rule.usual, operands, out_dtype=dtype)


@every_rule
@every_mix
def test_out_is_grad(rule: Rule, mix: Mix) -> None:
    for offset in (0, 1):
        here = lay_out(make_operands(rule, (11_000,), mix), lambda t, *_: t)
        buffer = torch.zeros(11_000 + offset, dtype=here.grad.dtype)
        here.grad = buffer[offset:].copy_(here.grad)
        there = to(here, "cuda")
        wanted = torch.empty_like(here.grad)
        call(rule, rule.usual, here, out=wanted)
        version = there.grad._version
        assert call(rule, rule.usual, there, out=there.grad) is there.grad
        assert there.grad._version > version
        there = to(there, "cpu")
        assert_equal_results(rule, (there.grad, there), (wanted, here), f"at {offset}")


# ---- lists ---------------------------------------------------------------------------------------


def assert_list_is_as_each_alone(rule: Rule, positions: list[Operands]) -> None:
    alone = [position.clone() for position in positions]
    updates = call(rule, rule.usual, positions)
    for i, position in enumerate(alone):
        update = call(rule, rule.usual, position)
        assert updates[i].device == position.grad.device
        assert_equal_results(rule, (updates[i], positions[i]), (update, position), f"[{i}]")


@every_rule
def test_thousand_tensors_of_all_kinds(rule: Rule) -> None:
    mixes = list(MIXES.values())
    positions = [
        to(make_operands(rule, (i % 37,) if i % 3 else (), mixes[i % len(mixes)], i), "cuda")
        for i in range(1000)
    ]
    assert_list_is_as_each_alone(rule, positions)


@every_rule
def test_thousand_tensors_of_one_kind(rule: Rule) -> None:
    positions = [to(make_operands(rule, (i % 300,), FLOAT32, i), "cuda") for i in range(1000)]
    assert_list_is_as_each_alone(rule, positions)


@every_rule
def test_devices_in_one_list(rule: Rule) -> None:
    mixes = list(MIXES.values())
    positions = [
        to(
            make_operands(rule, (3, 500 * i), mixes[i % len(mixes)], i),
            devices()[i % len(devices())],
        )
        for i in range(20)
    ]
    assert_list_is_as_each_alone(rule, positions)


def test_shape_scaling_differs_by_position() -> None:
    rule = RULES["signum"]
    for mix in MIXES.values():
        for shape in [(1, 1), (3, 4), (129, 70), (0, 5)]:
            case = rule.cases["shape scaling"]
            assert_same_as_on_cpu(rule, case, make_operands(rule, shape, mix))


@every_rule
def test_current_device_stays(rule: Rule) -> None:
    last = devices()[-1]
    operands = to(make_operands(rule, (100,), FLOAT32), last)
    before = torch.cuda.current_device()
    assert str(call(rule, rule.usual, operands).device) == last
    assert torch.cuda.current_device() == before


@pytest.mark.slow
@pytest.mark.real
def test_more_than_two_to_the_31_elements() -> None:
    rule, period = RULES["lion"], 1_000_003
    numel = 2**31 + 3 * period + 12345
    pattern = to(make_operands(rule, (period,), MIXES["bfloat16"]), "cuda")
    whole = numel // period

    def repeat(values: Tensor) -> Tensor:
        result = torch.empty(numel, dtype=values.dtype, device="cuda")
        result[: whole * period].view(whole, period).copy_(values)
        result[whole * period :].copy_(values[: numel - whole * period])
        return result

    grad, exp_avg = repeat(pattern.grad), repeat(pattern.states[0])
    wanted = call(rule, rule.usual, pattern)
    call(rule, rule.usual, Operands(grad, [exp_avg]), out=grad)
    for got, one in ((grad, wanted), (exp_avg, pattern.states[0])):
        rows = got[: whole * period].view(whole, period)
        assert bool((rows == one).all())
        assert_equal_bits(got[whole * period :], one[: numel - whole * period], "the last elements")


# ---- a step on the device ------------------------------------------------------------------------


@rules_with_step
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32], ids=str)
def test_step_on_the_device(rule: Rule, dtype: torch.dtype) -> None:
    warmups = [h.name for h in rule.implementation.hyperparameters if h.kind == "warm-up"]
    for case_name, case in rule.cases.items():
        if "step" not in case:
            continue
        for value in {1, case["step"], 1000}:
            here = make_operands(rule, (3, 700), FLOAT32)
            there = to(here, "cuda")
            step = torch.tensor(value, dtype=dtype, device="cuda")
            before = here.clone()
            wanted = call(rule, case | {"step": value}, here)
            update = call(rule, case | {"step": step}, there)
            there = to(there, "cpu")
            assert step.item() == value
            # The half-life's log and pow come from math libraries, and may differ in the last bit.
            label = f"{case_name}, step {value}"
            expected_case = case | {"step": value}
            assert_close_to_oracle(rule, expected_case, before, update.cpu(), there.states, label)
            if not any(case[name] for name in warmups):
                assert_equal_results(rule, (update.cpu(), there), (wanted, here), label)


@rules_with_step
def test_step_on_the_host_for_tensors_on_the_device(rule: Rule) -> None:
    here = make_operands(rule, (3, 700), FLOAT32)
    there = to(here, "cuda")
    wanted = call(rule, rule.usual | {"step": 3}, here)
    update = call(rule, rule.usual | {"step": torch.tensor(3)}, there)
    assert_equal_results(rule, (update.cpu(), to(there, "cpu")), (wanted, here))


@rules_with_step
def test_step_on_another_device_than_the_tensors(rule: Rule) -> None:
    positions = [to(make_operands(rule, (5,), FLOAT32), device) for device in ("cuda:0", "cpu")]
    before = [position.clone() for position in positions]
    step = torch.tensor(3, device="cuda:0")
    with pytest.raises(ValueError, match=r"^step is on cuda:0 but grads\[1\] is on cpu$"):
        call(rule, rule.usual | {"step": step}, positions)
    with pytest.raises(ValueError, match=r"^step is on cuda:0 but grad is on cpu$"):
        call(rule, rule.usual | {"step": step}, positions[1])
    for position, old in zip(positions, before, strict=True):
        assert_equal_results(rule, (old.grad, position), (old.grad, old))


@rules_with_step
def test_step_of_a_wrong_type(rule: Rule) -> None:
    operands = to(make_operands(rule, (5,), FLOAT32), "cuda")
    for step in (torch.tensor([3], device="cuda"), torch.tensor(3.0, device="cuda").double()):
        with pytest.raises(TypeError, match="expected an int or a 0-dim tensor of dtype int64"):
            call(rule, rule.usual | {"step": step}, operands)


@rules_with_step
def test_step_on_the_device_with_no_tensors(rule: Rule) -> None:
    assert call(rule, rule.usual | {"step": torch.tensor(3, device="cuda")}, []) == []


# ---- errors --------------------------------------------------------------------------------------


@every_rule
def test_devices_at_one_position(rule: Rule) -> None:
    positions = [to(make_operands(rule, (5,), FLOAT32), "cuda:0") for _ in range(3)]
    for other in {"cpu", devices()[-1]} - {"cuda:0"}:
        before = [position.clone() for position in positions]
        positions[2].states[-1] = positions[2].states[-1].to(other)
        name = f"{rule.states[-1]}s[2]"
        with pytest.raises(ValueError, match="but grads") as caught:
            call(rule, rule.usual, positions)
        assert str(caught.value) == f"{name} is on {other} but grads[2] is on cuda:0"
        for position, old in zip(positions[:2], before, strict=False):
            assert_equal_results(rule, (old.grad, position), (old.grad, old))


@every_rule
def test_the_same_tensor_twice(rule: Rule) -> None:
    positions = [to(make_operands(rule, (5,), FLOAT32), "cuda") for _ in range(2)]
    positions[1].states[0] = positions[0].states[0]
    with pytest.raises(ValueError, match="shares memory with"):
        call(rule, rule.usual, positions)


# ---- streams, graphs, the profiler, torch.compile ------------------------------------------------


@pytest.mark.real
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@rules_with_step
def test_no_synchronisation(rule: Rule) -> None:
    positions = [to(make_operands(rule, (3, i), FLOAT32, i), "cuda") for i in range(50)]
    step = torch.tensor(3, device="cuda")
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        call(rule, rule.usual | {"step": step}, positions)
        call(rule, rule.usual | {"step": 3}, positions)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.real
@every_rule
def test_side_stream(rule: Rule) -> None:
    here = make_operands(rule, (3, 700), FLOAT32)
    there = to(here, "cuda")
    grad, there.grad = there.grad, torch.zeros_like(there.grad)
    out = torch.empty_like(grad)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # so that another stream would read zeros
        there.grad.copy_(grad)
        call(rule, rule.usual, there, out=out)
    side.synchronize()
    wanted = call(rule, rule.usual, here)
    assert_equal_results(rule, (out.cpu(), to(there, "cpu")), (wanted, here))


@pytest.mark.real
@every_rule
@pytest.mark.parametrize("layout", ["contiguous", "strided slices"])
def test_captured_graph_advances_by_itself(rule: Rule, layout: str) -> None:
    """With the step on the device and gradients updated in place, a replay is the next step."""
    has_step = "step" in rule.usual
    step = torch.zeros((), dtype=torch.int64, device="cuda")
    case = rule.usual | ({"step": step} if has_step else {})
    positions = [
        to(lay_out(make_operands(rule, LAYOUT_SHAPE, mix, i), LAYOUTS[layout]), "cuda")
        for i, mix in enumerate(MIXES.values())
    ]
    outs = [torch.empty_like(p.states[0], dtype=p.update_dtype) for p in positions]
    eager = [position.clone() for position in positions]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm up with copies
        warm = [position.clone() for position in positions]
        call(rule, rule.usual, warm, out=[torch.empty_like(out) for out in outs])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step += 1
        call(rule, case, positions, out=outs)
    for number in range(1, 5):
        for position, other in zip(positions, eager, strict=True):
            new = torch.randn(LAYOUT_SHAPE).to(position.grad)
            position.grad.copy_(new)
            other.grad.copy_(new)
        graph.replay()
        numbered = case | ({"step": torch.tensor(number, device="cuda")} if has_step else {})
        updates = call(rule, numbered, eager)
        assert not has_step or step.item() == number
        for i in range(len(positions)):
            got, wanted = (outs[i], positions[i]), (updates[i], eager[i])
            assert_equal_results(rule, got, wanted, f"[{i}], replay {number}")


def kernels(function: Any) -> list[str]:
    """Return the names of the package's kernels that a call launches."""
    function()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize()
    device = torch.autograd.DeviceType.CUDA
    names = [event.name for event in profile.events() if event.device_type == device]
    return [name for name in names if "emopt" in name]


@pytest.mark.real
@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
@every_rule
def test_thousand_tensors_in_two_launches(rule: Rule) -> None:
    positions = [to(make_operands(rule, (1000,), FLOAT32), "cuda") for _ in range(1000)]
    outs = [torch.empty_like(position.grad) for position in positions]
    assert 1 <= len(kernels(lambda: call(rule, rule.usual, positions, out=outs))) <= 2


@pytest.mark.real
@every_rule
def test_dense_calls_with_out_allocate_nothing(rule: Rule) -> None:
    positions = [
        to(lay_out(make_operands(rule, LAYOUT_SHAPE, mix), LAYOUTS["odd offsets"]), "cuda")
        for mix in MIXES.values()
    ]
    outs = [torch.empty_like(position.states[0]) for position in positions]
    call(rule, rule.usual, positions, out=outs)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    call(rule, rule.usual, positions, out=outs)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.real
@every_rule
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(rule: Rule, mode: str) -> None:
    torch._dynamo.reset()
    eager = [to(make_operands(rule, (5, 3 + i), FLOAT32, i), "cuda") for i in range(3)]
    compiled = [position.clone() for position in eager]

    def train(grads: list[Tensor], states: list[list[Tensor]], step: Any) -> list[Tensor]:
        case = rule.usual | ({"step": step} if "step" in rule.usual else {})
        updates = rule.function(grads, *states, **case)
        return [update * 2 for update in updates]

    def lists(positions: list[Operands]) -> tuple[list[Tensor], list[list[Tensor]]]:
        states = [[p.states[i] for p in positions] for i in range(len(rule.states))]
        return [p.grad for p in positions], states

    for position in compiled:
        for state in position.states:
            torch._dynamo.mark_static_address(state)  # otherwise, no graph could write to it
    torch._dynamo.utils.counters.clear()
    function = torch.compile(train, fullgraph=True, mode=mode)
    for number in range(1, 5):
        step = torch.tensor(number, device="cuda")
        got = [tensor.clone() for tensor in function(*lists(compiled), step)]
        wanted = train(*lists(eager), step)
        for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
            assert_equal_results(rule, (a, compiled[i]), (b, eager[i]), f"[{i}], step {number}")
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.real
@every_rule
def test_opcheck(rule: Rule) -> None:
    positions = [to(make_operands(rule, (5, 3), FLOAT32, i), "cuda") for i in range(2)]
    operator = rule.operator
    updates = [torch.empty_like(position.grad) for position in positions]
    states = [[p.states[i] for p in positions] for i in range(len(rule.states))]
    names = [argument.name for argument in operator._schema.arguments]
    options = [rule.usual.get(name, False) for name in names[2 + len(states) : -1]]
    arguments = (updates, [position.grad for position in positions], *states, *options)
    results = torch.library.opcheck(operator, arguments, {})
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.real
@every_rule
def test_autocast_changes_nothing(rule: Rule) -> None:
    operands = to(make_operands(rule, (5, 300), FLOAT32), "cuda")
    other = operands.clone()
    wanted = call(rule, rule.usual, other)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        update = call(rule, rule.usual, operands)
    assert_equal_results(rule, (update, operands), (wanted, other))
