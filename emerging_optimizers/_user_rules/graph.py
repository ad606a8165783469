"""What a rule computes, as a graph: values of one step, and values of one element."""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import CodeType, FrameType
from typing import Literal, NamedTuple, TypeAlias

# "number" and "flag" are computed once per step, in float64, from the hyperparameters and the step.
# "element" and "mask" are computed for each element, in the arithmetic type.
Kind: TypeAlias = Literal["number", "flag", "element", "mask"]

COMPARISONS = ("<", "<=", ">", ">=", "==", "!=")
LOGICAL = ("&&", "||", "!")


class RuleError(TypeError):
    """A rule that cannot be compiled. The message names the rule, the line and the operation."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        # The code that runs, from the inside, and its lines: while a rule runs.
        self.places: list[tuple[CodeType, int]] = []
        raised = _RAISED.get()
        if raised is not None:
            raised.append(self)
            frame: FrameType | None = sys._getframe(1)
            while frame is not None and frame.f_code.co_name != RUN:
                self.places.append((frame.f_code, frame.f_lineno))
                frame = frame.f_back


# The name of the method that runs a rule (tracer.py).
RUN = "_trace_case"
# The errors since a run of a rule began; its function, or torch, may have caught them.
_RAISED: ContextVar[list[RuleError] | None] = ContextVar("raised", default=None)


@contextmanager
def no_error_is_lost() -> Iterator[None]:
    """Raise the first `RuleError` that was raised inside, even if it was caught there."""
    raised: list[RuleError] = []
    token = _RAISED.set(raised)
    try:
        yield
    except Exception as error:
        if raised and raised[0] is not error:
            raise raised[0] from error
        raise
    finally:
        _RAISED.reset(token)
    if raised:
        raise raised[0]


class Node:
    """A value: an operation and its operands. `Graph` makes equal ones the same object.

    Attributes:
        kind: What the value is, and when it is computed.
        op: The operation. Those without operands are "constant", "step", "hyperparameter", "is
            None", "scalar state" and "input"; `leaf` says which.
        operands: The operands.
        leaf: The constant, the hyperparameter (and the index in it), or the name of the scalar
            state or of the tensor.
    """

    __slots__ = ("kind", "leaf", "op", "operands")

    def __init__(self, kind: Kind, op: str, operands: tuple["Node", ...], leaf: object) -> None:
        self.kind = kind
        self.op = op
        self.operands = operands
        self.leaf = leaf

    @property
    def is_per_element(self) -> bool:
        return self.kind in ("element", "mask")

    def constant(self) -> float | None:
        """Return the value of a constant; None for everything else."""
        return self.leaf if self.op == "constant" and isinstance(self.leaf, float) else None

    def is_constant(self, value: float) -> bool:
        return self.constant() == value


class Graph:
    """The values of one rule."""

    def __init__(self) -> None:
        self._nodes: dict[tuple[object, ...], Node] = {}

    def node(self, kind: Kind, op: str, *operands: Node, leaf: object = None) -> Node:
        # By its text, which tells 0 from -0, and in which NaN equals itself.
        text = leaf.hex() if isinstance(leaf, float) else leaf
        key = (kind, op, text, *map(id, operands))
        found = self._nodes.get(key)
        if found is None:
            found = self._nodes[key] = Node(kind, op, operands, leaf)
        return found

    def constant(self, value: float) -> Node:
        return self.node("number", "constant", leaf=float(value))

    def apply(self, op: str, *operands: Node) -> Node:
        """Return an operation on values of any kinds."""
        is_per_element = any(operand.is_per_element for operand in operands)
        is_truth = op in COMPARISONS or op in LOGICAL
        if op == "/" and is_per_element and operands[1].kind == "number":
            # A product with the reciprocal, which is taken in float64.
            reciprocal = self.apply("/", self.constant(1.0), operands[1])
            return self.apply("*", operands[0], reciprocal)
        folded = _fold(op, operands)
        if folded is not None:
            return self.constant(folded)
        if is_per_element:
            return self.node("mask" if is_truth else "element", op, *operands)
        return self.node("flag" if is_truth else "number", op, *operands)


def _fold(op: str, operands: tuple[Node, ...]) -> float | None:
    """Return the result of arithmetic on constants."""
    values = [operand.constant() for operand in operands]
    if len(values) == 1 and op == "neg" and values[0] is not None:
        return -values[0]
    if len(values) != 2 or values[0] is None or values[1] is None:
        return None
    left, right = values[0], values[1]
    if op == "+":
        return left + right
    if op == "-":
        return left - right
    if op == "*":
        return left * right
    if op == "/":
        if right == 0.0:
            sign = math.copysign(1.0, left) * math.copysign(1.0, right)
            return math.nan if left == 0.0 or math.isnan(left) else sign * math.inf
        return left / right
    return None


class Case(NamedTuple):
    """What a rule computes if its conditions have some outcomes.

    Attributes:
        outcomes: The conditions, in the order in which the rule asks for them, and their outcomes.
        update: The update; None if the step leaves the weight alone.
        states: The new values of the states.
        scalars: The new values of the scalar states.
    """

    outcomes: tuple[tuple[Node, bool], ...]
    update: Node | None
    states: tuple[Node, ...]
    scalars: tuple[Node, ...]

    @property
    def results(self) -> tuple[Node, ...]:
        """What is computed for each element."""
        return self.states if self.update is None else (self.update, *self.states)


def inputs_of(results: tuple[Node, ...]) -> set[str]:
    """Return the names of the tensors that results depend on."""
    names: set[str] = set()
    seen: set[int] = set()
    pending = list(results)
    while pending:
        node = pending.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if node.op == "input":
            names.add(str(node.leaf))
        pending += node.operands
    return names
