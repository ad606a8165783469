"""Writes a traced rule as the programs that the compiled module interprets (csrc/engine/program.h).

The programs compute what the C++ text does that emitter.py writes: the same operations on the same
values, hence the same bits. Cases and constants have the same numbers in both.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from .emitter import DOMAINS, Emitter
from .expressions import complement_of_power
from .graph import Case, Node, RuleError
from .tracer import Trace

# The compiled module's kMaxTileBuffers, and a part of its kMaxTileLocations.
_MAX_BUFFERS = 256
_MAX_LITERALS = 512
_MAX_REGISTERS = 1 << 16
_ZERO = (0.0).hex()


class Program(NamedTuple):
    """A rule as the compiled module takes it (``TracedRule`` in csrc/bindings/traced_rule.h)."""

    name: str
    states: list[str]
    hyperparameters: list[tuple[str, str, str, int]]
    scalar_states: list[tuple[str, float]]
    lowest_step: int
    may_keep_weight: bool
    num_constants: int
    step_constants: list[float]
    blocks: list[Any]
    literals: list[float]
    cases: list[Any]


def assemble(trace: Trace, emitter: Emitter) -> Program:
    """Return a rule's programs.

    Raises:
        RuleError: The rule has too many values.
    """
    signature = trace.signature
    step = _StepAssembler(trace, emitter)
    literals = _literals(trace.cases)
    first_literal = 1 + len(signature.states) + emitter.num_constants
    # Of the cases with the same program, the first one.
    cases: dict[int, Any] = {}
    for case, (which, constants) in zip(trace.cases, emitter.choices, strict=True):
        if which not in cases:
            tiles = _TileAssembler(case, signature.states, constants, literals, first_literal)
            cases[which] = (tiles.instructions, tiles.update, tiles.num_buffers)
    most = max(num_buffers for _, _, num_buffers in cases.values())
    if most > _MAX_BUFFERS or len(literals) > _MAX_LITERALS or step.num_registers > _MAX_REGISTERS:
        raise RuleError(f"rule {signature.name}: its formula has too many values: split the rule")
    return Program(
        name=signature.name,
        states=list(signature.states),
        hyperparameters=[
            (h.name, h.kind, DOMAINS.get(h.domain, ""), h.length) for h in signature.hyperparameters
        ],
        scalar_states=list(signature.scalar_states.items()),
        lowest_step=int(signature.counts_from_1),
        may_keep_weight=trace.may_keep_weight,
        num_constants=emitter.num_constants,
        step_constants=step.constants,
        blocks=step.blocks,
        literals=literals,
        cases=[cases[which] for which in sorted(cases)],
    )


# ---- the step's part -----------------------------------------------------------------------------


class _StepAssembler:
    """Writes what is computed once per step, as blocks of instructions.

    Attributes:
        constants: The first values of registers, after the step, the hyperparameters' numbers and
            the scalar states.
        blocks: The blocks. The first one comes first.
        num_registers: How many registers are used.
    """

    def __init__(self, trace: Trace, emitter: Emitter) -> None:
        self._trace = trace
        self._choices = emitter.choices
        self._sources: dict[tuple[str, int | None], int] = {}
        for h in trace.signature.hyperparameters:
            for i in range(h.length if h.kind != "step" else 0):
                index = i if h.kind == "numbers" else None
                self._sources[h.name, index] = 1 + len(self._sources)
        for name in trace.signature.scalar_states:
            self._sources[name, None] = 1 + len(self._sources)
        results = [node for case in trace.cases for node, _ in case.outcomes]
        results += [node for case in trace.cases for node in case.scalars]
        results += [node for _, constants in emitter.choices for node in constants]
        values = {node: node.constant() for node in _all_nodes(results)}
        known = {node: value for node, value in values.items() if value is not None}
        self.constants = list(known.values())
        first = 1 + len(self._sources)
        self._constants = {node: first + i for i, node in enumerate(known)}
        self._next = self.num_registers = first + len(known)
        self.blocks: list[Any] = []
        self._add_block(range(len(trace.cases)), 0, {})

    def _add_block(self, chosen: Sequence[int], depth: int, known: dict[Node, int]) -> int:
        """Add the block that chooses between some of the trace's cases; return its index."""
        first = self._next
        index = self._add_block_after(chosen, depth, known)
        self._next = first  # for the other branch
        return index

    def _add_block_after(self, chosen: Sequence[int], depth: int, known: dict[Node, int]) -> int:
        index = len(self.blocks)
        self.blocks.append(None)
        instructions: list[Any] = []
        known = dict(known)
        cases = [self._trace.cases[i] for i in chosen]
        if len(cases) == 1 and depth == len(cases[0].outcomes):
            which, constants = self._choices[chosen[0]]
            registers = [self._register(node, known, instructions) for node in constants]
            keeps = cases[0].update is None
            scalars = [self._register(node, known, instructions) for node in cases[0].scalars]
            self.blocks[index] = (instructions, -1, -1, -1, which, registers, keeps, scalars)
            return index
        condition = self._register(cases[0].outcomes[depth][0], known, instructions)
        targets = [
            self._add_block(
                [i for i in chosen if self._trace.cases[i].outcomes[depth][1] is outcome],
                depth + 1,
                known,
            )
            for outcome in (True, False)
        ]
        self.blocks[index] = (instructions, condition, *targets, -1, [], False, [])
        return index

    def _register(self, node: Node, known: dict[Node, int], instructions: list[Any]) -> int:
        """Return the register of a value; append the instructions that compute it."""
        if node.op == "step":
            return 0
        if node.op == "constant":
            return self._constants[node]
        if node.op == "hyperparameter":
            assert isinstance(node.leaf, tuple)
            return self._sources[node.leaf]
        if node.op == "scalar state":
            return self._sources[str(node.leaf), None]
        if node.op == "as_number":  # flags are numbers
            return self._register(node.operands[0], known, instructions)
        found = known.get(node)
        if found is not None:
            return found
        op = node.op
        if op == "is None":  # NaN stands for None
            operands = [self._sources[str(node.leaf), None]] * 2
            op = "!="
        else:
            complement = complement_of_power(node)
            if complement is not None:
                op = "one_minus_power"
            operands = [
                self._register(operand, known, instructions)
                for operand in complement or node.operands
            ]
        to = known[node] = self._next
        self._next += 1
        self.num_registers = max(self.num_registers, self._next)
        instructions.append((op, to, *_padded(operands)))
        return to


def _padded(operands: Sequence[int]) -> tuple[int, int, int]:
    a, b, c = [*operands, 0, 0][:3]
    return a, b, c


def _all_nodes(results: Iterable[Node]) -> list[Node]:
    """Return values and all that they are computed from, in an order that is always the same."""
    found: dict[Node, None] = {}
    pending = list(results)
    while pending:
        node = pending.pop()
        if node not in found:
            found[node] = None
            pending += node.operands
    return list(found)


# ---- the elements' part --------------------------------------------------------------------------


def _literal(node: Node) -> float | None:
    """Return a constant that the elements' code contains; others are among the step's."""
    value = node.constant()
    return value if value is not None and math.isfinite(value) else None


def _literals(cases: Iterable[Case]) -> list[float]:
    """Return the literals of all cases, and 0."""
    found = {_ZERO: 0.0}
    for node in _all_nodes(node for case in cases for node in case.results):
        value = _literal(node)
        if value is not None:
            found[value.hex()] = value
    return list(found.values())


class _TileAssembler:
    """Writes what is computed for each element in a case, as instructions on tiles.

    A location is a number: the gradient is 0, then come the states, the step's constants, literals,
    and buffers.

    Attributes:
        instructions: The instructions.
        update: The update's location.
        num_buffers: How many buffers are used.
    """

    def __init__(
        self,
        case: Case,
        states: Sequence[str],
        constants: Sequence[Node],
        literals: Sequence[float],
        first_literal: int,
    ) -> None:
        self._states = {state: 1 + i for i, state in enumerate(states)}
        first_constant = 1 + len(states)
        self._constants = {node: first_constant + i for i, node in enumerate(constants)}
        self._literals = {value.hex(): first_literal + i for i, value in enumerate(literals)}
        self._scalars = range(first_constant, first_literal + len(literals))
        self._free: list[int] = []
        self._first_buffer = first_literal + len(literals)
        self.num_buffers = 0
        self.instructions: list[Any] = []
        self._write(case)

    def _write(self, case: Case) -> None:
        written = [
            (1 + i, _computed(node))
            for i, (name, node) in enumerate(zip(self._states, case.states, strict=True))
            if not (node.op == "input" and node.leaf == name)
        ]
        update = None if case.update is None else _computed(case.update)
        results = [node for _, node in written] + ([] if update is None else [update])
        # Where each value is; those of states that are about to be written are saved first.
        self._places: dict[Node, int] = {}
        targets = {target for target, _ in written}
        for node in results:
            if node.op == "input" and self._states.get(str(node.leaf)) in targets:
                self._save(node)
        order = _operations(results, self._places)
        last_use = {id(o): t for t, node in enumerate(order) for o in map(_computed, node.operands)}
        last_read = {
            self._states[str(o.leaf)]: t
            for t, node in enumerate(order)
            for o in map(_computed, node.operands)
            if o.op == "input" and str(o.leaf) in self._states and o not in self._places
        }
        kept = {id(node) for node in results}
        direct = {id(node): target for target, node in reversed(written) if node.op != "input"}
        for t, node in enumerate(order):
            operands = [self._place(operand) for operand in node.operands]
            for operand in {id(o): o for o in map(_computed, node.operands)}.values():
                place = self._places.get(operand)
                if last_use[id(operand)] == t and id(operand) not in kept and place is not None:
                    self._release(place)
            target = direct.get(id(node))
            if target is None or last_read.get(target, -1) > t:
                target = self._buffer()
            self._places[node] = target
            self._append(_op_of(node), target, operands)
        for target, node in written:
            if self._place(node) != target:
                self._append("copy", target, [self._place(node)])
        place = self._literals[_ZERO] if update is None else self._place(update)
        if place in self._scalars:
            scalar, place = place, self._buffer()
            self._append("copy", place, [scalar])
        self.update = place

    def _save(self, node: Node) -> None:
        if node not in self._places:
            place = self._buffer()
            self._append("copy", place, [self._place(node)])
            self._places[node] = place

    def _place(self, node: Node) -> int:
        """Return the location of a value that has been computed."""
        node = _computed(node)
        found = self._places.get(node)
        if found is not None:
            return found
        if node.op == "input":
            return self._states.get(str(node.leaf), 0)
        value = _literal(node)
        return self._constants[node] if value is None else self._literals[value.hex()]

    def _buffer(self) -> int:
        if self._free:
            return self._free.pop()
        self.num_buffers += 1
        return self._first_buffer + self.num_buffers - 1

    def _release(self, place: int) -> None:
        if place >= self._first_buffer:
            self._free.append(place)

    def _append(self, op: str, target: int, operands: Sequence[int]) -> None:
        form = sum(1 << i for i, place in enumerate(operands) if place in self._scalars)
        self.instructions.append((op, form, target, *_padded(operands)))


def _computed(node: Node) -> Node:
    """Return the value that a node only names: conditions are 1 or 0, and scalars fill tiles."""
    while node.is_per_element and node.op in ("as_number", "fill"):
        node = node.operands[0]
    return node


def _operations(results: Iterable[Node], known: Iterable[Node]) -> list[Node]:
    """Return the operations that compute results, each after its operands."""
    order: list[Node] = []
    seen = {id(node) for node in known}

    def visit(node: Node) -> None:
        node = _computed(node)
        if id(node) in seen or not node.is_per_element or node.op == "input":
            return
        seen.add(id(node))
        for operand in node.operands:
            visit(operand)
        order.append(node)

    for node in results:
        visit(node)
    return order


def _op_of(node: Node) -> str:
    """Return an operation's name. There is another one for a bound that is a number of the step."""
    if node.op in ("max", "min") and not node.operands[1].is_per_element:
        return "at_least" if node.op == "max" else "at_most"
    return node.op
