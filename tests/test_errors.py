"""Bad input of the update functions: the messages, and that no tensor changes.

Messages are compared word for word, with the native checks and with those of the fallback. No
tensor of the call may have changed.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from oracle import RULES, Rule
from support import calls_in_python
from torch import Tensor

from emerging_optimizers import _rule

Lists = dict[str, list[Tensor]]


@pytest.fixture(params=["native", "fallback"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Use the fallback and its checks instead of the native ones, for `fallback`."""
    if request.param == "fallback":
        monkeypatch.setattr(_rule, "native", None)
        for rule in RULES.values():
            monkeypatch.setattr(*calls_in_python(rule))
    return str(request.param)


@pytest.fixture(params=[rule for rule in RULES.values() if rule.states], ids=str)
def rule(request: pytest.FixtureRequest) -> Rule:
    return request.param


ADAM = RULES["adam"]


def make_lists(rule: Rule, count: int = 4) -> Lists:
    names = ("grad", *rule.states, "out")
    return {name: [torch.rand(3, 4) for _ in range(count)] for name in names}


def call(rule: Rule, lists: dict[str, Any], single: bool = False, **changes: Any) -> Any:
    arguments = {name: value[0] if single else value for name, value in lists.items()}
    return rule.function(**arguments, **(rule.usual | changes))


def bits(tensor: Tensor) -> bytes:
    """All bytes of the storage: the elements around a view must not change either."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        return b""
    return bytes(tensor.untyped_storage())


def assert_refused(
    expected: type[Exception], message: str, lists: dict[str, Any], call: Callable[[], Any]
) -> None:
    tensors = [t for value in lists.values() if not isinstance(value, Tensor) for t in value]
    tensors += [value for value in lists.values() if isinstance(value, Tensor)]
    tensors = [t for t in tensors if isinstance(t, Tensor)]
    before = [(bits(t), t._version if not t.is_inference() else 0) for t in tensors]
    with pytest.raises(expected, match=f"^{re.escape(message)}$") as caught:
        call()
    assert type(caught.value) is expected
    after = [(bits(t), t._version if not t.is_inference() else 0) for t in tensors]
    assert after == before


# ---- tensors -------------------------------------------------------------------------------------
#
# A row: a function that changes one of four positions, the error, and its message, in which {state}
# is the rule's last state. Position 2 or 3 is invalid: earlier positions could have been updated.


def change(name: str, position: int, value: Callable[[Tensor], Tensor]) -> Callable[[Lists], None]:
    def apply(lists: Lists) -> None:
        key = list(lists)[-2] if name == "state" else name
        lists[key][position] = value(lists[key][position])

    return apply


def shorten(name: str) -> Callable[[Lists], None]:
    def apply(lists: Lists) -> None:
        del lists[list(lists)[-2] if name == "state" else name][-1]

    return apply


def share(name: str, position: int, other: str, other_position: int) -> Callable[[Lists], None]:
    def apply(lists: Lists) -> None:
        key, other_key = (list(lists)[-2] if n == "state" else n for n in (name, other))
        lists[key][position] = lists[other_key][other_position]

    return apply


EXPANDED = (
    "overlaps itself in memory (an expanded tensor, with shape (3, 4) and strides {strides}), "
)
EXPANDED += "so it cannot be modified in place; pass a copy of it (.clone())"
ALIAS = "{second} shares memory with {first}, and {first} is modified in place; pass a "
ALIAS += "different tensor for each (only `out` may be `grad`)"
DTYPE = "expected float32, float64, bfloat16 or float16"
LAYOUT = "expected a strided (dense) tensor"


def alias(first: str, second: str) -> str:
    return ALIAS.replace("{first}", first).replace("{second}", second)


TENSOR_ROWS = {
    "state list shorter": (
        shorten("state"), ValueError, "{state}s has 3 tensors but grads has 4"),
    "out list shorter": (shorten("out"), ValueError, "out has 3 tensors but grads has 4"),
    "state shape": (
        change("state", 3, lambda t: t.T.contiguous()), ValueError,
        "{state}s[3] has shape (4, 3) but grads[3] has shape (3, 4)"),
    "same numel, other shape": (
        change("state", 3, lambda t: t.view(12)), ValueError,
        "{state}s[3] has shape (12,) but grads[3] has shape (3, 4)"),
    "out shape": (
        change("out", 2, lambda t: t[0, 0]), ValueError,
        "out[2] has shape () but grads[2] has shape (3, 4)"),
    "integer grad": (
        change("grad", 3, lambda t: t.long()), TypeError, f"grads[3] has dtype int64; {DTYPE}"),
    "bool state": (
        change("state", 3, lambda t: t.bool()), TypeError,
        f"{{state}}s[3] has dtype bool; {DTYPE}"),
    "complex state": (
        change("state", 3, lambda t: t.to(torch.complex64)), TypeError,
        f"{{state}}s[3] has dtype complex64; {DTYPE}"),
    "integer out": (
        change("out", 3, lambda t: t.to(torch.int8)), TypeError, f"out[3] has dtype int8; {DTYPE}"),
    "float8 state": (
        change("state", 3, lambda t: t.to(torch.float8_e4m3fn)), TypeError,
        f"{{state}}s[3] has dtype float8_e4m3fn; {DTYPE}"),
    "quantized grad": (
        change("grad", 3, lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.quint8)), TypeError,
        f"grads[3] has dtype quint8; {DTYPE}"),
    "sparse grad": (
        change("grad", 3, lambda t: t.to_sparse()), TypeError,
        f"grads[3] has layout Sparse; {LAYOUT}"),
    "sparse CSR state": (
        change("state", 3, lambda t: t.to_sparse_csr()), TypeError,
        f"{{state}}s[3] has layout SparseCsr; {LAYOUT}"),
    "meta state": (
        change("state", 3, lambda t: t.to("meta")), TypeError,
        "{state}s[3] is on meta but grads[3] is on cpu"),
    "meta out": (
        change("out", 3, lambda t: t.to("meta")), TypeError,
        "out[3] is on meta but grads[3] is on cpu"),
    "meta position": (
        lambda lists: [t.__setitem__(3, t[3].to("meta")) for t in lists.values()], TypeError,
        "grads[3] is on meta but grads[0] is on cpu"),
    "no memory": (
        lambda lists: lists["grad"][3].untyped_storage().resize_(0), ValueError,
        "grads[3] has no memory: its storage was resized to 0"),
    "expanded state": (
        change("state", 3, lambda t: t[:1].clone().expand(3, 4)), ValueError,
        "{state}s[3] " + EXPANDED.replace("{strides}", "(0, 1)")),
    "expanded out": (
        change("out", 3, lambda t: t[0, 0].clone().expand(3, 4)), ValueError,
        "out[3] " + EXPANDED.replace("{strides}", "(0, 0)")),
    "overlapping windows": (
        change("state", 3, lambda t: t.as_strided((3, 4), (1, 1))), ValueError,
        "{state}s[3] " + EXPANDED.replace("{strides}", "(1, 1)")),
    "state twice": (share("state", 3, "state", 1), ValueError, alias("{state}s[1]", "{state}s[3]")),
    "state is grad": (share("state", 3, "grad", 3), ValueError, alias("{state}s[3]", "grads[3]")),
    "state is another grad": (
        share("state", 3, "grad", 0), ValueError, alias("{state}s[3]", "grads[0]")),
    "out is state": (share("out", 3, "state", 3), ValueError, alias("out[3]", "{state}s[3]")),
    "out twice": (share("out", 3, "out", 0), ValueError, alias("out[0]", "out[3]")),
    "out is another grad": (share("out", 3, "grad", 0), ValueError, alias("out[3]", "grads[0]")),
    "out views grad otherwise": (
        lambda lists: lists["out"].__setitem__(3, lists["grad"][3].view(torch.bfloat16)[:, :4]),
        ValueError, alias("out[3]", "grads[3]")),
    "out starts where grad does": (
        lambda lists: (
            lists["grad"].__setitem__(3, torch.rand(4, 4).T[:3]),
            lists["out"].__setitem__(3, lists["grad"][3].as_strided((3, 4), (4, 1))),
        ),
        ValueError, alias("out[3]", "grads[3]")),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("row", TENSOR_ROWS)
def test_tensors(path: str, rule: Rule, row: str) -> None:
    modify, error, message = TENSOR_ROWS[row]
    lists = make_lists(rule)
    modify(lists)
    message = message.replace("{state}", rule.states[-1])
    assert_refused(error, message, lists, lambda: call(rule, lists))


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if not rule.states], ids=str)
@pytest.mark.parametrize(
    "row", [row for row, values in TENSOR_ROWS.items() if "{state}" not in values[2]]
)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_tensors_without_states(path: str, name: str, row: str) -> None:
    modify, error, message = TENSOR_ROWS[row]
    lists = make_lists(RULES[name])
    modify(lists)
    assert_refused(error, message, lists, lambda: call(RULES[name], lists))


def test_first_state_is_named_where_there_is_no_out(path: str, rule: Rule) -> None:
    """Without `out`, updates are created like the first state, so the message names that."""
    name = rule.states[0]
    for wrong, error, message in [
        (torch.rand(4, 3), ValueError, "{name} has shape (4, 3) but {grad} has shape (3, 4)"),
        (torch.rand(3, 4, device="meta"), TypeError, "{name} is on meta but {grad} is on cpu"),
    ]:
        lists = make_lists(rule)
        del lists["out"]
        lists[name][3] = wrong
        text = message.format(name=f"{name}s[3]", grad="grads[3]")
        assert_refused(error, text, lists, lambda lists=lists: call(rule, lists))
        lists = {key: tensors[3:] for key, tensors in lists.items()}
        text = message.format(name=name, grad="grad")
        assert_refused(error, text, lists, lambda lists=lists: call(rule, lists, single=True))


def test_without_out(path: str, rule: Rule) -> None:
    for name, modify, message in [
        ("grad", lambda t: t.to(torch.float8_e5m2), "grads[3] has dtype float8_e5m2; " + DTYPE),
        ("grad", lambda t: t.int(), "grads[3] has dtype int32; " + DTYPE),
        (rule.states[0], lambda t: t.to_sparse(), f"{rule.states[0]}s[3] has layout Sparse; "
         + LAYOUT),
    ]:  # fmt: skip
        lists = make_lists(rule)
        del lists["out"]
        lists[name][3] = modify(lists[name][3])
        assert_refused(TypeError, message, lists, lambda lists=lists: call(rule, lists))


def test_single_tensors_are_named_so(path: str, rule: Rule) -> None:
    state = rule.states[-1]
    lists = make_lists(rule, 1)
    lists[state] = [torch.rand(4, 3)]
    message = f"{state} has shape (4, 3) but grad has shape (3, 4)"
    assert_refused(ValueError, message, lists, lambda: call(rule, lists, single=True))
    lists[state] = [lists["grad"][0]]
    message = alias(state, "grad")
    assert_refused(ValueError, message, lists, lambda: call(rule, lists, single=True))
    lists["grad"] = [torch.rand(3, 4).to_sparse()]
    message = "grad has layout Sparse; " + LAYOUT
    assert_refused(TypeError, message, lists, lambda: call(rule, lists, single=True))


def test_list_mixed_with_single(path: str, rule: Rule) -> None:
    advice = "; pass all of them as Tensors, or all as sequences of Tensors"
    for name in (rule.states[0], "out"):
        lists: dict[str, Any] = make_lists(rule, 1)
        lists[name] = lists[name][0]
        message = f"{name} is a single Tensor but grad is a sequence" + advice
        assert_refused(ValueError, message, lists, lambda lists=lists: call(rule, lists))
    lists = make_lists(rule, 1)
    lists["grad"] = lists["grad"][0]
    message = f"{rule.states[0]} is a sequence but grad is a single Tensor" + advice
    assert_refused(ValueError, message, lists, lambda: call(rule, lists))


@pytest.mark.parametrize("wrong", [None, 1.0, "tensor", {"a": 1}, torch.float32])
def test_not_tensors(path: str, rule: Rule, wrong: Any) -> None:
    lists: dict[str, Any] = make_lists(rule)
    lists[rule.states[0]] = wrong
    message = (
        f"{rule.states[0]} must be a Tensor or a sequence of Tensors, not {type(wrong).__name__}"
    )
    with pytest.raises(TypeError) as caught:
        call(rule, lists)
    assert str(caught.value).replace("torch.dtype", "dtype") == message
    lists = make_lists(rule)
    lists["grad"][3] = wrong
    with pytest.raises(TypeError, match=r"^grads\[3\] must be a Tensor, not "):
        call(rule, lists)


def test_inference_tensors_outside_of_inference_mode(path: str, rule: Rule) -> None:
    lists = make_lists(rule)
    with torch.inference_mode():
        lists[rule.states[0]][3] = torch.rand(3, 4)
    message = (
        f"{rule.states[0]}s[3] is an inference tensor, which cannot be modified outside of"
        " inference mode"
    )
    assert_refused(RuntimeError, message, lists, lambda: call(rule, lists))


@pytest.mark.builtin_rules("only Signum scales by the shape")
def test_shape_scaling_of_other_than_matrices(path: str) -> None:
    for shape, dimensions in (((12,), 1), ((3, 2, 2), 3), ((), 0)):
        lists = make_lists(RULES["signum"])
        for tensors in lists.values():
            tensors[3] = torch.rand(shape)
        message = f"grads[3] has {dimensions} dimensions; use_shape_scaling needs 2"
        assert_refused(
            ValueError,
            message,
            lists,
            lambda lists=lists: call(RULES["signum"], lists, use_shape_scaling=True),
        )


@pytest.mark.builtin_rules("only Signum scales by the shape")
def test_shape_scaling_of_empty_matrices(path: str) -> None:
    lists = make_lists(RULES["signum"])
    for tensors in lists.values():
        tensors[1] = torch.empty(0, 0)
    assert call(RULES["signum"], lists, use_shape_scaling=True)[1].shape == (0, 0)


def test_different_devices(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fallback's check, with a tensor that reports another device."""

    class Elsewhere(Tensor):
        device = torch.device("xpu")

    monkeypatch.setattr(_rule, "native", None)
    monkeypatch.setattr(*calls_in_python(rule))
    lists = make_lists(rule)
    lists[rule.states[-1]][3] = lists[rule.states[-1]][3].as_subclass(Elsewhere)
    message = f"{rule.states[-1]}s[3] is on xpu but grads[3] is on cpu"
    assert_refused(ValueError, message, lists, lambda: call(rule, lists))


def test_allowed_aliases(path: str, rule: Rule) -> None:
    """Empty tensors never alias, gradients may repeat, and `out` may be `grad`."""
    lists = make_lists(rule)
    empty = torch.empty(0, 4)
    for tensors in lists.values():
        tensors[0] = tensors[1] = empty
    lists["grad"][3] = lists["grad"][2]
    call(rule, lists)
    lists = make_lists(rule)
    lists["out"] = [grad.view_as(grad) for grad in lists["grad"]]
    call(rule, lists)


def test_interleaved_but_not_overlapping(path: str, rule: Rule) -> None:
    state = torch.zeros(16).as_strided((2, 3), (3, 2))  # offsets 0 2 4 3 5 7
    lists = {name: [torch.rand(2, 3)] for name in ("grad", *rule.states)}
    lists[rule.states[0]] = [state]
    wanted = {name: [t.clone() for t in tensors] for name, tensors in lists.items()}
    updates, wanted_updates = call(rule, lists), call(rule, wanted)
    assert torch.equal(updates[0], wanted_updates[0])
    assert torch.equal(state, wanted[rule.states[0]][0])


# ---- scalars -------------------------------------------------------------------------------------

STEP_1 = "; expected step >= 1 (with bias correction, steps count from 1)"
NAN = float("nan")
SCALAR_ROWS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("adam", {"step": 0}, ValueError, "step is 0" + STEP_1),
    ("adam", {"step": -3, "correct_bias": False}, ValueError, "step is -3; expected step >= 0"),
    ("adam", {"step": torch.tensor(0)}, ValueError, "step is 0" + STEP_1),
    ("adam", {"step": torch.tensor(-1.0)}, ValueError, "step is -1" + STEP_1),
    ("adam", {"step": NAN}, ValueError, "step is nan; expected a whole number"),
    ("adam", {"step": torch.tensor(NAN)}, ValueError, "step is nan; expected a whole number"),
    ("adam", {"step": float("inf")}, TypeError, "step is inf; expected a whole number"),
    ("adam", {"step": torch.tensor(float("inf"))}, TypeError,
     "step is inf; expected a whole number"),
    ("adam", {"step": 10**30}, ValueError, "step is beyond the range of int64"),
    ("adam", {"step": -100000, "correct_bias": False}, ValueError,
     "step is -100000; expected step >= 0"),
    ("adam", {"eps": 10**400}, TypeError, "eps must be a number, not int"),
    ("adam", {"eps": torch.ones(2)}, TypeError, "eps must be a number, not Tensor"),
    ("adam", {"step": 2.5}, TypeError, "step is 2.5; expected a whole number"),
    ("adam", {"step": torch.tensor(2.5)}, TypeError, "step is 2.5; expected a whole number"),
    ("adam", {"step": "1"}, TypeError,
     "step must be an int, not str ('1'); convert it with float()"),
    ("adam", {"step": None}, TypeError, "step must be an int, not NoneType"),
    ("adam", {"step": torch.ones(1)}, TypeError,
     "step is a tensor of dtype float32 with 1 dimensions; expected an int or a 0-dim tensor of"
     " dtype int64 or float32"),
    ("adam", {"step": torch.tensor(1, dtype=torch.int32)}, TypeError,
     "step is a tensor of dtype int32 with 0 dimensions; expected an int or a 0-dim tensor of"
     " dtype int64 or float32"),
    ("adam", {"betas": (1.0, 0.9)}, ValueError, "betas[0] is 1; expected 0 <= betas[0] < 1"),
    ("adam", {"betas": (0.9, -0.1)}, ValueError, "betas[1] is -0.1; expected 0 <= betas[1] < 1"),
    ("adam", {"betas": (0.9, NAN)}, ValueError, "betas[1] is nan; expected 0 <= betas[1] < 1"),
    ("adam", {"betas": (0.9,)}, ValueError, "betas has 1 values; expected 2"),
    ("adam", {"betas": (0.9, 0.9, 0.9)}, ValueError, "betas has 3 values; expected 2"),
    ("adam", {"betas": 0.9}, TypeError,
     "betas must be a sequence of numbers, not float (0.9)"),
    ("adam", {"betas": "0.9"}, TypeError,
     "betas must be a sequence of numbers, not str ('0.9')"),
    ("adam", {"betas": (0.9, "0.9")}, TypeError,
     "betas[1] must be a number, not str ('0.9'); convert it with float()"),
    ("adam", {"betas": None}, TypeError, "betas must be a sequence of numbers, not NoneType"),
    ("adam", {"betas": np.float32(0.9)}, TypeError,
     "betas must be a sequence of numbers, not float32"),
    ("adam", {"betas": torch.tensor(0.9)}, TypeError,
     "betas must be a sequence of numbers, not Tensor"),
    ("adam", {"betas": list}, TypeError, "betas must be a sequence of numbers, not type"),
    ("adam", {"eps": -1e-8}, ValueError, "eps is -1e-08; expected eps >= 0"),
    ("adam", {"eps": NAN}, ValueError, "eps is nan; expected eps >= 0"),
    ("adam", {"eps": "1e-8"}, TypeError,
     "eps must be a number, not str ('1e-8'); YAML reads 1e-8 as text: write 1.0e-8, or convert it"
     " with float()"),
    ("adam", {"eps": None}, TypeError, "eps must be a number, not NoneType"),
    ("adam", {"correct_bias": None}, TypeError, "correct_bias must be a bool, not NoneType"),
    ("adam", {"use_nesterov": "yes"}, TypeError, "use_nesterov must be a bool, not str ('yes')"),
    ("adam", {"eps": " 5E5 "}, TypeError,
     "eps must be a number, not str (' 5E5 '); YAML reads 5E5 as text: write 5.0e+5, or convert it"
     " with float()"),
    ("adam", {"eps": "1.5e-8"}, TypeError,
     "eps must be a number, not str ('1.5e-8'); convert it with float()"),
    ("adam", {"eps": np.str_("1e-8")}, TypeError,
     "eps must be a number, not str_ ('1e-8'); YAML reads 1e-8 as text: write 1.0e-8, or convert"
     " it with float()"),
    ("adam", {"eps": "small"}, TypeError, "eps must be a number, not str ('small')"),
    ("adam", {"eps": "1" * 41}, TypeError, "eps must be a number, not str"),
    ("adam", {"eps": b"1"}, TypeError, "eps must be a number, not bytes"),
    ("adam", {"eps": np.bytes_(b"1")}, TypeError, "eps must be a number, not bytes_"),
    ("adam", {"eps": torch.tensor(1.0, device="meta")}, TypeError,
     "eps must be a number, not Tensor"),
    ("adam", {"betas": torch.empty(2, device="meta")}, TypeError,
     "betas[0] must be a number, not Tensor"),
    ("adam", {"betas": "ab", "eps": "1"}, TypeError,
     "betas must be a sequence of numbers, not str ('ab')"),
    ("adam", {"eps": [1e-8]}, TypeError, "eps must be a number, not list"),
    ("adam", {"correct_bias": 1}, TypeError, "correct_bias must be a bool, not int (1)"),
    ("adam", {"correct_bias": -0.0}, TypeError, "correct_bias must be a bool, not float (-0.0)"),
    ("adam", {"correct_bias": 10**400}, TypeError, "correct_bias must be a bool, not int"),
    ("laprop", {"step": 0}, ValueError, "step is 0" + STEP_1),
    ("laprop", {"betas": (0.9, 1.5)}, ValueError, "betas[1] is 1.5; expected 0 <= betas[1] < 1"),
    ("laprop", {"eps": -1.0}, ValueError, "eps is -1; expected eps >= 0"),
    ("lion", {"momentum_beta": 1.0}, ValueError,
     "momentum_beta is 1; expected 0 <= momentum_beta < 1"),
    ("lion", {"momentum_beta2": -0.5}, ValueError,
     "momentum_beta2 is -0.5; expected 0 <= momentum_beta2 < 1"),
    ("lion", {"momentum_beta": NAN, "momentum_beta2": 0.9}, ValueError,
     "momentum_beta is nan; expected 0 <= momentum_beta < 1"),
    ("lion", {"momentum_beta": None, "momentum_beta2": 0.9}, TypeError,
     "momentum_beta must be a number, not NoneType"),
    ("lion", {"momentum_beta": "0.9"}, TypeError,
     "momentum_beta must be a number, not str ('0.9'); convert it with float()"),
    ("signum", {"step": 0}, ValueError, "step is 0" + STEP_1),
    ("signum", {"momentum_beta": 1.0}, ValueError,
     "momentum_beta is 1; expected 0 <= momentum_beta < 1"),
    ("signum", {"use_shape_scaling": None}, TypeError,
     "use_shape_scaling must be a bool, not NoneType"),
    ("ademamix", {"step": 0}, ValueError, "step is 0" + STEP_1),
    ("ademamix", {"betas": (0.9, 0.999)}, ValueError, "betas has 2 values; expected 3"),
    ("ademamix", {"betas": (0.9, 0.999, 1.0)}, ValueError,
     "betas[2] is 1; expected 0 <= betas[2] < 1"),
    ("ademamix", {"num_beta_slow_warmup_steps": -1}, ValueError,
     "num_beta_slow_warmup_steps is -1; expected num_beta_slow_warmup_steps >= 0"),
    ("ademamix", {"num_alpha_warmup_steps": -7}, ValueError,
     "num_alpha_warmup_steps is -7; expected num_alpha_warmup_steps >= 0"),
    ("ademamix", {"num_alpha_warmup_steps": 1.5}, TypeError,
     "num_alpha_warmup_steps is 1.5; expected a whole number"),
    ("ademamix", {"num_alpha_warmup_steps": "10"}, TypeError,
     "num_alpha_warmup_steps must be a whole number or None, not str ('10'); convert it with"
     " float()"),
    ("ademamix", {"num_alpha_warmup_steps": torch.tensor(10, device="meta")}, TypeError,
     "num_alpha_warmup_steps must be a whole number or None, not Tensor"),
    ("ademamix", {"num_alpha_warmup_steps": NAN}, ValueError,
     "num_alpha_warmup_steps is nan; expected a whole number"),
    ("ademamix", {"betas": (0.9, 0.999, 1 - 1e-9), "num_beta_slow_warmup_steps": 10}, ValueError,
     "betas[2] is too close to 1 to be warmed up: expected betas[2] + 1e-8 < 1; pass None as the"
     " number of warm-up steps to use it from the first step"),
    ("ademamix", {"betas": (1 - 1e-9, 0.999, 0.9999), "num_beta_slow_warmup_steps": 10}, ValueError,
     "betas[0] is too close to 1 to be warmed up: expected betas[0] + 1e-8 < 1; pass None as the"
     " number of warm-up steps to use it from the first step"),
    ("ademamix", {"alpha": NAN}, ValueError, "alpha is nan; expected a number"),
    ("ademamix", {"alpha": None}, TypeError, "alpha must be a number, not NoneType"),
    ("ademamix", {"eps": -1.0}, ValueError, "eps is -1; expected eps >= 0"),
    ("sim_ademamix", {"min_beta_fast": 1.0}, ValueError,
     "min_beta_fast is 1; expected 0 <= min_beta_fast < 1"),
    ("sim_ademamix", {"min_beta_fast": NAN}, ValueError,
     "min_beta_fast is nan; expected 0 <= min_beta_fast < 1"),
    ("sim_ademamix", {"num_beta_fast_warmup_steps": -1}, ValueError,
     "num_beta_fast_warmup_steps is -1; expected num_beta_fast_warmup_steps >= 0"),
    ("sim_ademamix", {"betas": (1 - 1e-9, 0.999), "num_beta_fast_warmup_steps": 10}, ValueError,
     "betas[0] is too close to 1 to be warmed up: expected betas[0] + 1e-8 < 1; pass None as the"
     " number of warm-up steps to use it from the first step"),
    ("sim_ademamix", {"min_beta_fast": 1 - 1e-9, "num_beta_fast_warmup_steps": 10}, ValueError,
     "min_beta_fast is too close to 1 to be warmed up: expected min_beta_fast + 1e-8 < 1; pass"
     " None as the number of warm-up steps to use it from the first step"),
    ("sim_ademamix", {"alpha": NAN}, ValueError, "alpha is nan; expected a number"),
    ("sim_ademamix", {"step": 0}, ValueError, "step is 0" + STEP_1),
]  # fmt: skip


@pytest.mark.parametrize("single", [False, True], ids=["list", "single"])
@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [pytest.param(*row, id=f"{row[0]}-{row[1]}") for row in SCALAR_ROWS if row[0] in RULES],
)
def test_scalars(
    path: str,
    name: str,
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
    single: bool,
) -> None:
    lists = make_lists(RULES[name])
    refused = lambda: call(RULES[name], lists, single=single, **changes)  # noqa: E731
    assert_refused(error, message, lists, refused)


def test_a_step_without_a_value(path: str) -> None:
    lists = make_lists(ADAM)
    refused = lambda: call(ADAM, lists, step=torch.tensor(3, device="meta"))  # noqa: E731
    assert_refused(TypeError, "step is on meta but grads[0] is on cpu", lists, refused)


def test_scalars_are_checked_without_tensors(path: str) -> None:
    for changes in ({"betas": (1.0, 0.9)}, {"step": 0}, {"eps": -1.0}):
        with pytest.raises(ValueError, match="expected"):
            call(ADAM, make_lists(ADAM, 0), **changes)


def test_operators_check_scalars_too() -> None:
    """Calls through torch.ops bypass the Python wrappers."""
    lists = make_lists(ADAM)
    with pytest.raises(ValueError, match=re.escape("betas has 3 values; expected 2")):
        ADAM.operator(
            lists["out"], *list(lists.values())[:-1], [0.9, 0.9, 0.9], True, False, 1, 1e-8
        )


# ---- what is accepted ----------------------------------------------------------------------------


def test_numbers_of_other_types(path: str) -> None:
    def update(**changes: Any) -> list[Tensor]:
        torch.manual_seed(0)
        return list(call(ADAM, make_lists(ADAM), **changes))

    wanted = update(step=3, betas=(0.5, 0.25), eps=0.5)
    for changes in (
        {"step": np.int32(3), "betas": np.array([0.5, 0.25]), "eps": np.float32(0.5)},
        {"step": 3.0, "betas": [0.5, 0.25], "eps": torch.tensor(0.5)},
        {"step": np.float64(3), "betas": torch.tensor([0.5, 0.25]), "eps": 0.5},
        {
            "step": torch.tensor(3.0),
            "correct_bias": np.bool_(True),
            "betas": (0.5, 0.25),
            "eps": 0.5,
        },
        {"step": torch.tensor(3), "betas": (0.5, 0.25), "eps": 0.5},
    ):
        for got, expected in zip(update(**changes), wanted, strict=True):
            assert torch.equal(got, expected)


@pytest.mark.builtin_rules("a special case of AdEMAMix")
def test_zero_warmup_steps_are_none(path: str) -> None:
    rule = RULES["ademamix"]
    lists = make_lists(rule)
    others = {name: [t.clone() for t in tensors] for name, tensors in lists.items()}
    # Without warm-up steps, a beta this close to 1 is valid.
    changes = {"betas": (0.9, 0.999, 1 - 1e-9)}
    zero = {"num_beta_slow_warmup_steps": 0, "num_alpha_warmup_steps": 0}
    none = {"num_beta_slow_warmup_steps": None, "num_alpha_warmup_steps": None}
    got, wanted = call(rule, lists, **changes, **zero), call(rule, others, **changes, **none)
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)
