"""The rules in examples/rules compute what their papers say: as typed, natively, in optimizers."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from interpreting import compiled, interpreted, needs_compiler
from oracle import Array
from rule_references import GALLERY, GALLERY_RULES, GalleryRule
from support import assert_equal_bits, needs_native, to_numpy
from torch import Tensor

every_rule = pytest.mark.parametrize("rule", list(GALLERY_RULES.values()), ids=str)
every_case = pytest.mark.parametrize(
    ("rule", "case"),
    [
        pytest.param(rule, case, id=f"{rule}-{case}")
        for rule in GALLERY_RULES.values()
        for case in rule.cases
    ],
)
every_precision = pytest.mark.parametrize(
    ("grad_dtype", "state_dtype"),
    [
        pytest.param(torch.float64, torch.float64, id="float64"),
        pytest.param(torch.float32, torch.float32, id="float32"),
        pytest.param(torch.bfloat16, torch.float32, id="bfloat16 grad"),
    ],
)

# Eight steps, and one far away, where schedules have ended.
STEPS = (*range(1, 9), 1000)
SHAPES = ((3, 5), (), (130,), (2, 0), (2, 3, 7))


def make_grads(seed: int, dtype: torch.dtype) -> list[Tensor]:
    """Gradients of several sizes and both signs, with zeros, and elements that keep their sign."""
    generator = torch.Generator().manual_seed(seed)
    grads = []
    for shape in SHAPES:
        grad = torch.randn(shape, dtype=torch.float64, generator=generator)
        flat = grad.view(-1)
        flat[1::4] = flat[1::4].abs() * 0.01
        flat[2::4] *= 30
        flat[7::11] = 0
        grads.append(grad.to(dtype))
    return grads


def assert_close(got: Tensor, wanted: Array, tolerance: float, label: str) -> None:
    """Assert errors below a fraction of the value, or of the tensor's usual values."""
    usual = np.median(np.abs(wanted)) if wanted.size else 0.0
    np.testing.assert_allclose(
        to_numpy(got), wanted, rtol=tolerance, atol=tolerance * usual, err_msg=label
    )


def assert_step(
    rule: GalleryRule,
    arguments: dict[str, Any],
    before: Sequence[Tensor],
    update: Tensor | None,
    after: Sequence[Tensor],
    tolerance: float,
) -> None:
    """Assert that an update and states are the reference's, of the same gradient and states.

    A value may differ by a fraction, and by what the same fraction of each operand changes in it,
    so that terms may cancel, and a sign or a mask may be any where its argument is almost 0.
    """

    def evaluate(*operands: Array) -> list[Array]:
        update, states = rule.reference(*operands, **arguments)
        return list(states) if update is None else [update, *states]

    operands = [to_numpy(tensor) for tensor in before]
    wanted = evaluate(*operands)
    got = list(after) if update is None else [update, *after]
    assert len(got) == len(wanted), "one of the update and its reference is None"
    bounds = [tolerance * np.abs(value) for value in wanted]
    for i, operand in enumerate(operands):
        moved = evaluate(*operands[:i], operand * (1 + tolerance), *operands[i + 1 :])
        bounds = [b + np.abs(m - w) for b, m, w in zip(bounds, moved, wanted, strict=True)]
    names = rule.states if update is None else ("update", *rule.states)
    for name, tensor, value, bound in zip(names, got, wanted, bounds, strict=True):
        error = np.abs(to_numpy(tensor) - value)
        worst = (error - bound).argmax() if error.size else 0
        assert (error <= bound).all(), (
            f"{name} {arguments}: {tensor.flatten()[worst]!r} instead of {value.flat[worst]!r}"
        )


def apply_formula(
    rule: GalleryRule, grad: Tensor, states: list[Tensor], arguments: dict[str, Any]
) -> tuple[Tensor | None, list[float]]:
    """Call the function as typed, which returns new states or changes them in place.

    Returns:
        The update, and the new values of the scalar states.
    """
    result = rule.rule.formula(grad.clone(), *states, **arguments)
    update, *new = result if isinstance(result, tuple) else (result,)
    num_states = len(new) - len(rule.scalar_states)
    scalars = new[num_states:]
    new = new[:num_states] or states
    copies = [state.clone() for state in new]
    update = None if update is None else update.clone()
    for state, copy in zip(states, copies, strict=True):
        state.copy_(copy)
    return update, scalars


def make_states(rule: GalleryRule, grads: Sequence[Tensor], dtype: torch.dtype) -> list[Any]:
    """Return a list of zeros for each state."""
    return [[torch.zeros(grad.shape, dtype=dtype) for grad in grads] for _ in rule.states]


def make_scalars(rule: GalleryRule) -> dict[str, Tensor]:
    return {name: torch.tensor(first) for name, first in rule.first_scalars().items()}


def values_of(scalars: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: tensor.item() for name, tensor in scalars.items()}


def test_every_file_is_in_the_table() -> None:
    files = {path.stem for path in GALLERY.glob("*.py")}
    assert files == set(GALLERY_RULES)
    assert len(files) >= 10
    for rule in GALLERY_RULES.values():
        assert "https://" in rule.module.__doc__
        assert rule.optimizer.__doc__


@every_case
def test_formula(rule: GalleryRule, case: str) -> None:
    grads = make_grads(0, torch.float64)
    lists = make_states(rule, grads, torch.float64)
    scalars = rule.first_scalars()
    for step in STEPS:
        grads = make_grads(step, torch.float64)
        following = rule.next_scalars(scalars, rule.arguments(case, step))
        for grad, *states in zip(grads, *lists, strict=True):
            before = [state.clone() for state in states]
            arguments = rule.arguments(case, step) | scalars
            update, new = apply_formula(rule, grad, states, arguments)
            assert_step(rule, arguments, [grad, *before], update, states, rule.tolerance)
            np.testing.assert_allclose(new, list(following.values()), rtol=1e-7)
        scalars = following


@needs_native
@every_case
@every_precision
@pytest.mark.parametrize("mode", [pytest.param("compiled", marks=needs_compiler), "interpreted"])
def test_call(
    rule: GalleryRule, case: str, grad_dtype: torch.dtype, state_dtype: torch.dtype, mode: str
) -> None:
    called = compiled(rule.rule) if mode == "compiled" else interpreted(rule.rule)
    tolerance = rule.tolerance if state_dtype == torch.float64 else 1e-6
    lists = make_states(rule, make_grads(0, grad_dtype), state_dtype)
    scalars = make_scalars(rule)
    for step in STEPS:
        grads = make_grads(step, grad_dtype)
        kept = [grad.clone() for grad in grads]
        before = [[state.clone() for state in states] for states in lists]
        arguments = rule.arguments(case, step) | values_of(scalars)
        following = rule.next_scalars(values_of(scalars), rule.arguments(case, step))
        updates = called(grads, *lists, **(arguments | scalars))
        assert values_of(scalars) == pytest.approx(following, rel=1e-7)
        assert called.is_compiled is (mode == "compiled")
        assert len(updates) == len(grads)
        for i, (grad, update) in enumerate(zip(grads, updates, strict=True)):
            old = [states[i] for states in before]
            new = [states[i] for states in lists]
            assert_equal_bits(grad, kept[i], "grad")
            assert update.dtype == (state_dtype if rule.states else grad_dtype)
            wanted = rule.reference(to_numpy(grad), *map(to_numpy, old), **arguments)[0]
            if wanted is None:
                assert_equal_bits(update, torch.zeros_like(update), f"step {step}: no update")
            given = None if wanted is None else update
            assert_step(rule, arguments, [grad, *old], given, new, tolerance)


@needs_native
@every_rule
def test_a_tensor_and_a_list_are_the_same(rule: GalleryRule) -> None:
    grads = make_grads(1, torch.float32)
    lists = make_states(rule, grads, torch.float32)
    single = make_states(rule, grads, torch.float32)
    scalars = make_scalars(rule)
    for step in (1, 2):
        arguments = rule.arguments("defaults", step)
        before = values_of(scalars)
        updates = rule.rule(grads, *lists, **arguments, **scalars)
        for i, grad in enumerate(grads):
            own = {name: torch.tensor(value) for name, value in before.items()}
            update = rule.rule(grad, *(states[i] for states in single), **arguments, **own)
            assert own == scalars
            assert_equal_bits(update, updates[i], f"step {step}: update")
            for name, one, other in zip(rule.states, single, lists, strict=True):
                assert_equal_bits(one[i], other[i], f"step {step}: {name}")


@needs_native
@every_case
def test_optimizer(rule: GalleryRule, case: str, fused: bool | None) -> None:
    lr, weight_decay = 0.02, 0.1
    start = make_grads(100, torch.float64)
    params = [torch.nn.Parameter(value.clone()) for value in start]
    optimizer = rule.optimizer(
        params,
        lr=lr,
        weight_decay=weight_decay,
        weight_decay_method="decoupled",
        fused=fused,
        **rule.cases[case],
    )
    wanted = [to_numpy(param).copy() for param in params]
    states = [tuple(np.zeros_like(value) for _ in rule.states) for value in wanted]
    scalars = rule.first_scalars()
    # Errors grow along a trajectory.
    tolerance = 100 * rule.tolerance
    for step in range(1, 9):
        before = [param.detach().clone() for param in params]
        for param, grad in zip(params, make_grads(step, torch.float64), strict=True):
            param.grad = grad
        optimizer.step()
        arguments = rule.arguments(case, step)
        following = rule.next_scalars(scalars, arguments)
        for i, param in enumerate(params):
            update, states[i] = rule.reference(
                to_numpy(param.grad), *states[i], **arguments, **scalars
            )
            if update is None:
                assert_equal_bits(param.detach(), before[i], f"step {step}: parameter")
            else:
                wanted[i] = wanted[i] - lr * weight_decay * wanted[i] - lr * update
            assert_close(param, wanted[i], tolerance, f"step {step}: parameter")
            state = optimizer.state[param]
            assert set(state) == {"step", *rule.states, *rule.scalar_states}
            for name, value in zip(rule.states, states[i], strict=True):
                assert_close(state[name], value, tolerance, f"step {step}: {name}")
            assert {name: state[name].item() for name in following} == following
        scalars = following


@needs_native
@every_rule
def test_optimizer_defaults(rule: GalleryRule) -> None:
    """A step without arguments is one with the class's learning rate and the rule's defaults."""
    param = torch.nn.Parameter(torch.ones(7, dtype=torch.float64))
    optimizer = rule.optimizer([param])
    state = [np.zeros(7) for _ in rule.states]
    scalars = rule.first_scalars()
    for step in (1, 2):
        param.grad = make_grads(step, torch.float64)[2][:7]
        before = to_numpy(param).copy()
        optimizer.step()
        arguments = rule.arguments("defaults", step)
        update, state = rule.reference(to_numpy(param.grad), *state, **arguments, **scalars)
        scalars = rule.next_scalars(scalars, arguments)
        group = optimizer.param_groups[0]
        decayed = before * (1 - group["lr"] * group["weight_decay"])
        wanted = before if update is None else decayed - group["lr"] * update
        assert_close(param, wanted, 1e-9, f"step {step}: parameter")


@needs_native
def test_a_step_without_an_update_leaves_bfloat16_parameters_and_masters() -> None:
    param = torch.nn.Parameter(torch.tensor([1.0, -0.0, 3e38, float("nan")]).bfloat16())
    before = param.detach().clone()
    optimizer = GALLERY_RULES["adopt"].optimizer(
        [param], lr=0.5, weight_decay=0.9, master_weights=True
    )
    param.grad = torch.tensor([1.0, float("nan"), float("inf"), -2.0]).bfloat16()
    optimizer.step()
    state = optimizer.state[param]
    # NaNs, too: their payloads are compared.
    assert torch.equal(param.detach().view(torch.int16), before.view(torch.int16))
    assert torch.equal(state["master_param"].view(torch.int32), before.float().view(torch.int32))
    assert int(state["step"]) == 1
    assert_equal_bits(state["exp_avg_sq"].float(), param.grad.float().square(), "exp_avg_sq")


@needs_native
@pytest.mark.parametrize(
    ("name", "torchs"),
    [
        ("adadelta", torch.optim.Adadelta),
        ("adagrad", torch.optim.Adagrad),
        ("adamax", torch.optim.Adamax),
        ("nadam", torch.optim.NAdam),
        ("nesterov_sgd", partial(torch.optim.SGD, momentum=0.9, nesterov=True)),
        ("radam", torch.optim.RAdam),
        ("rprop", torch.optim.Rprop),
    ],
)
def test_as_in_torch(name: str, torchs: Callable[..., torch.optim.Optimizer]) -> None:
    start = make_grads(100, torch.float64)[2]
    params = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    optimizers = [
        GALLERY_RULES[name].optimizer(params[:1], lr=0.01, weight_decay=0.0),
        torchs(params[1:], lr=0.01),
    ]
    for step in range(1, 12):
        for param in params:
            param.grad = make_grads(step, torch.float64)[2]
        for optimizer in optimizers:
            optimizer.step()
        # Both have the product of momenta in float32, but multiply in another precision.
        atol = 1e-8 if name == "nadam" else 0.0
        np.testing.assert_allclose(*map(to_numpy, params), rtol=1e-9, atol=atol)
    assert not torch.equal(params[0], start)
