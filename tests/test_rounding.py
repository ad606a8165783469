"""The update functions round once, from the exact value to the stored dtype."""

from typing import Any

import pytest
import torch
from oracle import RULES, Rule, is_square
from support import (
    DTYPES,
    Mix,
    Operands,
    assert_equal_bits,
    call,
    check_call,
    every_mix,
    every_rule,
    make_operands,
    overflow_threshold,
    round_once,
)
from torch import Tensor

from emerging_optimizers._hyperparameters import Beta, NonNegative

pytestmark = pytest.mark.on_devices("tests-functions")


def _halfway_points(dtype: torch.dtype) -> Tensor:
    """Midpoints of a half type, and values so close to them that float32 cannot tell."""
    digits = {torch.bfloat16: 8, torch.float16: 11}[dtype]
    mantissas = torch.arange(2 ** (digits - 1), 2**digits, dtype=torch.float64) + 0.5
    halfway = mantissas * 2.0**-digits  # in [0.5, 1)
    values = torch.cat([halfway, halfway * (1 - 2.0**-40), halfway * (1 + 2.0**-40)])
    return torch.cat([values, -values])


def _assert_rounded_once(stored: Tensor, exact: Tensor, label: str) -> None:
    dtype = stored.dtype
    once, twice = (
        round_once(exact, dtype),
        round_once(round_once(exact, torch.float32).double(), dtype),
    )
    assert (once != twice).any(), f"{label}: the test cannot tell one rounding from two"
    assert_equal_bits(stored, once, label)


# With a gradient of 0 and an exp_avg_sq of 4, the update is exactly half the first state.
_HALVES = {
    "adam": {
        "betas": (0.5, 0.25),
        "correct_bias": False,
        "use_nesterov": False,
        "step": 1,
        "eps": 0.0,
    },
    "ademamix": {
        "num_beta_slow_warmup_steps": None,
        "num_alpha_warmup_steps": None,
        "betas": (0.5, 0.25, 0.5),
        "step": 1,
        "eps": 0.0,
        "correct_bias": False,
        "alpha": 0.0,
    },
    "sim_ademamix": {
        "num_beta_fast_warmup_steps": None,
        "min_beta_fast": 0.5,
        "betas": (0.5, 0.25),
        "step": 1,
        "eps": 0.0,
        "correct_bias": False,
        "alpha": 0.0,
    },
    "laprop": {"correct_bias": False, "betas": (0.5, 0.25), "step": 1, "eps": 0.0},
}


@pytest.mark.parametrize("name", [name for name in _HALVES if name in RULES])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_update_is_rounded_once(name: str, dtype: torch.dtype) -> None:
    rule, case, halfway = RULES[name], _HALVES[name], _halfway_points(dtype)
    grad = torch.zeros_like(halfway)
    states = [2 * halfway, *(torch.full_like(halfway, 4.0) for _ in rule.states[1:])]
    out = torch.empty_like(halfway, dtype=dtype)
    call(rule, case, Operands(grad, states), out=out)
    _assert_rounded_once(out, halfway, f"{rule}: update")


def _cases_that_store_the_gradient(rule: Rule) -> dict[str, Any]:
    """Betas of 0: averages become the gradient, its square, or its normalised value."""
    case = dict(rule.usual)
    for name, kind, domain, length in rule.implementation.hyperparameters:
        if domain is Beta:
            case[name] = (0.0,) * length if kind == "numbers" else 0.0
        elif domain is NonNegative:
            case[name] = 1.0
        elif kind == "warm-up":
            case[name] = None
    return case


@every_rule
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_states_are_rounded_once(rule: Rule, dtype: torch.dtype) -> None:
    case, halfway = _cases_that_store_the_gradient(rule), _halfway_points(dtype)
    # Gradients for which the average, or the average square, is a midpoint.
    grads = {"square": halfway.abs().sqrt() * halfway.sign()}
    if rule.normalises:
        grads["average"] = halfway / (1 - halfway.abs())  # g / (|g| + 1) = halfway
    else:
        grads["average"] = halfway
    for i, name in enumerate(rule.states):
        grad = grads["square" if is_square(name) else "average"]
        exact = Operands(grad, [torch.zeros_like(grad) for _ in rule.states])
        call(rule, case, exact)
        stored = Operands(grad, [torch.zeros_like(grad, dtype=dtype) for _ in rule.states])
        call(rule, case, stored)
        _assert_rounded_once(stored.states[i], exact.states[i], f"{rule}: {name}")


@every_rule
@every_mix
def test_out_of_another_dtype_is_the_update_rounded(rule: Rule, mix: Mix) -> None:
    # A float64 `out` does not make the arithmetic float64.
    operands = make_operands(rule, (3, 333), mix)
    exact = torch.empty(3, 333, dtype=torch.float64)
    check_call(rule, rule.usual, operands.clone(), out=exact)
    for dtype in DTYPES:
        out = torch.full((3, 333), 7.0, dtype=dtype)
        check_call(rule, rule.usual, operands.clone(), out=out)
        assert_equal_bits(out, round_once(exact, dtype), f"{rule}: out")


@pytest.mark.parametrize(
    "rule",
    [r for r in RULES.values() if r.states and not r.normalises and not is_square(r.states[0])],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_magnitude_is_rounded_to_nearest_even(rule: Rule, dtype: torch.dtype) -> None:
    # Subnormal numbers, the smallest normal ones, and those around the largest. With betas of 0,
    # the state is the gradient.
    limits = torch.finfo(dtype)
    scale = torch.tensor([limits.smallest_normal, limits.smallest_normal / 8, limits.max, 1.0])
    grad = (torch.linspace(0.01, 1.9, 4099).outer(scale)).clamp_(max=torch.finfo(torch.float32).max)
    grad = torch.cat([grad, -grad])
    states = [torch.zeros_like(grad, dtype=dtype) for _ in rule.states]
    call(rule, _cases_that_store_the_gradient(rule), Operands(grad, states))
    assert (grad.abs() >= overflow_threshold(dtype)).any() == states[0].isinf().any()
    assert_equal_bits(states[0], round_once(grad.double(), dtype), f"{rule}: {rule.states[0]}")
