"""Which steps are native, and what they cost."""

from typing import Any

import pytest
import torch
from optimizers import Setup, assert_same, every_optimizer, make_params, run
from torch.nn import Parameter

from emerging_optimizers import Adam, _fallback_step, _step
from emerging_optimizers._native import native

pytestmark = pytest.mark.on_devices("tests-optimizers")


@pytest.fixture
def native_results(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What each native call returns: None, or the parameters that it leaves."""
    if native is None:
        pytest.skip("no native kernels")
    results = []
    step = native.step

    def recorded(*arguments: Any) -> Any:
        results.append(step(*arguments))
        return results[-1]

    monkeypatch.setattr(native, "step", recorded)
    return results


@pytest.mark.real
def test_a_fallback_parameter_costs_one_more_native_call(native_results: list[Any]) -> None:
    params = make_params([(3, 4)] * 3)
    params[1] = Parameter(torch.ones(3, 8)[:, ::2])
    optimizer = Adam(params)
    run(optimizer, params, [1])
    native_results.clear()
    run(optimizer, params, [2])
    assert native_results == [[[1]], [[1]]]
    assert all(optimizer.state[p]["step"] == 2 for p in params)


@every_optimizer
def test_the_first_step_is_one_native_call(setup: Setup, native_results: list[Any]) -> None:
    params = make_params()
    optimizer = setup.make(params)
    run(optimizer, params, [1])
    assert native_results == [None]
    assert all(optimizer.state[p]["step"] == 1 for p in params)


@pytest.mark.skipif(native is None, reason="there are no native kernels")
@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_native_step_is_taken(
    setup: Setup, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(_fallback_step, "update_group")
    params = make_params(dtype=dtype)
    master_weights = dtype == torch.bfloat16
    optimizer = setup.make(params, lr=0.1, fused=True, master_weights=master_weights)
    versions = [param._version for param in params]
    before = [param.detach().clone() for param in params]
    run(optimizer, params, [1, 2])
    for param, version, old in zip(params, versions, before, strict=True):
        state = optimizer.state[param]
        assert state["step"] == 2
        assert param._version > version
        assert all(state[name]._version > 0 for name in (*setup.states, "step"))
        assert not torch.equal(param, old)
        if master_weights:
            assert torch.equal(param, state["master_param"].to(dtype))


@every_optimizer
@pytest.mark.parametrize("lies", ["contiguous", "transposed"])
def test_a_step_allocates_nothing(setup: Setup, lies: str) -> None:
    if native is None:
        pytest.skip("no native kernels")
    for dtype, options in (
        (torch.float32, {}),
        (torch.complex64, {}),
        (torch.bfloat16, {"master_weights": True}),
        (torch.float16, {"stochastic_rounding": True, "state_dtype": torch.float32}),
    ):
        (value,) = make_params([(64, 200)], dtype)
        param = Parameter(value.detach() if lies == "contiguous" else value.detach().t())
        optimizer = setup.make([param], weight_decay=0.1, fused=True, **options)
        param.grad = torch.ones_like(param)
        optimizer.step()
        with torch.autograd.profiler.profile(profile_memory=True) as profile:
            optimizer.step(grad_multiplier=0.5)
        events = profile.function_events
        allocated = sum(max(0, event.self_cpu_memory_usage) for event in events)
        assert allocated < 100, (dtype, allocated)  # a seed


@every_optimizer
def test_fused_without_a_native_step(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    message = f"fused=True, but {setup.cls.__name__} has no native"
    params = make_params()
    params[1] = torch.nn.Parameter(params[1].detach()[:, ::2])  # with gaps in its memory
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match=message):
        run(setup.make(params, fused=True), params, [1])
    assert_same([p.detach() for p in params], before)
    monkeypatch.setattr(_step, "native", None)
    with pytest.raises(RuntimeError, match=message):
        run(setup.make(params, fused=True), params, [1])
