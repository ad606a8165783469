"""Scalar states of rules in Python on CUDA devices, which a kernel of their own advances there.

As in test_cuda_user_rules.py, the C++ compiler builds the kernels for emulated devices.
"""

# ruff: noqa: F811  (arguments are fixtures)

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from interpreting import in_the_fallback, interpreted
from support import assert_equal_bits
from test_cuda_graphs import capture
from test_cuda_user_rules import (  # noqa: F401
    APPLY,
    SMALL,
    _only_gpus,
    assert_same,
    at_once,
    fresh,
    make,
    nothing_cached,
    only_kernels,
    tasks,
    to,
)
from torch import Tensor
from torch.nn import Parameter

import emerging_optimizers as eo
from emerging_optimizers._user_rules import UserRule
from emerging_optimizers._user_rules.cuda_kernels import ADVANCE, KERNELS, Kernel
from emerging_optimizers._user_rules.runtime_kernels import RuntimeKernels

pytestmark = [
    pytest.mark.builtin_rules("these are users' rules"),
    pytest.mark.on_devices("tests-cuda"),
    pytest.mark.cuda,
]

SIZES = (3, 0, 130, 5000)
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
Then = Callable[[], None]


@eo.rule
def scheduled_adam(
    grad: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    *,
    betas: tuple[eo.Beta, eo.Beta] = (0.9, 0.999),  # type: ignore[assignment]
    mu_product: eo.ScalarState = 1.0,  # type: ignore[assignment]
    step: int,
) -> Any:
    """NAdam, with a schedule without powers: their bits may differ between a GPU and the host."""
    mu = betas[0] * (1 - 0.5 / (1 + 0.004 * step))
    next_mu = betas[0] * (1 - 0.5 / (1 + 0.004 * (step + 1)))
    mu_product = mu_product * mu
    exp_avg = betas[0] * exp_avg + (1 - betas[0]) * grad
    exp_avg_sq = betas[1] * exp_avg_sq + (1 - betas[1]) * grad * grad
    ahead = exp_avg * (next_mu / (1 - mu_product * next_mu))
    now = grad * ((1 - mu) / (1 - mu_product))
    return (ahead + now) / (exp_avg_sq.sqrt() + 1e-8), exp_avg, exp_avg_sq, mu_product


@eo.rule
def four_numbers(
    grad: Any,
    *,
    rate: float = 0.25,
    total: eo.ScalarState = 0.0,  # type: ignore[assignment]
    product: eo.ScalarState = 1.0,  # type: ignore[assignment]
    last: eo.ScalarState = -1.0,  # type: ignore[assignment]
    average: eo.ScalarState = 0.5,  # type: ignore[assignment]
) -> Any:
    """Without states and steps; with two cases, and as many scalar states as there may be."""
    total = total + 1
    product = product * rate if total < 3 else product + rate
    average = average + rate * (last - average)
    return grad * (total + product - average), total, product, last * 0.75, average


RULES = {"one": scheduled_adam, "four": four_numbers}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))


def new_scalars(rule: UserRule, device: str) -> dict[str, Tensor]:
    return {name: torch.tensor(first, device=device) for name, first in rule.scalar_states.items()}


def step_of(rule: UserRule, count: Any) -> dict[str, Any]:
    return {"step": count} if "step" in rule.hyperparameter_names else {}


def new_states(rule: UserRule, dtype: torch.dtype, device: str) -> list[list[Tensor]]:
    return [[torch.zeros(n, dtype=dtype, device=device) for n in SIZES] for _ in rule.states]


# ---- calls ---------------------------------------------------------------------------------------


@every_rule
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("place", ["cpu", "cuda"])
@pytest.mark.usefixtures("at_once")
def test_calls(rule: UserRule, dtype: torch.dtype, place: str, only_kernels: Then) -> None:
    """The CPU's bits, with scalar states on the host or on the device."""
    twin = fresh(rule)
    twin(
        [torch.zeros(2, dtype=dtype, device="cuda")],
        *([torch.zeros(2, dtype=dtype, device="cuda")] for _ in rule.states),
        **step_of(rule, 1),
        **new_scalars(rule, place),
    )
    only_kernels()
    here, there = new_states(rule, dtype, "cpu"), new_states(rule, dtype, "cuda")
    scalars, moved = new_scalars(rule, "cpu"), new_scalars(rule, place)
    for count in range(1, 7):
        grads = make(SIZES, dtype, count)
        step = step_of(rule, count)
        wanted = interpreted(rule)(grads, *here, **step, **scalars)
        assert_same(twin(to(grads, "cuda"), *there, **step, **moved), wanted, "update")
        for states, expected in zip(there, here, strict=True):
            assert_same(states, expected, "state")
        for name, scalar in moved.items():
            assert scalar.device.type == place
            assert_equal_bits(scalar.cpu(), scalars[name], name)


@pytest.mark.usefixtures("at_once")
def test_a_call_with_its_step_on_the_device(only_kernels: Then) -> None:
    twin = fresh(scheduled_adam)
    step = torch.ones((), dtype=torch.int64, device="cuda")
    here, there = new_states(twin, F32, "cpu"), new_states(twin, F32, "cuda")
    scalars, moved = new_scalars(twin, "cpu"), new_scalars(twin, "cuda")
    for count in range(1, 5):
        grads = make(SIZES, F32, count)
        wanted = interpreted(scheduled_adam)(grads, *here, step=count, **scalars)
        got = twin(to(grads, "cuda"), *there, step=step.fill_(count), **moved)
        if count == 1:
            torch.testing.assert_close([t.cpu() for t in got], wanted, rtol=1e-6, atol=0.0)
            here = [to(states, "cpu") for states in there]
            only_kernels()
        else:
            assert_same(got, wanted, "update")
        assert_equal_bits(moved["mu_product"].cpu(), scalars["mu_product"], "mu_product")


@pytest.mark.usefixtures("at_once")
def test_a_call_on_the_last_device(only_kernels: Then) -> None:
    """Large launches, and one that advances."""
    device = f"cuda:{torch.cuda.device_count() - 1}"
    sizes = [1 + i % 40 for i in range(700)]
    twin = fresh(four_numbers)
    grads = make(sizes, F32, 0)
    twin(to(grads, device), **new_scalars(twin, device))
    only_kernels()
    scalars, moved = new_scalars(twin, "cpu"), new_scalars(twin, device)
    for _ in range(3):
        wanted = interpreted(four_numbers)(grads, **scalars)
        assert_same(twin(to(grads, device), **moved), wanted, "update")
    for name, scalar in moved.items():
        assert str(scalar.device) == device
        assert_equal_bits(scalar.cpu(), scalars[name], name)


def refused(message: str, call: Callable[..., Any], *tensors: Tensor, **scalars: Any) -> None:
    """Check that a call raises, and changes nothing, natively and in the formula."""
    before = [t.clone() for t in (*tensors, *scalars.values()) if isinstance(t, Tensor)]
    with pytest.raises(ValueError, match=message):
        call(*tensors, **scalars)
    after = [t for t in (*tensors, *scalars.values()) if isinstance(t, Tensor)]
    for now, then in zip(after, before, strict=True):
        assert now.tolist() == then.tolist()


@pytest.mark.parametrize("way", [lambda rule: rule, in_the_fallback], ids=["native", "formula"])
def test_devices_that_do_not_match(way: Callable[[UserRule], Callable[..., Any]]) -> None:
    one, four = way(fresh(scheduled_adam)), way(fresh(four_numbers))
    tensors = [torch.ones(2, device="cuda:0") for _ in range(3)]
    here, there = torch.ones(()), torch.ones((), device="cuda:0")
    on_host = [torch.ones(2) for _ in range(3)]
    refused("mu_product is on cuda:0 but grad is on cpu", one, *on_host, step=1, mu_product=there)
    message = "mu_product is on cpu but step is on cuda:0; move it there, since its new value may"
    refused(message, one, *tensors, step=there.long(), mu_product=here)
    mixed = {"total": here, "product": there, "last": here.clone(), "average": here.clone()}
    refused("product is on cuda:0 but total is on cpu", four, tensors[0], **mixed)
    shared = {**mixed, "product": here}
    refused("total shares memory with another tensor of the call", four, tensors[0], **shared)
    element = dict.fromkeys(mixed, tensors[0][0])
    element.update((name, there.clone()) for name in ("total", "product", "last"))
    refused("average shares memory with another", four, tensors[0], **element)
    if torch.cuda.device_count() > 1:
        other = torch.ones((), device="cuda:1")
        message = "mu_product is on cuda:1 but grad is on cuda:0"
        refused(message, one, *tensors, step=1, mu_product=other)


# ---- steps ---------------------------------------------------------------------------------------


def optimizer_class(rule: UserRule) -> type[eo.ScalarOptimizer]:
    class Twin(eo.ScalarOptimizer, rule=rule, lr=0.01):  # type: ignore[call-arg]
        pass

    return Twin


def contents(optimizer: eo.ScalarOptimizer) -> list[Tensor]:
    """Return the parameters and their states, on the CPU."""
    found = []
    for param in optimizer.param_groups[0]["params"]:
        state = optimizer.state[param]
        names = (*optimizer._state_names, *optimizer._all_scalar_names, "step")
        found += [param.detach(), *(state[name] for name in names if name in state)]
    return [tensor.cpu() for tensor in found]


class Run:
    """Steps of an optimizer on a device.

    Args:
        rule: The optimizer's rule.
        device: The parameters' device; "alternating": those of the first and the last one.
        sizes: The parameters' sizes.
        dtype: Their dtype.
        **options: The optimizer's arguments.
    """

    def __init__(
        self,
        rule: UserRule,
        device: str,
        sizes: Sequence[int] = SIZES,
        dtype: torch.dtype = F32,
        **options: Any,
    ) -> None:
        devices = [device]
        if device == "alternating":
            devices = ["cuda:0", f"cuda:{torch.cuda.device_count() - 1}"]
        values = make(sizes, dtype, 0)
        self.sizes, self.dtype = sizes, dtype
        self.params = [
            Parameter(value.to(devices[i % len(devices)], copy=True))
            for i, value in enumerate(values)
        ]
        self.optimizer = optimizer_class(rule)(self.params, weight_decay=0.1, **options)

    def step(self, count: int, without: int = 0, found_inf: float | None = None) -> None:
        """Take a step in which the last `without` parameters have no gradient."""
        grads = make(self.sizes, self.dtype, count)
        for i, (param, grad) in enumerate(zip(self.params, grads, strict=True)):
            has_grad = i < len(grads) - without
            param.grad = grad.to(param.device) if has_grad else None
        if found_inf is not None:
            # As a GradScaler does.
            device = self.params[0].device
            self.optimizer.found_inf = torch.tensor(found_inf, device=device)
        self.optimizer.step()
        if found_inf is not None:
            del self.optimizer.found_inf


def assert_equal_runs(run: Run, reference: Run) -> None:
    got, wanted = contents(run.optimizer), contents(reference.optimizer)
    for i, (one, other) in enumerate(zip(got, wanted, strict=True)):
        assert_equal_bits(one, other, f"tensor {i}")


def assert_placed(run: Run, is_on_device: bool) -> None:
    for param in run.params:
        state = run.optimizer.state[param]
        for name in ("step", *run.optimizer._all_scalar_names):
            if name in state:
                assert state[name].device == (param.device if is_on_device else torch.device("cpu"))


@every_rule
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (F32, {}),
        (F64, {}),
        (BF16, {"stochastic_rounding": True}),
        (F32, {"capturable": True}),
        (F64, {"capturable": True}),
        (BF16, {"capturable": True, "master_weights": True}),
    ],
    ids=["plain", "float64", "stochastic", "capturable", "capturable float64", "masters"],
)
@pytest.mark.usefixtures("at_once")
def test_steps(
    rule: UserRule,
    dtype: torch.dtype,
    options: Mapping[str, Any],
    only_kernels: Then,
) -> None:
    run = Run(fresh(rule), "cuda", dtype=dtype, **options)
    reference = Run(interpreted(rule), "cpu", dtype=dtype, **options)
    Run(run.optimizer._rule, "cuda", dtype=dtype, **options).step(1)
    only_kernels()
    for each in (run, reference):
        torch.manual_seed(0)  # for stochastic rounding
        for count in range(1, 7):
            each.step(count)
    assert_equal_runs(run, reference)
    assert_placed(run, "capturable" in options)


@every_rule
@pytest.mark.usefixtures("at_once")
def test_found_inf(rule: UserRule, only_kernels: Then) -> None:
    """In a skipped step, neither the counters nor the scalar states move."""
    run, reference = Run(fresh(rule), "cuda"), Run(interpreted(rule), "cpu")
    run.optimizer._rule.compile("cuda")
    for count, found_inf in enumerate([0.0, 1.0, 0.0, 2.0, 0.0], start=1):
        if count == 2:
            only_kernels()
        before = contents(run.optimizer)
        run.step(count, found_inf=found_inf)
        if found_inf == 0.0:
            reference.step(count)
            assert_equal_runs(run, reference)
        else:
            for now, then in zip(contents(run.optimizer), before, strict=True):
                assert_equal_bits(now, then, "skipped")
    assert_placed(run, is_on_device=True)
    run.step(6)
    reference.step(6)
    assert_equal_runs(run, reference)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.usefixtures("at_once")
def test_many_parameters_that_join_late(capturable: bool, only_kernels: Then) -> None:
    """Each has its own numbers. More than one launch advances them (94 rows each)."""
    sizes = [1 + i % 7 for i in range(300)]
    options = {"sizes": sizes, "capturable": capturable}
    run = Run(fresh(scheduled_adam), "cuda", **options)  # type: ignore[arg-type]
    reference = Run(interpreted(scheduled_adam), "cpu", **options)  # type: ignore[arg-type]
    run.optimizer._rule.compile("cuda")
    only_kernels()
    for count, without in enumerate([200, 100, 0, 150, 0], start=1):
        run.step(count, without)
        reference.step(count, without)
    assert_equal_runs(run, reference)
    numbers = {float(run.optimizer.state[param]["mu_product"]) for param in run.params}
    assert len(numbers) == 4


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.usefixtures("at_once")
def test_two_devices(capturable: bool, only_kernels: Then) -> None:
    run = Run(fresh(scheduled_adam), "alternating", capturable=capturable)
    reference = Run(interpreted(scheduled_adam), "cpu", capturable=capturable)
    for device in {param.device for param in run.params}:
        run.optimizer._rule.compile(device)
    only_kernels()
    for count in range(1, 5):
        run.step(count, without=count % 2)
        reference.step(count, without=count % 2)
    assert_equal_runs(run, reference)
    assert_placed(run, capturable)


@pytest.mark.usefixtures("at_once")
def test_parameters_on_the_host_and_on_a_device(only_kernels: Then) -> None:
    rule = fresh(scheduled_adam)
    rule.compile("cuda")
    reference = Run(interpreted(scheduled_adam), "cpu")
    run = Run(rule, "cuda", capturable=True)
    with torch.no_grad():
        for param in run.params[::2]:
            param.data = param.data.cpu()
    only_kernels()
    for count in range(1, 4):
        run.step(count)
        reference.step(count)
    assert_equal_runs(run, reference)
    assert_placed(run, is_on_device=True)


@pytest.mark.usefixtures("at_once")
def test_a_checkpoint_moves_them(only_kernels: Then) -> None:
    """To where the steps are counted."""
    rule = fresh(scheduled_adam)
    rule.compile("cuda")
    only_kernels()
    reference = Run(interpreted(scheduled_adam), "cpu")
    run = Run(rule, "cuda")
    for count in (1, 2):
        run.step(count)
        reference.step(count)
    for capturable in (True, False):
        resumed = Run(rule, "cuda", capturable=capturable)
        saved = run.optimizer.state_dict()
        saved["param_groups"][0]["capturable"] = capturable
        resumed.optimizer.load_state_dict(saved)
        with torch.no_grad():
            for one, other in zip(resumed.params, run.params, strict=True):
                one.copy_(other)
        run = resumed
        for count in (3, 4):
            run.step(count)
            reference.step(count)
        assert_equal_runs(run, reference)
        if capturable:
            assert_placed(run, is_on_device=True)


# ---- kernels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.usefixtures("nothing_cached")
def test_values_continue_when_kernels_take_over(
    capturable: bool,
    tasks: list[Callable[[], None]],
    only_kernels: Then,
) -> None:
    run = Run(fresh(scheduled_adam), "cuda", capturable=capturable)
    reference = Run(interpreted(scheduled_adam), "cpu", capturable=capturable)
    for count in range(1, 7):
        if count == 4:
            for task in tasks:
                task()
            only_kernels()
        run.step(count)
        reference.step(count)
        for param, other in zip(run.params, reference.params, strict=True):
            state, wanted = run.optimizer.state[param], reference.optimizer.state[other]
            for name in ("step", "mu_product"):
                assert_equal_bits(state[name].cpu(), wanted[name], name)
            torch.testing.assert_close(param.cpu(), other, rtol=1e-5, atol=1e-6)
    assert_placed(run, capturable)


@pytest.mark.usefixtures("nothing_cached")
def test_a_call_continues_when_kernels_take_over(
    tasks: list[Callable[[], None]],
    only_kernels: Then,
) -> None:
    twin = fresh(four_numbers)
    grad = torch.tensor([1.0, -2.0])
    scalars, moved = new_scalars(twin, "cpu"), new_scalars(twin, "cuda")
    for count in range(5):
        if count == 2:
            for task in tasks:
                task()
            only_kernels()
        wanted = interpreted(four_numbers)(grad, **scalars)
        got = twin(grad.to("cuda"), **moved)
        torch.testing.assert_close(got.cpu(), wanted, rtol=1e-6, atol=0.0)
        for name, scalar in moved.items():
            assert_equal_bits(scalar.cpu(), scalars[name], name)


def test_compile_builds_all(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = fresh(scheduled_adam)
    built: list[Kernel] = []
    monkeypatch.setattr(RuntimeKernels, "_build", lambda _, device, kernel: built.append(kernel))
    rule.compile("cuda")
    assert len(built) == 13
    assert set(built) == {*KERNELS, ADVANCE}


SETUP = APPLY._replace(needs_setup=True)


@pytest.mark.parametrize(
    ("capturable", "has", "wanted"),
    [
        (False, [], [APPLY, APPLY._replace(is_large=True)]),
        (True, [], [ADVANCE, SETUP, SETUP._replace(is_large=True)]),
        (True, [SETUP], [ADVANCE]),
        (True, [ADVANCE], [SETUP, SETUP._replace(is_large=True)]),
    ],
    ids=["on the host", "on the device", "the other one is there", "this one is there"],
)
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.usefixtures("nothing_cached")
def test_steps_build_what_is_missing(
    capturable: bool,
    has: Sequence[Kernel],
    wanted: Sequence[Kernel],
    fused: bool | None,
    monkeypatch: pytest.MonkeyPatch,
    tasks: list[Callable[[], None]],
    only_kernels: Then,
) -> None:
    run = Run(fresh(scheduled_adam), "cuda", capturable=capturable, fused=fused)
    reference = Run(interpreted(scheduled_adam), "cpu", capturable=capturable)
    kernels = run.optimizer._rule._code.kernels
    for kernel in has:
        kernels._build(0, kernel)
    build, built = RuntimeKernels._build, []

    def record(self: RuntimeKernels, device: int, kernel: Kernel) -> None:
        built.append(kernel)
        build(self, device, kernel)

    monkeypatch.setattr(RuntimeKernels, "_build", record)
    if fused:
        only_kernels()
    run.step(1)
    reference.step(1)
    assert not (fused and tasks)
    for task in tasks:
        task()
    assert sorted(built) == sorted(wanted)
    only_kernels()
    run.step(2)
    reference.step(2)
    got, expected = contents(run.optimizer), contents(reference.optimizer)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("place", "wanted"),
    [
        ("cpu", [SMALL, SMALL._replace(is_large=True)]),
        (
            "cuda",
            [
                ADVANCE,
                SMALL._replace(needs_setup=True),
                SMALL._replace(needs_setup=True, is_large=True),
            ],
        ),
    ],
)
@pytest.mark.usefixtures("nothing_cached")
def test_calls_build_what_is_missing(
    place: str,
    wanted: Sequence[Kernel],
    monkeypatch: pytest.MonkeyPatch,
    tasks: list[Callable[[], None]],
) -> None:
    twin = fresh(four_numbers)
    built: list[Kernel] = []
    monkeypatch.setattr(RuntimeKernels, "_build", lambda _, device, kernel: built.append(kernel))
    twin(torch.ones(2, device="cuda"), **new_scalars(twin, place))
    for task in tasks:
        task()
    assert sorted(built) == sorted(wanted)


def test_symbols() -> None:
    assert ADVANCE.symbol("four_numbers") == "emopt_four_numbers_Advance"


# ---- graphs --------------------------------------------------------------------------------------


@pytest.mark.real
def test_captured_steps(only_kernels: Then) -> None:
    """Each replay advances the counters and the scalar states."""
    rule = fresh(scheduled_adam)
    rule.compile("cuda")
    only_kernels()
    sizes = [1 + i % 40 for i in range(300)]
    runs = [Run(rule, "cuda", sizes, capturable=True) for _ in range(2)]
    for run in runs:
        run.step(1)
    replayed, eager = runs
    graph = capture(replayed.optimizer.step)
    for _ in range(4):
        graph.replay()
        eager.optimizer.step()
    assert_equal_runs(replayed, eager)
    assert_equal_bits(contents(replayed.optimizer)[-1], torch.tensor(5.0), "step")


@pytest.mark.real
def test_captured_calls(only_kernels: Then) -> None:
    twin = fresh(four_numbers)
    twin.compile("cuda")
    only_kernels()
    grads = to(make(SIZES, F32, 0), "cuda")
    updates = [torch.empty_like(grad) for grad in grads]
    scalars, eager = new_scalars(twin, "cuda"), new_scalars(twin, "cuda")
    graph = capture(lambda: twin(grads, **scalars, out=updates))
    for _ in range(4):
        graph.replay()
        wanted = twin(grads, **eager)
        for got, expected in zip(updates, wanted, strict=True):
            assert_equal_bits(got.cpu(), expected.cpu(), "update")
        for name, scalar in scalars.items():
            assert_equal_bits(scalar.cpu(), eager[name].cpu(), name)
