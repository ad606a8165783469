"""Hyperparameters: how each kind is read, what its domain is, and the check of a group.

A rule's hyperparameters and their domains come from its formula's signature; the table `_SHARED`
has those of every optimizer. The compiled module reads them by itself, with the same messages.
"""

import contextlib
import math
from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NewType, get_args

import torch
from torch import Tensor

from ._dtensor import whole
from ._values import HYPERPARAMETER, has_value, items_of, read

if TYPE_CHECKING:
    from ._optimizer import GroupKey, ScalarOptimizer

# The types of hyperparameters, as the formulas' signatures name them.
Beta = NewType("Beta", float)  # [0, 1)
NonNegative = NewType("NonNegative", float)  # [0, inf]
WarmupSteps = NewType("WarmupSteps", int)  # >= 0; None is the same as 0
Step = NewType("Step", int)

STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WEIGHT_DECAY_METHODS = ("decoupled", "independent", "palm", "l2")
_STEP_DTYPES = (torch.int64, torch.float32)

# Schedulers reach 0 by sums that rounding takes below it: LinearLR to about -1e-20.
LOWEST_RATE = -1e-12


class Option(NamedTuple):
    """A hyperparameter, as a formula's signature describes it."""

    name: str
    kind: Literal["flag", "step", "warm-up", "number", "numbers"]
    domain: Any = None
    length: int = 1

    @classmethod
    def from_annotation(cls, name: str, annotation: Any) -> "Option":
        if annotation is bool:
            return cls(name, "flag")
        if annotation is Step:
            return cls(name, "step")
        if annotation == WarmupSteps | None:
            return cls(name, "warm-up", WarmupSteps)
        if get_args(annotation):
            return cls(name, "numbers", get_args(annotation)[0], len(get_args(annotation)))
        return cls(name, "number", annotation)

    def read(self, name: str, value: Any) -> Any:
        """Return a value as the rule takes it; for all kinds but ``step``."""
        if self.kind == "flag":
            return read_flag(name, value)
        if self.kind == "numbers":
            return read_numbers(name, value, self.length)
        if self.kind == "number":
            return read_number(name, value)
        return None if value is None else read_whole_number(name, value, _WARMUP)


_WARMUP = "a whole number or None"


# ---- readers -------------------------------------------------------------------------------------


def _number_text(value: float) -> str:
    return repr(float(value)).removesuffix(".0")


def _as_float(value: Any) -> float | None:
    """Return a number's value; None where the object is none, or none that a float holds."""
    if isinstance(value, float):
        return value
    is_text = isinstance(value, (str, bytes))  # numpy's text converts to a float
    if is_text or _is_meta(value):
        return None
    if not (hasattr(value, "__float__") or hasattr(value, "__index__")):
        return None
    try:
        return read(value, HYPERPARAMETER)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None


def _is_meta(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta


def _described(value: Any) -> str:
    """Name the type of a value that was not expected, and show short ones."""
    name = type(value).__name__
    if isinstance(value, str):
        return f"{name} ({str(value)!r})" if len(value) <= _MAX_TEXT else name
    if isinstance(value, (bool, int, float)) and abs(value) < _MAX_INT:
        return f"{name} ({value!r})"
    return name


_MAX_TEXT = 40
_MAX_INT = 10**15


def _advice(value: Any) -> str:
    """Say what to do about a number that came as text."""
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        return ""
    try:
        float(value)
    except ValueError:
        return ""
    text = value.strip()
    mantissa, mark, exponent = text.replace("E", "e").partition("e")
    if not mark or "_" in text:
        return "; convert it with float()"
    number = mantissa if "." in mantissa else f"{mantissa}.0"
    signed = exponent if exponent[0] in "+-" else f"+{exponent}"
    if f"{number}e{signed}" == text.replace("E", "e"):
        return "; convert it with float()"
    return f"; YAML reads {text} as text: write {number}e{signed}, or convert it with float()"


def read_number(name: str, value: Any) -> float:
    """Return a float for whatever Python takes for a number."""
    number = _as_float(value)
    if number is None:
        raise TypeError(f"{name} must be a number, not {_described(value)}{_advice(value)}")
    return number


_BOOLS = ("bool", "bool_")  # of Python, and of numpy


def read_flag(name: str, value: Any, expected: str = "a bool") -> bool:
    """Return a bool for a bool, numpy's included."""
    if type(value).__name__ not in _BOOLS:
        raise TypeError(f"{name} must be {expected}, not {_described(value)}{_advice(value)}")
    return bool(value)


def read_optional_flag(name: str, value: Any) -> bool | None:
    """Return a bool, or None for None."""
    return None if value is None else read_flag(name, value, "a bool or None")


def read_whole_number(name: str, value: Any, expected: str) -> int:
    """Return an int for an int or an integral float."""
    if isinstance(value, int):
        return _in_int64(name, value)
    if not has_value(value) and not _is_meta(value):
        return 1
    if hasattr(value, "__index__") and not _is_meta(value):
        # Arrays and tensors have it, too, and refuse where they are of floats.
        with contextlib.suppress(TypeError):
            return _in_int64(name, int(value.__index__()))
    number = _as_float(value)
    if number is None:
        raise TypeError(f"{name} must be {expected}, not {_described(value)}{_advice(value)}")
    if math.isnan(number):
        raise ValueError(f"{name} is nan; expected a whole number")
    if not number.is_integer():
        raise TypeError(f"{name} is {_number_text(number)}; expected a whole number")
    return _in_int64(name, int(number))


def _in_int64(name: str, value: int) -> int:
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} is beyond the range of int64")
    return value


def read_numbers(name: str, values: Any, count: int) -> tuple[float, ...]:
    """Return a tuple of floats for a sequence of ``count`` numbers."""
    items = items_of(values)
    if items is None:
        raise TypeError(f"{name} must be a sequence of numbers, not {_described(values)}")
    numbers = tuple(read_number(f"{name}[{i}]", value) for i, value in enumerate(items))
    if len(numbers) != count:
        raise ValueError(f"{name} has {len(numbers)} values; expected {count}")
    return numbers


def read_step_tensor(step: Tensor) -> float:
    """Return the value of a 0-dim tensor."""
    if step.dim() != 0 or step.dtype not in _STEP_DTYPES:
        raise TypeError(
            f"step is a tensor of dtype {str(step.dtype).removeprefix('torch.')} with {step.dim()}"
            " dimensions; expected an int or a 0-dim tensor of dtype int64 or float32"
        )
    return step.item() if torch.compiler.is_compiling() or has_value(step) else 1


# ---- domains -------------------------------------------------------------------------------------


def is_in_domain(value: float, domain: Any) -> bool:
    """Return whether a domain that a formula's signature declares has this value."""
    if domain is Beta:
        return 0.0 <= value < 1.0
    if domain in (NonNegative, WarmupSteps):
        return value >= 0.0
    return not math.isnan(value)


def check_domain(name: str, value: float, domain: Any) -> None:
    """Raise for an argument outside of its domain."""
    if is_in_domain(value, domain):
        return
    text = _number_text(value)
    if domain is Beta:
        raise ValueError(f"{name} is {text}; expected 0 <= {name} < 1")
    if domain in (NonNegative, WarmupSteps):
        raise ValueError(f"{name} is {text}; expected {name} >= 0")
    raise ValueError(f"{name} is nan; expected a number")


def check_step(step: int, correct_bias: bool) -> None:
    """Raise for a step before the first."""
    if step >= 2**63:
        raise ValueError("step is beyond the range of int64")
    if correct_bias and step < 1:
        raise ValueError(
            f"step is {step}; expected step >= 1 (with bias correction, steps count from 1)"
        )
    if step < 0:
        raise ValueError(f"step is {step}; expected step >= 0")


# ---- groups --------------------------------------------------------------------------------------

# What torch.optim's errors call them.
_TITLES = {"lr": "learning rate", "eps": "epsilon value", "weight_decay": "weight_decay value"}

_OPTIONAL_FLAGS = ("fused", "foreach")
_FLAGS = (
    *_OPTIONAL_FLAGS,
    "maximize",
    "capturable",
    "master_weights",
    "stochastic_rounding",
    "differentiable",
    "frob_normalize",
    "use_decoupled_grad",
    "store_param_remainders",
)
# Of torch.optim's groups, which take part in what is loaded.
_FOREIGN_FLAGS = ("amsgrad", "decoupled_weight_decay")


def read_option(group: Mapping[str, Any], key: "GroupKey", option: Option) -> Any:
    """Return one of a rule's hyperparameters, from where a group has it."""
    if isinstance(key, str):
        return option.read(key, group[key])
    name, index, length = key
    return read_numbers(name, group[name], length)[index]


def numbers_of(optimizer: "ScalarOptimizer", group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group's hyperparameters one by one, such as ``betas[0]``."""
    keys = [key if isinstance(key, str) else key[0] for key in optimizer._group_keys]
    numbers = {}
    for key in ("lr", "weight_decay", *keys):
        items = None if isinstance(group[key], Tensor) else items_of(group[key])
        if items is None:
            numbers[key] = group[key]
        else:
            numbers.update({f"{key}[{i}]": item for i, item in enumerate(items)})
    return numbers


def check_group(
    optimizer: "ScalarOptimizer", group: Mapping[str, Any], where: str = "", is_new: bool = False
) -> None:
    """Raise for a group that has a wrong hyperparameter; change nothing.

    Args:
        optimizer: Its rule says which hyperparameters there are, and their domains.
        group: All keys of a group; ``params`` is not looked at.
        where: The group's name in messages, such as ``param_groups[1]``. Empty: none.
        is_new: No scheduler has set its learning rate, and a device may be waited for.
    """
    rule = optimizer._rule
    options: dict[str, Any] = {"step": 1}
    name = ""
    try:
        name = "lr"
        _check_lr(group[name], is_new)
        name = "weight_decay"
        if not read_number(name, group[name]) >= 0.0:
            raise ValueError(f"Invalid {_TITLES[name]}: {group[name]}")
        name = "weight_decay_method"
        _check_method(group[name])
        for option, key in zip(rule.hyperparameters, optimizer._group_keys, strict=True):
            name = key if isinstance(key, str) else key[0]
            options[option.name] = read_option(group, key, option)
            _check_option(optimizer, group, key, option, options[option.name])
        name = ""
        rule.check_together(options)
        for name in flags_of(optimizer, group):
            read_group_flag(group, name)
        name = ""
        _check_options(optimizer, group)
        name = "state_dtype"
        _check_state_dtype(optimizer, group[name])
    except (TypeError, ValueError, RuntimeError) as error:
        raise _located(error, where, name) from None


def check_flags(optimizer: "ScalarOptimizer", group: Mapping[str, Any], where: str) -> None:
    """Raise for a flag of a group that is none."""
    for name in flags_of(optimizer, group):
        if group[name] is not False and group[name] is not True:
            try:
                read_group_flag(group, name)
            except TypeError as error:
                raise _located(error, where, name) from None


def check_state_dtypes(optimizer: "ScalarOptimizer", groups: Iterable[Mapping[str, Any]]) -> None:
    """Raise for a group of an optimizer whose ``state_dtype`` has no dtypes of states."""
    for i, group in enumerate(groups):
        try:
            _check_state_dtype(optimizer, group["state_dtype"])
        except (TypeError, ValueError) as error:
            raise _located(error, f"param_groups[{i}]", "state_dtype") from None


def flags_of(optimizer: "ScalarOptimizer", group: Mapping[str, Any]) -> list[str]:
    """Return the keys of the flags that a group has: of its rule, and of every optimizer."""
    keys = optimizer._group_keys
    options = zip(optimizer._rule.hyperparameters, keys, strict=True)
    names = [
        key
        for option, key in options
        if option.kind == "flag" and isinstance(key, str) and key in group
    ]
    return names + [name for name in _FLAGS if name in group and name not in keys]


def read_group_flag(group: Mapping[str, Any], name: str) -> bool | None:
    """Return a flag, or None where that is one of its values."""
    if name not in _OPTIONAL_FLAGS:
        return read_flag(name, group[name])
    return read_optional_flag(name, group[name])


def restore_flags(optimizer: "ScalarOptimizer", group: dict[str, Any]) -> None:
    """Make bools of a saved group's flags that are 0 or 1, which were accepted for bools."""
    for name in (*flags_of(optimizer, group), *_FOREIGN_FLAGS):
        if type(group.get(name)) is int and group[name] in (0, 1):
            group[name] = bool(group[name])


def as_saved(value: Any) -> Any:
    """Return a hyperparameter with Python's numbers for numpy's, which torch's tools refuse."""
    if value is None or isinstance(value, Tensor) or type(value) in (bool, int, float, str, bytes):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    items = items_of(value)
    if items is not None:
        kind = list if isinstance(value, list) else tuple
        return kind(map(as_saved, items))
    if type(value).__name__ in _BOOLS:
        return bool(value)
    if isinstance(value, Integral):
        return int(value)
    number = _as_float(value)
    return value if number is None else float(number)


def _located(error: Exception, where: str, name: str) -> Exception:
    """Return an error that says of which group it is."""
    if not where:
        return error
    kinds = (TypeError, ValueError, RuntimeError)
    kind = next(kind for kind in kinds if isinstance(error, kind))
    return kind(f"{error} ({where}[{name!r}])" if name else f"{error} ({where})")


def _check_option(
    optimizer: "ScalarOptimizer",
    group: Mapping[str, Any],
    key: "GroupKey",
    option: Option,
    value: Any,
) -> None:
    if option.kind == "flag" or value is None:
        return
    if isinstance(key, str) and option.kind != "numbers":
        if not is_in_domain(value, option.domain):
            raise ValueError(f"Invalid {_TITLES.get(key, key)}: {group[key]}")
        return
    name, first = (key, 0) if isinstance(key, str) else key[:2]
    for i, number in enumerate(value if isinstance(value, tuple) else (value,), first):
        if not is_in_domain(number, option.domain):
            title = optimizer._beta_title if name == "betas" else name
            raise ValueError(f"Invalid {title} at index {i}: {group[name][i]}")


def _check_lr(lr: Any, is_new: bool) -> None:
    value = lr
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if lr.is_meta or not (is_new or lr.is_cpu):
            return  # no step waits for a device's number
        value = whole(lr)
    if not read_number("lr", value) >= (0.0 if is_new else LOWEST_RATE):
        raise ValueError(f"Invalid {_TITLES['lr']}: {lr}")


def _check_method(method: Any) -> None:
    if not isinstance(method, str):
        raise TypeError(f"weight_decay_method must be a str, not {_described(method)}")
    if method not in WEIGHT_DECAY_METHODS:
        raise ValueError(
            f"Invalid weight_decay_method: {method!r}; expected one of"
            f" {', '.join(map(repr, WEIGHT_DECAY_METHODS))}"
        )


def _check_options(optimizer: "ScalarOptimizer", group: Mapping[str, Any]) -> None:
    name = type(optimizer).__name__
    if group["differentiable"]:
        raise ValueError(
            f"{name} does not support differentiable=True: its step records no autograd graph;"
            " torch.optim has optimizers that do"
        )
    if group["fused"] and group.get("foreach"):
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    if group["master_weights"] and group["stochastic_rounding"]:
        raise ValueError(
            "master_weights and stochastic_rounding cannot be combined: a parameter with a float32"
            " master loses nothing to rounding"
        )


def _check_state_dtype(optimizer: "ScalarOptimizer", option: Any) -> None:
    states = optimizer._state_names
    by_key = option if isinstance(option, (dict, Mapping)) else dict.fromkeys(states, option)
    for key, dtype in by_key.items():
        if key not in states:
            raise ValueError(
                f"Invalid state_dtype: {type(optimizer).__name__} has no state {key!r}; it has"
                f" {', '.join(map(repr, states))}"
            )
        if dtype is None:
            continue
        if not isinstance(dtype, torch.dtype):
            raise TypeError(
                f"state_dtype must be a dtype, a dict of them or None, not {_described(dtype)}"
            )
        if dtype not in STATE_DTYPES:
            raise ValueError(
                f"Invalid state_dtype: {dtype}; expected torch.float32, torch.bfloat16 or"
                " torch.float16"
            )
