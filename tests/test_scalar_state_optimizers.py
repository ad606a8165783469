"""Scalar states in optimizers: one beside each parameter's step counter."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interpreting import needs_compiler
from optimizers import assert_same, contents, make_params, run, set_grads
from scalar_rules import (
    Float64NAdam,
    ScalarAverages,
    ScalarNAdam,
    ScalarPhases,
    continue_alike,
    products,
    randn,
    scalar,
    trained,
)
from support import assert_near, needs_native
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import emerging_optimizers as eo
from emerging_optimizers._native import native

pytestmark = pytest.mark.usefixtures("_no_other_device")
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
every_class = pytest.mark.parametrize("cls", [ScalarNAdam, ScalarAverages, ScalarPhases])


# ---- steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_nadam(fused: bool | None, weight_decay: float) -> None:
    params, others = make_params(dtype=F64), make_params(dtype=F64)
    optimizer = ScalarNAdam(params, weight_decay=weight_decay, fused=fused)
    other = torch.optim.NAdam(others, weight_decay=weight_decay, decoupled_weight_decay=True)
    oracles = [Float64NAdam(tuple(param.shape)) for param in params]
    for step in range(1, 15):
        wanted = [param.detach().clone().numpy() for param in params]
        run(optimizer, params, [step])
        run(other, others, [step])
        for i, (param, oracle) in enumerate(zip(params, oracles, strict=True)):
            assert param.grad is not None
            lost = 2e-3 * weight_decay * wanted[i]
            assert_near(param, wanted[i] - lost - 2e-3 * oracle.update(param.grad), 1e-13)
            assert optimizer.state[param]["mu_product"].item() == oracle.mu_product
            # PyTorch multiplies in float32.
            torch.testing.assert_close(param, others[i], rtol=1e-6, atol=1e-9)
            product = other.state[others[i]]["mu_product"]
            torch.testing.assert_close(optimizer.state[param]["mu_product"], product)


@needs_native
@pytest.mark.parametrize("cls", [ScalarAverages, ScalarPhases])
@pytest.mark.parametrize("dtype", [F32, F64, BF16, torch.complex64], ids=str)
def test_bits_of_the_fallback(cls: Any, dtype: torch.dtype) -> None:
    options = {"dtype": dtype, "steps": 6}
    first, _ = trained(cls, fused=False, **options)
    for fused in (None, True):
        assert_same(contents(trained(cls, fused=fused, **options)[0]), contents(first), str(fused))


@needs_native
@pytest.mark.parametrize("option", ["master_weights", "stochastic_rounding"])
def test_bits_of_the_fallback_with_options(option: str) -> None:
    for cls in (ScalarNAdam, ScalarAverages):
        results = []
        for fused in (False, None):
            torch.manual_seed(0)
            results.append(trained(cls, fused=fused, dtype=BF16, steps=6, **{option: True})[0])
        assert_same(contents(results[1]), contents(results[0]))


@needs_native
def test_steps_are_native(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, params = trained()
    left = []
    step: Any = native.step  # type: ignore[union-attr]
    monkeypatch.setattr(native, "step", lambda *arguments: left.append(step(*arguments)))
    run(optimizer, params, [4, 5])
    assert left == [None, None]
    assert products(optimizer) == pytest.approx([0.018498] * 2, rel=1e-4)


def test_where_they_are(fused: bool | None) -> None:
    optimizer, params = trained(ScalarAverages, steps=1, fused=fused, dtype=BF16, state_dtype=BF16)
    state = optimizer.state[params[0]]
    assert list(state) == ["step", "exp_avg", "total", "scale", "previous"]
    assert {name: t.dtype for name, t in state.items()} == {
        **dict.fromkeys(state, F32),
        "exp_avg": BF16,
    }
    assert [state[name].item() for name in ("total", "scale", "previous")] == [1.0, 0.5, 0.0]
    before = [(tensor, tensor.data_ptr(), tensor._version) for tensor in state.values()]
    run(optimizer, params, [2])
    for name, (tensor, address, version) in zip(state, before, strict=True):
        assert state[name] is tensor
        assert tensor.data_ptr() == address
        assert tensor._version > version


def test_state_dtypes_by_name() -> None:
    with pytest.raises(ValueError, match="no state 'mu_product'; it has 'exp_avg', 'exp_avg_sq'"):
        ScalarNAdam(make_params(), state_dtype={"mu_product": BF16})


@pytest.mark.parametrize("keeps", ["its gradient", "no gradient"])
def test_parameters_that_join_late(keeps: str, fused: bool | None) -> None:
    """Each has its count and its product, whatever the others' are."""
    params = [nn.Parameter(randn(n, seed=n, dtype=F64)) for n in (3, 5, 3, 4, 2)]
    optimizer = ScalarNAdam(params, fused=fused)
    oracles = [Float64NAdam(tuple(param.shape)) for param in params]
    for step in range(1, 9):
        optimizer.zero_grad(set_to_none=True)
        wanted = []
        for i, (param, oracle) in enumerate(zip(params, oracles, strict=True)):
            wanted.append(param.detach().clone().numpy())
            if step > i and (i != 1 or step % 2):
                param.grad = randn(*param.shape, seed=10 * step + i, dtype=F64)
                wanted[i] = wanted[i] - 2e-3 * oracle.update(param.grad)
        optimizer.step()
        for param, value in zip(params, wanted, strict=True):
            assert_near(param, value, 1e-13)
    for param, oracle in zip(params, oracles, strict=True):
        state = optimizer.state[param]
        assert (state["step"].item(), state["mu_product"].item()) == (
            oracle.step,
            oracle.mu_product,
        )


def _set_copies_on_write(states: list[Any]) -> None:
    one = scalar(0.25)
    for state in states[::3]:
        state["scale"] = torch._lazy_clone(one)


def _set_views(states: list[Any]) -> None:
    numbers = torch.arange(2.0 * len(states)).view(-1, 2)
    for state, (scale, total) in zip(states, numbers, strict=True):
        state["scale"], state["total"] = scale[()], total[()]


def _set_one_tensor(states: list[Any]) -> None:
    one = scalar(0.25)
    for state in states[::3]:
        state["scale"] = state["previous"] = one


def _set_values(states: list[Any]) -> None:
    for i, state in enumerate(states):
        state["scale"].fill_(1 / (1 + i % 11))


@needs_native
@pytest.mark.parametrize("num_threads_used", [1, 3])
@pytest.mark.parametrize("change", [_set_values, _set_copies_on_write, _set_views, _set_one_tensor])
@pytest.mark.usefixtures("num_threads")
def test_many_parameters(num_threads_used: int, change: Callable[[list[Any]], None]) -> None:
    """Different counts and numbers among parameters that several threads walk over."""
    torch.set_num_threads(num_threads_used)
    results = []
    for fused in (False, None):
        params = [nn.Parameter(randn(1 + i % 7, seed=i)) for i in range(700)]
        optimizer = ScalarAverages(params, fused=fused)
        for step in range(1, 6):
            set_grads(params, step)
            for i, param in enumerate(params):
                if i % 5 >= step:
                    param.grad = None
            optimizer.step()
            if step == 3:
                change(list(optimizer.state.values()))
        assert len({state["scale"].item() for state in optimizer.state.values()}) > 4
        results.append(contents(optimizer))
    assert_same(*results)


def test_equal_products_at_different_steps(fused: bool | None) -> None:
    params = [nn.Parameter(torch.ones(2)) for _ in range(4)]
    optimizer = ScalarNAdam(params, fused=fused)
    run(optimizer, params, [1])
    values = [(1.0, 0.5), (1.0, 0.25), (7.0, 0.5), (1.0, 0.5)]
    for param, (count, product) in zip(params, values, strict=True):
        optimizer.state[param]["step"].fill_(count)
        optimizer.state[param]["mu_product"].fill_(product)
    run(optimizer, params, [2])
    oracle = Float64NAdam(())
    for param, (count, product) in zip(params, values, strict=True):
        wanted = np.float32(product * oracle.mu(int(count) + 1))
        assert optimizer.state[param]["mu_product"].item() == wanted


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.0, 1e-45])
def test_special_values(value: float, fused: bool | None) -> None:
    """A NaN is a key of no map, and -0.0 equals 0.0."""
    params = [nn.Parameter(torch.ones(2)) for _ in range(6)]
    optimizer = ScalarAverages(params, fused=fused)
    run(optimizer, params, [1])
    for i, param in enumerate(params):
        optimizer.state[param]["scale"].fill_(value if i % 2 else 0.0)
    run(optimizer, params, [2])
    for i, param in enumerate(params):
        scale = optimizer.state[param]["scale"]
        half = float(np.float32(float(np.float32(value)) / 2))
        np.testing.assert_equal(scale.item(), half if i % 2 else 0.0)
        assert torch.signbit(scale) == (i % 2 == 1 and math.copysign(1, value) < 0)


def test_groups(fused: bool | None) -> None:
    params = make_params([(3,), (4,), (5,)], F64)
    groups = [{"params": params[:1]}, {"params": params[1:], "momentum_decay": 0.5, "lr": 0.1}]
    optimizer = ScalarNAdam(groups, fused=fused)
    oracles = [Float64NAdam((3 + i,), 4e-3 if i == 0 else 0.5) for i in range(3)]
    for step in range(1, 5):
        wanted = [param.detach().clone().numpy() for param in params]
        run(optimizer, params, [step])
        for i, (param, oracle) in enumerate(zip(params, oracles, strict=True)):
            assert param.grad is not None
            lr = 2e-3 if i == 0 else 0.1
            assert_near(param, wanted[i] - lr * oracle.update(param.grad), 1e-13)
    assert products(optimizer) == [oracle.mu_product for oracle in oracles]
    new = nn.Parameter(torch.ones(2, dtype=F64))
    optimizer.add_param_group({"params": [new]})
    run(optimizer, [*params, new], [5])
    assert optimizer.state[new]["mu_product"].item() == np.float32(oracles[0].mu(1))


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize("place", ["one group", "two groups"])
def test_a_parameter_twice(place: str, fused: bool | None) -> None:
    param, other = make_params([(3,)])[0], make_params([(3,)])[0]
    groups = [{"params": [param, param]}] if place == "one group" else [{"params": [param]}]
    optimizer, once = ScalarNAdam(groups, fused=fused), ScalarNAdam([other], fused=fused)
    if place == "two groups":
        optimizer.add_param_group({"params": []})
        optimizer.param_groups[1]["params"].append(param)
    for step in (1, 2):
        set_grads([param], step)
        set_grads([other], step)
        optimizer.step()
        once.step()
        once.step()
    assert_same(list(optimizer.state[param].values()), list(once.state[other].values()))
    assert torch.equal(param, other)


@every_class
def test_a_rate_of_zero_advances(cls: Any, fused: bool | None) -> None:
    optimizer, params = trained(cls, fused=fused, lr=0.0, weight_decay=0.1)
    other, _ = trained(cls, fused=fused, lr=0.5)
    for param, wanted in zip(params, make_params(), strict=True):
        assert torch.equal(param, wanted)
        state = optimizer.state[param]
        names = cls._rule.scalar_states
        assert [state[name].item() for name in names] == [
            other.state[other.param_groups[0]["params"][0]][name].item() for name in names
        ]


def test_skipped_steps(fused: bool | None) -> None:
    params, others = make_params(), make_params()
    optimizer, other = ScalarNAdam(params, fused=fused), ScalarNAdam(others, fused=fused)
    for step, overflow in enumerate([True, False, True, False], 1):
        optimizer.grad_scale = scalar(1024.0)  # type: ignore[attr-defined]
        optimizer.found_inf = scalar(float(overflow))  # type: ignore[attr-defined]
        set_grads(params, step)
        for param in params:
            assert param.grad is not None
            param.grad.mul_(math.inf if overflow else 1024.0)
        optimizer.step()
        if not overflow:
            run(other, others, [step])
    assert_same(contents(optimizer), contents(other))
    assert products(optimizer) == products(other)


@pytest.mark.real
def test_grad_scaler(fused: bool | None) -> None:
    params = make_params()
    optimizer = ScalarNAdam(params, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=100)
    seen = []
    for step in range(1, 5):
        optimizer.zero_grad()
        loss = torch.stack([(p * p).sum() for p in params]).sum()
        scaler.scale(loss).backward()
        if step == 2:
            assert params[0].grad is not None
            params[0].grad.view(-1)[1] = math.nan
        scaler.step(optimizer)
        scaler.update()
        seen.append(products(optimizer)[0])
    assert seen[1] == seen[0]
    assert seen[3] < seen[2] < seen[1] < 1.0


def test_capturable(fused: bool | None) -> None:
    optimizer, params = trained(capturable=True, fused=fused)
    other, _ = trained(fused=fused)
    assert optimizer.state[params[0]]["mu_product"].device.type == "cpu"
    continue_alike(optimizer, other)


def test_fused_takes_what_the_kernels_take() -> None:
    optimizer, params = trained(fused=True)
    continue_alike(optimizer, trained(fused=False)[0])
    assert optimizer.param_groups[0]["fused"] is True
    assert params[0].grad is not None


def test_init_group(fused: bool | None) -> None:
    params = make_params()
    optimizer = ScalarNAdam(params, fused=fused)
    set_grads(params, 1)
    optimizer._init_group(optimizer.param_groups[0])  # type: ignore[attr-defined]
    assert products(optimizer) == [1.0, 1.0]
    optimizer.step()
    other = ScalarNAdam(others := make_params(), fused=fused)
    run(other, others, [1])
    assert_same(contents(optimizer), contents(other))


def test_without_values(fused: bool | None) -> None:
    meta = [nn.Parameter(torch.ones(3, device="meta"))]
    optimizer = ScalarNAdam(meta, fused=fused)
    for _ in range(2):
        meta[0].grad = torch.ones(3, device="meta")
        optimizer.step()
    assert optimizer.state[meta[0]]["mu_product"].shape == ()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step()
    with FakeTensorMode():
        fakes = [nn.Parameter(torch.ones(3))]
        other = ScalarNAdam(fakes, fused=fused)
        for _ in range(2):
            fakes[0].grad = torch.ones(3)
            other.step()
        other.load_state_dict(other.state_dict())
        other.step()
    state = other.state[fakes[0]]
    assert (state["mu_product"].dtype, state["mu_product"].shape) == (F32, ())


# ---- rules in C++ --------------------------------------------------------------------------------

HALVING = """\
namespace emopt {

struct Halving {
  static constexpr const char* kName = "halving";
  static constexpr const char* kStates[] = {"sum"};
  static constexpr ScalarState kScalarStates[] = {{"scale", 2.0}, {"passed", -1.0}};

  double factor;
  double scalars[2];

  static constexpr auto hyperparameters() {
    return std::make_tuple(hyperparameter("factor", &Halving::factor), StepArgument{});
  }

  EMOPT_FN void advance(double step) {
    scalars[1] = scalars[0];
    scalars[0] *= factor / step;
  }

  template <class Real>
  struct Step {
    Real scale, passed;
    EMOPT_FN Step(const Halving& rule, double)
        : scale(static_cast<Real>(rule.scalars[0])), passed(static_cast<Real>(rule.scalars[1])) {}
    EMOPT_FN Real operator()(Real grad, Real& sum) const {
      sum += scale * grad;
      return sum + passed;
    }
  };
};

}  // namespace emopt
"""


@needs_native
@needs_compiler
@pytest.mark.usefixtures("_cache_of_module", "_no_other_rules")
def test_a_rule_in_cpp(tmp_path: Path) -> None:
    (tmp_path / "halving.h").write_text(HALVING)
    rule = eo.load_rule(tmp_path / "halving.h", defaults={"factor": 0.75})
    assert rule.scalar_states == {"scale": 2.0, "passed": -1.0}

    class Halving(eo.ScalarOptimizer, rule=rule, lr=0.5):
        """Steps of a rule in C++."""

    params = [nn.Parameter(torch.ones(3)) for _ in range(3)]
    optimizer = Halving(params)
    numbers = [[1.0, 0.0, 2.0, -1.0, 0] for _ in params]
    for step in range(1, 5):
        for i, (param, (weight, total, size, passed, count)) in enumerate(
            zip(params, numbers, strict=True)
        ):
            param.grad = torch.full((3,), 0.5) if step > i else None
            if step > i:
                total = total + size * 0.5
                weight = weight - 0.5 * (total + passed)
                size, passed = float(np.float32(size * (0.75 / (count + 1)))), size
                numbers[i] = [weight, total, size, passed, count + 1]
        optimizer.step()
        if step == 2:
            optimizer = copy.deepcopy(optimizer)
            params = optimizer.param_groups[0]["params"]
    for param, (weight, total, size, passed, count) in zip(params, numbers, strict=True):
        state = optimizer.state[param]
        assert list(state) == ["step", "sum", "scale", "passed"]
        assert (state["step"], state["scale"], state["passed"]) == (count, size, passed)
        assert_near(state["sum"], [total] * 3, 1e-6)
        assert_near(param, [weight] * 3, 1e-6)
    scale, passed = scalar(2.0), scalar(-1.0)
    update = rule(torch.ones(2), torch.zeros(2), step=2, scale=scale, passed=passed)
    assert (update.tolist(), scale.item(), passed.item()) == ([1.0, 1.0], 0.75, 2.0)
