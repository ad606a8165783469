"""What rules refuse in words of the user, and where warnings point."""

import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import emerging_optimizers as eo
from emerging_optimizers import _native

pytestmark = pytest.mark.once

MATRIX = torch.eye(3)
REFUSED: list[tuple[Callable[..., Any], str]] = [
    (lambda x, n: x @ x, "`@`: reduces a tensor to one number"),
    (lambda x, n: MATRIX @ x, "reduces a tensor to one number"),
    (lambda x, n: n @ x, "`@`: reduces a tensor to one number"),
    (lambda x, n: x // 2, "`//` of a tensor: rounds elements to integers"),
    (lambda x, n: 2 // x, "`//` of a tensor: rounds elements to integers"),
    (lambda x, n: n // x, "`//` of a tensor: rounds elements to integers"),
    (lambda x, n: x % n, "`%` of a tensor: rounds elements to integers"),
    (lambda x, n: n % x, "`%` of a tensor: rounds elements to integers"),
    (lambda x, n: x << 1, "`<<`: rules have no integers; multiply by a power of 2"),
    (lambda x, n: 1 >> n, "`>>`: rules have no integers; divide by a power of 2"),
    (lambda x, n: round(x), "round() of a tensor: rounds elements to integers"),
    (lambda x, n: round(n, 2), "round() of a per-step number: use math.floor or math.ceil"),
    (lambda x, n: x.floor(), "Tensor.floor: rounds elements to integers"),
    (lambda x, n: torch.trunc(x), "torch.trunc: rounds elements to integers"),
    (lambda x, n: math.floor(x), "math.floor of a tensor: rounds elements to integers"),
    (lambda x, n: math.exp(x), "math.exp of a tensor: its bits differ between machines"),
    (lambda x, n: math.sqrt(x), "math.sqrt of a tensor: use torch.sqrt or the tensor's method"),
    (lambda x, n: n.sqrt() * x, ".sqrt of a hyperparameter or the step, which are numbers"),
    (lambda x, n: x * n[0], "one number where several are expected: give the hyperparameter"),
    (lambda x, n: sum(n) * x, "one number where several are expected: give the hyperparameter"),
    (lambda x, n: max(x, 0), "use torch.maximum(a, b), or clamp(min=...) with a number"),
    (lambda x, n: min(x, 0), "use torch.minimum(a, b), or clamp(max=...) with a number"),
    (lambda x, n: x.clamp(low=0), "with these arguments: got an unexpected keyword argument 'low'"),
]


@pytest.mark.parametrize(("formula", "message"), REFUSED)
def test_refused(formula: Callable[..., Any], message: str) -> None:
    def refused(grad: Any, *, number: float) -> Any:
        return formula(grad, number)

    line = formula.__code__.co_firstlineno
    with pytest.raises(eo.RuleError, match=re.escape(message)) as caught:
        eo.rule(refused)
    assert f"rule refused, {__file__}:{line}" in str(caught.value)


def test_whole_numbers_of_a_step() -> None:
    def rounded(grad: Any, *, period: float, step: Any) -> Any:
        return grad * (step // period + step % period)

    grad = torch.tensor([1.0, -2.0])
    rule = eo.rule(rounded)
    torch.testing.assert_close(rule(grad, period=4.0, step=7), 4 * grad, rtol=0, atol=0)


@pytest.mark.parametrize("use", ["call", "step", "compiled"])
def test_a_warning_points_at_the_users_line(use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "native", None)

    def halved(grad: Any) -> Any:
        return grad / 2

    rule = eo.rule(halved)

    class Halved(eo.ScalarOptimizer, rule=rule, lr=1.0):
        pass

    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer = Halved([weight])
    calls = {
        "call": lambda: rule(torch.ones(2)),
        "step": lambda: optimizer.step(),
        "compiled": lambda: torch.compile(rule, backend="eager")(torch.ones(2)),
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        calls[use]()
    places = [(w.filename, w.lineno) for w in caught if "runs its formula" in str(w.message)]
    assert places == [(__file__, calls[use].__code__.co_firstlineno)]
