"""Random calls with any rules, shapes, dtypes, layouts and list partitions."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import RULES, Rule, needs_matrix
from support import DTYPES, Mix, Operands, assert_equal_results, call, check_call, make_operands
from torch import Tensor

pytestmark = pytest.mark.on_devices("tests-functions")

dtypes = st.sampled_from(DTYPES)
layouts = st.sampled_from(
    ["dense", "transposed", "offset", "strided", "reversed order", "expanded"]
)
sizes = st.one_of(st.integers(0, 5), st.sampled_from([16, 127, 128, 129, 300]))
any_shape = st.lists(sizes, max_size=2).map(tuple) | st.lists(st.integers(1, 5), max_size=4).map(
    tuple
)
matrix_shape = st.tuples(sizes, sizes)


def _laid_out(tensor: Tensor, layout: str, offset: int) -> Tensor:
    """The same values in a different layout."""
    if layout == "transposed" and tensor.dim() >= 2:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "reversed order" and tensor.dim() >= 2:
        order = tuple(reversed(range(tensor.dim())))
        return tensor.permute(order).contiguous().permute(order)
    if layout == "offset":
        buffer = tensor.new_full((tensor.numel() + 20,), 7.0)
        return buffer[offset : offset + tensor.numel()].view(tensor.shape).copy_(tensor)
    if layout == "strided" and tensor.dim() >= 1:
        buffer = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), 7.0)
        return buffer[..., 1::2].copy_(tensor)
    return tensor


def _expanded(tensor: Tensor) -> Tensor:
    if tensor.dim() == 0 or tensor.shape[0] == 0:
        return tensor
    return tensor[:1].clone().expand(tensor.shape)


@st.composite
def positions(draw: st.DrawFn, rule: Rule, shapes: st.SearchStrategy[Any]) -> Operands:
    mix = Mix(draw(dtypes), (draw(dtypes), draw(dtypes), draw(dtypes)))
    operands = make_operands(rule, draw(shapes), mix, seed=draw(st.integers(0, 1000)))
    arranged = []
    for tensor in operands:
        layout = draw(layouts)
        if layout == "expanded" and tensor is operands.grad:
            arranged.append(_expanded(tensor))
        else:
            arranged.append(_laid_out(tensor, layout, draw(st.integers(0, 17))))
    return Operands(arranged[0], arranged[1:])


@st.composite
def calls(draw: st.DrawFn) -> tuple[Rule, str, list[Operands]]:
    rule = draw(st.sampled_from(list(RULES.values())))
    case_name = draw(st.sampled_from(list(rule.cases)))
    shapes = matrix_shape if needs_matrix(rule.cases[case_name]) else any_shape
    return rule, case_name, draw(st.lists(positions(rule, shapes), min_size=1, max_size=5))


def _copies(operands: list[Operands]) -> list[Operands]:
    """Dense copies, for the reference call."""
    return [
        Operands(
            position.grad.clone(memory_format=torch.contiguous_format),
            [state.clone(memory_format=torch.contiguous_format) for state in position.states],
        )
        for position in operands
    ]


@given(calls())
def test_any_list_is_right_and_equals_single_calls(drawn: tuple[Rule, str, list[Operands]]) -> None:
    rule, case_name, operands = drawn
    case = rule.cases[case_name]
    alone = _copies(operands)
    updates = check_call(rule, case, operands, label=case_name)
    for i, position in enumerate(alone):
        update = call(rule, case, position)
        assert_equal_results(rule, (updates[i], operands[i]), (update, position), f"[{i}]")


@given(calls(), st.lists(st.integers(0, 5), max_size=3))
def test_any_partition_gives_the_same_bits(
    drawn: tuple[Rule, str, list[Operands]], cuts: list[int]
) -> None:
    rule, case_name, operands = drawn
    case = rule.cases[case_name]
    parts = _copies(operands)
    updates = call(rule, case, operands)
    places = [0, *sorted(min(cut, len(parts)) for cut in cuts), len(parts)]
    results: list[Tensor] = []
    for begin, end in itertools.pairwise(places):
        results += call(rule, case, parts[begin:end])
    for i in range(len(parts)):
        assert_equal_results(rule, (updates[i], operands[i]), (results[i], parts[i]), f"[{i}]")


@given(calls(), st.data())
def test_any_out_gives_the_update_rounded(
    drawn: tuple[Rule, str, list[Operands]], data: st.DataObject
) -> None:
    rule, case_name, operands = drawn
    case = rule.cases[case_name]
    outs = []
    for position in operands:
        dense = torch.empty(position.grad.shape, dtype=data.draw(dtypes))
        outs.append(_laid_out(dense, data.draw(layouts), data.draw(st.integers(0, 17))))
    same_dtype = _copies(operands)
    wanted = [torch.empty(out.shape, dtype=out.dtype) for out in outs]
    check_call(rule, case, operands, out=outs, label=case_name)
    call(rule, case, same_dtype, out=wanted)
    for i in range(len(operands)):
        got = (outs[i], operands[i])
        assert_equal_results(rule, got, (wanted[i], same_dtype[i]), f"[{i}]")
