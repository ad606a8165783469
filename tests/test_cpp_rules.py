"""Rules in C++: what they compute, how they are loaded, and what errors say of a broken struct."""

import copy
import os
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import torch.distributed as dist
from plugins import as_row
from support import MIXES, call, make_operands, needs_native
from test_jit_faults import write_script
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import emerging_optimizers as eo
from emerging_optimizers import _build_cache
from emerging_optimizers._hyperparameters import Hyperparameter
from emerging_optimizers._user_rules import CppRule, cpp_rule, user_rule
from emerging_optimizers._user_rules.cpp_source import find_struct, read_source
from emerging_optimizers._user_rules.signature import Signature, check_names

pytestmark = [
    needs_native,
    pytest.mark.once,
    pytest.mark.skipif("sys.platform == 'win32'", reason="rules are not compiled there"),
]
CSRC = _build_cache.csrc()

BLEND = """\
#include "rules/schedules.h"

namespace emopt {

struct Blend {
  static constexpr const char* kName = "blend";
  static constexpr const char* kStates[] = {"exp_avg"};

  double beta;
  bool correct_bias;

  static constexpr auto hyperparameters() {
    return std::make_tuple(hyperparameter("beta", &Blend::beta, Domain::kBeta),
                           hyperparameter("correct_bias", &Blend::correct_bias), StepArgument{});
  }

  template <class Real>
  struct Step {
    ExponentialMovingAverage<Real> average;
    Real unbias;

    EMOPT_FN Step(const Blend& rule, double step)
        : average(rule.beta),
          unbias(static_cast<Real>(1.0 / bias_correction(rule.beta, step, rule.correct_bias))) {}

    EMOPT_FN Real operator()(Real grad, Real& exp_avg) const {
      exp_avg = average(exp_avg, grad);
      return unbias * exp_avg;
    }
  };
};

}  // namespace emopt
"""
LINE = BLEND[: BLEND.index("struct Blend")].count("\n") + 1
# Without states and steps, in the global namespace.
SCALED = """\
struct Scaled {
  static constexpr const char* kName = "scaled";
  double low, high;
  bool use_shape_scaling;
  static constexpr auto hyperparameters() {
    using emopt::hyperparameter;
    return std::make_tuple(hyperparameter("low", &Scaled::low),
                           hyperparameter("high", &Scaled::high),
                           hyperparameter("use_shape_scaling", &Scaled::use_shape_scaling));
  }
  void check(emopt::ErrorText& error) const {
    if (low > high) snprintf(error.text, error.capacity, "low is above high");
  }
  static double shape_scale(int64_t rows, int64_t cols) { return double(rows * cols); }
  template <class Real>
  struct Step {
    Real factor;
    EMOPT_FN Step(const Scaled& rule, double) : factor(static_cast<Real>(rule.low + rule.high)) {}
    EMOPT_FN Real operator()(Real grad) const { return factor * grad; }
  };
};
"""


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path_factory.mktemp("extensions")))
        yield


@pytest.fixture(autouse=True)
def _no_other_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_rule, "_RULES", {})


@pytest.fixture
def blend(tmp_path: Path) -> CppRule:
    (tmp_path / "blend.h").write_text(BLEND)
    return eo.load_rule(tmp_path / "blend.h", defaults={"beta": 0.5, "correct_bias": True})


@pytest.fixture
def scaled() -> CppRule:
    return eo.load_rule(SCALED, defaults={"use_shape_scaling": False})


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Return how often the compiler, which fails, was called."""
    script = write_script(tmp_path / "none" / "c++", f'echo >> "{tmp_path}/calls"; exit 1')
    path = f"{script.parent}{os.pathsep}{os.environ['PATH']}"
    monkeypatch.setenv("PATH", path)  # the command is a part of the key
    (tmp_path / "calls").touch()
    return lambda: len((tmp_path / "calls").read_text().splitlines())


# ---- what they compute ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "struct", "stem"),
    [("lion.h", None, "lion"), ("signum.h", None, "signum"), ("adam.h", "AMSGrad", "amsgrad")],
)
@pytest.mark.builtin_rules("compares with them")
def test_as_the_packages(header: str, struct: str | None, stem: str) -> None:
    """A struct of the package, loaded as a user's: the same bits, with each set of flags."""
    row = oracle.ALL_RULES[stem]
    loaded = as_row_of(eo.load_rule(CSRC / "rules" / header, struct), row)
    for case in row.cases.values():
        for mix in MIXES.values():
            operands = make_operands(row, (5, 7), mix, seed=1)
            mine = [operands.clone(), operands.clone()]
            theirs = [operands.clone(), operands.clone()]
            updates = call(loaded, case, mine)
            wanted = call(row, case, theirs)
            for got, expected in zip([updates, *mine], [wanted, *theirs], strict=True):
                torch.testing.assert_close(list(got), list(expected), rtol=0, atol=0)


def as_row_of(rule: CppRule, row: oracle.Rule) -> oracle.Rule:
    def function(*tensors: Any, out: Any = None, **case: Any) -> Any:
        values = row.complete(case)
        return rule(*tensors, out=out, **{n: values[n] for n in rule.hyperparameter_names})

    copied: Any = as_row(row.implementation, row)
    object.__setattr__(copied, "function", function)
    return copied  # type: ignore[no-any-return]


def test_calls(blend: CppRule) -> None:
    grad, exp_avg = torch.tensor([1.0, -2.0]), torch.zeros(2)
    assert blend(grad, exp_avg, step=1).tolist() == [1.0, -2.0]
    assert exp_avg.tolist() == [0.5, -1.0]
    out = [torch.empty(2)]
    assert blend([grad], [exp_avg], beta=0.0, correct_bias=False, step=0, out=out) is out
    assert out[0].tolist() == exp_avg.tolist() == [1.0, -2.0]
    assert repr(blend) == (
        "<rule blend(grad, exp_avg, *, beta=0.5, correct_bias=True, step, out=None)>"
    )
    assert blend.states == ("exp_avg",)
    assert blend.source == BLEND
    with pytest.raises(ValueError, match=re.escape("beta is 1; expected 0 <= beta < 1")):
        blend(grad, exp_avg, beta=1.0, step=1)
    with pytest.raises(ValueError, match=r"step is 0; expected step >= 1 \(with bias correction"):
        blend(grad, exp_avg, step=0)
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'step'"):
        blend(grad, exp_avg)


def test_steps_count_from_1() -> None:
    text = BLEND.replace("correct_bias", "is_corrected").replace(
        "  double beta;", "  static constexpr int kLowestStep = 1;\n  double beta;"
    )
    rule = eo.load_rule(text)
    with pytest.raises(ValueError, match=r"step is 0; expected step >= 1 \(steps count from 1\)"):
        rule(torch.ones(2), torch.ones(2), beta=0.5, is_corrected=False, step=0)


def test_optimizer(blend: CppRule) -> None:
    class Blended(eo.ScalarOptimizer, rule=blend, lr=0.5):
        """Descends along an average of the gradients."""

    weight = torch.nn.Parameter(torch.tensor([4.0, 2.0], dtype=torch.bfloat16))
    optimizer = Blended([weight], beta=0.75, weight_decay=0.25, master_weights=True)
    weight.grad = torch.tensor([1.0, -2.0], dtype=torch.bfloat16)
    optimizer.step()
    state = optimizer.state[weight]
    assert state["exp_avg"].tolist() == [0.25, -0.5]
    assert state["master_param"].tolist() == [4 - 0.5 - 0.5, 2 - 0.25 + 1.0]
    assert weight.tolist() == [3.0, 2.75]
    saved = optimizer.state_dict()
    other = Blended([weight], lr=1.0)
    other.load_state_dict(saved)
    assert other.param_groups[0]["beta"] == 0.75
    with pytest.raises(ValueError, match="Invalid beta: 2"):
        Blended([weight], beta=2)
    assert pickle.loads(pickle.dumps(optimizer.state_dict())) is not None


def test_check(scaled: CppRule) -> None:
    class Descent(eo.ScalarOptimizer, rule=scaled, lr=1.0):
        pass

    grad = torch.ones(2)
    assert scaled(grad, low=1, high=2).tolist() == [3.0, 3.0]
    with pytest.raises(ValueError, match="low is above high"):
        scaled(grad, low=2, high=1)
    weight = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="low is above high"):
        Descent([weight], low=2, high=1)
    with pytest.raises(TypeError, match="missing 2 required keyword-only arguments"):
        Descent([weight])


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """A mesh of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_shape_scaling(scaled: CppRule, mesh: DeviceMesh) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    class Descent(eo.ScalarOptimizer, rule=scaled, lr=1.0):
        pass

    grad = torch.ones(2, 3)
    options = {"low": 0.0, "high": 0.5, "use_shape_scaling": True}
    assert scaled(grad, **options).tolist() == (3 * grad).tolist()
    sharded = distribute_tensor(grad, mesh, [Shard(0)])
    update: Any = scaled(sharded, **options)
    assert update.full_tensor().tolist() == (3 * grad).tolist()
    for gradient in (grad, sharded):
        weight = torch.nn.Parameter(gradient.detach().clone())
        optimizer = Descent([weight], **options)
        weight.grad = gradient.detach().clone()
        optimizer.step()
        local: Any = weight if gradient is grad else weight.full_tensor()
        assert local.tolist() == (-2 * grad).tolist()


def test_compile(blend: CppRule, scaled: CppRule) -> None:
    exp_avg = torch.zeros(2)

    def run(grad: torch.Tensor) -> Any:
        halves = scaled(grad, low=0.0, high=0.5)
        return blend([halves], [exp_avg], step=1)[0]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert compiled(torch.tensor([2.0, -4.0])).tolist() == [1.0, -2.0]
    assert exp_avg.tolist() == [0.5, -1.0]


def test_no_formula(blend: CppRule) -> None:
    class Blended(eo.ScalarOptimizer, rule=blend, lr=0.5):
        pass

    weight = torch.nn.Parameter(torch.ones(2))
    message = "fused=False, but the rule blend is written in C++ and has no formula in PyTorch"
    with pytest.raises(ValueError, match=re.escape(message)):
        Blended([weight], fused=False)
    optimizer = Blended([weight])
    weight.grad = torch.ones(2)
    optimizer.step()
    optimizer.param_groups[0]["fused"] = False
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.step()
    assert optimizer.state[weight]["step"] == 1
    # Parameters without a native step: nothing is updated.
    other = torch.nn.Parameter(torch.ones(2, device="meta"))
    other.grad = torch.ones(2, device="meta")
    optimizer = Blended([weight, other])
    message = "Blended has no native step for param_groups[0]['params'][1], and its rule blend,"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        optimizer.step()
    assert weight.tolist() == [0.5, 0.5]
    row = [[torch.ones(2, device="meta")] for _ in range(3)]
    message = "the rule blend is written in C++ and has no formula in PyTorch operations: call it"
    with pytest.raises(RuntimeError, match=f"{re.escape(message)}.*, not with a Tensor on meta"):
        blend.operate_on_devices(*row, 0.5, True, 1)


# ---- how they are loaded -------------------------------------------------------------------------


def test_loaded_again(blend: CppRule, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = eo.load_rule(str(tmp_path / "blend.h"))
    for other in (again, pickle.loads(pickle.dumps(blend)), copy.deepcopy(blend)):
        assert other is not blend
        assert other._operator is blend._operator
    assert pickle.loads(pickle.dumps(blend)).signature == blend.signature
    eo.show_config()
    assert re.search(r"^rules: .*\bblend\b", capsys.readouterr().out, re.MULTILINE)


def test_changed_file(tmp_path: Path) -> None:
    """The file, or one that it includes; optimizers keep what they have."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "factor.hpp").write_text('#include "../half.h"\n')
    (tmp_path / "half.h").write_text("#pragma once\nconstexpr double kHalf = 0.5;\n")
    text = BLEND.replace("#include", '#include "lib/factor.hpp"\n#include')
    (tmp_path / "blend.h").write_text(text.replace("return unbias", "return Real(kHalf) * unbias"))
    found = []
    for half in ("0.5", "0.25", "0.5"):
        (tmp_path / "half.h").write_text(f"#pragma once\nconstexpr double kHalf = {half};\n")
        found.append(eo.load_rule(tmp_path / "blend.h"))
    results = [
        rule(torch.ones(1), torch.ones(1), beta=0.5, correct_bias=False, step=1).item()
        for rule in found
    ]
    assert results == [0.5, 0.25, 0.5]
    assert found[0]._operator is found[2]._operator


def test_a_name_in_use(blend: CppRule) -> None:
    message = r"rule blend: .*/blend\.h\.Blend has the same name; rename one of them"
    with pytest.raises(eo.RuleError, match=message):
        eo.load_rule(BLEND.replace("return unbias *", "return"))

    with pytest.raises(eo.RuleError, match=message):

        @eo.rule
        def blend(grad: Any) -> Any:
            return grad


def test_cached_without_a_compiler(
    blend: CppRule, no_compiler: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    eo.load_rule(blend.place[0])
    monkeypatch.setenv("EMERGING_OPTIMIZERS_JIT", "0")
    eo.load_rule(blend.place[0])
    new = BLEND.replace("blend", "another")
    message = (
        "the rule Blend cannot be loaded: EMERGING_OPTIMIZERS_JIT=0, and .* has no library. Unset"
    )
    with pytest.raises(RuntimeError, match=message):
        eo.load_rule(new)
    assert no_compiler() == 0
    monkeypatch.delenv("EMERGING_OPTIMIZERS_JIT")
    with pytest.raises(eo.RuleError, match="the compiler printed nothing"):
        eo.load_rule(new)
    monkeypatch.setenv("CXX", "missing-c++")
    message = "no C++ compiler (missing-c++) was found. Install one or set CXX, and load the rule"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        eo.load_rule(new)
    monkeypatch.setattr(cpp_rule._native, "native", None)
    monkeypatch.setattr(cpp_rule._native, "reason", "no compiled module is installed")
    with pytest.raises(RuntimeError, match="cannot be loaded: no compiled module is installed"):
        eo.load_rule(BLEND)


def test_no_such_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for source in ("structs/blend.h", Path("structs/blend.h")):
        with pytest.raises(FileNotFoundError, match=r"no file 'structs/blend\.h' in .*: pass the"):
            eo.load_rule(source)
    not_text: Any = 3
    with pytest.raises(TypeError, match="source must be the path of a header or C\\+\\+ text, not"):
        eo.load_rule(not_text)


def test_defaults() -> None:
    with pytest.raises(ValueError, match="beta is 2; expected 0 <= beta < 1"):
        eo.load_rule(BLEND, defaults={"beta": 2})
    with pytest.raises(TypeError, match="correct_bias must be a bool, not int"):
        eo.load_rule(BLEND, defaults={"correct_bias": 1})
    message = "defaults has 'step', which rule Blend does not have; it has beta, correct_bias"
    with pytest.raises(TypeError, match=message):
        eo.load_rule(BLEND, defaults={"step": 1})


MEMBERS = 'static constexpr const char* kName = "x";'
STRUCTS = {
    f"struct A {{ {MEMBERS} }};": ("A", ""),
    f"namespace emopt {{ struct A final {{ {MEMBERS} }}; }}": ("A", "emopt"),
    f"namespace a::b {{ namespace c {{\nclass A : public B<1> {{ {MEMBERS} }}; }} }}": (
        "A",
        "a::b::c",
    ),
    f"namespace {{ struct alignas(8) A {{ {MEMBERS} }}; }}": ("A", ""),
    f'extern "C" {{ struct A {{ {MEMBERS} }}; }}': ("A", ""),
    f"struct B {{ struct C {{ {MEMBERS} }}; }}; struct A {{ {MEMBERS} }};": ("A", ""),
    f"/* struct B {{ {MEMBERS} }}; */ // struct C {{ kName\nstruct A {{ {MEMBERS} }};": ("A", ""),
    f"#define X struct B {{ kName \\\n }}\nstruct A {{ {MEMBERS} }};": ("A", ""),
    f"const char* s = \"struct B {{ kName\"; char c = '{{'; struct A {{ {MEMBERS} }};": ("A", ""),
    f'const char* s = R"x({{ " {{)x"; int n = 1\'000; struct A {{ {MEMBERS} }};': ("A", ""),
    f"template <class T> struct B {{ {MEMBERS} }}; struct A {{ {MEMBERS} }};": ("A", ""),
    f"enum class E {{ kName }}; struct A {{ {MEMBERS} }};": ("A", ""),
    f"void f() {{ struct B {{ {MEMBERS} }}; }} struct A {{ {MEMBERS} }};": ("A", ""),
    "struct B { int x; }; struct A { template <class Real> struct Step {}; };": ("A", ""),
    f"struct B {{ void hyperparameters(); }}; struct A : B {{ {MEMBERS} }};": ("A", ""),
}


@pytest.mark.parametrize("text", STRUCTS)
def test_find_struct(text: str) -> None:
    struct = find_struct(read_source(text), None)
    assert (struct.name, struct.namespace) == STRUCTS[text]
    assert text.splitlines()[struct.line - 1].count("A")


def test_which_struct() -> None:
    two = f"namespace a {{ struct A {{ {MEMBERS} }}; }}\nstruct B {{ {MEMBERS} }};"
    assert find_struct(read_source(two), "B").line == 2
    with pytest.raises(eo.RuleError, match=re.escape("has several rules, A, B: choose one with")):
        eo.load_rule(two)
    with pytest.raises(eo.RuleError, match=re.escape("has no struct C: it has A, B")):
        eo.load_rule(two, "C")
    for text, name in (("struct A { int x; };", None), ("int f() {}", "A")):
        with pytest.raises(eo.RuleError, match="a rule is a struct with kName, hyperparameters"):
            eo.load_rule(text, name)


def test_of_any_namespace() -> None:
    text = "using namespace emopt;\n" + BLEND.replace("namespace emopt {", "namespace mine::own {")
    rule = eo.load_rule(text)
    assert rule(torch.ones(1), torch.ones(1), beta=0.5, correct_bias=False, step=1).item() == 1.0


# ---- what errors say -----------------------------------------------------------------------------

NAME = '  static constexpr const char* kName = "blend";\n'
STATES = '  static constexpr const char* kStates[] = {"exp_avg"};\n'
UPDATE = "Real operator()(Real grad, Real& exp_avg) const"
BODY = "      return unbias * exp_avg;\n"
LIST = BLEND[BLEND.index("    return std::make_tuple") : BLEND.index("  }\n\n  template")]
TEMPLATE = "  template <class Real>\n  struct Step {\n"


def after(line: str, more: str) -> tuple[str, str]:
    return line, f"{line}{more}\n"


# What is replaced in the text, by what, and what is said of the struct.
BROKEN: list[tuple[str, str, str]] = [
    (NAME, "", "kName is missing"),
    (NAME, "  static constexpr int kName = 3;\n", "kName is not a constant string"),
    (NAME, '  const char* kName = "blend";\n', "kName is not a constant string"),
    (NAME, '  static inline const char* kName = "blend";\n', "kName is not a constant string"),
    (NAME, '  static constexpr const char* kName = "";\n', "kName is not a constant string"),
    ("hyperparameters()", "parameters()", "hyperparameters() is missing, not static or takes"),
    ("hyperparameters()", "hyperparameters(int)", "hyperparameters() is missing, not static"),
    ("static constexpr auto", "auto", "hyperparameters() is missing, not static or takes"),
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
    (*after("  double beta;", " double x;"), "a member that hyperparameters() does not list"),
    (STATES, "  static constexpr const char* kStates[] = {};\n", "kStates is not a constant array"),
    (STATES, '  static constexpr const char* kStates = "x";\n', "kStates is not a constant array"),
    ('{"exp_avg"}', '{"a", "b", "c", "d", "e", "f"}', "a rule has at most 5 states"),
    (*after(NAME, "  static constexpr int kLowestStep = 2;"), "kLowestStep is neither of the"),
    (*after(NAME, "  int kLowestStep = 1;"), "kLowestStep is neither of the constants 0 and 1"),
    (*after(NAME, "  static constexpr int kNumCases = 0;"), "kNumCases is not a constant of at"),
    (*after(NAME, "  void check(ErrorText&) {}"), "check() takes other arguments: write void"),
    (*after(NAME, "  double shape_scale(int);"), "shape_scale() takes other arguments: write"),
    (TEMPLATE, "  using Real = float;\n  struct Step {\n", "Step is missing, or is not a template"),
    ("rule, double step)", "rule, double step, int)", "Step has no constructor that takes the"),
    ("const Blend& rule", "Blend& rule", "add EMOPT_FN Step(const Blend& rule, double step)"),
    (*after("    Real unbias;", " std::tuple<Real> x;"), "Step has a member that is neither a"),
    (*after("    Real unbias;", " Real x[128];"), "Step has more than 512 bytes: store fewer"),
    (*after("    Real unbias;", " alignas(32) Real x;"), "Step is aligned to more than 16 bytes"),
    ("operator()", "call", "Step has no operator() that takes a gradient and states of type Real"),
    (UPDATE, UPDATE.replace("Real", "float"), "Step has no operator() that takes a gradient"),
    (UPDATE, UPDATE.removesuffix("const"), "operator() of Step is not const"),
    ("Real& exp_avg", "Real& exp_avg, Real& x", "takes another number of states than kStates"),
    (STATES, "", "takes another number of states than kStates has names"),
    ("Real& exp_avg", "Real exp_avg", "takes a state by value, so its new value would be lost"),
    (f"EMOPT_FN {UPDATE}", f"EMOPT_FN void{UPDATE[4:]}", "does not return the update, a Real"),
    (f"EMOPT_FN {UPDATE}", f"EMOPT_FN double{UPDATE[4:]}", "does not return the update, a Real"),
    (*after(NAME, "  static constexpr int kNumCases = 2;"), "but Step has no int which, the case"),
    (
        NAME + STATES,
        NAME + STATES + "  static constexpr int kNumCases = 1;\n",
        "but Step has no template <int kCase> Real compute(...) const",
    ),
    (*after("    Real unbias;", " int keeps_weight;"), "keeps_weight is not a bool"),
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
    """Return what is said of a text, without the file's name and the end."""
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
    line = text[: text.index("struct Blend")].count("\n") + 1
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
    ({"hyperparameters": ("a_list",)}, "the hyperparameter a_list has the name of an operator's"),
]


@pytest.mark.parametrize(("changed", "message"), NAMES)
def test_names(changed: dict[str, Any], message: str) -> None:
    values = {"name": "blend", "states": ("a",), "hyperparameters": ("beta",), **changed}
    listed = tuple(Hyperparameter(name, "number", float) for name in values["hyperparameters"])
    with pytest.raises(eo.RuleError, match=re.escape(message)):
        check_names(Signature("grad", values["states"], listed, {}, values["name"]))


def test_what_the_compiler_cannot_check() -> None:
    with pytest.raises(eo.RuleError, match="rule Blend: the rule is named my-rule: use a name"):
        eo.load_rule(BLEND.replace('"blend"', '"my-rule"'))
    with pytest.raises(eo.RuleError, match=r"shape_scale\(\) and a bool named use_shape_scaling"):
        eo.load_rule(SCALED.replace('hyperparameter("use_shape', 'hyperparameter("uses_shape'))
