"""What Python's operators and torch's functions do with proxies, checked against PyTorch."""

import operator
from collections.abc import Callable
from typing import Any

import torch

from . import shadows
from .graph import RuleError
from .proxies import DEVICE, DTYPE, Element, Number, Proxy, apply, is_condition, truth
from .refusals import refusal

# The known functions and methods of tensors, by name (operations.py).
OPERATIONS: dict[str, Callable[..., Any]] = {}


def call(
    operation: Callable[..., Any],
    name: str,
    function: Callable[..., Any],
    *arguments: Any,
    **options: Any,
) -> Any:
    """Call one of torch's functions, or a method of tensors, with proxies."""
    if options.pop("out", None) is not None:
        raise RuleError(f"{name} with out=: assign the result, or use the in-place method (add_)")
    try:
        result = operation(*arguments, **options)
    except TypeError as error:
        if isinstance(error, RuleError):
            raise
        raise RuleError(f"{name} with these arguments: {_shorten(error)}") from error
    if not name.endswith("_") or name.endswith("__"):
        return _with_shadow(result, name, function, arguments, options)
    target = arguments[0] if arguments else options.get("input")
    if not isinstance(target, Element):
        raise RuleError(f"{name} modifies a tensor that is not an argument of the rule")
    _shadow_of(name, function, arguments, options)
    return target.assign(result)


def _shorten(error: TypeError) -> str:
    return str(error).rpartition("() ")[2]


def call_torch(function: Any, *arguments: Any, **options: Any) -> Any:
    """Call one of torch's functions, or a method of tensors, with proxies."""
    name = getattr(function, "__name__", str(function))
    is_operator = name.startswith("__")
    operation = OPERATIONS.get(name if is_operator else name.rstrip("_"))
    if name.startswith("__i"):
        raise RuleError("an operator modifies a tensor that is not an argument of the rule")
    if operation is None:
        values = (*arguments, *options.values())
        kinds = {Element, Number} & set(map(type, values))
        if kinds == {Number} and name == "__getitem__":
            raise RuleError(
                "indexing a constant tensor with a per-step number: use a tuple of numbers, as in"
                " (0.1, 0.2)[step > 3]"
            )
        if kinds == {Number}:
            raise RuleError(
                f"torch.{name} of a constant tensor and a per-step number: use a Python number in"
                " place of the tensor"
            )
        raise refusal(f"torch.{name}", name.strip("_"))
    return call(operation, f"torch.{name}", function, *arguments, **options)


def _with_shadow(
    result: Any, what: str, function: Callable[..., Any], arguments: Any, options: dict[str, Any]
) -> Any:
    """Check a result against PyTorch's."""
    if isinstance(result, Element):
        shadow = _shadow_of(what, function, arguments, options)
        if (shadow.dtype is torch.bool) is not (result.node.kind == "mask"):
            raise RuleError(
                f"{what} of conditions: turn them into numbers first, as with (grad > 0).to(grad"
                ".dtype)"
            )
        result.shadow = shadow
    return result


def _shadow_of(
    what: str, function: Callable[..., Any], arguments: Any, options: dict[str, Any]
) -> torch.Tensor:
    shown = {name: _shadow(value) for name, value in options.items()}
    return shadows.apply(what, function, [_shadow(value) for value in arguments], shown)


def _shadow(value: Any) -> Any:
    """Return what PyTorch computes with in place of a value."""
    if isinstance(value, Element):
        return value.shadow
    if isinstance(value, Number):
        return True if value.node.kind == "flag" else 0.5
    return known(value)


def known(value: Any) -> Any:
    """Return the dtype and the device that a trace has."""
    if value is DTYPE:
        return shadows.DTYPE
    return torch.device("cpu") if value is DEVICE else value


# ---- operators of Python -------------------------------------------------------------------------

# By the names of their methods.
ARITHMETIC = {"add": "+", "sub": "-", "mul": "*", "truediv": "/", "pow": "**"}
_LOGIC = {"and": "&&", "or": "||", "xor": "xor"}
COMPARISONS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}


def operate(function: Callable[..., Any], op: str, *values: Any) -> Any:
    """Return what an operator of Python computes."""
    is_logic = op in _LOGIC.values() and not any(isinstance(value, Element) for value in values)
    if is_logic and not all(map(is_condition, values)):
        raise RuleError(
            "`&`, `|` or `^` of a per-step number: rules have no integers; use `%`, as in"
            " `step % 2 == 1`"
        )
    return _with_shadow(_binary(op, values), _text_of(function), function, values, {})


def _binary(op: str, values: tuple[Any, ...]) -> Any:
    if op == "**":
        return OPERATIONS["pow"](*values)
    return apply("!=", *map(truth, values)) if op == "xor" else apply(op, *values)


def _text_of(function: Callable[..., Any]) -> str:
    return f"operator `{function.__name__.rstrip('_')}`"


def _torch_function(
    cls: type[Proxy], function: Any, types: Any, args: Any = (), kwargs: Any = None
) -> Any:
    return call_torch(function, *args, **(kwargs or {}))


def _negate(self: Proxy) -> Any:
    return operate(operator.neg, "neg", self)


def _absolute(self: Proxy) -> Any:
    return operate(operator.abs, "abs", self)


def _positive(self: Proxy) -> Proxy:
    if isinstance(self, Element):
        _shadow_of(_text_of(operator.pos), operator.pos, (self,), {})
    return self


def _invert(self: Proxy) -> Any:
    if isinstance(self, Number):
        raise RuleError("`~` of a per-step condition: use `not`")
    return operate(operator.invert, "!", self)


def _method(self: Element, name: str) -> Any:
    """Return a method of tensors: this is `Element.__getattr__`."""
    stem = name.rstrip("_")
    operation = OPERATIONS.get(stem) if not name.startswith("__") else None
    function = getattr(torch.Tensor, name, None)
    if operation is None or function is None:
        if name.startswith("__"):
            raise AttributeError(name)
        raise refusal(f"Tensor.{name}", stem)
    known, plain = operation, function

    def method(*arguments: Any, **options: Any) -> Any:
        if name == "where":  # the only method whose tensor is not its function's first
            condition, *others = arguments
            return call(known, "Tensor.where", torch.where, condition, self, *others, **options)
        return call(known, f"Tensor.{name}", plain, self, *arguments, **options)

    return method


def _add_operators() -> None:
    for name, op in (ARITHMETIC | _LOGIC | COMPARISONS).items():
        plain = getattr(operator, name, None) or getattr(operator, f"{name}_")
        setattr(Proxy, f"__{name}__", _operator(plain, op))
        if name not in COMPARISONS:
            setattr(Proxy, f"__r{name}__", _reflected(plain, op))
            setattr(Element, f"__i{name}__", _in_place(getattr(operator, f"i{name}"), op))
    unary = {"neg": _negate, "abs": _absolute, "pos": _positive, "invert": _invert}
    for name, method in unary.items():
        setattr(Proxy, f"__{name}__", method)
    Proxy.__torch_function__ = classmethod(_torch_function)  # type: ignore[attr-defined]
    Element.__getattr__ = _method  # type: ignore[attr-defined]


def _operator(plain: Callable[..., Any], op: str) -> Callable[[Any, Any], Any]:
    return lambda self, other: operate(plain, op, self, other)


def _reflected(plain: Callable[..., Any], op: str) -> Callable[[Any, Any], Any]:
    return lambda self, other: operate(plain, op, other, self)


def _in_place(plain: Callable[..., Any], op: str) -> Callable[[Any, Any], Any]:
    def modify(self: Element, other: Any) -> Element:
        result = _binary(op, (self, other))
        _shadow_of(_text_of(plain), plain, (self, other), {})
        return self.assign(result)

    return modify


_add_operators()
