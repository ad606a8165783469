"""8-bit averages in Megatron's optimizers: shards of any length, and access to single states."""

import copy
import pickle
from typing import Any

import pytest
import torch
from megatron_support import BF16, F32, every_class, make_params, run
from optimizers import assert_same, contents, make_grads
from support import assert_equal_bits
from torch import Tensor

from emerging_optimizers import megatron
from emerging_optimizers._codes import scale_key

U8 = torch.uint8
CODED: dict[str, Any] = {
    "exp_avg_dtype": U8,
    "exp_avg_sq_dtype": U8,
    "master_weights": True,
    "store_param_remainders": True,
    "use_decoupled_grad": True,
    "lr": 0.01,
}
# Shards of a flat buffer: shorter than a group, a whole one, and with a short group at the end.
SIZES = ((7,), (32,), (1000,), (1,), (5, 7), (64, 96))


def coded_names(state: dict[str, Any]) -> list[str]:
    return [name for name in state if scale_key(name) in state]


def make_and_run(cls: Any, steps: range, fused: bool | None = None, **options: Any) -> Any:
    optimizer = cls(make_params(sizes=SIZES), **{**CODED, **options})
    optimizer.param_groups[0]["fused"] = fused
    run(optimizer, list(steps))
    return optimizer


@every_class
def test_every_shard_is_coded(cls: Any) -> None:
    """A parameter of one dimension may be a shard, whose size says nothing."""
    optimizer = make_and_run(cls, range(1, 3))
    for param in optimizer.param_groups[0]["params"]:
        state = optimizer.state[param]
        names = coded_names(state)
        is_coded = param.dim() == 1 or param.shape == (64, 96)
        assert bool(names) == is_coded, param.shape
        averages = state.keys() - {"step", "master_param", *map(scale_key, names)}
        for name in averages:
            assert state[name].dtype == (U8 if is_coded else F32)
        for name in names:
            expected = (*param.shape[:-1], -(-param.shape[-1] // 32))
            assert state[scale_key(name)].shape == expected


@every_class
def test_the_fallback_has_the_same_codes(cls: Any) -> None:
    native, fallback = (make_and_run(cls, range(1, 2), fused=fused) for fused in (True, False))
    params = zip(native.param_groups[0]["params"], fallback.param_groups[0]["params"], strict=True)
    for param, other in params:
        for name in coded_names(native.state[param]):
            for key in (name, scale_key(name)):
                # The formulas are rounded differently, so few codes differ, by 1.
                difference = native.state[param][key].int() - fallback.state[other][key].int()
                assert difference.abs().max() <= 1
                assert (difference != 0).float().mean() < 0.01


def test_unscaled_states() -> None:
    optimizer = make_and_run(megatron.FusedAdam, range(1, 4))
    wide = make_and_run(megatron.FusedAdam, range(1, 4), exp_avg_dtype=F32, exp_avg_sq_dtype=F32)
    params = zip(optimizer.param_groups[0]["params"], wide.param_groups[0]["params"], strict=True)
    for param, other in params:
        for name in ("exp_avg", "exp_avg_sq"):
            found = optimizer.get_unscaled_state(param, name)
            wanted = wide.get_unscaled_state(other, name)
            assert found.dtype == F32
            assert found.shape == param.shape
            # Three roundings, each by some 3 % on average.
            assert (found - wanted).norm() < 0.1 * wanted.norm()
            raw = optimizer.get_unscaled_state(param, name, skip_unscale=True)
            assert raw is optimizer.state[param][name]


def test_setting_states_rounds_to_nearest() -> None:
    optimizer = make_and_run(megatron.FusedAdam, range(1, 2))
    for param in optimizer.param_groups[0]["params"]:
        for name in ("exp_avg", "exp_avg_sq"):
            numbers = torch.rand(param.shape, generator=torch.Generator().manual_seed(0))
            optimizer.set_scaled_state(param, name, numbers)
            found = optimizer.get_unscaled_state(param, name)
            tolerance = 0 if found is optimizer.state[param][name] else 1 / 16
            assert ((found - numbers).abs() <= tolerance * numbers + 1e-5).all()
            # What was got is set without a change, also if the scale is copied first, as by tools
            # that copy all states.
            if scale_key(name) in optimizer.state[param]:
                scales = optimizer.get_unscaled_state(param, scale_key(name))
                optimizer.set_scaled_state(param, scale_key(name), torch.zeros_like(scales))
            optimizer.set_scaled_state(param, name, found)
            assert_equal_bits(optimizer.get_unscaled_state(param, name), found, name)


@pytest.mark.parametrize("dtype", [U8, F32])
@pytest.mark.parametrize("given", [U8, torch.int16])
def test_states_are_not_set_from_codes(dtype: torch.dtype, given: torch.dtype) -> None:
    optimizer = make_and_run(megatron.FusedAdam, range(1, 2), exp_avg_dtype=dtype)
    param = optimizer.param_groups[0]["params"][2]
    before = optimizer.state[param]["exp_avg"].clone()
    message = rf"'exp_avg' is set from numbers, not from dtype {given}: pass"
    with pytest.raises(TypeError, match=message):
        optimizer.set_scaled_state(param, "exp_avg", torch.ones(param.shape, dtype=given))
    assert torch.equal(optimizer.state[param]["exp_avg"], before)


def test_scales_that_are_set_first_have_no_effect() -> None:
    (param,) = make_params(sizes=(64,))
    optimizer = megatron.FusedAdam([param], **CODED)
    optimizer.set_scaled_state(param, scale_key("exp_avg"), torch.full((2,), 77, dtype=U8))
    assert not optimizer.state[param][scale_key("exp_avg")].any()
    assert not optimizer.get_unscaled_state(param, "exp_avg").any()


@every_class
def test_state_dicts_continue_with_the_same_bits(cls: Any) -> None:
    optimizer = make_and_run(cls, range(1, 4))
    resumed = cls([p.clone() for p in optimizer.param_groups[0]["params"]], **CODED)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for other in (optimizer, resumed):
        run(other, [4, 5])
    assert_same(
        [t.float() for t in contents(resumed)], [t.float() for t in contents(optimizer)], "resumed"
    )


def test_float32_checkpoints_load_and_back() -> None:
    wide = {"exp_avg_dtype": F32, "exp_avg_sq_dtype": F32}
    optimizer = make_and_run(megatron.FusedAdam, range(1, 4), **wide)
    coded = megatron.FusedAdam([p.clone() for p in optimizer.param_groups[0]["params"]], **CODED)
    coded.load_state_dict(optimizer.state_dict())
    again = megatron.FusedAdam(
        [p.clone() for p in optimizer.param_groups[0]["params"]], **{**CODED, **wide}
    )
    again.load_state_dict(coded.state_dict())
    groups = (o.param_groups[0]["params"] for o in (optimizer, coded, again))
    for param, in_codes, back in zip(*groups, strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            wanted = optimizer.state[param][name]
            found = again.state[back][name]
            assert found.dtype == F32
            assert scale_key(name) not in again.state[back]
            assert_equal_bits(coded.get_unscaled_state(in_codes, name), found, name)
            limit = wanted.abs() / 16 + wanted.abs().max() / 114_688
            assert ((found - wanted).abs() <= limit).all()


def test_resharding_keeps_states_within_the_rounding() -> None:
    """From 1 to 3 and back to 1, by numbers: groups are counted from each shard's start."""

    def states_of(optimizer: Any, name: str) -> Tensor:
        params = optimizer.param_groups[0]["params"]
        return torch.cat([optimizer.get_unscaled_state(p, name) for p in params])

    def reshard(optimizer: Any, cuts: tuple[int, ...]) -> Any:
        weights = torch.cat(optimizer.param_groups[0]["params"])
        lengths = [b - a for a, b in zip((0, *cuts), (*cuts, len(weights)), strict=True)]
        made = megatron.FusedAdam([p.clone() for p in weights.split(lengths)], **CODED)
        for name in ("exp_avg", "exp_avg_sq", "master_param"):
            for param, part in zip(
                made.param_groups[0]["params"],
                states_of(optimizer, name).split(lengths),
                strict=True,
            ):
                made.set_scaled_state(param, name, part)
        made.param_groups[0]["step"] = optimizer.param_groups[0]["step"]
        return made

    optimizer = megatron.FusedAdam(make_params(sizes=((1000,),)), **CODED)
    run(optimizer, [1, 2, 3])
    sharded = reshard(optimizer, (333, 401))
    whole = reshard(sharded, ())
    for name in ("exp_avg", "exp_avg_sq"):
        wanted, found = states_of(optimizer, name), states_of(whole, name)
        limit = wanted.abs() / 8 + wanted.abs().max() / 57_344
        assert ((found - wanted).abs() <= limit).all()
    assert_equal_bits(
        states_of(whole, "master_param").view(BF16),
        states_of(optimizer, "master_param").view(BF16),
        "remainders",
    )
    (param,) = whole.param_groups[0]["params"]
    (before,) = make_grads([param.float()], 4)
    param.decoupled_grad = before
    whole.step()
    assert whole.param_groups[0]["step"] == 4


def test_iteration_skips_scales() -> None:
    """Megatron-Core saves what it iterates over as if it had the shard's length."""
    optimizer = make_and_run(megatron.FusedAdam, range(1, 2))
    loaded = megatron.FusedAdam(make_params(sizes=SIZES), **CODED)
    loaded.load_state_dict(optimizer.state_dict())
    for other in (optimizer, loaded):
        run(other, [2])
    copies = (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer)))
    for other in (optimizer, loaded, *copies):
        for param in other.param_groups[0]["params"]:
            state = other.state[param]
            assert sorted(state) == ["exp_avg", "exp_avg_sq", "master_param", "step"]
            scales = state.keys() - set(state)
            assert scales == {scale_key(name) for name in coded_names(state)}
            assert bool(scales) == (param.shape != (5, 7))
    for state in optimizer.state_dict()["state"].values():
        assert type(state) is dict  # torch.load accepts no other class


def allocated(param: Tensor) -> dict[str, Tensor]:
    return {name: torch.full_like(param, 0xFF, dtype=U8) for name in ("exp_avg", "exp_avg_sq")}


@pytest.mark.parametrize("dtype", [U8, F32])
def test_codes_that_were_only_allocated_load_as_zeros(dtype: torch.dtype) -> None:
    """Megatron-Core then sets each of them."""
    (param,) = make_params(sizes=((1000,),))
    options = {**CODED, "exp_avg_dtype": dtype, "exp_avg_sq_dtype": dtype}
    optimizer = megatron.FusedAdam([param], **options)
    groups = optimizer.state_dict()["param_groups"]
    given = allocated(param)
    optimizer.load_state_dict({"state": {0: given}, "param_groups": groups})
    for name in ("exp_avg", "exp_avg_sq"):
        assert optimizer.state[param][name].dtype == dtype
        assert not optimizer.get_unscaled_state(param, name).any()
        assert (given[name] == 0xFF).all()
        numbers = torch.rand(1000, generator=torch.Generator().manual_seed(0))
        optimizer.set_scaled_state(param, name, numbers)
        found = optimizer.get_unscaled_state(param, name)
        assert ((found - numbers).abs() <= numbers / 16 + 1e-5).all()


def test_states_that_must_stay_wide_may_be_allocated_as_codes() -> None:
    (param,) = make_params(sizes=((1000,),))
    optimizer = megatron.FusedAdam([param], **CODED, amsgrad=True)
    groups = optimizer.state_dict()["param_groups"]
    state = {**allocated(param), "max_exp_avg_sq": torch.zeros(1000)}
    optimizer.load_state_dict({"state": {0: state}, "param_groups": groups})
    assert optimizer.state[param]["exp_avg"].dtype == U8
    assert optimizer.state[param]["exp_avg_sq"].dtype == F32
    assert not optimizer.state[param]["exp_avg_sq"].any()


def test_saved_codes_need_their_scales() -> None:
    optimizer = make_and_run(megatron.FusedAdam, range(1, 2))
    saved = optimizer.state_dict()
    del saved["state"][2]["exp_avg_scale"]
    with pytest.raises(TypeError, match="so 'exp_avg_scale' must be a Tensor of that dtype"):
        optimizer.load_state_dict(saved)


def test_a_filter_sees_the_shards() -> None:
    asked = []

    def accepts(name: str | None, param: Tensor) -> bool:
        asked.append((name, tuple(param.shape)))
        return param.numel() != 32

    params = make_params(sizes=((32,), (64,)))
    optimizer = megatron.FusedAdam(
        make_params(sizes=((5, 7),)), **CODED, state_dtype_filter=accepts
    )
    assert asked == [(None, (5, 7))]
    optimizer.param_groups[0]["params"][:] = params  # as Megatron-Core does
    run(optimizer, [1, 2])
    assert asked == [(None, (5, 7)), (None, (32,)), (None, (64,))]
    assert [bool(coded_names(optimizer.state[p])) for p in params] == [False, True]
