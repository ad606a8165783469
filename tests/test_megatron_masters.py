"""Float16 masters, each with a scale."""

import copy
import io
import pickle
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

from emerging_optimizers import megatron
from emerging_optimizers.megatron import FusedAdam, split_master

pytestmark = [
    pytest.mark.on_devices("tests-cuda"),
    pytest.mark.usefixtures("_no_other_device"),
]

F16, U8 = torch.float16, torch.uint8
SCALED: dict[str, Any] = {**AWARE, "master_weight_dtype": F16}
HALF = torch.finfo(F16).max / 2
paths = pytest.mark.parametrize("fused", [None, False], ids=["native", "fallback"])


def make(numbers: Any, **options: Any) -> tuple[Any, Tensor]:
    """An optimizer with one parameter, and the parameter; the master has these numbers."""
    values = torch.as_tensor(numbers, dtype=F32)
    param = values.to(BF16)
    optimizer = FusedAdam([param], **{**SCALED, **options})
    optimizer.initialize_state(param)
    optimizer.set_scaled_state(param, "master_param", values)
    return optimizer, param


def params_of(optimizer: Any) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def stored(optimizer: Any) -> list[Tensor]:
    return [optimizer.state[param]["master_param"] for param in params_of(optimizer)]


def set_masters(optimizer: Any, values: list[Tensor]) -> None:
    for param, numbers in zip(params_of(optimizer), values, strict=True):
        optimizer.set_scaled_state(param, "master_param", numbers)


def everything(optimizer: Any) -> list[Tensor]:
    """Copies of parameters and states, as stored and as read."""
    return [*contents(optimizer), *(master.clone() for master in masters(optimizer))]


def assert_rounded(found: Tensor, wanted: Tensor) -> None:
    """Check that numbers are as near to others as float16 can be, with the largest as 32752."""
    largest = wanted.abs().max() if wanted.numel() else 0.0
    # Half a unit in the last place, or of the smallest number; and the rounding of the product.
    limit = wanted.abs() * 2.0**-10.99 + largest / HALF * 2.0**-25 + 2.0**-127
    assert ((found - wanted).abs() <= limit).all()


# ---- one master ----------------------------------------------------------------------------------


def test_the_stored_numbers_use_half_of_the_range() -> None:
    optimizer, param = make([3.0, -6.0, 0.0, 1e-3])
    state = optimizer.state[param]
    assert sorted(state) == ["exp_avg", "exp_avg_sq", "master_param", "step"]
    assert state["master_param"].dtype == F16
    assert state["master_param"].tolist() == [16376.0, -32752.0, 0.0, 5.45703125]
    found = optimizer.get_unscaled_state(param, "master_param")
    assert found.dtype == F32
    assert_rounded(found, torch.tensor([3.0, -6.0, 0.0, 1e-3]))
    assert optimizer.get_unscaled_state(param, "master_param", True) is state["master_param"]


def check_storing(values: Tensor) -> None:
    """Store numbers, and then what is read: no bits change."""
    optimizer, param = make(values)
    kept = optimizer.state[param]["master_param"]
    before = kept.clone()
    found = optimizer.get_unscaled_state(param, "master_param")
    finite = values.isfinite()
    assert_rounded(found[finite], values[finite])
    assert torch.equal(found.isnan(), values.isnan())
    infinite = values.isinf()
    assert torch.equal(found[infinite], values[infinite])
    optimizer.set_scaled_state(param, "master_param", found)
    assert optimizer.state[param]["master_param"] is kept
    assert_equal_bits(kept, before, "stored")
    assert_equal_bits(optimizer.get_unscaled_state(param, "master_param"), found, "read")


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40))
def test_any_numbers_are_rounded_once(bits: list[int]) -> None:
    check_storing(torch.from_numpy(np.array(bits, dtype=np.uint32).view(np.float32)))


@pytest.mark.parametrize("exponent", range(-149, 128, 4))
def test_any_magnitude_is_rounded_once(exponent: int) -> None:
    values = torch.randn(500, generator=torch.Generator().manual_seed(exponent)).double()
    check_storing((values / values.abs().max() * 2.0**exponent).float())


@pytest.mark.parametrize("largest", [3.4028235e38, 1.0, 1.1754944e-38, 1e-45, 0.0])
def test_extreme_magnitudes(largest: float) -> None:
    check_storing(torch.tensor([largest, -largest, largest / 3, 0.0, -0.0]))


@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
@paths
def test_nans_and_infinities_stay_where_they_are(special: float, fused: bool | None) -> None:
    """In TransformerEngine, all of the parameter's masters become NaN."""
    check_storing(torch.tensor([special, 1.0, 2.0, -3.0]))
    optimizer, param = make([special, 1.0, 2.0, -3.0])
    other, same = make([0.0, 1.0, 2.0, -3.0])
    for each, p in ((optimizer, param), (other, same)):
        each.param_groups[0]["fused"] = fused
        p.decoupled_grad = torch.tensor([0.5, 0.5, -0.5, 0.25])
        each.step()
    assert_equal_bits(param[1:], same[1:], "parameter")
    found = [
        each.get_unscaled_state(p, "master_param")
        for each, p in ((optimizer, param), (other, same))
    ]
    assert_equal_bits(found[0][1:], found[1][1:], "master")
    assert not param[0].isfinite()
    assert not found[0][0].isfinite()


# ---- steps ---------------------------------------------------------------------------------------


@devices
@every_class
@paths
def test_a_step_is_that_of_float32_masters(cls: Any, fused: bool | None, device: str) -> None:
    """From the masters as they are stored; the results are rounded."""
    optimizer = cls([{"params": make_params(device=device), "fused": fused}], **SCALED)
    other = cls([{"params": make_params(device=device), "fused": fused}], **AWARE)
    optimizer._init_group(optimizer.param_groups[0])
    for step in range(1, 5):
        set_masters(other, masters(optimizer))
        kept = stored(optimizer)
        run(optimizer, [step])
        run(other, [step])
        assert_same(params_of(optimizer), params_of(other), "parameters")
        for found, wanted in zip(masters(optimizer), masters(other), strict=True):
            assert_rounded(found, wanted)
        assert all(a is b for a, b in zip(kept, stored(optimizer), strict=True))
        assert {master.dtype for master in kept} == {F16}
        for param, same in zip(params_of(optimizer), params_of(other), strict=True):
            assert optimizer.state[param].keys() == other.state[same].keys()
            for name in optimizer.state[param].keys() - {"master_param"}:
                assert_equal_bits(optimizer.state[param][name], other.state[same][name], name)


def test_follows_adam_in_float32() -> None:
    """As far as TransformerEngine's test demands, also through a state dict."""
    options: dict[str, Any] = {"lr": 1.0, "betas": (0.1, 0.25), "eps": 1e-8, "weight_decay": 0.0}
    sizes = ((96, 32), (96,), (32, 32), (32,))
    params = [param.mul_(0.023) for param in make_params(sizes=sizes)]
    exact = [p.float() for p in params]
    reference = torch.optim.Adam(exact, **options)
    generator = torch.Generator().manual_seed(0)
    saved = None
    for _ in range(2):
        optimizer = FusedAdam(
            params, master_weights=True, master_weight_dtype=F16, use_decoupled_grad=True, **options
        )
        if saved is not None:
            optimizer.load_state_dict(saved)
        for _ in range(7):
            for param, same in zip(params, exact, strict=True):
                same.grad = torch.rand(same.shape, generator=generator)
                param.decoupled_grad = same.grad.clone()  # type: ignore[attr-defined]
            reference.step()
            optimizer.step()
            torch.testing.assert_close(masters(optimizer), exact, rtol=2e-3, atol=2e-3)
            torch.testing.assert_close(params, [p.to(BF16) for p in exact])
        saved = optimizer.state_dict()


def test_small_updates_are_kept() -> None:
    """More than in bfloat16: updates of a 2000th of the weight."""
    optimizer, param = make(torch.ones(4), lr=2.0**-11, weight_decay=0.0, eps=0.0)
    for _ in range(64):
        param.decoupled_grad = torch.ones(4)
        optimizer.step()
    assert param.tolist() == [0.96875] * 4


@every_class
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_dtypes_of_parameters(cls: Any, dtype: torch.dtype) -> None:
    """A float32 parameter is its own master; all have the states that they have otherwise."""
    optimizer, other = cls(make_params(dtype), **SCALED), cls(make_params(dtype), **AWARE)
    run(optimizer, [1, 2, 3])
    run(other, [1, 2, 3])
    saved = optimizer.state_dict()["state"].values()
    found = zip(params_of(optimizer), params_of(other), masters(optimizer), saved, strict=True)
    for param, same, master, state in found:
        kept = optimizer.state[param]["master_param"]
        assert kept is param if dtype == F32 else kept.dtype == F16
        assert_equal_bits(state["master_param"], master, "saved")
        assert master.dtype == F32
        if dtype == F32:
            assert_equal_bits(param, same, "parameter")
        else:
            # Each step rounds the masters.
            torch.testing.assert_close(param, same, rtol=2e-2, atol=2e-3)


@every_class
@pytest.mark.parametrize("dtype", [F16, U8], ids=str)
@paths
def test_narrow_averages(cls: Any, dtype: torch.dtype, fused: bool | None) -> None:
    sizes = ((64, 96), (37,))
    options = {"exp_avg_dtype": dtype, "exp_avg_sq_dtype": dtype}
    optimizer = cls([{"params": make_params(sizes=sizes), "fused": fused}], **options, **SCALED)
    other = cls([{"params": make_params(sizes=sizes), "fused": fused}], **options, **AWARE)
    optimizer._init_group(optimizer.param_groups[0])
    set_masters(other, masters(optimizer))
    run(optimizer, [1])
    run(other, [1])
    for param, same in zip(params_of(optimizer), params_of(other), strict=True):
        for name in optimizer.state[param].keys() - {"master_param"}:
            assert_equal_bits(optimizer.state[param][name], other.state[same][name], name)
        assert_equal_bits(param, same, "parameter")
    for found, wanted in zip(masters(optimizer), masters(other), strict=True):
        assert_rounded(found, wanted)


def test_parameters_without_a_gradient_and_of_zeros() -> None:
    params = [torch.zeros(5, dtype=BF16), *make_params(sizes=(3, 0))]
    optimizer = FusedAdam(params, **SCALED)
    params[0].decoupled_grad = torch.zeros(5)  # type: ignore[attr-defined]
    before = [p.clone() for p in params]
    optimizer.step()
    optimizer.step()
    assert_same(params, before)
    for master, param in zip(masters(optimizer), before, strict=True):
        assert_rounded(master, param.float())
    assert {master.dtype for master in stored(optimizer)} == {F16}
    assert optimizer.param_groups[0]["step"] == 2


@paths
def test_groups_with_and_without_masters(fused: bool | None) -> None:
    groups = [
        {"params": make_params(), "fused": fused},
        {"params": make_params(), "fused": fused, "master_weights": False},
    ]
    optimizer = FusedAdam(groups, **SCALED)
    run(optimizer, [1, 2])
    for group in optimizer.param_groups:
        for param in group["params"]:
            assert ("master_param" in optimizer.state[param]) == group["master_weights"]


def test_laprop_keeps_the_norms() -> None:
    optimizer = megatron.LaProp(
        make_params(sizes=(50, 60)), frob_normalize=True, **{**SCALED, "weight_decay": 0.0}
    )
    norms = [param.float().norm() for param in params_of(optimizer)]
    run(optimizer, [1, 2, 3])
    for master, norm in zip(masters(optimizer), norms, strict=True):
        torch.testing.assert_close(master.norm(), norm, rtol=5e-4, atol=0.0)


# ---- steps that are skipped, or fail -------------------------------------------------------------


@paths
def test_found_inf_changes_nothing(fused: bool | None) -> None:
    optimizer = FusedAdam([{"params": make_params(), "fused": fused}], **SCALED)
    run(optimizer, [1, 2])
    before, kept = everything(optimizer), stored(optimizer)
    optimizer.found_inf = torch.ones(())
    optimizer.grad_scale = torch.full((), 4.0)
    run(optimizer, [3])
    assert_same(everything(optimizer), before)
    assert all(a is b for a, b in zip(kept, stored(optimizer), strict=True))
    assert optimizer.param_groups[0]["step"] == 2


@paths
def test_scaled_gradients(fused: bool | None) -> None:
    optimizer, other = (
        FusedAdam([{"params": make_params(), "fused": fused}], **SCALED) for _ in range(2)
    )
    for step in (1, 2):
        for each, factor in ((optimizer, 4.0), (other, 1.0)):
            decouple_grads(params_of(each), step)
            for param in params_of(each):
                param.decoupled_grad *= factor  # type: ignore[attr-defined]
        optimizer.grad_scale = torch.full((), 4.0)
        optimizer.found_inf = torch.zeros(())
        optimizer.step()
        other.step()
    assert_same(everything(optimizer), everything(other))


@paths
def test_a_wrong_gradient_changes_nothing(fused: bool | None) -> None:
    optimizer = FusedAdam([{"params": make_params(), "fused": fused}], **SCALED)
    run(optimizer, [1])
    before, kept = everything(optimizer), stored(optimizer)
    decouple_grads(params_of(optimizer), 2)
    params_of(optimizer)[-1].decoupled_grad = torch.ones(5)  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match=r"shape \(130,\) but its gradient has shape \(5,\)"):
        optimizer.step()
    assert_same(everything(optimizer), before)
    assert all(a is b for a, b in zip(kept, stored(optimizer), strict=True))


def test_a_master_of_another_shape_stays() -> None:
    optimizer, param = make(torch.ones(4))
    wrong = torch.ones(3)
    optimizer.state[param]["master_param"] = wrong
    param.decoupled_grad = torch.ones(4)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"'master_param' has shape \(3,\)"):
        optimizer.step()
    assert optimizer.state[param]["master_param"] is wrong
    assert torch.equal(wrong, torch.ones(3))


# ---- states, one by one --------------------------------------------------------------------------


def test_a_float32_master_is_stored_by_the_next_step() -> None:
    """Megatron-Core and users may assign states."""
    optimizer, param = make(torch.ones(4))
    other, same = make(torch.full((4,), 2.0))
    mine = torch.full((4,), 2.0)
    optimizer.state[param]["master_param"] = mine
    for each, p in ((optimizer, param), (other, same)):
        p.decoupled_grad = torch.ones(4)  # type: ignore[attr-defined]
        each.step()
    assert_same(everything(optimizer), everything(other))


def test_a_moved_state_without_its_scale_is_refused() -> None:
    optimizer, param = make([1.0, 2.0])
    new = param.clone()
    optimizer.param_groups[0]["params"] = [new]
    optimizer.state[new] = optimizer.state.pop(param)
    master = optimizer.state[new]["master_param"]
    before = master.clone()
    message = r"param_groups\[0\]\['params'\]\[0\]: state 'master_param' .* its scale is unknown"
    with pytest.raises(ValueError, match=message):
        optimizer.get_unscaled_state(new, "master_param")
    new.decoupled_grad = torch.ones(2)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert optimizer.state[new]["master_param"] is master
    assert torch.equal(master, before)
    optimizer.set_scaled_state(new, "master_param", torch.tensor([1.0, 2.0]))
    optimizer.step()


@pytest.mark.parametrize("dtype", [F16, BF16, torch.int16, torch.float64], ids=str)
def test_masters_are_set_from_float32(dtype: torch.dtype) -> None:
    optimizer, param = make([1.0, 2.0])
    before = everything(optimizer)
    message = rf"\['params'\]\[0\]: a float16 master_param is set from .* not from dtype {dtype}:"
    with pytest.raises(TypeError, match=message):
        optimizer.set_scaled_state(param, "master_param", torch.ones(2, dtype=dtype))
    with pytest.raises(ValueError, match=r"'master_param' has shape \(3,\); expected \(2,\)"):
        optimizer.set_scaled_state(param, "master_param", torch.ones(3))
    assert_same(everything(optimizer), before)


@every_class
def test_states_created_without_gradients(cls: Any) -> None:
    for how in ("initialize_state", "_init_group", "set_scaled_state"):
        optimizer, other = cls(make_params(), **SCALED), cls(make_params(), **SCALED)
        for param in params_of(optimizer):
            if how == "initialize_state":
                optimizer.initialize_state(param)
            elif how == "set_scaled_state":
                optimizer.set_scaled_state(param, "master_param", param.float())
        if how == "_init_group":
            optimizer._init_group(optimizer.param_groups[0])
        assert {master.dtype for master in stored(optimizer)} == {F16}
        for master, param in zip(masters(optimizer), params_of(optimizer), strict=True):
            assert_rounded(master, param.float())
        run(optimizer, [1, 2])
        run(other, [1, 2])
        assert_same(everything(optimizer), everything(other))


def test_resharding_rounds_once() -> None:
    """From 1 to 3 and back to 1, by numbers: the scale is that of each shard."""

    def reshard(optimizer: Any, *cuts: int) -> Any:
        weights = torch.cat(params_of(optimizer))
        lengths = [b - a for a, b in zip((0, *cuts), (*cuts, len(weights)), strict=True)]
        made = FusedAdam([p.clone() for p in weights.split(lengths)], **SCALED)
        for name in ("exp_avg", "exp_avg_sq", "master_param"):
            whole = torch.cat([optimizer.get_unscaled_state(p, name) for p in params_of(optimizer)])
            for param, piece in zip(params_of(made), whole.split(lengths), strict=True):
                made.set_scaled_state(param, name, piece)
        made.param_groups[0]["step"] = optimizer.param_groups[0]["step"]
        return made

    optimizer = FusedAdam(make_params(sizes=(1000,)), **SCALED)
    run(optimizer, [1, 2, 3])
    sharded = reshard(optimizer, 333, 401)
    assert_rounded(torch.cat(masters(sharded)), masters(optimizer)[0])
    whole = reshard(sharded)
    assert_rounded(masters(whole)[0], torch.cat(masters(sharded)))
    run(whole, [4])
    assert whole.param_groups[0]["step"] == 4


# ---- saving and loading --------------------------------------------------------------------------


def reload(how: str, optimizer: Any) -> Any:
    """An optimizer that continues where another is."""
    if how == "copy":
        return copy.deepcopy(optimizer)
    if how == "pickle":
        return pickle.loads(pickle.dumps(optimizer))
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    made = type(optimizer)([p.clone() for p in params_of(optimizer)], **SCALED)
    made.load_state_dict(torch.load(buffer, weights_only=True))
    return made


@every_class
@pytest.mark.parametrize("how", ["copy", "pickle", "state dict"])
def test_continued_with_the_same_bits(cls: Any, how: str) -> None:
    optimizer = cls(make_params(), **SCALED)
    run(optimizer, [1, 2, 3])
    resumed = reload(how, optimizer)
    assert {master.dtype for master in stored(resumed)} == {F16}
    for each in (optimizer, resumed):
        run(each, [4, 5])
    assert_same(masters(resumed), masters(optimizer))
    assert_same(params_of(resumed), params_of(optimizer))
    for a, b in zip(stored(resumed), stored(optimizer), strict=True):
        assert a.data_ptr() != b.data_ptr() or not a.numel()
    resumed.add_param_group({"params": make_params(sizes=(3,))})
    run(resumed, [6])
    assert {master.dtype for master in stored(resumed)} == {F16}


def test_state_dicts_are_those_of_transformer_engine() -> None:
    """Their masters are float32, and no scale is in them; loading does not modify them."""
    optimizer = FusedAdam(make_params(), **SCALED)
    run(optimizer, [1, 2])
    saved = copy.deepcopy(optimizer.state_dict())
    for state, wanted in zip(saved["state"].values(), masters(optimizer), strict=True):
        assert sorted(state) == ["exp_avg", "exp_avg_sq", "master_param", "step"]
        assert_equal_bits(state["master_param"], wanted, "master")
        del state["step"]
    before = copy.deepcopy(saved)
    other = FusedAdam([p.clone() for p in params_of(optimizer)], **SCALED)
    other.load_state_dict(saved)
    for key, state in before["state"].items():
        for name, value in state.items():
            assert_equal_bits(saved["state"][key][name], value, name)
    run(other, [3])
    run(optimizer, [3])
    assert_same(masters(other), masters(optimizer))


@pytest.mark.parametrize("store", [False, True], ids=["masters", "remainders"])
@paths
def test_float32_masters_load_and_back(store: bool, fused: bool | None) -> None:
    exact = FusedAdam(make_params(), store_param_remainders=store, **AWARE)
    run(exact, [1, 2])
    groups = [{"params": [p.clone() for p in params_of(exact)], "fused": fused}]
    optimizer = FusedAdam(groups, **SCALED)
    optimizer.load_state_dict(copy.deepcopy(exact.state_dict()))
    for found, wanted in zip(masters(optimizer), masters(exact), strict=True):
        assert found.dtype == F32
        assert_rounded(found, wanted)
    again = FusedAdam([p.clone() for p in params_of(exact)], store_param_remainders=store, **AWARE)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in (exact, optimizer, again):
        run(each, [3])
    assert {master.dtype for master in stored(optimizer)} == {F16}
    for i, wanted in enumerate(masters(exact)):
        torch.testing.assert_close(masters(optimizer)[i], wanted, rtol=2e-3, atol=1e-4)
        torch.testing.assert_close(masters(again)[i], wanted, rtol=2e-3, atol=1e-4)


def test_loaded_remainders_are_read_as_masters() -> None:
    master = torch.tensor([1.00390625, -3.14159274])
    param, remainder = master.bfloat16(), torch.empty(2, dtype=torch.int16)
    split_master(master.clone(), param, remainder)
    optimizer, _ = make(param.float())
    saved = optimizer.state_dict()
    saved["state"][0]["master_param"] = remainder
    other = FusedAdam([param], **SCALED)
    other.load_state_dict(saved)
    assert_equal_bits(other.get_unscaled_state(param, "master_param"), master, "master")
    assert_equal_bits(other.state_dict()["state"][0]["master_param"], master, "saved")
    other.set_scaled_state(param, "master_param", torch.tensor([5.0, 6.0]))
    assert_rounded(masters(other)[0], torch.tensor([5.0, 6.0]))


def test_loaded_float16_numbers_are_not_scaled() -> None:
    """Megatron-Core loads empty states of this dtype first."""
    optimizer, param = make([1.0, 2.0])
    saved = optimizer.state_dict()
    saved["state"][0]["master_param"] = torch.tensor([3.0, 4.0], dtype=F16)
    optimizer.load_state_dict(saved)
    assert optimizer.state[param]["master_param"].dtype == F16
    assert_rounded(masters(optimizer)[0], torch.tensor([3.0, 4.0]))
    assert saved["state"][0]["master_param"].tolist() == [3.0, 4.0]
    wide = FusedAdam([param], **AWARE)
    with pytest.raises(TypeError, match=r"dtype torch\.float16; expected torch.float32"):
        wide.load_state_dict(saved)


# ---- options -------------------------------------------------------------------------------------


@every_class
@pytest.mark.parametrize("name", ["capturable", "master_weights", "store_param_remainders"])
def test_refused_options(cls: Any, name: str) -> None:
    value: Any = "split" if name == "master_weights" else True
    message = (
        rf"^{name}={value!r} cannot be combined with master_weight_dtype=torch.float16: use"
        r" master_weight_dtype=torch.float32 \(param_groups\[%d\]\)$"
    )
    if name != "store_param_remainders":
        with pytest.raises(ValueError, match=message % 0):
            cls(make_params(), **{**SCALED, name: value})
    optimizer = cls(make_params(), **SCALED)
    with pytest.raises(ValueError, match=message % 1):
        optimizer.add_param_group({"params": make_params(), name: value})
    assert len(optimizer.param_groups) == 1
    run(optimizer, [1])
    before = everything(optimizer)
    optimizer.param_groups[0][name] = value
    with pytest.raises(ValueError, match=message % 0):
        run(optimizer, [2])
    optimizer.param_groups[0][name] = SCALED.get(name, False)
    assert_same(everything(optimizer), before)
    # Without masters, their dtype does not matter.
    if name != "master_weights":
        run(cls(make_params(), **{**SCALED, "master_weights": False, name: value}), [1])


@every_class
def test_remainders_do_not_apply(cls: Any) -> None:
    """As in TransformerEngine; Megatron-Core sets the option by default."""
    optimizer, other = (
        cls(make_params(), **SCALED, **o) for o in ({}, {"store_param_remainders": True})
    )
    run(optimizer, [1, 2])
    run(other, [1, 2])
    assert_same(everything(other), everything(optimizer))
    with pytest.raises(TypeError, match="store_param_remainders must be a bool, not str"):
        cls(make_params(), store_param_remainders="yes", **SCALED)
