"""CUDA graphs of a thousand tensors, which take large launches, and steps on other streams.

A graph keeps a launch's arguments, up to 32 KB: a replay must use those that were captured, long
after the call that created them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from optimizers import Setup, assert_same, contents, every_optimizer, make_grads
from oracle import RULES, Rule
from support import MIXES, Operands, call, every_rule, make_operands
from test_cuda import to
from test_cuda_optimizers import assert_same_as_on_cpu, counters, make_run, step_with
from torch import Tensor
from torch.nn import Parameter

from emerging_optimizers import ScalarOptimizer

pytestmark = [
    pytest.mark.builtin_rules("test_cuda_user_rules.py has those of users' rules"),
    pytest.mark.cuda,
    pytest.mark.real,
]

COUNT = 1000
# Less than a vector, some vectors, and more than a tile.
SIZES = [3000 if i % 100 == 0 else 1 + 37 * i % 300 for i in range(COUNT)]
every_way = pytest.mark.parametrize(
    "storage", ["float32", "bfloat16, masters", "bfloat16, stochastic", "8-bit"]
)


def capture(function: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Capture a function in a graph, without running it."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def on_a_side_stream(function: Callable[[], object]) -> None:
    """Call on another stream, ordered after earlier work and before later work."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)


# ---- a thousand tensors in a graph ---------------------------------------------------------------


def make_positions(rule: Rule, mix: str) -> list[Operands]:
    return [to(make_operands(rule, (size,), MIXES[mix], i), "cuda") for i, size in enumerate(SIZES)]


def copies(positions: Sequence[Operands]) -> list[Operands]:
    return [position.clone() for position in positions]


def of_all(rule: Rule, updates: Sequence[Tensor], positions: Sequence[Operands]) -> list[Tensor]:
    """Return all updates and states as one tensor each, for comparisons."""
    states = ([p.states[i] for p in positions] for i in range(len(rule.states)))
    return [torch.cat(list(tensors)) for tensors in (updates, *states)]


@every_rule
@pytest.mark.parametrize("mix", ["float32", "bfloat16 grad, float32 states"])
def test_a_call(rule: Rule, mix: str) -> None:
    """Each replay is the next step, with the current gradients."""
    positions = make_positions(rule, mix)
    eager = copies(positions)
    outs = [torch.empty_like(position.grad) for position in positions]
    step = torch.zeros((), dtype=torch.int64, device="cuda")
    case = rule.usual | ({"step": step} if "step" in rule.usual else {})

    def next_step(positions: list[Operands]) -> None:
        step.add_(1)
        call(rule, case, positions, out=outs)

    on_a_side_stream(lambda: next_step(copies(positions)))
    step.zero_()
    graph = capture(lambda: next_step(positions))
    assert_same(of_all(rule, outs, positions), of_all(rule, outs, eager), "at the capture")
    updates = [torch.empty_like(out) for out in outs]
    for number in range(1, 5):
        for some in (positions, eager):
            torch._foreach_mul_([position.grad for position in some], -0.75)
        graph.replay()
        assert step.item() == number
        call(rule, case, eager, out=updates)
        got, wanted = of_all(rule, outs, positions), of_all(rule, updates, eager)
        assert_same(got, wanted, f"replay {number}")


@pytest.mark.parametrize("rule", [RULES["adam"], RULES["lion"]], ids=str)
def test_a_graph_keeps_its_arguments(rule: Rule) -> None:
    """Other calls launch kernels and free memory before a replay."""
    positions = make_positions(rule, "float32")
    others, eager = copies(positions), copies(positions)
    outs = [torch.empty_like(position.grad) for position in positions]
    on_a_side_stream(lambda: call(rule, rule.usual, copies(positions)))
    graph = capture(lambda: call(rule, rule.usual, positions, out=outs))
    for _ in range(20):
        call(rule, rule.usual, others)
    del others
    graph.replay()
    updates = call(rule, rule.usual, eager)
    assert_same(of_all(rule, outs, positions), of_all(rule, updates, eager))


def _optimizer(setup: Setup, storage: str, **options: Any) -> ScalarOptimizer:
    """Return an optimizer of a thousand parameters with gradients."""
    steps = make_run(setup, storage, weight_decay=0.1, **options)
    generator = torch.Generator().manual_seed(7)
    shapes: list[Any] = list(SIZES)
    if "8-bit" in storage:
        shapes[::10] = [(128, 32)] * len(shapes[::10])
    params = [
        Parameter(torch.randn(shape, generator=generator).to("cuda", steps.dtype))
        for shape in shapes
    ]
    for param in params:
        param.grad = torch.zeros_like(param)
    return setup.make(params, **steps.options)


def _all_of(optimizer: ScalarOptimizer) -> list[Tensor]:
    """Return all parameters and states as one tensor per dtype, for comparisons."""
    tensors = [tensor.reshape(-1) for tensor in contents(optimizer)]
    dtypes = dict.fromkeys(tensor.dtype for tensor in tensors)
    return [torch.cat([t for t in tensors if t.dtype == dtype]) for dtype in dtypes]


def _set_grads(optimizer: ScalarOptimizer, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    values = torch.randn(sum(SIZES), generator=generator).to("cuda").split(SIZES)
    grads = [param.grad for param in optimizer.param_groups[0]["params"]]
    torch._foreach_copy_(grads, values)


def _step(optimizer: ScalarOptimizer) -> None:
    torch.default_generator.manual_seed(1)  # a graph keeps the seed drawn at capture
    optimizer.step()


@every_optimizer
@every_way
def test_a_step(setup: Setup, storage: str) -> None:
    """Each replay is the next step, with the current gradients and learning rate."""
    optimizers = [
        _optimizer(setup, storage, lr=torch.tensor(0.02, device="cuda"), capturable=True)
        for _ in range(2)
    ]
    eager, graphed = optimizers
    for optimizer in optimizers:
        _set_grads(optimizer, 1)
    on_a_side_stream(lambda: _step(graphed))  # creates the states
    _step(eager)
    before = _all_of(graphed)
    assert_same(before, _all_of(eager), "the first step")
    graph = capture(lambda: _step(graphed))
    assert_same(_all_of(graphed), before, "at the capture")
    for step in range(2, 6):
        for optimizer in optimizers:
            _set_grads(optimizer, step)
            optimizer.param_groups[0]["lr"].mul_(0.9)
        _step(eager)
        graph.replay()
        assert_same(_all_of(graphed), _all_of(eager), f"step {step}")
        assert {counter.item() for counter in counters(graphed)} == {float(step)}


@every_optimizer
def test_a_skipped_step(setup: Setup) -> None:
    """All launches read a ``GradScaler``'s numbers anew at each replay."""
    optimizers = [_optimizer(setup, "bfloat16, masters", capturable=True) for _ in range(2)]
    eager, graphed = optimizers
    found_inf = torch.zeros((), device="cuda")
    scaler = {"grad_scale": torch.tensor(4.0, device="cuda"), "found_inf": found_inf}
    for optimizer in optimizers:
        _set_grads(optimizer, 1)
    on_a_side_stream(lambda: step_with(graphed, **scaler))
    step_with(eager, **scaler)
    graph = capture(lambda: step_with(graphed, **scaler))
    for step, overflow in enumerate((True, False, True, False), start=2):
        found_inf.fill_(float(overflow))
        before = _all_of(graphed)
        for optimizer in optimizers:
            _set_grads(optimizer, step)
        graph.replay()
        if overflow:
            assert_same(_all_of(graphed), before, f"step {step}")
        else:
            step_with(eager, **scaler)
            assert_same(_all_of(graphed), _all_of(eager), f"step {step}")
    assert {counter.item() for counter in counters(graphed)} == {3.0}


# ---- steps on other streams ----------------------------------------------------------------------


@every_optimizer
@every_way
@pytest.mark.parametrize("capturable", [False, True])
def test_a_step_on_a_side_stream(setup: Setup, storage: str, capturable: bool) -> None:
    """A step sees the results of earlier work on its stream."""
    steps = make_run(setup, storage, capturable=capturable)
    torch.manual_seed(0)
    params = [
        Parameter(torch.randn(shape).to(steps.dtype)) for shape in ((3, 700), (1, 1), (131, 70))
    ]
    there = [Parameter(param.detach().to("cuda")) for param in params]
    optimizer, other = setup.make(there, **steps.options), setup.make(params, **steps.options)
    for step in range(1, 4):
        grads = make_grads(params, step)
        on_device = [grad.to("cuda") for grad in grads]
        for param, same, grad in zip(there, params, grads, strict=True):
            same.grad = grad
            param.grad = torch.zeros_like(param)
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)  # so that another stream would read zeros
            for param, grad in zip(there, on_device, strict=True):
                assert param.grad is not None
                param.grad.copy_(grad)
            _step(optimizer)
        side.synchronize()
        _step(other)
        assert_same_as_on_cpu(optimizer, other, f"step {step}")


@every_optimizer
def test_numbers_that_a_side_stream_writes(setup: Setup) -> None:
    """A learning rate, a multiplier and a ``GradScaler``'s numbers on the device."""
    written: Mapping[str, float] = {"grad_multiplier": 0.3, "grad_scale": 8.0, "found_inf": 0.0}
    steps = make_run(setup, "float32")
    params = [Parameter(torch.randn(3, 700))]
    there = [Parameter(param.detach().to("cuda")) for param in params]
    lr = torch.ones((), device="cuda")
    optimizer = setup.make(there, **{**steps.options, "lr": lr})
    other = setup.make(params, **{**steps.options, "lr": torch.tensor(0.02)})
    (grad,) = make_grads(params, 1)
    params[0].grad, there[0].grad = grad, grad.to("cuda")
    numbers: dict[str, Tensor] = {name: torch.ones((), device="cuda") for name in written}
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        lr.fill_(0.02)
        for name, number in numbers.items():
            number.fill_(written[name])
        step_with(optimizer, **numbers)
    side.synchronize()
    step_with(other, **{name: torch.tensor(value) for name, value in written.items()})
    assert_same_as_on_cpu(optimizer, other)
