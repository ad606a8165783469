"""A step that fails changes nothing."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizers import (
    Setup,
    assert_same,
    contents,
    every_optimizer,
    every_optimizer_with_states,
    make_params,
    run,
    set_grads,
)
from torch import Tensor
from torch.nn import Parameter

from emerging_optimizers import AdamW, ScalarOptimizer

pytestmark = pytest.mark.on_devices("tests-optimizers")

Breaking = Callable[[ScalarOptimizer, Parameter, dict[str, Any]], None]


@pytest.mark.real
@every_optimizer
def test_bad_steps(setup: Setup, fused: bool | None) -> None:
    params = make_params()
    optimizer = setup.make(params, fused=fused)
    before = [p.detach().clone() for p in params]
    set_grads(params, 1)
    assert params[1].grad is not None
    params[1].grad = params[1].grad.to_sparse()
    message = f"{setup.cls.__name__} does not support sparse gradients"
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert_same([p.detach() for p in params], before, "after the error")


@pytest.mark.real
@every_optimizer_with_states
def test_errors_change_nothing(setup: Setup, fused: bool | None) -> None:
    params = make_params([(3, 4), (5, 2), (2, 2)])
    optimizer = setup.make([{"params": [p]} for p in params], fused=fused)
    run(optimizer, params, [1])
    before = contents(optimizer)
    set_grads(params, 2)
    params[1].grad = torch.ones(5, 2).to_sparse()
    versions = [p._version for p in params]
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert_same(contents(optimizer), before)
    assert [p._version for p in params] == versions
    set_grads(params, 2)
    name = setup.states[-1]
    for wrong, error, message in (
        (torch.zeros(5), ValueError, f"state '{name}' has shape"),
        (3.0, TypeError, f"state '{name}' must be a Tensor"),
        (None, ValueError, rf"the state of param_groups\[2\]\['params'\]\[0\] has no '{name}'"),
    ):
        optimizer.state[params[2]][name] = wrong
        with pytest.raises(error, match=message):
            optimizer.step()
        optimizer.state[params[2]][name] = torch.zeros_like(params[2])
        assert_same(contents(optimizer)[:-1], before[:-1])


def _replaced_state(make: Callable[[Tensor], Any], name: str = "exp_avg") -> Breaking:
    def apply(optimizer: ScalarOptimizer, param: Parameter, group: dict[str, Any]) -> None:
        optimizer.state[param][name] = make(optimizer.state[param][name])

    return apply


def _replaced_value(key: str, value: Any) -> Breaking:
    return lambda optimizer, param, group: group.update({key: value})


def _free(tensor: Tensor) -> Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


def _expand(optimizer: ScalarOptimizer, param: Parameter, group: dict[str, Any]) -> None:
    param.data = torch.ones(()).expand(param.shape)


def _make_grad_complex(optimizer: ScalarOptimizer, param: Parameter, group: dict[str, Any]) -> None:
    data, grad = param.data, param.grad
    param.grad = None
    param.data = data.to(torch.complex64)
    assert grad is not None
    param.grad = grad.to(torch.complex64)
    param.data = data


def _free_param(optimizer: ScalarOptimizer, param: Parameter, group: dict[str, Any]) -> None:
    _free(param.data)


def _free_grad(optimizer: ScalarOptimizer, param: Parameter, group: dict[str, Any]) -> None:
    assert param.grad is not None
    _free(param.grad)


# What breaks one of several parameters, and the error that reports it.
_BREAKING: dict[str, tuple[Breaking, type[Exception], str]] = {
    "expanded param": (_expand, ValueError, "the parameter overlaps itself"),
    "freed param": (_free_param, ValueError, "the parameter has no memory"),
    "freed grad": (_free_grad, ValueError, "its gradient has no memory"),
    "complex grad": (_make_grad_complex, TypeError, "its gradient has dtype torch.complex64"),
    "freed state": (_replaced_state(_free), ValueError, "state 'exp_avg' has no memory"),
    "whole state": (_replaced_state(Tensor.long), TypeError, "'exp_avg' has dtype torch.int64"),
    "complex state": (
        _replaced_state(lambda state: state + 0j),
        TypeError,
        "'exp_avg' has dtype torch.complex64",
    ),
    "sparse state": (_replaced_state(Tensor.to_sparse), TypeError, "'exp_avg' has layout"),
    "meta state": (_replaced_state(lambda state: state.to("meta")), ValueError, "is on meta"),
    "expanded state": (
        _replaced_state(lambda state: torch.zeros(()).expand(state.shape)),
        ValueError,
        "state 'exp_avg' overlaps itself",
    ),
    "inference state": (
        _replaced_state(torch.inference_mode()(torch.clone)),
        RuntimeError,
        "state 'exp_avg' is an inference tensor",
    ),
    "no step": (
        _replaced_state(lambda step: step * math.nan, "step"),
        ValueError,
        "state 'step' is nan",
    ),
    "negative step": (_replaced_state(Tensor.neg, "step"), ValueError, "state 'step' is -1"),
    "two steps": (
        _replaced_state(lambda step: step.expand(2), "step"),
        ValueError,
        "state 'step' has 2 elements",
    ),
    "lr": (_replaced_value("lr", "fast"), TypeError, "lr must be a number, not str"),
    "two lrs": (_replaced_value("lr", torch.ones(2)), ValueError, "lr .*1"),
    "weight decay": (_replaced_value("weight_decay", None), TypeError, "weight_decay must be a"),
    "method": (
        _replaced_value("weight_decay_method", "l1"),
        ValueError,
        "Invalid weight_decay_method: 'l1'; expected one of 'decoupled', 'independent', 'palm'",
    ),
    "no method": (
        _replaced_value("weight_decay_method", None),
        TypeError,
        "weight_decay_method must be a str, not NoneType",
    ),
    "betas": (
        _replaced_value("betas", (1.5, 0.9)),
        ValueError,
        "Invalid beta parameter at index 0: 1.5",
    ),
}


@pytest.mark.real
@pytest.mark.parametrize("what", _BREAKING)
def test_errors_change_no_other_parameter(what: str, fused: bool | None) -> None:
    """Neither parameters before it in the step, in any group, nor those after it change."""
    params = make_params([(3, 4)] * 5)
    groups: list[dict[str, Any]] = [{"params": params[:1]}, {"params": params[1:4]}]
    optimizer = AdamW([*groups, {"params": params[4:]}], lr=0.1, fused=fused)
    run(optimizer, params, [1])
    set_grads(params, 2)
    others = [p for i, p in enumerate(params) if i != 2]
    parts = [tensor for p in others for tensor in (p, *optimizer.state[p].values())]
    before = [tensor.detach().clone() for tensor in parts]
    apply, error, message = _BREAKING[what]
    apply(optimizer, params[2], optimizer.param_groups[1])
    with pytest.raises(error, match=message):
        optimizer.step()
    now = [tensor for p in others for tensor in (p, *optimizer.state[p].values())]
    assert_same([tensor.detach() for tensor in now], before)
