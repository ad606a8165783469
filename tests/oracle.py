"""The table of rules that the other tests are crossed with. float64_rules.py has the formulas."""

import importlib
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from float64_rules import Array as Array
from float64_rules import Expected as Expected
from float64_rules import Value as Value
from float64_rules import (
    adam,
    ademamix,
    amsgrad,
    laprop,
    lion,
    madam,
    rmsprop,
    rmsprop_centered,
    rmsprop_centered_momentum,
    rmsprop_momentum,
    root,
    signum,
    sim_ademamix,
)

from emerging_optimizers import scalar_optimizers
from emerging_optimizers.registry import get_optimizer_cls, get_optimizer_names

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
        function: The public function; or, of a rule that only a class has, one like it.
        oracle: The same in float64: ``oracle(grad, *states, **case)``. Its keyword-only arguments
            are the hyperparameters, in the order in which the function takes them.
        states: Names of the states, in order.
        cases: Hyperparameters as keyword arguments. The first case is the usual one.
        optimizers: The optimizer classes, each with its defaults, and then with other arguments.
        is_sign: Whether the update is a sign.
        normalises: Whether the averages are those of the normalised gradient.
        same_as: A hyperparameter that may be None, and the one whose value it then takes.
        is_public: Whether the function is.
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
    is_public: bool = True

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
        return self.function if IS_USER else _BUILT_IN[self.name]

    @property
    def operator(self) -> Any:
        return self.implementation._operator

    def __str__(self) -> str:
        return self.name


def is_square(state: str) -> bool:
    """Whether a state of this name averages squares, and is never negative."""
    return "sq" in state.split("_") or state == "square_avg"


def needs_matrix(case: Mapping[str, Any]) -> bool:
    return bool(case.get("use_shape_scaling", False))


# The package's rules, by name: those of functions, and those that classes have besides.
_BUILT_IN: dict[str, Any] = {
    rule.name: rule
    for cls in map(get_optimizer_cls, get_optimizer_names())
    if issubclass(cls, scalar_optimizers.ScalarOptimizer)
    and cls.__module__.startswith(scalar_optimizers.__name__)
    for rule in (cls._rule, *cls._other_rules)
}


def _function_of(rule: Any) -> Callable[..., Any]:
    """The function of a rule that has no public one."""
    enter = rule.entry_point()
    names = ["grad", *rule.states, *rule.hyperparameter_names]

    def function(*operands: Any, out: Any = None, **others: Any) -> Any:
        arguments = dict(zip(names, operands, strict=False)) | others
        return enter(*(arguments[name] for name in names), out)

    parameters = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names]
    parameters.append(inspect.Parameter("out", inspect.Parameter.KEYWORD_ONLY, default=None))
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return function


def _rule(
    name: str,
    oracle: Callable[..., Expected],
    states: str,
    cases: Mapping[str, dict[str, Any]],
    optimizers: Sequence[Optimizer],
    **others: Any,
) -> Rule:
    public = getattr(scalar_optimizers, f"calculate_{name}_update", None)
    function = public or _function_of(_BUILT_IN[name])
    others["is_public"] = public is not None
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
_MADAM = {"betas": (0.9, 0.999), "correct_bias": True, "step": 10, "scale_log2": 0}
_MADAM_DEFAULTS = {"betas": (0.9, 0.999), "correct_bias": True, "scale_log2": 0}
_RMSPROP = {"alpha": 0.99, "eps": 1e-8}
_RMSPROP_CASES = {
    "usual": _RMSPROP,
    "zero alpha": _RMSPROP | {"alpha": 0.0},
    "alpha near 1": _RMSPROP | {"alpha": 0.99999, "eps": 1e-15},
}
# Not with an alpha of 0, for which the variance is 0.
_CENTERED_CASES = {"usual": _RMSPROP, "quick": {"alpha": 0.5, "eps": 1e-3}}
_CENTERED = {"centered": True}
_MOMENTUM = {"momentum": 0.9}


def _with(cases: Mapping[str, dict[str, Any]], **more: Any) -> dict[str, dict[str, Any]]:
    return {label: case | more for label, case in cases.items()}


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
        "amsgrad",
        amsgrad,
        "exp_avg exp_avg_sq max_exp_avg_sq",
        {
            "usual": _ADAM,
            "first step": _ADAM | {"step": 1},
            "uncorrected step 0": _ADAM | {"correct_bias": False, "step": 0},
            "nesterov": _ADAM | {"use_nesterov": True},
            "zero betas": _ADAM | {"betas": (0.0, 0.0)},
        },
        [
            Optimizer("Adam", _ADAM_DEFAULTS, "amsgrad", {"amsgrad": True}),
            Optimizer("AdamW", _ADAM_DEFAULTS, "amsgrad", {"amsgrad": True}),
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
        "madam",
        madam,
        "exp_avg exp_avg_sq_scaled",
        {
            "usual": _MADAM,
            "first step": _MADAM | {"step": 1},
            "late step": _MADAM | {"step": 1000},
            "uncorrected": _MADAM | {"correct_bias": False},
            "uncorrected step 0": _MADAM | {"correct_bias": False, "step": 0},
            "zero betas": _MADAM | {"betas": (0.0, 0.0)},
            "scaled": _MADAM | {"scale_log2": 30},
            "scaled down": _MADAM | {"scale_log2": -14.0},
        },
        [
            Optimizer("MAdam", _MADAM_DEFAULTS),
            Optimizer("MAdam", _MADAM_DEFAULTS | {"scale_log2": 20}, "scaled", {"scale_log2": 20}),
        ],
    ),
    _rule(
        "rmsprop",
        rmsprop,
        "exp_avg_sq",
        _RMSPROP_CASES,
        [Optimizer("RMSprop", _RMSPROP)],
    ),
    _rule(
        "rmsprop_centered",
        rmsprop_centered,
        "exp_avg_sq grad_avg",
        _CENTERED_CASES,
        [Optimizer("RMSprop", _RMSPROP, "centered", _CENTERED)],
    ),
    _rule(
        "rmsprop_momentum",
        rmsprop_momentum,
        "exp_avg_sq momentum_buffer",
        _with(_RMSPROP_CASES, **_MOMENTUM),
        [Optimizer("RMSprop", _RMSPROP | _MOMENTUM, "momentum", _MOMENTUM)],
    ),
    _rule(
        "rmsprop_centered_momentum",
        rmsprop_centered_momentum,
        "exp_avg_sq grad_avg momentum_buffer",
        _with(_CENTERED_CASES, **_MOMENTUM),
        [
            Optimizer("RMSprop", _RMSPROP | _MOMENTUM, "centered momentum", _CENTERED | _MOMENTUM),
        ],
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


ALL_RULES: dict[str, Rule] = _users_rules() if IS_USER else {rule.name: rule for rule in _TABLE}
# Those with a public function. The others are only in classes.
RULES = {name: rule for name, rule in ALL_RULES.items() if rule.is_public}
