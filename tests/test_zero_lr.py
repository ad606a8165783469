"""A learning rate of 0 leaves parameters unchanged, bit for bit."""

import functools
import math
from typing import Any

import pytest
import torch
from optimizers import METHODS, Setup, assert_same, every_optimizer, make_params, run, set_grads
from support import every_half
from torch.nn import Parameter

from emerging_optimizers import AdamW, LaProp

pytestmark = pytest.mark.on_devices("tests-optimizers")

OPTIONS: list[dict[str, Any]] = [
    {},
    {"master_weights": True},
    {"master_weights": "split"},
    {"stochastic_rounding": True},
]


@every_optimizer
@pytest.mark.parametrize("method", METHODS)
def test_zero_lr(setup: Setup, method: str, fused: bool | None) -> None:
    arguments: dict[str, Any] = {"weight_decay": 0.1, "weight_decay_method": method}
    if "eps" in setup.case:
        arguments["eps"] = 0.0
    if setup.cls is LaProp:
        arguments["frob_normalize"] = True
    for lr in (0.0, torch.zeros(())):
        for dtype in (torch.float32, torch.bfloat16):
            params = make_params(dtype=dtype)
            with torch.no_grad():
                params[0].view(-1)[:4] = torch.tensor([-0.0, math.nan, math.inf, 1e-40])
            before = [p.detach().clone() for p in params]
            for option in OPTIONS:
                optimizer = setup.make(params, lr=lr, fused=fused, **option, **arguments)
                for step in (1, 2):
                    set_grads(params, step)
                    assert params[0].grad is not None
                    params[0].grad.view(-1)[:6] = torch.tensor([0, 0, 0, 0, math.nan, math.inf])
                    optimizer.step()
                assert_same([p.detach() for p in params], before, f"{lr} {dtype} {option}")
                state = optimizer.state[params[1]]
                assert state["step"].item() == 2
                for name in setup.states:
                    assert state[name].count_nonzero() > 0


def test_lr_0_keeps_the_bits(fused: bool | None) -> None:
    """NaNs with payloads, subnormal numbers and both zeros."""
    bits = torch.tensor([0x7F800001, 0x7FC00001, -0x3FFFFF, 1, 0, -(2**31)], dtype=torch.int32)
    for dtype, values in (
        (torch.float32, bits),
        (torch.bfloat16, (bits >> 16).to(torch.int16)),
        (torch.bfloat16, torch.tensor([0x7F81, 0x7FC1, -1, 1, 0, -(2**15)], dtype=torch.int16)),
    ):
        params = [Parameter(values.clone().view(dtype))]
        for options in OPTIONS[:3]:
            optimizer = LaProp(params, lr=0.0, frob_normalize=True, fused=fused, **options)
            run(optimizer, params, [1, 2])
            assert torch.equal(params[0].detach().view(values.dtype), values)


@every_half
@pytest.mark.parametrize(
    "make", [AdamW, functools.partial(LaProp, frob_normalize=True)], ids=["AdamW", "LaProp"]
)
def test_lr_0_ignores_the_master(make: Any, dtype: torch.dtype, fused: bool | None) -> None:
    params = make_params(dtype=dtype)
    optimizer = make(params, master_weights=True, fused=fused)
    run(optimizer, params, [1])
    with torch.no_grad():
        params[0].fill_(7.0)
    optimizer.param_groups[0]["lr"] = 0.0
    run(optimizer, params, [2])
    assert (params[0] == 7.0).all()
