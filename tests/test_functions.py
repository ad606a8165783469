"""The six functions: right answers for every dtype, size and layout, and how they may be called."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from oracle import RULES, Rule
from support import (
    DTYPES,
    LAYOUT_SHAPE,
    LAYOUTS,
    MIXES,
    Layout,
    Mix,
    Operands,
    assert_close_to_oracle,
    assert_equal_bits,
    assert_equal_results,
    call,
    check_call,
    every_case,
    every_mix,
    every_rule,
    lay_out,
    make_operands,
    overflow_threshold,
    round_once,
    run_python,
)
from torch import Tensor, nn

FLOAT32 = MIXES["float32"]
HALF_GRAD = MIXES["bfloat16 grad, float32 states"]

# Around the tile of 128 elements that dtypes other than the arithmetic's are computed in, twice
# that, a page, and the share of work of one thread.
SIZES = (0, 1, 2, 15, 16, 17, 127, 128, 129, 255, 256, 257, 4095, 4096, 4097, 16383, 16384, 16385)


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.once
@every_case
def test_values(rule: Rule, case_name: str) -> None:
    for mix_name, mix in MIXES.items():
        operands = make_operands(rule, (5, 67), mix)
        check_call(rule, rule.cases[case_name], operands, label=f"{case_name}, {mix_name}")


@pytest.mark.once
@every_rule
@every_mix
def test_sizes(rule: Rule, mix: Mix) -> None:
    for size in SIZES:
        check_call(rule, rule.usual, make_operands(rule, (size,), mix, seed=size))


@every_rule
@every_mix
def test_sizes_in_one_list(rule: Rule, mix: Mix) -> None:
    positions = [make_operands(rule, (size,), mix, seed=size) for size in SIZES]
    check_call(rule, rule.usual, positions)


@every_rule
@every_mix
def test_shapes(rule: Rule, mix: Mix) -> None:
    for shape in [(), (1, 1, 1), (0, 3), (3, 0), (2, 0, 5), (2, 1, 3, 1, 2)]:
        check_call(rule, rule.usual, make_operands(rule, shape, mix))


@every_mix
def test_shape_scaling_differs_by_position(mix: Mix) -> None:
    rule = RULES["signum"]
    shapes = [(1, 1), (3, 4), (129, 7), (0, 5), (2, 300)]
    positions = [make_operands(rule, shape, mix, seed=i) for i, shape in enumerate(shapes)]
    updates = check_call(rule, rule.cases["shape scaling"], positions)
    for (rows, columns), update in zip(shapes, updates, strict=True):
        scale = torch.tensor(2 / (rows + columns), dtype=torch.float32).to(update.dtype)
        assert not update.numel() or update.abs().max().item() == pytest.approx(scale.item())


@every_case
def test_mixes_in_one_list(rule: Rule, case_name: str) -> None:
    positions = [
        make_operands(rule, (7, 3 * i + 1), mix, seed=i)
        for i, mix in enumerate([*MIXES.values(), FLOAT32, HALF_GRAD])
    ]
    check_call(rule, rule.cases[case_name], positions, label=case_name)


@pytest.mark.once
@every_rule
def test_thousand_small_tensors(rule: Rule) -> None:
    mixes = list(MIXES.values())
    shapes = [(i % 37,) if i % 3 else (i % 5, i % 11) for i in range(1000)]
    positions = [
        make_operands(rule, shape, mixes[i % len(mixes)], seed=i) for i, shape in enumerate(shapes)
    ]
    check_call(rule, rule.usual, positions)


@every_rule
@every_mix
def test_many_steps(rule: Rule, mix: Mix) -> None:
    # Each step starts from what the one before has stored.
    operands = make_operands(rule, (4, 50), mix)
    for step in range(1, 8):
        case = dict(rule.usual)
        if "step" in case:
            case["step"] = step
        operands.grad = make_operands(rule, (4, 50), mix, seed=step).grad
        check_call(rule, case, operands, label=f"step {step}")


@every_rule
@every_mix
def test_nan_and_infinity_pass_through(rule: Rule, mix: Mix) -> None:
    # Every combination of specials across the operands.
    specials = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -2.0])
    for case_name, case in rule.cases.items():
        grids = torch.meshgrid(*[specials] * (1 + len(rule.states)), indexing="ij")
        grad, *states = (grid.reshape(7, -1).clone() for grid in grids)
        states = [
            state.abs() if name == "exp_avg_sq" else state
            for name, state in zip(rule.states, states, strict=True)
        ]
        dtypes = mix.of(rule)
        states = [state.to(dtype) for state, dtype in zip(states, dtypes, strict=True)]
        check_call(rule, case, Operands(grad.to(mix.grad), states), label=case_name)


@pytest.mark.parametrize("name", ["lion", "signum"])
@every_mix
def test_sign_of_zero_and_of_nan_is_zero(name: str, mix: Mix) -> None:
    rule = RULES[name]
    for value in (0.0, -0.0, math.nan):
        grad = torch.full((2, 300), value, dtype=mix.grad)
        exp_avg = torch.full((2, 300), value, dtype=mix.of(rule)[0])
        for case in rule.cases.values():
            update = call(rule, case, Operands(grad, [exp_avg.clone()]))
            assert_equal_bits(update.abs(), torch.zeros_like(update), f"{rule}: sign({value})")


# ---- rounding for storage ------------------------------------------------------------------------


def _halfway_points(dtype: torch.dtype) -> Tensor:
    """Halfway between neighbours of a half type, and so little off it that float32 cannot tell."""
    digits = {torch.bfloat16: 8, torch.float16: 11}[dtype]
    mantissas = torch.arange(2 ** (digits - 1), 2**digits, dtype=torch.float64) + 0.5
    halfway = mantissas * 2.0**-digits  # in [0.5, 1)
    values = torch.cat([halfway, halfway * (1 - 2.0**-40), halfway * (1 + 2.0**-40)])
    return torch.cat([values, -values])


def _assert_rounded_once(stored: Tensor, exact: Tensor, label: str) -> None:
    dtype = stored.dtype
    once, twice = (
        round_once(exact, dtype),
        round_once(round_once(exact, torch.float32).double(), dtype),
    )
    assert (once != twice).any(), f"{label}: the test cannot tell one rounding from two"
    assert_equal_bits(stored, once, label)


# With these, a gradient of 0 and an exp_avg_sq of 4, the update is half the first state, exactly.
_HALVES = {
    "adam": {
        "betas": (0.5, 0.25),
        "correct_bias": False,
        "use_nesterov": False,
        "step": 1,
        "eps": 0.0,
    },
    "ademamix": {
        "num_beta_slow_warmup_steps": None,
        "num_alpha_warmup_steps": None,
        "betas": (0.5, 0.25, 0.5),
        "step": 1,
        "eps": 0.0,
        "correct_bias": False,
        "alpha": 0.0,
    },
    "sim_ademamix": {
        "num_beta_fast_warmup_steps": None,
        "min_beta_fast": 0.5,
        "betas": (0.5, 0.25),
        "step": 1,
        "eps": 0.0,
        "correct_bias": False,
        "alpha": 0.0,
    },
    "laprop": {"correct_bias": False, "betas": (0.5, 0.25), "step": 1, "eps": 0.0},
}


@pytest.mark.parametrize("name", list(_HALVES))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_update_is_rounded_once(name: str, dtype: torch.dtype) -> None:
    rule, case, halfway = RULES[name], _HALVES[name], _halfway_points(dtype)
    grad = torch.zeros_like(halfway)
    states = [2 * halfway, *(torch.full_like(halfway, 4.0) for _ in rule.states[1:])]
    out = torch.empty_like(halfway, dtype=dtype)
    call(rule, case, Operands(grad, states), out=out)
    _assert_rounded_once(out, halfway, f"{rule}: update")


def _cases_that_store_the_gradient(rule: Rule) -> dict[str, Any]:
    """All betas 0: averages become the gradient, its square, or its normalised value."""
    case = dict(rule.usual)
    for key, value in case.items():
        if key == "betas":
            case[key] = (0.0,) * len(value)
        elif "warmup" in key:
            case[key] = None
        elif key.startswith("momentum_beta"):
            case[key] = 0.0
        elif key == "eps":
            case[key] = 1.0
    return case


@every_rule
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_states_are_rounded_once(rule: Rule, dtype: torch.dtype) -> None:
    case, halfway = _cases_that_store_the_gradient(rule), _halfway_points(dtype)
    # The gradients whose average, normalised average and average square are the halfway points.
    grads = {"square": halfway.abs().sqrt() * halfway.sign()}
    if rule.name == "laprop":
        grads["average"] = halfway / (1 - halfway.abs())  # g / (|g| + 1) = halfway
    else:
        grads["average"] = halfway
    for i, name in enumerate(rule.states):
        grad = grads["square" if name == "exp_avg_sq" else "average"]
        exact = Operands(grad, [torch.zeros_like(grad) for _ in rule.states])
        call(rule, case, exact)
        stored = Operands(grad, [torch.zeros_like(grad, dtype=dtype) for _ in rule.states])
        call(rule, case, stored)
        _assert_rounded_once(stored.states[i], exact.states[i], f"{rule}: {name}")


@every_rule
@every_mix
def test_out_of_another_dtype_is_the_update_rounded(rule: Rule, mix: Mix) -> None:
    # A float64 `out` does not make the arithmetic float64.
    operands = make_operands(rule, (3, 333), mix)
    exact = torch.empty(3, 333, dtype=torch.float64)
    check_call(rule, rule.usual, operands.clone(), out=exact)
    for dtype in DTYPES:
        out = torch.full((3, 333), 7.0, dtype=dtype)
        check_call(rule, rule.usual, operands.clone(), out=out)
        assert_equal_bits(out, round_once(exact, dtype), f"{rule}: out")


@pytest.mark.parametrize(
    "rule", [rule for rule in RULES.values() if rule.name != "laprop"], ids=str
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_magnitude_is_rounded_to_nearest_even(rule: Rule, dtype: torch.dtype) -> None:
    # Subnormals, the smallest normal numbers and those around the largest; betas of zero store the
    # gradient itself, except in LaProp, which normalises it first.
    limits = torch.finfo(dtype)
    scale = torch.tensor([limits.smallest_normal, limits.smallest_normal / 8, limits.max, 1.0])
    grad = (torch.linspace(0.01, 1.9, 4099).outer(scale)).clamp_(max=torch.finfo(torch.float32).max)
    grad = torch.cat([grad, -grad])
    states = [torch.zeros_like(grad, dtype=dtype) for _ in rule.states]
    call(rule, _cases_that_store_the_gradient(rule), Operands(grad, states))
    assert (grad.abs() >= overflow_threshold(dtype)).any() == states[0].isinf().any()
    assert_equal_bits(states[0], round_once(grad.double(), dtype), f"{rule}: {rule.states[0]}")


# ---- layouts -------------------------------------------------------------------------------------


@every_rule
@pytest.mark.parametrize("layout", list(LAYOUTS.values()), ids=list(LAYOUTS))
def test_layouts(rule: Rule, layout: Layout) -> None:
    for seed, mix in enumerate(MIXES.values()):
        check_call(rule, rule.usual, lay_out(make_operands(rule, LAYOUT_SHAPE, mix, seed), layout))


@every_rule
def test_layouts_in_one_list(rule: Rule) -> None:
    mixes = list(MIXES.values())
    check_call(
        rule,
        rule.usual,
        [
            lay_out(make_operands(rule, LAYOUT_SHAPE, mixes[i % len(mixes)], seed=i), layout)
            for i, layout in enumerate(LAYOUTS.values())
        ],
    )


@every_rule
@pytest.mark.parametrize("layout", list(LAYOUTS.values()), ids=list(LAYOUTS))
@pytest.mark.parametrize("out_layout", ["transposed", "odd offsets", "strided slices"])
def test_out_has_another_layout(rule: Rule, layout: Layout, out_layout: str) -> None:
    for mix in (FLOAT32, HALF_GRAD):
        operands = lay_out(make_operands(rule, LAYOUT_SHAPE, mix), layout)
        out = LAYOUTS[out_layout](torch.full(operands.grad.shape, 7.0), 1, 1)
        buffer = None if out._base is None else out._base
        check_call(rule, rule.usual, operands, out=out)
        if out_layout == "strided slices":
            assert buffer is not None
            assert (buffer[..., 1::2] == 7).all()


@every_rule
def test_expanded_operands_of_one_element(rule: Rule) -> None:
    # An expanded tensor with a single element does not overlap itself.
    operands = make_operands(rule, (), FLOAT32)
    check_call(
        rule,
        rule.usual,
        Operands(*[operands.grad.expand(1, 1), [state.expand(1, 1) for state in operands.states]]),
    )


# ---- out= ----------------------------------------------------------------------------------------


@every_rule
@every_mix
def test_out_is_returned(rule: Rule, mix: Mix) -> None:
    operands = make_operands(rule, (3, 50), mix)
    fresh_operands = operands.clone()
    fresh = call(rule, rule.usual, fresh_operands)
    out = torch.full_like(fresh, 7.0)
    assert check_call(rule, rule.usual, operands, out=out) is out
    assert_equal_results(rule, (out, operands), (fresh, fresh_operands))


@every_rule
@pytest.mark.parametrize("container", [list, tuple], ids=["list", "tuple"])
def test_out_is_a_sequence(rule: Rule, container: Any) -> None:
    positions = [make_operands(rule, (3, i), mix, i) for i, mix in enumerate(MIXES.values())]
    copies = [position.clone() for position in positions]
    fresh = call(rule, rule.usual, copies)
    out = container(torch.full_like(update, 7.0) for update in fresh)
    tensors = list(out)
    assert check_call(rule, rule.usual, positions, out=out) is out
    assert all(a is b for a, b in zip(out, tensors, strict=True))
    for i in range(len(positions)):
        assert_equal_results(rule, (out[i], positions[i]), (fresh[i], copies[i]), f"[{i}]")


@every_rule
@every_mix
def test_out_is_grad(rule: Rule, mix: Mix) -> None:
    for layout in LAYOUTS.values():
        operands = lay_out(make_operands(rule, LAYOUT_SHAPE, mix), layout)
        if 0 in operands.grad.stride():
            continue
        separate = operands.clone()
        out = torch.empty_like(separate.grad)
        call(rule, rule.usual, separate, out=out)
        assert check_call(rule, rule.usual, operands, out=operands.grad) is operands.grad
        assert_equal_results(rule, (operands.grad, operands), (out, separate))


@every_rule
def test_out_is_the_list_of_gradients(rule: Rule) -> None:
    positions = [make_operands(rule, (3, i), mix, i) for i, mix in enumerate(MIXES.values())]
    before = [position.clone() for position in positions]
    grads = [position.grad for position in positions]
    states = [[position.states[i] for position in positions] for i in range(len(rule.states))]
    assert rule.function(grads, *states, **rule.usual, out=grads) is grads
    for position, old in zip(positions, before, strict=True):
        assert_close_to_oracle(rule, rule.usual, old, position.grad, position.states)


@every_rule
def test_out_is_keyword_only(rule: Rule) -> None:
    operands = make_operands(rule, (3,), FLOAT32)
    arguments = {"alpha": 2.0, "momentum_beta2": None, "use_shape_scaling": False} | rule.usual
    # The dictionary's order is not the signature's: fill all positional places by name first.
    names = rule.function.__code__.co_varnames[: rule.function.__code__.co_argcount]
    values = [arguments[name] for name in names[1 + len(rule.states) :]]
    rule.function(*operands, *values)
    with pytest.raises(TypeError, match="positional"):
        rule.function(*operands, *values, torch.empty(3))


# ---- autograd, version counters, inference mode --------------------------------------------------


@every_rule
@pytest.mark.parametrize("layout", list(LAYOUTS.values()), ids=list(LAYOUTS))
def test_version_counters(rule: Rule, layout: Layout) -> None:
    operands = lay_out(make_operands(rule, LAYOUT_SHAPE, HALF_GRAD), layout)
    out = torch.empty(operands.grad.shape)
    versions = [tensor._version for tensor in (*operands, out)]
    call(rule, rule.usual, operands, out=out)
    grad, *written = (
        tensor._version - version
        for tensor, version in zip((*operands, out), versions, strict=True)
    )
    assert grad == 0
    assert all(count > 0 for count in written), written


@every_rule
def test_version_counter_of_grad_as_out(rule: Rule) -> None:
    operands = make_operands(rule, (4, 5), FLOAT32)
    version = operands.grad._version
    call(rule, rule.usual, operands, out=operands.grad)
    assert operands.grad._version > version


@pytest.mark.real
@every_rule
def test_backward_notices_a_modified_state(rule: Rule) -> None:
    operands = make_operands(rule, (4, 5), FLOAT32)
    weight = torch.ones(4, 5, requires_grad=True)
    loss = (weight * operands.states[0]).sum()
    call(rule, rule.usual, operands)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_rule
@pytest.mark.parametrize("layout", list(LAYOUTS.values()), ids=list(LAYOUTS))
def test_leaves_that_require_grad(rule: Rule, layout: Layout) -> None:
    operands = lay_out(make_operands(rule, LAYOUT_SHAPE, HALF_GRAD), layout)
    # `detach` makes leaves of views.
    grad, *states = (tensor.detach().requires_grad_() for tensor in operands)
    out = torch.empty(grad.shape, requires_grad=True)
    assert torch.is_grad_enabled()
    before = Operands(grad, states).clone()
    update = call(rule, rule.usual, Operands(grad, states))
    assert not update.requires_grad
    assert update.grad_fn is None
    assert_close_to_oracle(rule, rule.usual, before, update, states)
    call(rule, rule.usual, Operands(grad, states), out=out)
    for tensor in (grad, *states, out):
        assert tensor.is_leaf
        assert tensor.requires_grad
        assert tensor.grad_fn is None


@every_rule
def test_no_graph_is_recorded_for_a_gradient_with_history(rule: Rule) -> None:
    operands = make_operands(rule, (4, 5), FLOAT32)
    leaf = operands.grad.clone().requires_grad_()
    update = call(rule, rule.usual, Operands(leaf * 1, operands.states))
    assert not update.requires_grad
    assert all(not state.requires_grad for state in operands.states)


@every_rule
@every_mix
def test_inference_mode(rule: Rule, mix: Mix) -> None:
    operands = make_operands(rule, (3, 50), mix)
    wanted_operands, outside = operands.clone(), operands.clone()
    wanted = call(rule, rule.usual, wanted_operands)
    with torch.inference_mode():
        inside = operands.clone()
        assert inside.states[0].is_inference()
        for used in (inside, outside):
            update = call(rule, rule.usual, used)
            assert_equal_results(rule, (update, used), (wanted, wanted_operands))
        call(rule, rule.usual, inside, out=inside.grad)


@every_rule
def test_no_grad_mode(rule: Rule) -> None:
    with torch.no_grad():
        check_call(rule, rule.usual, make_operands(rule, (3, 50), FLOAT32))


# ---- how arguments may be given ------------------------------------------------------------------

rules_with_step = pytest.mark.parametrize(
    "rule", [rule for rule in RULES.values() if "step" in rule.usual], ids=str
)
rules_with_betas = pytest.mark.parametrize(
    "rule", [rule for rule in RULES.values() if "betas" in rule.usual], ids=str
)


@rules_with_step
@pytest.mark.parametrize(
    "step",
    [
        3.0,
        np.int64(3),
        np.int32(3),
        np.uint8(3),
        np.float64(3.0),
        np.float32(3.0),
        torch.tensor(3),
        torch.tensor(3.0),
    ],
    ids=lambda step: f"{type(step).__name__}-{step}",
)
def test_step_may_be_any_whole_number(rule: Rule, step: Any) -> None:
    operands = make_operands(rule, (3, 50), HALF_GRAD)
    wanted_operands = operands.clone()
    # A case in which the step matters to every rule.
    case = rule.cases["nesterov"] if rule.name in ("adam", "signum") else rule.usual
    wanted = call(rule, case | {"step": 3}, wanted_operands)
    update = call(rule, case | {"step": step}, operands)
    assert_equal_results(rule, (update, operands), (wanted, wanted_operands))


@rules_with_betas
@pytest.mark.parametrize(
    "container", [list, tuple, np.array, lambda betas: [np.float64(b) for b in betas]]
)
def test_betas_may_be_any_sequence(rule: Rule, container: Any) -> None:
    operands = make_operands(rule, (3, 50), FLOAT32)
    wanted_operands = operands.clone()
    wanted = call(rule, rule.usual, wanted_operands)
    betas = container(rule.usual["betas"])
    update = call(rule, rule.usual | {"betas": betas}, operands)
    assert_equal_results(rule, (update, operands), (wanted, wanted_operands))


@every_rule
def test_numpy_scalars(rule: Rule) -> None:
    operands = make_operands(rule, (3, 50), FLOAT32)
    wanted_operands = operands.clone()
    wanted = call(rule, rule.usual, wanted_operands)
    convert = {bool: np.bool_, int: np.int64, float: np.float64}
    case = {
        key: convert.get(type(value), lambda same: same)(value) for key, value in rule.usual.items()
    }
    update = call(rule, case, operands)
    assert_equal_results(rule, (update, operands), (wanted, wanted_operands))


@every_rule
def test_arguments_are_left_alone(rule: Rule) -> None:
    positions = [make_operands(rule, (3, i), FLOAT32, i) for i in range(4)]
    grads = [position.grad for position in positions]
    states = [[position.states[i] for position in positions] for i in range(len(rule.states))]
    lists = [list(tensors) for tensors in (grads, *states)]
    case = copy.deepcopy(rule.usual)
    rule.function(grads, *states, **case)
    assert case == rule.usual
    for tensors, same in zip((grads, *states), lists, strict=True):
        assert all(a is b for a, b in zip(tensors, same, strict=True))


@every_rule
def test_defaults(rule: Rule) -> None:
    defaults = {"alpha": 2, "momentum_beta2": None, "use_shape_scaling": False}
    explicit = {key: value for key, value in rule.usual.items() if key not in defaults}
    operands = make_operands(rule, (3, 50), FLOAT32)
    wanted_operands = operands.clone()
    names = rule.function.__code__.co_varnames
    used = {key: value for key, value in defaults.items() if key in names}
    wanted = call(rule, explicit | used, wanted_operands)
    update = call(rule, explicit, operands)
    assert_equal_results(rule, (update, operands), (wanted, wanted_operands))


@every_rule
def test_sequences_other_than_lists(rule: Rule) -> None:
    positions = [make_operands(rule, (3, i), FLOAT32, i) for i in range(1, 5)]
    copies = [position.clone() for position in positions]
    wanted = call(rule, rule.usual, copies)
    grads = tuple(position.grad for position in positions)
    states = [
        nn.ParameterList([nn.Parameter(position.states[i]) for position in positions])
        for i in range(len(rule.states))
    ]
    updates = rule.function(grads, *states, **rule.usual)
    assert type(updates) is list
    for i, position in enumerate(positions):
        got = Operands(position.grad, [parameters[i] for parameters in states])
        assert_equal_results(rule, (updates[i], got), (wanted[i], copies[i]), f"[{i}]")


@every_rule
def test_empty_sequences(rule: Rule) -> None:
    assert call(rule, rule.usual, []) == []
    out: list[Tensor] = []
    assert call(rule, rule.usual, [], out=out) is out
    assert out == []
    empty_tuple = rule.function((), *[()] * len(rule.states), **rule.usual)
    assert empty_tuple == []
    assert type(empty_tuple) is list


@every_rule
def test_list_of_one(rule: Rule) -> None:
    operands = make_operands(rule, (3, 50), FLOAT32)
    copies = operands.clone()
    (update,) = call(rule, rule.usual, [operands])
    assert_equal_results(
        rule, (update, operands), (call(rule, rule.usual, copies), copies), "list of one"
    )


# ---- memory --------------------------------------------------------------------------------------

_PEAK_MEMORY = """
import resource
import torch
from oracle import RULES

torch.set_num_threads(2)
rows = columns = 4096  # 16 Mi elements

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

buffers = [torch.zeros(columns, rows) for _ in range(3)]
grad = torch.zeros(columns, rows, dtype=torch.bfloat16)
for rule in RULES.values():
    small = [torch.zeros(512, 512) for _ in range(1 + len(rule.states))]
    rule.function(*small, **rule.usual, out=small[0])  # start threads, load libraries
for is_transposed in (False, True):
    for rule in RULES.values():
        operands = [grad, *buffers[: len(rule.states)]]
        if is_transposed:
            operands = [tensor.t() for tensor in operands]
        before = peak()
        rule.function(*operands, **rule.usual, out=operands[0])
        print(rule, is_transposed, peak() - before)
"""


@pytest.mark.once
def test_dense_calls_allocate_nothing_in_proportion() -> None:
    pytest.importorskip("resource")
    done = run_python(_PEAK_MEMORY)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * len(RULES)
    for line in lines:
        rule, is_transposed, growth = line.split()
        # A temporary in a half type, of one operand, would be 32 MiB.
        assert int(growth) < 16, f"{rule} (transposed: {is_transposed}): {growth} MiB"


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
@every_rule
@pytest.mark.parametrize(
    "layout",
    ["contiguous", "transposed", "permuted", "channels_last", "one channel", "odd offsets"],
)
def test_dense_calls_with_out_allocate_no_tensor(rule: Rule, layout: str) -> None:
    positions = [
        lay_out(make_operands(rule, LAYOUT_SHAPE, mix), LAYOUTS[layout]) for mix in MIXES.values()
    ]
    outs = [torch.empty_like(position.states[0]) for position in positions]
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        for position, out in zip(positions, outs, strict=True):
            call(rule, rule.usual, position, out=out)
    allocations = [event for event in profile.events() if event.self_cpu_memory_usage > 0]
    assert not allocations, [(event.name, event.self_cpu_memory_usage) for event in allocations]


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    # The pattern's period shares no factor with a power of two, so that an index which wraps
    # around finds other values.
    rule, case = RULES["lion"], RULES["lion"].usual
    period = 1_000_003
    numel = 2**31 + 3 * period + 12345
    pattern = make_operands(rule, (period,), MIXES["bfloat16"])

    def repeat(values: Tensor) -> Tensor:
        result = torch.empty(numel, dtype=values.dtype)
        whole = numel // period
        result[: whole * period].view(whole, period).copy_(values)
        result[whole * period :].copy_(values[: numel - whole * period])
        return result

    grad, exp_avg = repeat(pattern.grad), repeat(pattern.states[0])
    wanted = check_call(rule, case, pattern)
    assert call(rule, case, Operands(grad, [exp_avg]), out=grad) is grad
    starts = [0, 1000, numel // period // 2, 2**30 // period, 2**31 // period - 1]
    starts += [2**31 // period, 2**31 // period + 1]
    for start in starts:
        window = slice(start * period, (start + 1) * period)
        assert_equal_bits(grad[window], wanted, f"update from {window.start}")
        assert_equal_bits(exp_avg[window], pattern.states[0], f"exp_avg from {window.start}")
    tail = numel % period
    assert_equal_bits(grad[-tail:], wanted[:tail], "the update's last elements")
    assert_equal_bits(exp_avg[-tail:], pattern.states[0][:tail], "exp_avg's last elements")
