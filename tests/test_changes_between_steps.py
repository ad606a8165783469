"""What users replace between steps: parameters, data, states, groups and hyperparameters."""

import pytest
import torch
from optimizers import (
    METHODS,
    Setup,
    assert_same,
    contents,
    every_optimizer,
    every_optimizer_with_states,
    make_params,
    run,
    set_grads,
)
from support import assert_equal_bits
from torch import Tensor

from emerging_optimizers import Adam, AdamW
from emerging_optimizers._native import native

pytestmark = pytest.mark.on_devices("tests-optimizers")


@every_optimizer
def test_grads_are_not_modified(setup: Setup, fused: bool | None) -> None:
    for method in METHODS:
        params = make_params()
        optimizer = setup.make(
            params, weight_decay=0.1, weight_decay_method=method, maximize=True, fused=fused
        )
        optimizer.grad_scale = torch.tensor(2.0)  # type: ignore[attr-defined]
        set_grads(params, 1)
        grads = [p.grad for p in params]
        copies = [g.clone() for g in grads if g is not None]
        optimizer.step(grad_multiplier=0.5)
        assert all(p.grad is g for p, g in zip(params, grads, strict=True))
        assert_same([g for g in grads if g is not None], copies)


@every_optimizer
def test_params_replaced_in_groups(setup: Setup, fused: bool | None) -> None:
    params = make_params()
    optimizer = setup.make(params, fused=fused)
    run(optimizer, params, [1])
    replaced = torch.nn.Parameter(params[0].detach().clone())
    optimizer.param_groups[0]["params"][0] = replaced
    kept = params[0].detach().clone()
    run(optimizer, [replaced, params[1]], [2])
    assert_equal_bits(params[0].detach(), kept, "the parameter that left")
    assert optimizer.state[replaced]["step"].item() == 1
    assert optimizer.state[params[1]]["step"].item() == 2
    assert not torch.equal(replaced, kept)


@every_optimizer_with_states
def test_data_swapped(setup: Setup, fused: bool | None) -> None:
    params, others = make_params(), make_params()
    optimizer, other = setup.make(params, fused=fused), setup.make(others, fused=fused)
    run(optimizer, params, [1])
    run(other, others, [1])
    for param in params:
        param.data = param.data.t().contiguous().t()  # other memory, in another layout
    run(optimizer, params, [2, 3])
    run(other, others, [2, 3])
    if fused is False:
        assert_same(contents(optimizer), contents(other))
    for param, same in zip(params, others, strict=True):
        torch.testing.assert_close(param, same)
        param.data = param.data.bfloat16()
    run(optimizer, params, [4])
    assert optimizer.state[params[0]][setup.states[0]].dtype == torch.float32


@every_optimizer_with_states
def test_states_replaced(setup: Setup, fused: bool | None) -> None:
    params, others = make_params(), make_params()
    optimizer, other = setup.make(params, fused=fused), setup.make(others, fused=fused)
    run(optimizer, params, [1])
    run(other, others, [1])
    for state in optimizer.state.values():
        for name in setup.states:
            state[name] = state[name].double()
        state["step"] = int(state["step"])
    run(optimizer, params, [2])
    run(other, others, [2])
    torch.testing.assert_close(params, others)
    assert optimizer.state[params[0]][setup.states[0]].dtype == torch.float64
    assert isinstance(optimizer.state[params[0]]["step"], Tensor)
    for state in optimizer.state.values():
        state.clear()
    run(optimizer, params, [3])
    assert optimizer.state[params[0]]["step"].item() == 1


def test_groups_in_a_tuple(fused: bool | None) -> None:
    params, others = make_params(), make_params()
    optimizer, other = (
        Adam([{"params": p[:1]}, {"params": p[1:]}], fused=fused) for p in (params, others)
    )
    optimizer.param_groups = tuple(optimizer.param_groups)  # type: ignore[assignment]
    run(optimizer, params, [1, 2])
    run(other, others, [1, 2])
    assert_same(contents(optimizer), contents(other))


@pytest.mark.skipif(native is None, reason="no native kernels")
def test_hyperparameters_are_read_before_parameters() -> None:
    """Reading a number may run Python code that removes a gradient."""

    class Removing:
        def __float__(self) -> float:
            params[0].grad = None
            return 0.9

    params = make_params([(1 << 16,), (3,)])
    optimizer = AdamW([{"params": params[:1]}, {"params": params[1:]}])
    run(optimizer, params, [1])
    before = params[0].detach().clone()
    set_grads(params, 2)
    optimizer.param_groups[1]["betas"] = (Removing(), 0.99)
    optimizer.step()
    assert_same([params[0].detach()], [before])
    assert optimizer.state[params[1]]["step"] == 2


@every_optimizer
@pytest.mark.parametrize("surplus", [-1, 1])
def test_wrong_number_of_betas(setup: Setup, surplus: int, fused: bool | None) -> None:
    params = make_params()
    optimizer = setup.make(params, fused=fused)
    group = optimizer.param_groups[0]
    if "betas" not in group:
        pytest.skip("of one beta only")
    run(optimizer, params, [1])
    before = [tensor.clone() for tensor in contents(optimizer)]
    length = len(group["betas"])
    group["betas"] = ((*group["betas"], 0.5) if surplus > 0 else group["betas"])[: length + surplus]
    set_grads(params, 2)
    message = f"betas has {length + surplus} values; expected {length}"
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert_same(contents(optimizer), before)


def test_params_of_a_group_in_a_tuple(fused: bool | None) -> None:
    params, others = make_params(), make_params()
    optimizer = AdamW(params, maximize=True, fused=fused)
    optimizer.param_groups[0]["params"] = tuple(params)
    run(optimizer, params, [1, 2])
    run(AdamW(others, maximize=True, fused=fused), others, [1, 2])
    assert_same([p.detach() for p in params], [p.detach() for p in others])
