"""The update functions: right results for every dtype, size, shape and layout."""

import math

import pytest
import torch
from oracle import RULES, Rule, is_square
from support import (
    LAYOUT_SHAPE,
    LAYOUTS,
    MIXES,
    Layout,
    Mix,
    Operands,
    assert_equal_bits,
    call,
    check_call,
    every_case,
    every_mix,
    every_rule,
    lay_out,
    make_operands,
)

pytestmark = pytest.mark.on_devices("tests-functions")

FLOAT32 = MIXES["float32"]
HALF_GRAD = MIXES["bfloat16 grad, float32 states"]
# Around the tile of 128 elements in which other dtypes are converted, twice that, a page, and one
# thread's share of the work.
SIZES = (0, 1, 2, 15, 16, 17, 127, 128, 129, 255, 256, 257, 4095, 4096, 4097, 16383, 16384, 16385)


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


@pytest.mark.builtin_rules("only Signum scales by the shape")
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
    # Each step continues from the stored states of the previous one.
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
            state.abs() if is_square(name) else state
            for name, state in zip(rule.states, states, strict=True)
        ]
        dtypes = mix.of(rule)
        states = [state.to(dtype) for state, dtype in zip(states, dtypes, strict=True)]
        check_call(rule, case, Operands(grad.to(mix.grad), states), label=case_name)


@pytest.mark.parametrize("rule", [rule for rule in RULES.values() if rule.is_sign], ids=str)
@every_mix
def test_sign_of_zero_and_of_nan_is_zero(rule: Rule, mix: Mix) -> None:
    for value in (0.0, -0.0, math.nan):
        grad = torch.full((2, 300), value, dtype=mix.grad)
        states = [torch.full((2, 300), value, dtype=dtype) for dtype in mix.of(rule)]
        for case in rule.cases.values():
            update = call(rule, case, Operands(grad, states).clone())
            assert_equal_bits(update.abs(), torch.zeros_like(update), f"{rule}: sign({value})")


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
