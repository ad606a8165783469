"""Whether ``GradScaler`` unscales gradients before a step, or the step does it."""

import copy
import io
import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from optimizers import (
    MEGATRON,
    Setup,
    assert_same,
    contents,
    every_optimizer,
    make_grads,
    make_params,
)
from processes import launch
from torch import Tensor, nn

from emerging_optimizers import AdamW, Lion, ScalarOptimizer, megatron

SCALE = 2.0**10


@pytest.fixture(autouse=True)
def _on_cpu(_default_device: None) -> Iterator[None]:
    with torch.device("cpu"):
        yield


def handles_scaling(optimizer: torch.optim.Optimizer) -> bool:
    return getattr(optimizer, "_step_supports_amp_scaling", False)


# ---- what an optimizer declares ------------------------------------------------------------------


@every_optimizer
@pytest.mark.parametrize("capturable", [False, True])
def test_is_declared_with_fused_only(setup: Setup, capturable: bool) -> None:
    def declared(**options: Any) -> bool:
        return handles_scaling(setup.make(make_params(), capturable=capturable, **options))

    assert not declared()
    assert not declared(fused=None)
    assert not declared(fused=False)
    assert declared(fused=True)
    assert not handles_scaling(setup.cls.__new__(setup.cls))


@pytest.mark.parametrize("cls", MEGATRON.values())
def test_megatron_declares_it_with_capturable_too(cls: type[ScalarOptimizer]) -> None:
    for capturable in (False, True):
        optimizer = cls(make_params(), lr=0.1, capturable=capturable)
        assert handles_scaling(optimizer) == capturable
        optimizer.param_groups[0]["fused"] = True
        assert handles_scaling(optimizer)


@pytest.mark.parametrize("fused", [None, False, True])
def test_is_kept_by_copies(fused: bool | None) -> None:
    optimizer = AdamW(make_params(), fused=fused)
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    for other in (
        copy.deepcopy(optimizer),
        copy.copy(optimizer),
        pickle.loads(pickle.dumps(optimizer)),
        torch.load(file, weights_only=False),
    ):
        assert handles_scaling(other) == (fused is True)


def test_is_kept_on_load() -> None:
    saved = {
        fused: cls(make_params(), fused=fused).state_dict()
        for cls in (AdamW, torch.optim.AdamW)
        for fused in (None, True)
    }
    for fused in (None, True):
        optimizer = AdamW(make_params(), fused=fused)
        for state_dict in saved.values():
            optimizer.load_state_dict(state_dict)
            assert handles_scaling(optimizer) == (fused is True)


def test_follows_the_groups() -> None:
    first, second = make_params()
    optimizer = Lion([first], fused=True)
    assert handles_scaling(optimizer)
    optimizer.add_param_group({"params": [second], "fused": None})
    assert not handles_scaling(optimizer)
    optimizer.param_groups[1]["fused"] = True
    assert handles_scaling(optimizer)
    optimizer.param_groups[0]["fused"] = 1  # truthy, but not True
    assert not handles_scaling(optimizer)
    del optimizer.param_groups[0]["fused"]
    assert not handles_scaling(optimizer)
    optimizer.param_groups.clear()
    assert not handles_scaling(optimizer)


# ---- torch.amp.GradScaler ------------------------------------------------------------------------


def _train(optimizer: torch.optim.Optimizer, overflows: dict[int, float]) -> Iterator[list[Tensor]]:
    """Train with a scaler; yield the gradients that a step hook sees in each step."""
    seen: list[Tensor] = []

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        seen.extend(p.grad.clone() for p in optimizer.param_groups[0]["params"])

    optimizer.register_step_pre_hook(look)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    params = optimizer.param_groups[0]["params"]
    for step in range(1, 6):
        terms = [(p * g).sum() for p, g in zip(params, make_grads(params, step), strict=True)]
        scaler.scale(torch.stack(terms).sum()).backward()
        params[1].grad.view(-1)[3] += overflows.get(step, 0.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        yield seen
        seen.clear()


@every_optimizer
def test_the_scaler_unscales_and_skips(setup: Setup, fused: bool | None) -> None:
    """Without fused=True, hooks see unscaled gradients, and do not run for a skipped step."""
    params = make_params()
    others = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer = setup.make(params, fused=fused)
    other = torch.optim.AdamW(others)
    runs = _train(optimizer, {2: math.inf, 4: math.nan}), _train(other, {2: math.inf, 4: math.nan})
    for step, (got, wanted) in enumerate(zip(*runs, strict=True), 1):
        assert len(got) == (0 if step in (2, 4) else 2)
        assert_same(got, wanted, f"step {step}")
    assert {state["step"].item() for state in optimizer.state.values()} == {3}
    if setup.cls is AdamW:
        torch.testing.assert_close(params, others)


@every_optimizer
def test_a_fused_step_unscales_and_skips(setup: Setup) -> None:
    params, others = make_params(), make_params()
    optimizer, other = setup.make(params, fused=True), setup.make(others)
    before = contents(optimizer)
    for step, seen in enumerate(_train(optimizer, {3: math.inf}), 1):
        scale = SCALE if step <= 3 else SCALE / 2
        if step == 3:
            assert_same(contents(optimizer), before)
        else:
            grads = make_grads(others, step)
            assert_same(seen, [grad * scale for grad in grads])
            for p, grad in zip(others, grads, strict=True):
                p.grad = grad
            other.step()
        before = contents(optimizer)
    torch.testing.assert_close(contents(optimizer), contents(other))


@pytest.mark.parametrize("capturable", [False, True])
def test_megatron_with_a_scaler(capturable: bool) -> None:
    params, others = make_params(), make_params()
    optimizer = megatron.FusedAdam(params, weight_decay=0.01, capturable=capturable)
    other = torch.optim.AdamW(others)
    # Hooks also run for a step that skips itself.
    counts = [len(seen) for seen in _train(optimizer, {2: math.inf})]
    assert counts == ([2] * 5 if capturable else [2, 0, 2, 2, 2])
    for _ in _train(other, {2: math.inf}):
        pass
    torch.testing.assert_close(params, others)
    assert int(optimizer.param_groups[0]["step"]) == 4


# ---- FSDP1 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_fsdp1(use_orig_params: bool, tmp_path: Path) -> None:
    launch("amp_workers.train_with_fsdp1", 2, tmp_path, str(use_orig_params))
