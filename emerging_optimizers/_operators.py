"""The operators of rules: what they do on devices without a kernel, and with DTensors.

The compiled module registers an operator with its native kernels; this adds the rest.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch

from . import _dtensor

# Of the package's operators, and of those of rules that users define.
NAMESPACE = "emerging_optimizers"
USER_NAMESPACE = "emerging_optimizers_user"

# Of each namespace: what holds the registrations.
_libraries: dict[str, Any] = {}
# The rule of each operator, by the operator's name. Users may define a rule again.
_rules: dict[str, "OperatorRule"] = {}
_taking_dtensors: set[str] = set()


class OperatorRule(Protocol):
    """What an operator needs of its rule. Arguments are in the order of the schema."""

    name: str

    @property
    def summary(self) -> str:
        """The name, and what is special about the native code."""

    def operate_on_devices(self, *arguments: Any, **options: Any) -> None:
        """Update tensors on devices without a kernel."""

    def operate_on_dtensors(self, *arguments: Any, **options: Any) -> None:
        """Update DTensors."""


def connect(rule: OperatorRule, namespace: str, stem: str) -> Any:
    """Let a rule do what the operator ``{stem}_update_`` has no kernel for; return the operator."""
    name = f"{stem}_update_"
    operator = getattr(getattr(torch.ops, namespace), name).default
    key = operator.name()
    is_new = key not in _rules
    _rules[key] = rule
    if is_new:
        if namespace not in _libraries:
            _libraries[namespace] = torch.library.Library(namespace, "IMPL")  # type: ignore[no-untyped-call]

        def operate(*arguments: Any, **options: Any) -> None:
            _rules[key].operate_on_devices(*arguments, **options)

        _libraries[namespace].impl(name, operate, "CompositeExplicitAutograd")
    return operator


def unused_stem(name: str) -> str:
    """Return the stem of a user's operator that is not registered yet: ``name``, or ``name_2``."""
    stem, count = name, 1
    while torch._C._dispatch_has_kernel(f"{USER_NAMESPACE}::{stem}_update_"):
        count += 1
        stem = f"{name}_{count}"
    return stem


def has_cuda_kernel(operator: Any) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "CUDA"))


def dtensor_registration(operator: Any) -> Callable[[], None]:
    """Return a function that lets an operator take DTensors, once their module is imported."""
    key: Any = None if operator is None else operator.name()
    is_registered = operator is None

    def register_for_dtensors() -> None:
        nonlocal is_registered
        if is_registered or not _dtensor.are_imported():
            return
        if key not in _taking_dtensors:
            _taking_dtensors.add(key)
            _dtensor.register(operator, operate_on_dtensors)
        is_registered = True

    def operate_on_dtensors(*arguments: Any, **options: Any) -> None:
        _rules[key].operate_on_dtensors(*arguments, **options)

    # Called while a graph is traced, not by the graph.
    register_for_dtensors._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return register_for_dtensors


def loaded_user_rules() -> list[str]:
    """Return the summaries of users' rules that have native code."""
    return sorted(
        {rule.summary for key, rule in _rules.items() if key.startswith(f"{USER_NAMESPACE}::")}
    )
