"""The ways of computing an update that are measured against each other.

A contender prepares a problem once, outside of the clock, and returns the call that is timed: one
step on the problem's tensors. The call returns the update(s), or None where it leaves them in
``problem.updates``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from harness import check_close
from problems import Problem
from roof import prepare_roof
from torch import Tensor

from emerging_optimizers._schedules import bias_correction, half_life_warmup, linear_warmup

Step = Callable[[], Tensor | list[Tensor] | None]


class Contender(ABC):
    """One way of computing an update."""

    name: ClassVar[str]
    title: ClassVar[str]

    @abstractmethod
    def prepare(self, problem: Problem) -> Step:
        """Return a call that performs a step on the problem's tensors."""

    def expect(self, problem: Problem) -> None:
        """Bring the problem's tensors to where this contender's step must bring them."""
        Package().prepare(problem)()


class Package(Contender):
    """This package, allocating nothing."""

    name = "package"
    title = "this package, out="

    def prepare(self, problem: Problem) -> Step:
        """Return one call on all tensors."""
        function = problem.rule.function
        arguments = (*problem.arguments(), *problem.rule.values)
        out = problem.as_given(problem.updates)

        def step() -> None:
            function(*arguments, out=out)

        return step


class PackageAllocating(Contender):
    """This package, with new tensors for the updates."""

    name = "package-new"
    title = "this package"

    def prepare(self, problem: Problem) -> Step:
        """Return one call on all tensors."""
        function = problem.rule.function
        arguments = (*problem.arguments(), *problem.rule.values)
        return lambda: function(*arguments)


class Eager(Contender):
    """The formula in PyTorch's operations, tensor by tensor."""

    name = "eager"
    title = "eager formula"

    def prepare(self, problem: Problem) -> Step:
        """Return a loop over the tensors, or the bare call where there is a single one."""
        formula = problem.rule.formula
        calls = [(*tensors, *problem.rule.values) for tensors in problem.positions()]
        if problem.shape.is_single:
            (arguments,) = calls
            return lambda: formula(*arguments)
        return lambda: [formula(*arguments) for arguments in calls]


class Compiled(Contender):
    """The formula through ``torch.compile``, tensor by tensor."""

    name = "compiled"
    title = "torch.compile"

    def prepare(self, problem: Problem) -> Step:
        """Return a loop over the tensors, or the bare call where there is a single one.

        One shape is compiled as it is. Of many shapes, sizes are left open: one kernel for each
        number of dimensions. The hyperparameters are constants.
        """
        formula = problem.rule.formula
        values = problem.rule.values
        # All problems share the code object below, and what has been compiled for it.
        torch.compiler.reset()

        @torch.compiler.assume_constant_result
        def constants() -> tuple[Any, ...]:
            return values

        def update_into(out: Tensor, *tensors: Tensor) -> None:
            out.copy_(formula(*tensors, *constants()))

        compiled = torch.compile(update_into, dynamic=problem.shape.varies, fullgraph=True)
        calls = list(zip(problem.updates, *zip(*problem.positions(), strict=True), strict=True))
        if problem.shape.is_single:
            (arguments,) = calls
            return lambda: compiled(*arguments)

        def step() -> None:
            for arguments in calls:
                compiled(*arguments)

        return step


class Foreach(Contender):
    """The formula in PyTorch's operations on lists."""

    name = "foreach"
    title = "torch._foreach"

    def prepare(self, problem: Problem) -> Step:
        """Return a few calls on all tensors each."""
        formula = FOREACH_FORMULAS[problem.rule.name]
        tensors = (problem.grads, *problem.states)
        options = problem.rule.options
        return lambda: formula(*tensors, **options)


class Roof(Contender):
    """A plain loop that moves the same bytes."""

    name = "roof"
    title = "roof (plain loop)"

    def prepare(self, problem: Problem) -> Step:
        """Return one call of native code on all tensors."""
        return prepare_roof(problem.updates, problem.grads, problem.states)

    def expect(self, problem: Problem) -> None:
        """Put the mean of the absolute values that are read into everything that is written."""
        for update, (grad, *states) in zip(problem.updates, problem.positions(), strict=True):
            torch.abs(grad, out=update)
            for state in states:
                update.add_(state.abs_())
            update.div_(1 + len(states))
            for state in states:
                state.copy_(update)


_CONTENDERS: tuple[Contender, ...] = (
    Package(),
    PackageAllocating(),
    Eager(),
    Foreach(),
    Compiled(),
    Roof(),
)
CONTENDERS = {contender.name: contender for contender in _CONTENDERS}


# ---- correctness ---------------------------------------------------------------------------------


def check(problem: Problem, contenders: Sequence[Contender], steps: dict[str, Any]) -> None:
    """Raise unless each step's update and states are what they must be, on equal inputs."""
    initial = [[tensor.clone() for tensor in state] for state in problem.states]
    expected: dict[Any, list[list[Tensor]]] = {}
    names = ("update", *problem.rule.states)
    for contender in contenders:
        expect = type(contender).expect
        if expect not in expected:
            _restore(problem, initial)
            contender.expect(problem)
            expected[expect] = [
                [tensor.clone() for tensor in tensors]
                for tensors in (problem.updates, *problem.states)
            ]
        _restore(problem, initial)
        result = steps[contender.name]()
        updates = problem.updates if result is None else result
        updates = [updates] if isinstance(updates, Tensor) else updates
        is_sign = problem.rule.is_sign
        for name, actual, wanted in zip(
            names, (updates, *problem.states), expected[expect], strict=True
        ):
            what = f"{contender.name}, {problem.rule.name} at {problem.shape.name}: {name}"
            check_close(what, actual, wanted, is_sign=is_sign and name == "update")


def _restore(problem: Problem, states: list[list[Tensor]]) -> None:
    for update in problem.updates:
        update.fill_(float("nan"))
    for state, before in zip(problem.states, states, strict=True):
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)


# ---- the formulas on lists -----------------------------------------------------------------------
#
# As few operations as the arithmetic allows, in place where a tensor can be reused. Numerator and
# denominator of an update are both multiplied by the numerator's bias correction, which saves an
# operation. Momentum betas must not be 0.

_Tensors = Sequence[Tensor]


def _update_square_average(averages: _Tensors, grads: _Tensors, beta: float) -> None:
    torch._foreach_mul_(averages, beta)
    torch._foreach_addcmul_(averages, grads, grads, 1 - beta)


def _denominators(exp_avg_sqs: _Tensors, c2: float, eps: float, scale: float) -> _Tensors:
    """Return ``scale * (sqrt(exp_avg_sq / c2) + eps)``."""
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_mul_(denominators, scale / c2**0.5)
    torch._foreach_add_(denominators, scale * eps)
    return denominators


def _look_ahead(
    exp_avgs: _Tensors, grads: _Tensors, beta: float, step: int, correct_bias: bool
) -> tuple[_Tensors, float]:
    """Return Nesterov's momentum ``beta m / c1' + (1 - beta) g / c1`` times a factor, and that."""
    c1 = bias_correction(beta, step, correct_bias)
    c1_next = bias_correction(beta, step + 1, correct_bias)
    scale = c1_next / beta
    return torch._foreach_add(exp_avgs, grads, alpha=scale * (1 - beta) / c1), scale


def _foreach_adam(
    grads: _Tensors,
    exp_avgs: _Tensors,
    exp_avg_sqs: _Tensors,
    betas: tuple[float, float],
    correct_bias: bool,
    use_nesterov: bool,
    step: int,
    eps: float,
) -> _Tensors:
    beta1, beta2 = betas
    c2 = bias_correction(beta2, step, correct_bias)
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    _update_square_average(exp_avg_sqs, grads, beta2)
    if use_nesterov:
        updates, scale = _look_ahead(exp_avgs, grads, beta1, step, correct_bias)
        torch._foreach_div_(updates, _denominators(exp_avg_sqs, c2, eps, scale))
        return updates
    c1 = bias_correction(beta1, step, correct_bias)
    return torch._foreach_div(exp_avgs, _denominators(exp_avg_sqs, c2, eps, scale=c1))


def _foreach_ademamix(
    grads: _Tensors,
    exp_avgs_fast: _Tensors,
    exp_avgs_slow: _Tensors,
    exp_avg_sqs: _Tensors,
    num_beta_slow_warmup_steps: int | None,
    num_alpha_warmup_steps: int | None,
    betas: tuple[float, float, float],
    step: int,
    eps: float,
    correct_bias: bool,
    alpha: float,
) -> _Tensors:
    beta_fast, beta2, final_beta_slow = betas
    beta_slow = half_life_warmup(step, beta_fast, final_beta_slow, num_beta_slow_warmup_steps)
    alpha = linear_warmup(step, alpha, num_alpha_warmup_steps)
    c_fast = bias_correction(beta_fast, step, correct_bias)
    c2 = bias_correction(beta2, step, correct_bias)
    torch._foreach_lerp_(exp_avgs_fast, grads, 1 - beta_fast)
    torch._foreach_lerp_(exp_avgs_slow, grads, 1 - beta_slow)
    _update_square_average(exp_avg_sqs, grads, beta2)
    updates = torch._foreach_add(exp_avgs_fast, exp_avgs_slow, alpha=alpha * c_fast)
    torch._foreach_div_(updates, _denominators(exp_avg_sqs, c2, eps, scale=c_fast))
    return updates


def _foreach_laprop(
    grads: _Tensors,
    exp_avgs: _Tensors,
    exp_avg_sqs: _Tensors,
    correct_bias: bool,
    betas: tuple[float, float],
    step: int,
    eps: float,
) -> _Tensors:
    beta1, beta2 = betas
    c1 = bias_correction(beta1, step, correct_bias)
    c2 = bias_correction(beta2, step, correct_bias)
    _update_square_average(exp_avg_sqs, grads, beta2)
    torch._foreach_mul_(exp_avgs, beta1)
    denominators = _denominators(exp_avg_sqs, c2, eps, scale=1.0)
    torch._foreach_addcdiv_(exp_avgs, grads, denominators, 1 - beta1)
    return torch._foreach_div(exp_avgs, c1)


def _foreach_lion(
    grads: _Tensors, exp_avgs: _Tensors, momentum_beta: float, momentum_beta2: float
) -> _Tensors:
    updates = torch._foreach_lerp(exp_avgs, grads, 1 - momentum_beta)
    torch._foreach_sign_(updates)
    torch._foreach_lerp_(exp_avgs, grads, 1 - momentum_beta2)
    return updates


def _foreach_signum(
    grads: _Tensors,
    exp_avgs: _Tensors,
    momentum_beta: float,
    correct_bias: bool,
    use_nesterov: bool,
    step: int,
    use_shape_scaling: bool,
) -> _Tensors:
    torch._foreach_lerp_(exp_avgs, grads, 1 - momentum_beta)
    if use_nesterov:
        updates, _ = _look_ahead(exp_avgs, grads, momentum_beta, step, correct_bias)
        torch._foreach_sign_(updates)
    else:
        updates = torch._foreach_sign(exp_avgs)
    if use_shape_scaling:
        torch._foreach_mul_(updates, [2 / (grad.shape[0] + grad.shape[1]) for grad in grads])
    return updates


def _foreach_sim_ademamix(
    grads: _Tensors,
    exp_avgs: _Tensors,
    exp_avg_sqs: _Tensors,
    num_beta_fast_warmup_steps: int | None,
    min_beta_fast: float,
    betas: tuple[float, float],
    step: int,
    eps: float,
    correct_bias: bool,
    alpha: float,
) -> _Tensors:
    final_beta_fast, beta2 = betas
    beta = half_life_warmup(step, min_beta_fast, final_beta_fast, num_beta_fast_warmup_steps)
    c1 = bias_correction(beta, step, True) / (1 - beta) if correct_bias else 1.0
    c2 = bias_correction(beta2, step, correct_bias)
    torch._foreach_mul_(exp_avgs, beta)
    torch._foreach_add_(exp_avgs, grads)
    _update_square_average(exp_avg_sqs, grads, beta2)
    updates = torch._foreach_add(exp_avgs, grads, alpha=alpha * c1)
    torch._foreach_div_(updates, _denominators(exp_avg_sqs, c2, eps, scale=c1))
    return updates


FOREACH_FORMULAS: dict[str, Callable[..., _Tensors]] = {
    "adam": _foreach_adam,
    "ademamix": _foreach_ademamix,
    "laprop": _foreach_laprop,
    "lion": _foreach_lion,
    "signum": _foreach_signum,
    "sim_ademamix": _foreach_sim_ademamix,
}
