"""How rules are written in Python: helpers, objects, loops, choices, rules that call rules.

The graph of each is evaluated in float64, without a compiler. What its operations are in C++ is
tested in test_rule_definitions.py and test_rule_numbers.py; a few rules are compiled here, too.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import enum
import functools
import importlib
import math
import sys
import types
import typing
from typing import Any

import numpy as np
import pytest
import torch
from rounded_once import evaluate
from test_rule_definitions import check, every_mode, make, needs_native

pytestmark = pytest.mark.usefixtures("_no_other_device", "_quick_builds")

# ---- what rules call -----------------------------------------------------------------------------

elsewhere = types.ModuleType("elsewhere")
exec(
    "import math, torch\n"
    "FLOOR = 0.25\n"
    "def warmup(step, steps=10, *, floor=FLOOR):\n"
    "    return max(step / steps, floor) if step < steps else 1.0\n"
    "def cosine(step, total):\n"
    "    return 0.5 * (1 + math.cos(math.pi * min(step / total, 1.0)))\n"
    "def both(step, total, *, first=warmup):\n"
    "    return first(step) * cosine(step, total)\n"
    "def signed_root(x):\n"
    "    return torch.sign(x) * torch.sqrt(torch.abs(x))\n"
    "def averaged(x, y):\n"
    "    return x.mul_(0.5).add_(y, alpha=0.5)\n",
    elsewhere.__dict__,
)
COEFFICIENTS = [1.5, -2.0, 0.5]
TABLE = {"scale": 1.5, "root": math.sqrt, "nested": {"exp": math.exp}}
FUNCTIONS = (math.sqrt, lambda x: math.exp(x), elsewhere.warmup)
HALF = torch.tensor(0.5, dtype=torch.float64)
halves = functools.partial(elsewhere.warmup, steps=5, floor=HALF.item())


def geometric(start: Any, count: int) -> Any:
    for i in range(count):
        yield start**i


def apply_to(x: Any, function: Any = math.sqrt, *, other: Any = math.exp) -> Any:
    return function(x) + other(x)


def composed(*functions: Any) -> Any:
    return lambda x: functools.reduce(lambda value, function: function(value), functions, x)


def factorial(n: int) -> int:
    return 1 if n <= 1 else n * factorial(n - 1)


def by_milestones(step: Any) -> Any:
    match step:
        case 1:
            return 1.0
        case 2 | 3:
            return 0.5
        case s if s > 10:
            return 1 / s
    return 0.25


def newton(x: Any) -> Any:
    guess, turns = 1.0, 0
    while True:
        guess = 0.5 * (guess + x / guess)
        if (turns := turns + 1) == 4:
            return guess


def first_turns(n: Any) -> Any:
    total = 0.0
    for i in range(8):
        if i >= n:
            break
        total = total + 0.5**i
    return total


def with_default(key: str) -> Any:
    try:
        return TABLE[key]
    except KeyError:
        return 2.0
    finally:
        assert TABLE


@contextlib.contextmanager
def rooted(x: Any) -> Any:
    yield math.sqrt(x)


def printed(x: Any) -> Any:
    print(x, file=sys.stderr)
    return x


def in_context(x: Any) -> Any:
    with rooted(x) as root, contextlib.nullcontext(2.0) as two:
        return root * two


@functools.cache
def cached(x: Any) -> Any:
    return math.log1p(x)


def twice(function: Any) -> Any:
    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        return 2 * function(*arguments, **options)

    return call


@twice
def decorated(x: Any) -> Any:
    return math.sqrt(x)


class Twice:
    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, x: Any) -> Any:
        return 2 * self.function(x)


@Twice
def wrapped(x: Any) -> Any:
    return math.exp(x)


# ---- objects -------------------------------------------------------------------------------------


class Schedule(abc.ABC):
    base = math.exp

    def __init__(self, steps: float) -> None:
        self.steps = steps
        self.me = self

    @abc.abstractmethod
    def __call__(self, step: Any) -> Any: ...

    def root(self, step: Any) -> Any:
        return math.sqrt(step / self.steps)

    @property
    def rate(self) -> Any:
        return math.log1p(self.steps)

    @functools.cached_property
    def inverse(self) -> Any:
        return 1 / math.sqrt(self.steps)

    @staticmethod
    def decay(step: Any) -> Any:
        return math.exp(-step / 10)

    @classmethod
    def scaled(cls, step: Any) -> Any:
        return cls.decay(step) * cls.base(0.5)


class Warm(Schedule):
    def __init__(self, steps: float, factor: float = 2.0) -> None:
        super().__init__(steps)
        self.factor = factor

    def __call__(self, step: Any) -> Any:
        return min(self.root(step), 1.0) * self.me.factor

    def root(self, step: Any) -> Any:
        return 2 * super().root(step)

    def __getitem__(self, index: Any) -> Any:
        return math.sqrt(index)

    def __lt__(self, other: Warm) -> Any:
        return self.steps < other.steps


@dataclasses.dataclass(frozen=True)
class Constants:
    scale: Any = 0.5
    function: Any = math.sqrt
    more: list[float] = dataclasses.field(default_factory=lambda: [2.0])

    def value(self, x: Any) -> Any:
        return self.function(x) * self.scale + max(self.more)


@dataclasses.dataclass
class Slotted:
    __slots__ = ("x",)
    x: Any

    def value(self) -> Any:
        return math.exp(self.x)


class Pair(typing.NamedTuple):
    a: Any
    b: Any = 0.5

    def norm(self) -> Any:
        return math.hypot(*self)


class Level(float, enum.Enum):
    LOW = 0.1


class Scaler(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = 0.5
        self.activation = torch.nn.ReLU()

    def forward(self, x: Any) -> Any:
        return self.activation(x) * self.scale


warm = Warm(10.0)
constants = Constants()
module = Scaler()

# ---- expressions ---------------------------------------------------------------------------------

NUMBERS = """
round(step / 2) ; round(-step / 2) ; round(h * 10) ; round(step) ; round(h, None) ; round(step > 2)
int(step) ; int(step / 3) ; int(-step / 3) ; int(h * 10) ; int(step > 2) + int(f) ; int("11", 2)
2 ** math.floor(math.log2(step)) ; pow(step, 2, 7) ; divmod(step, n)[1] ; (step - 1) % n + 1
1 / (1 + 0.1 * (step // n)) ; 0.5 ** (step // 3) ; math.trunc(-h * 10) ; math.fmod(step, n)
(-1) ** step ; bool(step % 2) ; step - step // 3 * 3 ; math.cos(math.pi * (step % 10) / 10)
betas[step > 3] ; [1.0, 2.0][not f] ; (1.0, 2.0)[(step > 3) & (h > 0.1)] ; betas[-1] - betas[0]
sum(betas) ; sum(betas[1:]) ; sum(betas, h) ; max(betas) ; min(*betas, h) ; max(betas, default=0)
max(betas, key=lambda b: -b) ; sorted(betas, reverse=True)[0] ; betas[::-1][0] ; (*betas, h)[2]
[*betas, h][-1] ; (betas + (h,))[2] ; math.prod(betas) ; math.prod(1 - b for b in betas)
sum([1 - b for b in betas]) ; {i: b for i, b in enumerate(betas)}[1] ; dict(zip("ab", betas))["b"]
sum(i * b for i, b in enumerate(betas, 1)) ; sum(x * y for x, y in zip(betas, betas[1:]))
sum(betas[i] for i in range(len(betas))) ; (lambda x, *rest: x * sum(rest))(*betas) ; 0.9 in betas
any(b > 0.95 for b in betas) ; all(b > 0.5 for b in betas) ; sum(b for b in betas if b > 0.95)
sum(map(math.sqrt, betas)) ; list(map(max, betas, (0.95, 0.95)))[0] ; next(iter(betas))
sum(itertools.accumulate(betas, operator.mul)) ; sum(itertools.chain(betas, (h, step)))
functools.reduce(operator.mul, betas, 1.0) ; functools.reduce(math.hypot, betas) ; (x := h * 2) + x
1.0 if step in (1, 7) else 2.0 ; 1.0 if step in range(2, 8) else 2.0
0.1 ** bisect.bisect((2, 5), step)
0.1 ** sum(step > m for m in (2, 5, 10))
next((v for m, v in ((2, 3.0), (5, 4.0)) if step <= m), 1)
isinstance(h, (int, float)) + isinstance(h, float | int) ; (type(2.5) is float) + isinstance(3, int)
float.fromhex("0x1p-1") + np.zeros(2, dtype=float)[0] + torch.ones(2, dtype=float)[0].item()
np.sqrt(h) + np.exp(-step) + np.minimum(h, 0.1) ; np.power(h, 2) + np.abs(-h) + np.floor(step / 3)
np.float64(0.5) * h ; np.array([0.5])[0] * h ; h + np.bool_(True) ; HALF * h
torch.tensor(0.25).item()
sum(c * h**i for i, c in enumerate(COEFFICIENTS)) ; TABLE["scale"] * h ; TABLE["root"](h)
max([2.0]) * h ; min((h,)) ; max([h]) + max(1, 2)
TABLE["nested"]["exp"](h) ; sum(function(h) for function in FUNCTIONS) ; Level.LOW * h
sum(geometric(h, 3)) ; apply_to(h) ; apply_to(h, math.log) ; composed(math.sqrt, math.exp)(h)
factorial(4) * h ; by_milestones(step) ; newton(h) ; first_turns(n) ; with_default("none") * h
in_context(h) ; printed(h) ; cached(h) ; decorated(h) ; wrapped(h) ; elsewhere.warmup(step)
elsewhere.warmup(step, n, floor=h) ; elsewhere.both(step, 20) ; halves(step) ; elsewhere.FLOOR * h
functools.partial(elsewhere.warmup, floor=h)(step) ; functools.partial(math.pow, 2)(h)
functools.partial(apply_to, function=math.log)(h) ; copy.deepcopy(h) + copy.copy(step)
warm(step) ; warm.root(step) ; warm.rate * h ; warm.inverse * warm.inverse ; warm.decay(step)
Warm.decay(step) ; Warm.scaled(step) ; warm.scaled(step) ; Warm(step)(step) ; Warm(h).rate
Warm(h).inverse ; Warm.base(h) ; warm[3] * h ; warm[step] ; Warm(h) < warm ; isinstance(warm, Warm)
sum(map(warm.root, betas)) ; functools.partial(warm.root)(step) ; (warm.me is warm) + h
constants.value(h) ; Constants(h).value(step) ; constants.scale * h ; Slotted(h).value()
dataclasses.replace(constants, scale=h).value(2.0) ; Pair(h).norm() ; Pair(3.0).norm() * h
sum(Pair(h, step)) ; Pair(h)._replace(b=step).b ; types.SimpleNamespace(x=h).x
"""
NUMBERS_LIST = [part.strip() for part in NUMBERS.replace("\n", " ; ").split(" ; ") if part.strip()]
TENSORS = """
torch.sign(grad) * torch.sqrt(torch.abs(grad)) ; grad.sign() * grad.abs().sqrt().mul_(h).add_(a)
elsewhere.signed_root(grad) * h ; elsewhere.averaged(a, grad) * a ; module(grad) - module(-grad)
composed(torch.abs, torch.sqrt, lambda x: 1 + x)(grad)
functools.partial(torch.clamp, min=-1)(grad)
sum(x * w for x, w in zip((grad, a), betas)) ; math.prod([grad, a, h]) ; operator.mul(grad, h)
torch.zeros_like(grad, memory_format=torch.preserve_format) + a
a.clone(memory_format=torch.preserve_format)
torch.full_like(grad, h, dtype=grad.dtype) * a ; torch.nn.functional.relu(grad, inplace=False)
torch.tensor(0.9, dtype=grad.dtype, device=grad.device) * grad ; HALF.to(grad) * grad
torch.zeros((), dtype=grad.dtype) + grad ; grad.to(grad.device) * grad.to(device=a.device) ; +grad
torch.zeros_like(grad, device=grad.device, dtype=grad.dtype) + a ; grad.to(a.dtype) ; grad.to(a) * 2
grad if torch.is_floating_point(grad) else a ; grad * torch.is_tensor(grad) ; HALF.to(grad) ** step
[grad, -grad][step % 2 == 0] ; grad ** int(2.0) ; grad.abs() ** (1 / len(betas))
grad.clamp(max=round(h * 10))
grad / (1 - max(betas) ** step)
grad * math.sqrt(1 - betas[1] ** step) / (1 - betas[0] ** int(step))
"""
TENSORS_LIST = [part.strip() for part in TENSORS.replace("\n", " ; ").split(" ; ") if part.strip()]
SIGNATURE = "grad, a, *, h=0.3, n: int = 3, betas: tuple[eo.Beta, ...] = (0.9, 0.99), f=True, step"


def define(body: str, signature: str = SIGNATURE) -> Any:
    lines = body.replace("\n", "\n    ")
    return make(f"@eo.rule\ndef python_rule({signature}):\n    {lines}\n", "python_rule", **NAMES)


_MODULES = ("bisect", "copy", "itertools", "operator")
NAMES = {name: value for name, value in globals().items() if name != "__name__"}
NAMES |= {name: importlib.import_module(name) for name in _MODULES}


@pytest.fixture(autouse=True)
def _names(monkeypatch: pytest.MonkeyPatch) -> None:
    module_of_rules = sys.modules["emerging_optimizers._user_rules.user_rule"]
    monkeypatch.setattr(module_of_rules, "_RULES", {})


def assert_traced(rule: Any, **given: Any) -> None:
    """Assert that the graph has the formula's values, in float64."""
    values = {**rule.signature.defaults, **given}
    for step in (1, 2, 3, 7, 12):
        values["step"] = step
        grad = torch.linspace(-2.1, 3.3, 12, dtype=torch.float64)
        states = [torch.linspace(0.1, 2.0, 12, dtype=torch.float64) for _ in rule.states]
        known = {name: values[name] for name in rule.hyperparameter_names}
        got = evaluate(rule._trace, grad.numpy(), [state.numpy().copy() for state in states], known)
        result = rule.formula(grad.clone(), *states, **known)
        update, *new = result if isinstance(result, tuple) else (result, *states)
        assert (update is None) is (got[0] is None)
        wanted_all = (0.0 if update is None else update, *new)
        got_all = (np.zeros(12) if got[0] is None else got[0], *got[1])
        for wanted, value in zip(wanted_all, got_all, strict=True):
            want = torch.as_tensor(wanted, dtype=torch.float64).expand_as(grad)
            torch.testing.assert_close(torch.tensor(np.array(value)), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("expression", NUMBERS_LIST)
def test_numbers(expression: str) -> None:
    assert_traced(define(f"a.add_(grad)\nreturn grad * ({expression})"))


@pytest.mark.parametrize("expression", TENSORS_LIST)
def test_tensors(expression: str) -> None:
    assert_traced(define(f"update = {expression}\na.add_(grad)\nreturn update"))


@every_mode
def test_in_both_modes(mode: str) -> None:
    """Some of each kind, in one rule."""
    numbers = ["round(step / 2)", "int(-h * 10)", "pow(step, 2, 7)", "elsewhere.both(step, 20)"]
    numbers += ["warm(step)", "Constants(h).value(step)", "betas[step > 3]", "by_milestones(step)"]
    body = [f"a.add_(grad * ({number}))" for number in numbers]
    rule = define("\n".join([*body, "return elsewhere.signed_root(grad) * int(step > 2) + a"]))
    for step in (1, 3, 5, 12):
        check(rule, mode, h=0.3, n=3, betas=(0.9, 0.99), f=True, step=step)


# ---- hyperparameters with many numbers -----------------------------------------------------------

SEQUENCES = [
    ("tuple[eo.Beta, ...] = (0.9, 0.99, 0.999)", (0.5, 0.6, 0.7)),
    ("tuple[float, ...] = [0.9]", (2.0,)),
    ("list[eo.NonNegative] = (0.9, 0.99)", [2.0, 3.0]),
    ("typing.Sequence[float] = (1.0, 2.0, 3.0, 4.0)", (4.0, 3.0, 2.0, 1.0)),
    ("tuple = (0.9, 0.99)", (2.0, 3.0)),
    ("'tuple[int, ...]' = (1, 2)", (3, 4)),
]


@pytest.mark.parametrize(("annotation", "others"), SEQUENCES)
def test_as_many_numbers_as_the_default(annotation: str, others: Any) -> None:
    body = "first, *rest = values\nreturn grad * (first + sum(v**i for i, v in enumerate(rest, 2)))"
    rule = define(body, f"grad, *, values: {annotation}, step")
    assert_traced(rule)
    assert_traced(rule, values=others)
    with pytest.raises(ValueError, match=f"expected {len(others)}"):
        rule(torch.ones(1), values=(*others, 0.5), step=1)


def test_domain_of_numbers_without_a_length() -> None:
    rule = define("return grad * sum(v)", "grad, *, v: tuple[eo.Beta, ...] = (0.9, 0.99)")
    with pytest.raises(ValueError, match=r"v\[1\] is 1; expected 0 <= v\[1\] < 1"):
        rule(torch.ones(1), v=(0.5, 1.0))


# ---- rules that call rules -----------------------------------------------------------------------

INNER = """
@eo.rule
def inner(grad, exp_avg, *, beta: eo.Beta = 0.9, scale: float | None = None, flag=False, step):
    if step == 1:
        return None, exp_avg + grad
    exp_avg = beta * exp_avg + (1 - beta) * grad
    scale = 1.0 if scale is None else math.sqrt(scale)
    return exp_avg / (1 - beta**step) * scale + flag, exp_avg

@eo.rule
def modifies(grad, *, factor=2.0):
    return grad.mul_(factor)
"""
OUTER = {
    "rule": "return inner(grad, a, step=step)",
    "rule with numbers": "return 2 * inner(grad, a, beta=h, scale=h * h, flag=step > 3, step=step)",
    "formula": "update, a = inner.formula(grad, a, beta=h, step=step + 1)\nreturn update, a",
    "formula with None": "return inner.formula(grad, a, step=step)",
    "result of another": "return inner(modifies(grad), a, step=step) + grad",
    "twice": "return inner(inner(grad, a, step=step + 1), a, step=step + 1)",
    "partial": "return functools.partial(inner, beta=h)(grad, a, step=step)",
    "from a table": "return {'x': inner}['x'](exp_avg=a, grad=grad, step=step)",
    "temporary state": "b = a * 2\nupdate = inner(grad, b, step=step)\nreturn update + b, a + b",
    "name": "a.add_(grad)\nreturn grad * len(inner.name) * len(inner.states)",
}


@functools.cache
def inner_rules() -> dict[str, Any]:
    text = INNER.replace("def inner", "def python_inner").replace("def modif", "def python_modif")
    names = ("inner", "modifies")
    return {name: make(text, f"python_{name}") for name in names}


@pytest.mark.parametrize("name", OUTER)
@pytest.mark.filterwarnings("ignore:the rule python_:RuntimeWarning")
def test_rules_that_call_rules(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMERGING_OPTIMIZERS_JIT", "0")
    lines = OUTER[name].replace("\n", "\n    ")
    text = f"@eo.rule\ndef python_outer({SIGNATURE}):\n    {lines}\n"
    rule = make(text, "python_outer", **NAMES, **inner_rules())
    assert_traced(rule)
    assert_traced(rule, h=0.6)


@needs_native
def test_rules_that_call_rules_natively() -> None:
    text = (
        "@eo.rule\n"
        "def python_nested(grad, a, b, *, h=0.3, step):\n"
        "    update = inner(grad, a, beta=h, step=step)\n"
        "    other, b = inner.formula(grad, b, beta=h, step=step)\n"
        "    return update - (0.0 if other is None else other * h), a, b\n"
    )
    rule = make(text, "python_nested", **inner_rules())
    for step in (1, 2):
        check(rule, "native", h=0.3, step=step)
