"""The ways of performing an optimizer's step that are measured against each other.

A contender prepares a problem once, outside of the clock, and returns the call that is timed: one
step on the problem's tensors.
"""

import importlib.util
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from harness import check_close, one_thread
from loops import FOREACH, FUSED, LOOPS, Loop
from problems import RULES, OptimizerProblem, Rule
from roof import prepare_roof
from torch import Tensor
from torch.optim import AdamW, Optimizer, RMSprop

from emerging_optimizers import ScalarOptimizer

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
    counts_in_tensors = isinstance(optimizer, AdamW | RMSprop | ScalarOptimizer)
    rule = problem.rule
    keys = rule.states if isinstance(optimizer, Loop) else rule.state_keys
    for param, *values in zip(params, *states, strict=True):
        optimizer.state[param] = dict(zip(keys, values, strict=True))
        count: int | Tensor = problem.steps_done
        if counts_in_tensors:
            on_device = optimizer.defaults["capturable"] or optimizer.defaults.get("fused")
            count = torch.tensor(float(count), device=param.device if on_device else "cpu")
        optimizer.state[param]["step"] = count
    return optimizer


class RoofStep(StepContender):
    """A simple loop that moves the same bytes."""

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
    OptimizerStep("foreach", "PyTorch, foreach", FOREACH),
    OptimizerStep("fused", "PyTorch, fused", FUSED),
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
