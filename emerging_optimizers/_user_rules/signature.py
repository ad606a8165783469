"""A rule's signature: its gradient, states and hyperparameters."""

import inspect
import keyword
import math
import re
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from .._codes import Code, code_of, scale_key
from .._groups import SHAPE_SCALING
from .._hyperparameters import (
    Beta,
    Hyperparameter,
    NonNegative,
    ScalarState,
    check_domain,
    read_number,
)
from .._scalar_states import as_float32
from .graph import RuleError

MAX_STATES = 5
MAX_SCALAR_STATES = 4
# A rule's struct has 256 bytes.
_MAX_NUMBERS = 32
# What the operator, the update function or an optimizer's state call something else.
_RESERVED = (
    "out",
    "self",
    "updates",
    "grads",
    "step_tensor",
    "master_param",
    "params",
    SHAPE_SCALING,
)
_DOMAINS = (Beta, NonNegative, float, int)
_CODED = re.compile(r"\b(Signed|Unsigned)State\b")
# With any number of items, which the default tells.
_SEQUENCES = (tuple, list, Sequence)


class Signature(NamedTuple):
    """What a rule takes.

    Attributes:
        grad: The gradient's name.
        states: The states' names.
        hyperparameters: The hyperparameters and, where it is named, the step, in their order.
        defaults: The defaults of those that have one.
        scalar_states: The scalar states' names and first values.
        name: The rule's name.
        codes: The formats in which the states may be stored as 8-bit codes; empty if none may be.
    """

    grad: str
    states: tuple[str, ...]
    hyperparameters: tuple[Hyperparameter, ...]
    defaults: dict[str, Any]
    scalar_states: dict[str, float]
    name: str
    codes: tuple[Code | None, ...] = ()

    @property
    def counts_from_1(self) -> bool:
        """Whether step 0 is refused; a flag `correct_bias` refuses it only if it is set."""
        flags = (h.name for h in self.hyperparameters if h.kind == "flag")
        return self.has_step and "correct_bias" not in flags

    @property
    def has_step(self) -> bool:
        return any(h.kind == "step" for h in self.hyperparameters)


def read_signature(function: Callable[..., Any]) -> Signature:
    """Return a rule's signature.

    Raises:
        RuleError: It has no gradient, too many states, variable arguments, or a name, default or
            annotation that cannot be used.
    """
    name = function.__name__
    if name == "<lambda>":
        raise RuleError("a rule needs a name: use `def`, not a lambda")
    check_name(name, "the rule")
    parameters = inspect.signature(function).parameters.values()
    tensors = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    for p in parameters:
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            raise RuleError(f"{p}: name each state and hyperparameter")
        check_name(p.name, "an argument")
        _check_is_free(p.name)
    for p in tensors:
        if p.default is not p.empty or p.name == "step" or _is_scalar_state(function, p):
            raise RuleError(
                f"{p.name} is positional, so it is a tensor: write `*` before the hyperparameters"
                " and the step"
            )
    if not tensors:
        raise RuleError("a rule needs a positional parameter, which is the gradient")
    states = tuple(p.name for p in tensors[1:])
    codes = tuple(_code_of(function, p) for p in tensors[1:])
    if len(states) > MAX_STATES:
        raise RuleError(f"{len(states)} states; at most {MAX_STATES} are supported: split the rule")
    keywords = [p for p in parameters if p.kind == p.KEYWORD_ONLY]
    _check_is_no_state(function, tensors[0], keywords)
    scalar_states = {p.name: _first_of(p) for p in keywords if _is_scalar_state(function, p)}
    if len(scalar_states) > MAX_SCALAR_STATES:
        raise RuleError(
            f"{len(scalar_states)} scalar states; at most {MAX_SCALAR_STATES} are supported: split"
            " the rule"
        )
    keywords = [p for p in keywords if p.name not in scalar_states]
    hyperparameters = tuple(_read(function, p) for p in keywords)
    if len(scalar_states) + sum(h.length for h in hyperparameters) > _MAX_NUMBERS:
        raise RuleError(f"the hyperparameters have more than {_MAX_NUMBERS} numbers in total")
    defaults = {p.name: p.default for p in keywords if p.default is not p.empty}
    signature = Signature(
        tensors[0].name, states, hyperparameters, defaults, scalar_states, name, codes
    )
    _check_lists(signature)
    return signature


def check_names(signature: Signature) -> None:
    """Raise for a signature that is not a function's, if a name in it cannot be used."""
    check_name(signature.name, "the rule")
    names = [signature.grad, *signature.states, *signature.scalar_states]
    names += [h.name for h in signature.hyperparameters if h.kind != "step"]
    for name in names:
        check_name(name, "an argument")
        if name != SHAPE_SCALING:
            _check_is_free(name)
        _check_is_no_type(name)
        if name == "step":
            raise RuleError("an argument cannot be named step: the step number is StepArgument{}")
        if names.count(name) > 1:
            raise RuleError(f"two arguments are named {name}: rename one of them")
    _check_lists(signature)


def _check_is_free(name: str) -> None:
    if name in _RESERVED:
        raise RuleError(f"an argument cannot be named {name}, which has another meaning: rename it")


def _check_is_no_type(name: str) -> None:
    try:
        torch._C.parse_schema(f"rule(float {name}) -> ()")
    except RuntimeError:
        raise RuleError(f"{name} is reserved in PyTorch's operator schemas: rename it") from None


def _check_lists(signature: Signature) -> None:
    names = [f"{state}_list" for state in signature.states]
    names += [*signature.scalar_states, *(h.name for h in signature.hyperparameters)]
    for twice in {n for n in names if names.count(n) > 1}:
        raise RuleError(
            f"the hyperparameter {twice} has the name of an operator's argument: rename it"
        )
    coded = zip(signature.states, signature.codes, strict=False)  # no codes if none may be coded
    scales = {scale_key(state): state for state, code in coded if code is not None}
    for name in (*signature.states, *signature.scalar_states):
        if name in scales:
            raise RuleError(
                f"{name} is the key of the scales of {scales[name]}, which may be stored in 8 bits:"
                " rename it"
            )


def check_name(name: str, what: str) -> None:
    """Raise for what is not a name in Python and C++."""
    if not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII) or keyword.iskeyword(name):
        raise RuleError(
            f"{what} is named {name}: use a name of ASCII letters, digits and _ that starts with a"
            " letter and is not a keyword"
        )


def _read(function: Callable[..., Any], parameter: inspect.Parameter) -> Hyperparameter:
    """Return a keyword-only argument as a hyperparameter; check its default."""
    name, default = parameter.name, parameter.default
    has_default = default is not parameter.empty
    if name == "step":
        return Hyperparameter(name, "step")
    _check_is_no_type(name)
    annotation = _resolve(function, parameter)
    if annotation is None:
        hyperparameter = _infer(name, default if has_default else None, has_default)
    else:
        hyperparameter = _from_annotation(name, annotation, default if has_default else None)
    if has_default:
        try:
            check_default(hyperparameter, default)
        except TypeError as error:
            raise RuleError(
                f"{error}: the default must be a number, a bool, None or a tuple of numbers; make"
                " anything else a variable outside of the rule"
            ) from error
    return hyperparameter


def _is_scalar_state(function: Callable[..., Any], parameter: inspect.Parameter) -> bool:
    try:
        return _resolve(function, parameter) is ScalarState
    except RuleError:
        return False  # `_read` reports it, if the annotation is needed


def _code_of(function: Callable[..., Any], parameter: inspect.Parameter) -> Code | None:
    """Return the format in which a state may be stored as 8-bit codes."""
    try:
        annotation = _resolve(function, parameter)
    except RuleError as error:
        # Other types of tensors need not be there when the rule is defined.
        if isinstance(parameter.annotation, str) and _CODED.search(parameter.annotation):
            raise RuleError(
                f"{error}: import SignedState and UnsignedState where the rule is defined, not only"
                " for type checkers"
            ) from error
        return None
    if any(code_of(part) for part in typing.get_args(annotation)):
        raise RuleError(
            f"{parameter.name}: a state is one tensor: annotate it with SignedState or"
            " UnsignedState alone"
        )
    return code_of(annotation)


def _check_is_no_state(
    function: Callable[..., Any], grad: inspect.Parameter, keywords: Sequence[inspect.Parameter]
) -> None:
    """Raise for what is annotated as a state, and is none."""
    if _code_of(function, grad) is not None:
        raise RuleError(
            f"{grad.name} is the gradient, which is not stored: annotate the states only, which"
            " come after it"
        )
    for p in keywords:
        if _code_of(function, p) is not None:
            raise RuleError(
                f"{p.name} is keyword-only, so it is a hyperparameter, and SignedState and"
                " UnsignedState are types of states: write states before `*`"
            )


def _first_of(parameter: inspect.Parameter) -> float:
    """Return the first value of a scalar state."""
    name, first = parameter.name, parameter.default
    if name == "step":
        raise RuleError("step is the step number: name the scalar state differently")
    _check_is_no_type(name)
    if first is parameter.empty or isinstance(first, bool):
        raise RuleError(
            f"{name} is a scalar state: give it a default, the number that a new optimizer starts"
            f" with, as in {name}: eo.ScalarState = 1.0"
        )
    try:
        number = float(read_number(name, first))  # NumPy's have another repr
    except TypeError as error:
        raise RuleError(f"{error}: the default of a scalar state is its first value") from error
    check_first(name, number)
    return number


def check_first(name: str, number: float) -> None:
    """Raise for the first value of a scalar state that float32 cannot hold."""
    if math.isfinite(number) and math.isinf(as_float32(number)):
        raise RuleError(f"{name} starts at {number}, beyond the range of float32, which stores it")


def check_default(hyperparameter: Hyperparameter, default: Any) -> None:
    """Raise for a default of another type, or outside of the domain."""
    name = hyperparameter.name
    value = hyperparameter.read(name, default)
    for i, number in enumerate(value if isinstance(value, tuple) else (value,)):
        if number is not None and hyperparameter.kind != "flag":
            full_name = f"{name}[{i}]" if isinstance(value, tuple) else name
            check_domain(full_name, number, hyperparameter.domain)


def _resolve(function: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    """Return an annotation, also where it is text; None without one."""
    annotation = parameter.annotation
    if annotation is parameter.empty:
        return None
    # Text twice over, if it is quoted beside `from __future__ import annotations`.
    for _ in range(2):
        if isinstance(annotation, str):
            closure = inspect.getclosurevars(inspect.unwrap(function))
            names = dict(inspect.unwrap(function).__globals__)
            try:
                annotation = eval(annotation, names, closure.nonlocals)
            except Exception as error:
                raise RuleError(f"{parameter.name}: {annotation}: {error}") from error
    return annotation


def _infer(name: str, default: Any, has_default: bool) -> Hyperparameter:
    """Return a hyperparameter without an annotation, from its default and its name."""
    is_beta = re.fullmatch(r"betas?\d*", name) is not None
    domain: Any = Beta if is_beta else NonNegative if name == "eps" else float
    if isinstance(default, bool):
        return Hyperparameter(name, "flag")
    if has_default and default is None:
        return Hyperparameter(name, "optional", domain)
    if isinstance(default, (tuple, list)):
        if not default:
            raise RuleError(f"the default of {name} has no values: give it at least one number")
        return Hyperparameter(name, "numbers", domain, len(default))
    return Hyperparameter(name, "number", domain)


def _from_annotation(name: str, annotation: Any, default: Any) -> Hyperparameter:
    arguments = typing.get_args(annotation)
    origin = typing.get_origin(annotation)
    if annotation is bool:
        return Hyperparameter(name, "flag")
    if annotation in _DOMAINS:
        return Hyperparameter(name, "number", annotation)
    if origin in (types.UnionType, typing.Union) and len(arguments) == 2:
        inner = [a for a in arguments if a is not type(None)]
        if len(inner) == 1 and inner[0] in _DOMAINS:
            return Hyperparameter(name, "optional", inner[0])
    if annotation in (float | int, float | int | None):
        return Hyperparameter(name, "optional" if len(arguments) > 2 else "number", float)
    is_open = annotation in _SEQUENCES or origin in (list, Sequence)
    if (is_open or arguments[1:] == (Ellipsis,)) and {*arguments} <= {*_DOMAINS, Ellipsis}:
        if not isinstance(default, (tuple, list)) or not default:
            raise RuleError(
                f"{name} has numbers, and no default that tells how many: give it one, or write a"
                " tuple such as tuple[Beta, Beta]"
            )
        inferred = _infer(name, default, has_default=True)
        return inferred._replace(domain=arguments[0]) if arguments else inferred
    is_tuple = origin is tuple and arguments and Ellipsis not in arguments
    if is_tuple and arguments[0] in _DOMAINS and len(set(arguments)) == 1:
        return Hyperparameter(name, "numbers", arguments[0], len(arguments))
    shown = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    raise RuleError(
        f"{name}: {shown}: expected Beta, NonNegative, float or int, one of them `| None`, a tuple"
        " such as tuple[Beta, Beta], bool, or ScalarState"
    )


def make_function(signature: Signature, call: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function with a rule's signature and ``out`` that passes all on by position.

    Scalar states come after the other arguments. They are tensors, and have no defaults.
    """
    names = [h.name for h in signature.hyperparameters]
    defaults = {f"_default_{name}": value for name, value in signature.defaults.items()}
    keywords = [f"{n}=_default_{n}" if n in signature.defaults else n for n in names]
    tensors = [signature.grad, *signature.states]
    scalars = signature.scalar_states
    arguments = ", ".join([*tensors, "*", *keywords, *scalars, "out=None"])
    passed = ", ".join([*tensors, *names, *scalars, "out"])
    text = f"def {signature.name}({arguments}):\n    return _call({passed})\n"
    namespace: dict[str, Any] = {"_call": call, **defaults}
    exec(compile(text, f"<rule {signature.name}>", "exec"), namespace)
    function: Callable[..., Any] = namespace[signature.name]
    return function
