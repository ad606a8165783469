"""LaProp with `frob_normalize`: a step keeps the norm of each parameter."""

import logging
import math
from typing import Any

import pytest
import torch
from optimizers import assert_same, make_params, run
from support import assert_equal_bits, every_half

from emerging_optimizers import AdamW, LaProp, _fallback_step
from emerging_optimizers._native import native
from emerging_optimizers._norms import KEEP_NORMS

pytestmark = pytest.mark.on_devices("tests-optimizers")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_frob_normalize(
    dtype: torch.dtype, fused: bool | None, caplog: pytest.LogCaptureFixture
) -> None:
    params = [*make_params(dtype=dtype), torch.nn.Parameter(torch.zeros(3, dtype=dtype))]
    norms = [p.detach().norm().item() for p in params]
    before = [p.detach().clone() for p in params]
    optimizer = LaProp(params, lr=0.1, frob_normalize=True, fused=fused)
    assert not caplog.records
    run(optimizer, params, range(1, 4))
    for param, norm, old in zip(params[:2], norms, before, strict=False):
        assert param.detach().norm().item() == pytest.approx(norm, rel=4 * torch.finfo(dtype).eps)
        assert not torch.equal(param, old)
    assert not params[2].any()
    LaProp(params, frob_normalize=True, weight_decay=0.1)
    assert [r.levelno for r in caplog.records] == [logging.ERROR]
    groups = [{"params": params[:1]}, {"params": params[1:], "frob_normalize": True}]
    LaProp(groups, weight_decay=0.1)
    assert [r.levelno for r in caplog.records] == 2 * [logging.ERROR]


@every_half
def test_frob_normalize_of_masters(dtype: torch.dtype, fused: bool | None) -> None:
    params = make_params(dtype=dtype)
    params.append(torch.nn.Parameter(torch.full((3,), math.nan, dtype=dtype)))
    optimizer = LaProp(params, lr=0.1, frob_normalize=True, master_weights=True, fused=fused)
    norms = [p.detach().double().norm().item() for p in params[:2]]
    run(optimizer, params, range(1, 4))
    for param, norm in zip(params[:2], norms, strict=False):
        master = optimizer.state[param]["master_param"]
        assert master.double().norm().item() == pytest.approx(norm, rel=1e-6)
        assert_equal_bits(param.detach(), master.to(dtype), "parameter")
    assert params[2].isnan().all()


def test_frob_normalize_natively(monkeypatch: pytest.MonkeyPatch) -> None:
    if native is None:
        pytest.skip("no native kernels")
    params, others = make_params(), make_params()
    run(LaProp(others, lr=0.1, frob_normalize=True, fused=False), others, [1, 2, 3])
    monkeypatch.setattr(_fallback_step, "_update", None)
    run(LaProp(params, lr=0.1, frob_normalize=True, fused=True), params, [1, 2, 3])
    torch.testing.assert_close(params, others, rtol=1e-6, atol=1e-7)


def test_master_of_a_parameter_that_became_float32(fused: bool | None) -> None:
    params = make_params(dtype=torch.bfloat16)
    optimizer = LaProp(params, lr=0.1, master_weights=True, frob_normalize=True, fused=fused)
    run(optimizer, params, [1])
    for param in params:
        param.data = param.data.float()
    before = [p.detach().clone() for p in params]
    run(optimizer, params, [2])
    assert not any(torch.equal(p, old) for p, old in zip(params, before, strict=True))


class NormalizedAdamW(AdamW):
    """Another rule with LaProp's hook."""

    _hook = KEEP_NORMS

    def __init__(self, params: Any, frob_normalize: bool = True, **options: Any) -> None:
        super().__init__(params, lr=0.1, weight_decay=0.1, **options)
        for group in (self.defaults, *self.param_groups):
            group["frob_normalize"] = frob_normalize


def test_the_hook_fits_any_rule(fused: bool | None) -> None:
    params, others = make_params(), make_params()
    optimizer, other = NormalizedAdamW(params, fused=fused), AdamW(others, 0.1, weight_decay=0.1)
    for step in (1, 2, 3):
        norms = [p.detach().double().norm() for p in others]
        run(optimizer, params, [step])
        run(other, others, [step])
        with torch.no_grad():
            for param, norm in zip(others, norms, strict=True):
                param.mul_(norm / param.double().norm())
    torch.testing.assert_close(params, others, rtol=1e-6, atol=1e-7)


def test_a_group_without_the_flag_is_not_normalized(fused: bool | None) -> None:
    params, others = make_params(), make_params()
    optimizer = NormalizedAdamW(params, frob_normalize=False, fused=fused)
    run(optimizer, params, [1, 2])
    run(AdamW(others, 0.1, weight_decay=0.1, fused=fused), others, [1, 2])
    assert_same([p.detach() for p in params], [p.detach() for p in others])
