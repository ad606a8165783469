"""Traces a rule: runs its function once for each outcome of its conditions."""

import contextlib
import dis
import inspect
import linecache
import random
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from .._hyperparameters import Hyperparameter
from . import operations, shadows  # noqa: F401  (operations fills its table)
from .graph import COMPARISONS, Case, Graph, Node, RuleError, inputs_of, no_error_is_lost
from .lifting import Lifting
from .origins import is_users, only_copies
from .proxies import Element, Number, Proxy, as_element, as_number, node_of
from .signature import Signature, read_signature

MAX_RUNS = 256
MAX_CASES = 16
_MAX_CONDITIONS = 24
# How errors of other libraries name what they do not expect.
_PROXIES = ("_Dtype", "_Device", "_NumberType", "'Element'", "Element'>", "'Number'", "Number'>")


class Trace(NamedTuple):
    """A rule, as traced.

    Attributes:
        signature: Its arguments.
        cases: What it computes, for each outcome of its conditions.
        modifies_grad: Whether the function modifies its gradient in place.
        shares: Whether a result may be one of the arguments, or several results the same tensor.
    """

    signature: Signature
    cases: tuple[Case, ...]
    modifies_grad: bool
    shares: bool

    @property
    def may_keep_weight(self) -> bool:
        """Whether some steps have no update."""
        return any(case.update is None for case in self.cases)


def trace_rule(function: Callable[..., Any]) -> Trace:
    """Trace a function.

    Raises:
        RuleError: It cannot be compiled.
    """
    plain = inspect.unwrap(function)  # for its location; decorators are traced, too
    if not isinstance(plain, types.FunctionType) or not isinstance(function, types.FunctionType):
        raise RuleError(f"rule must decorate a function, not {type(function).__name__}")
    lifting = Lifting()
    with _located(plain, lifting), torch.device("cpu"):
        return _Tracer(function, read_signature(function), lifting).trace()


class _Run:
    """One run of the function: the outcomes of its conditions."""

    def __init__(self, graph: Graph, prefix: list[bool]) -> None:
        self.graph = graph
        self.outcomes: list[tuple[Node, bool]] = []
        self._prefix = prefix

    def decide(self, condition: Node) -> bool:
        if condition.op == "!":
            return not self.decide(condition.operands[0])
        for known, outcome in self.outcomes:
            if known is condition:
                return outcome
        implied = _implied(condition, self.outcomes)
        if implied is not None:
            return implied
        if len(self.outcomes) == _MAX_CONDITIONS:
            raise RuleError(
                f"more than {_MAX_CONDITIONS} conditions in a row: the length of a loop must be"
                " known when the rule is defined; loop over a constant range, or write a closed"
                " form; for `step in range(...)`, use comparisons and `%`"
            )
        made = len(self.outcomes)
        outcome = self._prefix[made] if made < len(self._prefix) else True
        self.outcomes.append((condition, outcome))
        return outcome


# The signs of `a - b` for which a comparison is true.
_SIGNS = {"<": {-1}, "<=": {-1, 0}, ">": {1}, ">=": {0, 1}, "==": {0}, "!=": {-1, 1}}


def _implied(condition: Node, outcomes: list[tuple[Node, bool]]) -> bool | None:
    """Return the outcome of a comparison that others of the same two values imply, if any."""
    if condition.op not in COMPARISONS or not all(map(_is_never_nan, condition.operands)):
        return None
    signs = {-1, 0, 1}
    for known, outcome in outcomes:
        if known.op in COMPARISONS and set(known.operands) == set(condition.operands):
            turn = 1 if known.operands == condition.operands else -1
            true = {turn * sign for sign in _SIGNS[known.op]}
            signs &= true if outcome else {-1, 0, 1} - true
    wanted = _SIGNS[condition.op]
    return True if signs <= wanted else False if not signs & wanted else None


def _is_never_nan(node: Node) -> bool:
    constant = node.constant()
    # Calls and optimizers refuse NaN for hyperparameters.
    return node.op in ("step", "hyperparameter") if constant is None else constant == constant


class _Tracer:
    def __init__(
        self, function: types.FunctionType, signature: Signature, lifting: Lifting
    ) -> None:
        self.signature = signature
        self.graph = Graph()
        self.lifting = lifting
        self.function = lifting.copy(function)
        self.modifies_grad = self.shares = False

    def trace(self) -> Trace:
        cases = []
        pending: list[list[bool]] = [[]]
        while pending:
            prefix = pending.pop()
            run = _Run(self.graph, prefix)
            cases.append(self._trace_case(run))
            if len(cases) > MAX_RUNS:
                raise RuleError(
                    f"more than {MAX_RUNS} combinations of conditions: use them as numbers, as in"
                    " `x * float(step > 10)`"
                )
            taken = [outcome for _, outcome in run.outcomes]
            for i in range(len(taken) - 1, len(prefix) - 1, -1):
                pending.append([*taken[:i], False])
        self._check_results(cases)
        self.lifting.check_outside()
        return Trace(self.signature, tuple(cases), self.modifies_grad, self.shares)

    def _trace_case(self, run: _Run) -> Case:
        signature = self.signature
        operands = [self._input(run, name) for name in (signature.grad, *signature.states)]
        before = operands[0].node
        values = {h.name: self._proxy(run, h) for h in signature.hyperparameters}
        values.update({name: Number(run, self._scalar(name)) for name in signature.scalar_states})
        only = only_copies(self.lifting.builtins)
        with no_error_is_lost(), _no_random_numbers(), self._no_raise(), only:
            result = self.function(*operands, **values)
        update, states, scalars = self._split(result, operands[1:])
        results = [value for value in (update, *states) if isinstance(value, Element)]
        own = {id(operand) for operand in operands}
        moved = (s for s, own_state in zip(states, operands[1:], strict=True) if s is not own_state)
        is_shared = any(id(value) in own for value in (update, *moved))
        self.shares |= is_shared or len({id(value) for value in results}) < len(results)
        self.modifies_grad |= operands[0].node is not before
        return Case(
            outcomes=tuple(run.outcomes),
            update=None if update is None else as_element(run, update),
            states=tuple(as_element(run, state) for state in states),
            scalars=tuple(as_number(run, node_of(run, scalar)) for scalar in scalars),
        )

    @contextlib.contextmanager
    def _no_raise(self) -> Iterator[None]:
        """Refuse `raise` and `assert` in the rule and in what it calls."""
        try:
            yield
        except Exception as error:
            *_, last = _frames(error)
            frame = last.tb_frame
            is_raised = dis.opname[frame.f_code.co_code[last.tb_lasti]] == "RAISE_VARARGS"
            if not is_raised or frame.f_builtins is not self.lifting.builtins:
                raise
            raise RuleError(
                f"{_described(error)}: native code cannot raise errors; remove the check, or"
                " declare the domain, as with eo.Beta and eo.NonNegative"
            ).with_traceback(error.__traceback__) from error

    def _input(self, run: _Run, name: str) -> Element:
        node = self.graph.node("element", "input", leaf=name)
        return Element(run, node, shadows.of_argument())

    def _scalar(self, name: str) -> Node:
        return self.graph.node("number", "scalar state", leaf=name)

    def _proxy(self, run: _Run, h: Hyperparameter) -> Any:
        """Return what stands for a hyperparameter; None for one that is None in this run."""
        if h.kind == "step":
            return Number(run, self.graph.node("number", "step"))
        if h.kind == "numbers":
            return tuple(
                Number(run, self.graph.node("number", "hyperparameter", leaf=(h.name, i)))
                for i in range(h.length)
            )
        if h.kind == "optional" and run.decide(self.graph.node("flag", "is None", leaf=h.name)):
            return None
        if h.kind == "flag":
            return run.decide(self.graph.node("flag", "hyperparameter", leaf=(h.name, None)))
        return Number(run, self.graph.node("number", "hyperparameter", leaf=(h.name, None)))

    def _split(self, result: Any, states: list[Element]) -> tuple[Any, list[Any], list[Any]]:
        """Return the update, the states' and the scalar states' values from a result."""
        names, scalar_names = self.signature.states, tuple(self.signature.scalar_states)
        if not isinstance(result, tuple):
            if result is not None and not _is_value(result):
                raise RuleError(
                    f"the rule returns a {type(result).__name__}; expected the update, or a tuple"
                    " of the update and the states"
                )
            if not scalar_names:
                return result, list(states), []
            result = (result,)
        update, *new = result or (None,)
        num_scalars = len(scalar_names)
        if scalar_names and len(new) == num_scalars:
            new = [*states, *new]  # modified in place
        if not result or len(new) != len(names) + num_scalars:
            expected = ", ".join((*names, *scalar_names)) or "none"
            if names and scalar_names:
                expected += f"; or {num_scalars}, if states are modified in place"
            raise RuleError(
                f"the rule returns the update and {len(new)} states; expected"
                f" {len(names) + num_scalars}: {expected}"
            )
        for name, value in zip((*names, *scalar_names), new, strict=True):
            if not _is_value(value):
                is_scalar = name in scalar_names
                what = f"the scalar state {name}" if is_scalar else f"the state {name}"
                expected = "a number" if is_scalar else "a tensor or a number"
                raise RuleError(f"the rule returns {value!r} for {what}; expected {expected}")
            if name in scalar_names and isinstance(value, Element):
                raise RuleError(
                    f"the rule returns a tensor for the scalar state {name}, which is one number:"
                    " compute it from hyperparameters, the step and scalar states"
                )
        if update is not None and not _is_value(update):
            raise RuleError(
                f"the rule returns {update!r} for the update; expected a tensor, a number or None"
            )
        return update, new[: len(names)], new[len(names) :]

    def _check_results(self, cases: list[Case]) -> None:
        if all(case.update is None for case in cases):
            raise RuleError(
                "the rule never returns an update: return it first, before the new states"
            )
        for i, name in enumerate(self.signature.states):
            own = self.graph.node("element", "input", leaf=name)
            if all(case.states[i] is own for case in cases):
                raise RuleError(
                    f"the state {name} is never updated: return its new value after the update, or"
                    f" modify it in place, as with {name}.mul_(...)"
                )
        for i, name in enumerate(self.signature.scalar_states):
            if all(case.scalars[i] is self._scalar(name) for case in cases):
                raise RuleError(
                    f"the scalar state {name} is never updated: return its new value after the"
                    " states"
                )
        if not any(inputs_of(case.results) for case in cases):
            raise RuleError("the rule uses neither the gradient nor a state")


def _described(error: Exception) -> str:
    text = ": ".join(filter(None, (type(error).__name__, str(error))))
    if isinstance(error, UnboundLocalError):
        return (
            f"{text}: both outcomes of each `if` are traced, also pairs that cannot occur together;"
            " use `else`"
        )
    if isinstance(error, NameError):
        return f"{text}: the rule is traced where it is defined; define what it calls above it"
    if not any(name in text for name in _PROXIES):
        return text
    return (
        f"{text.partition(', but expected')[0]}: a rule's tensors and numbers are not accepted"
        " there; use operators, methods of tensors, and functions of torch and math"
    )


@contextlib.contextmanager
def _no_random_numbers() -> Iterator[None]:
    """Raise if random numbers were drawn; they would be constants of the rule."""
    python, pytorch = random.getstate(), torch.get_rng_state()
    yield
    if random.getstate() != python or not torch.equal(torch.get_rng_state(), pytorch):
        random.setstate(python)
        torch.set_rng_state(pytorch)
        raise RuleError("the rule draws random numbers, which would be the same in every step")


def _is_value(value: Any) -> bool:
    return isinstance(value, (Proxy, bool, int, float)) or (
        isinstance(value, torch.Tensor) and value.dim() == 0
    )


# ---- locations of errors -------------------------------------------------------------------------


@contextlib.contextmanager
def _located(function: types.FunctionType, lifting: Lifting) -> Iterator[None]:
    """Name the rule and the line in errors."""
    try:
        yield
    except RecursionError:
        raise
    except Exception as error:
        code, line = function.__code__, function.__code__.co_firstlineno
        places = [(frame.tb_frame.f_code, frame.tb_lineno) for frame in _frames(error)]
        for own, at in [*places, *reversed(getattr(error, "places", ()))]:
            if own in lifting.codes or is_users(own):
                code, line = own, at
        source = linecache.getline(code.co_filename, line).strip()
        what = str(error) if isinstance(error, RuleError) else _described(error)
        place = f"{code.co_filename}:{line}" + (f": `{source}`" if source else "")
        raise RuleError(f"rule {function.__name__}, {place}: {what}") from error


def _frames(error: BaseException) -> Iterator[types.TracebackType]:
    frame = error.__traceback__
    while frame is not None:
        yield frame
        frame = frame.tb_next
