"""The ways of computing an update that are measured against each other.

A contender prepares a problem once, outside of the clock, and returns the call that is timed: one
step on the problem's tensors. The call returns the update(s), or None if they are in
``problem.updates``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from foreach_formulas import FOREACH_FORMULAS
from harness import check_close
from problems import Problem, Rule
from roof import prepare_roof
from torch import Tensor

Step = Callable[[], Tensor | list[Tensor] | None]


class Contender(ABC):
    """One way of computing an update."""

    name: ClassVar[str]
    title: ClassVar[str]

    def has(self, rule: Rule) -> bool:
        """Return whether it can compute the rule's update."""
        return True

    @abstractmethod
    def prepare(self, problem: Problem) -> Step:
        """Return a call that performs a step on the problem's tensors."""

    def expect(self, problem: Problem) -> None:
        """Compute what this contender's step must compute, into the problem's tensors."""
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

    def has(self, rule: Rule) -> bool:
        """Return whether there is such a form of the rule's formula."""
        return rule.name in FOREACH_FORMULAS

    def prepare(self, problem: Problem) -> Step:
        """Return a few calls on all tensors each."""
        formula = FOREACH_FORMULAS[problem.rule.name]
        tensors = (problem.grads, *problem.states)
        options = problem.rule.options
        return lambda: formula(*tensors, **options)


class Roof(Contender):
    """A simple loop that moves the same bytes."""

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
    """Raise unless each step computes the right update and states, from equal inputs."""
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
