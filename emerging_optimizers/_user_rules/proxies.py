"""What a rule computes with while it is traced: objects that record the operations on them."""

import re
from collections.abc import Callable
from numbers import Real
from typing import Any, Protocol

import torch

from .graph import Graph, Node, RuleError
from .refusals import ElementRefusals, NumberRefusals, refusal

# The known functions and methods of tensors, by name (operations.py).
OPERATIONS: dict[str, Callable[..., Any]] = {}


class Tracing(Protocol):
    """What proxies need of a trace."""

    graph: Graph

    def decide(self, condition: Node) -> bool:
        """Return the outcome of a condition in this run of the rule."""


class _Dtype:
    """The arithmetic type, which is known only where the rule runs."""

    def __repr__(self) -> str:
        return "the arithmetic dtype"


DTYPE = _Dtype()


class Proxy:
    """A value."""

    __slots__ = ("node", "trace")
    __array_ufunc__ = None  # numpy's numbers leave operators to this class

    def __init__(self, trace: Tracing, node: Node) -> None:
        self.trace = trace
        self.node = node

    __hash__ = object.__hash__

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return call_torch(function, *args, **(kwargs or {}))

    def __pos__(self) -> "Proxy":
        return self

    def __neg__(self) -> "Proxy":
        return apply("neg", self)

    def __abs__(self) -> "Proxy":
        return apply("abs", self)

    def __pow__(self, exponent: Any) -> "Proxy":
        return power(self, exponent)

    def __rpow__(self, base: Any) -> "Proxy":
        return power(base, self)

    def __invert__(self) -> "Proxy":
        return apply("!", self)

    def __add__(self, other: Any) -> "Proxy":
        return apply("+", self, other)

    def __radd__(self, other: Any) -> "Proxy":
        return apply("+", other, self)

    def __sub__(self, other: Any) -> "Proxy":
        return apply("-", self, other)

    def __rsub__(self, other: Any) -> "Proxy":
        return apply("-", other, self)

    def __mul__(self, other: Any) -> "Proxy":
        return apply("*", self, other)

    def __rmul__(self, other: Any) -> "Proxy":
        return apply("*", other, self)

    def __truediv__(self, other: Any) -> "Proxy":
        return apply("/", self, other)

    def __rtruediv__(self, other: Any) -> "Proxy":
        return apply("/", other, self)

    def __lt__(self, other: Any) -> "Proxy":
        return apply("<", self, other)

    def __le__(self, other: Any) -> "Proxy":
        return apply("<=", self, other)

    def __gt__(self, other: Any) -> "Proxy":
        return apply(">", self, other)

    def __ge__(self, other: Any) -> "Proxy":
        return apply(">=", self, other)

    def __eq__(self, other: object) -> "Proxy":  # type: ignore[override]
        return apply("==", self, other)

    def __ne__(self, other: object) -> "Proxy":  # type: ignore[override]
        return apply("!=", self, other)

    def __and__(self, other: Any) -> "Proxy":
        return apply("&&", self, other)

    def __rand__(self, other: Any) -> "Proxy":
        return apply("&&", other, self)

    def __or__(self, other: Any) -> "Proxy":
        return apply("||", self, other)

    def __ror__(self, other: Any) -> "Proxy":
        return apply("||", other, self)

    def __xor__(self, other: Any) -> "Proxy":
        return apply("!=", truth(self), truth(other))

    __rxor__ = __xor__


class Number(NumberRefusals, Proxy):
    """A hyperparameter, the step, or what is computed from them: float64, once per step."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "a per-step number"

    def __bool__(self) -> bool:
        condition = self.node if self.node.kind == "flag" else (self != 0.0).node
        return self.trace.decide(condition)

    def __float__(self) -> float:
        raise RuleError(
            "a hyperparameter or the step has no value while the rule is traced: use operators and"
            " functions of math, not int() or NumPy"
        )

    def __index__(self) -> int:
        raise RuleError(
            "a hyperparameter or the step has no value while the rule is traced: it cannot be"
            " an index or the length of a loop"
        )

    __int__ = __float__

    def __floor__(self) -> "Proxy":
        return apply("floor", self)

    def __ceil__(self) -> "Proxy":
        return apply("ceil", self)

    def __floordiv__(self, other: Any) -> "Proxy":
        return NotImplemented if isinstance(other, Element) else apply("floor_divide", self, other)

    def __rfloordiv__(self, other: Any) -> "Proxy":
        return apply("floor_divide", other, self)

    def __mod__(self, other: Any) -> "Proxy":
        return NotImplemented if isinstance(other, Element) else apply("floor_modulo", self, other)

    def __rmod__(self, other: Any) -> "Proxy":
        return apply("floor_modulo", other, self)

    def item(self) -> "Number":
        return self


class Element(ElementRefusals, Proxy):
    """An element of a tensor. In-place operations give the object another value."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "an element of a tensor"

    def __bool__(self) -> bool:
        raise RuleError(
            "`if`, `and`, `or` or `not` on a tensor's values: use torch.where(condition, a, b), and"
            " `&`, `|`, `~` on conditions"
        )

    def __iter__(self) -> Any:
        raise RuleError("a tensor cannot be iterated over: a rule sees one element at a time")

    def __float__(self) -> float:
        raise refusal("float() of a tensor", "item")

    __int__ = __index__ = __float__

    @property
    def dtype(self) -> _Dtype:
        return DTYPE

    @property
    def data(self) -> "Element":
        return self

    def __getattr__(self, name: str) -> Any:
        stem = name.rstrip("_")
        operation = OPERATIONS.get(stem) if not name.startswith("__") else None
        if operation is None:
            if name.startswith("__") and name.strip("_") not in ("getitem", "setitem", "len"):
                raise AttributeError(name)
            raise refusal(f"Tensor.{name}", stem)

        def method(*arguments: Any, **options: Any) -> Any:
            result = call(operation, f"Tensor.{name}", self, *arguments, **options)
            return self.assign(result) if name.endswith("_") else result

        return method

    def __getitem__(self, index: Any) -> Any:
        raise refusal("indexing a tensor", "__getitem__")

    def __setitem__(self, index: Any, value: Any) -> None:
        raise refusal("indexing a tensor (use torch.where)", "__setitem__")

    def __len__(self) -> int:
        raise refusal("len() of a tensor", "__len__")

    def assign(self, value: Any) -> "Element":
        """Take another value in place."""
        node = as_element(self.trace, value)
        if self.node.kind == "mask":
            raise RuleError(
                "the result of a comparison cannot be modified in place: assign to a variable"
            )
        self.node = node
        return self

    def __iadd__(self, other: Any) -> "Element":
        return self.assign(self + other)

    def __isub__(self, other: Any) -> "Element":
        return self.assign(self - other)

    def __imul__(self, other: Any) -> "Element":
        return self.assign(self * other)

    def __itruediv__(self, other: Any) -> "Element":
        return self.assign(self / other)

    def __ipow__(self, other: Any) -> "Element":
        return self.assign(power(self, other))


def power(base: Any, exponent: Any) -> Proxy:
    result: Proxy = OPERATIONS["pow"](base, exponent)
    return result


# ---- operations ----------------------------------------------------------------------------------


def call(operation: Callable[..., Any], name: str, *arguments: Any, **options: Any) -> Any:
    if options.pop("out", None) is not None:
        raise RuleError(f"{name} with out=: assign the result, or use the in-place method (add_)")
    try:
        return operation(*arguments, **options)
    except TypeError as error:
        if isinstance(error, RuleError):
            raise
        raise RuleError(f"{name} with these arguments: {_shorten(error)}") from error


def _shorten(error: TypeError) -> str:
    return re.sub(r"^.*\w>?\(\) ", "", str(error))  # without the name of a private function


def call_torch(function: Any, *arguments: Any, **options: Any) -> Any:
    """Call one of torch's functions, or a method of tensors, with proxies."""
    name = getattr(function, "__name__", str(function))
    stem = name if name.startswith("__") else name.rstrip("_")
    operation = OPERATIONS.get(stem)
    if operation is None:
        raise refusal(f"torch.{name}", stem.strip("_"))
    result = call(operation, f"torch.{name}", *arguments, **options)
    if name.endswith("_") and not name.startswith("__") and isinstance(arguments[0], Element):
        return arguments[0].assign(result)
    return result


def trace_of(*values: Any) -> Tracing:
    for value in values:
        if isinstance(value, Proxy):
            return value.trace
    raise RuleError("no argument is a tensor or a hyperparameter of the rule: pass them directly")


def node_of(trace: Tracing, value: Any) -> Node:
    """Return the node of a proxy or a constant."""
    if isinstance(value, Proxy):
        return value.node
    if isinstance(value, Real):
        return trace.graph.constant(float(value))
    if isinstance(value, torch.Tensor):
        if value.dim() == 0 and not value.is_complex():
            return trace.graph.constant(float(value))
        raise RuleError(
            f"a tensor of shape {tuple(value.shape)} that is not an argument of the rule: make it a"
            " state, or use a number"
        )
    if value is None:
        raise RuleError(
            "None in a computation: if a hyperparameter may be None, test `is None` first"
        )
    raise RuleError(f"a rule computes with numbers and its arguments, not with {_type(value)}")


def _type(value: Any) -> str:
    return type(value).__name__


def wrap(trace: Tracing, node: Node) -> Proxy:
    return Element(trace, node) if node.is_per_element else Number(trace, node)


def as_number(trace: Tracing, node: Node) -> Node:
    """Return a truth value as 0 or 1, and a number as it is."""
    if node.kind == "mask":
        return trace.graph.node("element", "as_number", node)
    if node.kind == "flag":
        return trace.graph.node("number", "as_number", node)
    return node


def as_element(trace: Tracing, value: Any) -> Node:
    """Return what a tensor can hold."""
    node = as_number(trace, node_of(trace, value))
    return node if node.is_per_element else trace.graph.node("element", "fill", node)


def truth(value: Any) -> Any:
    """Check that a value is a condition."""
    if isinstance(value, bool):
        return value
    if isinstance(value, Proxy) and value.node.kind in ("flag", "mask"):
        return value
    if isinstance(value, Number):
        return value != 0.0
    raise RuleError(
        "`&`, `|`, `^`, `~` or torch.where on something that is not a condition: compare it, as in"
        " `x > 0`"
    )


def apply(op: str, *values: Any) -> Proxy:
    """Return an operation on proxies and constants."""
    trace = trace_of(*values)
    if op in ("&&", "||", "!"):
        values = tuple(map(truth, values))
        nodes = [_condition(trace, value) for value in values]
    else:
        nodes = [as_number(trace, node_of(trace, value)) for value in values]
    return wrap(trace, trace.graph.apply(op, *nodes))


def _condition(trace: Tracing, value: Any) -> Node:
    if isinstance(value, bool):
        zero = trace.graph.constant(0.0)
        return trace.graph.node("flag", "==" if value else "!=", zero, zero)
    return node_of(trace, value)


def where(condition: Any, chosen: Any, other: Any) -> Proxy:
    """Return one of two values."""
    if isinstance(condition, bool):
        trace = trace_of(chosen, other)
        return wrap(trace, node_of(trace, chosen if condition else other))
    trace = trace_of(condition, chosen, other)
    test = _condition(trace, truth(condition))
    yes, no = (as_number(trace, node_of(trace, value)) for value in (chosen, other))
    return wrap(trace, trace.graph.apply("where", test, yes, no))
