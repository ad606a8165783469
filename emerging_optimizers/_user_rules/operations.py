"""The functions of torch and methods of tensors that a rule may use, by name.

A method that ends in ``_`` is the operation without it, and then modifies its tensor.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from .calls import ARITHMETIC, COMPARISONS, OPERATIONS
from .graph import RuleError
from .handlers import check_no_handler
from .proxies import (
    DEVICE,
    DTYPE,
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
from .refusals import refusal


def _of_tensors(name: str, *values: Any) -> None:
    """Raise for a number where torch takes tensors only."""
    for value in values:
        if not isinstance(value, (Element, torch.Tensor)):
            raise RuleError(
                f"{name} of a number: PyTorch expects tensors there; use operators or clamp"
            )


def _scaled(value: Any, factor: Any) -> Any:
    if isinstance(factor, (int, float)) and factor == 1:
        return value
    is_known = not isinstance(value, Proxy) and not isinstance(factor, Proxy)
    return factor * value if is_known else apply("*", factor, value)


def _add(input: Any, other: Any, *, alpha: Any = 1) -> Proxy:
    return apply("+", input, _scaled(other, alpha))


def _sub(input: Any, other: Any, *, alpha: Any = 1) -> Proxy:
    return apply("-", input, _scaled(other, alpha))


def _div(input: Any, other: Any, *, rounding_mode: str | None = None) -> Proxy:
    if rounding_mode is not None:
        raise RuleError("div with rounding_mode: rules cannot round elements to integers")
    return apply("/", input, other)


def _square(input: Any) -> Proxy:
    return apply("*", input, input)


def _addcmul(input: Any, tensor1: Any, tensor2: Any, *, value: Any = 1) -> Proxy:
    _of_tensors("addcmul", input, tensor1, tensor2)
    return apply("+", input, apply("*", _scaled(tensor1, value), tensor2))


def _addcdiv(input: Any, tensor1: Any, tensor2: Any, *, value: Any = 1) -> Proxy:
    _of_tensors("addcdiv", input, tensor1, tensor2)
    return apply("+", input, apply("/", _scaled(tensor1, value), tensor2))


def _lerp(input: Any, end: Any, weight: Any) -> Proxy:
    """Interpolate from the nearer end, so that weights of 0 and 1 give the ends."""
    start = input
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


def _clamp(input: Any, min: Any = None, max: Any = None) -> Any:
    if min is None and max is None:
        raise RuleError("clamp without min and max: pass at least one of them")
    if min is not None:
        input = apply("max", input, min)
    return input if max is None else apply("min", input, max)


def _extreme(op: str) -> Callable[..., Proxy]:
    """Return the larger or smaller of two tensors; `max` and `min` of one reduce it."""

    def extreme(input: Any, other: Any = None) -> Proxy:
        if other is None or isinstance(other, int):
            raise refusal(f"torch.{op} of one tensor", op)
        _of_tensors(f"{op}imum", input, other)
        return apply(op, input, other)

    return extreme


def _where(condition: Any, input: Any, other: Any) -> Proxy:
    if isinstance(condition, (bool, Number)):
        raise RuleError(
            "torch.where on a condition that is the same for all elements: use `a if condition"
            " else b`"
        )
    return where(condition, input, other)


def _masked_fill(input: Any, mask: Any, value: Any) -> Proxy:
    return where(mask, value, input)


def _copy(
    input: Any,
    value: Any = None,
    *,
    dtype: Any = None,
    device: Any = DEVICE,
    memory_format: Any = None,
) -> Proxy:
    """`clone`, or `fill_`, `zeros_like` and others with a value."""
    if device is not DEVICE:
        raise RuleError(f"a tensor with device={device}: remove it; a rule cannot choose devices")
    if dtype is not None and dtype is not DTYPE:
        raise RuleError(
            f"a tensor with dtype={dtype}: remove it; rules compute in float32, and in float64"
            " where an operand is"
        )
    trace = trace_of(input)
    if value is None:
        return wrap(trace, input.node)
    input.check_is_float()
    return wrap(trace, as_element(trace, value))


def _filled(value: float) -> Callable[..., Proxy]:
    return lambda input, **options: _copy(input, value, **options)


def _relu(input: Any, *, inplace: bool = False) -> Proxy:
    if inplace:
        raise RuleError("relu with inplace=True: use relu_")
    return apply("max", input, 0.0)


def _detach(input: Any) -> Any:
    return input


def _to(x: Any, dtype: Any = None, *, device: Any = DEVICE, **options: Any) -> Any:
    """Turn a condition into a number; a number stays as it is."""
    if isinstance(x, torch.Tensor) or ((dtype is None or dtype is DEVICE) and device is DEVICE):
        return x
    is_known = dtype is DTYPE or isinstance(dtype, (torch.dtype, Proxy))
    if options or device is not DEVICE or not is_known:
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


def _isnan(input: Any) -> Proxy:
    return apply("!=", input, input)


def _isinf(input: Any) -> Proxy:
    return apply("==", apply("abs", input), float("inf"))


def _isfinite(input: Any) -> Proxy:
    return apply("<", apply("abs", input), float("inf"))


_MOST_FACTORS = 16


def _power(input: Any, exponent: Any) -> Proxy:
    """Return a power: products and square roots if the exponent is a multiple of a half."""
    base = input
    trace = trace_of(base, exponent)
    if not isinstance(base, Element):
        check_no_handler(ZeroDivisionError, OverflowError)
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
    return lambda input, other: apply(op, input, other)


def _unary(op: str) -> Callable[[Any], Proxy]:
    return lambda input: apply(op, input)


def _logical_xor(input: Any, other: Any) -> Proxy:
    return apply("!=", truth(input), truth(other))


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
        "rsub": lambda input, other, *, alpha=1: _sub(other, input, alpha=alpha),
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
        "reciprocal": lambda input: apply("/", 1.0, input),
        "pow": _power,
        "addcmul": _addcmul,
        "addcdiv": _addcdiv,
        "lerp": _lerp,
        "clamp": _clamp,
        "clip": _clamp,
        "clamp_min": lambda input, min: _clamp(input, min=min),
        "clamp_max": lambda input, max: _clamp(input, max=max),
        "relu": _relu,
        "maximum": _extreme("max"),
        "minimum": _extreme("min"),
        "max": _extreme("max"),
        "min": _extreme("min"),
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
        "copy": lambda input, src: _copy(input, src),
        "fill": lambda input, value: _copy(input, value),
        "zero": _filled(0.0),
        "zeros_like": _filled(0.0),
        "ones_like": _filled(1.0),
        "full_like": lambda input, fill_value, **options: _copy(input, fill_value, **options),
        "detach": _detach,
        "is_floating_point": lambda input: input.node.kind == "element",
        "is_tensor": lambda obj: isinstance(obj, Element),
        "positive": _detach,
        "to": _to,
        "type_as": _to,
        "float": _float,
    }
)


def _operator(op: str) -> Callable[[Any, Any], Proxy]:
    return _power if op == "**" else _binary(op)


def _reflected(op: str) -> Callable[[Any, Any], Proxy]:
    return lambda input, other: _operator(op)(other, input)


# Operators of tensors that are constants: `torch.tensor(2.0) * grad`.
for _name, _op in (ARITHMETIC | COMPARISONS).items():
    OPERATIONS[f"__{_name}__"] = _operator(_op)
for _name, _op in ARITHMETIC.items():
    OPERATIONS[f"__r{_name}__"] = _reflected(_op)
