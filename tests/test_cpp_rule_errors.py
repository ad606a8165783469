"""What errors say of a broken rule in C++."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cpp_texts import BLEND, SCALED, SCHEDULED
from support import needs_native

import emerging_optimizers as eo
from emerging_optimizers import _build_cache
from emerging_optimizers._hyperparameters import Hyperparameter
from emerging_optimizers._user_rules.signature import Signature, check_names

pytestmark = [
    needs_native,
    pytest.mark.once,
    pytest.mark.usefixtures("_cache_of_module", "_no_other_rules"),
    pytest.mark.skipif("sys.platform == 'win32'", reason="rules are not compiled there"),
]
CSRC = _build_cache.csrc()


NAME = '  static constexpr const char* kName = "blend";\n'
STATES = '  static constexpr const char* kStates[] = {"exp_avg"};\n'
UPDATE = "Real operator()(Real grad, Real& exp_avg) const"
CONST = UPDATE.replace("Real& exp", "const Real& exp")
CODES = "  static constexpr StateCode kStateCodes[] = {StateCode::kSigned};"
SCALARS = '  static constexpr ScalarState kScalarStates[] = {{"total", 1.0}};'
BODY = "      return unbias * exp_avg;\n"
LIST = BLEND[BLEND.index("    return std::make_tuple") : BLEND.index("  }\n\n  template")]
TEMPLATE = "  template <class Real>\n  struct Step {\n"


def after(line: str, more: str) -> tuple[str, str]:
    return line, f"{line}{more}\n"


# What is replaced in the text, by what, and the message about the struct.
BROKEN: list[tuple[str, str, str]] = [
    (NAME, "", "kName is missing or private: add"),
    ("struct Blend {", "class Blend {", "kName is missing or private: add"),
    (NAME, "  static constexpr const char* kName = nullptr;\n", "kName is not a constant string"),
    (NAME, "  static constexpr int kName = 3;\n", "kName is not a constant string"),
    (NAME, '  const char* kName = "blend";\n', "kName is not a constant string"),
    (NAME, '  static inline const char* kName = "blend";\n', "kName is not a constant string"),
    (NAME, '  static constexpr const char* kName = "";\n', "kName is not a constant string"),
    ("hyperparameters()", "parameters()", "hyperparameters() is missing, private, not static"),
    ("hyperparameters()", "hyperparameters(int)", "hyperparameters() is missing, private, not"),
    ("static constexpr auto", "auto", "hyperparameters() is missing, private, not static or"),
    ("StepArgument{}", "1", "hyperparameters() does not return a std::tuple of hyper"),
    (LIST, '    return hyperparameter("beta", &Blend::beta);\n', "does not return a std::tuple"),
    ("StepArgument{}", 'hyperparameter("x", &Other::x)', "lists a member of another struct"),
    ("double beta;", "float beta;", "lists a member of an unsupported type: use double"),
    ("double beta;", "int beta;", "lists a member of an unsupported type: use double"),
    ("StepArgument{}", "StepArgument{}, StepArgument{}", "StepArgument{} more than once"),
    (*after("  double beta;", " double x[32];"), "the struct has more than 256 bytes"),
    (*after("  double beta;", " std::tuple<int> x;"), "the struct has a member that is neither"),
    (*after("  double beta;", " explicit Blend(int);"), "the struct has a constructor, or a"),
    ("double beta;", "double beta = 0.9;", "a member with a value, which would have no effect"),
    (*after("  double beta;", " virtual int x();"), "or a virtual function: it is copied as"),
    (*after("  double beta;", " double x;"), "a member that hyperparameters() does not list"),
    # In the padding after the flag.
    (*after("  bool correct_bias;", " bool x;"), "a member that hyperparameters() does not list"),
    (*after("  bool correct_bias;", " float x;"), "a member that hyperparameters() does not list"),
    (*after("  bool correct_bias;", " char x[2];"), "a member that hyperparameters() does not"),
    (*after("  bool correct_bias;", " Domain x;"), "a member that hyperparameters() does not list"),
    (*after("  double beta;", " const char* x;"), "a member that hyperparameters() does not list"),
    ("  double beta;", " private:\n  double beta;\n\n public:", "a base that is private: make it"),
    (
        STATES,
        "  static constexpr const char* kStates[] = {};\n",
        "kStates is private or not a constant",
    ),
    (
        STATES,
        '  static constexpr const char* kStates = "x";\n',
        "kStates is private or not a constant",
    ),
    ('[] = {"exp_avg"}', '[2] = {"exp_avg"}', "kStates is private or not a constant array of"),
    ('{"exp_avg"}', "{nullptr}", "kStates is private or not a constant array of strings: write"),
    (STATES, f" private:\n{STATES} public:\n", "kStates is private or not a constant array"),
    ('{"exp_avg"}', '{"a", "b", "c", "d", "e", "f"}', "a rule has at most 5 states"),
    *(
        (*after(NAME, f"  {declared}"), "kStateCodes is private or not a constant array: write")
        for declared in (
            "int kStateCodes = 3;",
            "StateCode kStateCodes[1] = {StateCode::kSigned};",
            "static inline StateCode kStateCodes[] = {StateCode::kSigned};",
            "static constexpr int kStateCodes[] = {1};",
            "static constexpr StateCode kStateCodes[] = {StateCode(3)};",
            f"private:\n{CODES}\n public:",
        )
    ),
    (*after(NAME, CODES.replace("{S", "{StateCode::kNone, S")), "kStateCodes has another length"),
    (
        STATES,
        STATES.replace('{"', '{"a", "') + CODES,
        "another length than kStates: list a code for each state, StateCode::kNone for one that",
    ),
    *(
        (*after(NAME, f"  {declared}"), "kScalarStates is private or not a constant array: write")
        for declared in (
            "int kScalarStates = 3;",
            'ScalarState kScalarStates[1] = {{"total", 1.0}};',
            'static inline ScalarState kScalarStates[] = {{"total", 1.0}};',
            'static constexpr const char* kScalarStates[] = {"total"};',
            "static constexpr ScalarState kScalarStates[] = {{nullptr, 1.0}};",
            'static constexpr ScalarState kScalarStates[] = {{"", 1.0}};',
            'static constexpr ScalarState kScalarStates[2] = {{"total", 1.0}};',
            f"private:\n{SCALARS}\n public:",
        )
    ),
    (
        *after(
            NAME,
            SCALARS.replace("{{", '{{"a", 0.0}, {"b", 0.0}, {"c", 0.0}, {"d", 0.0}, {')
            + "\n  double scalars[5];\n  void advance(double) {}",
        ),
        "a rule has at most 4 scalar states",
    ),
    *(
        (
            *after(NAME, f"{SCALARS}\n  void advance(double) {{}}\n  {member}"),
            "but no public member double scalars[N] with a number for each of them",
        )
        for member in (
            "",
            "double scalars;",
            "float scalars[1];",
            "double scalars[2];",
            "static inline double scalars[1] = {1.0};",
            "static inline double scalars(int) { return 0.0; }",
            "private:\n  double scalars[1];\n public:",
        )
    ),
    *(
        (
            *after(NAME, f"{SCALARS}\n  double scalars[1];\n  {function}"),
            "but no public EMOPT_FN void advance(double step) that sets scalars to their values",
        )
        for function in (
            "",
            "void advance() {}",
            "void advance(double) const {}",
            "static void advance(double) {}",
            "double advance(double step) { return step; }",
            "private:\n  void advance(double) {}\n public:",
        )
    ),
    (
        *after(NAME, f"{SCALARS}\n  double scalars[1];\n  void advance(double) {{}}\n  double x;"),
        "a member that hyperparameters() does not list",
    ),
    (*after(NAME, "  static constexpr int kLowestStep = 2;"), "kLowestStep is private or neither"),
    (*after(NAME, "  int kLowestStep = 1;"), "kLowestStep is private or neither of the"),
    (
        *after(NAME, " private:\n  static constexpr int kLowestStep = 1;\n public:"),
        "kLowestStep is",
    ),
    (*after(NAME, "  static constexpr int kNumCases = 0;"), "kNumCases is private or not a"),
    (*after(NAME, "  void check(ErrorText&) {}"), "check() is private or takes other"),
    (*after(NAME, "  void check(int) const {}\n  void check() const {}"), "check() is private or"),
    (*after(NAME, " private:\n  void check(ErrorText&) const {}\n public:"), "check() is private"),
    (*after(NAME, "  double shape_scale(int);"), "shape_scale() is private or takes other"),
    (
        *after(NAME, "  template <class T>\n  static T shape_scale(T);"),
        "shape_scale() is private or",
    ),
    (TEMPLATE, "  using Real = float;\n  struct Step {\n", "Step is missing, private or not a"),
    ("rule, double step)", "rule, double step, int)", "Step has no constructor that takes the"),
    ("const Blend& rule", "Blend& rule", "add EMOPT_FN Step(const Blend& rule, double step)"),
    (*after("    Real unbias;", " std::tuple<Real> x;"), "Step has a member that is neither a"),
    (*after("    Real unbias;", " Real x[128];"), "Step has more than 512 bytes: store fewer"),
    (*after("    Real unbias;", " alignas(32) Real x;"), "Step is aligned to more than 16 bytes"),
    ("operator()", "call", "Step has no operator() that takes a gradient and states of type Real"),
    (UPDATE, UPDATE.replace("Real", "float"), "Step has no operator() that takes a gradient"),
    (UPDATE, UPDATE.removesuffix("const"), "operator() of Step is not const"),
    ("Real& exp_avg", "Real& exp_avg, Real& x", "takes another number of states than kStates"),
    ('{"exp_avg"}', '{"a", "b"}', "takes another number of states than kStates has names"),
    (STATES, "", "kStates is missing, but operator() of Step takes states: add static"),
    ("kStates", "kStats", "kStates is missing, but operator() of Step takes states: add static"),
    ("Real& exp_avg", "Real exp_avg", "takes a state by value or as const, so its new"),
    (
        f"{UPDATE} {{\n      exp_avg = average(exp_avg, grad);",
        f"{CONST} {{",
        "or as const, so its new",
    ),
    (f"EMOPT_FN {UPDATE}", f"EMOPT_FN void{UPDATE[4:]}", "does not return the update, a Real"),
    (f"EMOPT_FN {UPDATE}", f"EMOPT_FN double{UPDATE[4:]}", "does not return the update, a Real"),
    (*after(NAME, "  static constexpr int kNumCases = 2;"), "but Step has no int which, the case"),
    (
        NAME + STATES,
        NAME + STATES + "  static constexpr int kNumCases = 1;\n",
        "but Step has no template <int kCase> Real compute(...) const",
    ),
    (*after("    Real unbias;", " int keeps_weight;"), "keeps_weight is private or not a bool"),
    (
        *after("    Real unbias;", " bool keeps_weight() const { return true; }"),
        "keeps_weight is private or not a bool: write bool keeps_weight; and set it in the",
    ),
]
# The same of a line.
ERRORS: list[tuple[str, str, str, str]] = [
    (BODY, "", BODY, "no return statement in function returning non-void"),
    ("exp_avg;\n    }", "exp_av;\n    }", BODY, "'exp_av' was not declared in this scope"),
    ("exp_avg;\n    }", "exp_avg\n    }", "exp_avg;\n    }", "expected ';' before '}' token"),
    ("schedules.h", "schedule.h", "#include", "rules/schedule.h: No such file or directory"),
    ("Domain::kBeta", "Domain::kBetas", "Domain", "'kBetas' is not a member of 'emopt::Domain'"),
    ("rule.beta)", "rule.bet)", "average(rule", "has no member named 'bet'"),
    ("}  // namespace emopt\n", "", "};\n\n}", "a closing brace is missing"),
    ("  };\n};", "  };", "}  // namespace", "a closing brace is missing"),
]


def broken(old: str, new: str) -> str:
    assert old in BLEND
    text = BLEND.replace(old, new, 1)
    if "which" not in new and "kNumCases = 1" in new:
        text = text.replace("Real unbias;", "Real unbias; int which;")
    if "Other::" in new:
        text += "struct Other { double x; };\n"
        text = text[text.index("struct Other") :] + text[: text.index("struct Other")]
    return text


def error_of(text: str, folder: Path) -> str:
    """Return the message about a text, without the file's name and the end."""
    (folder / "blend.h").write_text(text)
    with pytest.raises(eo.RuleError) as caught:
        eo.load_rule(folder / "blend.h")
    pattern = r"rule Blend cannot be compiled: (.*) \(all errors are in (/.*/error\.txt)\)"
    found = re.fullmatch(pattern, str(caught.value))
    assert found is not None, caught.value
    assert Path(found[2]).is_file()
    assert found[1].startswith(f"{folder}/blend.h:"), found[1]
    return found[1].removeprefix(f"{folder}/blend.h:")


@pytest.mark.slow
@pytest.mark.parametrize(("old", "new", "message"), BROKEN)
def test_broken_struct(old: str, new: str, message: str, tmp_path: Path) -> None:
    text = broken(old, new)
    told = error_of(text, tmp_path)
    line = text[: text.index("Blend {")].count("\n") + 1
    assert told.startswith(f"{line}: ")
    assert message in told


@pytest.mark.parametrize(("old", "new", "place", "message"), ERRORS)
def test_errors_name_the_line(old: str, new: str, place: str, message: str, tmp_path: Path) -> None:
    told = error_of(broken(old, new), tmp_path)
    assert message in told
    line = int(told.partition(":")[0])
    assert abs(line - BLEND[: BLEND.index(place)].count("\n") - 1) <= 1


def test_every_requirement_has_a_broken_struct() -> None:
    text = (CSRC / "engine" / "rule_requirements.h").read_text()
    text = re.sub(r'"\s*\n\s*"', "", text)
    messages = re.findall(r'static_assert\([^"]*?"((?:[^"\\]|\\.)*)"\)', text)
    assert len(messages) > 25
    missing = [m for m in messages if not any(told.split("Blend")[0] in m for *_, told in BROKEN)]
    assert missing == []


NAMES = [
    ({"name": "my-rule"}, "the rule is named my-rule: use a name of ASCII letters"),
    ({"name": "class"}, "the rule is named class: use a name of ASCII letters"),
    ({"states": ("1st",)}, "an argument is named 1st: use a name of ASCII letters"),
    ({"states": ("out",)}, "an argument cannot be named out, which has another meaning"),
    ({"states": ("step",)}, "an argument cannot be named step: the step number is StepArgument{}"),
    ({"states": ("grad",)}, "two arguments are named grad: rename one of them"),
    ({"states": ("a", "a")}, "two arguments are named a: rename one of them"),
    ({"states": ("beta",)}, "two arguments are named beta: rename one of them"),
    ({"hyperparameters": ("master_param",)}, "cannot be named master_param, which has another"),
    (
        {"hyperparameters": ("NoneType",)},
        "NoneType is reserved in PyTorch's operator schemas",
    ),
    ({"scalars": {"2nd": 1.0}}, "an argument is named 2nd: use a name of ASCII letters"),
    ({"scalars": {"out": 1.0}}, "an argument cannot be named out, which has another meaning"),
    ({"scalars": {"step": 1.0}}, "an argument cannot be named step: the step number is StepArgume"),
    ({"scalars": {"grad": 1.0}}, "two arguments are named grad: rename one of them"),
    ({"scalars": {"a": 1.0}}, "two arguments are named a: rename one of them"),
    ({"scalars": {"beta": 1.0}}, "two arguments are named beta: rename one of them"),
    ({"scalars": {"NoneType": 1.0}}, "NoneType is reserved in PyTorch's operator schemas"),
    ({"scalars": {"a_list": 1.0}}, "a_list has the name of an operator's argument: rename it"),
    ({"hyperparameters": ("a_list",)}, "the hyperparameter a_list has the name of an operator's"),
]


@pytest.mark.parametrize(("changed", "message"), NAMES)
def test_names(changed: dict[str, Any], message: str) -> None:
    usual = {"name": "blend", "states": ("a",), "hyperparameters": ("beta",), "scalars": {}}
    values = {**usual, **changed}
    listed = tuple(Hyperparameter(name, "number", float) for name in values["hyperparameters"])
    signature = Signature(
        "grad", values["states"], listed, {}, values["scalars"], name=values["name"]
    )
    with pytest.raises(eo.RuleError, match=re.escape(message)):
        check_names(signature)


def test_what_the_compiler_cannot_check() -> None:
    with pytest.raises(eo.RuleError, match="rule Blend: the rule is named my-rule: use a name"):
        eo.load_rule(BLEND.replace('"blend"', '"my-rule"'))
    with pytest.raises(eo.RuleError, match=r"shape_scale\(\) and a bool named use_shape_scaling"):
        eo.load_rule(SCALED.replace('hyperparameter("use_shape', 'hyperparameter("uses_shape'))
    two = BLEND.replace("bool correct_bias;", "bool correct_bias;\n  double eps;")
    two = two.replace("StepArgument{}", 'hyperparameter("eps", &Blend::beta), StepArgument{}')
    with pytest.raises(eo.RuleError, match="lists the same member as beta and as eps: list each"):
        eo.load_rule(two)
    listed = SCHEDULED.replace(
        "StepArgument{}", 'hyperparameter("x", &ScheduledAdam::scalars), StepArgument{}'
    )
    with pytest.raises(eo.RuleError, match="lists the same member as scalars and as x: list each"):
        eo.load_rule(listed)
    for taken in ("exp_avg", "betas", "grad"):
        with pytest.raises(eo.RuleError, match=f"two arguments are named {taken}: rename one"):
            eo.load_rule(SCHEDULED.replace('"mu_product"', f'"{taken}"'))
    twice = SCHEDULED.replace("scalars[1]", "scalars[2]")
    twice = twice.replace('{"mu_product", 1.0}', '{"mu_product", 1.0}, {"mu_product", 2.0}')
    with pytest.raises(eo.RuleError, match="kScalarStates has a name twice: rename one of them"):
        eo.load_rule(twice)
    with pytest.raises(eo.RuleError, match=r"mu_product starts at 1e\+300, beyond the range of"):
        eo.load_rule(SCHEDULED.replace('"mu_product", 1.0', '"mu_product", 1e300'))


def test_in_a_rule_in_python() -> None:
    scaled = eo.load_rule(SCALED)
    with pytest.raises(
        eo.RuleError, match=r"scaled in a rule: it is written in C\+\+; write it in"
    ):

        @eo.rule
        def doubled(grad: Any) -> Any:
            return scaled(grad, low=1.0, high=1.0, use_shape_scaling=False)


@pytest.mark.parametrize("name", ["Hyperparameter", "sign"])
def test_a_name_of_the_package(name: str) -> None:
    message = f"C++ text:1: the package's headers define {name}, too: rename the struct (all"
    with pytest.raises(eo.RuleError, match=re.escape(message)):
        eo.load_rule(SCALED.replace("Scaled", name))


@pytest.mark.parametrize("kind", ["const bool", "static constexpr bool"])
def test_keeps_weight(kind: str) -> None:
    text = SCALED.replace("Real factor;", f"Real factor; {kind} keeps_weight = true;")

    class Kept(eo.ScalarOptimizer, rule=eo.load_rule(text), lr=1.0, low=1.0, high=1.0):
        pass

    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = Kept([weight], use_shape_scaling=False)
    weight.grad = torch.ones(2)
    optimizer.step()
    assert weight.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "check",
    [
        "template <class Text> void check(Text& error) const",
        "void check(int) const {} void check(emopt::ErrorText& error) const",
    ],
)
def test_check_of_any_form(check: str) -> None:
    rule = eo.load_rule(SCALED.replace("void check(emopt::ErrorText& error) const", check))
    with pytest.raises(ValueError, match="low is above high"):
        rule(torch.ones(1), low=2, high=1, use_shape_scaling=False)
