"""The rules in float64, and the table of rules that the other tests are crossed with.

The formulas are written from the papers' equations, in their order, on NumPy arrays: they share
nothing with the compiled rules or with the PyTorch formulas that they judge. Each is
evaluated twice, on the operands and on their absolute values; the second is the *size of the terms*
in which the error of a sum is measured, so that cancellation is not held against the arithmetic.
"""

import importlib
import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from emerging_optimizers import scalar_optimizers

Array = NDArray[np.float64]


class Value(NamedTuple):
    """A result, and the size of the terms that were summed to it."""

    value: Array
    size: Array


class Expected(NamedTuple):
    """What a call computes. An update by sign is `scale` times the sign of `before_sign`."""

    update: Value
    states: tuple[Value, ...]
    before_sign: Value | None = None
    scale: float = 1.0


# ---- once per step -------------------------------------------------------------------------------


def one_minus_power(beta: float, step: float) -> float:
    """1 - beta^step, without the cancellation of the literal form."""
    if step == 0:
        return 0.0
    return 1.0 if beta == 0.0 else -math.expm1(step * math.log(beta))


def bias_correction(beta: float, step: float, correct_bias: bool) -> float:
    return one_minus_power(beta, step) if correct_bias else 1.0


def linear(step: float, end: float, warmup_steps: int | None) -> float:
    if warmup_steps is None or step >= warmup_steps:
        return end
    return (step / warmup_steps) * end


def half_life(step: float, start: float, end: float, warmup_steps: int | None) -> float:
    if warmup_steps is None or step >= warmup_steps:
        return end

    def steps_of(beta: float) -> float:
        return math.log(0.5) / math.log(beta + 1e-8) - 1.0

    done = step / warmup_steps
    steps = (1.0 - done) * steps_of(start) + done * steps_of(end)
    return 0.5 ** (1.0 / (steps + 1.0))


# ---- the rules -----------------------------------------------------------------------------------


def _evaluate(formula: Callable[..., Sequence[Array]], *operands: Array) -> list[Value]:
    with np.errstate(all="ignore"):
        values = formula(*operands)
        sizes = formula(*(np.abs(operand) for operand in operands))
    return [Value(value, size) for value, size in zip(values, sizes, strict=True)]


def _sign(before: Value, scale: float) -> Value:
    value = np.where(np.isnan(before.value), 0.0, np.sign(before.value)) * scale
    # -1, 0 and 1 are exact; a product with the scale is not.
    return Value(value, np.abs(value) if scale != 1.0 else np.zeros_like(value))


def adam(
    grad: Array,
    exp_avg: Array,
    exp_avg_sq: Array,
    *,
    betas: Sequence[float],
    correct_bias: bool,
    use_nesterov: bool,
    step: float,
    eps: float,
) -> Expected:
    b1, b2 = betas
    c1 = bias_correction(b1, step, correct_bias)
    c1_next = bias_correction(b1, step + 1, correct_bias)
    c2 = bias_correction(b2, step, correct_bias)

    def formula(g: Array, m: Array, v: Array) -> Sequence[Array]:
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        m_hat = b1 * m / c1_next + (1 - b1) * g / c1 if use_nesterov else m / c1
        return m_hat / (np.sqrt(v / c2) + eps), m, v

    update, *states = _evaluate(formula, grad, exp_avg, exp_avg_sq)
    return Expected(update, tuple(states))


def ademamix(
    grad: Array,
    exp_avg_fast: Array,
    exp_avg_slow: Array,
    exp_avg_sq: Array,
    *,
    num_beta_slow_warmup_steps: int | None,
    num_alpha_warmup_steps: int | None,
    betas: Sequence[float],
    step: float,
    eps: float,
    correct_bias: bool,
    alpha: float = 2,
) -> Expected:
    b_fast, b2, b_slow_final = betas
    a = linear(step, alpha, num_alpha_warmup_steps)
    b_slow = half_life(step, b_fast, b_slow_final, num_beta_slow_warmup_steps)
    c_fast = bias_correction(b_fast, step, correct_bias)
    c2 = bias_correction(b2, step, correct_bias)

    def formula(g: Array, m_fast: Array, m_slow: Array, v: Array, a: Array) -> Sequence[Array]:
        m_fast = b_fast * m_fast + (1 - b_fast) * g
        m_slow = b_slow * m_slow + (1 - b_slow) * g
        v = b2 * v + (1 - b2) * g * g
        return (m_fast / c_fast + a * m_slow) / (np.sqrt(v / c2) + eps), m_fast, m_slow, v

    update, *states = _evaluate(
        formula, grad, exp_avg_fast, exp_avg_slow, exp_avg_sq, np.float64(a)
    )
    return Expected(update, tuple(states))


def sim_ademamix(
    grad: Array,
    exp_avg: Array,
    exp_avg_sq: Array,
    *,
    num_beta_fast_warmup_steps: int | None,
    min_beta_fast: float,
    betas: Sequence[float],
    step: float,
    eps: float,
    correct_bias: bool,
    alpha: float = 2,
) -> Expected:
    b_fast_final, b2 = betas
    b = half_life(step, min_beta_fast, b_fast_final, num_beta_fast_warmup_steps)
    c1 = one_minus_power(b, step) / (1 - b) if correct_bias else 1.0
    c2 = bias_correction(b2, step, correct_bias)

    def formula(g: Array, m: Array, v: Array, a: Array) -> Sequence[Array]:
        m = b * m + g
        v = b2 * v + (1 - b2) * g * g
        return (a * g + m / c1) / (np.sqrt(v / c2) + eps), m, v

    update, *states = _evaluate(formula, grad, exp_avg, exp_avg_sq, np.float64(alpha))
    return Expected(update, tuple(states))


def laprop(
    grad: Array,
    exp_avg: Array,
    exp_avg_sq: Array,
    *,
    correct_bias: bool,
    betas: Sequence[float],
    step: float,
    eps: float,
) -> Expected:
    b1, b2 = betas
    c1 = bias_correction(b1, step, correct_bias)
    c2 = bias_correction(b2, step, correct_bias)

    def formula(g: Array, m: Array, v: Array) -> Sequence[Array]:
        v = b2 * v + (1 - b2) * g * g
        normalised = g / (np.sqrt(v / c2) + eps)
        m = b1 * m + (1 - b1) * normalised
        return m / c1, m, v

    update, *states = _evaluate(formula, grad, exp_avg, exp_avg_sq)
    return Expected(update, tuple(states))


def lion(
    grad: Array,
    exp_avg: Array,
    *,
    momentum_beta: float,
    momentum_beta2: float | None = None,
) -> Expected:
    b1 = momentum_beta
    b2 = b1 if momentum_beta2 is None else momentum_beta2

    def formula(g: Array, m: Array) -> Sequence[Array]:
        return b1 * m + (1 - b1) * g, b2 * m + (1 - b2) * g

    before_sign, momentum = _evaluate(formula, grad, exp_avg)
    return Expected(_sign(before_sign, 1.0), (momentum,), before_sign)


def signum(
    grad: Array,
    exp_avg: Array,
    *,
    momentum_beta: float,
    correct_bias: bool,
    use_nesterov: bool,
    step: float,
    use_shape_scaling: bool = False,
) -> Expected:
    b = momentum_beta
    c1 = bias_correction(b, step, correct_bias)
    c1_next = bias_correction(b, step + 1, correct_bias)
    scale = 2.0 / (grad.shape[0] + grad.shape[1]) if use_shape_scaling and grad.size else 1.0

    def formula(g: Array, m: Array) -> Sequence[Array]:
        m = b * m + (1 - b) * g
        return b * m / c1_next + (1 - b) * g / c1 if use_nesterov else m, m

    before_sign, momentum = _evaluate(formula, grad, exp_avg)
    return Expected(_sign(before_sign, scale), (momentum,), before_sign, scale)


def root(grad: Array, *, scale: float) -> Expected:
    update, *_ = _evaluate(lambda g: (scale * np.sign(g) * np.sqrt(np.abs(g)),), grad)
    return Expected(update, ())


# ---- the table -----------------------------------------------------------------------------------

# With `pytest --rules user`, the rules and optimizers of user_rules.py.
IS_USER = os.environ.get("EMOPT_TEST_RULES") == "user"
CLASSES: Any = importlib.import_module("user_rules") if IS_USER else scalar_optimizers


@dataclass(frozen=True)
class Optimizer:
    """An optimizer class, and the hyperparameters that its rule's oracle takes for it.

    Args:
        cls: The name of the class.
        case: The hyperparameters, but for `step`. Without arguments, they test its defaults.
        label: What `arguments` are about.
        arguments: Arguments of the class that differ from its defaults.
    """

    cls: str
    case: Mapping[str, Any]
    label: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rule:
    """A row of the table: a public function, what it should compute, and how it may be called.

    Args:
        name: Stem of everything that belongs to the rule.
        function: The public function.
        oracle: The same in float64: ``oracle(grad, *states, **case)``. Its keyword-only arguments
            are the hyperparameters, in the order in which the function takes them.
        states: Names of the states, in order. One that ends in ``_sq`` is never negative.
        cases: Hyperparameters as keyword arguments. The first case is the usual one.
        optimizers: The optimizer classes, each with its defaults, and then with other arguments.
        is_sign: Whether the update is a sign.
        normalises: Whether the averages are those of the normalised gradient.
        same_as: A hyperparameter that may be None, and the one whose value it then takes.
    """

    name: str
    function: Callable[..., Any]
    oracle: Callable[..., Expected]
    states: tuple[str, ...]
    cases: Mapping[str, dict[str, Any]]
    optimizers: Sequence[Optimizer] = ()
    is_sign: bool = False
    normalises: bool = False
    same_as: Mapping[str, str] = field(default_factory=dict)

    @property
    def usual(self) -> dict[str, Any]:
        return next(iter(self.cases.values()))

    @property
    def hyperparameters(self) -> list[str]:
        return inspect.getfullargspec(self.oracle).kwonlyargs

    @property
    def has_step(self) -> bool:
        return "step" in self.hyperparameters

    @property
    def has_shape_scaling(self) -> bool:
        return "use_shape_scaling" in self.hyperparameters

    @property
    def defaults(self) -> dict[str, Any]:
        """The hyperparameters that the public function has defaults for."""
        return dict(inspect.getfullargspec(self.oracle).kwonlydefaults or {})

    def complete(self, case: Mapping[str, Any]) -> dict[str, Any]:
        """A case with values for all hyperparameters, as formulas and operators take it."""
        values = self.defaults | dict(case)
        same = {a: values[b] for a, b in self.same_as.items() if values[a] is None}
        return values | same

    @property
    def implementation(self) -> Any:
        """The package's rule."""
        if IS_USER:
            return self.function
        return importlib.import_module(f"{scalar_optimizers.__name__}.{self.name}")._RULE

    @property
    def operator(self) -> Any:
        return self.implementation._operator

    def __str__(self) -> str:
        return self.name


def is_square(state: str) -> bool:
    """Whether a state of this name averages squares, and is never negative."""
    return state.endswith("_sq")


def needs_matrix(case: Mapping[str, Any]) -> bool:
    return bool(case.get("use_shape_scaling", False))


def _rule(
    name: str,
    oracle: Callable[..., Expected],
    states: str,
    cases: Mapping[str, dict[str, Any]],
    optimizers: Sequence[Optimizer],
    **others: Any,
) -> Rule:
    function = getattr(scalar_optimizers, f"calculate_{name}_update")
    return Rule(name, function, oracle, tuple(states.split()), cases, optimizers, **others)


_ADAM = {
    "betas": (0.9, 0.999),
    "correct_bias": True,
    "use_nesterov": False,
    "step": 10,
    "eps": 1e-8,
}
_ADEMAMIX = {
    "num_beta_slow_warmup_steps": 100,
    "num_alpha_warmup_steps": 100,
    "betas": (0.9, 0.999, 0.9999),
    "step": 10,
    "eps": 1e-8,
    "correct_bias": True,
    "alpha": 2.0,
}
_SIM_ADEMAMIX = {
    "num_beta_fast_warmup_steps": 100,
    "min_beta_fast": 0.9,
    "betas": (0.99, 0.999),
    "step": 10,
    "eps": 1e-8,
    "correct_bias": True,
    "alpha": 2.0,
}
_LAPROP = {"correct_bias": True, "betas": (0.9, 0.999), "step": 10, "eps": 1e-8}
_SIGNUM = {"momentum_beta": 0.9, "correct_bias": True, "use_nesterov": False, "step": 10}

_ADAM_DEFAULTS = {"betas": (0.9, 0.999), "correct_bias": True, "use_nesterov": False, "eps": 1e-8}
_ADEMAMIX_DEFAULTS = {
    "betas": (0.9, 0.999, 0.9999),
    "eps": 1e-8,
    "correct_bias": True,
    "alpha": 5.0,
    "num_beta_slow_warmup_steps": None,
    "num_alpha_warmup_steps": None,
}
_SIM_DEFAULTS = {
    "betas": (0.9999, 0.999),
    "eps": 1e-8,
    "correct_bias": True,
    "alpha": 2.0,
    "num_beta_fast_warmup_steps": None,
    "min_beta_fast": 0.9,
}
_LAPROP_DEFAULTS = {"betas": (0.9, 0.999), "correct_bias": True, "eps": 1e-8}
_SIGNUM_DEFAULTS = {"momentum_beta": 0.9, "correct_bias": True, "use_nesterov": False}
_UNCORRECTED = {"correct_bias": False}
_WARM_UP = {"num_beta_slow_warmup_steps": 3, "num_alpha_warmup_steps": 4, "alpha": 2.0}
_SIM_WARM_UP = {"num_beta_fast_warmup_steps": 3, "min_beta_fast": 0.5, "alpha": 1.0}
_SCALED = {"use_shape_scaling": True}

_TABLE = [
    _rule(
        "adam",
        adam,
        "exp_avg exp_avg_sq",
        {
            "usual": _ADAM,
            "first step": _ADAM | {"step": 1},
            "second step": _ADAM | {"step": 2},
            "late step": _ADAM | {"step": 1000},
            "uncorrected": _ADAM | {"correct_bias": False},
            "uncorrected step 0": _ADAM | {"correct_bias": False, "step": 0},
            "nesterov": _ADAM | {"use_nesterov": True},
            "nesterov first step": _ADAM | {"use_nesterov": True, "step": 1},
            "nesterov uncorrected": _ADAM | {"use_nesterov": True, "correct_bias": False},
            "zero betas": _ADAM | {"betas": (0.0, 0.0)},
            "nesterov zero betas": _ADAM | {"use_nesterov": True, "betas": (0.0, 0.0)},
            "betas near 1": _ADAM | {"betas": (0.9999, 0.99999), "step": 2, "eps": 1e-15},
        },
        [
            Optimizer("Adam", _ADAM_DEFAULTS),
            Optimizer("AdamW", _ADAM_DEFAULTS),
            Optimizer(
                "Adam", _ADAM_DEFAULTS | {"use_nesterov": True}, "nesterov", {"nesterov": True}
            ),
            Optimizer("Adam", _ADAM_DEFAULTS | _UNCORRECTED, "uncorrected", _UNCORRECTED),
        ],
    ),
    _rule(
        "ademamix",
        ademamix,
        "exp_avg_fast exp_avg_slow exp_avg_sq",
        {
            "usual": _ADEMAMIX,
            "first step": _ADEMAMIX | {"step": 1},
            "second step": _ADEMAMIX | {"step": 2},
            "before the warm-ups' end": _ADEMAMIX | {"step": 99},
            "at the warm-ups' end": _ADEMAMIX | {"step": 100},
            "after the warm-ups' end": _ADEMAMIX | {"step": 1000},
            "different warm-ups": _ADEMAMIX
            | {"num_beta_slow_warmup_steps": 7, "num_alpha_warmup_steps": 1000},
            "no warm-up": _ADEMAMIX
            | {"num_beta_slow_warmup_steps": None, "num_alpha_warmup_steps": None},
            "uncorrected": _ADEMAMIX | {"correct_bias": False},
            "uncorrected step 0": _ADEMAMIX | {"correct_bias": False, "step": 0},
            "zero fast beta": _ADEMAMIX | {"betas": (0.0, 0.999, 0.9999)},
            "zero betas": _ADEMAMIX
            | {
                "betas": (0.0, 0.0, 0.0),
                "num_beta_slow_warmup_steps": None,
                "num_alpha_warmup_steps": None,
            },
            "negative alpha": _ADEMAMIX | {"alpha": -3.5},
            "zero alpha": _ADEMAMIX | {"alpha": 0.0},
        },
        [
            Optimizer("AdEMAMix", _ADEMAMIX_DEFAULTS),
            Optimizer("AdEMAMix", _ADEMAMIX_DEFAULTS | _WARM_UP, "warm-up", _WARM_UP),
        ],
    ),
    _rule(
        "sim_ademamix",
        sim_ademamix,
        "exp_avg exp_avg_sq",
        {
            "usual": _SIM_ADEMAMIX,
            "first step": _SIM_ADEMAMIX | {"step": 1},
            "second step": _SIM_ADEMAMIX | {"step": 2},
            "before the warm-up's end": _SIM_ADEMAMIX | {"step": 99},
            "at the warm-up's end": _SIM_ADEMAMIX | {"step": 100},
            "after the warm-up's end": _SIM_ADEMAMIX | {"step": 1000},
            "no warm-up": _SIM_ADEMAMIX | {"num_beta_fast_warmup_steps": None},
            "from zero": _SIM_ADEMAMIX | {"min_beta_fast": 0.0},
            "uncorrected": _SIM_ADEMAMIX | {"correct_bias": False},
            "uncorrected step 0": _SIM_ADEMAMIX | {"correct_bias": False, "step": 0},
            "zero betas": _SIM_ADEMAMIX | {"betas": (0.0, 0.0), "num_beta_fast_warmup_steps": None},
            "negative alpha": _SIM_ADEMAMIX | {"alpha": -3.5},
            "zero alpha": _SIM_ADEMAMIX | {"alpha": 0.0},
        },
        [
            Optimizer("SimplifiedAdEMAMix", _SIM_DEFAULTS),
            Optimizer("SimplifiedAdEMAMix", _SIM_DEFAULTS | _SIM_WARM_UP, "warm-up", _SIM_WARM_UP),
        ],
    ),
    _rule(
        "laprop",
        laprop,
        "exp_avg exp_avg_sq",
        {
            "usual": _LAPROP,
            "first step": _LAPROP | {"step": 1},
            "second step": _LAPROP | {"step": 2},
            "late step": _LAPROP | {"step": 1000},
            "uncorrected": _LAPROP | {"correct_bias": False},
            "uncorrected step 0": _LAPROP | {"correct_bias": False, "step": 0},
            "zero betas": _LAPROP | {"betas": (0.0, 0.0)},
            "zero first beta": _LAPROP | {"betas": (0.0, 0.99), "eps": 1e-3},
        },
        [
            Optimizer("LaProp", _LAPROP_DEFAULTS),
            Optimizer("LaProp", _LAPROP_DEFAULTS | _UNCORRECTED, "uncorrected", _UNCORRECTED),
        ],
        normalises=True,
    ),
    _rule(
        "lion",
        lion,
        "exp_avg",
        {
            "usual": {"momentum_beta": 0.9, "momentum_beta2": 0.99},
            "one beta": {"momentum_beta": 0.9, "momentum_beta2": None},
            "zero first beta": {"momentum_beta": 0.0, "momentum_beta2": 0.99},
            "zero betas": {"momentum_beta": 0.0, "momentum_beta2": 0.0},
            "betas near 1": {"momentum_beta": 0.9999, "momentum_beta2": 0.99999},
        },
        [Optimizer("Lion", {"momentum_beta": 0.9, "momentum_beta2": 0.99})],
        is_sign=True,
        same_as={"momentum_beta2": "momentum_beta"},
    ),
    _rule(
        "signum",
        signum,
        "exp_avg",
        {
            "usual": _SIGNUM,
            "uncorrected": _SIGNUM | {"correct_bias": False},
            "uncorrected step 0": _SIGNUM | {"correct_bias": False, "step": 0},
            "nesterov": _SIGNUM | {"use_nesterov": True},
            "nesterov first step": _SIGNUM | {"use_nesterov": True, "step": 1},
            "nesterov second step": _SIGNUM | {"use_nesterov": True, "step": 2},
            "nesterov late step": _SIGNUM | {"use_nesterov": True, "step": 1000},
            "nesterov uncorrected": _SIGNUM | {"use_nesterov": True, "correct_bias": False},
            "zero beta": _SIGNUM | {"momentum_beta": 0.0},
            "shape scaling": _SIGNUM | {"use_shape_scaling": True},
            "nesterov shape scaling": _SIGNUM | {"use_nesterov": True, "use_shape_scaling": True},
        },
        [
            Optimizer("Signum", _SIGNUM_DEFAULTS),
            Optimizer(
                "Signum", _SIGNUM_DEFAULTS | {"use_nesterov": True}, "nesterov", {"nesterov": True}
            ),
            Optimizer("Signum", _SIGNUM_DEFAULTS | _SCALED, "shape scaling", _SCALED),
        ],
        is_sign=True,
    ),
]


def _users_rules() -> dict[str, Rule]:
    """The table of user_rules.py. Its keys say what the rules compute, as the built-in ones' do."""
    adam, lion = (rule for rule in _TABLE if rule.name in ("adam", "lion"))
    cases = {"usual": {"scale": 0.5}, "zero scale": {"scale": 0.0}}
    return {
        "adam": replace(
            adam,
            name="user_adam",
            function=CLASSES.user_adam,
            optimizers=[
                Optimizer("UserAdam", _ADAM_DEFAULTS),
                Optimizer(
                    "UserAdam",
                    _ADAM_DEFAULTS | {"use_nesterov": True},
                    "nesterov",
                    {"use_nesterov": True},
                ),
                Optimizer("UserAdam", _ADAM_DEFAULTS | _UNCORRECTED, "uncorrected", _UNCORRECTED),
            ],
        ),
        "lion": replace(
            lion,
            name="user_sign",
            function=CLASSES.user_sign,
            optimizers=[Optimizer("UserSign", lion.optimizers[0].case)],
        ),
        "root": Rule(
            "user_root",
            CLASSES.user_root,
            root,
            (),
            cases,
            [
                Optimizer("UserRoot", {"scale": 8.0}),
                Optimizer("UserRoot", {"scale": 0.5}, "scaled", {"scale": 0.5}),
            ],
        ),
    }


RULES: dict[str, Rule] = _users_rules() if IS_USER else {rule.name: rule for rule in _TABLE}
