"""Calls of `step`: with closures, hooks, schedulers, the profiler and torch.compile."""

from typing import Any

import pytest
import torch
from optimizers import (
    Setup,
    assert_same,
    contents,
    every_optimizer,
    make_params,
    one_cycle,
    run,
    set_grads,
)
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from emerging_optimizers import Adam

pytestmark = pytest.mark.on_devices("tests-optimizers")


@pytest.mark.real
@every_optimizer
def test_closure(setup: Setup, fused: bool | None) -> None:
    params = make_params()
    optimizer = setup.make(params, fused=fused)

    def closure() -> float:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = torch.stack([p.square().sum() for p in params]).sum()
        loss.backward()
        return loss.item()

    with torch.no_grad():
        first = optimizer.step(closure)
        assert optimizer.step(closure=closure) < first
    assert optimizer.step() is None
    assert optimizer.step(closure=None) is None


@every_optimizer
def test_lr_schedulers(setup: Setup, fused: bool | None) -> None:
    params = make_params()
    optimizer = setup.make(params, lr=torch.tensor(0.1), fused=fused)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    cycle = one_cycle(setup.make(make_params()), 0.1, total_steps=5)
    for step in (1, 2):
        run(optimizer, params, [step])
        scheduler.step()
        run(cycle.optimizer, cycle.optimizer.param_groups[0]["params"], [step])
        cycle.step()
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.025)


@every_optimizer
def test_hooks_and_named_parameters(setup: Setup, fused: bool | None) -> None:
    params = make_params()
    optimizer = setup.make([("a", params[0]), ("b", params[1])], fused=fused)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    run(optimizer, params, [1])
    assert calls == ["before", "after"]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["a", "b"]
    assert repr(optimizer).startswith(f"{setup.cls.__name__} (\nParameter Group 0\n")


def test_hooks_see_the_arguments_and_may_replace_them() -> None:
    params = make_params()
    optimizer = Adam(params)
    seen: list[Any] = []
    optimizer.register_step_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)))
    run(optimizer, params, [1])
    optimizer.step(grad_multiplier=0.5)
    optimizer.step(lambda: 2.5)
    ((first, one), (_, two), (last, three)) = seen
    assert first == (optimizer,)
    assert last[1]() == 2.5
    assert (one, two, three) == ({}, {"grad_multiplier": 0.5}, {})
    optimizer.register_step_pre_hook(lambda opt, *_: ((opt, lambda: 7.5), {}))
    assert optimizer.step() == 7.5


@every_optimizer
@pytest.mark.filterwarnings("ignore:.*Profiler clears events")  # before torch 2.13
def test_profiler_sees_the_step(setup: Setup, fused: bool | None) -> None:
    params = make_params()
    optimizer = setup.make(params, fused=fused)
    with torch.profiler.profile() as profile:
        run(optimizer, params, [1])
    name = f"Optimizer.step#{setup.cls.__name__}.step"
    assert name in {event.key for event in profile.key_averages()}


class Noting(Adam):
    """Records the argument of each step."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        # A list: before torch 2.12, compiled code cannot set attributes of an optimizer.
        self.noted: list[str] = []

    def step(self, what: str) -> None:  # type: ignore[override]
        self.noted.append(what)
        super().step()


def test_hooks_of_a_subclass_run_once() -> None:
    params = make_params()
    calls: list[str] = []
    handle = register_optimizer_step_pre_hook(lambda *_: calls.append("for all"))
    try:
        for cls in (Adam, Noting):
            calls.clear()
            optimizer = cls(params)
            optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
            optimizer.register_step_post_hook(lambda *_: calls.append("after"))
            set_grads(params, 1)
            optimizer.step(*(["training"] if cls is Noting else []))
            assert calls == ["for all", "before", "after"]
    finally:
        handle.remove()
    assert isinstance(optimizer, Noting)
    assert optimizer.noted == ["training"]


@pytest.mark.real
@every_optimizer
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_training_step(setup: Setup, fused: bool | None) -> None:
    def train(compiled: bool) -> list[Tensor]:
        params = make_params()
        optimizer = setup.make(params, fused=fused)

        def step(x: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = (x @ params[0]).square().sum() + params[1].square().sum()
            loss.backward()
            optimizer.step()
            return loss.detach()

        function = torch.compile(step, backend="eager") if compiled else step
        for _ in range(3):
            function(torch.ones(2, 3))
        return contents(optimizer)

    assert_same(train(True), train(False))


@pytest.mark.real  # compiling reads the state of the device's random generator
def test_a_compiled_step_of_a_subclass_runs_once() -> None:
    params = make_params()
    optimizer = Noting(params)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))

    @torch.compile(backend="eager")
    def train() -> None:
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step("training")

    train()
    assert (optimizer.noted, calls) == (["training"], ["before"])
    assert all(optimizer.state[p]["step"] == 1 for p in params)


@pytest.mark.real
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf",
    "ignore::DeprecationWarning",  # of parts of torch that a reset imports if there is CUDA
)
def test_a_compiled_step_with_a_closure() -> None:
    torch._dynamo.reset()  # Dynamo stops compiling a function after too many classes
    params = make_params()
    optimizer = Adam(params)
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=backend)
    def train() -> float:
        def closure() -> float:
            return sum(param.square().sum() for param in params)  # type: ignore[return-value]

        return optimizer.step(closure)

    wanted = sum(float(param.detach().square().sum()) for param in params)
    loss: Any = train()
    assert loss.item() == pytest.approx(wanted)
    assert graphs  # with the closure


@pytest.mark.real
def test_a_step_while_something_else_is_compiled() -> None:
    params = make_params()
    optimizer = Adam(params)

    def backend(graph: Any, _: Any) -> Any:
        run(optimizer, params, [1])
        return graph.forward

    assert torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2)).sum() == 4
    assert all(optimizer.state[p]["step"] == 1 for p in params)
