"""FusedAdam takes TransformerEngine's arguments, with the same meaning."""

import inspect
from typing import Any

import pytest
import torch
from megatron_support import (
    AWARE,
    BF16,
    F32,
    OPTIONS,
    decouple_grads,
    devices,
    every_class,
    make_params,
    run,
)
from optimizers import assert_same, contents, make_grads

from emerging_optimizers import scalar_optimizers
from emerging_optimizers.megatron import FusedAdam

pytestmark = [
    pytest.mark.on_devices("tests-cuda"),
    pytest.mark.usefixtures("_no_other_device"),
]


def test_the_constructor_of_transformer_engine() -> None:
    parameters = list(inspect.signature(FusedAdam).parameters.values())
    assert [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == [
        ("params", inspect.Parameter.empty),
        ("lr", 1e-3),
        ("betas", (0.9, 0.999)),
        ("eps", 1e-8),
        ("weight_decay", 0.0),
        ("amsgrad", False),
    ]
    assert [(p.name, p.default) for p in parameters if p.kind is p.KEYWORD_ONLY] == [
        ("bias_correction", True),
        ("adam_w_mode", True),
        ("capturable", False),
        ("master_weights", False),
        ("master_weight_dtype", F32),
        ("exp_avg_dtype", F32),
        ("exp_avg_sq_dtype", F32),
        ("use_decoupled_grad", False),
        ("store_param_remainders", False),
        ("set_grad_none", None),
        ("state_dtype_filter", None),  # TransformerEngine's has none
    ]


@pytest.mark.parametrize("adam_w_mode", [True, False])
@pytest.mark.parametrize("bias_correction", [True, False])
def test_arguments_correspond_to_those_of_adam(adam_w_mode: bool, bias_correction: bool) -> None:
    params, others = make_params(F32), make_params(F32)
    optimizer = FusedAdam(
        params,
        bias_correction=bias_correction,
        adam_w_mode=adam_w_mode,
        use_decoupled_grad=True,
        **OPTIONS,
    )
    other = scalar_optimizers.Adam(
        others,
        correct_bias=bias_correction,
        weight_decay_method="decoupled" if adam_w_mode else "l2",
        **OPTIONS,
    )
    for step in (1, 2, 3):
        decouple_grads(params, step)
        for param, grad in zip(others, make_grads(others, step), strict=True):
            param.grad = grad
        optimizer.step()
        other.step()
    assert_same(contents(optimizer), contents(other))


def test_groups_have_the_keys_of_transformer_engine() -> None:
    """Also for groups that have all keys, as Megatron's hybrid optimizer passes them."""
    group = {"params": make_params(), "bias_correction": False, "lr": 0.5, "pin_cpu_grads": True}
    optimizer = FusedAdam([group, {"params": make_params(F32)}])
    optimizer.add_param_group({"params": make_params(sizes=(3,)), "bias_correction": False})
    found = [group["bias_correction"] for group in optimizer.param_groups]
    assert found == [False, True, False]
    assert not any("correct_bias" in group for group in optimizer.param_groups)
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 1e-3, 1e-3]


def test_amsgrad() -> None:
    params, others = make_params(F32), make_params(F32)
    optimizer = FusedAdam(params, lr=0.1, weight_decay=0.1, amsgrad=True, exp_avg_sq_dtype=F32)
    other = scalar_optimizers.AdamW(others, lr=0.1, weight_decay=0.1, amsgrad=True)
    for step in (1, 2, 3):
        for made, tensors in ((optimizer, params), (other, others)):
            for param, grad in zip(tensors, make_grads(tensors, step), strict=True):
                param.grad = grad / step  # so that averages of squares fall
            made.step()
    assert_same(params, others)
    state = optimizer.state[params[0]]
    assert (state["max_exp_avg_sq"] >= state["exp_avg_sq"]).all()
    (group,) = FusedAdam(make_params(F32)).state_dict()["param_groups"]
    assert sorted(group["state_dtype"]) == ["exp_avg", "exp_avg_sq"]


def test_states_of_a_flag_that_is_set_later() -> None:
    params = make_params(BF16)
    optimizer = FusedAdam(params, exp_avg_sq_dtype=torch.float16)
    optimizer.param_groups[0]["amsgrad"] = True
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert {optimizer.state[param]["max_exp_avg_sq"].dtype for param in params} == {torch.float16}


@pytest.mark.parametrize("name", ["exp_avg_dtype", "exp_avg_sq_dtype", "master_weight_dtype"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64])
def test_unsupported_dtypes_are_named(name: str, dtype: torch.dtype) -> None:
    expected = f"^{name}={dtype} is not supported; expected torch.float32"
    with pytest.raises(ValueError, match=expected):
        FusedAdam(make_params(), **{name: dtype})  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8])
def test_narrow_masters_are_rejected(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=rf"^master_weight_dtype={dtype} is not supported"):
        FusedAdam(make_params(), master_weights=True, master_weight_dtype=dtype)


@every_class
@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16])
def test_dtypes_of_states(cls: Any, dtype: torch.dtype) -> None:
    optimizer = cls(make_params(), exp_avg_dtype=dtype, exp_avg_sq_dtype=BF16, **AWARE)
    run(optimizer, [1, 2])
    for state in optimizer.state.values():
        for name in state.keys() - {"step"}:
            wanted = {"exp_avg_sq": BF16, "master_param": F32}.get(name, dtype)
            assert state[name].dtype == wanted, name


@devices
def test_capturable_learning_rates_are_tensors(device: str) -> None:
    params = make_params(F32, device)
    optimizer = FusedAdam([{"params": params[:2]}, {"params": params[2:]}], lr=0.5, capturable=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert [rate.item() for rate in rates] == [0.5, 0.5]
    assert rates[0] is not rates[1]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    # On a device, the host does not read it.
    assert [int(group["step"]) for group in optimizer.param_groups] == [1, 1]
    assert {type(group["step"]) for group in optimizer.state_dict()["param_groups"]} == {int}
    assert all(rate.device == params[0].device for rate in rates)
