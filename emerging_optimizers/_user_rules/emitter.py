"""Writes a traced rule as C++: a struct like those of the package's rules (csrc/rules/rule.h)."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from .._codes import E4M3, UE5M3
from .._hyperparameters import Beta, Hyperparameter, NonNegative
from .expressions import Code, bare, count_uses, literal
from .graph import Case, Node, RuleError
from .tracer import MAX_CASES, Trace

DOMAINS = {Beta: "kBeta", NonNegative: "kNonNegative", float: "kAny", int: "kInteger"}
_STATE_CODES = {
    None: "StateCode::kNone",
    E4M3: "StateCode::kSigned",
    UE5M3: "StateCode::kUnsigned",
}
# Names that the struct uses, and reserved words of C++ that are names in Python.
_TAKEN = frozenset(
    re.findall(
        r"\w+",
        """
        k which keeps_weight rule step Real Step kCase kName kStates kLowestStep kNumCases compute
        scalars advance ScalarState kScalarStates StateCode kStateCodes
        hyperparameters hyperparameter optional_hyperparameter emopt alignas alignof asm auto bitand
        bitor bool case catch char compl concept const consteval constexpr constinit const_cast
        co_await co_return co_yield decltype default delete do double dynamic_cast enum explicit
        export extern false float friend goto inline int long mutable namespace new noexcept nullptr
        operator private protected public register reinterpret_cast requires short signed sizeof
        static static_assert static_cast struct switch template this throw true typedef typeid
        typename union unsigned using virtual void volatile wchar_t xor and_eq or_eq xor_eq not_eq
        char8_t char16_t char32_t thread_local linux unix errno assert
        stdin stdout stderr
        """,
    )
)
_MAX_CONSTANTS = 60

# Returns the last statements of a case; those that compute values are added to the code.
_Finish: TypeAlias = Callable[[int, Code], list[str]]


def struct_name(rule: str) -> str:
    """Return the name of a rule's struct: ``cautious_adam`` has ``CautiousAdamRule``."""
    return "".join(word[:1].upper() + word[1:] for word in rule.split("_")) + "Rule"


class Emitter:
    """Writes the C++ text of a rule.

    Attributes:
        choices: For each of the trace's cases, the number of its program, and the constants of the
            elements' code.
        programs: The number of each program, by its text. Cases may have the same one.
        num_constants: How many constants a step has.

    Raises:
        RuleError: It has too many cases or constants.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.signature = trace.signature
        self.names = _names(
            struct_name(self.signature.name),
            [
                self.signature.grad,
                *self.signature.states,
                *(h.name for h in self.signature.hyperparameters),
            ],
        )
        # The members of the struct that hold them.
        scalars = self.signature.scalar_states
        self.names.update({name: f"scalars[{i}]" for i, name in enumerate(scalars)})
        self.programs: dict[str, int] = {}
        self.choices = [self._compile(case) for case in trace.cases]
        self._check_limits()
        conditions = [condition for case in trace.cases for condition, _ in case.outcomes]
        constants = [node for _, nodes in self.choices for node in nodes]
        self.uses = count_uses({*conditions, *constants}, is_per_element=False)

    def _compile(self, case: Case) -> tuple[int, list[Node]]:
        uses = count_uses(case.results, is_per_element=True)
        code = Code(self.names, uses, {}, " " * 8, is_per_element=True)
        text = code.program(case, self.signature.states)
        return self.programs.setdefault(text, len(self.programs)), code.constants

    def _check_limits(self) -> None:
        self.num_constants = max(len(nodes) for _, nodes in self.choices)
        name = self.signature.name
        if len(self.programs) > MAX_CASES:
            raise RuleError(
                f"rule {name}: {len(self.programs)} cases with different formulas; at most"
                f" {MAX_CASES} are supported: use one formula with numbers that depend on the"
                " conditions, as in `x * float(step > 10)`"
            )
        if self.num_constants > _MAX_CONSTANTS:
            raise RuleError(
                f"rule {name}: its formula uses {self.num_constants} per-step numbers; at most"
                f" {_MAX_CONSTANTS} are supported: split the rule"
            )

    def text(self) -> str:
        signature = self.signature
        struct = struct_name(signature.name)
        real = [h for h in signature.hyperparameters if h.kind != "step"]
        grad, *states = (self.names[name] for name in (signature.grad, *signature.states))
        arguments = ", ".join([f"Real {grad}", *(f"Real& {state}" for state in states)])
        passed = ", ".join([grad, *states])
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
            quoted = ", ".join(f'"{state}"' for state in signature.states)
            lines.append(f"  static constexpr const char* kStates[] = {{{quoted}}};")
        if any(signature.codes):
            listed = ", ".join(_STATE_CODES[code] for code in signature.codes)
            lines.append(f"  static constexpr StateCode kStateCodes[] = {{{listed}}};")
        if signature.scalar_states:
            listed = ", ".join(
                f'{{"{name}", {literal(first)}}}' for name, first in signature.scalar_states.items()
            )
            lines.append(f"  static constexpr ScalarState kScalarStates[] = {{{listed}}};")
        if signature.counts_from_1:
            lines.append("  static constexpr int kLowestStep = 1;")
        lines += [
            f"  static constexpr int kNumCases = {len(self.programs)};",
            *(["", *map(self._member, real)] if real else []),
            *(["", *self._advance(struct)] if signature.scalar_states else []),
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
        if self.trace.may_keep_weight:
            lines.append("    bool keeps_weight = false;  // without an update")
        lines += [
            "",
            f"    EMOPT_FN Step([[maybe_unused]] const {struct}& rule,",
            "                  [[maybe_unused]] double step) {",
            *self._choose(self._constants, self.uses, " " * 6),
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

    def _member(self, h: Hyperparameter) -> str:
        kind = "bool" if h.kind == "flag" else "double"
        length = f"[{h.length}]" if h.kind == "numbers" else ""
        note = "  // NaN: None" if h.kind == "optional" else ""
        return f"  {kind} {self.names[h.name]}{length};{note}"

    def _description(self, h: Hyperparameter, struct: str) -> str:
        if h.kind == "step":
            return "StepArgument{}"
        function = "optional_hyperparameter" if h.kind == "optional" else "hyperparameter"
        domain = "" if h.kind == "flag" else f", Domain::{DOMAINS[h.domain]}"
        return f'{function}("{h.name}", &{struct}::{self.names[h.name]}{domain})'

    # ---- once per step ---------------------------------------------------------------------------

    def _choose(self, finish: _Finish, uses: Mapping[Node, int], indent: str) -> list[str]:
        """Return the statements that choose one of the trace's cases.

        Args:
            finish: Returns the statements of a case, by its index.
            uses: How often each value is used.
            indent: The statements' indentation.
        """

        def choose(
            chosen: Sequence[int], depth: int, known: Mapping[Node, str], indent: str
        ) -> list[str]:
            cases = [self.trace.cases[i] for i in chosen]
            condition = None if depth == len(cases[0].outcomes) else cases[0].outcomes[depth][0]
            code = Code(self.names, uses, known, indent, is_per_element=False)
            if condition is None:
                last = finish(chosen[0], code)
                return [*code.lines, *last]
            text = code.of(condition)
            parts = {
                outcome: choose(
                    [i for i in chosen if self.trace.cases[i].outcomes[depth][1] is outcome],
                    depth + 1,
                    code.known,
                    indent + "  ",
                )
                for outcome in (True, False)
            }
            if parts[True] == parts[False]:
                return [*code.lines, *(line.removeprefix("  ") for line in parts[True])]
            head = f"{indent}if ({bare(text)}) {{"
            middle, end = f"{indent}}} else {{", f"{indent}}}"
            return [*code.lines, head, *parts[True], middle, *parts[False], end]

        return choose(range(len(self.trace.cases)), 0, {}, indent)

    def _constants(self, i: int, code: Code) -> list[str]:
        which, constants = self.choices[i]
        values = [code.of(node) for node in constants]
        indent = code.indent
        lines = [
            f"{indent}k[{n}] = static_cast<Real>({bare(value)});" for n, value in enumerate(values)
        ]
        if which != 0:
            lines.append(f"{indent}which = {which};")
        if self.trace.cases[i].update is None:
            lines.append(f"{indent}keeps_weight = true;")
        return lines

    def _advance(self, struct: str) -> list[str]:
        cases = self.trace.cases
        conditions = [condition for case in cases for condition, _ in case.outcomes]
        scalars = [node for case in cases for node in case.scalars]
        uses = count_uses({*conditions, *scalars}, is_per_element=False)

        def finish(i: int, code: Code) -> list[str]:
            values = [code.of(node) for node in cases[i].scalars]
            return [f"{code.indent}scalars[{n}] = {bare(v)};" for n, v in enumerate(values)]

        return [
            f"  double scalars[{len(self.signature.scalar_states)}];",
            "",
            "  EMOPT_FN void advance([[maybe_unused]] double step) {",
            f"    const {struct} rule = *this;",
            *self._choose(finish, uses, " " * 4),
            "  }",
        ]

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


def _names(struct: str, names: Sequence[str]) -> dict[str, str]:
    """Return C++ names for the rule's, with a ``_`` where C++ or a macro may have the name."""
    taken = {*_TAKEN, struct, *names}

    def escape(name: str) -> str:
        if name in _TAKEN or name == struct or name.isupper():
            while name in taken:
                name += "_"
        return name

    return {name: escape(name) for name in names}
