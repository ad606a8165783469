"""Master weights stored as bfloat16 parameters and their remainders."""

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron_support import (
    AWARE,
    BF16,
    F32,
    decouple_grads,
    devices,
    every_class,
    make_params,
    masters,
    run,
)
from optimizers import assert_same, contents
from support import assert_equal_bits
from torch import Tensor

from emerging_optimizers import _states, _weights, megatron
from emerging_optimizers._base import members_of
from emerging_optimizers._hooks import after_update, before_update
from emerging_optimizers._native import native
from emerging_optimizers._norms import KEEP_NORMS
from emerging_optimizers.megatron import FusedAdam, merge_master, split_master

pytestmark = [
    pytest.mark.on_devices("tests-cuda"),
    pytest.mark.usefixtures("_no_other_device"),
]


def check_split(bits: "np.ndarray[Any, np.dtype[np.uint32]]", shape: Any = -1) -> None:
    """Split float32 numbers with these bits, and merge them again."""
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    whole = np.where(is_nan, np.uint32(0x7FC00000), bits)
    high, low = whole >> 16, whole & 0xFFFF
    rounded = high + (low >= 0x8000)
    assert (rounded <= 0xFFFF).all()
    master = torch.from_numpy(bits.view(np.float32).copy()).reshape(shape)
    param = torch.empty_like(master, dtype=BF16)
    remainder = torch.empty_like(master, dtype=torch.int16)
    split_master(master, param, remainder)
    assert_bits = np.testing.assert_array_equal
    assert_bits(param.view(torch.int16).numpy().view(np.uint16).reshape(-1), rounded)
    assert_bits(remainder.numpy().view(np.uint16).reshape(-1), low)
    again = merge_master(param, remainder)
    assert again.shape == master.shape
    assert_bits(again.numpy().view(np.uint32).reshape(-1), whole)


def test_remainders_of_every_exponent() -> None:
    """Both signs and all exponents, with ties and their neighbours."""
    low = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF]
    high = [0, 1, 2, 0x3F, 0x40, 0x7E, 0x7F]
    mantissas = [h << 16 | x for h in high for x in low]
    exponents = np.arange(512, dtype=np.uint32) << np.uint32(23)
    check_split((exponents[:, None] | np.array(mantissas, dtype=np.uint32)).reshape(-1))


@given(st.lists(st.integers(0, 2**32 - 1), max_size=40))
def test_remainders_of_any_bits(bits: list[int]) -> None:
    check_split(np.array(bits, dtype=np.uint32))


@pytest.mark.parametrize("shape", [(), (0,), (2, 3, 4)])
def test_remainders_of_any_shape(shape: tuple[int, ...]) -> None:
    count = int(np.prod(shape))
    check_split(np.arange(0x3F807FF0, 0x3F807FF0 + count, dtype=np.uint32), shape)


def test_parameters_are_rounded_to_nearest_with_ties_away_from_zero() -> None:
    master = torch.tensor([1.00390625, -1.00390625, 3.4e38, -0.0, 1e-45])
    param, remainder = torch.empty(5, dtype=BF16), torch.empty(5, dtype=torch.int16)
    split_master(master, param, remainder)
    wanted = torch.tensor([1.0078125, -1.0078125, torch.inf, -0.0, 0.0], dtype=BF16)
    assert_equal_bits(param, wanted, "parameter")
    assert_equal_bits(merge_master(param, remainder), master, "master")


@devices
@every_class
@pytest.mark.parametrize("fused", [None, False], ids=["native", "fallback"])
@pytest.mark.parametrize("dtype", [F32, BF16, torch.float64], ids=str)
def test_remainders_match_masters(
    cls: Any, fused: bool | None, dtype: torch.dtype, device: str
) -> None:
    def make(store: bool) -> Any:
        # On a GPU, float64 gradients with remainders take the fallback: compare with that.
        is_plain = dtype == torch.float64 and device != "cpu" and not store
        groups = [
            {"params": params, "fused": False if is_plain else fused}
            for params in (make_params(device=device), make_params(device=device, sizes=(9, 80)))
        ]
        return cls(groups, store_param_remainders=store, **AWARE)

    whole, stored = make(False), make(True)
    run(whole, range(1, 5), dtype)
    run(stored, range(1, 5), dtype)
    assert_same(masters(stored), masters(whole))
    for param, state in stored.state.items():
        assert state["master_param"].dtype == torch.int16
        other = torch.empty_like(param), torch.empty_like(state["master_param"])
        split_master(merge_master(param, state["master_param"]), *other)
        assert_same([param, state["master_param"].view(BF16)], [other[0], other[1].view(BF16)])
    assert {state["step"].item() for state in stored.state.values()} == {4}


@devices
@pytest.mark.skipif(native is None, reason="no native kernels")
def test_the_native_step_creates_no_masters(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(_weights, "merge_master")
    monkeypatch.delattr(_weights, "split_master")
    for use_decoupled_grad in (True, False):
        options = {**AWARE, "use_decoupled_grad": use_decoupled_grad}
        optimizer = FusedAdam(make_params(device=device), store_param_remainders=True, **options)
        optimizer.param_groups[0]["fused"] = True
        for param in optimizer.param_groups[0]["params"]:
            param.grad = torch.ones_like(param)
        run(optimizer, [1, 2])
        assert {state["step"].item() for state in optimizer.state.values()} == {2}


@pytest.mark.parametrize("fused", [None, False], ids=["native", "fallback"])
def test_lr_0_keeps_parameters_and_remainders(fused: bool | None) -> None:
    """With a learning rate of 0, parameters and remainders are unchanged, NaNs included."""
    optimizer = FusedAdam(make_params(sizes=[40]), store_param_remainders=True, **AWARE)
    run(optimizer, [1])
    (param,) = optimizer.param_groups[0]["params"]
    remainder = optimizer.state[param]["master_param"]
    param.view(torch.int16)[:2] = torch.tensor([0x7FC1, -1])
    remainder[:2] = torch.tensor([3, -5])
    before = param.clone(), remainder.clone()
    optimizer.param_groups[0].update(lr=0.0, fused=fused)
    run(optimizer, [2])
    assert torch.equal(param.view(torch.int16), before[0].view(torch.int16))
    assert torch.equal(remainder, before[1])


def test_a_wrong_gradient_changes_nothing() -> None:
    params = make_params(sizes=(3, 4))
    optimizer = FusedAdam(params, store_param_remainders=True, **AWARE)
    run(optimizer, [1])
    before = contents(optimizer)
    decouple_grads(params, 2)
    params[1].decoupled_grad = torch.ones(5)  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match=r"shape \(4,\) but its gradient has shape \(5,\)"):
        optimizer.step()
    assert_same([t.float() for t in contents(optimizer)], [t.float() for t in before])


@devices
def test_capturable(device: str) -> None:
    whole, stored = (
        FusedAdam(
            make_params(device=device), capturable=True, store_param_remainders=store, **AWARE
        )
        for store in (False, True)
    )
    run(whole, [1, 2, 3])
    run(stored, [1, 2, 3])
    assert_same(masters(stored), masters(whole))
    assert {state["step"].device.type for state in stored.state.values()} == {device}


def make_normalized(store_param_remainders: bool, fused: bool | None, sizes: Any) -> Any:
    groups = [{"params": make_params(sizes=sizes), "fused": fused}]
    return megatron.LaProp(
        groups,
        lr=0.1,
        frob_normalize=True,
        master_weights=True,
        use_decoupled_grad=True,
        store_param_remainders=store_param_remainders,
    )


@pytest.mark.parametrize("fused", [None, False], ids=["native", "fallback"])
def test_laprop_keeps_the_norms_of_split_masters(fused: bool | None) -> None:
    whole, stored = (make_normalized(store, fused, (50, 60)) for store in (False, True))
    norms = [master.float().norm() for master in make_params(sizes=(50, 60))]
    for optimizer in (whole, stored):
        run(optimizer, [1, 2, 3])
    assert_same(masters(stored), masters(whole))
    for master, norm in zip(masters(stored), norms, strict=True):
        torch.testing.assert_close(master.norm(), norm)


@pytest.mark.parametrize("fused", [None, False], ids=["native", "fallback"])
def test_a_remainder_is_checked_once_a_step(
    fused: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = make_normalized(True, fused, [40] * 3)
    run(optimizer, [1])
    checked = []
    check = _states.check_tensor

    def recorded(*arguments: Any) -> None:
        checked.append(arguments[1])
        check(*arguments)

    monkeypatch.setattr(_states, "check_tensor", recorded)
    run(optimizer, [2])
    assert checked == ["master_param"] * 3


def test_laprop_merges_few_masters_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = make_normalized(True, None, [40] * 10)
    run(optimizer, [1])
    alive: set[int] = set()
    most = 0
    merge = _weights.merge_master

    def measured(*arguments: Any) -> Tensor:
        nonlocal most
        master = merge(*arguments)
        alive.add(id(master))
        weakref.finalize(master, alive.discard, id(master))
        most = max(most, len(alive))
        return master

    monkeypatch.setattr(_weights, "merge_master", measured)
    run(optimizer, [2])
    assert 0 < most <= 2


def test_scaling_by_1_keeps_the_bits() -> None:
    optimizer = make_normalized(True, None, [3])
    run(optimizer, [1])
    (group,) = optimizer.param_groups
    (param,) = group["params"]
    remainder = optimizer.state[param]["master_param"]
    param.view(torch.int16).copy_(torch.tensor([0x7FC1, -1, 0x7F80]))
    remainder.copy_(torch.tensor([3, -5, 3]))
    before = param.clone(), remainder.clone()
    members = members_of(optimizer, group)
    around = KEEP_NORMS, members
    after_update(*around, before_update(*around))
    assert torch.equal(param.view(torch.int16), before[0].view(torch.int16))
    assert torch.equal(remainder, before[1])


@pytest.mark.parametrize("fused", [None, False], ids=["native", "fallback"])
@pytest.mark.parametrize("cls", [FusedAdam, megatron.LaProp])
@pytest.mark.parametrize("store", [False, True])
def test_storage_can_change_between_steps(cls: Any, store: bool, fused: bool | None) -> None:
    optimizer, other = (
        cls([{"params": make_params(), "fused": fused}], store_param_remainders=store, **AWARE)
        for _ in range(2)
    )
    for each in (optimizer, other):
        for group in each.param_groups:
            if "frob_normalize" in group:
                group["frob_normalize"] = True
        run(each, [1])
    optimizer.param_groups[0]["store_param_remainders"] = not store
    for each in (optimizer, other):
        run(each, [2, 3])
    stored = torch.float32 if store else torch.int16
    assert {state["master_param"].dtype for state in optimizer.state.values()} == {stored}
    assert_same(masters(optimizer), masters(other))


@every_class
def test_split_means_the_same(cls: Any) -> None:
    optimizer = cls(make_params(), **{**AWARE, "master_weights": "split"})
    other = cls(make_params(), store_param_remainders=True, **AWARE)
    for each in (optimizer, other):
        run(each, [1, 2])
        each.initialize_state(each.param_groups[0]["params"][0], True)
    assert_same([t.float() for t in contents(optimizer)], [t.float() for t in contents(other)])
    assert all(state["master_param"].dtype == torch.int16 for state in optimizer.state.values())
    # A float32 parameter is its own master.
    (param,) = params = make_params(F32, sizes=[3])
    optimizer = cls(params, **{**AWARE, "master_weights": "split"})
    run(optimizer, [1])
    assert optimizer.state[param]["master_param"] is param
