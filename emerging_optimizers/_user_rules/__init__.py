"""Rules that users write, in Python or in C++."""

from collections.abc import Callable
from typing import Any

from .cpp_rule import CppRule, load_rule
from .graph import RuleError
from .user_rule import UserRule

__all__ = ["CppRule", "RuleError", "UserRule", "load_rule", "rule"]


def rule(function: Callable[..., Any]) -> UserRule:
    """Make a Python function the rule of an element-wise optimizer. Use it as a decorator.

    The function takes tensors of one shape: the gradient, then the states. It returns the update,
    or a tuple of the update and the new states, in their order; it may also modify states in place.
    An update of None leaves the weights alone in that step. Keyword-only parameters are
    hyperparameters; `step` is the step number, counted from 1. One of the type ``eo.ScalarState``
    is a number that is carried from step to step: its default is the first value, and its new value
    is returned after the states.

    The function is traced at its definition: each operation must be element-wise, and an ``if`` may
    depend on hyperparameters and on the step. See the guide "Write your own optimizer".

    Args:
        function: The formula.

    Returns:
        The rule, which is called like the function: with tensors or with sequences of them, and
        with `out`. A class of optimizers takes it as ``class Name(ScalarOptimizer, rule=...)``.

    Raises:
        RuleError: The function cannot be compiled; the message names the line and the operation.

    Example:
        >>> import torch
        >>> import emerging_optimizers as eo
        >>> @eo.rule
        ... def momentum(grad, exp_avg, *, beta: eo.Beta = 0.9):
        ...     exp_avg.mul_(beta).add_(grad, alpha=1 - beta)
        ...     return exp_avg
        >>> class Momentum(eo.ScalarOptimizer, rule=momentum, lr=0.1):
        ...     "SGD with an average of the gradients."
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = Momentum([weight], lr=1.0, beta=0.5)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([0., 0.])
    """
    return UserRule(function)
