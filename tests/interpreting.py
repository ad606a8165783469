"""Rules in one mode: compiled, interpreted, or running their formulas."""

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import pytest

import emerging_optimizers as eo
from emerging_optimizers import _build, _native
from emerging_optimizers._user_rules import UserRule

needs_compiler = pytest.mark.skipif(
    os.environ.get("EMERGING_OPTIMIZERS_JIT") == "0" or not _build.has_compiler(),
    reason="rules are not compiled here",
)


def compiled(rule: UserRule) -> UserRule:
    """Return a rule after it has been compiled."""
    rule.compile()
    return rule


@functools.cache
def interpreted(rule: UserRule) -> UserRule:
    """Return a rule of the same function that is never compiled."""
    return rule._interpreted()


def in_the_fallback(rule: UserRule) -> Callable[..., Any]:
    """Return a function that calls a rule of the same function without native kernels."""
    twin = eo.rule(rule.formula)

    def call(*arguments: Any, **options: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            patch.setattr(_native, "native", None)
            warnings.filterwarnings("ignore", "the rule .* runs its formula")
            result = twin(*arguments, **options)
        assert twin.native is None
        return result

    return call
