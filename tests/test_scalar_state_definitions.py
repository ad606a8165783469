"""What the definition of a rule with scalar states may be, and what is known of it."""

import re
from typing import Any

import numpy as np
import pytest
from scalar_rules import scalar_averages, scalar_nadam, scalar_phases
from test_rule_definitions import make

import emerging_optimizers as eo
from emerging_optimizers import RuleError

pytestmark = pytest.mark.once


DEFINITIONS = [
    # the signature, the body, and what the error says
    ("grad, m: eo.ScalarState, *, h=1.0", "grad, m", "m is positional, so it is a tensor: write"),
    ("grad, m: eo.ScalarState = 1.0", "grad, m", "m is positional, so it is a tensor: write"),
    ("grad, *, m: eo.ScalarState", "grad, m * 2", "as in m: eo.ScalarState = 1.0"),
    ("grad, *, m: eo.ScalarState = True", "grad, m * 2", "m is a scalar state: give it a default"),
    ("grad, *, m: eo.ScalarState = None", "grad, m * 2", "the default of a scalar state is its"),
    (
        "grad, *, m: eo.ScalarState = (1.0, 2.0)",
        "grad, m",
        "default of a scalar state is its first",
    ),
    ("grad, *, m: eo.ScalarState = 1e300", "grad, m + 1", "starts at 1e+300, beyond the range of"),
    ("grad, *, m: eo.ScalarState = '1'", "grad, m * 2", "default of a scalar state is its first"),
    ("grad, *, m: eo.ScalarState | None = 1.0", "grad, m", "expected Beta, NonNegative, float"),
    (
        ", ".join(["grad, *", *(f"s{i}: eo.ScalarState = 1.0" for i in range(5))]),
        "grad, s0, s1, s2, s3, s4",
        "5 scalar states; at most 4 are supported: split the rule",
    ),
    ("grad, *, m: eo.ScalarState = 1.0", "grad * m, m", "the scalar state m is never updated"),
    ("grad, *, m: eo.ScalarState = 1.0", "grad * m, grad", "returns a tensor for the scalar state"),
    (
        "grad, *, m: eo.ScalarState = 1.0",
        "grad * m",
        "update and 0 states; expected 1: m",
    ),
    (
        "grad, a, *, m: eo.ScalarState = 1.0",
        "grad * m, a, a, m",
        "3 states; expected 2: a, m; or",
    ),
    ("grad, a, *, m: eo.ScalarState = 1.0", "grad * m, m, a * 2", "tensor for the scalar state m"),
    (
        "grad, *, m: eo.ScalarState = 1.0",
        "grad * m, None",
        "None for the scalar state m; expected a number",
    ),
    ("grad, *, m: eo.ScalarState = 1.0", "grad * m, 'm'", "returns 'm' for the scalar state m"),
    ("grad, *, m: eo.ScalarState = 1.0", "None, m + 1", "the rule never returns an update"),
    ("grad, *, m: eo.ScalarState = 1.0", "m, m + 1", "the rule uses neither the gradient nor"),
    ("grad, *, step: eo.ScalarState = 1.0", "grad, step + 1", "step is the step number: name the"),
    ("grad, *, out: eo.ScalarState = 1.0", "grad, out + 1", "cannot be named out, which has"),
    ("grad, *, step_tensor: eo.ScalarState = 1.0", "grad, 1", "cannot be named step_tensor"),
    ("grad, *, master_param: eo.ScalarState = 1.0", "grad, 1", "cannot be named master_param"),
    ("grad, *, NoneType: eo.ScalarState = 1.0", "grad, 1", "NoneType is reserved in PyTorch's"),
    ("grad, a, *, a_list: eo.ScalarState = 1.0", "grad, a*2, 1", "a_list has the name of an"),
    ("grad, *, m: eo.ScalarState = 1.0", "grad, m.item()", "item"),
    (
        "grad, *, h=(1.0,) * 30, a: eo.ScalarState = 1, b: eo.ScalarState = 1,"
        " c: eo.ScalarState = 1",
        "grad, 1, 1, 1",
        "more than 32 numbers in total",
    ),
]


@pytest.mark.parametrize(("signature", "result", "text"), DEFINITIONS)
@pytest.mark.parametrize("as_text", [False, True])
def test_refused_definitions(signature: str, result: str, text: str, as_text: bool) -> None:
    future = "from __future__ import annotations\n" if as_text else ""
    code = f"{future}@eo.rule\ndef bad({signature}):\n    return {result}\n"
    with pytest.raises(RuleError, match=re.escape(text)):
        make(code, "bad")


def test_annotations_as_text() -> None:
    names: dict[str, Any] = {"ScalarState": eo.ScalarState, "numbers": eo}
    for written in ("ScalarState", "'ScalarState'", "numbers.ScalarState", "eo.ScalarState"):
        for future in ("", "from __future__ import annotations\n"):
            if written == "'ScalarState'" or future:
                quoted = written if future else f'"{written.strip(chr(39))}"'
                code = f"{future}@eo.rule\ndef scalar_text(grad, *, m: {quoted} = 2):\n"
                rule = make(f"{code}    return grad * m, m * 2\n", "scalar_text", **names)
                assert rule.scalar_states == {"m": 2.0}
    with pytest.raises(RuleError, match=r"m: Scalar\.ScalarState: name 'Scalar' is not"):
        make(
            "@eo.rule\ndef bad(grad, *, m: 'Scalar.ScalarState' = 2):\n    return grad, m\n", "bad"
        )


def test_annotations_by_another_name() -> None:
    for future in ("", "from __future__ import annotations\n"):
        code = f"{future}@eo.rule\ndef scalar_alias(grad, *, m: Carried = 2):\n"
        rule = make(f"{code}    return grad * m, m * 2\n", "scalar_alias", Carried=eo.ScalarState)
        assert rule.scalar_states == {"m": 2.0}
        assert rule.hyperparameter_names == []


@pytest.mark.parametrize("first", [np.float64(0.1), np.float16(0.5), np.int64(3)])
def test_first_values_of_numpy(first: Any) -> None:
    code = "@eo.rule\ndef numpys(grad, *, m: eo.ScalarState = first):\n    return grad * m, m * 2\n"
    rule = make(code, "numpys", first=first)
    assert f'kScalarStates[] = {{{{"m", {float(first)!r}}}}}' in rule.source
    assert repr(rule.info().scalar_states) == f"{{'m': {float(first)!r}}}"


def test_rules_that_call_rules() -> None:
    text = "def outer(grad, *, m: eo.ScalarState = 1.0):\n    return {}\n"
    inner = "@eo.rule\ndef inner(grad, *, m: eo.ScalarState = 1.0):\n    return grad * m, m * 2\n"
    with pytest.raises(RuleError, match=r"it has scalar states: call inner\.formula, which"):
        make(f"{inner}@eo.rule\n{text.format('inner(grad, m=m)')}", "outer")


def test_what_is_known_of_a_rule() -> None:
    assert scalar_averages.scalar_states == {"total": 0.0, "scale": 1.0, "previous": -1.0}
    assert "mu_product" not in scalar_nadam.hyperparameter_names
    assert str(scalar_phases.__signature__) == "(grad, *, mu, out=None)"
    info = scalar_nadam.info()
    assert list(info.states) == ["exp_avg", "exp_avg_sq"]
    assert info.scalar_states == {"mu_product": 1.0}
    assert 'ScalarState kScalarStates[] = {{"mu_product", 1.0}}' in scalar_nadam.source
