"""What a rule may have beyond the built-in ones: cases, steps without an update, optional and whole
hyperparameters, steps that count from 1, and an operator namespace of its own.
"""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import plugins
import pytest
import torch
from optimizers import METHODS, assert_same, contents, make_params, run
from support import assert_equal_bits, needs_native, run_python
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from emerging_optimizers._hyperparameters import Beta, NonNegative, Step
from emerging_optimizers._native import native
from emerging_optimizers._rule import Rule
from emerging_optimizers.megatron import MegatronMixin
from emerging_optimizers.scalar_optimizers import ScalarOptimizer

pytestmark = [
    pytest.mark.on_devices("tests-cuda"),
    needs_native,
    pytest.mark.skipif("sys.platform == 'win32'", reason="compiles by c++"),
]

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DEFAULTS: dict[str, Any] = {"beta": 0.5, "patience": 2, "limit": None}
# The cases of the rule at step 2.
CASES: dict[str, dict[str, Any]] = {
    "waits": {},
    "is free": {"patience": 1},
    "clips": {"patience": 0.0, "limit": 0.5},
}
every_case = pytest.mark.parametrize("case", list(CASES))


def _patient_descent(
    grad: Tensor,
    average: Tensor,
    beta: Beta,
    patience: int,
    limit: NonNegative | None,
    step: Step,
) -> Tensor | None:
    """The formula of PatientDescent in tests/cpp/plugin_rules.h."""
    average.mul_(beta).add_((1 - beta) * grad)
    if step <= patience:
        return None
    return average.clone() if limit is None else average.clamp(-limit, limit)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = plugins.library_path(tmp_path_factory.mktemp("patient"), "patient")
    has_kernels = plugins.IS_EMULATED
    return plugins.compile_rules(
        ["plugin_rules.h"], ["PatientDescent"], path, "-O1", has_kernels=has_kernels
    )


@pytest.fixture(scope="module")
def rule(library: Path) -> Rule:
    assert native is not None
    native._load_rule(str(library), "PatientDescent")
    return Rule("patient_descent", _patient_descent, lowest_step=1)


@pytest.fixture(scope="module")
def without_kernels() -> Rule:
    return Rule("impatient_descent", _patient_descent, lowest_step=1)


def call(rule: Rule, grad: Any, average: Any, out: Any = None, step: Any = 2, **case: Any) -> Any:
    options = {**DEFAULTS, **case}
    return rule.entry_point()(grad, average, *options.values(), step, out)


def operands(*dtypes: torch.dtype) -> tuple[Tensor, ...]:
    # Multiples of 1/8, whose averages are exact in every dtype; one gradient is NaN.
    grad = (torch.arange(-12.0, 12.0) / 8).reshape(4, 6)
    grad[1, 2] = math.nan
    return grad.to(dtypes[0]), torch.full_like(grad, 0.25, dtype=dtypes[-1])


# ---- functions -----------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize(
    "dtypes", [(F32,), (F64,), (BF16,), (F16,), (BF16, F32), (F32, BF16), (F64, F16)], ids=str
)
@pytest.mark.parametrize("out", ["none", "given", "grad"])
def test_functions(
    case: str, dtypes: Sequence[torch.dtype], out: str, rule: Rule, without_kernels: Rule
) -> None:
    grad, average = operands(*dtypes)
    wanted_average = average.double()
    wanted = rule.formula(grad.double(), wanted_average, **{**DEFAULTS, **CASES[case]}, step=2)
    if wanted is None:
        wanted = torch.zeros_like(wanted_average)  # even where the gradient is NaN
    for each in (rule, without_kernels):
        grad, average = operands(*dtypes)
        given = {"none": None, "given": torch.full_like(grad, 7.0), "grad": grad}[out]
        update = call(each, grad, average, given, **CASES[case])
        dtype = torch.promote_types(*dtypes) if given is None and len(dtypes) > 1 else grad.dtype
        assert_equal_bits(update, wanted.to(dtype), f"{each.name}: update")
        assert_equal_bits(average, wanted_average.to(average.dtype), f"{each.name}: average")
        assert given is None or update is given


def test_lists(rule: Rule, without_kernels: Rule) -> None:
    for each in (rule, without_kernels):
        pairs = [operands(F32), operands(BF16), operands(F64)]
        grads, averages = (list(tensors) for tensors in zip(*pairs, strict=True))
        for update, grad in zip(call(each, grads, averages), grads, strict=True):
            assert_equal_bits(update, torch.zeros_like(grad), each.name)


@pytest.mark.once
@every_case
def test_tracers(case: str, rule: Rule) -> None:
    def function(grad: Tensor, average: Tensor) -> Any:
        return call(rule, grad, average, **CASES[case])

    wanted = operands(F32)
    expected = function(*wanted)
    fx = make_fx(function, tracing_mode="fake")(*operands(F32))
    for traced in (fx, torch.compile(function, backend="eager", fullgraph=True)):
        got = operands(F32)
        assert_equal_bits(traced(*got), expected, "update")
        assert_equal_bits(got[1], wanted[1], "average")
    assert "float? limit" in str(
        torch.ops.emerging_optimizers.patient_descent_update_.default._schema
    )


class Refused(NamedTuple):
    case: dict[str, Any]
    error: type[Exception]
    message: str


REFUSED = [
    Refused({"step": 0}, ValueError, "step is 0; expected step >= 1 (steps count from 1)"),
    Refused({"step": -2}, ValueError, "step is -2; expected step >= 1 (steps count from 1)"),
    Refused(
        {"step": torch.tensor(0)}, ValueError, "step is 0; expected step >= 1 (steps count from 1)"
    ),
    Refused({"patience": 2.5}, ValueError, "patience is 2.5; expected a whole number"),
    Refused({"patience": math.nan}, ValueError, "patience is nan; expected a whole number"),
    Refused({"patience": math.inf}, ValueError, "patience is inf; expected a whole number"),
    Refused({"patience": None}, TypeError, "patience must be a number, not NoneType"),
    Refused({"limit": "a"}, TypeError, "limit must be a number or None, not str ('a')"),
    Refused({"limit": [1.0]}, TypeError, "limit must be a number or None, not list"),
    Refused(
        {"limit": "0.5"},
        TypeError,
        "limit must be a number or None, not str ('0.5'); convert it with float()",
    ),
    Refused({"limit": -0.5}, ValueError, "limit is -0.5; expected limit >= 0"),
    Refused({"limit": math.nan}, ValueError, "limit is nan; expected limit >= 0"),
]


@pytest.mark.parametrize("refused", REFUSED, ids=lambda refused: str(refused.case))
def test_errors(refused: Refused, rule: Rule, without_kernels: Rule) -> None:
    for each in (rule, without_kernels):
        grad, average = operands(F32)
        before = average.clone()
        with pytest.raises(refused.error, match=f"^{re.escape(refused.message)}$"):
            call(each, grad, average, **refused.case)
        assert_equal_bits(average, before, each.name)


# ---- optimizers ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def make(rule: Rule) -> Callable[..., ScalarOptimizer]:
    class Patient(ScalarOptimizer):
        _rule = rule

        def __init__(self, params: Any, **options: Any) -> None:
            own = {"lr": 0.5, "weight_decay": 0.25, "weight_decay_method": "decoupled", **DEFAULTS}
            own.update({name: options.pop(name) for name in list(options) if name in own})
            super().__init__(params, own, options)  # type: ignore[arg-type]

    class WithRemainders(MegatronMixin, Patient): ...

    def make(params: Any, **options: Any) -> ScalarOptimizer:
        cls = WithRemainders if "store_param_remainders" in options else Patient
        return cls(params, **options)

    return make


STEP_OPTIONS: list[tuple[torch.dtype, dict[str, Any]]] = [
    *((F32, {"weight_decay_method": method}) for method in METHODS),
    (F32, {"capturable": True, "maximize": True}),
    (F32, {"state_dtype": BF16}),
    (F64, {}),
    (BF16, {}),
    (BF16, {"master_weights": True}),
    (BF16, {"master_weights": True, "store_param_remainders": True}),
    (F16, {"master_weights": True, "capturable": True}),
    (BF16, {"stochastic_rounding": True}),
    (F16, {"stochastic_rounding": True, "state_dtype": F32}),
    (torch.complex64, {}),
]


@pytest.mark.parametrize(("dtype", "options"), STEP_OPTIONS, ids=str)
def test_steps(
    dtype: torch.dtype, options: dict[str, Any], make: Callable[..., ScalarOptimizer]
) -> None:
    """Two steps leave weights as they are and average gradients; the others do as usual."""
    found = []
    for fused in (None, False):
        torch.manual_seed(3)
        params = make_params(dtype=dtype)
        start = [param.detach().clone() for param in params]
        optimizer = make(params, limit=0.75, fused=fused, **options)
        masters: list[Tensor] = []
        for step in (1, 2):
            run(optimizer, params, [step])
            assert_same([param.detach() for param in params], start, f"step {step}, {fused}")
            states = [optimizer.state[param] for param in params]
            now = [state["master_param"].clone() for state in states if "master_param" in state]
            assert_same(now, masters or now)
            masters = now
            assert all(state["average"].abs().min() > 0 for state in states)
        assert len(masters) == (len(params) if options.get("master_weights") else 0)
        run(optimizer, params, [3, 4])
        for param, first in zip(params, start, strict=True):
            assert not torch.equal(param, first)
        found.append(contents(optimizer))
    if dtype != F64:
        assert_same(*found, label=f"{dtype} {options}")
    else:
        torch.testing.assert_close(*found, rtol=1e-14, atol=1e-14)


def test_weights_are_kept_where_gradients_are_not_numbers(
    make: Callable[..., ScalarOptimizer], fused: bool | None
) -> None:
    """L2 decay enters the gradient that the average sees."""
    param = nn.Parameter(torch.tensor([1.0, -2.0, 4.0, math.inf]))
    optimizer = make([param], weight_decay_method="l2", fused=fused)
    param.grad = torch.tensor([3.0, math.nan, math.inf, 0.0])
    before = param.detach().clone()
    optimizer.step()
    assert_equal_bits(param.detach(), before, "parameter")
    average = optimizer.state[param]["average"]
    assert_equal_bits(average, torch.tensor([1.625, math.nan, math.inf, math.inf]), "average")


@pytest.mark.parametrize("capturable", [False, True])
def test_parameters_count_their_own_steps(
    make: Callable[..., ScalarOptimizer], fused: bool | None, capturable: bool
) -> None:
    """One parameter waits while another, which has taken more steps, moves."""
    early, late = params = [nn.Parameter(torch.ones(3, 5)) for _ in range(2)]
    optimizer = make(params, fused=fused, capturable=capturable)
    for step in range(1, 5):
        early.grad = torch.ones(3, 5)
        late.grad = torch.ones(3, 5) if step > 2 else None
        before = [param.detach().clone() for param in params]
        optimizer.step()
        moved = [bool((p != b).all()) for p, b in zip(params, before, strict=True)]
        assert moved == [step > 2, False]
    assert [int(optimizer.state[param]["step"]) for param in params] == [4, 2]
    assert_equal_bits(late.detach(), torch.ones(3, 5), "parameter")


def test_groups_have_values_of_their_own(make: Callable[..., ScalarOptimizer]) -> None:
    params = make_params()
    groups = [{"params": params[:1]}, {"params": params[1:], "patience": 0, "limit": 0.125}]
    optimizer = make(groups, fused=True, weight_decay=0.0)
    start = [param.detach().clone() for param in params]
    run(optimizer, params, [1])
    assert_equal_bits(params[0].detach(), start[0], "the first group's")
    moved = (params[1].detach() - start[1]).abs()
    assert 0 < moved.max() <= 0.5 * 0.125 + 1e-6
    saved = optimizer.state_dict()["param_groups"]
    assert [(group["patience"], group["limit"]) for group in saved] == [(2, None), (0, 0.125)]


GROUP_ROWS: list[tuple[str, Any, type[Exception], str]] = [
    ("patience", 2.5, ValueError, "Invalid patience: 2.5"),
    ("patience", math.inf, ValueError, "Invalid patience: inf"),
    ("limit", "a", TypeError, "limit must be a number or None, not str ('a')"),
    ("limit", math.nan, ValueError, "Invalid limit: nan"),
    ("limit", -1.0, ValueError, "Invalid limit: -1.0"),
]


@pytest.mark.parametrize(("key", "value", "error", "message"), GROUP_ROWS, ids=str)
def test_groups_are_checked(
    key: str,
    value: Any,
    error: type[Exception],
    message: str,
    make: Callable[..., ScalarOptimizer],
    fused: bool | None,
) -> None:
    params = make_params()
    with pytest.raises(error, match=re.escape(message)):
        make(params, **{key: value})
    optimizer = make(params, fused=fused)
    before = contents(optimizer)
    optimizer.param_groups[0][key] = value  # as a scheduler might
    with pytest.raises(error, match=re.escape(key)):
        run(optimizer, params, [1])
    assert_same(contents(optimizer), before)


@pytest.mark.cuda
@pytest.mark.parametrize("options", [{}, {"capturable": True}, {"master_weights": True}], ids=str)
def test_cuda_tensors(options: dict[str, Any], make: Callable[..., ScalarOptimizer]) -> None:
    """The case is chosen on the device if the steps are counted there."""
    found = []
    for device in ("cpu", "cuda"):
        with torch.device(device):
            params = make_params([(19, 131), (3, 4)], dtype=BF16)
            optimizer = make(params, limit=0.75, **options)
            start = [param.detach().clone() for param in params]
            run(optimizer, params, [1, 2])
            assert_same([param.detach() for param in params], start, device)
            run(optimizer, params, [3, 4])
            found.append([tensor.cpu() for tensor in contents(optimizer)])
    assert_same(*found)


# ---- loading -------------------------------------------------------------------------------------


@pytest.mark.once
def test_a_namespace_of_its_own(library: Path) -> None:
    assert native is not None
    before = set(native.rules), set(dir(native))
    arguments = (str(library), "PatientDescent", "rules_of_tests", "wait")
    _, enter = native._load_rule(*arguments)
    assert (set(native.rules), set(dir(native))) == before
    assert enter.__name__ == "wait"
    operator = torch.ops.rules_of_tests.wait_update_
    grad, average = operands(F32)
    expected = average.clone()
    update = enter(grad, average, 0.5, 1, None, 2, None)
    operator([torch.empty_like(grad)], [grad], [expected], 0.5, 1, None, 2)
    assert_equal_bits(average, expected, "average")
    assert_equal_bits(update, average, "update")
    with pytest.raises(TypeError, match=r"^wait takes 7 arguments, not 2$"):
        enter(grad, average)
    message = "a rule named wait is already registered; register this one under a different name"
    with pytest.raises(RuntimeError, match=message):
        native._load_rule(*arguments)


@pytest.mark.once
@pytest.mark.filterwarnings("ignore")
def test_traces_are_refused_by_name(library: Path) -> None:
    assert native is not None
    path = str(library)
    _, user = native._load_rule(path, "PatientDescent", "rules_of_tests", name="traced")
    _, own = native._load_rule(path, "PatientDescent", name="traced")
    assert native.traced_update is own
    for enter, name in ((user, "traced"), (own, "calculate_traced_update")):

        def function(grad: Tensor, average: Tensor, enter: Any = enter) -> Any:
            return enter(grad, average, 0.5, 1, None, 2, None)

        with pytest.raises(RuntimeError, match=f"torch.jit.trace cannot record {name}: use"):
            torch.jit.trace(function, operands(F32))


@pytest.mark.once
def test_one_instruction_set(tmp_path: Path, rule: Rule) -> None:
    """A library may have the loops of the instruction set in use alone."""
    assert native is not None
    isas = native.supported_isas()
    for isa in isas:
        path = plugins.library_path(tmp_path, f"only_{isa}")
        only = f"-DEMOPT_ONLY_ISA_{isa}"
        plugins.compile_rules(["plugin_rules.h"], ["PatientDescent"], path, "-O1", only)
        symbols = path.read_bytes()
        compiled = [name for name in isas if f"{len(name)}{name}12element_loop".encode() in symbols]
        assert compiled == [isa]
        grad, average = operands(F32)
        wanted = average.clone()
        expected = call(rule, grad, wanted, patience=1, limit=0.5)
        load = f"""
import torch
from emerging_optimizers._native import native
from test_optional_members import operands
_, enter = native._load_rule({str(path)!r}, "PatientDescent", "only", "only")
grad, average = operands(torch.float32)
update = enter(grad, average, 0.5, 1, 0.5, 2, None)
print(torch.stack([update, average]).nan_to_num(9.0).tolist())
"""
        done = run_python(load, EMERGING_OPTIMIZERS_ISA=isa)
        assert done.stdout.strip() == str(
            torch.stack([expected, wanted]).nan_to_num(9.0).tolist()
        ), done.stderr
        if isa != isas[0]:
            refused = run_python(load, EMERGING_OPTIMIZERS_ISA=isas[0])
            message = f"{path} was not compiled for {isas[0]}, the instruction set in use"
            assert message in refused.stderr
