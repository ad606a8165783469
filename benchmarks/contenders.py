"""The ways of computing an update, or an optimizer's step, that are measured against each other.

A contender prepares a problem once, outside of the clock, and returns the call that is timed: one
step on the problem's tensors. The call of an update's contender returns the update(s), or None
where it leaves them in ``problem.updates``.
"""

import importlib.util
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, ClassVar

import torch
from harness import check_close, one_thread
from problems import RULES, OptimizerProblem, Problem, Rule
from roof import prepare_roof
from torch import Tensor
from torch.optim import AdamW, Optimizer

from emerging_optimizers import ScalarOptimizer
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
        return prepare_roof(problem.grads, problem.states, problem.updates)

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


# ---- the rules as optimizers in PyTorch's operations ---------------------------------------------
#
# Parameter by parameter, with the operations that torch.optim's own loops use.


class PlainOptimizer(Optimizer):
    """A rule with decoupled weight decay. It finds its states there, and counts steps as an int."""

    def __init__(self, params: Sequence[Tensor], **defaults: Any) -> None:
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all parameters."""
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                state["step"] += 1
                param.mul_(1 - group["lr"] * group["weight_decay"])
                self.update(param, param.grad, state, group)

    def update(
        self, param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """Update a parameter and its states."""
        raise NotImplementedError


class PlainAdEMAMix(PlainOptimizer):
    """AdEMAMix."""

    def update(
        self, param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """Update a parameter and its states."""
        step, (beta_fast, beta2, beta_slow) = state["step"], group["betas"]
        fast, slow, exp_avg_sq = (state[f"exp_avg_{name}"] for name in ("fast", "slow", "sq"))
        beta_slow = half_life_warmup(
            step, beta_fast, beta_slow, group["num_beta_slow_warmup_steps"]
        )
        alpha = linear_warmup(step, group["alpha"], group["num_alpha_warmup_steps"])
        fast.lerp_(grad, 1 - beta_fast)
        slow.lerp_(grad, 1 - beta_slow)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = exp_avg_sq.sqrt().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
        mixed = fast.div(1 - beta_fast**step).add_(slow, alpha=alpha)
        param.addcdiv_(mixed, denominator, value=-group["lr"])


class PlainLaProp(PlainOptimizer):
    """LaProp."""

    def update(
        self, param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """Update a parameter and its states."""
        step, (beta1, beta2) = state["step"], group["betas"]
        exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = exp_avg_sq.sqrt().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
        exp_avg.mul_(beta1).addcdiv_(grad, denominator, value=1 - beta1)
        param.add_(exp_avg, alpha=-group["lr"] / (1 - beta1**step))


class PlainLion(PlainOptimizer):
    """Lion."""

    def update(
        self, param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """Update a parameter and its state."""
        beta1, beta2 = group["betas"]
        exp_avg = state["exp_avg"]
        param.add_(exp_avg.lerp(grad, 1 - beta1).sign_(), alpha=-group["lr"])
        exp_avg.lerp_(grad, 1 - beta2)


class PlainSignum(PlainOptimizer):
    """Signum with Nesterov momentum."""

    def update(
        self, param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """Update a parameter and its state."""
        step, momentum = state["step"], group["momentum"]
        exp_avg = state["exp_avg"]
        exp_avg.lerp_(grad, 1 - momentum)
        ahead = exp_avg.mul(momentum / (1 - momentum ** (step + 1)))
        ahead.add_(grad, alpha=(1 - momentum) / (1 - momentum**step))
        param.add_(ahead.sign_(), alpha=-group["lr"])


class PlainSimplifiedAdEMAMix(PlainOptimizer):
    """Simplified AdEMAMix."""

    def update(
        self, param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """Update a parameter and its states."""
        step, (beta1, beta2) = state["step"], group["betas"]
        exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
        beta1 = half_life_warmup(
            step, group["min_beta_fast"], beta1, group["num_beta_fast_warmup_steps"]
        )
        exp_avg.mul_(beta1).add_(grad)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = exp_avg_sq.sqrt().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
        mixed = exp_avg.mul((1 - beta1) / (1 - beta1**step)).add_(grad, alpha=group["alpha"])
        param.addcdiv_(mixed, denominator, value=-group["lr"])


LOOPS: dict[str, Callable[..., Optimizer]] = {
    "adam": partial(AdamW, foreach=False),
    "ademamix": PlainAdEMAMix,
    "laprop": PlainLaProp,
    "lion": PlainLion,
    "signum": PlainSignum,
    "sim_ademamix": PlainSimplifiedAdEMAMix,
}


# ---- the optimizers that are measured ------------------------------------------------------------

_CHECKED_STEPS = 3


def has_deepspeed() -> bool:
    """Return whether DeepSpeed is installed."""
    return importlib.util.find_spec("deepspeed") is not None


def _deepspeed_adamw(params: Sequence[Tensor], **arguments: Any) -> Optimizer:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Imported only where it is measured: it takes seconds, and more to compile at the first use.
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(params, adamw_mode=True, **arguments)


class StepContender(ABC):
    """One way of performing an optimizer's step."""

    name: str
    title: str

    def has(self, rule: Rule) -> bool:
        """Return whether it can perform the rule's step."""
        return True

    @abstractmethod
    def prepare(self, problem: OptimizerProblem) -> Callable[[], object]:
        """Return a call that performs a step on the problem's tensors."""

    @abstractmethod
    def expect(self, problem: OptimizerProblem) -> list[list[Tensor]]:
        """Return what the checked steps must make of what the problem's steps modify."""


@dataclass
class OptimizerStep(StepContender):
    """An optimizer's ``step``; of the optimizer that `optimizers` makes, by the rule's name."""

    name: str
    title: str
    optimizers: Mapping[str, Callable[..., Optimizer]]

    def has(self, rule: Rule) -> bool:
        """Return whether there is an optimizer for the rule."""
        return rule.name in self.optimizers

    def prepare(self, problem: OptimizerProblem) -> Callable[[], object]:
        """Return the optimizer's method."""
        make = self.optimizers[problem.rule.name]
        return _make_optimizer(make, problem, problem.params, problem.states).step

    def expect(self, problem: OptimizerProblem) -> list[list[Tensor]]:
        """Perform the steps in float64, parameter by parameter."""
        expected: list[list[Tensor]] = [[] for _ in problem.modified]
        for param, *states in zip(problem.params, *problem.states, strict=True):
            precise = param.detach().double().requires_grad_()
            precise.grad = param.grad.double()
            precise_states = [state.double() for state in states]
            loop = LOOPS[problem.rule.name]
            optimizer = _make_optimizer(loop, problem, [precise], [[s] for s in precise_states])
            for _ in range(_CHECKED_STEPS):
                optimizer.step()
            for column, tensor in zip(expected, (precise, *precise_states), strict=True):
                column.append(tensor.detach().float())
        return expected


def _make_optimizer(
    make: Callable[..., Optimizer],
    problem: OptimizerProblem,
    params: Sequence[Tensor],
    states: Sequence[Sequence[Tensor]],
) -> Optimizer:
    """Return an optimizer that has already taken the problem's number of steps."""
    optimizer = make(params, **problem.arguments)
    counts_in_tensors = isinstance(optimizer, AdamW | ScalarOptimizer)
    for param, *values in zip(params, *states, strict=True):
        optimizer.state[param] = dict(zip(problem.rule.states, values, strict=True))
        count: int | Tensor = problem.steps_done
        if counts_in_tensors:
            on_device = optimizer.defaults["capturable"] or optimizer.defaults["fused"]
            count = torch.tensor(float(count), device=param.device if on_device else "cpu")
        optimizer.state[param]["step"] = count
    return optimizer


class RoofStep(StepContender):
    """A plain loop that moves the same bytes."""

    name = "roof"
    title = "roof (plain loop)"

    def prepare(self, problem: OptimizerProblem) -> Callable[[], object]:
        """Return one call of native code on all tensors."""
        return prepare_roof(problem.grads, problem.modified)

    def expect(self, problem: OptimizerProblem) -> list[list[Tensor]]:
        """Put the mean of the absolute values that are read into everything that is written."""
        expected: list[list[Tensor]] = [[] for _ in problem.modified]
        for grad, *modified in zip(problem.grads, *problem.modified, strict=True):
            tensors = [tensor.clone() for tensor in modified]
            for _ in range(_CHECKED_STEPS):
                mean = sum((tensor.abs_() for tensor in tensors), grad.abs()).div_(1 + len(tensors))
                for tensor in tensors:
                    tensor.copy_(mean)
            for column, tensor in zip(expected, tensors, strict=True):
                column.append(tensor)
        return expected


_STEP_CONTENDERS: tuple[StepContender, ...] = (
    OptimizerStep("package", "this package", {r.name: r.optimizer for r in RULES.values()}),
    OptimizerStep(
        "package-plain",
        "this package, fused=False",
        {r.name: partial(r.optimizer, fused=False) for r in RULES.values()},
    ),
    OptimizerStep("loop", "PyTorch, a loop", LOOPS),
    OptimizerStep("foreach", "PyTorch, foreach", {"adam": partial(AdamW, foreach=True)}),
    OptimizerStep("fused", "PyTorch, fused", {"adam": partial(AdamW, fused=True)}),
    OptimizerStep(
        "deepspeed", "DeepSpeedCPUAdam", {"adam": _deepspeed_adamw} if has_deepspeed() else {}
    ),
    RoofStep(),
)
STEP_CONTENDERS = {contender.name: contender for contender in _STEP_CONTENDERS}


def check_steps(
    problem: OptimizerProblem, contenders: Sequence[StepContender], steps: Mapping[str, Any]
) -> None:
    """Raise unless a few steps bring parameters and states to where they must."""
    initial = [[tensor.clone() for tensor in tensors] for tensors in problem.modified]
    # One kind's expectation at a time: it is as large as all that a step modifies.
    for _, of_a_kind in groupby(contenders, key=type):
        expected: list[list[Tensor]] = []
        for contender in of_a_kind:
            _set(problem.modified, initial)
            if not expected:
                with one_thread():
                    expected = contender.expect(problem)
            for _ in range(_CHECKED_STEPS):
                steps[contender.name]()
            for name, actual, wanted in zip(
                ("param", *problem.rule.states), problem.modified, expected, strict=True
            ):
                what = f"{contender.name}, {problem.rule.name} at {problem.shape.name}: {name}"
                check_close(what, actual, wanted, is_sign=problem.rule.is_sign and name == "param")
    _set(problem.modified, initial)


def _set(tensors: Sequence[Sequence[Tensor]], values: Sequence[Sequence[Tensor]]) -> None:
    for column, new in zip(tensors, values, strict=True):
        for tensor, value in zip(column, new, strict=True):
            tensor.copy_(value)
