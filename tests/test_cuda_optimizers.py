"""The optimizers' steps on CUDA devices: the CPU's bits, without synchronisation.

Without a GPU, most of it runs on emulated devices: ``pytest --device emulated``.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from optimizers import (
    METHODS,
    SETUPS,
    VARIANTS,
    Setup,
    assert_same,
    contents,
    every_optimizer,
    make_grads,
    make_params,
    run,
    set_grads,
)
from test_cuda import devices, kernels
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from emerging_optimizers import LaProp, ScalarOptimizer

pytestmark = [
    pytest.mark.builtin_rules("test_cuda_user_rules.py has those of users' rules"),
    pytest.mark.on_devices("tests-cuda"),
    pytest.mark.cuda,
]

_LAPROP = next((setup for setup in SETUPS if setup.cls is LaProp), SETUPS[0])
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# Smaller than a vector, empty, larger than a tile and than a chunk; matrices, for shape scaling.
# The states of the last one may be 8-bit.
SHAPES = ((3, 4), (1, 1), (0, 3), (19, 131), (131, 70), (135, 32))


@dataclass
class Run:
    """Steps of an optimizer that can be taken on any device.

    Attributes:
        setup: The optimizer.
        dtype: The dtype of parameters and gradients.
        options: The optimizer's arguments.
        numbers: The ``grad_multiplier`` of each step, and the attributes a ``GradScaler`` sets.
        steps: The numbers of the steps.
    """

    setup: Setup
    dtype: torch.dtype = F32
    options: Mapping[str, Any] = field(default_factory=dict)
    numbers: Mapping[str, Any] = field(default_factory=dict)
    steps: Sequence[int] = (1, 2, 3)

    def on(self, device: str, **options: Any) -> ScalarOptimizer:
        """Take the steps on a device."""
        torch.manual_seed(0)  # for stochastic rounding
        with torch.device(device):
            params = make_params(SHAPES, self.dtype)
            optimizer = self.setup.make(params, **{"weight_decay": 0.1, **self.options, **options})
            for step in self.steps:
                set_grads(params, step)
                step_with(optimizer, **self.numbers)
        return optimizer


def step_with(optimizer: ScalarOptimizer, grad_multiplier: Any = None, **attributes: Any) -> None:
    """Step with the attributes that a ``GradScaler`` sets for the duration of the call."""
    vars(optimizer).update(attributes)
    optimizer.step(grad_multiplier=grad_multiplier)
    for name in attributes:
        delattr(optimizer, name)


def on_cpu(optimizer: ScalarOptimizer) -> list[Tensor]:
    return [tensor.cpu() for tensor in contents(optimizer)]


def assert_same_as_on_cpu(
    optimizer: ScalarOptimizer, other: ScalarOptimizer, label: str = ""
) -> None:
    assert_same(on_cpu(optimizer), contents(other), label)


def counters(optimizer: ScalarOptimizer) -> list[Tensor]:
    return [state["step"] for state in optimizer.state.values()]


# ---- the CPU's bits ------------------------------------------------------------------------------

EIGHT_BIT: dict[str, Any] = {"state_dtype": "8bit"}
# The options that decide how parameters and states are stored.
STORAGE: dict[str, tuple[torch.dtype, Callable[[tuple[str, ...]], dict[str, Any]]]] = {
    "float32": (F32, lambda _: {}),
    "float64": (F64, lambda _: {}),
    "complex64": (torch.complex64, lambda _: {}),
    "bfloat16": (BF16, lambda _: {}),
    "float16, float32 states": (F16, lambda _: {"state_dtype": F32}),
    "float32, half states": (F32, lambda _: {"state_dtype": BF16}),
    "mixed states": (BF16, lambda states: {"state_dtype": {states[0]: F32, states[-1]: F16}}),
    "bfloat16, masters": (BF16, lambda _: {"master_weights": True, "state_dtype": F32}),
    "bfloat16, split": (BF16, lambda _: {"master_weights": "split", "state_dtype": F32}),
    "float16, masters": (F16, lambda _: {"master_weights": True}),
    "bfloat16, stochastic": (BF16, lambda _: {"stochastic_rounding": True, "state_dtype": F32}),
    "float16, stochastic": (F16, lambda _: {"stochastic_rounding": True}),
    "8-bit": (F32, lambda _: EIGHT_BIT),
    "bfloat16, split, 8-bit": (BF16, lambda _: {"master_weights": "split", **EIGHT_BIT}),
    "bfloat16, stochastic, 8-bit": (BF16, lambda _: {"stochastic_rounding": True, **EIGHT_BIT}),
}


def may_be_coded(setup: Setup) -> bool:
    """Whether any of the states may be 8-bit."""
    return any(setup.rule.implementation.codes)


every_storage = pytest.mark.parametrize("storage", STORAGE)
# One for each path through a launch.
WAYS = ["float32", "mixed states", "bfloat16, stochastic", "8-bit"]


def crossed(setups: Iterable[Setup], storages: Iterable[str]) -> pytest.MarkDecorator:
    """Parametrize a test with all pairs that are possible."""
    return pytest.mark.parametrize(
        ("setup", "storage"),
        [
            pytest.param(setup, storage, id=f"{setup}-{storage}")
            for setup, storage in itertools.product(setups, storages)
            if "8-bit" not in storage or may_be_coded(setup)
        ],
    )


every_case = crossed([*SETUPS, *VARIANTS], STORAGE)
every_way = crossed(SETUPS, WAYS)
every_way_of_variants = crossed([*SETUPS, *VARIANTS], WAYS)


def make_run(setup: Setup, storage: str, **options: Any) -> Run:
    dtype, stored = STORAGE[storage]
    # So large that a wrong learning rate or decay shows even in half precision.
    return Run(setup, dtype, {"lr": 0.02, "fused": True, **stored(setup.states), **options})


@every_case
@pytest.mark.parametrize("capturable", [False, True])
def test_bits_of_the_cpu(setup: Setup, storage: str, capturable: bool) -> None:
    # The half-life's log and pow then come from the device's math library.
    is_computed_there = capturable or "stochastic" in storage
    is_open = "warm-up" in setup.name and is_computed_there and torch.version.cuda is not None
    for method in METHODS:
        steps = make_run(setup, storage, weight_decay_method=method, maximize=method == "palm")
        optimizer, wanted = steps.on("cuda", capturable=capturable), steps.on("cpu")
        assert all(counter.is_cuda == capturable for counter in counters(optimizer))
        if is_open:
            torch.testing.assert_close(on_cpu(optimizer), contents(wanted))
        else:
            assert_same_as_on_cpu(optimizer, wanted, method)


def _cut(values: Sequence[Tensor], offset: int, device: str) -> tuple[Tensor, list[Tensor]]:
    """Copies of tensors, one after another in a buffer with further elements around them."""
    sizes = [offset, *(value.numel() for value in values), 5]
    buffer = torch.full((sum(sizes),), 7.0, dtype=values[0].dtype, device=device)
    parts = buffer.split(sizes)[1:-1]
    for part, value in zip(parts, values, strict=True):
        part.copy_(value.reshape(-1))
    return buffer, [p.view(value.shape) for p, value in zip(parts, values, strict=True)]


@every_way
@pytest.mark.parametrize("offsets", [(0, 0), (1, 1), (1, 2), (3, 0), (0, 5)], ids=str)
def test_views_into_flat_buffers(setup: Setup, storage: str, offsets: tuple[int, int]) -> None:
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        steps = make_run(setup, storage)
        values = make_params(SHAPES, steps.dtype)
        buffer, params = _cut([value.detach() for value in values], offsets[0], device)
        optimizer = setup.make(list(map(Parameter, params)), **steps.options)
        for step in steps.steps:
            _, grads = _cut(make_grads(values, step), offsets[1], device)
            for param, grad in zip(optimizer.param_groups[0]["params"], grads, strict=True):
                param.grad = grad
            optimizer.step()
        results.append([buffer.cpu(), *on_cpu(optimizer)])
    assert_same(results[1], results[0])


@every_optimizer
@pytest.mark.parametrize("capturable", [False, True])
def test_devices_and_steps_in_one_group(setup: Setup, capturable: bool) -> None:
    """Each parameter steps as on the CPU, whatever the devices and steps of the others."""
    options: dict[str, Any] = {"fused": True, "capturable": capturable, "weight_decay": 0.1}
    others = make_params([(3, 700)] * 7)
    places = [devices()[i % len(devices())] for i in range(len(others))]
    params = [Parameter(p.detach().to(d, copy=True)) for p, d in zip(others, places, strict=True)]
    optimizer, other = setup.make(params, **options), setup.make(others, **options)
    for step in range(1, 5):
        set_grads(others, step)
        for i, (param, same) in enumerate(zip(params, others, strict=True)):
            if step == 1 + i % 4:
                same.grad = None
            param.grad = None if same.grad is None else same.grad.to(param.device)
        optimizer.step()
        other.step()
    assert_same_as_on_cpu(optimizer, other)
    assert {counter.item() for counter in counters(optimizer)} == {3.0}
    counted_on = [str(optimizer.state[param]["step"].device) for param in params]
    assert counted_on == (places if capturable else ["cpu"] * len(places))


@every_optimizer
def test_counters_that_become_capturable(setup: Setup) -> None:
    params, others = make_params(), make_params()
    cuda_params = [Parameter(p.detach().to("cuda")) for p in params]
    optimizer, other = setup.make(cuda_params, fused=True), setup.make(others, fused=True)
    for step in (1, 2, 3):
        set_grads(others, step)
        for param, same in zip(cuda_params, others, strict=True):
            assert same.grad is not None
            param.grad = same.grad.to("cuda")
        if step == 2:
            optimizer.param_groups[0]["capturable"] = True
        if step == 3:  # one counter for two parameters
            optimizer.state[cuda_params[1]]["step"] = optimizer.state[cuda_params[0]]["step"]
        optimizer.step()
        other.step()
    assert all(counter.is_cuda for counter in counters(optimizer))
    assert [counter.item() for counter in counters(optimizer)] == [3.0, 3.0]
    assert_same_as_on_cpu(optimizer, other)


# ---- numbers on the device -----------------------------------------------------------------------

NUMBERS = {"lr": 0.0123, "grad_multiplier": 0.3, "grad_scale": 1024.0, "found_inf": 0.0}


def _run_with(setup: Setup, storage: str, numbers: Mapping[str, Any], **options: Any) -> Run:
    steps = make_run(setup, storage, **options)
    numbers = dict(numbers)
    if "lr" in numbers:
        steps.options = {**steps.options, "lr": numbers.pop("lr")}
    steps.numbers = numbers
    return steps


@every_optimizer
@pytest.mark.parametrize("name", [*NUMBERS, "all"])
@pytest.mark.parametrize(
    ("dtype", "storage"), [(F32, "float32"), (F64, "bfloat16, stochastic")], ids=str
)
def test_numbers_on_the_device(setup: Setup, name: str, dtype: torch.dtype, storage: str) -> None:
    names = [name] if name in NUMBERS else list(NUMBERS)
    here = {name: torch.tensor(NUMBERS[name], dtype=dtype) for name in names}
    for method in METHODS if "lr" in names else METHODS[:1]:
        options = {"weight_decay_method": method}
        wanted = _run_with(setup, storage, here, **options).on("cpu")
        for device, capturable in (("cuda:0", False), (devices()[-1], True)):
            there = {name: number.to(device) for name, number in here.items()}
            steps = _run_with(setup, storage, there, capturable=capturable, **options)
            optimizer = steps.on("cuda:0")
            assert_same_as_on_cpu(optimizer, wanted, f"{method}, on {device}")
            is_counted_there = capturable or "found_inf" in names
            assert {c.is_cuda for c in counters(optimizer)} == {is_counted_there}


@every_optimizer
def test_lr_that_changes_in_its_tensor(setup: Setup) -> None:
    results = []
    for device in ("cpu", "cuda"):
        lr = torch.tensor(0.5, device=device)
        with torch.device(device):
            params = make_params(SHAPES)
            optimizer = setup.make(params, lr=lr, fused=True)
            run(optimizer, params, [1, 2, 3], before_step=lambda _, lr=lr: lr.mul_(0.7))
        results.append(on_cpu(optimizer))
    assert_same(results[1], results[0])


@every_optimizer
@every_storage
def test_overflow_changes_nothing(setup: Setup, storage: str) -> None:
    steps = make_run(setup, storage)
    optimizer, other = steps.on("cuda"), steps.on("cpu")
    params, others = (o.param_groups[0]["params"] for o in (optimizer, other))
    before = on_cpu(optimizer)
    assert not any(counter.is_cuda for counter in counters(optimizer))
    for step, overflow in ((4, True), (4, False), (5, True)):
        for o, tensors, device in ((optimizer, params, "cuda"), (other, others, "cpu")):
            with torch.device(device):
                torch.manual_seed(step)
                set_grads(tensors, step)
                step_with(o, found_inf=torch.tensor(float(overflow), device=device))
        if step == 4 and overflow:
            assert_same(on_cpu(optimizer), before)
        assert all(counter.is_cuda for counter in counters(optimizer))
    assert_same_as_on_cpu(optimizer, other)
    # It stays unchanged without numbers on the device, too.
    for tensors, o, device in ((params, optimizer, "cuda"), (others, other, "cpu")):
        with torch.device(device):
            run(o, tensors, [6])
    assert [counter.item() for counter in counters(optimizer)] == [5.0] * len(SHAPES)
    assert all(counter.is_cuda for counter in counters(optimizer))


@every_optimizer
def test_overflow_at_the_first_step(setup: Setup) -> None:
    found_inf = torch.ones((), device="cuda")
    steps = make_run(setup, "bfloat16, masters")
    steps.numbers = {"found_inf": found_inf}
    optimizer = steps.on("cuda")
    assert [counter.item() for counter in counters(optimizer)] == [0.0] * len(SHAPES)
    params = [p.detach().cpu() for p in optimizer.param_groups[0]["params"]]
    assert_same(params, [p.detach() for p in make_params(SHAPES, BF16)])
    for state in optimizer.state.values():
        assert not any(state[name].any() for name in setup.states)


@every_optimizer
@pytest.mark.parametrize("overflow", [False, True])
def test_params_of_the_cpu_with_numbers_on_the_device(setup: Setup, overflow: bool) -> None:
    others = make_params([(3, 40)] * 4)
    places = ["cpu", "cuda"] * 2
    params = [Parameter(p.detach().to(d, copy=True)) for p, d in zip(others, places, strict=True)]
    optimizer, other = setup.make(params, lr=0.02), setup.make(others, lr=0.02)
    here = {"grad_scale": torch.tensor(4.0), "found_inf": torch.tensor(float(overflow))}
    there = {name: number.to("cuda") for name, number in here.items()}
    for step in (1, 2):
        set_grads(others, step)
        for param, same in zip(params, others, strict=True):
            assert same.grad is not None
            param.grad = same.grad.to(param.device)
        step_with(optimizer, grad_multiplier=torch.tensor(0.5, device="cuda"), **there)
        step_with(other, grad_multiplier=0.5, **here)
    torch.testing.assert_close([p.cpu() for p in params], others)
    if overflow:
        assert_same([p.detach().cpu() for p in params], [p.detach() for p in others])
    assert [c.device.type for c in counters(optimizer)] == places
    assert {c.item() for c in counters(optimizer)} == {0.0 if overflow else 2.0}


# ---- no synchronisation --------------------------------------------------------------------------


class _NoTransfers(TorchDispatchMode):
    """Rejects operations that read a CUDA tensor on the host, or mix both devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        kinds = {tensor.device.type for tensor in tensors}
        is_read = func is torch.ops.aten._local_scalar_dense.default and kinds == {"cuda"}
        if is_read or len(kinds) > 1:
            raise RuntimeError(f"{func} would wait for the device")
        return result


@contextlib.contextmanager
def no_synchronisation() -> Iterator[None]:
    """Raise an error if the host waits for a device."""
    if torch.version.cuda is None:
        with _NoTransfers():
            yield
        return
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_synchronisation_is_detected() -> None:
    number = torch.ones((), device="cuda")
    for wait in (number.item, number.cpu, lambda: float(number)):
        with pytest.raises(RuntimeError), no_synchronisation():
            wait()


@every_way_of_variants
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_no_synchronisation(setup: Setup, storage: str) -> None:
    there = {name: torch.tensor(number, device="cuda") for name, number in NUMBERS.items()}
    scaled = {name: there[name] for name in ("grad_scale", "found_inf")}
    for numbers, options in (
        ({}, {"capturable": True}),
        ({}, {"capturable": True, "lr": there["lr"]}),
        (scaled, {}),
        ({**scaled, "grad_multiplier": there["grad_multiplier"]}, {"lr": there["lr"]}),
    ):
        steps = make_run(setup, storage, **options)
        steps.numbers = numbers
        optimizer = steps.on("cuda")  # the first step creates the states
        before = contents(optimizer)
        with no_synchronisation():
            step_with(optimizer, **numbers)
        assert not torch.equal(contents(optimizer)[0], before[0])
        assert [counter.item() for counter in counters(optimizer)] == [4.0] * len(SHAPES)


@pytest.mark.parametrize("storage", ["float32", "bfloat16, masters"])
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_frob_normalize(storage: str) -> None:
    options = {"frob_normalize": True, "weight_decay": 0.0, "capturable": True}
    steps = make_run(_LAPROP, storage, **options)
    optimizer, other = steps.on("cuda"), steps.on("cpu")
    torch.testing.assert_close(on_cpu(optimizer), contents(other))
    before = contents(optimizer)
    found_inf = torch.ones((), device="cuda")
    with no_synchronisation():
        step_with(optimizer, found_inf=found_inf)
    assert_same(contents(optimizer), before)
    with no_synchronisation():
        optimizer.step()
    other.step()
    torch.testing.assert_close(on_cpu(optimizer), contents(other))
    # Nor is a parameter that does not change overwritten by its master.
    (group,) = optimizer.param_groups
    group["lr"] = torch.zeros((), device="cuda")
    with torch.no_grad():
        group["params"][0].fill_(7.0)
    with no_synchronisation():
        optimizer.step()
    assert (group["params"][0] == 7.0).all()


@pytest.mark.real
@every_optimizer
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_grad_scaler_end_to_end(setup: Setup) -> None:
    params, others = (
        [Parameter(p.detach().to(device)) for p in make_params()] for device in ("cuda", "cpu")
    )
    optimizer, other = setup.make(params, fused=True), setup.make(others, fused=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=256.0, growth_interval=100)
    for step in range(1, 6):
        grads = make_grads(others, step)
        optimizer.zero_grad()
        terms = [(p * g.cuda()).sum() for p, g in zip(params, grads, strict=True)]
        scaler.scale(torch.stack(terms).sum()).backward()
        if step == 3:
            assert params[0].grad is not None
            params[0].grad.view(-1)[1] = torch.inf
        before = contents(optimizer)
        # The first step creates the states, and the scaler's copies on devices.
        with contextlib.nullcontext() if step == 1 else no_synchronisation():
            scaler.step(optimizer)
            scaler.update()
        if step == 3:
            assert_same(contents(optimizer), before)
            assert scaler.get_scale() == 128.0
        else:
            run(other, others, [step])
    assert_same_as_on_cpu(optimizer, other)


# ---- graphs and launches -------------------------------------------------------------------------


@pytest.mark.real
@every_way_of_variants
def test_captured_graph(setup: Setup, storage: str) -> None:
    """A replay is the next step, with the current gradients and learning rate."""
    optimizers = [
        make_run(setup, storage, lr=torch.tensor(0.02, device="cuda")).on("cuda", capturable=True)
        for _ in range(2)
    ]
    eager, graphed = optimizers

    def step_with_seed(optimizer: ScalarOptimizer) -> None:
        torch.manual_seed(1)  # a graph keeps the seed drawn at capture
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step_with_seed(graphed)
    torch.cuda.current_stream().wait_stream(side)
    step_with_seed(eager)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step_with_seed(graphed)
    for step in range(5, 9):
        for optimizer in optimizers:
            (group,) = optimizer.param_groups
            group["lr"].mul_(0.9)
            for param, grad in zip(group["params"], make_grads(group["params"], step), strict=True):
                param.grad.copy_(grad)
        step_with_seed(eager)
        graph.replay()
        assert_same(contents(graphed), contents(eager), f"step {step}")


@pytest.mark.real
@every_optimizer
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_capture_without_capturable(setup: Setup) -> None:
    optimizer = Run(setup).on("cuda")
    before = contents(optimizer)
    message = r"set capturable=True \(param_groups\[0\] has False\)"
    with pytest.raises(RuntimeError, match=message), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
    assert_same(contents(optimizer), before)


@pytest.mark.real
@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
@every_optimizer
@pytest.mark.parametrize(("count", "sweeps", "advances"), [(350, 1, 1), (1000, 3, 2)])
def test_launches(setup: Setup, count: int, sweeps: int, advances: int) -> None:
    """Many parameters share a launch, and so do their counters."""
    with torch.device("cuda"):
        params = make_params([(10, 100)] * count)
        set_grads(params, 1)
    optimizer = setup.make(params, capturable=True, fused=True)
    names = kernels(optimizer.step)
    found = [sum(f"::{kind}" in name for name in names) for kind in ("sweep", "advance")]
    assert len(names) == sum(found)
    assert found[0] <= sweeps
    assert found[1] == advances
