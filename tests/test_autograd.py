"""The update functions under autograd: version counters, graphs, inference mode."""

import pytest
import torch
from oracle import Rule
from support import (
    LAYOUT_SHAPE,
    LAYOUTS,
    MIXES,
    Layout,
    Mix,
    Operands,
    assert_close_to_oracle,
    assert_equal_results,
    call,
    check_call,
    every_mix,
    every_rule,
    every_rule_with_states,
    lay_out,
    make_operands,
)

pytestmark = pytest.mark.on_devices("tests-functions")

FLOAT32 = MIXES["float32"]
HALF_GRAD = MIXES["bfloat16 grad, float32 states"]


@every_rule
@pytest.mark.parametrize("layout", list(LAYOUTS.values()), ids=list(LAYOUTS))
def test_version_counters(rule: Rule, layout: Layout) -> None:
    operands = lay_out(make_operands(rule, LAYOUT_SHAPE, HALF_GRAD), layout)
    out = torch.empty(operands.grad.shape)
    versions = [tensor._version for tensor in (*operands, out)]
    call(rule, rule.usual, operands, out=out)
    grad, *written = (
        tensor._version - version
        for tensor, version in zip((*operands, out), versions, strict=True)
    )
    assert grad == 0
    assert all(count > 0 for count in written), written


@every_rule
def test_version_counter_of_grad_as_out(rule: Rule) -> None:
    operands = make_operands(rule, (4, 5), FLOAT32)
    version = operands.grad._version
    call(rule, rule.usual, operands, out=operands.grad)
    assert operands.grad._version > version


@pytest.mark.real
@every_rule_with_states
def test_backward_notices_a_modified_state(rule: Rule) -> None:
    operands = make_operands(rule, (4, 5), FLOAT32)
    weight = torch.ones(4, 5, requires_grad=True)
    loss = (weight * operands.states[0]).sum()
    call(rule, rule.usual, operands)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_rule
@pytest.mark.parametrize("layout", list(LAYOUTS.values()), ids=list(LAYOUTS))
def test_leaves_that_require_grad(rule: Rule, layout: Layout) -> None:
    operands = lay_out(make_operands(rule, LAYOUT_SHAPE, HALF_GRAD), layout)
    # `detach` turns views into leaves.
    grad, *states = (tensor.detach().requires_grad_() for tensor in operands)
    out = torch.empty(grad.shape, requires_grad=True)
    assert torch.is_grad_enabled()
    before = Operands(grad, states).clone()
    update = call(rule, rule.usual, Operands(grad, states))
    assert not update.requires_grad
    assert update.grad_fn is None
    assert_close_to_oracle(rule, rule.usual, before, update, states)
    call(rule, rule.usual, Operands(grad, states), out=out)
    for tensor in (grad, *states, out):
        assert tensor.is_leaf
        assert tensor.requires_grad
        assert tensor.grad_fn is None


@every_rule
def test_no_graph_is_recorded_for_a_gradient_with_history(rule: Rule) -> None:
    operands = make_operands(rule, (4, 5), FLOAT32)
    leaf = operands.grad.clone().requires_grad_()
    update = call(rule, rule.usual, Operands(leaf * 1, operands.states))
    assert not update.requires_grad
    assert all(not state.requires_grad for state in operands.states)


@every_rule
@every_mix
def test_inference_mode(rule: Rule, mix: Mix) -> None:
    operands = make_operands(rule, (3, 50), mix)
    wanted_operands, outside = operands.clone(), operands.clone()
    wanted = call(rule, rule.usual, wanted_operands)
    with torch.inference_mode():
        inside = operands.clone()
        assert inside.grad.is_inference()
        for used in (inside, outside):
            update = call(rule, rule.usual, used)
            assert_equal_results(rule, (update, used), (wanted, wanted_operands))
        call(rule, rule.usual, inside, out=inside.grad)


@every_rule
def test_no_grad_mode(rule: Rule) -> None:
    with torch.no_grad():
        check_call(rule, rule.usual, make_operands(rule, (3, 50), FLOAT32))
