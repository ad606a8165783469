"""The fallback: formulas in PyTorch operations, for other devices and without native kernels.

They must satisfy the error bounds of the native kernels. To first order, with u = 2^-24, a moment
has an error of 3 u (its weight, the product, the sum), its bias correction 2 u, the sum of two such
terms 1 u, the square root of the second moment (4 u, then 2 u for its correction) half of 6 u and
1 u, the sum with eps 1 u and the quotient 1 u: 12 u in all, or 6 x 2^-23.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracle import ALL_RULES, IS_USER, RULES, Rule, is_square
from support import (
    DTYPES,
    LAYOUT_SHAPE,
    LAYOUTS,
    MIXES,
    Layout,
    Mix,
    Operands,
    assert_close_to_oracle,
    assert_equal_bits,
    call,
    check_call,
    every_mix,
    every_rule,
    lay_out,
    make_operands,
    round_once,
    run_python,
)
from torch import Tensor

from emerging_optimizers import _rule
from emerging_optimizers._native import native

# Natively, 1 - beta**step does not cancel. A user's formula computes it as it is written.
CANCELS = ("betas near 1",) if IS_USER else ()
every_case = pytest.mark.parametrize(
    ("rule", "case_name"),
    [
        pytest.param(rule, name, id=f"{rule}-{name}")
        for rule in ALL_RULES.values()
        for name in rule.cases
        if name not in CANCELS
    ],
)


# ---- the formulas --------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_formula(rule: Rule, case_name: str, dtype: torch.dtype) -> None:
    case = rule.cases[case_name]
    operands = make_operands(rule, (5, 670), Mix(dtype, (dtype, dtype, dtype)))
    before = operands.clone()
    values = rule.complete(case)
    update = rule.implementation.compute_update(operands.grad, operands.states, values)
    assert_close_to_oracle(rule, case, before, update, operands.states, case_name)
    assert_equal_bits(operands.grad, before.grad, "grad")


# ---- the operators' kernel for devices without a native one --------------------------------------


@pytest.fixture
def fallback(monkeypatch: pytest.MonkeyPatch) -> Callable[[Rule], Rule]:
    """Return rules that call the fallback kernel with CPU tensors.

    The dispatch key is that of a device without a native kernel.
    """
    if native is None:
        pytest.skip("there are no native kernels to fall back from")
    for rule in ALL_RULES.values():
        monkeypatch.setattr(rule.implementation, "_native_devices", ())
    elsewhere = torch._C.DispatchKeySet(torch._C.DispatchKey.MPS)

    def through_the_dispatcher(rule: Rule) -> Rule:
        operator = rule.operator
        names = [argument.name for argument in operator._schema.arguments]
        hyperparameters = names[2 + len(rule.states) : -1]

        def function(
            grad: Tensor | Sequence[Tensor],
            *states: Tensor | Sequence[Tensor],
            out: Tensor | Sequence[Tensor] | None,
            **case: Any,
        ) -> Any:
            is_single = isinstance(grad, Tensor)
            lists = [[value] if is_single else list(value) for value in (grad, *states)]
            if out is None:
                updates = [
                    torch.empty_like(model, dtype=torch.promote_types(g.dtype, model.dtype))
                    for g, model in zip(lists[0], (lists[1] if states else lists[0]), strict=True)
                ]
            else:
                updates = [out] if isinstance(out, Tensor) else list(out)
            values = rule.complete(case)
            options = [values[name] for name in hyperparameters]
            operator.redispatch(elsewhere, updates, *lists, *options)
            if out is not None:
                return out
            return updates[0] if is_single else updates

        return replace(rule, function=function)

    return through_the_dispatcher


Fallback = Callable[[Rule], Rule]


@every_rule
def test_fallback_is_the_formula(
    rule: Rule, fallback: Fallback, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Otherwise all tests below might test the native kernel.
    calls = []

    def spy(self: _rule.Rule, *arguments: Any) -> None:
        calls.append(self.name)

    monkeypatch.setattr(_rule.Rule, "_apply_formula", spy)
    call(fallback(rule), rule.usual, make_operands(rule, (3,), MIXES["float32"]))
    assert calls == [rule.name]


@every_case
def test_fallback_values(rule: Rule, case_name: str, fallback: Fallback) -> None:
    for mix_name, mix in MIXES.items():
        operands = make_operands(rule, (5, 67), mix)
        label = f"{case_name}, {mix_name}"
        check_call(fallback(rule), rule.cases[case_name], operands, label=label)


@every_case
def test_fallback_list(rule: Rule, case_name: str, fallback: Fallback) -> None:
    positions = [
        make_operands(rule, (7, 3 * i), mix, seed=i) for i, mix in enumerate(MIXES.values())
    ]
    check_call(fallback(rule), rule.cases[case_name], positions, label=case_name)


@every_rule
@pytest.mark.parametrize("layout", list(LAYOUTS.values()), ids=list(LAYOUTS))
def test_fallback_layouts(rule: Rule, layout: Layout, fallback: Fallback) -> None:
    for mix in MIXES.values():
        operands = lay_out(make_operands(rule, LAYOUT_SHAPE, mix), layout)
        check_call(fallback(rule), rule.usual, operands)


@every_rule
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (2, 1, 3)], ids=str)
def test_fallback_shapes(rule: Rule, shape: tuple[int, ...], fallback: Fallback) -> None:
    for mix in MIXES.values():
        check_call(fallback(rule), rule.usual, make_operands(rule, shape, mix))


@every_rule
@every_mix
def test_fallback_out(rule: Rule, mix: Mix, fallback: Fallback) -> None:
    for dtype in DTYPES:
        out = torch.full((3, 50), 7.0, dtype=dtype)
        check_call(fallback(rule), rule.usual, make_operands(rule, (3, 50), mix), out=out)
    operands = make_operands(rule, (3, 50), mix)
    check_call(fallback(rule), rule.usual, operands, out=operands.grad)


@every_rule
@every_mix
def test_fallback_specials(rule: Rule, mix: Mix, fallback: Fallback) -> None:
    specials = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -2.0])
    for case_name, case in rule.cases.items():
        if case_name in CANCELS:
            continue
        grids = torch.meshgrid(*[specials] * (1 + len(rule.states)), indexing="ij")
        grad, *states = (grid.reshape(7, -1).clone() for grid in grids)
        states = [
            (state.abs() if is_square(name) else state).to(dtype)
            for name, state, dtype in zip(rule.states, states, mix.of(rule), strict=True)
        ]
        operands = Operands(grad.to(mix.grad), states)
        check_call(fallback(rule), case, operands, label=case_name)


@pytest.mark.parametrize("name", [name for name in ("lion", "signum") if name in RULES])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fallback_rounds_once(name: str, dtype: torch.dtype, fallback: Fallback) -> None:
    # With a beta of 0, the momentum becomes the gradient: float64 numbers next to midpoints of a
    # half type, which rounding to float32 first would turn into midpoints.
    rule = RULES[name]
    digits = {torch.bfloat16: 8, torch.float16: 11}[dtype]
    halfway = (torch.arange(2 ** (digits - 1), 2**digits, dtype=torch.float64) + 0.5) / 2**digits
    grad = torch.cat([halfway, halfway * (1 - 2.0**-40), halfway * (1 + 2.0**-40)])
    exp_avg = torch.zeros_like(grad, dtype=dtype)
    case = rule.cases["zero betas" if name == "lion" else "zero beta"]
    call(fallback(rule), case, Operands(grad, [exp_avg]))
    assert_equal_bits(exp_avg, round_once(grad, dtype), f"{rule}: exp_avg")


@every_rule
def test_fallback_leaves_that_require_grad(rule: Rule, fallback: Fallback) -> None:
    operands = make_operands(rule, (3, 50), MIXES["bfloat16 grad, float32 states"])
    leaves = Operands(
        operands.grad.requires_grad_(), [state.requires_grad_() for state in operands.states]
    )
    versions = [tensor._version for tensor in leaves]
    check_call(fallback(rule), rule.usual, leaves)
    assert all(tensor.is_leaf and tensor.requires_grad for tensor in leaves)
    grad, *states = (t._version - v for t, v in zip(leaves, versions, strict=True))
    assert grad == 0
    assert all(count > 0 for count in states)


# ---- without the compiled module -----------------------------------------------------------------

_WITHOUT_COMPILED_MODULE = """
import importlib.abc
import json
import sys
import warnings


class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "emerging_optimizers._C":
            raise ImportError("blocked for this test")
        return None


sys.meta_path.insert(0, Block())
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import emerging_optimizers
seen = [(w.category.__name__, str(w.message)) for w in caught]
from emerging_optimizers._native import native, reason
assert native is None
import test_fallback
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    calls = test_fallback.check_public_functions()
later = [(w.category.__name__, str(w.message)) for w in caught]
print(json.dumps({"warnings": seen, "later": later, "reason": reason, "calls": calls}))
"""


def check_public_functions() -> int:
    """Check the public functions with all rules, cases and mixes: tensors, lists and out=."""
    calls = 0
    for rule in RULES.values():
        for case_name, case in rule.cases.items():
            if case_name in CANCELS:
                continue
            positions = []
            for seed, mix in enumerate(MIXES.values()):
                operands = make_operands(rule, (5, 67), mix, seed)
                positions.append(operands.clone())
                check_call(rule, case, operands, label=case_name)
                out = torch.empty(5, 67, dtype=torch.bfloat16)
                check_call(rule, case, operands, out=out, label=case_name)
                check_call(rule, case, operands, out=operands.grad, label=case_name)
                calls += 3
            check_call(rule, case, positions, label=case_name)
            outs = tuple(torch.empty(5, 67) for _ in positions)
            check_call(rule, case, positions, out=outs, label=case_name)
            calls += 2
        for layout in LAYOUTS.values():
            operands = lay_out(make_operands(rule, LAYOUT_SHAPE, MIXES["mixed states"]), layout)
            check_call(rule, rule.usual, operands)
            calls += 1
        assert call(rule, rule.usual, []) == []
    return calls


def test_without_the_compiled_module() -> None:
    done = run_python(_WITHOUT_COMPILED_MODULE, EMERGING_OPTIMIZERS_JIT="0")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["warnings"] == []
    reason = "blocked for this test; EMERGING_OPTIMIZERS_JIT=0"
    assert result["reason"] == reason
    runs = "runs its formula in PyTorch operations, tensor by tensor"
    users = [f"the rule {rule} {runs}: {reason}" for rule in RULES.values()]
    assert result["later"] == [["RuntimeWarning", text] for text in users if IS_USER]
    assert result["calls"] > 500
