"""Rules that users write in Python."""

from collections.abc import Callable
from typing import Any

from .graph import RuleError
from .rule import UserRule

__all__ = ["RuleError", "UserRule", "rule"]


def rule(function: Callable[..., Any]) -> UserRule:
    """Make an optimizer's rule of a function, as a decorator."""
    return UserRule(function)
