"""Functions of ``math``, ``torch`` and NumPy, where an argument may be a proxy."""

import contextlib
import functools
import math
import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from .builtin_functions import has_proxy, plain_type
from .calls import OPERATIONS, call, known
from .constants import as_constant
from .graph import RuleError
from .handlers import check_no_handler
from .proxies import Number, Proxy, apply
from .refusals import refusal

# The functions of math that take per-step numbers.
_MATH = frozenset(
    re.findall(
        r"\w+",
        """
        acos acosh asin asinh atan atan2 atanh cbrt ceil copysign cos cosh erf erfc exp exp2 expm1
        fabs floor fmod hypot log log10 log1p log2 pow sin sinh sqrt tan tanh trunc
        """,
    )
)
# Those that never raise an error.
_TOTAL = ("asinh", "atan", "atan2", "cbrt", "copysign", "erf", "erfc", "fabs", "hypot", "tanh")
# What to write for others.
_INSTEAD = {
    "degrees": "multiply by 180 / math.pi",
    "radians": "multiply by math.pi / 180",
    "isclose": "compare abs(a - b) with a tolerance",
    "ldexp": "multiply by 2**n",
    "modf": "use `x % 1` and math.trunc",
    "remainder": "use `%`",
}
# The same for functions whose arguments are sequences.
_INSTEAD_OF_SEQUENCES = {
    "dist": "use math.hypot of the differences",
    "fsum": "use sum()",
    "sumprod": "use sum(a * b for a, b in zip(x, y))",
}
# NumPy's names of functions of numbers.
_NUMPY = dict(
    [(name, name) for name in _MATH if name not in ("erf", "erfc", "pow")],
    abs="abs",
    absolute="abs",
    maximum="max",
    minimum="min",
    power="pow",
)
# Functions that make a tensor of a number.
_CONSTANTS = ("tensor", "as_tensor", "scalar_tensor")


def has_element(*arguments: Any, **options: Any) -> bool:
    """Return whether an argument is an element of a tensor."""
    values = (*arguments, *options.values())
    return any(isinstance(value, Proxy) and not isinstance(value, Number) for value in values)


def _holds_proxy(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(map(_holds_proxy, value))
    return isinstance(value, Proxy)


def _call_plain(plain: Callable[..., Any], arguments: Any, options: dict[str, Any]) -> Any:
    """Call a function that has no proxies; a dtype may be `float`, or that of a proxy."""
    values = {name: known(plain_type(value)) for name, value in options.items()}
    return plain(*(known(plain_type(value)) for value in arguments), **values)


def math_function(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of math that also takes per-step numbers."""

    def function(*values: Any, **options: Any) -> Any:
        if name in _INSTEAD_OF_SEQUENCES:
            values = tuple(list(v) if isinstance(v, Iterable) else v for v in values)
            if any(map(_holds_proxy, values)):
                raise RuleError(
                    f"math.{name} is not available in rules: {_INSTEAD_OF_SEQUENCES[name]}"
                )
        if not has_proxy(*values, **options) or name == "prod":
            return plain(*values, **options)
        if has_element(*values, **options):
            if name not in OPERATIONS:
                raise refusal(f"math.{name} of a tensor", name)
            raise RuleError(f"math.{name} of a tensor: use torch.{name} or the tensor's method")
        is_test = name in ("isnan", "isinf", "isfinite")
        if name not in _MATH and not is_test:
            instead = "compute it outside, and pass the result as a hyperparameter"
            raise RuleError(f"math.{name} is not available in rules: {_INSTEAD.get(name, instead)}")
        _check_arguments(plain, values, options)
        if is_test:
            return OPERATIONS[name](*values)
        if name not in _TOTAL:
            check_no_handler(ValueError, OverflowError)
        if name == "log" and len(values) == 2:
            top, bottom = (apply("log", v) if has_proxy(v) else math.log(v) for v in values)
            return apply("/", top, bottom)
        return _apply(name, values)

    return function


def _check_arguments(plain: Callable[..., Any], values: Any, options: dict[str, Any]) -> None:
    """Let a function check how many arguments it has, and their names."""
    with contextlib.suppress(ValueError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numpy, which returns NaN outside of the domain
        plain(*(0.5 for _ in values), **dict.fromkeys(options, 0.5))


def _apply(name: str, values: tuple[Any, ...]) -> Proxy:
    """Return a function of numbers."""
    if name == "hypot":
        if len(values) == 1:
            return apply("abs", *values)
        *known, last = sorted(values, key=has_proxy)  # constants first
        return apply("hypot", functools.reduce(_hypot, known), last)
    return apply({"fabs": "abs"}.get(name, name), *values)


def _hypot(x: Any, y: Any) -> Any:
    return apply("hypot", x, y) if has_proxy(x, y) else math.hypot(x, y)


def numpy_function(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of NumPy that also takes per-step numbers."""

    def function(*values: Any, **options: Any) -> Any:
        if not any(map(_holds_proxy, (*values, *options.values()))):
            return _call_plain(plain, values, options)
        if has_element(*values, **options):
            raise RuleError(f"numpy.{name} of a tensor: use functions of torch")
        if options or name not in _NUMPY or not all(map(_is_number, values)):
            raise RuleError(
                f"numpy.{name} is not available in rules: use operators, min(), max(), sum() or"
                " functions of math"
            )
        _check_arguments(plain, values, options)
        return _apply(_NUMPY[name], values)

    return function


def _is_number(value: Any) -> bool:
    return isinstance(value, (Number, int, float))


def torch_function(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of torch that also takes elements."""

    def function(*arguments: Any, **options: Any) -> Any:
        operation = OPERATIONS.get(name.rstrip("_"))
        if name in _CONSTANTS and len(arguments) >= 1 and _holds_proxy(arguments[0]):
            if isinstance(arguments[0], Number):
                return arguments[0]
            raise RuleError(
                f"torch.{name} of a sequence of per-step numbers, or of a tensor: use the sequence"
                " or the tensor itself"
            )
        if has_proxy(*arguments, **options):
            is_of_numbers = not has_element(*arguments, **options)
            if operation is None and not (is_of_numbers and name in _MATH):
                raise refusal(f"torch.{name}", name)
            if operation is None or is_of_numbers:
                raise RuleError(
                    f"torch.{name} of numbers: use operators, min(), max() or functions of math"
                )
            return call(operation, f"torch.{name}", plain, *arguments, **options)
        if draws_random_numbers(name):
            raise refusal(f"torch.{name}", name)
        return as_constant(_call_plain(plain, arguments, options))

    return function


def draws_random_numbers(name: str) -> bool:
    """Return whether a function of torch draws random numbers."""
    return name.startswith("rand") or name in ("bernoulli", "normal", "poisson", "manual_seed")
