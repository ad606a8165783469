"""Rules in C++: what they compute, and how they are loaded."""

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
from cpp_texts import BLEND, SCALED
from plugins import as_row
from support import MIXES, call, make_operands, needs_native
from test_jit_faults import write_script
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import emerging_optimizers as eo
from emerging_optimizers import _build_cache
from emerging_optimizers._user_rules import CppRule, cpp_rule
from emerging_optimizers._user_rules.cpp_source import find_struct, read_source

pytestmark = [
    needs_native,
    pytest.mark.once,
    pytest.mark.usefixtures("_cache_of_module", "_no_other_rules"),
    pytest.mark.skipif("sys.platform == 'win32'", reason="rules are not compiled there"),
]
CSRC = _build_cache.csrc()


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


def test_layouts(blend: CppRule) -> None:
    """States get their parameter's layout where a step needs it, with the same values."""

    class Blended(eo.ScalarOptimizer, rule=blend, lr=0.5, master_weights=True):
        pass

    formats = [torch.contiguous_format, torch.channels_last]
    values = torch.arange(120.0).reshape(2, 3, 4, 5)
    for dtype in (torch.float32, torch.bfloat16):
        results = []
        for first, second in ((0, 0), (0, 1), (1, 0)):
            weights = [
                torch.nn.Parameter(values.to(dtype).clone(memory_format=formats[first]))
                for _ in range(3)
            ]
            optimizer = Blended([{"params": weights[:2]}, {"params": weights[2:]}])
            for k, weight in enumerate(weights):
                weight.grad = weight.detach() * k
            optimizer.step()
            for weight in weights:
                weight.data = weight.data.to(memory_format=formats[second])
            optimizer.step()
            optimizer.step()
            for weight in weights:
                tensors = [t for t in optimizer.state[weight].values() if t.dim() == 4]
                assert all(t.stride() == weight.stride() for t in tensors)
                results.append([weight.detach(), *tensors, optimizer.state[weight]["step"]])
        for k, result in enumerate(results[3:]):
            torch.testing.assert_close(result, results[k % 3], rtol=0, atol=0)
    # In a loaded state dict; and a parameter with gaps, which has no step.
    weight = torch.nn.Parameter(values.to(memory_format=torch.channels_last))
    optimizer = Blended([weight])
    weight.grad = values.clone()
    saved = {"exp_avg": values.clone(), "step": torch.tensor(1.0)}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: saved}})
    optimizer.state[weight]["exp_avg"] = values.clone()
    optimizer.step()
    assert optimizer.state[weight]["exp_avg"].tolist() == values.tolist()
    gapped = torch.nn.Parameter(torch.ones(4, 4)[:, ::2])
    gapped.grad = torch.ones(4, 2)
    with pytest.raises(RuntimeError, match="use parameters on the CPU, without gaps in memory"):
        Blended([gapped]).step()
    assert gapped.tolist() == torch.ones(4, 2).tolist()


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
    for folder in ("", "."):
        with pytest.raises(IsADirectoryError, match=f"'{re.escape(folder)}' is a folder: pass the"):
            eo.load_rule(folder)
    (tmp_path / "latin.h").write_bytes(b"// one\n// \xe9\n")
    with pytest.raises(eo.RuleError, match=r"latin\.h:2: the file is not UTF-8: convert it to"):
        eo.load_rule("latin.h")
    not_text: Any = 3
    with pytest.raises(TypeError, match="source must be the path of a header or C\\+\\+ text, not"):
        eo.load_rule(not_text)


@pytest.mark.parametrize("text", [f"\ufeff{SCALED}", f"{SCALED}// of both \\", f"{SCALED}// \\\n"])
def test_first_and_last_bytes(text: str, tmp_path: Path) -> None:
    """A byte order mark, and a backslash that joins the last line to the next one."""
    (tmp_path / "scaled.h").write_text(text, encoding="utf-8")
    for source in (tmp_path / "scaled.h", text):
        rule = eo.load_rule(source)
        assert rule(torch.ones(1), low=1, high=2, use_shape_scaling=False).tolist() == [3.0]


COUNTED = """\
struct Counted {
  static constexpr const char* kName = "counted";
  int64_t n;
  static constexpr auto hyperparameters() {
    return std::make_tuple(emopt::hyperparameter("n", &Counted::n, DOMAIN));
  }
  template <class Real>
  struct Step {
    Real n;
    EMOPT_FN Step(const Counted& rule, double) : n(static_cast<Real>(rule.n)) {}
    EMOPT_FN Real operator()(Real grad) const { return n * grad; }
  };
};
"""


def test_whole_numbers() -> None:
    signed = COUNTED.replace("DOMAIN", "emopt::Domain::kInteger")
    grad = torch.ones(1)
    rule = eo.load_rule(signed, defaults={"n": -3})
    assert [rule(grad).item(), rule(grad, n=2).item(), rule(grad, n=None).item()] == [-3, 2, 0]

    class Descent(eo.ScalarOptimizer, rule=rule, lr=1.0):
        pass

    weight = torch.nn.Parameter(torch.ones(1))
    weight.grad = grad
    Descent([weight], n=-1).step()
    assert weight.item() == 2.0
    with pytest.raises(TypeError, match=r"n is 0\.5; expected a whole number"):
        eo.load_rule(signed, defaults={"n": 0.5})
    with pytest.raises(ValueError, match="n is -3; expected n >= 0"):
        eo.load_rule(COUNTED.replace(", DOMAIN", ""), defaults={"n": -3})


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
    f"#if 0\n#if X\nstruct B {{ {MEMBERS} }};\n#endif\n#else\nstruct A {{ {MEMBERS} }};\n#endif": (
        "A",
        "",
    ),
    f"struct A {{ {MEMBERS} }};\n# if false // {{\nstruct B {{ {MEMBERS} }};\n# endif": ("A", ""),
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
    no_rules = [
        ("struct A { int x; };", None),
        ("int f() {}", "A"),
        (f"typedef struct {{ {MEMBERS} }} A;", None),
        (f"template <int> struct A {{ {MEMBERS} }};", None),
        (f"#if 0\nstruct A {{ {MEMBERS} }};\n#endif", None),
    ]
    for text, name in no_rules:
        with pytest.raises(eo.RuleError, match="a rule is a struct with kName, hyperparameters"):
            eo.load_rule(text, name)


def test_of_any_namespace() -> None:
    text = "using namespace emopt;\n" + BLEND.replace("namespace emopt {", "namespace mine::own {")
    rule = eo.load_rule(text)
    assert rule(torch.ones(1), torch.ones(1), beta=0.5, correct_bias=False, step=1).item() == 1.0
