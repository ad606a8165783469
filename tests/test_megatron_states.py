"""States of optimizers in `megatron`, as Megatron-Core creates, reads and writes them."""

import copy
from typing import Any

import pytest
import torch
from megatron_support import (
    AWARE,
    BF16,
    F32,
    OPTIONS,
    decouple_grads,
    every_class,
    make_params,
    run,
)
from optimizers import assert_same, contents
from oracle import is_square
from support import assert_equal_bits

from emerging_optimizers import megatron, scalar_optimizers
from emerging_optimizers.megatron import FusedAdam

pytestmark = [
    pytest.mark.on_devices("tests-cuda"),
    pytest.mark.usefixtures("_no_other_device"),
]


@every_class
def test_names(cls: Any) -> None:
    """Megatron expects exp_avg in all states, and exp_avg_sq in those of adaptive rules."""
    params = make_params()
    optimizer = cls(params, **AWARE)
    optimizer.initialize_state(params[0])
    names = set(optimizer.state[params[0]])
    states = cls._rule.states
    averages = [name for name in states if not is_square(name)]
    assert ("exp_avg" in names) == bool(averages)
    assert ("exp_avg_sq" in names) == any(map(is_square, states))
    assert names - {"step", "exp_avg", "exp_avg_sq", "master_param"} == set(averages[1:])


def test_ademamix_with_other_names() -> None:
    params, others = make_params(F32), make_params(F32)
    options = {**OPTIONS, "num_beta_slow_warmup_steps": 3}
    optimizer = megatron.AdEMAMix(params, use_decoupled_grad=True, **options)
    other = scalar_optimizers.AdEMAMix(others, **options)
    for step in (1, 2):
        decouple_grads(params, step)
        for param, same in zip(params, others, strict=True):
            same.grad = param.decoupled_grad  # type: ignore[attr-defined]
        optimizer.step()
        other.step()
    assert_same(contents(optimizer), contents(other))
    with pytest.raises(ValueError, match="has no state 'exp_avg_fast'; it has 'exp_avg', 'exp_avg"):
        optimizer.add_param_group({"params": [], "state_dtype": {"exp_avg_fast": BF16}})


@every_class
@pytest.mark.parametrize("how", ["initialize_state", "_init_group", "by hand"])
def test_states_created_without_gradients(cls: Any, how: str) -> None:
    params, others = make_params(), make_params()
    optimizer, other = cls(params, **AWARE), cls(others, **AWARE)
    if how == "initialize_state":
        for param in params:
            optimizer.initialize_state(param)
    elif how == "_init_group":
        optimizer._init_group(optimizer.param_groups[0], skip_non_grad_params=True)
        assert not optimizer.state
        for group in optimizer.param_groups:
            optimizer._init_group(group, skip_non_grad_params=False)
    else:
        for param in params:
            optimizer.state[param]["exp_avg"] = torch.zeros_like(param, dtype=F32)
            optimizer.state[param]["exp_avg_sq"] = torch.zeros_like(param, dtype=F32)
    assert len(optimizer.state) == len(params)
    run(optimizer, [1, 2])
    run(other, [1, 2])
    for param, same in zip(params, others, strict=True):
        wanted = other.state[same]
        assert_same([optimizer.state[param][name] for name in wanted], list(wanted.values()))
    assert_same(params, others)


def test_initialize_state_resets() -> None:
    params = make_params()
    optimizer = FusedAdam(params, store_param_remainders=True, **AWARE)
    run(optimizer, [1, 2])
    optimizer.initialize_state(params[0], True)
    state = optimizer.state[params[0]]
    assert state["step"].item() == 2  # the group's
    assert all(not value.any() for name, value in state.items() if name != "step")
    with pytest.raises(
        ValueError, match=r"store_param_remainders=False, but this optimizer stores"
    ):
        optimizer.initialize_state(params[0], False)
    with pytest.raises(ValueError, match=r"in none of the optimizer's groups"):
        optimizer.initialize_state(torch.zeros(3))
    plain = FusedAdam(params)
    with pytest.raises(ValueError, match=r"store_param_remainders=True, but .* does not store"):
        plain.initialize_state(params[0], True)


@every_class
@pytest.mark.parametrize("store_param_remainders", [False, True], ids=["masters", "remainders"])
def test_states_from_one_optimizer_to_another(cls: Any, store_param_remainders: bool) -> None:
    options = {**AWARE, "exp_avg_dtype": BF16, "store_param_remainders": store_param_remainders}
    params = make_params()
    optimizer = cls(params, **options)
    run(optimizer, [1, 2])
    others = [p.clone() for p in params]
    other = cls(others, **options)
    for param, same in zip(params, others, strict=True):
        for name, stored in optimizer.state[param].items():
            value = optimizer.get_unscaled_state(param, name)
            assert value.dtype == (torch.int16 if stored.dtype == torch.int16 else F32)
            assert optimizer.get_unscaled_state(param, name, skip_unscale=True) is stored
            # As in Megatron's fully reshardable checkpoints.
            other.set_scaled_state(same, name, value.float())
    run(optimizer, [3])
    run(other, [3])
    assert_same([t.float() for t in contents(other)], [t.float() for t in contents(optimizer)])


def test_a_float32_parameter_is_its_own_master() -> None:
    """Megatron reads a master of every parameter."""
    params = make_params(F32, sizes=(3, 4))
    optimizer = FusedAdam(params, **AWARE)
    run(optimizer, [1])
    for _ in range(2):
        for param in params:
            param.data = param.data.clone()
            assert_equal_bits(optimizer.get_unscaled_state(param, "master_param"), param, "master")
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        run(optimizer, [2])
    assert not optimizer.state_dict()["state"][0]["master_param"].requires_grad
    optimizer.set_scaled_state(params[0], "master_param", torch.ones(3))
    assert params[0].tolist() == [1, 1, 1]


def test_errors_of_states() -> None:
    params = make_params()
    whole, stored = (FusedAdam(params, store_param_remainders=s, **AWARE) for s in (False, True))
    whole.set_scaled_state(params[0], "padding", False)  # type: ignore[arg-type]
    assert not whole.state
    with pytest.raises(KeyError, match="the parameter has no state 'exp_avg'"):
        whole.get_unscaled_state(params[0], "exp_avg")
    with pytest.raises(KeyError, match="FusedAdam has no state 'exp_avg_slow'"):
        whole.set_scaled_state(params[0], "exp_avg_slow", torch.zeros(37))
    with pytest.raises(ValueError, match=r"'exp_avg' has shape \(1,\); expected \(37,\)"):
        whole.set_scaled_state(params[0], "exp_avg", torch.zeros(1))
    remainder = torch.zeros(37, dtype=torch.int16)
    with pytest.raises(TypeError, match=r"dtype torch\.int16, but this optimizer stores float32"):
        whole.set_scaled_state(params[0], "master_param", remainder)
    with pytest.raises(TypeError, match=r"dtype torch\.float32, but this optimizer stores int16"):
        stored.set_scaled_state(params[0], "master_param", torch.full((37,), 0.5))
