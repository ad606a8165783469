"""Rules compiled separately, without torch, and loaded from shared libraries."""

import re
import subprocess
from typing import Any

import oracle
import plugins
import pytest
import torch
from optimizers import METHODS, Setup, assert_same, contents, every_variant, make_params, run
from support import (
    LAYOUT_SHAPE,
    LAYOUTS,
    MIXES,
    Layout,
    Operands,
    assert_equal_bits,
    assert_equal_results,
    call,
    check_call,
    every_case,
    every_mix,
    every_rule,
    lay_out,
    make_operands,
    needs_native,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from emerging_optimizers._hyperparameters import Beta, NonNegative, Step
from emerging_optimizers._native import native
from emerging_optimizers._rule import Rule
from emerging_optimizers.scalar_optimizers import ScalarOptimizer

pytestmark = [
    pytest.mark.builtin_rules("compiles the built-in rules as plugins"),
    pytest.mark.on_devices("tests-cuda"),
    needs_native,
    pytest.mark.skipif("sys.platform == 'win32'", reason="compiles by c++"),
]


# ---- copies of the package's rules ---------------------------------------------------------------


@pytest.fixture(scope="module")
def copies(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Rule]:
    if request.config.getoption("--device") == "cuda":
        pytest.skip("the copies have kernels only on emulated devices")
    return plugins.load_copies(tmp_path_factory.mktemp("copies"))


@pytest.fixture(scope="module")
def copied_rows(copies: dict[str, Rule]) -> dict[str, oracle.Rule]:
    return {name: plugins.as_row(copies[name], row) for name, row in oracle.ALL_RULES.items()}


@pytest.fixture(scope="module")
def copied_classes(copies: dict[str, Rule]) -> dict[type, type[ScalarOptimizer]]:
    from optimizers import SETUPS

    found = {}
    for setup in SETUPS:
        cls = setup.cls
        others = tuple(copies[rule.name] for rule in cls._other_rules)
        members = {"_rule": copies[cls._rule.name], "_other_rules": others}
        copied = type(cls.__name__, (cls,), members)
        # By the names that the class knows.
        by_name = {n.removeprefix("plugin_"): rule for n, rule in copied._group_rules.items()}
        copied._group_rules = by_name
        found[cls] = copied
    return found


def assert_same_call(
    copied: oracle.Rule, row: oracle.Rule, case: Any, operands: Any, label: str, **out: Any
) -> None:
    """Assert that both functions return the same; `out` is 'given', 'grad' or None."""
    is_single = isinstance(operands, Operands)
    results = []
    for rule in (copied, row):
        positions = [p.clone() for p in ([operands] if is_single else operands)]
        outs = {
            "given": [torch.empty_like(p.grad) for p in positions],
            "grad": [p.grad for p in positions],
        }.get(out.get("out", ""))
        argument = positions[0] if is_single else positions
        passed = outs[0] if outs and is_single else outs
        returned = call(rule, case, argument, out=passed)
        results.append(([returned] if is_single else returned, positions))
    for i, operand in enumerate([operands] if is_single else operands):
        (updates, mine), (wanted, theirs) = results
        assert_equal_results(row, (updates[i], mine[i]), (wanted[i], theirs[i]), f"{label}[{i}]")
        assert updates[i].stride() == wanted[i].stride(), operand


@every_case
def test_values(rule: oracle.Rule, case_name: str, copied_rows: dict[str, oracle.Rule]) -> None:
    copied, case = copied_rows[rule.name], rule.cases[case_name]
    positions = [make_operands(rule, (5, 67), mix, seed=i) for i, mix in enumerate(MIXES.values())]
    for name, operands in zip(MIXES, positions, strict=True):
        check_call(copied, case, operands.clone(), label=f"{case_name}, {name}")
        assert_same_call(copied, rule, case, operands, name)
    for out in ("", "given", "grad"):
        assert_same_call(copied, rule, case, positions, out, out=out)


@every_rule
@pytest.mark.parametrize("layout", list(LAYOUTS.values()), ids=list(LAYOUTS))
def test_layouts(rule: oracle.Rule, layout: Layout, copied_rows: dict[str, oracle.Rule]) -> None:
    positions = []
    for i, mix in enumerate((MIXES["float32"], MIXES["mixed states"])):
        positions.append(lay_out(make_operands(rule, LAYOUT_SHAPE, mix, seed=i), layout))
    copied = copied_rows[rule.name]
    updates = check_call(copied, rule.usual, [Operands(*_copies(p, layout)) for p in positions])
    wanted = call(rule, rule.usual, positions)
    for update, expected in zip(updates, wanted, strict=True):
        assert_equal_bits(update, expected, str(rule))
        assert update.stride() == expected.stride()


def _copies(operands: Operands, layout: Layout) -> tuple[Tensor, list[Tensor]]:
    last = len(operands.states)
    grad, *states = (layout(t.clone(), i, last) for i, t in enumerate(operands))
    return grad, states


@every_rule
@every_mix
def test_sizes(rule: oracle.Rule, mix: Any, copied_rows: dict[str, oracle.Rule]) -> None:
    sizes = (0, 1, 17, 127, 129, 4097, 16385)
    positions = [make_operands(rule, (size,), mix, seed=size) for size in sizes]
    assert_same_call(copied_rows[rule.name], rule, rule.usual, positions, "sizes")


@every_variant
@pytest.mark.parametrize("fused", [None, False])
def test_steps(setup: Setup, fused: bool | None, copied_classes: Any) -> None:
    """Steps with each option, by a copy of a rule and by the rule."""
    bf16, f32 = torch.bfloat16, torch.float32
    for dtype, options in [
        *((f32, {"weight_decay": 0.1, "weight_decay_method": m}) for m in METHODS),
        (torch.float64, {}),
        (bf16, {"master_weights": True, "weight_decay": 0.1}),
        (torch.float16, {"stochastic_rounding": True}),
        (bf16, {"stochastic_rounding": True, "state_dtype": f32, "maximize": True}),
        (f32, {"capturable": True, "state_dtype": bf16}),
    ]:
        found = []
        for cls in (copied_classes[setup.cls], setup.cls):
            torch.manual_seed(3)
            params = make_params(dtype=dtype)
            optimizer = cls(params, fused=fused, **{**setup.arguments, **options})
            run(optimizer, params, range(1, 4))
            found.append(contents(optimizer))
        assert_same(*found, label=f"{setup} {options}")


def test_remainders_of_masters(copies: dict[str, Rule]) -> None:
    """A state holds the lower 16 bits of a master, its parameter the upper ones."""
    from emerging_optimizers import megatron

    for name, cls in [("adam", megatron.FusedAdam), ("lion", megatron.Lion)]:
        found = []
        for each in (type(cls.__name__, (cls,), {"_rule": copies[name]}), cls):
            params = make_params(dtype=torch.bfloat16)
            optimizer = each(params, master_weights=True, store_param_remainders=True)
            run(optimizer, params, range(1, 4))
            assert optimizer.state[params[0]]["master_param"].dtype == torch.int16
            found.append(contents(optimizer))
        assert_same(*found, label=name)


@pytest.mark.once
@every_rule
def test_tracers(rule: oracle.Rule, copied_rows: dict[str, oracle.Rule]) -> None:
    copied = copied_rows[rule.name]
    operands = make_operands(rule, (3, 5), MIXES["float32"])

    def function(grad: Tensor, *states: Tensor) -> Tensor:
        return call(copied, rule.usual, Operands(grad, list(states)))

    with torch.device("cpu"):
        graph = make_fx(function, tracing_mode="fake")(*operands.clone())
    assert f"plugin_{rule.name}_update_" in graph.code
    got, wanted = operands.clone(), operands.clone()
    update = graph(*got)
    expected = call(rule, rule.usual, wanted)
    assert_equal_results(rule, (update, got), (expected, wanted))
    meta = Operands(operands.grad.to("meta"), [s.to("meta") for s in operands.states])
    assert call(copied, rule.usual, meta).is_meta


def test_errors_match_those_of_the_rules(copied_rows: dict[str, oracle.Rule]) -> None:
    adam = copied_rows["adam"]
    operands = make_operands(adam, (3, 5), MIXES["float32"])
    with pytest.raises(ValueError, match=r"betas\[1\] is 1; expected 0 <= betas\[1\] < 1"):
        call(adam, {**adam.usual, "betas": (0.9, 1.0)}, operands)
    with pytest.raises(ValueError, match="steps count from 1"):
        call(adam, {**adam.usual, "step": 0}, operands)
    signum = copied_rows["signum"]
    operands = make_operands(signum, (3,), MIXES["float32"])
    with pytest.raises(ValueError, match="grad has 1 dimensions; use_shape_scaling needs 2"):
        call(signum, signum.cases["shape scaling"], operands)


# ---- rules with no states, and with the most -----------------------------------------------------


def _sign_descent(grad: Tensor, threshold: NonNegative) -> Tensor:
    return torch.where(grad.abs() > threshold, grad.sign(), torch.zeros_like(grad))


def _five_momenta(
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    third: Tensor,
    fourth: Tensor,
    fifth: Tensor,
    betas: tuple[Beta, Beta, Beta, Beta, Beta],
    step: Step,
) -> Tensor:
    total = torch.zeros_like(grad)
    for beta, state in zip(betas, (first, second, third, fourth, fifth), strict=True):
        total.add_(state.mul_(beta).add_(grad))
    return total.div_(step)


BETAS = (0.0, 0.25, 0.5, 0.75, 0.875)
OPTIONS: dict[str, dict[str, Any]] = {
    "sign_descent": {"threshold": 0.5},
    "five_momenta": {"betas": BETAS},
}
every_other_rule = pytest.mark.parametrize("name", list(OPTIONS))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Rule]:
    folder = tmp_path_factory.mktemp("others")
    path = plugins.library_path(folder, "others")
    plugins.compile_rules(["plugin_rules.h"], ["SignDescent", "FiveMomenta"], path)
    assert native is not None
    for struct in ("SignDescent", "FiveMomenta"):
        native._load_rule(str(path), struct)
    rules = (Rule("sign_descent", _sign_descent), Rule("five_momenta", _five_momenta))
    return {rule.name: rule for rule in rules}


def _tensors(rule: Rule, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor]]:
    # Multiples of 1/8, whose sums are exact in every dtype.
    grad = (torch.arange(-12.0, 12.0) / 8).reshape(4, 6).to(dtype)
    return grad, [torch.full_like(grad, 0.25 * (i + 1)) for i in range(len(rule.states))]


def _enter(rule: Rule, grad: Any, states: list[Any], step: Any, out: Any = None) -> Any:
    numbers = [
        step if name == "step" else OPTIONS[rule.name][name] for name in rule.hyperparameter_names
    ]
    return rule.entry_point()(grad, *states, *numbers, out)


def _by_the_formula(rule: Rule, grad: Tensor, states: list[Tensor], step: int) -> Tensor:
    step_option = {"step": step} if "step" in rule.hyperparameter_names else {}
    wide = [state.double() for state in states]
    update = rule.formula(grad.double(), *wide, **OPTIONS[rule.name], **step_option)
    for state, value in zip(states, wide, strict=True):
        state.copy_(value)
    return update.to(grad.dtype)


@every_other_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_list", [False, True])
@pytest.mark.parametrize("out", ["none", "given", "grad"])
def test_other_rules(
    name: str, dtype: torch.dtype, is_list: bool, out: str, others: dict[str, Rule]
) -> None:
    rule = others[name]
    grad, states = _tensors(rule, dtype)
    expected_states = [state.clone() for state in states]
    expected = _by_the_formula(rule, grad, expected_states, 2)
    given = {"none": None, "given": torch.empty_like(grad), "grad": grad}[out]
    if is_list:
        lists = [[state] for state in states]
        outs = None if given is None else [given]
        (update,) = _enter(rule, [grad], lists, 2, outs)
    else:
        update = _enter(rule, grad, states, 2, given)
    assert given is None or update is given
    assert_equal_bits(update, expected, "update")
    for state, wanted in zip(states, expected_states, strict=True):
        assert_equal_bits(state, wanted, "state")


@pytest.mark.once
@every_other_rule
def test_other_rules_under_tracers(name: str, others: dict[str, Rule]) -> None:
    rule = others[name]
    grad, states = _tensors(rule)
    meta = _enter(rule, grad.to("meta"), [state.to("meta") for state in states], 1)
    assert meta.is_meta
    assert meta.shape == grad.shape
    with FakeTensorMode() as mode, torch.device("cpu"):
        fakes = [mode.from_tensor(tensor) for tensor in (grad, *states)]
        assert _enter(rule, fakes[0], fakes[1:], 1).shape == grad.shape

    def function(grad: Tensor, *states: Tensor) -> Tensor:
        return _enter(rule, grad, list(states), 3)

    mine = [tensor.clone() for tensor in (grad, *states)]
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    update = compiled(*mine)
    assert_equal_bits(update, _by_the_formula(rule, grad, states, 3), "update")
    for state, wanted in zip(mine[1:], states, strict=True):
        assert_equal_bits(state, wanted, "state")


@every_other_rule
@pytest.mark.parametrize("fused", [None, False])
def test_other_optimizers(name: str, fused: bool | None, others: dict[str, Rule]) -> None:
    rule = others[name]

    class Optimizer(ScalarOptimizer):
        _rule = rule

        def __init__(self, params: Any, **options: Any) -> None:
            own = {"lr": 0.5, "weight_decay": 0.25, "weight_decay_method": "decoupled"}
            super().__init__(params, {**own, **OPTIONS[name]}, options)  # type: ignore[arg-type]

    assert Optimizer._state_names == rule.states
    start, _ = _tensors(rule)
    param = nn.Parameter(start.clone())
    optimizer = Optimizer([param], fused=fused)
    weight, states = start.double(), [torch.zeros_like(start) for _ in rule.states]
    for step in (1, 2, 4):
        grad = start.flip(0) * step
        if step == 4:  # like a third step after a restart
            reloaded = nn.Parameter(param.detach().clone())
            other = Optimizer([reloaded], fused=fused)
            other.load_state_dict(optimizer.state_dict())
            optimizer, param = other, reloaded
        param.grad = grad
        optimizer.step()
        update = _by_the_formula(rule, grad.clone(), states, min(step, 3))
        weight = weight - 0.125 * weight - 0.5 * update.double()
        torch.testing.assert_close(param.detach().double(), weight, rtol=1e-6, atol=1e-6)
    assert set(optimizer.state[param]) == {"step", *rule.states}


@pytest.mark.cuda
@every_other_rule
def test_cuda_tensors_of_a_rule_without_kernels(name: str, others: dict[str, Rule]) -> None:
    """CUDA tensors take the formula, and tensors on the CPU the kernels."""
    rule = others[name]
    grad, states = _tensors(rule)
    expected_states = [state.clone() for state in states]
    expected = _by_the_formula(rule, grad, expected_states, 2)
    grads = [grad, grad.cuda(), grad.clone()]
    lists = [[state, state.cuda(), state.clone()] for state in states]
    for update in _enter(rule, grads, lists, 2):
        assert_equal_bits(update.cpu(), expected, "update")
    for mine, wanted in zip(lists, expected_states, strict=True):
        for state in mine:
            assert_equal_bits(state.cpu(), wanted, "state")


@pytest.mark.cuda
def test_steps_of_a_rule_without_kernels(others: dict[str, Rule]) -> None:
    class Optimizer(ScalarOptimizer):
        _rule = others["five_momenta"]

        def __init__(self, params: Any, **options: Any) -> None:
            own = {"lr": 0.5, "weight_decay": 0.0, "weight_decay_method": "decoupled"}
            super().__init__(params, {**own, "betas": BETAS}, options)  # type: ignore[arg-type]

    start, _ = _tensors(Optimizer._rule)
    params = [nn.Parameter(start.clone()), nn.Parameter(start.cuda())]
    optimizer = Optimizer(params)
    for step in (1, 2, 3):
        for param in params:
            param.grad = (start.flip(0) * step).to(param.device)
        optimizer.step()
    assert_equal_bits(params[1].detach().cpu(), params[0].detach(), "parameter")
    demanding = Optimizer([params[1]], fused=True)
    before = params[1].detach().clone()
    with pytest.raises(RuntimeError, match="fused=True, but Optimizer has no native step for"):
        demanding.step()
    assert_equal_bits(params[1].detach(), before, "parameter")


# ---- errors --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A library compiled with other headers, and one whose rule has an existing name."""
    folder = tmp_path_factory.mktemp("libraries")
    header = folder / "taken.h"
    text = (plugins.CSRC / "rules" / "lion.h").read_text()
    header.write_text(re.sub(r"\bLion\b", "Taken", text))
    old, taken = (plugins.library_path(folder, name) for name in ("old", "taken"))
    stamp = ["-UEMOPT_ABI", "-DEMOPT_ABI=0x1", "-O0"]
    plugins.compile_rules(["plugin_rules.h"], ["SignDescent"], old, *stamp)
    plugins.compile_rules(["taken.h"], ["Taken"], taken, "-O0")
    return {"old": str(old), "taken": str(taken)}


@pytest.mark.once
def test_a_library_of_other_headers(libraries: dict[str, str]) -> None:
    assert native is not None
    before = dict(native.rules)
    message = f"{libraries['old']} was compiled with the headers of another version"
    with pytest.raises(RuntimeError, match=re.escape(message) + ".*recompile it"):
        native._load_rule(libraries["old"], "SignDescent")
    with pytest.raises(RuntimeError, match=re.escape(message) + ".*rebuild the package"):
        native._load_rule(
            libraries["old"], "SignDescent", operator_namespace="user_rules", name="sign_descent"
        )
    assert native.rules == before


@pytest.mark.once
def test_a_name_in_use(libraries: dict[str, str]) -> None:
    assert native is not None
    function = native.lion_update
    for _ in range(2):
        message = "a rule named lion is already registered; compile this one with a different kName"
        with pytest.raises(RuntimeError, match=message):
            native._load_rule(libraries["taken"], "Taken")
    assert native.lion_update is function


@pytest.mark.once
def test_no_such_rule(libraries: dict[str, str]) -> None:
    assert native is not None
    message = f"{libraries['taken']} has no rule Lino; compile it with EMOPT_RULE(Lino)"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        native._load_rule(libraries["taken"], "Lino")


@pytest.mark.once
def test_no_such_library() -> None:
    assert native is not None
    with pytest.raises(RuntimeError, match=r"cannot load /nowhere/rule\.so: .*No such file"):
        native._load_rule("/nowhere/rule.so", "Lion")


@pytest.mark.once
def test_too_many_states(tmp_path: Any) -> None:
    library = plugins.library_path(tmp_path, "six")
    with pytest.raises(subprocess.CalledProcessError) as error:
        plugins.compile_rules(["plugin_rules.h"], ["SixStates"], library, "-fsyntax-only")
    assert "a rule has at most 5 states" in error.value.stderr
