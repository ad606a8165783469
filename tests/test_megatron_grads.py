"""Gradients in `decoupled_grad`, and `zero_grad`."""

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
    devices,
    every_class,
    make_params,
    run,
)
from optimizers import assert_same, contents

from emerging_optimizers._native import native
from emerging_optimizers.megatron import FusedAdam

pytestmark = [
    pytest.mark.on_devices("tests-cuda"),
    pytest.mark.usefixtures("_no_other_device"),
]


@devices
@every_class
@pytest.mark.parametrize("grad_dtype", [F32, BF16])
@pytest.mark.parametrize("fused", [None, False], ids=["native", "fallback"])
def test_decoupled_gradients(
    cls: Any, grad_dtype: torch.dtype, fused: bool | None, device: str
) -> None:
    """They are read instead of ``.grad``; parameters without one do not change."""
    params, others = make_params(device=device), make_params(device=device)
    optimizer = cls([{"params": params, "fused": fused}], **AWARE)
    other = cls([{"params": others, "fused": fused}], master_weights=True, **OPTIONS)
    for step in (1, 2, 3):
        decouple_grads(params, step, grad_dtype)
        for i, (param, same) in enumerate(zip(params, others, strict=True)):
            if i == step:
                param.decoupled_grad = None  # type: ignore[attr-defined]
                param.grad = torch.ones_like(param)
                same.grad = None
            else:
                assert param.decoupled_grad is not None  # type: ignore[attr-defined]
                same.grad_dtype = grad_dtype
                same.grad = param.decoupled_grad.clone()  # type: ignore[attr-defined]
        optimizer.step()
        other.step()
    assert_same(contents(optimizer), contents(other))


def test_a_parameter_without_the_attribute_has_no_gradient() -> None:
    params = make_params()
    optimizer = FusedAdam(params, **AWARE)
    optimizer.step()
    assert_same(params, make_params())
    assert optimizer.param_groups[0]["step"] == 1


@pytest.mark.parametrize("set_grad_none", [None, True, False])
@pytest.mark.parametrize("set_to_none", [None, True, False])
@pytest.mark.parametrize("decoupled", [False, True])
def test_zero_grad(set_grad_none: bool | None, set_to_none: bool | None, decoupled: bool) -> None:
    params = make_params(F32, sizes=(2, 3))
    options = {"use_decoupled_grad": decoupled, "set_grad_none": set_grad_none}
    if set_grad_none is None:
        optimizer = FusedAdam(params, **options)  # type: ignore[arg-type]
    else:
        with pytest.warns(DeprecationWarning, match=r"FusedAdam\(set_grad_none=\.\.\.\)"):
            optimizer = FusedAdam(params, **options)  # type: ignore[arg-type]
    name = "decoupled_grad" if decoupled else "grad"
    setattr(params[0], name, torch.ones(2))
    setattr(params[1], name, None)
    if None not in (set_grad_none, set_to_none) and set_grad_none != set_to_none:
        with pytest.raises(ValueError, match=f"set_to_none={set_to_none}.*={set_grad_none}"):
            optimizer.zero_grad(set_to_none)
        return
    optimizer.zero_grad(set_to_none)
    to_none = next((x for x in (set_grad_none, set_to_none) if x is not None), True)
    grad = getattr(params[0], name)
    assert (grad is None) if to_none else torch.equal(grad, torch.zeros(2))
    assert getattr(params[1], name) is None


@pytest.mark.parametrize("store_param_remainders", [False, True], ids=["masters", "remainders"])
def test_parameters_that_require_gradients(store_param_remainders: bool) -> None:
    """Leaves, and views of leaves: Megatron's shards of float32 parameters."""

    def make(requires_grad: bool) -> Any:
        params = [p.requires_grad_(requires_grad) for p in make_params()]
        wide = torch.linspace(-1, 1, 12).reshape(3, 4).requires_grad_(requires_grad)
        optimizer = FusedAdam(params, store_param_remainders=store_param_remainders, **AWARE)
        optimizer.param_groups[0]["params"].append(wide.view(-1)[1:8])
        return optimizer

    optimizer, other = make(True), make(False)
    for each in (optimizer, other):
        for param in each.param_groups[0]["params"]:
            each.initialize_state(param)
        run(each, [1, 2])
        saved = copy.deepcopy(each.state_dict())
        for param in each.param_groups[0]["params"][:-1]:
            each.set_scaled_state(param, "exp_avg", each.get_unscaled_state(param, "exp_avg") / 2)
        each.load_state_dict(saved)
        run(each, [3])
    shards = [each.param_groups[0]["params"][-1] for each in (optimizer, other)]
    assert shards[0].grad_fn is not None
    assert_same(*([t.detach().float() for t in contents(each)] for each in (optimizer, other)))


@pytest.mark.skipif(native is None, reason="no native kernels")
def test_the_native_step_checks_gradients_and_names() -> None:
    optimizer = FusedAdam(make_params(F32), **AWARE)
    run(optimizer, [1])
    assert native is not None
    rule = optimizer._group_rule
    call = (optimizer.state, optimizer.param_groups, [0])
    numbers = (None, None, None, 0)
    with pytest.raises(TypeError, match=r"the gradient given for params\[0\] must be a Tensor"):
        native.step(*call, [rule], numbers, [["no tensor", None, None, None]], False)
    with pytest.raises(ValueError, match="there are 1 gradients for 4 parameters"):
        native.step(*call, [rule], numbers, [[None]], False)
    short = rule._replace(state_names=rule.state_names[:1])
    with pytest.raises(ValueError, match="state_names has 1 names; expected 2"):
        native.step(*call, [short], numbers, None, False)
