"""Rules in Python on CUDA devices: their formulas run until kernels are built, then those do.

NVRTC builds the kernels. For emulated devices (``pytest --device emulated``), the C++ compiler
builds the same text (``tests/emulated_kernels.py``).
"""

import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreting import interpreted
from rule_references import GALLERY_RULES
from support import assert_equal_bits
from test_cuda_graphs import capture
from torch import Tensor
from torch.nn import Parameter

import emerging_optimizers as eo
from emerging_optimizers import _build_cache, _step
from emerging_optimizers._build_cache import BuildError
from emerging_optimizers._operators import USER_NAMESPACE
from emerging_optimizers._user_rules import UserRule, background, cuda_kernels, runtime_kernels
from emerging_optimizers._user_rules.cuda_kernels import KERNELS, WITH_CODES, Kernel
from emerging_optimizers._user_rules.native_code import NativeCode
from emerging_optimizers._user_rules.runtime_kernels import RuntimeKernels

pytestmark = [
    pytest.mark.builtin_rules("these are users' rules"),
    pytest.mark.on_devices("tests-cuda"),
    pytest.mark.cuda,
]

ADOPT = GALLERY_RULES["adopt"]
SMALL = Kernel("StoreUpdate", "float", is_large=False, needs_setup=False)
APPLY = Kernel("ApplyUpdate", "float", is_large=False, needs_setup=False)
# Less than a vector, nothing, some vectors, more than a tile.
SIZES = (3, 0, 130, 5000)


def fresh(rule: UserRule) -> UserRule:
    """Return a rule of the same function without kernels."""
    twin = eo.rule(rule.formula)
    twin._code = code = NativeCode(twin._program, twin.source, any(twin.codes))
    twin._bind(code.handle, code.eager, USER_NAMESPACE, code.stem)
    return twin


def make(sizes: Sequence[Any], dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, dtype=torch.float64, generator=generator).to(dtype) for size in sizes]


def to(tensors: Sequence[Tensor], device: str) -> list[Tensor]:
    return [tensor.to(device, copy=True) for tensor in tensors]


def assert_same(got: Sequence[Tensor], wanted: Sequence[Tensor], label: str) -> None:
    for i, (one, other) in enumerate(zip(got, wanted, strict=True)):
        assert one.is_cuda
        assert_equal_bits(one.cpu(), other, f"{label} {i}")


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """What would run in the background."""
    found: list[Callable[[], None]] = []
    monkeypatch.setattr(background, "run", found.append)
    return found


@pytest.fixture
def nothing_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are built, or would be, even if other tests have built them."""
    monkeypatch.setattr(cuda_kernels, "find_cubin", lambda *_: None)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are built where that would begin."""
    monkeypatch.setattr(background, "run", lambda task: task())


@pytest.fixture
def only_kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call of this function on, no formula runs."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the formula runs")

    return lambda: monkeypatch.setattr(UserRule, "compute_update", refuse)


@pytest.fixture(autouse=True)
def _only_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is compiled for the CPU, and no rule warns that its formula runs."""
    monkeypatch.setattr(NativeCode, "start_build", lambda code: None)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the rule .* runs its formula")
        yield


def call(rule: UserRule, device: str = "cuda") -> list[float]:
    grad = torch.tensor([1.0, -2.0], device=device)
    states = [torch.ones(2, device=device) for _ in rule.states]
    update = rule(grad, *states, step=2)
    return [*update.tolist(), *(x for state in states for x in state.tolist())]


# ---- the CPU's bits ------------------------------------------------------------------------------


def warm_up(rule: UserRule, *dtypes: torch.dtype, step: Any = 1, count: int = 1) -> None:
    """Let the kernels for these tensors be built."""
    grads, *lists = ([torch.zeros(2, dtype=d, device="cuda")] * count for d in dtypes)
    states = [[tensor.clone() for tensor in tensors] for tensors in lists]
    rule(grads, *states, step=step)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("name", ["adopt", "radam"])
@pytest.mark.parametrize(
    ("grad_dtype", "state_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
    ids=["float32", "bfloat16 grad"],
)
def test_bits_of_the_cpu(
    name: str, grad_dtype: torch.dtype, state_dtype: torch.dtype, only_kernels: Callable[[], None]
) -> None:
    rule = fresh(GALLERY_RULES[name].rule)
    warm_up(rule, grad_dtype, state_dtype, state_dtype)
    only_kernels()
    lists = [[torch.zeros(size, dtype=state_dtype) for size in SIZES] for _ in rule.states]
    there = [to(states, "cuda") for states in lists]
    for step in range(1, 8):
        grads = make(SIZES, grad_dtype, step)
        wanted = interpreted(GALLERY_RULES[name].rule)(grads, *lists, step=step)
        assert_same(rule(to(grads, "cuda"), *there, step=step), wanted, "update")
        for states, state_name, expected in zip(there, rule.states, lists, strict=True):
            assert_same(states, expected, state_name)


@pytest.mark.usefixtures("at_once")
def test_float64_and_strides(only_kernels: Callable[[], None]) -> None:
    rule = fresh(ADOPT.rule)
    warm_up(rule, *[torch.float64] * 3)
    only_kernels()
    grad = make([600], torch.float64, 0)[0].view(20, 30).t()[::2]
    here = [torch.zeros(15, 20, dtype=torch.float64) for _ in rule.states]
    there = to(here, "cuda")
    for step in (1, 2, 3):
        wanted = interpreted(ADOPT.rule)(grad, *here, step=step)
        assert_same([rule(grad.to("cuda"), *there, step=step)], [wanted], "update")
    assert_same(there, here, "state")


@pytest.mark.usefixtures("at_once")
def test_many_tensors_and_the_last_device(only_kernels: Callable[[], None]) -> None:
    """They take large launches, and the others of a call a small one."""
    device = f"cuda:{torch.cuda.device_count() - 1}"
    sizes = [1 + i % 40 for i in range(700)]
    rule = fresh(ADOPT.rule)
    here = [[torch.zeros(size) for size in sizes] for _ in rule.states]
    there = [to(states, device) for states in here]
    grads = make(sizes, torch.float32, 0)
    rule(to(grads, device), *([t.clone() for t in states] for states in there), step=2)
    only_kernels()
    for step in (1, 2):
        wanted = interpreted(ADOPT.rule)(grads, *here, step=step)
        assert_same(rule(to(grads, device), *there, step=step), wanted, "update")


@pytest.mark.usefixtures("at_once")
def test_step_on_the_device(only_kernels: Callable[[], None]) -> None:
    """Blocks compute the constants of a step, whose bits may differ from the host's on a GPU."""
    rule = fresh(ADOPT.rule)
    step = torch.ones((), dtype=torch.int64, device="cuda")
    warm_up(rule, *[torch.float32] * 3, step=step)
    only_kernels()
    here = [[torch.zeros(size) for size in SIZES] for _ in rule.states]
    there = [to(states, "cuda") for states in here]
    for count in range(1, 6):
        grads = make(SIZES, torch.float32, count)
        wanted = interpreted(ADOPT.rule)(grads, *here, step=count)
        updates = rule(to(grads, "cuda"), *there, step=step.fill_(count))
        for got, expected in zip(updates, wanted, strict=True):
            torch.testing.assert_close(got.cpu(), expected, rtol=1e-6, atol=0.0)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"master_weights": True},
        {"stochastic_rounding": True},
        {"capturable": True, "master_weights": True},
    ],
    ids=["plain", "masters", "stochastic", "capturable"],
)
def test_optimizer(options: dict[str, Any], only_kernels: Callable[[], None]) -> None:
    dtype = torch.bfloat16 if options else torch.float32

    class Twin(eo.ScalarOptimizer, rule=fresh(ADOPT.rule)):  # type: ignore[call-arg]
        pass

    def run(device: str, cls: type, then: Callable[[], None]) -> list[Tensor]:
        torch.manual_seed(0)
        params = [Parameter(value) for value in to(make(SIZES, dtype, 0), device)]
        optimizer = cls(params, lr=0.01, weight_decay=0.1, **options)
        for step in range(5):
            for param, grad in zip(params, make(SIZES, dtype, step), strict=True):
                param.grad = grad.to(device)
            optimizer.step()
            if step == 0:
                then()
        return [*params, *(optimizer.state[p][n] for n in ADOPT.states for p in params)]

    wanted = run("cpu", ADOPT.optimizer, lambda: None)
    assert_same([t.detach() for t in run("cuda", Twin, only_kernels)], wanted, "result")


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("name", ["adopt", "adan", "nadam"])
def test_8_bit_states(name: str, only_kernels: Callable[[], None]) -> None:
    """Some of Adan's states are wide; NAdam has a scalar state.

    There are more parameters than a small launch has room for.
    """
    rule = GALLERY_RULES[name].rule
    shapes = [(130, 64), (3, 4), *[(128, 32)] * 40]

    def run(device: str, rule: UserRule) -> list[Tensor]:
        class Trained(eo.ScalarOptimizer, rule=rule):  # type: ignore[call-arg]
            pass

        params = [Parameter(value) for value in to(make(shapes, torch.float32, 0), device)]
        optimizer = Trained(params, lr=0.01, weight_decay=0.1, state_dtype="8bit")
        for step in range(3):
            for param, grad in zip(params, make(shapes, torch.float32, step), strict=True):
                param.grad = grad.to(device)
            optimizer.step()
        states = [optimizer.state[param] for param in params]
        assert {s[rule.states[0]].dtype for s in states} == {torch.uint8, torch.float32}
        kept = [v.to(device) for s in states for key, v in s.items() if key != "step"]
        return [*(param.detach() for param in params), *kept]

    wanted = run("cpu", interpreted(rule))
    twin = fresh(rule)
    run("cuda", twin)
    only_kernels()
    assert_same(run("cuda", twin), wanted, "result")


@pytest.mark.usefixtures("at_once")
def test_through_the_dispatcher(only_kernels: Callable[[], None]) -> None:
    rule = fresh(ADOPT.rule)
    call(rule)
    only_kernels()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        assert call(rule) == call(rule, "cpu")
    assert any("adopt" in event.key for event in profile.key_averages())


@pytest.mark.real
def test_captured_steps(only_kernels: Callable[[], None]) -> None:
    rule = fresh(ADOPT.rule)
    rule.compile("cuda")
    only_kernels()

    class Captured(eo.ScalarOptimizer, rule=rule):  # type: ignore[call-arg]
        pass

    start, grads = (to(make(SIZES, torch.float32, seed), "cuda") for seed in (0, 1))
    runs = []
    for _ in range(2):
        params = [Parameter(value.clone()) for value in start]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        runs.append((params, Captured(params, lr=0.01, capturable=True)))
        runs[-1][1].step()
    (replayed, optimizer), (eager, other) = runs
    graph = capture(optimizer.step)
    for _ in range(3):
        graph.replay()
        other.step()
    for one, two in zip(replayed, eager, strict=True):
        assert_equal_bits(one.detach().cpu(), two.detach().cpu(), "parameter")


# ---- until kernels are there ---------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_cached")
def test_the_formula_runs_until_then(
    tasks: list[Callable[[], None]], only_kernels: Callable[[], None]
) -> None:
    rule = fresh(ADOPT.rule)
    wanted = call(rule, "cpu")
    for _ in range(3):
        assert call(rule) == pytest.approx(wanted, rel=1e-6)
    assert len(tasks) == 2  # small launches, then large ones
    for task in tasks:
        task()
    only_kernels()
    assert call(rule) == wanted


@pytest.mark.usefixtures("nothing_cached")
def test_a_call_that_lacks_one_of_its_kernels(tasks: list[Callable[[], None]]) -> None:
    """Nothing is updated twice, or by half of a call."""
    rule = fresh(ADOPT.rule)
    rule._code.kernels._build(0, SMALL)  # type: ignore[union-attr]
    calls = []
    for device in ("cpu", "cuda"):
        grads = [
            torch.tensor([1.0, -2.0], device=device),
            torch.tensor([3.0], dtype=torch.float64, device=device),
            torch.tensor([0.5]),
        ]
        states = [[torch.ones_like(grad) for grad in grads] for _ in rule.states]
        updates = rule(grads, *states, step=2)
        calls.append([t.cpu() for tensors in (updates, *states) for t in tensors])
    assert len(tasks) == 1  # the kernel for float64
    torch.testing.assert_close(*calls, rtol=1e-6, atol=0.0)


@pytest.mark.usefixtures("nothing_cached")
def test_a_step_that_lacks_one_of_its_kernels(tasks: list[Callable[[], None]]) -> None:
    class Partly(eo.ScalarOptimizer, rule=fresh(ADOPT.rule)):  # type: ignore[call-arg]
        pass

    Partly._rule._code.kernels._build(0, APPLY)
    runs = []
    for device in ("cpu", "cuda"):
        params = [
            Parameter(torch.ones(3, device=device)),
            Parameter(torch.ones(3, dtype=torch.float64, device=device)),
        ]
        optimizer = Partly(params, lr=0.5)
        for step in (1.0, 2.0):
            for param in params:
                param.grad = torch.full_like(param, step)
            optimizer.step()
        counts = [int(optimizer.state[param]["step"]) for param in params]
        assert counts == [2, 2]
        runs.append([param.detach().cpu() for param in params])
    assert len(tasks) == 1
    torch.testing.assert_close(*runs, rtol=1e-6, atol=0.0)


def test_cached_kernels_are_used_at_once(
    tasks: list[Callable[[], None]], only_kernels: Callable[[], None]
) -> None:
    kernels = fresh(ADOPT.rule)._code.kernels  # type: ignore[union-attr]
    for kernel in (SMALL, SMALL._replace(is_large=True)):
        kernels._build(0, kernel)
    rule = fresh(ADOPT.rule)
    only_kernels()
    assert call(rule) == call(rule, "cpu")
    assert not tasks


def test_fused_step_waits(
    tasks: list[Callable[[], None]], only_kernels: Callable[[], None]
) -> None:
    class Waiting(eo.ScalarOptimizer, rule=fresh(ADOPT.rule)):  # type: ignore[call-arg]
        pass

    param = Parameter(torch.ones(3, device="cuda"))
    param.grad = torch.ones_like(param)
    only_kernels()
    optimizer = Waiting([param], lr=0.5, fused=True)
    optimizer.step()
    optimizer.step()
    assert not tasks
    assert optimizer.state[param]["exp_avg_sq"].tolist() == [1.0] * 3


@pytest.mark.parametrize("fused", [None, True])
def test_captured_step_without_kernels(
    tasks: list[Callable[[], None]], monkeypatch: pytest.MonkeyPatch, fused: bool | None
) -> None:
    class Early(eo.ScalarOptimizer, rule=fresh(ADOPT.rule)):  # type: ignore[call-arg]
        pass

    param = Parameter(torch.ones(3, device="cuda"))
    param.grad = torch.ones_like(param)
    optimizer = Early([param], lr=0.5, capturable=True, fused=fused)
    monkeypatch.setattr(_step, "_is_cuda_in_use", lambda: True)
    monkeypatch.setattr(runtime_kernels, "_is_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"cannot capture the step of .*compile\('cuda:0'\)"):
        optimizer.step()
    assert not tasks
    assert int(optimizer.state[param]["step"]) == 0
    assert param.tolist() == [1.0] * 3


def test_compile_builds_all(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = fresh(ADOPT.rule)
    built: list[tuple[int, Kernel]] = []
    monkeypatch.setattr(
        RuntimeKernels, "_build", lambda self, device, kernel: built.append((device, kernel))
    )
    rule.compile("cuda")
    last = torch.cuda.device_count() - 1
    rule.compile(f"cuda:{last}")
    wanted = {(device, kernel) for device in (0, last) for kernel in [*KERNELS, *WITH_CODES]}
    assert set(built) == wanted
    with pytest.raises(RuntimeError, match="cannot be compiled: there are no kernels for xpu"):
        rule.compile("xpu")


@pytest.mark.usefixtures("nothing_cached")
def test_a_failure_is_told_once(
    tasks: list[Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Path:
        raise BuildError("no reason", "Try again")

    rule = fresh(ADOPT.rule)
    said: list[str] = []
    monkeypatch.setattr(_build_cache, "say", said.append)
    monkeypatch.setattr(cuda_kernels, "cubin_for", fail)
    wanted = call(rule)
    for task in tasks:
        task()
    message = "the rule adopt runs its formula where a kernel is missing: no reason. Try again"
    assert said == [message]  # small launches would take the place of large ones
    told = r"the rule adopt runs its formula .*, tensor by tensor: no reason\. Try again"
    with pytest.warns(RuntimeWarning, match=told):
        assert call(rule) == wanted
    assert call(rule) == wanted
    with pytest.raises(RuntimeError, match=r"adopt cannot be compiled: no reason\. Try again"):
        rule.compile("cuda")


def test_without_builds(tasks: list[Callable[[], None]], monkeypatch: pytest.MonkeyPatch) -> None:
    class Waiting(eo.ScalarOptimizer, rule=fresh(ADOPT.rule)):  # type: ignore[call-arg]
        pass

    rule = fresh(ADOPT.rule)
    param = Parameter(torch.ones(3, device="cuda"))
    param.grad = torch.ones_like(param)
    monkeypatch.setenv("EMERGING_OPTIMIZERS_JIT", "0")
    with pytest.warns(RuntimeWarning, match=r"tensor by tensor: EMERGING_OPTIMIZERS_JIT=0"):
        call(rule)
    call(rule)
    assert not tasks
    with pytest.raises(RuntimeError, match="cannot be compiled: EMERGING_OPTIMIZERS_JIT=0"):
        rule.compile("cuda")
    with pytest.raises(RuntimeError, match="cannot be compiled: EMERGING_OPTIMIZERS_JIT=0"):
        Waiting([param], lr=0.5, fused=True).step()


def test_the_cpu_is_built_when_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    monkeypatch.setattr(NativeCode, "start_build", lambda code: started.append("cpu"))
    monkeypatch.setattr(RuntimeKernels, "start", lambda kernels: False)
    namespace: dict[str, Any] = {"eo": eo}
    name = f"on_devices_{os.getpid()}"
    exec(f"@eo.rule\ndef {name}(grad, exp_avg):\n    return exp_avg.add_(grad)\n", namespace)
    rule = namespace[name]
    monkeypatch.setattr(RuntimeKernels, "_build", lambda *_: None)
    rule.compile("cuda")
    for device in ("cuda", "cuda", "cpu", "cuda", "cpu"):
        rule(torch.ones(2, device=device), torch.zeros(2, device=device))
        assert started == (["cpu"] if "cpu" in (device, *started) else [])


@pytest.mark.real
def test_time_of_a_build(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """NVRTC takes seconds, not minutes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
        start = time.perf_counter()
        fresh(ADOPT.rule)._code.kernels._build(0, APPLY)  # type: ignore[union-attr]
        seconds = time.perf_counter() - start
    assert "compiled the kernel emopt_adopt_ApplyUpdate_float_small" in capfd.readouterr().err
    assert seconds < 30
