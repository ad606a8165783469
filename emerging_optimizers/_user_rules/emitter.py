"""Writes a traced rule as C++: a struct like those of the package's rules (csrc/rules/rule.h)."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping

from .._hyperparameters import Beta, Hyperparameter, NonNegative
from .graph import COMPARISONS, Case, Node, RuleError
from .tracer import MAX_CASES, Trace

_DOMAINS = {Beta: "kBeta", NonNegative: "kNonNegative", float: "kAny", int: "kInteger"}
_INFIX = ("+", "-", "*", "/", "&&", "||", *COMPARISONS)
# In both stages. The rest are functions: `::name` of a step's numbers.
_FORMS = {
    "neg": "-{0}",
    "!": "!{0}",
    "where": "({0} ? {1} : {2})",
    "is None": "({0} != {0})",
}
_OF_NUMBERS = {
    "abs": "::fabs({0})",
    "min": "({1} < {0} ? {1} : {0})",  # as Python's
    "max": "({1} > {0} ? {1} : {0})",
    "as_number": "({0} ? 1.0 : 0.0)",
    "floor_divide": "emopt::floor_divide({0}, {1})",
    "floor_modulo": "emopt::floor_modulo({0}, {1})",
    "one_minus_power": "emopt::one_minus_power({0}, {1})",
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
_WIDTH = 72
# Names that the struct has for itself, and C++'s that Python allows.
_TAKEN = frozenset(
    """k which keeps_weight rule step Real Step kCase kName kStates kLowestStep kNumCases compute
    hyperparameters hyperparameter optional_hyperparameter emopt
    alignas alignof asm auto bitand bitor bool case catch char compl concept const consteval
    constexpr constinit const_cast co_await co_return co_yield decltype default delete do double
    dynamic_cast enum explicit export extern false float friend goto inline int long mutable
    namespace new noexcept nullptr operator private protected public register reinterpret_cast
    requires short signed sizeof static static_assert static_cast struct switch template this throw
    true typedef typeid typename union unsigned using virtual void volatile wchar_t xor and_eq
    or_eq xor_eq not_eq char8_t char16_t char32_t thread_local linux unix""".split()
)
_MAX_CONSTANTS = 60


def struct_name(rule: str) -> str:
    """Return the struct's name: ``AdaBelief`` would be ``Adabelief``."""
    return "".join(word[:1].upper() + word[1:] for word in rule.split("_")) + "Rule"


def emit(trace: Trace) -> str:
    """Return the C++ text of a rule.

    Raises:
        RuleError: It has too many cases or constants.
    """
    return _Emitter(trace).text()


class _Emitter:
    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.signature = trace.signature
        self.names = {
            name: _escape(name)
            for name in (
                self.signature.grad,
                *self.signature.states,
                *(h.name for h in self.signature.hyperparameters),
            )
        }
        # The text of each case, and its number.
        self.programs: dict[str, int] = {}
        self.num_constants = 0

    def text(self) -> str:
        signature = self.signature
        struct = struct_name(signature.name)
        choice = self._choose(self.trace.cases, 0, {}, " " * 6)  # fills self.programs
        if len(self.programs) > MAX_CASES:
            raise RuleError(
                f"rule {signature.name}: {len(self.programs)} cases, which differ in what they"
                f" compute for an element; at most {MAX_CASES} are compiled: use torch.where, or"
                " numbers that depend on the conditions"
            )
        if self.num_constants > _MAX_CONSTANTS:
            raise RuleError(
                f"rule {signature.name}: {self.num_constants} numbers that elements are computed"
                f" with; at most {_MAX_CONSTANTS} are supported"
            )
        real = [h for h in signature.hyperparameters if h.kind != "step"]
        arguments = ", ".join(["Real grad", *(f"Real& {self.names[s]}" for s in signature.states)])
        passed = ", ".join(["grad", *(self.names[s] for s in signature.states)])
        counts_from_1 = signature.has_step and all(h.name != "correct_bias" for h in real)
        lines = [
            f"// The rule {signature.name}, written from its Python function.",
            '#include "rules/schedules.h"',
            '#include "rules/traced.h"',
            "",
            '#include "engine/rule_unit.h"',
            "",
            "namespace emopt {",
            "",
            f"struct {struct} {{",
            f'  static constexpr const char* kName = "{signature.name}";',
        ]
        if signature.states:
            states = ", ".join(f'"{state}"' for state in signature.states)
            lines.append(f"  static constexpr const char* kStates[] = {{{states}}};")
        if counts_from_1:
            lines.append("  static constexpr int kLowestStep = 1;")
        lines += [
            f"  static constexpr int kNumCases = {len(self.programs)};",
            *(["", *map(self._member, real)] if real else []),
            "",
            "  static constexpr auto hyperparameters() {",
            "    return std::make_tuple("
            + ",\n                           ".join(
                self._description(h, struct) for h in signature.hyperparameters
            )
            + ");",
            "  }",
            "",
            "  template <class Real>",
            "  struct Step {",
            *([f"    Real k[{self.num_constants}] = {{}};"] if self.num_constants else []),
            "    int which = 0;  // the case",
        ]
        if self._may_keep_weight:
            lines.append("    bool keeps_weight = false;  // without an update")
        lines += [
            "",
            f"    EMOPT_FN Step([[maybe_unused]] const {struct}& rule,",
            "                  [[maybe_unused]] double step) {",
            *choice,
            "    }",
            "",
            "    template <int kCase>",
            f"    EMOPT_FN Real compute([[maybe_unused]] {arguments}) const {{",
            *self._cases(),
            "    }",
            "",
            f"    EMOPT_FN Real operator()({arguments}) const {{",
            *(
                f"      if (which == {i}) return compute<{i}>({passed});"
                for i in range(len(self.programs) - 1)
            ),
            f"      return compute<{len(self.programs) - 1}>({passed});",
            "    }",
            "  };",
            "};",
            "",
            "}  // namespace emopt",
            "",
            f"EMOPT_RULE({struct})",
            "",
        ]
        return "\n".join(lines)

    @property
    def _may_keep_weight(self) -> bool:
        return any(case.update is None for case in self.trace.cases)

    def _member(self, h: Hyperparameter) -> str:
        kind = "bool" if h.kind == "flag" else "double"
        length = f"[{h.length}]" if h.kind == "numbers" else ""
        note = "  // NaN: None" if h.kind == "optional" else ""
        return f"  {kind} {self.names[h.name]}{length};{note}"

    def _description(self, h: Hyperparameter, struct: str) -> str:
        if h.kind == "step":
            return "StepArgument{}"
        function = "optional_hyperparameter" if h.kind == "optional" else "hyperparameter"
        domain = "" if h.kind == "flag" else f", Domain::{_DOMAINS[h.domain]}"
        return f'{function}("{h.name}", &{struct}::{self.names[h.name]}{domain})'

    # ---- the constructor of `Step` ---------------------------------------------------------------

    def _choose(
        self, cases: Iterable[Case], depth: int, known: Mapping[Node, str], indent: str
    ) -> list[str]:
        """Return the statements that choose a case and compute its constants."""
        cases = list(cases)
        if len(cases) == 1 and depth == len(cases[0].outcomes):
            return self._constants(cases[0], known, indent)
        condition = cases[0].outcomes[depth][0]
        code = _Code(self.names, known, indent, is_per_element=False)
        code.count([condition])
        text = code.of(condition)
        parts = {
            outcome: self._choose(
                [case for case in cases if case.outcomes[depth][1] is outcome],
                depth + 1,
                code.known,
                indent + "  ",
            )
            for outcome in (True, False)
        }
        head = f"{indent}if ({_bare(text)}) {{"
        return [*code.lines, head, *parts[True], f"{indent}}} else {{", *parts[False], f"{indent}}}"]

    def _constants(self, case: Case, known: Mapping[Node, str], indent: str) -> list[str]:
        program = _Code(self.names, {}, " " * 8, is_per_element=True)
        text = program.program(case, self.signature.states)
        which = self.programs.setdefault(text, len(self.programs))
        self.num_constants = max(self.num_constants, len(program.constants))
        code = _Code(self.names, known, indent, is_per_element=False)
        code.count(program.constants)
        values = [code.of(node) for node in program.constants]
        lines = [
            f"{indent}k[{i}] = static_cast<Real>({_bare(value)});" for i, value in enumerate(values)
        ]
        if which != 0:
            lines.append(f"{indent}which = {which};")
        if case.update is None:
            lines.append(f"{indent}keeps_weight = true;")
        return [*code.lines, *lines]

    # ---- the cases -------------------------------------------------------------------------------

    def _cases(self) -> list[str]:
        lines = []
        for text, which in self.programs.items():
            if which == 0:
                lines.append("      if constexpr (kCase == 0) {")
            elif which + 1 < len(self.programs):
                lines.append(f"      }} else if constexpr (kCase == {which}) {{")
            else:
                lines.append("      } else {")
            lines.append(text)
        return [*lines, "      }"]


class _Code:
    """Statements that compute values. Values that are used once and are short have no name.

    Args:
        names: The C++ names of tensors and hyperparameters.
        known: The text of values that have been computed.
        indent: The statements' indentation.
        is_per_element: Whether this is the code for an element, where per-step values are
            constants; else it is the code for a step.
    """

    def __init__(
        self, names: Mapping[str, str], known: Mapping[Node, str], indent: str, is_per_element: bool
    ) -> None:
        self.names = names
        self.known = dict(known)
        self.indent = indent
        self.is_per_element = is_per_element
        self.lines: list[str] = []
        self.constants: list[Node] = []
        self._uses: Counter[Node] = Counter()

    def count(self, results: Iterable[Node]) -> None:
        """Count how often each value is used."""
        pending = list(results)
        while pending:
            node = pending.pop()
            self._uses[node] += 1
            if self._uses[node] == 1 and not self._is_leaf(node):
                pending += node.operands

    def _is_leaf(self, node: Node) -> bool:
        return (self.is_per_element and not node.is_per_element) or not node.operands

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
        if self._uses[node] > 1 or len(text) > _WIDTH:
            return self._name(node, text)
        self.known[node] = text
        return text

    def _name(self, node: Node, text: str) -> str:
        prefix = "e" if self.is_per_element else "s"
        taken = sum(name.startswith(prefix) and name[1:].isdigit() for name in self.known.values())
        name = f"{prefix}{taken}"
        while name in self.names.values():
            name += "_"
        kind = "bool" if node.kind in ("flag", "mask") else "Real" if prefix == "e" else "double"
        self.lines.append(f"{self.indent}const {kind} {name} = {_bare(text)};")
        self.known[node] = name
        return name

    def _constant(self, node: Node) -> str:
        """Return a per-step value as the elements see it."""
        value = node.constant()
        if value is not None and math.isfinite(value):
            return f"Real({_literal(value)})"
        if node not in self.constants:
            self.constants.append(node)
        text = f"k[{self.constants.index(node)}]"
        return f"({text} != Real(0))" if node.kind == "flag" else text

    def _leaf(self, node: Node) -> str:
        value = node.constant()
        if value is not None:
            return _literal(value)
        if node.op == "step":
            return "step"
        if node.op == "input":
            name = str(node.leaf)
            return self.names[name]
        if node.op == "is None":
            name = f"rule.{self.names[str(node.leaf)]}"
            return f"({name} != {name})"
        assert isinstance(node.leaf, tuple)
        name, index = node.leaf
        return f"rule.{self.names[name]}" + ("" if index is None else f"[{index}]")

    def _expression(self, node: Node) -> str:
        if not self.is_per_element:
            complement = _complement_of_power(node)
            if complement is not None:
                operands = [_bare(self.of(operand)) for operand in complement]
                return f"emopt::one_minus_power({', '.join(operands)})"
        operands = [self.of(operand) for operand in node.operands]
        if node.op in _INFIX:
            return f"({operands[0]} {node.op} {operands[1]})"
        form = _FORMS.get(node.op)
        form = form or (_OF_ELEMENTS if self.is_per_element else _OF_NUMBERS).get(node.op)
        if form is None:
            form = f"::{node.op}({', '.join(f'{{{i}}}' for i in range(len(operands)))})"
        if "::" in form:
            operands = [_bare(operand) for operand in operands]
        if node.op == "neg":
            return f"(-{operands[0]})"
        return form.format(*operands)

    def program(self, case: Case, states: tuple[str, ...]) -> str:
        """Return the statements of a case: they compute the states and return the update."""
        self.count(case.results)
        texts = [self.of(node) for node in case.states]
        update = "Real(0)" if case.update is None else self.of(case.update)
        own = [self.names[state] for state in states]
        written = [(s, t) for s, t in zip(own, texts, strict=True) if s != t]
        # An expression that reads a state must come before that state is written.
        later = {s for s, _ in written}
        results = []
        for state, text in written:
            results.append((state, self._before(text, later - {state} if len(written) > 1 else set())))
        update = self._before(update, later, "update")
        assignments = [f"{self.indent}{s} = {_bare(t)};" for s, t in results]
        return "\n".join([*self.lines, *assignments, f"{self.indent}return {_bare(update)};"])

    def _before(self, text: str, written: set[str], name: str | None = None) -> str:
        """Return a text that does not depend on states that are written before it is used."""
        if not any(_reads(text, state) for state in written):
            return text
        name = name or f"new_{len(self.lines)}"
        while name in self.names.values():
            name += "_"
        self.lines.append(f"{self.indent}const Real {name} = {_bare(text)};")
        return name


def _reads(text: str, name: str) -> bool:
    word = "".join(c if c.isalnum() or c == "_" else " " for c in text)
    return name in word.split()


def _complement_of_power(node: Node) -> tuple[Node, Node] | None:
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


def _bare(text: str) -> str:
    """Remove parentheses around the whole text."""
    if not (text.startswith("(") and text.endswith(")")):
        return text
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0 and i + 1 < len(text):
            return text
    return text[1:-1]


def _literal(value: float) -> str:
    if math.isnan(value):
        return "NAN"
    if math.isinf(value):
        return "INFINITY" if value > 0 else "(-INFINITY)"
    text = repr(value)
    return f"({text})" if value < 0 or text.startswith("-") else text


def _escape(name: str) -> str:
    return f"{name}_" if name in _TAKEN else name
