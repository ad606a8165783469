"""Per-step numbers in rules: hyperparameters, the step, and functions of them."""

from __future__ import annotations

import functools
import gc
import math
import subprocess
import sys
import types
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from test_rule_definitions import check, every_mode, in_mode, make, needs_native

import emerging_optimizers as eo

pytestmark = pytest.mark.usefixtures("_no_other_device", "_quick_builds")

FACTOR = 3.0
SCALE = torch.tensor(0.5)
METHODS = [torch.sqrt, torch.abs]

NUMBERS = """
step % 10 ; step // 3 ; -step // 3 ; -step % 3 ; step % -3 ; step // h ; 10 // step ; 10 % step
divmod(step, 3)[0] ; divmod(10, step)[1] ; pow(h, 2) ; pow(h, step) ; abs(-h) ; min(h, 0.1)
max(h, 0.1, n) ; max([h, 0.1]) ; min(t) ; max(t, default=1) ; max((h, n), key=lambda x: -x)
max(x for x in t) ; sum(t) ; sum(x * x for x in t) ; sum([x for x in t]) ; math.prod(t)
math.sqrt(h) ; math.pow(h, 2) ; math.exp(-step / 10) ; math.log(step + 1) ; math.log(step + 1, 2)
math.log(8, step + 1) ; math.log2(n) ; math.log10(n) ; math.log1p(h) ; math.expm1(h) ; math.sin(h)
math.cos(h) ; math.tan(h) ; math.tanh(h) ; math.atan2(h, n) ; math.floor(h * 10) ; math.ceil(h * 10)
math.trunc(h * 10) ; math.fabs(-h) ; math.fmod(step, 3) ; math.copysign(h, -1) ; math.hypot(h, n)
math.isnan(h) ; math.isfinite(h) ; math.isinf(h) ; math.factorial(3) ; math.pi ; math.erf(h)
math.inf if h > 1 else 1 ; f + 1 ; 1 if f is True else 2 ; not f ; f and h ; f or h ; h if f else n
1 if o is None else o ; o or 1 ; 1 if h is None else 2 ; 0 < step < 5 ; 1 if 0 < step < 5 else 2
1 if 0 < h <= 0.3 else 2 ; 1 if step in (1, 5) else 2 ; 1 if not step == 2 else 2
1 if step != 2 and h > 0.1 else 2 ; 1 if step >= 2 or h > 0.5 else 2 ; t[0] - t[-1] ; len(t)
sum(h**i for i in range(3)) ; h**0 ; h**-1 ; h**17 ; h**0.5 ; 2**n ; (-2) ** step ; 1 - h**step
1 - h ** (step + 1) ; 1 - h ** (step - 1) ; 1 - (-0.5) ** step ; 1 - math.pow(h, step) ; float(n)
(step == 1) + (h > 0) ; (step == 1) & (h > 0) ; (step == 1) | (h > 0) ; (step == 1) ^ (h > 0)
int(3.7) ; round(2.6) ; float("1.5") ; bool(h) ; isinstance(h, (int, float)) ; isinstance(f, bool)
isinstance(grad, torch.Tensor) ; isinstance(h, torch.Tensor) ; (lambda x: math.sqrt(x))(h)
functools.reduce(lambda x, y: x * y, t) ; eval("h * 2") ; len(f"{h:.2f} {grad}") > 0
torch.finfo(torch.float32).eps ; torch.tensor([1.0, 2.0]).sum() ; np.float64(3) * h ; +h - -n
"""
EXPRESSIONS = NUMBERS.strip().replace("\n", " ; ").split(" ; ")
_PER_RULE = 15


@functools.cache
def rule_of_numbers(part: int) -> Any:
    signature = "grad, *, which: int, h=0.3, n: int = 3, f=True, t=(0.2, 0.7), o=None, step"
    lines = [f"@eo.rule\ndef numbers_{part}({signature}):"]
    for i, expression in enumerate(EXPRESSIONS[part * _PER_RULE : (part + 1) * _PER_RULE]):
        lines.append(f"    if which == {i}:\n        return grad * ({expression})")
    lines.append("    return grad\n")
    return make("\n".join(lines), f"numbers_{part}", functools=functools)


@pytest.mark.parametrize("index", range(len(EXPRESSIONS)), ids=EXPRESSIONS)
@every_mode
def test_numbers(index: int, mode: str) -> None:
    part, which = divmod(index, _PER_RULE)
    for step in (1, 2, 12):
        values = {"which": which, "h": 0.3, "n": 3, "f": step == 1, "t": (0.2, 0.7), "step": step}
        check(rule_of_numbers(part), mode, **values, o=None if step == 1 else 1.5)


# ---- functions that rules call -------------------------------------------------------------------


def scaled(x: Any, factor: Any = 2.0, *, root: bool = False) -> Any:
    return x * (math.sqrt(factor) if root else factor) * FACTOR


def optional(x: Any, weight: Any) -> Any:
    if weight is None:
        return x
    return scaled(x, weight, root=True)


def doubled(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*arguments: Any) -> Any:
        return 2 * function(*arguments)

    return wrapper


@doubled
def decorated(x: Any, h: Any) -> Any:
    return x * math.exp(h)


@functools.lru_cache
def cached(h: Any) -> Any:
    return math.log1p(h)


def with_default(x: Any, seen: list[int] = []) -> Any:  # noqa: B006
    return x * (len(seen) + 1)


def factory(power: int) -> Any:
    base = 0.5

    @eo.rule
    def numbers_closure(grad, *, h=0.3):
        def inner(x: Any) -> Any:
            return x * base**power * math.sqrt(h)

        return inner(grad)

    return numbers_closure


halved = functools.partial(scaled, factor=0.5, root=True)
other = types.ModuleType("other")
exec("import math\ndef cubed(h):\n    return math.pow(h, 3)\n", other.__dict__)


@eo.rule
@torch.no_grad()
def numbers_calls(
    grad, a, *, h: eo.NonNegative = 0.3, weight: float | None = None, n: int = 3, step: int
):
    """Everything that a rule may call."""
    import cmath
    from math import hypot

    assert cmath.pi > 3
    with torch.no_grad():
        x = optional(scaled(grad), weight) + halved(a)
    x = x * decorated(1.0, h) + decorated(a, h) * cached(h)
    x = x + other.cubed(h) * with_default(a) * SCALE
    for i in range(2):
        x = x + METHODS[i](a.abs() + i) * (i + 1)
    scales = {"small": hypot(h, n), "large": [h * i for i in range(3)][2]}
    a = a * scales["small"] + scales["large"]
    y = a
    y += 1
    return x, a


@every_mode
@pytest.mark.parametrize("weight", [None, 0.7])
def test_functions(weight: float | None, mode: str) -> None:
    check(numbers_calls, mode, h=0.2, weight=weight, n=2, step=3)
    assert with_default.__defaults__ == ([],)
    assert cached.cache_info().currsize <= 2


@every_mode
def test_closures(mode: str) -> None:
    check(factory(2), mode, h=0.2)


def test_a_rule_keeps_its_name_and_text() -> None:
    assert numbers_calls.__name__ == numbers_calls.name == "numbers_calls"
    assert numbers_calls.__doc__ == "Everything that a rule may call."
    assert numbers_calls.states == ("a",)
    assert numbers_calls.signature.defaults == {"h": 0.3, "weight": None, "n": 3}


def test_tracing_leaves_the_module_alone() -> None:
    names = scaled.__globals__
    before = {name: value for name, value in names.items() if not name.startswith("@")}
    text = "@eo.rule\ndef numbers_quiet(grad, *, h=0.3):\n    return scaled(grad, h, root=True)\n"
    make(text, "numbers_quiet", scaled=scaled)
    after = {name: value for name, value in names.items() if not name.startswith("@")}
    assert after.keys() == before.keys()
    assert all(after[name] is value for name, value in before.items())
    assert math.sqrt(4.0) == 2.0


# ---- definitions ---------------------------------------------------------------------------------

CAPTURED = "@eo.rule\ndef numbers_captured(grad):\n    return grad * FACTOR\n"


@needs_native
def test_captured_values_are_frozen_and_redefinition_uses_new_ones() -> None:
    grad = torch.ones(3)
    namespace: dict[str, Any] = {"eo": eo, "FACTOR": 2.0, "__name__": "numbers"}
    exec(CAPTURED, namespace)
    first = namespace["numbers_captured"]
    namespace["FACTOR"] = 5.0
    assert first(grad)[0] == 2
    exec(CAPTURED, namespace)
    assert namespace["numbers_captured"](grad)[0] == 5
    assert first(grad)[0] == 2


def test_two_functions_of_one_name() -> None:
    text = "@eo.rule\ndef numbers_twice(grad):\n    return grad * 2\n"
    kept = make(text, "numbers_twice", __name__="one")
    assert make(text, "numbers_twice", __name__="one") is not kept
    latest = make(text, "numbers_twice", __name__="a copy of the file")  # kept: rules may be freed
    assert latest is not kept
    text = text.replace("* 2", "* 3")
    with pytest.raises(eo.RuleError, match=r"rule numbers_twice: .*.numbers_twice has the same"):
        make(text, "numbers_twice", __name__="one.others")


def test_a_refused_definition_leaves_the_first() -> None:
    text = "@eo.rule\ndef numbers_again(grad):\n    return grad * {}\n"
    kept = make(text.format("2"), "numbers_again")
    with pytest.raises(eo.RuleError):
        make(text.format("grad.sum()"), "numbers_again")
    torch.testing.assert_close(kept.formula(torch.ones(1)), torch.full((1,), 2.0))


def test_rules_that_are_not_used_are_freed() -> None:
    text = "@eo.rule\ndef numbers_freed(grad, *, h=0.3):\n    return grad * h\n"
    rule = weakref.ref(make(text, "numbers_freed"))
    gc.collect()
    assert rule() is None


def test_definition_needs_no_file() -> None:
    program = (
        "import emerging_optimizers as eo, torch\n"
        "@eo.rule\n"
        "def numbers_command(grad, a, *, h=0.5):\n"
        "    a.mul_(h).add_(grad)\n"
        "    return a.sign()\n"
        "a = torch.zeros(2)\n"
        "print(numbers_command(torch.tensor([1.0, -2.0]), a).tolist(), a.tolist())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[1.0, -1.0] [1.0, -2.0]\n"


@every_mode
def test_names_of_cpp(mode: str) -> None:
    text = (
        "@eo.rule\n"
        "def template(float, int, k, errno, *, struct=0.5, double=2.0, this=(1.0, 2.0), NAN=True,\n"
        "             INFINITY=3.0, which: eo.Beta = 0.1, s0=1.0, e0=1.0, new_0=0.5, step):\n"
        "    x = float * struct * double + this[1] * step\n"
        "    y = x * x + x * s0 + e0\n"
        "    k, errno = errno * new_0, k * which\n"
        "    return y + y * INFINITY if NAN else y, int + y, k, errno\n"
    )
    rule = make(text, "template")
    values = dict(rule.signature.defaults)
    check(rule, mode, **values, step=2)
    check(rule, mode, **{**values, "NAN": False}, step=2)


@every_mode
def test_no_state_no_hyperparameter(mode: str) -> None:
    text = "@eo.rule\ndef numbers_bare(grad):\n    return grad.sign() * 2\n"
    rule = make(text, "numbers_bare")
    check(rule, mode)
    assert rule.states == ()


@every_mode
def test_five_states(mode: str) -> None:
    text = (
        "@eo.rule\n"
        "def numbers_five(g, a, b, c, d, e, *, h=0.5):\n"
        "    return a, b, c.mul_(h), d + g, e * h, a - g\n"
    )
    check(make(text, "numbers_five"), mode, h=0.5)


@every_mode
def test_annotations(mode: str) -> None:
    text = (
        "@eo.rule\n"
        "def numbers_annotated(grad: torch.Tensor, *, a: 'float | None' = None, b: bool = False,\n"
        "        c: 'eo.Beta' = 0.5, d: int | None = 4, e: tuple[float, float] = (1.0, 2.0),\n"
        "        f: eo.NonNegative | None = None, step: 'int') -> torch.Tensor:\n"
        "    x = grad * c + (0 if a is None else a) + e[0] * b\n"
        "    return x if d is None else x * d + (f or e[1]) * step\n"
    )
    rule = make(text, "numbers_annotated")
    values = dict(rule.signature.defaults)
    check(rule, mode, **values, step=1)
    check(rule, mode, a=2.0, b=True, c=0.25, d=None, e=(3.0, 4.0), f=None, step=2)
    check(rule, mode, a=2.0, b=True, c=0.25, d=3, e=(3.0, 4.0), f=0.0, step=2)
    with pytest.raises(ValueError, match="expected 0 <= c < 1"):
        rule(torch.ones(1), c=1.0, step=1)
    with pytest.raises(TypeError, match="b must be a bool"):
        rule(torch.ones(1), b=1, step=1)


@every_mode
def test_tensors_lists_and_out(mode: str) -> None:
    text = "@eo.rule\ndef numbers_out(grad, a, *, h=0.5):\n    a.add_(grad)\n    return a * h\n"
    call = in_mode(make(text, "numbers_out"), mode)
    grads = [torch.ones(2, 3), torch.full((5,), 2.0)]
    states = [torch.zeros(2, 3), torch.zeros(5)]
    updates = call(grads, states)
    assert [u.shape for u in updates] == [g.shape for g in grads]
    assert [s.mean().item() for s in states] == [1, 2]
    assert call(grads, states, out=grads) is grads
    assert [g.mean().item() for g in grads] == [1, 2]
    with pytest.raises(TypeError, match="h"):
        call(grads, states, h="x")


def test_no_array_of_numpy_takes_over() -> None:
    text = "@eo.rule\ndef numbers_numpy(grad, *, h=0.3):\n    return np.float32(0.5) * grad * h\n"
    rule = make(text, "numbers_numpy")
    assert rule.formula(torch.ones(2, dtype=torch.float64), h=0.5)[0] == 0.25
    assert np.float32(0.5) == 0.5


def test_decorators_between_are_part_of_the_rule() -> None:
    def doubled(function: Any) -> Any:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            return 2 * function(*arguments, **options)

        return call

    @eo.rule
    @doubled
    def decorated(grad: Any, *, factor: float = 3.0) -> Any:
        return grad * factor

    grad = torch.tensor([1.0, -2.0])
    assert decorated.formula(grad).tolist() == [6.0, -12.0]
    assert decorated(grad).tolist() == [6.0, -12.0]


def test_names_that_generated_code_might_use() -> None:
    @eo.rule
    def generated(
        grad: Any,
        *,
        call: float = 2.0,
        init: float = 3.0,
        options: float = 5.0,
        GeneratedRule: float = 7.0,  # noqa: N803
    ) -> Any:
        return grad * (call * init * options * GeneratedRule)

    class Generated(eo.ScalarOptimizer, rule=generated, lr=1.0):
        pass

    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.ones(1)
    Generated([weight], options=0.5).step()
    assert weight.item() == -21.0
    assert generated(torch.ones(1), call=1.0).item() == 105.0


def test_a_flag_as_a_number() -> None:
    @eo.rule
    def flagged(grad: Any, exp_avg: Any, *, a: float = 0.5) -> Any:
        exp_avg.add_(grad, alpha=float(a > 0.2))
        return exp_avg - float(a > 0.7)

    assert flagged(torch.ones(1), torch.ones(1)).item() == 2.0
    assert flagged(torch.ones(1), torch.ones(1), a=0.9).item() == 1.0
