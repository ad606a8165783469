"""Users' rules whose states may be stored as 8-bit codes."""

import math
import pickle
import re
from typing import Annotated, Any

import pytest
import torch
from cpp_texts import BLEND
from interpreting import compiled, interpreted, needs_compiler
from rule_references import GALLERY_RULES, GalleryRule
from support import assert_equal_bits, needs_native
from test_rule_definitions import make
from torch import Tensor

import emerging_optimizers as eo
from emerging_optimizers._codes import E4M3, UE5M3, decode

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("_no_other_device")]

SHAPE = (64, 64)
# The states of the gallery that stay as they are.
WIDE = {"adabelief": ["exp_avg"], "adan": ["previous_grad"]}
CODES = '  static constexpr const char* kStates[] = {"exp_avg"};\n'
CODED_BLEND = BLEND.replace(
    CODES, CODES + "  static constexpr StateCode kStateCodes[] = {StateCode::kSigned};\n"
)
every_coded_rule = pytest.mark.parametrize(
    "rule", [rule for rule in GALLERY_RULES.values() if rule.states], ids=str
)


@eo.rule
def coded_average(grad: Tensor, exp_avg: eo.SignedState, total: Tensor, *, beta=0.9):  # type: ignore[no-untyped-def]
    exp_avg.mul_(beta).add_(grad, alpha=1 - beta)
    total.add_(grad)
    return exp_avg + total


class CodedAverage(eo.ScalarOptimizer, rule=coded_average, lr=0.1):
    """The sum of gradients, and of their average."""


def grad_of(step: int) -> Tensor:
    """Gradients of several sizes in each group."""
    generator = torch.Generator().manual_seed(step)
    sizes = torch.logspace(-2, 0, SHAPE[1])
    return torch.randn(SHAPE, generator=generator) * sizes


def new_param() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(SHAPE))


def take_steps(optimizer: torch.optim.Optimizer, *steps: int) -> dict[str, Any]:
    """Take some steps, and return the state of the only parameter."""
    (param,) = optimizer.param_groups[0]["params"]
    for step in steps:
        param.grad = grad_of(step)
        optimizer.step()
    return optimizer.state[param]


# ---- definitions ---------------------------------------------------------------------------------

DEFINITIONS = [
    # the signature, and what the error says
    ("grad: eo.SignedState, a, *, h=1.0", "grad is the gradient, which is not stored: annotate"),
    ("g: eo.UnsignedState, a, *, h=1.0", "g is the gradient, which is not stored: annotate the"),
    ("grad, a, *, h: eo.SignedState", "h is keyword-only, so it is a hyperparameter, and Signed"),
    ("grad, a, *, h: eo.UnsignedState = 1.0", "are types of states: write states before `*`"),
    ("grad, a, *, step: eo.SignedState, h=1.0", "step is keyword-only, so it is a hyperparameter"),
    ("grad, a: eo.SignedState | None, *, h=1.0", "a state is one tensor: annotate it with Signed"),
    ("grad, a: list[eo.UnsignedState], *, h=1.0", "a state is one tensor: annotate it with Sig"),
    ("grad, a: eo.SignedState, a_scale, *, h=1.0", "a_scale is the key of the scales of a, which"),
    ("grad, a_scale, a: eo.UnsignedState, *, h=1.0", "may be stored in 8 bits: rename it"),
    ("grad, a: eo.SignedState, *, h=1.0, a_scale: eo.ScalarState = 1.0", "a_scale is the key of"),
    ("grad, a: eo.SignedState, h: eo.SignedState = 1.0", "h is positional, so it is a tensor:"),
]


@pytest.mark.parametrize(("signature", "text"), DEFINITIONS)
@pytest.mark.parametrize("as_text", [False, True])
def test_refused_definitions(signature: str, text: str, as_text: bool) -> None:
    future = "from __future__ import annotations\n" if as_text else ""
    first = re.split(r"\W", signature)[0]
    code = f"{future}@eo.rule\ndef bad({signature}):\n    return a.add_({first}) * h\n"
    with pytest.raises(eo.RuleError, match=re.escape(text)):
        make(code, "bad")


@pytest.mark.parametrize("future", ["", "from __future__ import annotations\n"])
def test_annotations_by_other_names(future: str) -> None:
    names: dict[str, Any] = {
        "SignedState": eo.SignedState,
        "Root": eo.UnsignedState,
        "Noted": Annotated[eo.UnsignedState, "of squares"],
        "Other": Annotated[Tensor, "any"],
    }
    for written, code in {
        "SignedState": E4M3,
        "'SignedState'": E4M3,
        "'eo.UnsignedState'": UE5M3,
        "Root": UE5M3,
        "Noted": UE5M3,
        "Other": None,
        "torch.Tensor": None,
        "'Missing'": None,
    }.items():
        text = f"{future}@eo.rule\ndef coded_text(grad: torch.Tensor, a: {written}, b):\n"
        rule = make(f"{text}    b += a\n    a += grad\n    return a * b\n", "coded_text", **names)
        assert rule.codes == (code, None)
        assert rule.states == ("a", "b")


def test_a_type_that_only_type_checkers_import() -> None:
    text = "@eo.rule\ndef bad(grad, a: 'SignedState'):\n    return a.add_(grad)\n"
    with pytest.raises(eo.RuleError, match="'SignedState' is not defined: import SignedState and"):
        make(text, "bad")


def test_codes_in_the_cpp_text() -> None:
    """The CUDA kernels need to know them; all else is the same."""
    text = "@eo.rule\ndef coded_alike(grad, a{}):\n    return a.add_(grad)\n"
    plain, coded = (make(text.format(code), "coded_alike") for code in ("", ": eo.SignedState"))
    assert (plain.codes, coded.codes) == ((None,), (E4M3,))
    codes = "  static constexpr StateCode kStateCodes[] = {StateCode::kSigned};\n"
    assert coded.source.count(codes) == 1
    assert plain.source == coded.source.replace(codes, "")


def test_names_of_scales_that_do_not_clash() -> None:
    text = "@eo.rule\ndef coded_scale(grad, a, a_scale: eo.SignedState, *, b_scale=1.0):\n"
    rule = make(f"{text}    a_scale += grad\n    return a.add_(a_scale) * b_scale\n", "coded_scale")
    assert rule.codes == (None, E4M3)


def test_a_name_in_the_struct() -> None:
    text = "@eo.rule\ndef coded_name(grad, a, *, kStateCodes=2.0):\n    a += grad\n"
    rule = make(f"{text}    return a * kStateCodes\n", "coded_name")
    assert "double kStateCodes;" not in rule.source


def test_rules_that_call_rules() -> None:
    inner = "@eo.rule\ndef coded_inner(grad, a{}):\n    return a.add_(grad)\n"
    outer = "@eo.rule\ndef coded_outer(grad, a{}):\n    return {}(grad, a)\n"
    for call in ("coded_inner", "coded_inner.formula"):
        for first, second, codes in (
            (": eo.SignedState", "", (None,)),
            ("", ": eo.UnsignedState", (UE5M3,)),
            (": eo.SignedState", ": eo.UnsignedState", (UE5M3,)),
        ):
            text = inner.format(first) + outer.format(second, call)
            assert make(text, "coded_outer").codes == codes


@needs_native
def test_other_copies_of_a_rule() -> None:
    assert interpreted(coded_average).codes == coded_average.codes == (E4M3, None)
    assert pickle.loads(pickle.dumps(coded_average)) is coded_average
    optimizer = CodedAverage([new_param()], state_dtype="8bit")
    state = take_steps(optimizer, 1)
    again = pickle.loads(pickle.dumps(optimizer))
    (other,) = again.state.values()
    assert list(other) == ["step", "exp_avg", "exp_avg_scale", "total"]
    assert_equal_bits(other["exp_avg"], state["exp_avg"], "exp_avg")


# ---- options -------------------------------------------------------------------------------------


@needs_native
def test_states_without_an_annotation_stay_wide(fused: bool | None) -> None:
    for option in ("8bit", {"exp_avg": "8bit"}, {"exp_avg": "8bit", "total": torch.bfloat16}):
        optimizer = CodedAverage([new_param()], state_dtype=option, fused=fused)
        state = take_steps(optimizer, 1)
        assert list(state) == ["step", "exp_avg", "exp_avg_scale", "total"]
        assert state["exp_avg"].dtype == state["exp_avg_scale"].dtype == torch.uint8
        wanted = torch.bfloat16 if "total" in option else torch.float32
        assert state["total"].dtype == wanted
        assert_equal_bits(state["total"], grad_of(1).to(wanted), "total")
        read = decode(state["exp_avg"], state["exp_avg_scale"], E4M3)
        torch.testing.assert_close(read, 0.1 * grad_of(1), rtol=1 / 8, atol=1e-5)


def test_options_that_the_rule_does_not_allow() -> None:
    message = (
        "Invalid state_dtype: \"8bit\" is not allowed for state 'total' of the rule coded_average;"
        " in a rule that you write, annotate a state with eo.SignedState or eo.UnsignedState"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        CodedAverage([new_param()], state_dtype={"total": "8bit"})

    wide = make("@eo.rule\ndef coded_none(grad, a):\n    return a.add_(grad)\n", "coded_none")

    class Wide(eo.ScalarOptimizer, rule=wide, lr=0.1):
        pass

    with pytest.raises(ValueError, match='"8bit" is not allowed for any state of the rule coded_n'):
        Wide([new_param()], state_dtype="8bit")


def test_a_default_of_the_class() -> None:
    class Coded(eo.ScalarOptimizer, rule=coded_average, lr=0.1, state_dtype="8bit"):
        pass

    assert Coded([new_param()]).param_groups[0]["state_dtype"] == "8bit"


# ---- the gallery ---------------------------------------------------------------------------------


@every_coded_rule
def test_what_the_gallery_allows(rule: GalleryRule) -> None:
    codes = dict(zip(rule.states, rule.rule.codes, strict=True))
    assert [name for name, code in codes.items() if code is None] == WIDE.get(rule.name, [])
    signed = {"exp_avg", "exp_avg_diff", "buffer", "previous_grad"}
    for name, code in codes.items():
        assert code in (None, E4M3 if name in signed else UE5M3)


@needs_native
@needs_compiler
@every_coded_rule
def test_gallery_steps(rule: GalleryRule) -> None:
    """Compiled and interpreted steps have the same bits; the fallback, almost everywhere."""

    class Interpreted(eo.ScalarOptimizer, rule=interpreted(rule.rule), lr=0.01):
        pass

    compiled(rule.rule)
    optimizers = [
        rule.optimizer([new_param()], lr=0.01, state_dtype="8bit", fused=True),
        Interpreted([new_param()], state_dtype="8bit", fused=True),
        rule.optimizer([new_param()], lr=0.01, state_dtype="8bit", fused=False),
    ]
    for step in range(1, 6):
        native, other, fallback = (take_steps(optimizer, step) for optimizer in optimizers)
        for name, wanted in native.items():
            assert_equal_bits(other[name], wanted, f"step {step}: interpreted {name}")
            got = fallback[name]
            assert got.dtype == wanted.dtype
            if wanted.dtype == torch.uint8:
                # The formula's operations round differently, which a code shows now and then.
                differ = got != wanted
                assert differ.float().mean() < 1e-3, f"step {step}: {name} in the fallback"
        params = [optimizer.param_groups[0]["params"][0] for optimizer in optimizers]
        assert_equal_bits(params[1], params[0], f"step {step}: interpreted parameter")


@needs_native
@every_coded_rule
@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (1.06, 0.01)], ids=str)
def test_gallery_updates_are_as_large_as_those_of_float32(
    rule: GalleryRule, mean: float, deviation: float
) -> None:
    """Also for gradients that hardly vary, and lie between two codes."""

    def update_size(state_dtype: Any) -> float:
        optimizer = rule.optimizer([new_param()], lr=1.0, weight_decay=0.0, state_dtype=state_dtype)
        (param,) = optimizer.param_groups[0]["params"]
        total = 0.0
        for step in range(1, 201):
            param.grad = grad_of(step).mul_(deviation).add_(mean)
            optimizer.step()
            total += param.detach().double().square().mean().item()
            with torch.no_grad():
                param.zero_()
        return math.sqrt(total)

    assert 0.8 < update_size("8bit") / update_size(torch.float32) < 1.25


# ---- C++ -----------------------------------------------------------------------------------------

in_cpp = pytest.mark.usefixtures("_no_other_rules")


@eo.rule
def blend_in_python(grad, exp_avg: eo.SignedState, *, beta=0.9, correct_bias: bool = True, step):  # type: ignore[no-untyped-def]
    exp_avg = beta * exp_avg + (1 - beta) * grad
    return exp_avg * (1 / (1 - beta**step) if correct_bias else 1.0), exp_avg


@needs_native
@needs_compiler
@in_cpp
def test_a_rule_in_cpp() -> None:
    rule = eo.load_rule(CODED_BLEND, defaults={"beta": 0.9, "correct_bias": True})
    assert rule.codes == (E4M3,)
    assert pickle.loads(pickle.dumps(rule)).codes == (E4M3,)

    class Blend(eo.ScalarOptimizer, rule=rule, lr=0.1, state_dtype="8bit"):
        pass

    class InPython(eo.ScalarOptimizer, rule=blend_in_python, lr=0.1, state_dtype="8bit"):
        pass

    optimizers = [Blend([new_param()]), InPython([new_param()], fused=True)]
    for step in range(1, 6):
        state, wanted = (take_steps(optimizer, step) for optimizer in optimizers)
        assert list(state) == list(wanted) == ["step", "exp_avg", "exp_avg_scale"]
        for name, value in wanted.items():
            assert_equal_bits(state[name], value, f"step {step}: {name}")
    params = [optimizer.param_groups[0]["params"][0] for optimizer in optimizers]
    assert_equal_bits(params[0], params[1], "parameter")


@needs_native
@needs_compiler
@in_cpp
def test_states_in_cpp_that_stay_wide() -> None:
    two = CODED_BLEND.replace('{"exp_avg"}', '{"exp_avg", "largest"}')
    two = two.replace("Real& exp_avg)", "Real& exp_avg, Real& largest)")
    two = two.replace("return unbias", "largest = maximum(largest, grad);\n      return unbias")
    for listed, codes in {
        "{StateCode::kUnsigned, StateCode::kSigned}": (UE5M3, E4M3),
        "{StateCode::kNone, StateCode::kSigned}": (None, E4M3),
    }.items():
        assert eo.load_rule(two.replace("{StateCode::kSigned}", listed)).codes == codes

    class Blend(eo.ScalarOptimizer, rule=eo.load_rule(BLEND), lr=0.1, beta=0.9, correct_bias=True):
        pass

    assert Blend._rule.codes == (None,)
    message = '"8bit" is not allowed for any state of the rule blend; in a rule that you write, li'
    with pytest.raises(ValueError, match=message):
        Blend([new_param()], state_dtype="8bit")
    clash = two.replace("{StateCode::kSigned}", "{StateCode::kSigned, StateCode::kNone}")
    clash = clash.replace('"largest"', '"exp_avg_scale"')
    with pytest.raises(eo.RuleError, match="exp_avg_scale is the key of the scales of exp_avg, wh"):
        eo.load_rule(clash)
    with pytest.raises(eo.RuleError, match="kStateCodes has another length than kStates: list a"):
        eo.load_rule(two)
