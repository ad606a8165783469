"""C++ expressions and statements for the values of a rule."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping

from .graph import COMPARISONS, Case, Node

_INFIX = ("+", "-", "*", "/", "&&", "||", *COMPARISONS)
_FORMS = {
    "neg": "(-{0})",
    "!": "(!{0})",
    "where": "({0} ? {1} : {2})",
}
# Of a step's numbers. The other operations are functions of libm: `::name`.
_OF_NUMBERS = {
    "abs": "::fabs({0})",
    "min": "({1} < {0} ? {1} : {0})",  # as Python's
    "max": "({1} > {0} ? {1} : {0})",
    "as_number": "({0} ? 1.0 : 0.0)",
    "floor_divide": "emopt::floor_divide({0}, {1})",
    "floor_modulo": "emopt::floor_modulo({0}, {1})",
}
_OF_ELEMENTS = {
    "fill": "{0}",
    "sqrt": "emopt::square_root({0})",
    "rsqrt": "emopt::reciprocal_root({0})",
    "abs": "emopt::absolute({0})",
    "sign": "emopt::sign({0})",
    "copysign": "emopt::copy_sign({0}, {1})",
    "max": "emopt::maximum({0}, {1})",
    "min": "emopt::minimum({0}, {1})",
    "as_number": "emopt::as_number<Real>({0})",
}
# The same with a bound that is a number of the step, second; much faster.
_BOUNDS = {"max": "emopt::at_least({0}, {1})", "min": "emopt::at_most({0}, {1})"}
# The longest expression that is not given a name.
_WIDTH = 60


def count_uses(results: Iterable[Node], is_per_element: bool) -> Counter[Node]:
    """Count how many values use each value; each of the results, too, is a use.

    Args:
        results: The values that are computed for.
        is_per_element: Count in the code for an element, where per-step values are constants.
    """
    uses = Counter(results)
    pending = list(uses)
    seen = set(uses)
    while pending:
        node = pending.pop()
        if is_per_element and not node.is_per_element:
            continue
        for operand in node.operands:
            uses[operand] += 1
            if operand not in seen:
                seen.add(operand)
                pending.append(operand)
    return uses


class Code:
    """Statements that compute values. Values that are used once and are short have no name.

    Args:
        names: The C++ names of tensors and hyperparameters.
        uses: How often each value is used.
        known: The text of values that have been computed.
        indent: The statements' indentation.
        is_per_element: Whether this is the code for an element, where per-step values are
            constants; else it is the code for a step.
    """

    def __init__(
        self,
        names: Mapping[str, str],
        uses: Mapping[Node, int],
        known: Mapping[Node, str],
        indent: str,
        is_per_element: bool,
    ) -> None:
        self.names = names
        self.known = dict(known)
        self.indent = indent
        self.is_per_element = is_per_element
        self.lines: list[str] = []
        # The per-step values that the code for an element uses.
        self.constants: list[Node] = []
        self._uses = uses

    def of(self, node: Node) -> str:
        """Return a value's text: a name, a literal or an expression with its own parentheses."""
        found = self.known.get(node)
        if found is not None:
            return found
        if self.is_per_element and not node.is_per_element:
            return self._constant(node)
        if not node.operands:
            return self._leaf(node)
        text = self._expression(node)
        return self._name(node, text) if self._uses[node] > 1 else text

    def _name(self, node: Node, text: str) -> str:
        prefix, kind = ("e", "Real") if self.is_per_element else ("s", "double")
        name = f"{prefix}{len(self.known)}"
        while name in self.names.values():
            name += "_"
        kind = "bool" if node.kind in ("flag", "mask") else kind
        self.lines.append(f"{self.indent}const {kind} {name} = {bare(text)};")
        self.known[node] = name
        return name

    def _constant(self, node: Node) -> str:
        """Return a per-step value as the elements see it."""
        value = node.constant()
        if value is not None and math.isfinite(value):
            return f"Real({literal(value)})"
        if node not in self.constants:
            self.constants.append(node)
        text = f"k[{self.constants.index(node)}]"
        return f"({text} != Real(0))" if node.kind == "flag" else text

    def _leaf(self, node: Node) -> str:
        value = node.constant()
        if value is not None:
            return literal(value)
        if node.op == "step":
            return "step"
        if node.op == "input":
            return self.names[str(node.leaf)]
        if node.op == "scalar state":
            return f"rule.{self.names[str(node.leaf)]}"
        if node.op == "is None":
            name = f"rule.{self.names[str(node.leaf)]}"
            return f"({name} != {name})"  # NaN stands for None
        assert isinstance(node.leaf, tuple)
        name, index = node.leaf
        return f"rule.{self.names[name]}" + ("" if index is None else f"[{index}]")

    def _expression(self, node: Node) -> str:
        operands, form = node.operands, self._form(node)
        complement = None if self.is_per_element else complement_of_power(node)
        if complement is not None:
            operands, form = complement, "emopt::one_minus_power({0}, {1})"
        texts = [self.of(operand) for operand in operands]
        if sum(map(len, texts)) > _WIDTH:
            # Long operands get names.
            texts = [
                self._name(operand, text) if len(text) > _WIDTH // 3 and " " in text else text
                for operand, text in zip(operands, texts, strict=True)
            ]
        if "::" in form or form.startswith("emopt"):
            texts = [bare(text) for text in texts]
        return form.format(*texts)

    def _form(self, node: Node) -> str:
        if node.op in _INFIX:
            return f"({{0}} {node.op} {{1}})"
        table = _FORMS | (_OF_ELEMENTS if self.is_per_element else _OF_NUMBERS)
        if self.is_per_element and node.op in _BOUNDS and not node.operands[1].is_per_element:
            return _BOUNDS[node.op]
        places = ", ".join(f"{{{i}}}" for i in range(len(node.operands)))
        return table.get(node.op, f"::{node.op}({places})")

    def program(self, case: Case, states: tuple[str, ...]) -> str:
        """Return the statements of a case: they compute the states and return the update."""
        texts = [self.of(node) for node in case.states]
        update = "Real(0)" if case.update is None else self.of(case.update)
        own = [self.names[state] for state in states]
        written = [(s, t) for s, t in zip(own, texts, strict=True) if s != t]
        # An expression that reads a state must come before that state is written.
        later = {s for s, _ in written}
        results = [(state, self._before(text, later - {state})) for state, text in written]
        update = self._before(update, later, "update")
        assignments = [f"{self.indent}{s} = {bare(t)};" for s, t in results]
        return "\n".join([*self.lines, *assignments, f"{self.indent}return {bare(update)};"])

    def _before(self, text: str, written: set[str], name: str | None = None) -> str:
        """Return a text that does not depend on states that are written before it is used."""
        if not any(_reads(text, state) for state in written):
            return text
        name = name or f"new_{len(self.lines)}"
        while name in self.names.values():
            name += "_"
        self.lines.append(f"{self.indent}const Real {name} = {bare(text)};")
        return name


def _reads(text: str, name: str) -> bool:
    words = "".join(c if c.isalnum() or c == "_" else " " for c in text)
    return name in words.split()


def complement_of_power(node: Node) -> tuple[Node, Node] | None:
    """Return beta and t of ``1 - beta**t``, if t counts steps and is not negative."""
    if node.op != "-" or not node.operands[0].is_constant(1.0) or node.operands[1].op != "pow":
        return None
    beta, count = node.operands[1].operands
    if count.op == "step":
        return beta, count
    offsets = [o.constant() for o in count.operands]
    is_sum = count.op == "+" and "step" in (o.op for o in count.operands)
    if is_sum and any(o is not None and o.is_integer() and o >= 0 for o in offsets):
        return beta, count
    return None


def bare(text: str) -> str:
    """Remove parentheses around the whole text."""
    if not (text.startswith("(") and text.endswith(")")):
        return text
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0 and i + 1 < len(text):
            return text
    return text[1:-1]


def literal(value: float) -> str:
    """Return a number in C++."""
    if math.isnan(value):
        return "NAN"
    if math.isinf(value):
        return "INFINITY" if value > 0 else "(-INFINITY)"
    text = repr(value)
    return f"({text})" if text.startswith("-") else text
