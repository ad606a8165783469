"""A rule that another rule calls."""

from collections.abc import Callable
from typing import Any

from .._hyperparameters import Hyperparameter
from .graph import RuleError
from .proxies import Element, Proxy, as_element
from .shadows import of_argument
from .signature import Signature, check_default


class NestedRule:
    """A rule in another rule: it updates the states in place and returns the update.

    Args:
        rule: The rule.
        formula: Its function, which takes proxies; None if it is written in C++.
    """

    def __init__(self, rule: Any, formula: Callable[..., Any] | None) -> None:
        self.formula = formula
        self._rule = rule

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rule, name)

    def __call__(self, *arguments: Any, **options: Any) -> Element:
        signature: Signature = self._rule.signature
        if self.formula is None:
            raise RuleError(f"{signature.name} in a rule: it is written in C++; write it in Python")
        if signature.scalar_states:
            raise RuleError(
                f"{signature.name} in a rule: it has scalar states: call {signature.name}.formula,"
                f" which returns the new value of {', '.join(signature.scalar_states)}, too"
            )
        try:
            bound = self._rule.__signature__.bind(*arguments, **options)
        except TypeError as error:
            raise RuleError(f"{signature.name} in a rule: {error}") from error
        bound.apply_defaults()
        values = bound.arguments
        if values.pop("out") is not None:
            raise RuleError(f"{signature.name} with out=: assign the result")
        names = (signature.grad, *signature.states)
        tensors = [values.pop(name) for name in names]
        for name, tensor in zip(names, tensors, strict=True):
            if not isinstance(tensor, Element):
                raise RuleError(
                    f"{signature.name} in a rule: {name} must be one tensor, an argument of this"
                    f" rule or computed from one, not {type(tensor).__name__}"
                )
            tensor.check_is_float()
        if len(set(map(id, tensors))) < len(tensors):
            raise RuleError(f"{signature.name} in a rule: the same tensor twice; pass a clone()")
        for hyperparameter in signature.hyperparameters:
            _check(hyperparameter, values[hyperparameter.name])
        trace = tensors[0].trace
        operands = [Element(trace, tensor.node, of_argument()) for tensor in tensors]
        result = self.formula(*operands, **values)
        update, *new = result if isinstance(result, tuple) else (result, *operands[1:])
        nodes = [as_element(trace, value) for value in new]
        for tensor, node in zip(tensors[1:], nodes, strict=True):
            tensor.node = node
        return Element(trace, as_element(trace, 0.0 if update is None else update), of_argument())


def _check(hyperparameter: Hyperparameter, value: Any) -> None:
    """Raise for a value that the rule does not take, where the value is known."""
    items = value if isinstance(value, (tuple, list)) else (value,)
    if hyperparameter.kind == "numbers" and len(items) != hyperparameter.length:
        raise RuleError(
            f"{hyperparameter.name} has {len(items)} values; expected {hyperparameter.length}"
        )
    if hyperparameter.kind != "step" and not any(isinstance(item, Proxy) for item in items):
        check_default(hyperparameter, value)
