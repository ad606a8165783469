"""Classes that choose a rule per group: groups of different rules step in one call."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from optimizers import assert_same, contents, make_params, run
from support import needs_native
from torch import Tensor, nn

from emerging_optimizers import _rule, _step
from emerging_optimizers._rule import GroupRule
from emerging_optimizers.scalar_optimizers import (
    Adam,
    AdEMAMix,
    LaProp,
    Lion,
    ScalarOptimizer,
    SingleMomentumOptimizer,
    update_functions,
)

pytestmark = pytest.mark.on_devices("tests-states")

SHAPES = ((3, 4), (5, 2), (7,))
RULES: dict[str, type[ScalarOptimizer]] = {
    "adam": Adam,
    "laprop": LaProp,
    "lion": Lion,
    "ademamix": AdEMAMix,
}
# Each rule's options, for its class and for a group of `Chosen`.
OPTIONS: dict[str, dict[str, Any]] = {
    "adam": {"betas": (0.8, 0.95), "eps": 1e-6},
    "laprop": {"betas": (0.7, 0.99), "eps": 1e-7},
    "lion": {"betas": (0.9, 0.98)},
    "ademamix": {"betas": (0.9, 0.99, 0.999), "alpha": 3.0},
}
SAME_STATES = ("adam", "laprop", "adam")
OTHER_STATES = ("lion", "adam", "ademamix", "laprop")
every_mixture = pytest.mark.parametrize(
    "names", [SAME_STATES, OTHER_STATES], ids=["same states", "other states"]
)
every_way = pytest.mark.parametrize("fused", [None, False, pytest.param(True, marks=needs_native)])


class Chosen(ScalarOptimizer):
    """Steps each group with the rule that its key ``rule`` names."""

    _rule = Adam._rule
    _renamed = Adam._renamed

    def __init__(self, groups: Sequence[dict[str, Any]], lr: float = 1e-2, **options: Any) -> None:
        hyperparameters = {
            "rule": "adam",
            "lr": lr,
            "betas": (0.9, 0.999),
            "eps": 1e-8,
            "weight_decay": 0.1,
            "weight_decay_method": "decoupled",
            "correct_bias": True,
            "nesterov": False,
            "alpha": 2.0,
            "num_alpha_warmup_steps": None,
            "num_beta_slow_warmup_steps": None,
        }
        super().__init__(groups, hyperparameters, options)  # type: ignore[arg-type]

    def _rule_of(self, group: Mapping[str, Any]) -> GroupRule:
        return RULES[group["rule"]]._group_rule


def make_groups(names: Sequence[str], dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
    return [{"params": make_params(SHAPES, dtype), "rule": n, **OPTIONS[n]} for n in names]


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def step_alone(
    names: Sequence[str], steps: int, dtype: torch.dtype = torch.float32, **options: Any
) -> list[Tensor]:
    """Step each group with an optimizer of its class."""
    found = []
    for name in names:
        arguments = {"lr": 1e-2, "weight_decay": 0.1, "weight_decay_method": "decoupled"}
        params = make_params(SHAPES, dtype)
        alone = RULES[name](params, **arguments, **OPTIONS[name], **options)  # type: ignore[arg-type,call-arg]
        run_alike(alone, [params], range(1, steps + 1))
        found += contents(alone)
    return found


def run_alike(optimizer: torch.optim.Optimizer, groups: Any, steps: Sequence[int]) -> None:
    """Take steps with the same gradients in each group."""

    def before_step(step: int) -> None:
        for params in groups[1:]:
            for param, first in zip(params, groups[0], strict=True):
                param.grad = first.grad.clone()

    run(optimizer, groups[0], steps, before_step)


def run_chosen(optimizer: Chosen, steps: Sequence[int]) -> None:
    run_alike(optimizer, [group["params"] for group in optimizer.param_groups], steps)


@every_mixture
@every_way
def test_groups_step_as_separate_optimizers(names: Sequence[str], fused: bool | None) -> None:
    optimizer = Chosen(make_groups(names), fused=fused)
    run_chosen(optimizer, range(1, 5))
    assert_same(contents(optimizer), step_alone(names, 4, fused=fused))
    for group in optimizer.param_groups:
        for param in group["params"]:
            assert set(optimizer.state[param]) == {"step", *RULES[group["rule"]]._state_names}


@every_mixture
@pytest.mark.parametrize(
    "options",
    [
        {"master_weights": True},
        {"state_dtype": torch.bfloat16},
        {"capturable": True},
        {"maximize": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options(names: Sequence[str], options: dict[str, Any]) -> None:
    dtype = torch.bfloat16 if "master_weights" in options else torch.float32
    optimizer = Chosen(make_groups(names, dtype), **options)
    run_chosen(optimizer, range(1, 4))
    assert_same(contents(optimizer), step_alone(names, 3, dtype, **options))


@needs_native
def test_groups_step_in_one_native_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    native = _rule.native
    assert native is not None

    class Counted:
        def step(self, *arguments: Any) -> Any:
            left = native.step(*arguments)
            calls.append((len(arguments[1]), left))
            return left

    optimizer = Chosen(make_groups(OTHER_STATES))
    run_chosen(optimizer, [1])  # which creates the states
    monkeypatch.setattr(_step, "native", Counted())
    run_chosen(optimizer, [2, 3])
    assert calls == [(len(OTHER_STATES), None)] * 2
    monkeypatch.undo()
    assert_same(contents(optimizer), step_alone(OTHER_STATES, 3))


@needs_native
def test_gradient_that_is_a_parameter_of_another_group() -> None:
    """A gradient that is another rule's parameter is read in the order of the groups."""
    shared = torch.arange(1.0, 7.0)
    first, second = nn.Parameter(torch.ones(6)), nn.Parameter(shared)

    def step(fused: bool | None) -> list[Tensor]:
        params = [first.detach().clone(), second.detach().clone()]
        for param in params:
            param.requires_grad_(False)
        groups = [{"params": [params[0]], "rule": "lion", **OPTIONS["lion"]}]
        groups += [{"params": [params[1]], "rule": "ademamix", **OPTIONS["ademamix"]}]
        params[0].grad = params[1]
        params[1].grad = torch.full((6,), 0.5)
        optimizer = Chosen(groups, fused=fused)
        for _ in range(3):
            optimizer.step()
        return params

    for got, wanted in zip(step(None), step(False), strict=True):
        torch.testing.assert_close(got, wanted)


@every_mixture
@every_way
def test_state_dicts(names: Sequence[str], fused: bool | None) -> None:
    optimizer = Chosen(make_groups(names), fused=fused)
    run_chosen(optimizer, range(1, 3))
    # The loaded rules decide: the groups of `other` had none.
    other = Chosen([{"params": make_params(SHAPES)} for _ in names], fused=fused)
    with torch.no_grad():
        for mine, param in zip(params_of(other), params_of(optimizer), strict=True):
            mine.copy_(param)
    other.load_state_dict(optimizer.state_dict())
    assert [group["rule"] for group in other.param_groups] == list(names)
    run_chosen(other, range(3, 5))
    assert_same(contents(other), step_alone(names, 4, fused=fused))


@pytest.mark.parametrize("fused", [None, False])
def test_errors_name_the_group(fused: bool | None) -> None:
    optimizer = Chosen(make_groups(OTHER_STATES), fused=fused)
    run_chosen(optimizer, [1])
    before = contents(optimizer)
    # Three betas for a rule that takes two, and two for a rule that takes three.
    for index, betas, wrong in [
        (0, (0.9, 0.99, 0.999), r"betas has 3 values; expected 2 \(param_groups\[0\]"),
        (2, (0.9, 0.99), r"betas has 2 values; expected 3 \(param_groups\[2\]"),
        (1, (0.9, 1.0), r"Invalid beta at index 1: 1.0 \(param_groups\[1\]"),
    ]:
        old = optimizer.param_groups[index]["betas"]
        optimizer.param_groups[index]["betas"] = betas
        with pytest.raises(ValueError, match=wrong):
            optimizer.step()
        optimizer.param_groups[index]["betas"] = old
        assert_same(contents(optimizer), before)
    with pytest.raises(ValueError, match=r"Invalid alpha: nan \(param_groups\[4\]\['alpha'\]\)"):
        optimizer.add_param_group(
            {"params": make_params(SHAPES), "rule": "ademamix", "alpha": float("nan")}
            | {"betas": OPTIONS["ademamix"]["betas"]}
        )


def test_incomplete_state_of_a_group() -> None:
    optimizer = Chosen(make_groups(("lion", "ademamix")))
    run_chosen(optimizer, [1])
    saved = optimizer.state_dict()
    position = len(SHAPES)
    del saved["state"][position]["exp_avg_slow"]
    with pytest.raises(ValueError, match=r"param_groups\[1\].* has no 'exp_avg_slow'"):
        optimizer.load_state_dict(saved)


def test_state_dtype_of_a_group() -> None:
    """Each group has the states of its rule, not of the class's rule."""
    dtypes = {"exp_avg_slow": torch.bfloat16}
    groups = make_groups(("lion", "ademamix"))
    groups[1]["state_dtype"] = dtypes
    optimizer = Chosen(groups)
    run_chosen(optimizer, [1, 2])
    for param in groups[1]["params"]:
        state = optimizer.state[param]
        assert [state[n].dtype for n in ("exp_avg_fast", "exp_avg_slow", "exp_avg_sq")] == [
            torch.float32,
            torch.bfloat16,
            torch.float32,
        ]
    wrong = {"params": make_params(SHAPES), "rule": "lion", "state_dtype": dtypes}
    with pytest.raises(ValueError, match="has no state 'exp_avg_slow'; it has 'exp_avg'"):
        optimizer.add_param_group(wrong)


@pytest.mark.parametrize("is_default", [True, False])
def test_values_that_are_not_passed(is_default: bool) -> None:
    """A key that `update_kwarg_names` lacks has no effect, in defaults or in a group."""
    found = []
    for given in ({}, {"use_shape_scaling": True}):
        params = make_params(((4, 4),))
        defaults = {"lr": 0.1, "momentum": 0.9, "correct_bias": True, "nesterov": False}
        optimizer = SingleMomentumOptimizer(
            [{"params": params, **({} if is_default else given)}],
            defaults | (given if is_default else {}),
            update_fn=update_functions.calculate_signum_update,
            update_kwarg_names=("momentum", "correct_bias", "nesterov"),
        )
        run(optimizer, params, [1, 2])
        found.append(contents(optimizer))
    assert_same(*found)
