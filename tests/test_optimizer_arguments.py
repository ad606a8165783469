"""The optimizers' signatures, and the arguments that they reject."""

import inspect
import math
import typing
from typing import Any

import pytest
import torch
from optimizers import Setup, every_optimizer, make_params, run

import emerging_optimizers
from emerging_optimizers import Adam, AdamW
from emerging_optimizers._optimizer import SharedOptions

pytestmark = pytest.mark.on_devices("tests-optimizers")

_BAD = [
    ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
    ({"lr": math.nan}, ValueError, "Invalid learning rate: nan"),
    ({"lr": torch.ones(2)}, ValueError, "Tensor lr must be 1-element"),
    ({"weight_decay": -0.5}, ValueError, "Invalid weight_decay value: -0.5"),
    ({"weight_decay_method": "none"}, ValueError, "Invalid weight_decay_method: 'none'"),
    ({"differentiable": True}, ValueError, "does not support differentiable=True"),
    ({"master_weights": True, "stochastic_rounding": True}, ValueError, "cannot be combined"),
    ({"state_dtype": torch.float64}, ValueError, "Invalid state_dtype: torch.float64"),
    ({"state_dtype": {"other": torch.float32}}, ValueError, "has no state 'other'"),
    ({"unknown": 1}, TypeError, "unexpected keyword argument 'unknown'"),
]  # fmt: skip


@pytest.mark.once
@every_optimizer
@pytest.mark.parametrize(("arguments", "error", "message"), _BAD, ids=lambda v: str(v)[:40])
def test_bad_arguments(
    setup: Setup, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    if not setup.states and arguments.get("state_dtype") is torch.float64:
        pytest.skip("the rule has no states")
    with pytest.raises(error, match=message):
        setup.make(make_params(), **arguments)


_BAD_HYPERPARAMETERS = [
    ("Adam", {"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0: 1.0"),
    ("AdamW", {"betas": (0.9, -0.1)}, "Invalid beta parameter at index 1: -0.1"),
    ("Lion", {"betas": (0.9, 1.5)}, "Invalid beta at index 1: 1.5"),
    ("AdEMAMix", {"betas": (0.9, 0.9, 1.0)}, "Invalid beta at index 2: 1.0"),
    ("AdEMAMix", {"betas": (0.9, 0.9)}, "betas has 2 values; expected 3"),
    ("LaProp", {"eps": -1e-8}, "Invalid epsilon value: -1e-08"),
    ("Signum", {"momentum": 1.0}, "Invalid momentum: 1.0"),
    ("SimplifiedAdEMAMix", {"min_beta_fast": 1.0}, "Invalid min_beta_fast: 1.0"),
    (
        "SimplifiedAdEMAMix",
        {"num_beta_fast_warmup_steps": -1},
        "Invalid num_beta_fast_warmup_steps: -1",
    ),
    ("SimplifiedAdEMAMix", {"alpha": math.nan}, "Invalid alpha: nan"),
    ("AdEMAMix", {"num_alpha_warmup_steps": -1}, "Invalid num_alpha_warmup_steps: -1"),
    ("AdEMAMix", {"num_beta_slow_warmup_steps": -1}, "Invalid num_beta_slow_warmup_steps: -1"),
    (
        "AdEMAMix",
        {"betas": (0.9, 0.999, 1 - 1e-9), "num_beta_slow_warmup_steps": 10},
        r"betas\[2\] is too close to 1 to be warmed up",
    ),
    ("Adam", {"decoupled_weight_decay": True, "weight_decay_method": "palm"}, "cannot be combined"),
]


@pytest.mark.parametrize(("name", "arguments", "message"), _BAD_HYPERPARAMETERS)
def test_bad_hyperparameters(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(emerging_optimizers, name)(make_params(), **arguments)


@pytest.mark.parametrize("cls", [Adam, AdamW])
def test_arguments_of_torch(cls: type[Adam]) -> None:
    params = make_params()
    optimizer = cls(params, 0.1, (0.8, 0.9), 1e-6, 0.2, False, foreach=True, capturable=False)
    assert optimizer.defaults["weight_decay"] == 0.2
    betas: Any = (torch.tensor(0.8), torch.tensor(0.9))
    run(cls(params, betas=betas), params, [1])
    with pytest.raises(RuntimeError, match="`fused` and `foreach` cannot be `True` together"):
        cls(params, foreach=True, fused=True)


_SIGNATURES = {
    "Adam": "lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.0, amsgrad=False, *,"
    " correct_bias=True, nesterov=False, weight_decay_method='l2', decoupled_weight_decay=False,"
    " foreach=None",
    "AdamW": "lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.01, amsgrad=False, *,"
    " correct_bias=True, nesterov=False, weight_decay_method='decoupled', foreach=None",
    "AdEMAMix": "lr=0.001, betas=(0.9, 0.999, 0.9999), eps=1e-08, weight_decay=0.0, *, alpha=5.0,"
    " num_beta_slow_warmup_steps=None, num_alpha_warmup_steps=None, correct_bias=True,"
    " weight_decay_method='decoupled'",
    "LaProp": "lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.0, *, correct_bias=True,"
    " frob_normalize=False, weight_decay_method='decoupled'",
    "Lion": "lr=0.0001, betas=(0.9, 0.99), weight_decay=0.01, *, weight_decay_method='decoupled'",
    "Signum": "lr=0.001, momentum=0.9, weight_decay=0.0, *, correct_bias=True, nesterov=False,"
    " use_shape_scaling=False, weight_decay_method='decoupled'",
    "SimplifiedAdEMAMix": "lr=0.001, betas=(0.9999, 0.999), eps=1e-08, weight_decay=0.0, *,"
    " correct_bias=True, num_beta_fast_warmup_steps=None, min_beta_fast=0.9, alpha=2.0,"
    " weight_decay_method='decoupled'",
}


@pytest.mark.parametrize("name", _SIGNATURES)
def test_signatures(name: str) -> None:
    cls = getattr(emerging_optimizers, name)
    assert getattr(emerging_optimizers.scalar_optimizers, name) is cls
    parameters = inspect.signature(cls).parameters.values()
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    assert str(inspect.Signature(plain)) == f"(params, {_SIGNATURES[name]}, **options)"
    of_groups = typing.get_type_hints(SharedOptions).keys() - {"state_dtype_filter"}
    assert of_groups <= set(cls(make_params()).defaults)
