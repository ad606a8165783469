"""Scalar states of optimizers: saved, loaded, and set between steps."""

from __future__ import annotations

import copy
import functools
import io
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron_support
import numpy as np
import pytest
import torch
from optimizers import assert_same, contents, make_params, run, set_grads
from processes import launch
from scalar_rules import (
    Float64NAdam,
    MegatronNAdam,
    ScalarAverages,
    ScalarNAdam,
    ScalarPhases,
    continue_alike,
    inference_tensor,
    products,
    scalar,
    trained,
    without_memory,
)
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("_no_other_device")
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
every_class = pytest.mark.parametrize("cls", [ScalarNAdam, ScalarAverages, ScalarPhases])


@every_class
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict", "load twice"])
def test_copies_continue(cls: Any, how: str, fused: bool | None) -> None:
    options: dict[str, Any] = {"fused": fused, "weight_decay": 0.1, "master_weights": True}
    optimizer, params = trained(cls, dtype=BF16, **options)
    if how == "deepcopy":
        other = copy.deepcopy(optimizer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(optimizer))
    else:
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        other = cls([nn.Parameter(p.detach().clone()) for p in params], **options)
        for _ in range(2 if how == "load twice" else 1):
            buffer.seek(0)
            other.load_state_dict(torch.load(buffer, weights_only=True))
    for state, wanted in zip(other.state.values(), optimizer.state.values(), strict=True):
        for name in cls._rule.scalar_states:
            assert (state[name].dtype, state[name].shape) == (F32, ())
            assert not state[name]._is_view()
            assert state[name].data_ptr() != wanted[name].data_ptr()
    continue_alike(optimizer, other)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_state_dicts_of_torch(dtype: torch.dtype, fused: bool | None) -> None:
    theirs = make_params(dtype=dtype)
    other = torch.optim.NAdam(theirs, momentum_decay=0.01)
    run(other, theirs, [1, 2, 3])
    wanted = [state["mu_product"].item() for state in other.state.values()]
    params = [nn.Parameter(p.detach().clone()) for p in theirs]
    optimizer = ScalarNAdam(params, lr=0.1, fused=fused)
    optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    assert products(optimizer) == wanted
    assert {state["mu_product"].dtype for state in optimizer.state.values()} == {F32}
    assert optimizer.param_groups[0]["momentum_decay"] == 0.01
    assert optimizer.param_groups[0]["lr"] == 2e-3
    run(optimizer, params, [4])
    run(other, theirs, [4])
    tolerance = 1e-5 if dtype == F32 else 2e-2
    torch.testing.assert_close(params, theirs, rtol=tolerance, atol=tolerance)
    # And back.
    torch.optim.NAdam(theirs).load_state_dict(optimizer.state_dict())


ACCEPTED: dict[str, Any] = {
    "a float": 0.5,
    "an int": 2,
    "numpy's float64": np.float64(0.5),
    "numpy's float32": np.float32(0.5),
    "one element": lambda: torch.full((1,), 0.5),
    "float64": lambda: scalar(0.1, dtype=F64),
    "bfloat16": lambda: scalar(0.5, dtype=BF16),
    "beyond float32": 1e300,
    "float64 beyond float32": lambda: scalar(-1e300, dtype=F64),
    "infinity": math.inf,
    "a NaN": math.nan,
    "a parameter": lambda: nn.Parameter(scalar(0.5)),
    "a view": lambda: torch.full((3,), 0.5)[1],
    "copy on write": lambda: torch._lazy_clone(scalar(0.5)),
    "an int beyond int64": 10**30,
}
every_accepted = pytest.mark.parametrize("kind", ACCEPTED)


def accepted(kind: str) -> tuple[Any, float]:
    value = ACCEPTED[kind]() if callable(ACCEPTED[kind]) else ACCEPTED[kind]
    number = value.item() if isinstance(value, Tensor) else float(value)
    with np.errstate(over="ignore"):
        return value, float(np.float32(number))


@every_accepted
@pytest.mark.parametrize("how", ["load", "set"])
def test_other_kinds_of_numbers(kind: str, how: str, fused: bool | None) -> None:
    optimizer, params = trained(fused=fused)
    value, number = accepted(kind)
    if how == "load":
        state_dict = optimizer.state_dict()
        state_dict["state"][1] = {**state_dict["state"][1], "mu_product": value}
        optimizer.load_state_dict(state_dict)
        loaded = optimizer.state[params[1]]["mu_product"]
        assert (loaded.dtype, loaded.shape) == (F32, ())
        np.testing.assert_equal(loaded.item(), number)
    else:
        optimizer.state[params[1]]["mu_product"] = value
    run(optimizer, params, [4])
    state = optimizer.state[params[1]]["mu_product"]
    assert (state.dtype, state.numel()) == (F32, 1)
    np.testing.assert_equal(state.item(), float(np.float32(number * Float64NAdam(()).mu(4))))


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "a bool": (True, TypeError, "{}: state 'mu_product' must be a number, not bool"),
    "text": ("0.5", TypeError, "{}: state 'mu_product' must be a number, not str"),
    "a list": ([0.5], TypeError, "{}: state 'mu_product' must be a number, not list"),
    "an int beyond a float": (
        10**400,
        ValueError,
        "{}: state 'mu_product' is an int beyond the range of a float",
    ),
    "two elements": (
        torch.ones(2),
        ValueError,
        "{}: state 'mu_product' has 2 elements; expected 1",
    ),
    "no elements": (
        torch.ones(0),
        ValueError,
        "{}: state 'mu_product' has 0 elements; expected 1",
    ),
    "int64": (
        torch.tensor(1),
        TypeError,
        "{}: state 'mu_product' must be one floating-point number, not a Tensor of dtype"
        " torch.int64 and layout torch.strided",
    ),
    "sparse": (
        torch.ones(()).to_sparse(),
        TypeError,
        "{}: state 'mu_product' must be one floating-point number, not a Tensor of dtype"
        " torch.float32 and layout torch.sparse_coo",
    ),
    "meta": (
        torch.ones((), device="meta"),
        ValueError,
        "{}: state 'mu_product' is a tensor without a value (of the meta device, or of a"
        " FakeTensorMode), but the parameter has values",
    ),
    "none": (None, ValueError, "{} has no 'mu_product'; it has 'step', 'exp_avg', 'exp_avg_sq'"),
    "empty": ({}, ValueError, "{} has no 'mu_product'; it has 'step', 'exp_avg', 'exp_avg_sq'"),
    "inference": (
        inference_tensor,
        RuntimeError,
        "{}: state 'mu_product' is an inference tensor, which cannot be modified outside of"
        " inference mode",
    ),
    "no memory": (
        without_memory,
        ValueError,
        "{}: state 'mu_product' has no memory: its storage was resized to 0",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("how", ["load", "set"])
def test_refused_states(kind: str, how: str, fused: bool | None) -> None:
    optimizer, params = trained(fused=fused)
    value, error, text = REFUSED[kind]
    value = value() if callable(value) else value
    before = contents(optimizer)
    name = "param_groups[0]['params'][1]"
    if how == "load":
        state_dict = optimizer.state_dict()
        state_dict["state"][1] = {**state_dict["state"][1], "mu_product": value}
        subject = f"the loaded state of {name}"
    else:
        kept = optimizer.state[params[1]]["mu_product"]
        optimizer.state[params[1]]["mu_product"] = value
        subject = name if ":" in text else f"the state of {name}"
    act = functools.partial(run, optimizer, params, [4])
    if how == "load":
        act = functools.partial(optimizer.load_state_dict, state_dict)
    with pytest.raises(error, match=f"^{re.escape(text.format(subject))}"):
        act()
    if how == "set":
        optimizer.state[params[1]]["mu_product"] = kept
    assert_same(contents(optimizer), before)


def test_incomplete_states(fused: bool | None) -> None:
    optimizer, _ = trained(fused=fused)
    before = contents(optimizer)
    for absent, present, missing in [
        (["mu_product"], "'step', 'exp_avg', 'exp_avg_sq'", "has no 'mu_product'; it has"),
        (["step", "exp_avg", "exp_avg_sq"], "'mu_product'", "has no 'exp_avg'; it has"),
        (["step"], "has no 'step', and neither has its group", ""),
    ]:
        state_dict = copy.deepcopy(optimizer.state_dict())
        for name in absent:
            del state_dict["state"][1][name]
        with pytest.raises(ValueError, match=f"{missing}.*{present}"):
            optimizer.load_state_dict(state_dict)
    assert_same(contents(optimizer), before)


def test_states_of_before_a_scalar_state_was_added(fused: bool | None) -> None:
    optimizer, params = trained(fused=fused)
    state_dict = copy.deepcopy(optimizer.state_dict())
    for state in state_dict["state"].values():
        del state["mu_product"]
    text = r"has no 'mu_product'.*; add a number \(a new optimizer starts with 1\)$"
    with pytest.raises(ValueError, match=text):
        optimizer.load_state_dict(state_dict)
    for state in state_dict["state"].values():
        state["mu_product"] = 0.25
    optimizer.load_state_dict(state_dict)
    assert products(optimizer) == [0.25] * len(params)


@pytest.mark.parametrize("how", ["load", "set", "set across groups"])
def test_one_tensor_for_all(how: str, fused: bool | None) -> None:
    params = make_params([(3,), (4,), (5,)])
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    optimizer = ScalarNAdam(groups if how == "set across groups" else params, fused=fused)
    run(optimizer, params, [1, 2])
    other = copy.deepcopy(optimizer)
    shared = optimizer.state[params[0]]["mu_product"]
    if how == "load":
        state_dict = optimizer.state_dict()
        for i in (1, 2):
            state_dict["state"][i]["mu_product"] = shared
        optimizer.load_state_dict(state_dict)
    else:
        for param in params:
            optimizer.state[param]["mu_product"] = shared
    continue_alike(optimizer, other)
    addresses = {optimizer.state[param]["mu_product"].data_ptr() for param in params}
    assert len(addresses) == 3


@pytest.mark.parametrize("key", ["step", "mu_product"])
def test_loaded_from_one_tensor_without_a_gradient(key: str, fused: bool | None) -> None:
    optimizer, params = trained(fused=fused)
    state_dict = optimizer.state_dict()
    for state in state_dict["state"].values():
        state[key] = state_dict["state"][0][key]
    optimizer.load_state_dict(state_dict)
    before = [optimizer.state[param][key].item() for param in params]
    set_grads(params, 4)
    params[1].grad = None
    optimizer.step()
    after = [optimizer.state[param][key].item() for param in params]
    assert after[0] != before[0]
    assert after[1] == before[1]


def test_the_counter_as_a_scalar_state(fused: bool | None) -> None:
    optimizer, params = trained(fused=fused)
    optimizer.state[params[1]]["mu_product"] = optimizer.state[params[1]]["step"]
    run(optimizer, params, [4])
    state = optimizer.state[params[1]]
    assert state["step"].item() == 4
    assert state["mu_product"].item() == np.float32(3 * Float64NAdam(()).mu(4))


@pytest.mark.parametrize(
    ("place", "text"),
    [
        (lambda o, p: o.state[p[1]]["exp_avg"][0, 0], "state 'exp_avg' of .*1]"),
        (lambda o, p: o.state[p[0]]["exp_avg_sq"][1, 1], "state 'exp_avg_sq' of .*0]"),
        (lambda o, p: p[0].data[1, 1], r"param_groups\[0\]\['params'\]\[0\]"),
        (lambda o, p: p[1].grad[0, 1], "the gradient of .*1]"),
    ],
)
def test_shared_memory(place: Callable[..., Tensor], text: str, fused: bool | None) -> None:
    optimizer, params = trained(fused=fused)
    set_grads(params, 4)
    optimizer.state[params[1]]["mu_product"] = place(optimizer, params)
    before = contents(optimizer)
    with pytest.raises(ValueError, match="shares memory with") as caught:
        optimizer.step()
    assert re.search(text, str(caught.value))
    assert "state 'mu_product' of param_groups[0]['params'][1]" in str(caught.value)
    assert_same(contents(optimizer), before)


def test_distributed_checkpoints(tmp_path: Path) -> None:
    launch("scalar_workers.train_and_save", 2, tmp_path)
    for world_size in (2, 1):
        launch("scalar_workers.load_and_continue", world_size, tmp_path)


# ---- Megatron-Core -------------------------------------------------------------------------------


def make_megatron(fused: bool | None, **options: Any) -> tuple[Any, list[Any]]:
    params = megatron_support.make_params()
    arguments = {**megatron_support.AWARE, "fused": fused, **options}
    return MegatronNAdam(params, **arguments), params


@pytest.mark.parametrize("store_param_remainders", [False, True], ids=["masters", "remainders"])
def test_megatron(fused: bool | None, store_param_remainders: bool) -> None:
    options: dict[str, Any] = {"store_param_remainders": store_param_remainders}
    optimizer, params = make_megatron(fused, exp_avg_dtype=BF16, **options)
    # A parameter without a gradient has a state, counts its steps, and keeps its product.
    megatron_support.run(optimizer, [1])
    megatron_support.decouple_grads(params, 2)
    params[1].decoupled_grad = None
    optimizer.step()
    oracle = Float64NAdam(())
    once = np.float32(oracle.mu(1))
    twice = np.float32(float(once) * oracle.mu(2))
    assert products(optimizer) == [twice, once, twice, twice]
    assert optimizer.param_groups[0]["step"] == 2
    assert {optimizer.state[param]["step"].item() for param in params} == {2}
    state_dict = pickle.loads(pickle.dumps(optimizer.state_dict()))
    assert "mu_product" not in state_dict["param_groups"][0]["state_dtype"]
    assert state_dict["state"][1]["mu_product"] == once
    other, others = make_megatron(fused, exp_avg_dtype=BF16, **options)
    for param, same in zip(params, others, strict=True):
        same.copy_(param)
    other.load_state_dict(state_dict)
    for step in (3, 4):
        assert products(other) == products(optimizer)
        megatron_support.run(optimizer, [step])
        megatron_support.run(other, [step])
        assert_same(others, params)


def test_megatron_reads_and_writes_them(fused: bool | None) -> None:
    optimizer, params = make_megatron(fused)
    optimizer.initialize_state(params[0])
    assert optimizer.get_unscaled_state(params[0], "mu_product").item() == 1.0
    megatron_support.run(optimizer, [1, 2])
    other, others = make_megatron(fused)
    other.param_groups[0]["step"] = 2
    for param, same in zip(params, others, strict=True):
        same.copy_(param)
        for name in optimizer.state[param]:
            other.set_scaled_state(same, name, optimizer.get_unscaled_state(param, name))
    assert products(other) == products(optimizer)
    with pytest.raises(ValueError, match=r"'mu_product' has shape \(2,\); expected \(\)"):
        other.set_scaled_state(others[0], "mu_product", torch.ones(2))
    megatron_support.run(optimizer, [3])
    megatron_support.run(other, [3])
    assert_same(contents(other), contents(optimizer))
    optimizer.initialize_state(params[0])
    assert products(optimizer)[0] == 1.0
    assert products(optimizer)[1] < 0.2


def test_megatron_states_made_before_the_first_step(fused: bool | None) -> None:
    """Megatron-Core allocates an exp_avg and an exp_avg_sq to load into."""
    optimizer, params = make_megatron(fused)
    other, others = make_megatron(fused)
    for param in params:
        for name in ("exp_avg", "exp_avg_sq"):
            optimizer.state[param][name] = torch.zeros_like(param, dtype=F32)
    megatron_support.run(optimizer, [1])
    megatron_support.run(other, [1])
    assert products(optimizer) == products(other)
    assert_same(params, others)
