"""What a traced rule promises: each operation rounded once, in the order written, in NumPy.

This evaluates the graph of a trace, not the C++ that is written from it.
"""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emerging_optimizers._user_rules.graph import Case, Node
from emerging_optimizers._user_rules.tracer import Trace

Array = NDArray[Any]

_INFIX: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}


def _one_minus_power(beta: float, step: float) -> float:
    """1 - beta^step, as csrc/rules/schedules.h computes it."""
    result, square = 0.0, 1.0 - beta
    t = int(step)
    while t:
        if t & 1:
            result += (1.0 - result) * square
        square += (1.0 - square) * square
        t >>= 1
    return result


class _Evaluation:
    def __init__(self, dtype: Any, tensors: Mapping[str, Array], values: Mapping[str, Any]) -> None:
        self.dtype = dtype
        self.tensors = tensors
        self.values = values
        self.known: dict[int, Any] = {}

    def of(self, node: Node) -> Any:
        if id(node) not in self.known:
            compute = self._element if node.is_per_element else self._number
            self.known[id(node)] = compute(node)
        return self.known[id(node)]

    def _number(self, node: Node) -> Any:
        if node.op == "constant":
            return node.leaf
        if node.op == "step":
            return float(self.values["step"])
        if node.op == "scalar state":
            return float(self.values[str(node.leaf)])
        if node.op == "is None":
            return self.values[str(node.leaf)] is None
        if node.op == "hyperparameter":
            assert isinstance(node.leaf, tuple)
            name, index = node.leaf
            value = self.values[name] if index is None else self.values[name][index]
            return value if isinstance(value, bool) else float(value)
        if node.op == "-" and node.operands[1].op == "pow" and node.operands[0].is_constant(1.0):
            beta, count = node.operands[1].operands
            is_sum = count.op == "+" and "step" in (o.op for o in count.operands)
            if count.op == "step" or is_sum:
                return _one_minus_power(self.of(beta), self.of(count))
        operands = [self.of(operand) for operand in node.operands]
        if node.op in _INFIX:
            return _INFIX[node.op](*operands)
        special: dict[str, Callable[..., Any]] = {
            "neg": operator.neg,
            "abs": abs,
            "min": min,
            "max": max,
            "!": operator.not_,
            "&&": lambda a, b: a and b,
            "||": lambda a, b: a or b,
            "as_number": float,
            "where": lambda c, a, b: a if c else b,
            "floor_divide": operator.floordiv,
            "floor_modulo": operator.mod,
            "nearbyint": round,
        }
        return float(special.get(node.op, getattr(math, node.op, None))(*operands))  # type: ignore[misc]

    def _element(self, node: Node) -> Array:
        if node.op == "input":
            return self.tensors[str(node.leaf)]
        operands = [self._rounded(operand) for operand in node.operands]
        if node.op in ("max", "min") and not node.operands[1].is_per_element:
            # A bound: NaN stays, and of equal zeros the first.
            x, bound = operands
            return np.where(bound > x if node.op == "max" else bound < x, bound, x)
        one, zero = self.dtype(1), self.dtype(0)
        table: dict[str, Callable[..., Any]] = {
            "neg": np.negative,
            "abs": np.abs,
            "sqrt": np.sqrt,
            "rsqrt": lambda x: one / np.sqrt(x),
            "sign": lambda x: np.where(x > 0, one, np.where(x < 0, -one, zero)),
            # The sign of a NaN counts as positive.
            "copysign": lambda a, b: np.copysign(a, np.where(np.isnan(b), one, b)),
            # NaN if either is NaN; of equal zeros, the second.
            "max": lambda a, b: np.where(np.isnan(a), a, np.where(a > b, a, b)),
            "min": lambda a, b: np.where(np.isnan(a), a, np.where(a < b, a, b)),
            "where": np.where,
            "!": np.logical_not,
            "&&": np.logical_and,
            "||": np.logical_or,
            "as_number": lambda mask: np.where(mask, one, zero),
            "fill": lambda x: x,
        }
        with np.errstate(all="ignore"):
            function = _INFIX.get(node.op) or table[node.op]
            result = np.asarray(function(*operands))
        assert result.dtype in (self.dtype, np.bool_), node.op
        return result

    def _rounded(self, node: Node) -> Any:
        """A per-step number as elements see it: rounded to their type."""
        value = self.of(node)
        if node.is_per_element:
            return value
        return np.bool_(value) if node.kind == "flag" else self.dtype(value)


def evaluate(
    trace: Trace, grad: Array, states: Sequence[Array], values: Mapping[str, Any]
) -> tuple[Array | None, list[Array]]:
    """Return the update, None where there is none, and the new states."""
    update, new, _ = evaluate_all(trace, grad, states, values)
    return update, new


def evaluate_all(
    trace: Trace, grad: Array, states: Sequence[Array], values: Mapping[str, Any]
) -> tuple[Array | None, list[Array], dict[str, float]]:
    """Return the scalar states' new values, too, in float32; `values` has those before."""
    signature = trace.signature
    tensors = dict(zip((signature.grad, *signature.states), (grad, *states), strict=True))
    evaluation = _Evaluation(grad.dtype.type, tensors, values)

    def is_case(case: Case) -> bool:
        return all(bool(evaluation.of(node)) is outcome for node, outcome in case.outcomes)

    case = next(case for case in trace.cases if is_case(case))
    update, *new = [
        None if node is None else np.broadcast_to(evaluation.of(node), grad.shape)
        for node in (case.update, *case.states)
    ]
    scalars = {
        name: float(np.float32(evaluation.of(node)))
        for name, node in zip(signature.scalar_states, case.scalars, strict=True)
    }
    return update, [state for state in new if state is not None], scalars
