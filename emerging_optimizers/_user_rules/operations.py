"""The functions of torch and methods of tensors that a rule may use, by name.

A method that ends in ``_`` is the operation without it, and then modifies its tensor.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from .graph import RuleError
from .proxies import (
    DTYPE,
    OPERATIONS,
    Element,
    Number,
    Proxy,
    Tracing,
    apply,
    as_element,
    as_number,
    node_of,
    trace_of,
    truth,
    where,
    wrap,
)


def _of_tensors(name: str, *values: Any) -> None:
    """Raise for a number where torch takes tensors only."""
    for value in values:
        if not isinstance(value, (Element, torch.Tensor)):
            raise RuleError(
                f"{name} of a number: PyTorch expects tensors there; use operators or clamp"
            )


def _scaled(value: Any, factor: Any) -> Any:
    is_one = isinstance(factor, (int, float)) and factor == 1
    return value if is_one else apply("*", factor, value)


def _add(a: Any, b: Any, alpha: Any = 1) -> Proxy:
    return apply("+", a, _scaled(b, alpha))


def _sub(a: Any, b: Any, alpha: Any = 1) -> Proxy:
    return apply("-", a, _scaled(b, alpha))


def _div(a: Any, b: Any, rounding_mode: str | None = None) -> Proxy:
    if rounding_mode is not None:
        raise RuleError("div with rounding_mode: rules cannot round elements to integers")
    return apply("/", a, b)


def _square(x: Any) -> Proxy:
    return apply("*", x, x)


def _addcmul(a: Any, b: Any, c: Any, value: Any = 1) -> Proxy:
    _of_tensors("addcmul", a, b, c)
    return apply("+", a, apply("*", _scaled(b, value), c))


def _addcdiv(a: Any, b: Any, c: Any, value: Any = 1) -> Proxy:
    _of_tensors("addcdiv", a, b, c)
    return apply("+", a, apply("/", _scaled(b, value), c))


def _lerp(start: Any, end: Any, weight: Any) -> Proxy:
    """Interpolate from the nearer end, so that weights of 0 and 1 give the ends."""
    _of_tensors("lerp", start, end)
    trace = trace_of(start, end, weight)
    difference = apply("-", end, start)
    number = wrap(trace, node_of(trace, weight))
    constant = number.node.constant()
    if constant is not None:
        if constant < 0.5:
            return apply("+", start, apply("*", weight, difference))
        return apply("+", end, apply("*", apply("-", number, 1.0), difference))
    is_near_start = apply("<", number, 0.5)
    nearer = where(is_near_start, start, end)
    factor = where(is_near_start, number, apply("-", number, 1.0))
    return apply("+", nearer, apply("*", factor, difference))


def _clamp(x: Any, min: Any = None, max: Any = None) -> Any:
    if min is None and max is None:
        raise RuleError("clamp without min and max: pass at least one of them")
    if min is not None:
        x = apply("max", x, min)
    return x if max is None else apply("min", x, max)


def _maximum(a: Any, b: Any) -> Proxy:
    _of_tensors("maximum", a, b)
    return apply("max", a, b)


def _minimum(a: Any, b: Any) -> Proxy:
    _of_tensors("minimum", a, b)
    return apply("min", a, b)


def _where(condition: Any, chosen: Any, other: Any) -> Proxy:
    if isinstance(condition, (bool, Number)):
        raise RuleError(
            "torch.where on a condition that is the same for all elements: use `a if condition"
            " else b`"
        )
    return where(condition, chosen, other)


def _masked_fill(x: Any, mask: Any, value: Any) -> Proxy:
    return where(mask, value, x)


def _copy(x: Any, value: Any = None) -> Proxy:
    """`clone`, or `copy_` and `fill_` with a value."""
    trace = trace_of(x)
    if value is None:
        return wrap(trace, x.node)
    return wrap(trace, as_element(trace, value))


def _filled(value: float) -> Callable[[Any], Proxy]:
    return lambda x: _copy(x, value)


def _detach(x: Any) -> Any:
    return x


def _to(x: Any, dtype: Any = None, **options: Any) -> Any:
    """Turn a condition into a number; a number stays as it is."""
    if options or not (dtype is DTYPE or isinstance(dtype, (torch.dtype, Proxy))):
        raise RuleError(f"Tensor.to({dtype}): remove it; a rule cannot choose devices or layouts")
    if x.node.kind == "mask":
        return _as_float(x)
    if isinstance(dtype, torch.dtype):
        raise RuleError(
            f"Tensor.to({dtype}): remove it; rules compute in float32, and in float64 where an"
            " operand is"
        )
    return x


def _float(x: Any) -> Any:
    return _to(x, torch.float32)


def _as_float(x: Any) -> Proxy:
    trace = trace_of(x)
    return wrap(trace, as_number(trace, x.node))


def _isnan(x: Any) -> Proxy:
    return apply("!=", x, x)


def _isinf(x: Any) -> Proxy:
    return apply("==", apply("abs", x), float("inf"))


def _isfinite(x: Any) -> Proxy:
    return apply("<", apply("abs", x), float("inf"))


_MOST_FACTORS = 16


def _power(base: Any, exponent: Any) -> Proxy:
    """Return a power: products and square roots if the exponent is a multiple of a half."""
    trace = trace_of(base, exponent)
    n = node_of(trace, exponent).constant()
    if n is not None and abs(n) <= _MOST_FACTORS:
        is_element = isinstance(base, Element)
        if n.is_integer() or (is_element and (2 * n).is_integer()):
            return (
                _repeated(trace, base, n) if n >= 0 else apply("/", 1.0, _repeated(trace, base, -n))
            )
    if isinstance(base, Element) or isinstance(exponent, Element):
        raise RuleError(
            "the exponent of an element must be a constant multiple of 1/2, and at most"
            f" {_MOST_FACTORS}; an element cannot be the exponent"
        )
    return apply("pow", base, exponent)


def _repeated(trace: Tracing, base: Any, exponent: float) -> Proxy:
    """Return a power by multiplication, from left to right, and then by the square root."""
    count = math.floor(exponent)
    result: Any = None
    for _ in range(count):
        result = base if result is None else apply("*", result, base)
    if exponent != count:
        root = apply("sqrt", base)
        result = root if result is None else apply("*", result, root)
    if result is None:
        one = trace.graph.constant(1.0)
        return wrap(
            trace, as_element(trace, wrap(trace, one)) if isinstance(base, Element) else one
        )
    return wrap(trace, node_of(trace, result))


def _binary(op: str) -> Callable[[Any, Any], Proxy]:
    return lambda a, b: apply(op, a, b)


def _unary(op: str) -> Callable[[Any], Proxy]:
    return lambda x: apply(op, x)


def _logical_xor(a: Any, b: Any) -> Proxy:
    return apply("!=", truth(a), truth(b))


OPERATIONS.update(
    {
        "add": _add,
        "sub": _sub,
        "subtract": _sub,
        "mul": _binary("*"),
        "multiply": _binary("*"),
        "div": _div,
        "divide": _div,
        "true_divide": _binary("/"),
        "rsub": lambda a, b, alpha=1: apply("-", b, _scaled(a, alpha)),
        "neg": _unary("neg"),
        "negative": _unary("neg"),
        "abs": _unary("abs"),
        "absolute": _unary("abs"),
        "sign": _unary("sign"),
        "sgn": _unary("sign"),
        "copysign": _binary("copysign"),
        "square": _square,
        "sqrt": _unary("sqrt"),
        "rsqrt": _unary("rsqrt"),
        "reciprocal": lambda x: apply("/", 1.0, x),
        "pow": _power,
        "addcmul": _addcmul,
        "addcdiv": _addcdiv,
        "lerp": _lerp,
        "clamp": _clamp,
        "clip": _clamp,
        "clamp_min": lambda x, min: _clamp(x, min=min),
        "clamp_max": lambda x, max: _clamp(x, max=max),
        "relu": lambda x: _clamp(x, min=0.0),
        "maximum": _maximum,
        "minimum": _minimum,
        "where": _where,
        "masked_fill": _masked_fill,
        "lt": _binary("<"),
        "less": _binary("<"),
        "le": _binary("<="),
        "less_equal": _binary("<="),
        "gt": _binary(">"),
        "greater": _binary(">"),
        "ge": _binary(">="),
        "greater_equal": _binary(">="),
        "eq": _binary("=="),
        "ne": _binary("!="),
        "not_equal": _binary("!="),
        "logical_and": _binary("&&"),
        "logical_or": _binary("||"),
        "logical_not": _unary("!"),
        "logical_xor": _logical_xor,
        "isnan": _isnan,
        "isinf": _isinf,
        "isfinite": _isfinite,
        "clone": _copy,
        "copy": lambda x, value: _copy(x, value),
        "fill": lambda x, value: _copy(x, value),
        "zero": _filled(0.0),
        "zeros_like": _filled(0.0),
        "ones_like": _filled(1.0),
        "full_like": lambda x, fill_value: _copy(x, fill_value),
        "detach": _detach,
        "to": _to,
        "type_as": _to,
        "float": _float,
    }
)
# Operators of tensors that are constants: `torch.tensor(2.0) * grad`.
OPERATIONS.update(
    {
        "__add__": lambda a, b: apply("+", a, b),
        "__radd__": lambda a, b: apply("+", b, a),
        "__sub__": lambda a, b: apply("-", a, b),
        "__rsub__": lambda a, b: apply("-", b, a),
        "__mul__": lambda a, b: apply("*", a, b),
        "__rmul__": lambda a, b: apply("*", b, a),
        "__truediv__": lambda a, b: apply("/", a, b),
        "__rtruediv__": lambda a, b: apply("/", b, a),
        "__div__": lambda a, b: apply("/", a, b),
        "__rdiv__": lambda a, b: apply("/", b, a),
        "__pow__": lambda a, b: _power(a, b),
        "__rpow__": lambda a, b: _power(b, a),
        "__lt__": lambda a, b: apply("<", a, b),
        "__le__": lambda a, b: apply("<=", a, b),
        "__gt__": lambda a, b: apply(">", a, b),
        "__ge__": lambda a, b: apply(">=", a, b),
        "__eq__": lambda a, b: apply("==", a, b),
        "__ne__": lambda a, b: apply("!=", a, b),
    }
)
