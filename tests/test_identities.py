"""What the rules have in common with each other and with PyTorch's optimizers."""

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
    assert_equal_results,
    call,
    every_mix,
    every_rule,
    lay_out,
    make_operands,
)
from torch import Tensor

from emerging_optimizers.scalar_optimizers import (
    calculate_adam_update,
    calculate_ademamix_update,
    calculate_laprop_update,
    calculate_lion_update,
    calculate_signum_update,
    calculate_sim_ademamix_update,
)

builtin = pytest.mark.builtin_rules("compares built-in rules with each other")
pytestmark = pytest.mark.on_devices("tests-functions")

# Covers the errors of both optimizers, and those that the previous steps add.
_TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}

float_dtypes = pytest.mark.parametrize("dtype", list(_TOLERANCE), ids=str)


def _gradients(steps: int, dtype: torch.dtype) -> Tensor:
    """Gradients with a constant sign per element, so that averages do not cancel."""
    device = torch.get_default_device()
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(1)
        signs = torch.randn(37, generator=generator, dtype=torch.float64).sign()
        sizes = 0.1 + torch.rand(steps, 37, generator=generator, dtype=torch.float64)
        decades = 10 ** (torch.rand(37, generator=generator, dtype=torch.float64) * 6 - 3)
    return (signs * sizes * decades).to(device, dtype)


def _assert_relatively_close(got: Tensor, wanted: Tensor, label: str) -> None:
    torch.testing.assert_close(
        got, wanted, rtol=_TOLERANCE[got.dtype], atol=0, msg=lambda text: f"{label}: {text}"
    )


@builtin
@every_mix
@pytest.mark.parametrize("correct_bias", [True, False])
@pytest.mark.parametrize("step", [1, 2, 1000])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.99)], ids=str)
def test_ademamix_without_its_slow_average_is_adam(
    mix: Mix, correct_bias: bool, step: int, betas: tuple[float, float]
) -> None:
    operands = make_operands(RULES["ademamix"], (5, 67), mix)
    grad, (fast, slow, square) = operands.grad, operands.states
    exp_avg, exp_avg_sq = fast.clone(), square.clone()
    if torch.float64 in operands.dtypes:
        # Adam, which has no slow average, must compute in the same type.
        grad = grad.double()
    update = calculate_ademamix_update(
        grad,
        fast,
        slow,
        square,
        num_beta_slow_warmup_steps=10,
        num_alpha_warmup_steps=10,
        betas=(*betas, 0.9999),
        step=step,
        eps=1e-8,
        correct_bias=correct_bias,
        alpha=0,
    )
    adam_update = calculate_adam_update(
        grad, exp_avg, exp_avg_sq, betas, correct_bias, False, step, 1e-8
    )
    assert_equal_bits(update, adam_update, "update")
    assert_equal_bits(fast, exp_avg, "exp_avg")
    assert_equal_bits(square, exp_avg_sq, "exp_avg_sq")


@builtin
def test_ademamix_starts_as_adam() -> None:
    # Alpha rises from 0 and the slow beta from the fast one. After a billionth of both warm-ups,
    # they still have their initial values, to about a millionth.
    grad = make_operands(RULES["adam"], (50,), MIXES["float64"]).grad
    fast, slow, square = (torch.zeros_like(grad) for _ in range(3))
    exp_avg, exp_avg_sq = torch.zeros_like(grad), torch.zeros_like(grad)
    update = calculate_ademamix_update(
        grad, fast, slow, square, 10**9, 10**9, (0.9, 0.999, 0.9999), 1, 1e-8, True
    )
    adam_update = calculate_adam_update(
        grad, exp_avg, exp_avg_sq, (0.9, 0.999), True, False, 1, 1e-8
    )
    torch.testing.assert_close(update, adam_update, rtol=1e-5, atol=0)
    torch.testing.assert_close(slow, fast, rtol=1e-5, atol=0)


@builtin
@float_dtypes
def test_laprop_without_momentum_is_rmsprop(dtype: torch.dtype) -> None:
    parameter = torch.zeros(37, dtype=dtype, requires_grad=True)
    rmsprop = torch.optim.RMSprop([parameter], lr=1.0, alpha=0.99, eps=1e-6)
    exp_avg, exp_avg_sq = torch.zeros(37, dtype=dtype), torch.zeros(37, dtype=dtype)
    for step, grad in enumerate(_gradients(20, dtype), start=1):
        # With a parameter of 0 and a learning rate of 1, the parameter becomes minus the update.
        parameter.data.zero_()
        parameter.grad = grad.clone()
        rmsprop.step()
        update = calculate_laprop_update(
            grad, exp_avg, exp_avg_sq, correct_bias=False, betas=(0.0, 0.99), step=step, eps=1e-6
        )
        _assert_relatively_close(update, -parameter.detach(), f"step {step}: update")
        square = rmsprop.state[parameter]["square_avg"]
        _assert_relatively_close(exp_avg_sq, square, f"step {step}: exp_avg_sq")
        assert_equal_bits(exp_avg, update, f"step {step}: exp_avg")


@builtin
@float_dtypes
def test_adam_is_that_of_torch(dtype: torch.dtype) -> None:
    parameter = torch.zeros(37, dtype=dtype, requires_grad=True)
    adam = torch.optim.Adam([parameter], lr=1.0, betas=(0.9, 0.99), eps=1e-6)
    exp_avg, exp_avg_sq = torch.zeros(37, dtype=dtype), torch.zeros(37, dtype=dtype)
    for step, grad in enumerate(_gradients(20, dtype), start=1):
        parameter.data.zero_()
        parameter.grad = grad.clone()
        adam.step()
        update = calculate_adam_update(
            grad, exp_avg, exp_avg_sq, (0.9, 0.99), True, False, step, 1e-6
        )
        _assert_relatively_close(update, -parameter.detach(), f"step {step}: update")
        state = adam.state[parameter]
        _assert_relatively_close(exp_avg, state["exp_avg"], f"step {step}: exp_avg")
        _assert_relatively_close(exp_avg_sq, state["exp_avg_sq"], f"step {step}: exp_avg_sq")


@builtin
@float_dtypes
def test_nesterov_adam_is_nadam_without_its_schedule(dtype: torch.dtype) -> None:
    # torch's NAdam cannot switch its momentum schedule off, so this adds NAdam's two terms by hand.
    beta1, beta2, eps = 0.9, 0.99, 1e-6
    exp_avg, exp_avg_sq = torch.zeros(37, dtype=dtype), torch.zeros(37, dtype=dtype)
    momentum = torch.zeros(37, dtype=torch.float64)
    square = torch.zeros(37, dtype=torch.float64)
    for step, grad in enumerate(_gradients(20, dtype), start=1):
        momentum = torch.lerp(grad.double(), momentum, beta1)
        square = torch.lerp(grad.double() ** 2, square, beta2)
        next_momentum = momentum / math.fsum(beta1**i for i in range(step + 1))
        now = grad.double() / math.fsum(beta1**i for i in range(step))
        # 1 - beta^t = (1 - beta) (1 + beta + ... + beta^(t-1))
        numerator = beta1 / (1 - beta1) * next_momentum + now
        denominator = (square / (1 - beta2**step)).sqrt() + eps
        update = calculate_adam_update(
            grad, exp_avg, exp_avg_sq, (beta1, beta2), True, True, step, eps
        )
        _assert_relatively_close(update, (numerator / denominator).to(dtype), f"step {step}")


@builtin
@float_dtypes
def test_nesterov_signum_looks_ahead_as_nesterov_adam_does(dtype: torch.dtype) -> None:
    # With beta2 = 0 and no bias correction, Adam normalises the value whose sign Signum takes.
    signum, adam = (make_operands(RULES[n], (999,), MIXES["float64"]) for n in ("signum", "adam"))
    exp_avg, exp_avg_sq = signum.states[0].clone(), torch.ones_like(adam.grad)
    for step in (1, 2, 10):
        grad = make_operands(RULES["signum"], (999,), MIXES["float64"], seed=step).grad.to(dtype)
        sign = calculate_signum_update(grad, signum.states[0], 0.9, True, True, step)
        ahead = calculate_adam_update(
            grad, exp_avg, exp_avg_sq, (0.9, 0.999), True, True, step, 1e-8
        )
        assert_equal_bits(sign, ahead.sign(), f"step {step}: update")
        assert_equal_bits(signum.states[0], exp_avg, f"step {step}: exp_avg")


@builtin
@every_mix
@pytest.mark.parametrize("correct_bias", [True, False])
def test_lion_with_one_beta_is_signum(mix: Mix, correct_bias: bool) -> None:
    # Lion takes the sign of b m + (1 - b) g, which is Signum's momentum up to a positive factor.
    # Both take the sign before the momentum is rounded.
    lion = make_operands(RULES["lion"], (5, 67), mix)
    signum = lion.clone()
    for step in range(1, 6):
        grad = make_operands(RULES["lion"], (5, 67), mix, seed=step).grad
        update = calculate_lion_update(grad, lion.states[0], 0.9)
        signum_update = calculate_signum_update(
            grad, signum.states[0], 0.9, correct_bias, False, step
        )
        assert_equal_bits(update, signum_update, f"step {step}: update")
        assert_equal_bits(lion.states[0], signum.states[0], f"step {step}: exp_avg")


@builtin
@every_mix
def test_lion_momentum_is_that_of_nesterov_signum(mix: Mix) -> None:
    # Nesterov momentum changes only the update.
    lion = make_operands(RULES["lion"], (5, 67), mix)
    signum = lion.clone()
    update = calculate_lion_update(lion.grad, lion.states[0], 0.9)
    signum_update = calculate_signum_update(signum.grad, signum.states[0], 0.9, False, True, 1)
    assert_equal_bits(lion.states[0], signum.states[0], "exp_avg")
    # If gradient and momentum have the same sign, so has any sum with positive weights.
    grad, exp_avg = signum.grad.double(), lion.states[0].double()
    agree = (grad.sign() == exp_avg.sign()) & (update != 0)
    assert agree.any()
    assert_equal_bits(update[agree], signum_update[agree], "update")


@builtin
@every_mix
def test_shape_scaling_is_a_factor(mix: Mix) -> None:
    plain, scaled = (make_operands(RULES["signum"], (3, 5), mix) for _ in range(2))
    update = calculate_signum_update(plain.grad, plain.states[0], 0.9, True, True, 3)
    scaled_update = calculate_signum_update(scaled.grad, scaled.states[0], 0.9, True, True, 3, True)
    assert_equal_bits(scaled_update, update * 0.25, "update")
    assert_equal_bits(scaled.states[0], plain.states[0], "exp_avg")


@builtin
@float_dtypes
@pytest.mark.parametrize("beta", [0.0, 0.9, 0.99])
def test_sim_ademamix_without_its_gradient_is_adam(dtype: torch.dtype, beta: float) -> None:
    # Its momentum is Adam's average / (1 - beta), a factor that the bias correction removes.
    exp_avg, exp_avg_sq, momentum, momentum_sq = (torch.zeros(37, dtype=dtype) for _ in range(4))
    for step, grad in enumerate(_gradients(20, dtype), start=1):
        adam_update = calculate_adam_update(
            grad, exp_avg, exp_avg_sq, (beta, 0.99), True, False, step, 1e-6
        )
        update = calculate_sim_ademamix_update(
            grad, momentum, momentum_sq, None, 0.5, (beta, 0.99), step, 1e-6, True, alpha=0
        )
        _assert_relatively_close(update, adam_update, f"step {step}: update")
        _assert_relatively_close((1 - beta) * momentum, exp_avg, f"step {step}: exp_avg")
        assert_equal_bits(momentum_sq, exp_avg_sq, f"step {step}: exp_avg_sq")


@every_rule
@pytest.mark.parametrize("layout", list(LAYOUTS.values()), ids=list(LAYOUTS))
def test_grad_as_out_changes_no_bit(rule: Rule, layout: Layout) -> None:
    operands = lay_out(make_operands(rule, LAYOUT_SHAPE, MIXES["float32"]), layout)
    if 0 in operands.grad.stride():
        return
    separate = Operands(operands.grad.clone(), [state.clone() for state in operands.states])
    update = call(rule, rule.usual, separate)
    call(rule, rule.usual, operands, out=operands.grad)
    assert_equal_results(rule, (operands.grad, operands), (update, separate))


@every_rule
@every_mix
def test_zero_gradient_and_zero_states_stay_zero(rule: Rule, mix: Mix) -> None:
    operands = make_operands(rule, (3, 50), mix)
    for tensor in operands:
        tensor.zero_()
    for case in rule.cases.values():
        update = call(rule, case, operands)
        for tensor in (update, *operands):
            assert_equal_bits(tensor.abs(), torch.zeros_like(tensor), f"{rule}")


@every_rule
@every_mix
def test_negated_operands_negate_the_update(rule: Rule, mix: Mix) -> None:
    operands = make_operands(rule, (5, 67), mix)
    negated = operands.clone()
    for name, tensor in zip(("grad", *rule.states), negated, strict=True):
        if not is_square(name):
            tensor.neg_()
    for case_name, case in rule.cases.items():
        one, other = operands.clone(), negated.clone()
        update, negated_update = call(rule, case, one), call(rule, case, other)
        # A sum of exactly 0 is positive either way; adding 0 makes every zero positive.
        assert_equal_bits(negated_update.neg() + 0.0, update + 0.0, f"{rule} {case_name}: update")
        for name, state, mirrored in zip(rule.states, one.states, other.states, strict=True):
            mirrored = mirrored if is_square(name) else mirrored.neg()
            assert_equal_bits(mirrored + 0.0, state + 0.0, f"{rule} {case_name}: {name}")
