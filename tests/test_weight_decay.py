"""Weight decay: small fractions, and weights with special values."""

import math
from typing import Any

import pytest
import torch
from optimizers import METHODS, assert_same, make_params, run, set_grads
from support import assert_equal_bits
from torch import Tensor
from torch.nn import Parameter

from emerging_optimizers import AdamW, Lion, Signum, megatron

SHRINKING = [method for method in METHODS if method != "l2"]


def decay_of(fraction: float, method: str, lr: float) -> float:
    """The weight_decay with which a step removes this fraction of a weight."""
    return fraction / {"decoupled": lr, "independent": 1.0, "palm": lr * lr}[method]


def _relative_losses(
    fractions: list[float],
    method: str,
    count: int,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> list[float]:
    """The decay of 300 AdamW steps with random gradients, relative to the exact one."""
    lr = 1e-3
    start = (torch.rand(count) + 0.5).to(dtype)
    params = [Parameter(start.clone()) for _ in fractions]
    exact = [Parameter(start.double()) for _ in (0.0, *fractions)]
    groups: list[Any] = [
        {"params": [p], "weight_decay": decay_of(d, method, lr)}
        for p, d in zip((*params, *exact), (*fractions, 0.0, *fractions), strict=True)
    ]
    # With this eps, the first updates differ in size, and so in their rounding errors.
    optimizer = AdamW(groups, lr=lr, eps=0.1, weight_decay_method=method, **options)
    for _ in range(300):
        grad = torch.randn(count).to(dtype)
        for param in (*params, *exact):
            param.grad = grad.to(param.dtype)
        optimizer.step()
    still, *wanted = (p.detach() for p in exact)
    states = [optimizer.state[p] for p in params]
    got = [s.get("master_param", p.detach()) for s, p in zip(states, params, strict=True)]
    return [
        ((g.double() - still).mean() / (w - still).mean()).item()
        for g, w in zip(got, wanted, strict=True)
    ]


@pytest.mark.builtin_rules("repeats a test of a built-in rule")
@pytest.mark.parametrize("method", SHRINKING)
def test_any_fraction(method: str, fused: bool | None) -> None:
    # Rounding errors add up to about 0.0003 of a decay of 1e-8.
    cases = {12_000: [3e-8]} if fused is False else {100_000: [1e-8, 3e-8]}
    if method != "decoupled":
        cases = {}
    cases[2000] = [1e-5, 0.25, 0.499, 0.5, 0.7]
    for count, fractions in cases.items():
        got = _relative_losses(fractions, method, count, fused=fused)
        assert got == pytest.approx([1.0] * len(fractions), abs=1e-3), fractions


@pytest.mark.builtin_rules("repeats a test of a built-in rule")
def test_any_fraction_of_masters(fused: bool | None) -> None:
    options: dict[str, Any] = {"master_weights": True, "state_dtype": torch.float32}
    dtype, fractions = torch.bfloat16, [1e-6, 0.6]
    got = _relative_losses(fractions, "decoupled", 2000, dtype, fused=fused, **options)
    assert got == pytest.approx([1.0, 1.0], abs=1e-3)


@pytest.mark.builtin_rules("repeats a test of a built-in rule")
def test_small_fraction_with_stochastic_rounding(fused: bool | None) -> None:
    """Each step removes 1/32 of the spacing of bfloat16 numbers."""
    weight = Parameter(torch.ones(4000, dtype=torch.bfloat16))
    optimizer = Lion([weight], lr=1e-3, weight_decay=0.125, stochastic_rounding=True, fused=fused)
    weight.grad = torch.zeros_like(weight)
    for _ in range(200):
        optimizer.step()
    wanted = (1 - 1.25e-4) ** 200
    assert weight.float().mean().item() == pytest.approx(wanted, abs=1e-3)


SPECIAL = [0.0, -0.0, 1.0, -2.5, 3e38, -3e38, 1e-45, math.inf, -math.inf, math.nan]
TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
every_type = pytest.mark.parametrize("dtype", TYPES, ids=str)


def _step_of_signs(
    values: list[float], fraction: float, method: str, dtype: torch.dtype, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Take a step with updates of 1, -1 and 0; return old and new weights, and lr * updates."""
    lr = 0.25
    weight = Parameter(torch.tensor(values).repeat(3).to(dtype))
    before = weight.detach().clone()
    signs = torch.tensor([1.0, -1.0, 0.0]).repeat_interleave(len(values))
    weight.grad = signs.to(dtype)
    decay = decay_of(fraction, method, lr)
    optimizer = Signum([weight], lr=lr, weight_decay=decay, weight_decay_method=method, **options)
    optimizer.step()
    return before, weight.detach(), (lr * signs).to(before.dtype)


@pytest.mark.parametrize("method", SHRINKING)
@every_type
def test_special_weights(method: str, dtype: torch.dtype, fused: bool | None) -> None:
    for fraction in (0.0, 1e-9, 0.25, 0.5, 0.75):
        before, after, _ = _step_of_signs(SPECIAL, fraction, method, dtype, fused=fused)
        is_infinite = before.isinf()
        assert_equal_bits(after[is_infinite], before[is_infinite], f"infinite, {fraction}")
        assert torch.equal(after.isnan(), before.isnan()), fraction


@pytest.mark.parametrize("method", METHODS)
@every_type
def test_no_decay_changes_no_bit(method: str, dtype: torch.dtype, fused: bool | None) -> None:
    if method == "l2":
        method = "decoupled"  # lr * 0 is lost there, too
    before, after, moved = _step_of_signs(SPECIAL, 0.0, method, dtype, fused=fused)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    wanted = (before.to(wide) - moved.to(wide)).to(dtype)
    assert_equal_bits(after, wanted, str(dtype))


@pytest.mark.parametrize("method", SHRINKING)
@every_type
def test_fractions_of_1_and_more(method: str, dtype: torch.dtype, fused: bool | None) -> None:
    """A fraction of 1 leaves only the update; a larger one flips the weight's sign."""
    finite = [x for x in SPECIAL if math.isfinite(x) and abs(x) < 65504]
    _, after, moved = _step_of_signs(finite, 1.0, method, dtype, fused=fused)
    assert torch.equal(after, -moved)
    before, after, moved = _step_of_signs(finite, 1.5, method, dtype, fused=fused)
    assert torch.equal(after, -0.5 * before - moved)


def test_remainders_decay_like_masters(fused: bool | None) -> None:
    """Split and float32 masters decay bit-identically."""
    results = []
    for store in (False, True):
        params = make_params(dtype=torch.bfloat16)
        optimizer = megatron.FusedAdam(
            params, lr=1e-3, weight_decay=1e-4, master_weights=True, store_param_remainders=store
        )
        optimizer.param_groups[0]["fused"] = fused
        run(optimizer, params, [1, 2, 3])
        masters = [optimizer.state[p]["master_param"] for p in params]
        if store:
            masters = [megatron.merge_master(*pair) for pair in zip(params, masters, strict=True)]
        results.append(masters)
    assert_same(results[1], results[0])


def test_lr_0_does_not_decay(fused: bool | None) -> None:
    params = make_params()
    before = [p.detach().clone() for p in params]
    optimizer = Lion(
        params, lr=0.0, weight_decay=0.5, weight_decay_method="independent", fused=fused
    )
    set_grads(params, 1)
    optimizer.step()
    assert_same([p.detach() for p in params], before)
