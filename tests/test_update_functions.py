"""The keyword-only forms of the update functions compute what the documented functions do."""

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from oracle import RULES, Rule
from support import MIXES, Operands, assert_equal_bits, make_operands
from torch import Tensor

from emerging_optimizers import scalar_optimizers
from emerging_optimizers.scalar_optimizers import update_functions

pytestmark = [
    pytest.mark.on_devices("tests-functions"),
    pytest.mark.builtin_rules("users' rules have one form"),
]

# As in NVIDIA's package, and `out`.
SIGNATURES = {
    "adam": "(grad, exp_avg, exp_avg_sq, *, betas, eps, correct_bias, nesterov, step, out=None)",
    "ademamix": "(grad, exp_avg_fast, exp_avg_slow, exp_avg_sq, *, betas, eps, correct_bias, step,"
    " num_beta_slow_warmup_steps, num_alpha_warmup_steps, alpha=2, out=None)",
    "laprop": "(grad, exp_avg, exp_avg_sq, *, betas, eps, correct_bias, step, out=None)",
    "lion": "(grad, exp_avg, *, betas, step=None, out=None)",
    "madam": "(grad, exp_avg, exp_avg_sq_scaled, *, betas, correct_bias, step, scale_log2,"
    " out=None)",
    "rmsprop": "(grad, exp_avg_sq, *, alpha, eps, step=None, out=None)",
    "signum": "(grad, exp_avg, *, momentum, correct_bias, nesterov, step, use_shape_scaling=False,"
    " out=None)",
    "sim_ademamix": "(grad, exp_avg, exp_avg_sq, *, betas, eps, correct_bias, step,"
    " num_beta_fast_warmup_steps, min_beta_fast, alpha=2, out=None)",
}
EVERY_RULE = [RULES[name] for name in SIGNATURES]
every_form = pytest.mark.parametrize("rule", EVERY_RULE, ids=str)


def function_of(rule: Rule) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(update_functions, f"calculate_{rule}_update")
    return function


def keywords(rule: Rule, case: Mapping[str, Any]) -> dict[str, Any]:
    """A case as arguments of the keyword-only form."""
    values = rule.complete(case)
    if rule.name == "lion":
        return {"betas": (values["momentum_beta"], values["momentum_beta2"])}
    names = {"use_nesterov": "nesterov", "momentum_beta": "momentum"}
    return {names.get(name, name): value for name, value in values.items()}


@pytest.mark.once
def test_signatures() -> None:
    functions = [getattr(update_functions, name) for name in update_functions.__all__]
    assert {f.__name__ for f in functions} == {f"calculate_{name}_update" for name in SIGNATURES}
    for rule in EVERY_RULE:
        signature = inspect.signature(function_of(rule))
        bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
        assert str(inspect.Signature(bare)) == SIGNATURES[rule.name]
        assert signature.return_annotation == Tensor | list[Tensor]


@every_form
@pytest.mark.parametrize("way", ["single", "list", "out"])
def test_same_bits(rule: Rule, way: str) -> None:
    for name, case in rule.cases.items():
        positions = [make_operands(rule, (5, 7), mix, seed=3) for mix in MIXES.values()]
        results = []
        for function, arguments in (
            (rule.function, dict(case)),
            (function_of(rule), keywords(rule, case)),
        ):
            copies = [operands.clone() for operands in positions]
            lists = [list(tensors) for tensors in zip(*copies, strict=True)]
            if way == "single":
                updates = [function(*operands, **arguments) for operands in copies]
            elif way == "list":
                updates = function(*lists, **arguments)
            else:
                out = [torch.empty_like(grad) for grad in lists[0]]
                updates = function(*lists, **arguments, out=out)
                assert updates is out
            results.append([*updates, *(t for operands in copies for t in operands)])
        for i, (wanted, got) in enumerate(zip(*results, strict=True)):
            assert_equal_bits(got, wanted, f"{rule}, {name}, tensor {i}")


@every_form
def test_step_may_be_given(rule: Rule) -> None:
    """Callers can pass `step` to all functions; those without bias correction ignore it."""
    operands = make_operands(rule, (3,), MIXES["float32"])
    arguments = keywords(rule, rule.usual)
    for step in (5, torch.tensor(5)):
        other = operands.clone()
        wanted = operands.clone()
        got = function_of(rule)(*other, **{**arguments, "step": step})
        case = {**rule.usual, "step": 5} if rule.has_step else rule.usual
        assert_equal_bits(got, rule.function(*wanted, **case), f"{rule}")


ERRORS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("adam", {"nesterov": 1}, TypeError, r"^nesterov must be a bool, not int \(1\)"),
    ("adam", {"betas": (1.0, 0.9)}, ValueError, r"^betas\[0\] is 1; expected 0 <= betas\[0\] < 1$"),
    ("lion", {"betas": (0.9, -1.0)}, ValueError, r"^betas\[1\] is -1; expected 0 <= betas\[1\] < "),
    ("lion", {"betas": (2.0, 0.9)}, ValueError, r"^betas\[0\] is 2; expected 0 <= betas\[0\] < 1$"),
    ("lion", {"betas": (None, 0.9)}, TypeError, r"^betas\[0\] must be a number, not NoneType"),
    ("lion", {"betas": (0.9, None)}, TypeError, r"^betas\[1\] must be a number, not NoneType"),
    ("lion", {"betas": 0.9}, TypeError, r"^betas must be a sequence of numbers, not float"),
    ("lion", {"betas": (0.9, 0.9, 0.9)}, ValueError, r"^betas has 3 values; expected 2$"),
    ("signum", {"momentum": 1.5}, ValueError, r"^momentum is 1\.5; expected 0 <= momentum < 1$"),
    ("signum", {"nesterov": None}, TypeError, r"^nesterov must be a bool, not NoneType"),
    ("signum", {"momentum": "0.9"}, TypeError, r"^momentum must be a number, not str \('0\.9'\)"),
    ("laprop", {"eps": -1.0}, ValueError, r"^eps is -1; expected eps >= 0$"),
]


@pytest.mark.parametrize(("name", "wrong", "kind", "message"), ERRORS)
@pytest.mark.parametrize("is_traced", [False, True], ids=["eager", "traced"])
def test_errors_name_the_arguments(
    name: str,
    wrong: dict[str, Any],
    kind: type[Exception],
    message: str,
    is_traced: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rule = RULES[name]
    function = function_of(rule)
    operands = make_operands(rule, (3, 2), MIXES["float32"])
    before = operands.clone()
    if is_traced:
        # The path that a traced call takes.
        module = inspect.getmodule(function)
        monkeypatch.setattr(module, "_call", rule.implementation._call)
    with pytest.raises(kind, match=message) as caught:
        function(*operands, **keywords(rule, rule.usual) | wrong)
    assert type(caught.value) is kind
    for got, wanted in zip(operands, before, strict=True):
        assert torch.equal(got, wanted)


@every_form
def test_errors_about_tensors_are_those_of_the_documented_function(rule: Rule) -> None:
    operands = make_operands(rule, (3, 2), MIXES["float32"])
    operands.states[0] = torch.zeros(2, 2)
    messages = []
    for function, arguments in (
        (rule.function, dict(rule.usual)),
        (function_of(rule), keywords(rule, rule.usual)),
    ):
        with pytest.raises(ValueError, match=rf"^{rule.states[0]} has shape") as caught:
            function(*operands, **arguments)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.real
@pytest.mark.parametrize("name", ["adam", "lion", "signum"])
@pytest.mark.parametrize("betas_type", [tuple, list])
def test_compiled(name: str, betas_type: type) -> None:
    rule = RULES[name]
    function = function_of(rule)
    arguments = keywords(rule, rule.usual)
    if "betas" in arguments:
        arguments["betas"] = betas_type(arguments["betas"])

    def update(operands: list[Tensor]) -> Any:
        return function(*operands, **arguments)

    operands = list(make_operands(rule, (4, 3), MIXES["float32"]))
    eager = copy.deepcopy(operands)
    got = torch.compile(update, fullgraph=True, backend="aot_eager")(operands)
    assert_equal_bits(got, update(eager), name)
    for a, b in zip(operands, eager, strict=True):
        assert_equal_bits(a, b, name)


@pytest.mark.real
@pytest.mark.parametrize("name", ["adam", "lion"])
def test_exported(name: str) -> None:
    rule = RULES[name]
    function, arguments = function_of(rule), keywords(rule, rule.usual)

    class Update(torch.nn.Module):
        def forward(self, operands: list[Tensor]) -> Any:
            return function(*operands, **arguments)

    operands = list(make_operands(rule, (4, 3), MIXES["float32"]))
    eager = copy.deepcopy(operands)
    exported = torch.export.export(Update(), (copy.deepcopy(operands),), strict=True)
    targets = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert rule.operator is None or rule.operator in targets
    got = exported.module()(operands)
    assert_equal_bits(got, Update()(eager), name)
    for a, b in zip(operands, eager, strict=True):
        assert_equal_bits(a, b, name)


@every_form
def test_no_graph_is_recorded(rule: Rule) -> None:
    operands = make_operands(rule, (3,), MIXES["float32"])
    grad = operands.grad.requires_grad_()
    update = function_of(rule)(*Operands(grad, operands.states), **keywords(rule, rule.usual))
    assert not update.requires_grad


@pytest.mark.once
def test_attribute_of_scalar_optimizers() -> None:
    assert scalar_optimizers.update_functions is update_functions
    assert scalar_optimizers.calculate_rmsprop_update is update_functions.calculate_rmsprop_update
