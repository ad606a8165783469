"""How the update functions may be called: `out`, sequences, scalars, defaults."""

import copy
import inspect
from typing import Any

import numpy as np
import pytest
import torch
from oracle import RULES, Rule
from support import (
    LAYOUT_SHAPE,
    LAYOUTS,
    MIXES,
    Mix,
    Operands,
    assert_close_to_oracle,
    assert_equal_results,
    call,
    check_call,
    every_mix,
    every_rule,
    lay_out,
    make_operands,
)
from torch import Tensor, nn

pytestmark = pytest.mark.on_devices("tests-functions")

FLOAT32 = MIXES["float32"]
HALF_GRAD = MIXES["bfloat16 grad, float32 states"]


@every_rule
@every_mix
def test_out_is_returned(rule: Rule, mix: Mix) -> None:
    operands = make_operands(rule, (3, 50), mix)
    fresh_operands = operands.clone()
    fresh = call(rule, rule.usual, fresh_operands)
    out = torch.full_like(fresh, 7.0)
    assert check_call(rule, rule.usual, operands, out=out) is out
    assert_equal_results(rule, (out, operands), (fresh, fresh_operands))


@every_rule
@pytest.mark.parametrize("container", [list, tuple], ids=["list", "tuple"])
def test_out_is_a_sequence(rule: Rule, container: Any) -> None:
    positions = [make_operands(rule, (3, i), mix, i) for i, mix in enumerate(MIXES.values())]
    copies = [position.clone() for position in positions]
    fresh = call(rule, rule.usual, copies)
    out = container(torch.full_like(update, 7.0) for update in fresh)
    tensors = list(out)
    assert check_call(rule, rule.usual, positions, out=out) is out
    assert all(a is b for a, b in zip(out, tensors, strict=True))
    for i in range(len(positions)):
        assert_equal_results(rule, (out[i], positions[i]), (fresh[i], copies[i]), f"[{i}]")


@every_rule
@every_mix
def test_out_is_grad(rule: Rule, mix: Mix) -> None:
    for layout in LAYOUTS.values():
        operands = lay_out(make_operands(rule, LAYOUT_SHAPE, mix), layout)
        if 0 in operands.grad.stride():
            continue
        separate = operands.clone()
        out = torch.empty_like(separate.grad)
        call(rule, rule.usual, separate, out=out)
        assert check_call(rule, rule.usual, operands, out=operands.grad) is operands.grad
        assert_equal_results(rule, (operands.grad, operands), (out, separate))


@every_rule
def test_out_is_the_list_of_gradients(rule: Rule) -> None:
    positions = [make_operands(rule, (3, i), mix, i) for i, mix in enumerate(MIXES.values())]
    before = [position.clone() for position in positions]
    grads = [position.grad for position in positions]
    states = [[position.states[i] for position in positions] for i in range(len(rule.states))]
    assert rule.function(grads, *states, **rule.usual, out=grads) is grads
    for position, old in zip(positions, before, strict=True):
        assert_close_to_oracle(rule, rule.usual, old, position.grad, position.states)


@every_rule
def test_out_is_keyword_only(rule: Rule) -> None:
    operands = make_operands(rule, (3,), FLOAT32)
    arguments = rule.defaults | rule.usual
    # The dictionary is not in the order of the signature: look up all positional arguments by name.
    parameters = inspect.signature(rule.function).parameters.values()
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    values = [arguments[name] for name in names[1 + len(rule.states) :]]
    others = {name: arguments[name] for name in arguments if name not in names}
    rule.function(*operands, *values, **others)
    with pytest.raises(TypeError, match="positional"):
        rule.function(*operands, *values, torch.empty(3), **others)


rules_with_step = pytest.mark.parametrize(
    "rule", [rule for rule in RULES.values() if rule.has_step], ids=str
)
rules_with_betas = pytest.mark.parametrize(
    "rule", [rule for rule in RULES.values() if "betas" in rule.usual], ids=str
)


@rules_with_step
@pytest.mark.parametrize(
    "step",
    [
        3.0,
        np.int64(3),
        np.int32(3),
        np.uint8(3),
        np.float64(3.0),
        np.float32(3.0),
        torch.tensor(3),
        torch.tensor(3.0),
    ],
    ids=lambda step: f"{type(step).__name__}-{step}",
)
def test_step_may_be_any_integer(rule: Rule, step: Any) -> None:
    operands = make_operands(rule, (3, 50), HALF_GRAD)
    wanted_operands = operands.clone()
    # A case in which the step affects the result of every rule.
    case = rule.cases.get("nesterov", rule.usual)
    wanted = call(rule, case | {"step": 3}, wanted_operands)
    update = call(rule, case | {"step": step}, operands)
    assert_equal_results(rule, (update, operands), (wanted, wanted_operands))


@rules_with_betas
@pytest.mark.parametrize(
    "container", [list, tuple, np.array, lambda betas: [np.float64(b) for b in betas]]
)
def test_betas_may_be_any_sequence(rule: Rule, container: Any) -> None:
    operands = make_operands(rule, (3, 50), FLOAT32)
    wanted_operands = operands.clone()
    wanted = call(rule, rule.usual, wanted_operands)
    betas = container(rule.usual["betas"])
    update = call(rule, rule.usual | {"betas": betas}, operands)
    assert_equal_results(rule, (update, operands), (wanted, wanted_operands))


@every_rule
def test_numpy_scalars(rule: Rule) -> None:
    operands = make_operands(rule, (3, 50), FLOAT32)
    wanted_operands = operands.clone()
    wanted = call(rule, rule.usual, wanted_operands)
    convert = {bool: np.bool_, int: np.int64, float: np.float64}
    case = {
        key: convert.get(type(value), lambda same: same)(value) for key, value in rule.usual.items()
    }
    update = call(rule, case, operands)
    assert_equal_results(rule, (update, operands), (wanted, wanted_operands))


@every_rule
def test_arguments_are_not_modified(rule: Rule) -> None:
    positions = [make_operands(rule, (3, i), FLOAT32, i) for i in range(4)]
    grads = [position.grad for position in positions]
    states = [[position.states[i] for position in positions] for i in range(len(rule.states))]
    lists = [list(tensors) for tensors in (grads, *states)]
    case = copy.deepcopy(rule.usual)
    rule.function(grads, *states, **case)
    assert case == rule.usual
    for tensors, same in zip((grads, *states), lists, strict=True):
        assert all(a is b for a, b in zip(tensors, same, strict=True))


@every_rule
def test_defaults(rule: Rule) -> None:
    explicit = {key: value for key, value in rule.usual.items() if key not in rule.defaults}
    operands = make_operands(rule, (3, 50), FLOAT32)
    wanted_operands = operands.clone()
    wanted = call(rule, explicit | rule.defaults, wanted_operands)
    update = call(rule, explicit, operands)
    assert_equal_results(rule, (update, operands), (wanted, wanted_operands))


@every_rule
def test_sequences_other_than_lists(rule: Rule) -> None:
    positions = [make_operands(rule, (3, i), FLOAT32, i) for i in range(1, 5)]
    copies = [position.clone() for position in positions]
    wanted = call(rule, rule.usual, copies)
    grads = tuple(position.grad for position in positions)
    states = [
        nn.ParameterList([nn.Parameter(position.states[i]) for position in positions])
        for i in range(len(rule.states))
    ]
    updates = rule.function(grads, *states, **rule.usual)
    assert type(updates) is list
    for i, position in enumerate(positions):
        got = Operands(position.grad, [parameters[i] for parameters in states])
        assert_equal_results(rule, (updates[i], got), (wanted[i], copies[i]), f"[{i}]")


@every_rule
def test_empty_sequences(rule: Rule) -> None:
    assert call(rule, rule.usual, []) == []
    out: list[Tensor] = []
    assert call(rule, rule.usual, [], out=out) is out
    assert out == []
    empty_tuple = rule.function((), *[()] * len(rule.states), **rule.usual)
    assert empty_tuple == []
    assert type(empty_tuple) is list


@every_rule
def test_list_of_one(rule: Rule) -> None:
    operands = make_operands(rule, (3, 50), FLOAT32)
    copies = operands.clone()
    (update,) = call(rule, rule.usual, [operands])
    assert_equal_results(
        rule, (update, operands), (call(rule, rule.usual, copies), copies), "list of one"
    )
