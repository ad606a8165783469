"""What a rule computes with while it is traced: objects that record the operations on them.

calls.py gives them Python's operators, and torch's functions and methods.
"""

import builtins
import sys
from numbers import Real
from typing import Any, NoReturn, Protocol

import torch

from .._hyperparameters import is_flag
from .graph import Graph, Node, RuleError
from .handlers import check_no_handler
from .refusals import ElementRefusals, NumberRefusals, refusal


class Tracing(Protocol):
    """What proxies need of a trace."""

    graph: Graph

    def decide(self, condition: Node) -> bool:
        """Return the outcome of a condition in this run of the rule."""


class _Dtype:
    """The arithmetic type, which is known only where the rule runs."""

    is_floating_point = True
    is_complex = False

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return "the arithmetic dtype"

    def __eq__(self, other: object) -> bool:
        raise RuleError(
            "a dtype in a condition: a rule computes in float32, and in float64 where an operand is"
        )

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise RuleError(f".{name} of a dtype: a rule is the same for all dtypes")


class _Device:
    """The device, which is known only where the rule runs."""

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return "the device"

    def __eq__(self, other: object) -> bool:
        raise RuleError("a device in a condition: a rule is the same on all devices")

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise RuleError(f".{name} of a device: a rule is the same on all devices")


# Those that tell proxies from tensors, and those of Python that call a function by a class.
_LIBRARIES = ("emerging_optimizers", "torch")
_DISPATCHERS = {"__main__", "functools"}

DTYPE = _Dtype()
DEVICE = _Device()


class _Text(str):
    """What is printed for a value. In a rule, it has no operators: it is not the value's text."""

    __slots__ = ()


def _operator_of_text(name: str) -> Any:
    plain = getattr(str, name)

    def operator(self: str, *operands: Any) -> Any:
        if sys._getframe(1).f_builtins is vars(builtins):  # not a copy of a user's function
            return plain(self, *operands)
        raise RuleError(
            f"the text of {str.__str__(self)}, which has no value while the rule is traced: compare"
            " the value itself"
        )

    return operator


for _name in ["eq", "ne", "lt", "le", "gt", "ge", "hash", "len", "contains", "getitem", "iter"]:
    setattr(_Text, f"__{_name}__", _operator_of_text(f"__{_name}__"))


class Proxy:
    """A value."""

    __slots__ = ("node", "trace")
    __array_ufunc__ = None  # numpy's numbers leave operators to this class

    def __init__(self, trace: Tracing, node: Node) -> None:
        self.trace = trace
        self.node = node

    __hash__ = object.__hash__

    def __str__(self) -> str:
        return _Text(repr(self))

    def __format__(self, specification: str) -> str:
        return str(self)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        frame = sys._getframe(1)
        while frame.f_globals.get("__name__") == "abc" and frame.f_back is not None:
            frame = frame.f_back
        caller = str(frame.f_globals.get("__name__")).partition(".")[0]
        is_of_library = caller in _LIBRARIES or caller in sys.stdlib_module_names - _DISPATCHERS
        return type(self) if is_of_library else self._shown_class()

    def _shown_class(self) -> type:
        """Return the class that the rule sees, in `match` and other tests without `isinstance`."""
        raise RuleError(f"the class of {self!r}: use isinstance, or a hyperparameter")


class Number(NumberRefusals, Proxy):
    """A hyperparameter, the step, or what is computed from them: float64, once per step."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "a per-step number"

    def __hash__(self) -> NoReturn:
        raise RuleError(
            "a hyperparameter or the step has no value while the rule is traced: it cannot be in a"
            " set or a key; use `if`, or `in` with a tuple"
        )

    def __bool__(self) -> bool:
        condition = self.node if self.node.kind == "flag" else apply("!=", self, 0.0).node
        return self.trace.decide(condition)

    def __float__(self) -> float:
        raise RuleError(
            "a hyperparameter or the step has no value while the rule is traced: use operators and"
            " functions of math, in functions of your own, not in other libraries"
        )

    def __index__(self) -> int:
        if self.node.kind == "flag":
            return int(bool(self))
        raise RuleError(
            "a hyperparameter or the step has no value while the rule is traced: it cannot be"
            " an index or the length of a loop; use `if`, and loop over a constant range that"
            " `break` ends"
        )

    __int__ = __float__

    def __round__(self, digits: Any = None) -> "Proxy":
        if digits is not None:
            raise RuleError(
                "round() of a per-step number to digits: scale it, as in round(100 * x) / 100"
            )
        return apply("nearbyint", self)

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

    def __divmod__(self, other: Any) -> tuple["Proxy", "Proxy"]:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> tuple["Proxy", "Proxy"]:
        return other // self, other % self


class Element(ElementRefusals, Proxy):
    """An element of a tensor. In-place operations give the object another value.

    Attributes:
        shadow: What PyTorch computes for it (shadows.py).
    """

    __slots__ = ("shadow",)

    def __init__(self, trace: Tracing, node: Node, shadow: torch.Tensor | None = None) -> None:
        super().__init__(trace, node)
        self.shadow = shadow

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

    def _shown_class(self) -> type:
        return torch.Tensor

    @property
    def dtype(self) -> _Dtype:
        return DTYPE

    @property
    def device(self) -> _Device:
        return DEVICE

    @property
    def data(self) -> "Element":
        return self

    def __getitem__(self, index: Any) -> Any:
        raise refusal("indexing a tensor", "__getitem__")

    def __setitem__(self, index: Any, value: Any) -> None:
        raise refusal("indexing a tensor (use torch.where)", "__setitem__")

    def __len__(self) -> int:
        raise refusal("len() of a tensor", "__len__")

    def check_is_float(self) -> None:
        """Raise for a tensor that cannot hold every number."""
        if self.shadow is not None and not self.shadow.is_floating_point():
            raise RuleError(
                "a tensor of integers or of conditions cannot be filled or modified in place: make"
                " it of floats, as torch.where(condition, 1.0, 0.0)"
            )

    def assign(self, value: Any) -> "Element":
        """Take another value in place."""
        if self.node.kind == "mask":
            self.node = node_of(self.trace, truth(value))
            return self
        self.check_is_float()
        self.node = as_element(self.trace, value)
        return self


# ---- values and operations on them ---------------------------------------------------------------


def trace_of(*values: Any) -> Tracing:
    for value in values:
        if isinstance(value, Proxy):
            return value.trace
    raise RuleError("no argument is a tensor or a hyperparameter of the rule: pass them directly")


def node_of(trace: Tracing, value: Any) -> Node:
    """Return the node of a proxy or a constant."""
    if isinstance(value, Proxy):
        return value.node
    if isinstance(value, Real) or is_flag(value):
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
    raise RuleError(
        f"a rule computes with numbers and its arguments, not with {_type(value)}: use numbers,"
        " such as float(x) or x[i]"
    )


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
    raise RuleError(
        "`&`, `|`, `^`, `~` or torch.where on something that is not a condition: compare it, as in"
        " `x > 0`"
    )


def is_condition(value: Any) -> bool:
    return isinstance(value, bool) or (
        isinstance(value, Proxy) and value.node.kind in ("flag", "mask")
    )


# Of conditions of elements. The operation on numbers would have the value 2, or another type.
_OF_CONDITIONS = {"+": "||", "max": "||", "*": "&&", "min": "&&"}


_DIVISIONS = ("/", "floor_divide", "floor_modulo")


def apply(op: str, *values: Any) -> Proxy:
    """Return an operation on proxies and constants."""
    trace = trace_of(*values)
    if op in _OF_CONDITIONS and all(map(is_condition, values)):
        op = _OF_CONDITIONS[op] if any(isinstance(v, Element) for v in values) else op
    if op in ("&&", "||", "!"):
        nodes = [_condition(trace, truth(value)) for value in values]
    else:
        nodes = [as_number(trace, node_of(trace, value)) for value in values]
    is_of_numbers = not any(node.is_per_element for node in nodes)
    if op in _DIVISIONS and is_of_numbers and nodes[1].constant() in (None, 0.0):
        check_no_handler(ZeroDivisionError)
    return wrap(trace, trace.graph.apply(op, *nodes))


def _condition(trace: Tracing, value: Any) -> Node:
    if isinstance(value, bool):
        zero = trace.graph.constant(0.0)
        return trace.graph.node("flag", "==" if value else "!=", zero, zero)
    return node_of(trace, value)


def where(condition: Any, chosen: Any, other: Any) -> Proxy:
    """Return one of two values."""
    trace = trace_of(condition, chosen, other)
    if is_condition(chosen) and is_condition(other):
        no = apply("&&", apply("!", condition), other)
        return apply("||", apply("&&", condition, chosen), no)
    test = _condition(trace, truth(condition))
    yes, no_node = (as_number(trace, node_of(trace, value)) for value in (chosen, other))
    return wrap(trace, trace.graph.apply("where", test, yes, no_node))
