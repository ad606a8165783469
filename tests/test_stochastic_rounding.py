"""Stochastic rounding: its random bits, and steps that use them."""

import math
from typing import Any

import pytest
import torch
from optimizers import Setup, assert_same, every_optimizer, make_params, run, set_grads
from support import assert_equal_bits, every_half
from torch import Tensor

from emerging_optimizers import AdamW, Lion
from emerging_optimizers._rounding import (
    element_indices,
    random_bits,
    round_stochastically,
    rounding_key,
)

pytestmark = pytest.mark.on_devices("tests-optimizers")


def _random_bits(count: int, seed: int = 1, position: int = 0, step: int = 1) -> Tensor:
    return random_bits(rounding_key(seed, position, step), torch.arange(count))


@pytest.mark.builtin_rules("has no rule")
def test_random_bits() -> None:
    count = 100_000
    bits = _random_bits(count)
    assert bits.min() >= 0
    assert bits.max() < 2**32
    assert bits.unique().numel() > count - 10
    others = [
        _random_bits(count + 1)[1:],
        _random_bits(count, seed=2),
        _random_bits(count, position=1),
        _random_bits(count, step=2),
        random_bits(rounding_key(1, 0, 1), torch.arange(2**32, 2**32 + count)),
    ]
    sigma = 0.5 / math.sqrt(count)
    for bit in range(32):
        mine = (bits >> bit) & 1
        assert abs(mine.double().mean() - 0.5) < 5 * sigma
        for other in others:
            assert abs((mine ^ ((other >> bit) & 1)).double().mean() - 0.5) < 5 * sigma


def test_random_bits_by_hand() -> None:
    # The definition of the docstrings in Python integers, a reference for other implementations.
    def hashed(x: int) -> int:
        x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
        x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
        return x ^ (x >> 16)

    indices = [0, 1, 12345, 2**32 - 1, 2**32, 5 * 2**32 + 7, 2**40]
    for seed in (0, 2**64 - 1, 987654321):
        key = rounding_key(seed, 3, 17)
        low, high = key % 2**32, key >> 32
        wanted = [
            hashed(hashed(i % 2**32 ^ low) ^ (high + 0x9E3779B9 * (i >> 32)) % 2**32)
            for i in indices
        ]
        assert random_bits(key, torch.tensor(indices)).tolist() == wanted
    assert rounding_key(0, 0, 0) != rounding_key(0, 0, 1) != rounding_key(0, 1, 0)


def test_element_indices() -> None:
    assert element_indices(torch.empty(2, 3)).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert element_indices(torch.empty(3, 2).t()).tolist() == [[0, 2, 4], [1, 3, 5]]
    assert element_indices(torch.empty(2, 6)[:, ::2]).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert element_indices(torch.empty(())).item() == 0


@pytest.mark.builtin_rules("has no rule")
@every_half
def test_rounding_is_unbiased(dtype: torch.dtype) -> None:
    count = 100_000
    bits = _random_bits(count)
    lowest = {torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}[dtype]
    eps = torch.finfo(dtype).eps
    cases = [(1.0, eps), (-1.0, eps), (2 - eps, eps), (3 * lowest, lowest), (0.0, lowest)]
    for base, spacing in cases:
        for part in (1 / 1000, 0.25, 0.5, 0.999):
            values = torch.full((count,), base + math.copysign(part, base) * spacing)
            rounded = round_stochastically(values, dtype, bits)
            error = (rounded.double() - values.double()).mean().item() / spacing
            assert abs(error) < 5 * math.sqrt(part * (1 - part) / count) + 2e-5, (base, part)
            assert rounded.unique().numel() <= 2


@pytest.mark.builtin_rules("has no rule")
@every_half
def test_rounding_keeps_what_is_exact(dtype: torch.dtype) -> None:
    exact = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for seed in (1, 2, 3):
        bits = _random_bits(exact.numel(), seed)
        assert_equal_bits(round_stochastically(exact.float(), dtype, bits), exact, "exact")
    largest = torch.finfo(dtype).max
    just_below = torch.full((1000,), largest).nextafter(torch.tensor(0.0))
    assert round_stochastically(just_below, dtype, _random_bits(1000)).max() == largest


@every_optimizer
@every_half
def test_stochastic_rounding_of_a_step(
    setup: Setup, dtype: torch.dtype, fused: bool | None
) -> None:
    count = 100_000
    eps = torch.finfo(dtype).eps
    param = torch.nn.Parameter(torch.full((100, count // 100), 1.5, dtype=dtype))
    # The size of the rule's first update with a gradient of ones.
    size = torch.nn.Parameter(torch.ones(1, 1))
    size.grad = torch.ones(1, 1)
    setup.make([size], lr=1.0, weight_decay=0.0).step()
    lr = 1e-3 * eps / (1 - size.item())
    options: dict[str, Any] = {"stochastic_rounding": True, "state_dtype": torch.float32}
    optimizer = setup.make([param], lr=lr, weight_decay=0.0, fused=fused, **options)
    param.grad = torch.ones_like(param)
    optimizer.step()
    moved = (1.5 - param.detach().double()) / eps
    assert set(moved.unique().tolist()) == {0.0, 1.0}
    assert abs(moved.mean().item() - 1e-3) < 5 * math.sqrt(1e-3 / count)


@pytest.mark.once
def test_stochastic_rounding_learns(fused: bool | None) -> None:
    def distance(**options: Any) -> float:
        torch.manual_seed(0)
        param = torch.nn.Parameter(torch.full((64,), 4.0, dtype=torch.bfloat16))
        optimizer = AdamW([param], lr=5e-3, weight_decay=0.0, fused=fused, **options)
        for _ in range(400):
            param.grad = 2 * (param.detach() - 3.0)
            optimizer.step()
        return (param.detach().float() - 3.0).abs().mean().item()

    assert distance() == 1.0  # each update is less than half the spacing at 4
    assert distance(stochastic_rounding=True) < 0.1
    assert distance(master_weights=True, state_dtype=torch.float32) < 0.1


@every_half
def test_stochastic_rounding_depends_on_seed_step_position(
    dtype: torch.dtype, fused: bool | None
) -> None:
    def result(seed: int = 0, groups: bool = False, frozen: bool = False) -> list[Tensor]:
        torch.manual_seed(seed)
        params = make_params([(30, 40)] * 3, dtype)
        arguments: Any = [{"params": [p]} for p in params] if groups else params
        optimizer = Lion(arguments, lr=1e-4, stochastic_rounding=True, fused=fused)
        for step in (1, 2):
            set_grads(params, step)
            if frozen:
                params[0].grad = None
            optimizer.step()
        return [p.detach() for p in params]

    first = result()
    assert_same(result(), first)
    assert_same(result(groups=True), first)
    assert_same(result(frozen=True)[1:], first[1:])
    assert not torch.equal(result(seed=1)[0], first[0])
    # Without the option, no random generator is used.
    torch.manual_seed(0)
    before = torch.get_rng_state()
    params = make_params(dtype=dtype)
    run(Lion(params, fused=fused), params, [1])
    assert torch.equal(torch.get_rng_state(), before)
