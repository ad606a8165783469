"""What can be written in a rule: compiled, interpreted, in the fallback and as a formula."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from interpreting import in_the_fallback, interpreted
from torch import Tensor

import emerging_optimizers as eo
from emerging_optimizers._native import native

pytestmark = pytest.mark.usefixtures("_no_other_device", "_quick_builds")
needs_native = pytest.mark.skipif(native is None, reason="there are no native kernels")
NATIVE_MODES = ["compiled", "interpreted"]
MODES = [*(pytest.param(mode, marks=needs_native) for mode in NATIVE_MODES), "fallback"]
every_mode = pytest.mark.parametrize("mode", MODES)


# ---- comparing -----------------------------------------------------------------------------------


def operands(count: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Tensors in which special values of each meet many of the others'."""
    special = [0.0, -0.0, math.inf, math.nan, 1.0, -1.0, 0.5, -0.5, 2.0, -3.0]
    tensors = []
    for i in range(count):
        generator = torch.Generator().manual_seed(i)
        values = torch.randn(80, generator=generator, dtype=torch.float64)
        values[i : 10 * (i + 1) : i + 1] = torch.tensor(special, dtype=torch.float64)
        tensors.append(values.to(dtype))
    return tensors


def reference(
    rule: Any, tensors: Sequence[Tensor], values: dict[str, Any]
) -> tuple[Tensor, list[Tensor]]:
    """Return the update and the states of the formula as typed."""
    grad, *states = (tensor.clone() for tensor in tensors)
    result = rule.formula(grad, *states, **values)
    update, *new = result if isinstance(result, tuple) else (result, *states)
    full = [
        torch.zeros_like(tensors[0])
        if value is None
        else torch.as_tensor(value, dtype=torch.float64).expand_as(tensors[0])
        for value in (update, *new)
    ]
    return full[0], full[1:]


@functools.cache
def in_mode(rule: Any, mode: str) -> Callable[..., Any]:
    """Return the rule, or one of the same function that is interpreted or runs the formula."""
    if mode == "compiled":
        rule.compile()
        return rule
    return interpreted(rule) if mode == "interpreted" else in_the_fallback(rule)


def check(rule: Any, mode: str, labels: Sequence[str] = (), **values: Any) -> None:
    """Assert that the rule computes what its formula does in float64, and changes no gradient."""
    call = in_mode(rule, mode)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        tensors = operands(1 + len(rule.states), dtype)
        wanted, new = reference(rule, [tensor.double() for tensor in tensors], values)
        kept = [tensor.clone() for tensor in tensors]
        updates = call(*([tensor] for tensor in tensors), **values)
        names = ("grad", *(labels or ("update", *rule.states)))
        pairs = zip(
            (tensors[0], updates[0], *tensors[1:]), (kept[0].double(), wanted, *new), strict=True
        )
        for i, (got, want) in enumerate(pairs):
            assert got.dtype == dtype
            what = names[i] if i < len(names) else f"result {i}"
            torch.testing.assert_close(
                got.double(),
                want,
                rtol=tolerance,
                atol=tolerance,
                equal_nan=True,
                msg=lambda text, what=what: f"{what}: {text}",
            )
        out = kept[0]
        assert call(*kept, **values, out=out) is out
        torch.testing.assert_close(out, updates[0], rtol=0, atol=0, equal_nan=True)


def make(text: str, name: str, **names: Any) -> Any:
    """Return the rule that a text defines, for which there is no source file."""
    namespace = {"eo": eo, "torch": torch, "math": math, "np": np, "__name__": __name__, **names}
    exec(text, namespace)
    return namespace[name]


# ---- the operations ------------------------------------------------------------------------------

OPERATIONS = """
grad + a ; grad - a ; grad * a ; grad / a ; grad + 1 ; 1 - grad ; 3 * grad ; 1 / grad ; grad / 3
grad / h ; h / grad ; -grad ; +grad ; abs(grad) ; grad**2 ; grad**3 ; grad**-1 ; grad**0
grad**True ; grad.abs() ** 0.5 ; grad.abs() ** 1.5 ; grad.abs() ** -0.5 ; (grad > a) * b
(grad >= a) * b ; (grad < a) * b ; (grad <= 0) * b ; (grad == a) * b ; (grad != a) * b
(1 > grad) * b ; grad.add(a) ; grad.add(a, alpha=h) ; grad.add(2, alpha=3)
torch.add(input=grad, other=a) ; grad.sub(a, alpha=h) ; torch.subtract(grad, a)
grad.mul(other=h) ; torch.multiply(grad, a) ; grad.div(a) ; grad.divide(h) ; grad.true_divide(a)
torch.rsub(grad, a, alpha=2) ; grad.neg() ; grad.negative() ; torch.abs(grad) ; grad.absolute()
grad.sign() ; torch.sgn(grad) ; grad.copysign(a) ; torch.copysign(grad, -h) ; grad.square()
torch.sqrt(grad) ; grad.rsqrt() ; grad.reciprocal() ; torch.pow(grad, 2) ; grad.pow(exponent=3)
grad.addcmul(a, b) ; torch.addcmul(grad, a, b, value=h) ; grad.addcdiv(a, b, value=-h)
grad.addcdiv(tensor1=a, tensor2=b) ; grad.lerp(a, h) ; torch.lerp(grad, a, 0.75)
grad.lerp(a, 1 - h) ; grad.lerp(a, b.clamp(0, 1)) ; torch.lerp(input=grad, end=a, weight=0.2)
grad.clamp(-1, 1) ; torch.clamp(grad, min=h) ; grad.clip(max=a) ; grad.clamp(a, b)
grad.clamp(None, 2) ; grad.clamp_min(0.5) ; grad.clamp_max(a) ; grad.relu()
torch.nn.functional.relu(grad) ; torch.maximum(grad, a) ; grad.minimum(a) ; torch.max(grad, a)
grad.min(a) ; torch.where(grad > 0, grad, a) ; grad.where(grad > 0, 0.0)
torch.where(grad > 0, h, -h) ; torch.where(grad > 0, 1, 0) * a ; torch.where(a > 0, 1.0, b)
torch.where(condition=grad > 0, input=a, other=b) ; torch.where(grad > 0, a > b, a < b) * a
grad.masked_fill(grad > 0, h) ; grad.masked_fill(mask=a.isnan(), value=0) ; grad.lt(a) * b
torch.less(grad, a) * b ; grad.le(a) * b ; grad.less_equal(0) * b ; torch.gt(grad, h) * b
grad.greater(a) * b ; grad.ge(a) * b ; grad.greater_equal(a) * b ; grad.eq(a) * b ; grad.ne(0) * b
grad.not_equal(a) * b ; torch.logical_and(grad > 0, a > 0) * b ; (grad > 0).logical_or(a > 0) * b
torch.logical_not(grad > 0) * b ; torch.logical_xor(grad > 0, a > 0) * b ; torch.isnan(grad) * 2
grad.isinf() * 2 ; torch.isfinite(grad) * 2 ; grad.clone() ; torch.clone(grad) ; grad.detach()
grad.data ; torch.zeros_like(grad) + a ; torch.ones_like(grad) * a ; torch.full_like(grad, h) * a
grad.to(a.dtype) ; grad.type_as(a) ; (grad > 0).to(grad.dtype) - 1 ; (grad > 0).float() - 1
(grad > 0).type_as(a) - a ; (grad > 0) & (a > 0) ; (grad > 0) | (a > 0) ^ (b > 0)
~(grad > 0) * a ; (grad > 0) + (a > 0) ; (grad > 0) * (a > 0) + (b > 0) ; (grad > 0) + 1
2 * (grad > 0) - 1 ; (grad > 0) / 2 ; (grad > 0) & (h > 0.5) ; ((grad > 0) & True) * a
(grad > 0) & (step == 1) ; torch.maximum(grad > 0, a)
torch.where(grad > 0, a > 0, b > 0) + (a > 1) ; grad.addcmul(a > 0, b) ; torch.tensor(2.0) * grad
grad - torch.tensor(0.5) ; torch.tensor(2) / grad ; grad**torch.tensor(2.0)
torch.tensor(0.5) < grad ; torch.maximum(grad, torch.tensor(0.5)) ; torch.tensor(h) * grad
np.float32(0.5) * grad ; grad - np.float64(0.1) ; np.int64(3) * grad ; np.sqrt(2.0) * grad
"""
EXPRESSIONS = [
    part.strip() for part in OPERATIONS.replace("\n", " ; ").split(" ; ") if part.strip()
]
# In a case of a rule, one expression is the update and the others are states' new values.
_PER_CASE = 6
_CASES = 12
GROUPS = [EXPRESSIONS[i : i + _PER_CASE] for i in range(0, len(EXPRESSIONS), _PER_CASE)]


@functools.cache
def rule_of_operations(part: int) -> Any:
    """Return a rule that has several of the groups, as its cases."""
    name = f"definitions_operations_{part}"
    lines = [f"@eo.rule\ndef {name}(grad, a, b, c, d, e, *, which: int, h, step):"]
    for i, group in enumerate(GROUPS[part * _CASES : (part + 1) * _CASES]):
        results = [*group, *["a + grad"] * (_PER_CASE - len(group))]
        lines.append(f"    if which == {i}:\n        return {', '.join(results)}")
    lines.append("    return a, b, c, d, e, grad\n")
    return make("\n".join(lines), name)


@pytest.mark.parametrize("index", range(len(GROUPS)), ids=[group[0] for group in GROUPS])
@every_mode
def test_operations(index: int, mode: str) -> None:
    part, which = divmod(index, _CASES)
    check(rule_of_operations(part), mode, GROUPS[index], which=which, h=0.25, step=2)


# ---- states, aliases and results -----------------------------------------------------------------

BODIES = {
    "functional": "a = h * a + grad\nb = b * 2\nreturn a - b, a, b",
    "in place": "a.mul_(h).add_(grad)\nb.add_(grad, alpha=1 - h)\nreturn a + b",
    "mixed": "a.mul_(h).add_(grad)\nreturn a, a, b + a",
    "operators in place": "a *= h\na += grad\nb -= a\nb /= 3\nreturn b",
    "powers in place": "a **= 2\nb.pow_(3)\nreturn grad",
    "update is a state": "a.add_(grad)\nb.add_(a)\nreturn a",
    "update is another's new value": "a.add_(grad)\nb.add_(a)\nreturn b, b, a",
    "update is the gradient": "a.add_(grad)\nb.sub_(grad)\nreturn grad",
    "states swapped": "a, b = b, a\nreturn a + grad, a, b",
    "state in another's place": "return a + b, b, a + grad",
    "old state as the update": "return a, a + grad, b * 2",
    "gradient as a state": "return grad, b, grad",
    "one tensor three times": "a.add_(grad)\nb.add_(1)\nreturn a, a, a",
    "name, then in place": "x = a\nx += grad\nreturn x, a, b * 2",
    "detach, then in place": "x = a.detach()\nx.add_(grad)\nb.add_(1)\nreturn x",
    "data, then in place": "a.data.add_(grad)\nb.data.mul_(2)\nreturn a.data",
    "clone, then in place": "x = a.clone()\nx += grad\nreturn x, a * 2, b + 1",
    "new tensor, in place": "x = torch.zeros_like(a)\nx.add_(grad)\nreturn x, a + x, b * 2",
    "gradient in place": "grad.mul_(h).add_(a)\na.add_(grad)\nb.add_(1)\nreturn grad",
    "gradient in place, returned twice": "grad += a\nreturn grad, grad, b + grad",
    "condition in place": "x = grad > 0\nx |= a > 0\nx &= b < 1\nx ^= a < 0\nreturn x, a + x, -b",
    "condition as update": "a.copy_(grad > 0)\nb.fill_(h)\nreturn a > b",
    "condition as state": "return grad, a > 0, b == a",
    "number as update": "a.add_(grad)\nb.zero_()\nreturn 1.5",
    "hyperparameter as update": "a.add_(grad)\nb.mul_(2)\nreturn h, a, step",
    "truth as update": "a.add_(grad)\nb.mul_(2)\nreturn h > 0",
    "constant tensor as update": "a.add_(grad)\nb.mul_(2)\nreturn torch.tensor(3)",
    "bare return": "a.add_(grad)\nb.mul_(2)\nif step < 3:\n    return\nreturn a",
    "None": "a.add_(grad)\nb.mul_(2)\nif step < 3:\n    return None, b, a\nreturn a",
    "None later": "a.add_(grad)\nif step > 3:\n    return None, a, b * 2\nreturn a, a, b - a",
    "functions in place": "torch.sqrt_(a)\ntorch.clamp_(b, min=h)\nreturn torch.relu_(grad - 1)",
    "methods in place": (
        "a.sign_().square_().reciprocal_().neg_().lerp_(grad, 1 - h)\n"
        "b.addcmul_(a, grad, value=h).clamp_(-2, 2).addcdiv_(grad, a)\nreturn b.abs_().rsqrt_()"
    ),
    "more methods in place": (
        "a.subtract_(grad).multiply_(h).divide_(2).clip_(0, 1).masked_fill_(grad > 0, 0.0)\n"
        "b.copysign_(a).gt_(0).add_(grad > 0)\nreturn a"
    ),
    "no_grad": "with torch.no_grad():\n    a.add_(grad)\nb.add_(1)\nreturn a",
}
NAMES = list(BODIES)


def body_rule(name: str) -> Any:
    lines = BODIES[name].replace("\n", "\n    ")
    number = NAMES.index(name)
    text = f"@eo.rule\ndef definitions_body_{number}(grad, a, b, *, h, step):\n    {lines}\n"
    return make(text, f"definitions_body_{number}")


@pytest.mark.parametrize("name", NAMES)
def test_bodies_in_the_fallback(name: str) -> None:
    check(body_rule(name), "fallback", h=0.25, step=2)


@functools.cache
def rule_of_bodies(part: int) -> Any:
    """Return a rule whose cases are several of the bodies."""
    lines = [f"@eo.rule\ndef definitions_bodies_{part}(grad, a, b, *, which: int, h, step):"]
    for i, name in enumerate(NAMES[part * 10 : (part + 1) * 10]):
        body = BODIES[name].replace("\n", "\n        ")
        lines.append(f"    if which == {i}:\n        {body}")
    lines.append("    return a, a + grad, b * 2\n")
    return make("\n".join(lines), f"definitions_bodies_{part}")


@needs_native
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", NATIVE_MODES)
def test_bodies_natively(name: str, mode: str) -> None:
    part, which = divmod(NAMES.index(name), 10)
    check(rule_of_bodies(part), mode, which=which, h=0.25, step=2)
