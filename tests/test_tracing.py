"""Functions, operators and optimizers under PyTorch's tracers: correct, or an error."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from optimizers import Setup, assert_same, contents, every_optimizer, make_params, set_grads
from oracle import RULES, Rule
from support import (
    MIXES,
    Operands,
    assert_equal_bits,
    call,
    calls_in_python,
    every_rule,
    make_operands,
    needs_native,
)
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

# torch.jit is deprecated, and warns about values that a trace keeps as constants.
pytestmark = pytest.mark.filterwarnings("ignore")
CURE = "use torch.compile or torch.export, or call it outside of what is traced"


@pytest.fixture(autouse=True)
def _on_cpu(_default_device: None) -> Iterator[None]:
    with torch.device("cpu"):
        yield


def operands_of(rule: Rule) -> Operands:
    return make_operands(rule, (3, 5), MIXES["float32"])


def tensors_of(operands: Operands) -> tuple[Tensor, ...]:
    return (operands.grad, *operands.states)


def call_single(rule: Rule) -> Callable[..., Tensor]:
    return lambda grad, *states: call(rule, rule.usual, Operands(grad, list(states)))


def call_list(rule: Rule) -> Callable[..., Tensor]:
    return lambda grad, *states: call(rule, rule.usual, [Operands(grad, list(states))])[0]


def call_with_out(rule: Rule) -> Callable[..., Tensor]:
    return lambda grad, *states: call(rule, rule.usual, Operands(grad, list(states)), out=grad)


def call_operator(rule: Rule) -> Callable[..., Tensor]:
    operator = rule.operator

    def function(grad: Tensor, *states: Tensor) -> Tensor:
        update = torch.empty_like(grad)
        operator([update], [grad], *([state] for state in states), **rule.complete(rule.usual))
        return update

    return function


every_form = pytest.mark.parametrize("form", [call_single, call_list, call_with_out])
every_entry = pytest.mark.parametrize(
    "form", [call_single, call_list, call_with_out, pytest.param(call_operator, marks=needs_native)]
)


def assert_refuses(function: Callable[..., Tensor], operands: Operands, what: str) -> None:
    copies = operands.clone()
    message = re.escape(f"torch.jit.trace cannot record {what}: {CURE}")
    with pytest.raises(RuntimeError, match=message):
        torch.jit.trace(function, tensors_of(operands))
    for got, wanted in zip(tensors_of(operands), tensors_of(copies), strict=True):
        assert_equal_bits(got, wanted, "operand")


@every_rule
@every_entry
def test_jit_trace(rule: Rule, form: Callable[..., Any]) -> None:
    operands = operands_of(rule)
    assert_refuses(form(rule), operands, rule.implementation.title)
    # Later calls work.
    other = operands.clone()
    got = form(rule)(*tensors_of(operands))
    assert_equal_bits(got, call(rule, rule.usual, other), "update")


@every_rule
@every_form
def test_jit_trace_of_the_fallback(
    rule: Rule, form: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rule.implementation, "_operator", None)
    monkeypatch.setattr(*calls_in_python(rule))
    assert_refuses(form(rule), operands_of(rule), rule.implementation.title)


@every_optimizer
@pytest.mark.parametrize("fused", [None, False, pytest.param(True, marks=needs_native)])
def test_jit_trace_of_a_step(setup: Setup, fused: bool | None) -> None:
    params = make_params()
    optimizer = setup.make(params, fused=fused)
    set_grads(params, 1)

    def function(x: Tensor) -> Tensor:
        optimizer.step()
        return x + params[0]

    message = re.escape(f"torch.jit.trace cannot record an optimizer's step: {CURE}")
    for _ in range(2):
        before = contents(optimizer)
        with pytest.raises(RuntimeError, match=message):
            torch.jit.trace(function, (torch.ones(()),))
        assert_same(contents(optimizer), before)
        optimizer.step()
    assert {state["step"].item() for state in optimizer.state.values()} == {2}


def _script(updates: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor]) -> None:
    torch.ops.emerging_optimizers.lion_update_(updates, grads, exp_avgs, 0.9, 0.99)


@needs_native
@pytest.mark.builtin_rules("scripts name the operator")
def test_jit_script_of_an_operator() -> None:
    rule = RULES["lion"]
    operands = operands_of(rule)
    other = operands.clone()
    update = torch.empty_like(operands.grad)
    torch.jit.script(_script)([update], [operands.grad], operands.states)
    wanted = call(rule, rule.usual, other)
    assert_equal_bits(update, wanted, "update")
    assert_equal_bits(operands.states[0], other.states[0], "exp_avg")


@pytest.mark.builtin_rules("users' rules are objects, which TorchScript takes for classes")
@every_rule
def test_jit_script_of_a_function(rule: Rule) -> None:
    with pytest.raises(torch.jit.frontend.NotSupportedError, match="keyword-only arguments"):
        torch.jit.script(rule.function)


@every_rule
@every_entry
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic", "pre_dispatch"])
def test_make_fx(rule: Rule, form: Callable[..., Any], mode: str) -> None:
    traced = operands_of(rule)
    options: Any = {"pre_dispatch": True} if mode == "pre_dispatch" else {"tracing_mode": mode}

    def function(grad: Tensor, *states: Tensor) -> Tensor:
        return form(rule)(grad, *states)

    graph = make_fx(function, **options)(*tensors_of(traced))
    operands = make_operands(rule, (3, 5), MIXES["float32"], seed=7)
    other = operands.clone()
    got = graph(*tensors_of(operands))
    assert_equal_bits(got, form(rule)(*tensors_of(other)), "update")
    for a, b in zip(operands.states, other.states, strict=True):
        assert_equal_bits(a, b, "state")


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_with_a_step_tensor(mode: str) -> None:
    rule = RULES["adam"]
    operands = operands_of(rule)

    def function(step: Tensor, grad: Tensor, *states: Tensor) -> Tensor:
        return call(rule, {**rule.usual, "step": step}, Operands(grad, list(states)))

    step = torch.tensor(3)
    graph = make_fx(function, tracing_mode=mode)(step, *tensors_of(operands.clone()))
    other = operands.clone()
    got = graph(torch.tensor(8), *tensors_of(operands))
    assert_equal_bits(got, function(torch.tensor(8), *tensors_of(other)), "update")


@every_rule
def test_fx_symbolic_trace(rule: Rule) -> None:
    """Its proxies are not tensors."""
    names = ", ".join(["grad", *rule.states])
    function = eval(f"lambda {names}: form({names})", {"form": call_single(rule)})
    with pytest.raises((torch.fx.proxy.TraceError, TypeError), match="Proxy"):
        torch.fx.symbolic_trace(function)
