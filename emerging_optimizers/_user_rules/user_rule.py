"""The rules that users define."""

import functools
import inspect
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import _dtensor, _native
from .._build_cache import BuildError
from .._operators import USER_NAMESPACE, unused_stem
from .._rule import Rule, arithmetic_dtype, store
from .build import library_for
from .emitter import emit, struct_name
from .graph import RuleError
from .info import Info, describe
from .optimizer_class import complete_class
from .signature import make_function
from .tracer import is_users, trace_rule

# The rules of this process, by name.
_RULES: weakref.WeakValueDictionary[str, "Named"] = weakref.WeakValueDictionary()
# What has been loaded, by its C++ text: the stem of the operator, the compiled module's handle of
# the rule, and its function for eager calls. Operators cannot be removed.
_LOADED: dict[str, tuple[str, Any, Callable[..., Any]]] = {}
_LOCK = threading.RLock()

# Devices whose tensors have no values, so that no native kernel is missing there.
_WITHOUT_VALUES = ("meta",)


class Named(Protocol):
    """What a rule's name needs to know of the rule."""

    name: str
    source: str

    @property
    def place(self) -> tuple[str, str]: ...


class UserRule(Rule):
    """A rule, made by :func:`emerging_optimizers.rule` from a function.

    Calling it updates states in place and returns the update. The arguments are those of the
    function, where each tensor may also be a sequence of tensors, and `out`.

    Attributes:
        formula: The function as it was written.
        source: The rule in C++.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        trace = trace_rule(function)
        self.source = emit(trace)
        self.formula = function
        self.signature = trace.signature
        self._trace = trace
        self._check = None
        self._why_not_native: str | None = None
        self._has_warned = False
        signature = trace.signature
        self._describe(signature.name, signature.states, signature.hyperparameters)
        self.title = self.name
        self._lowest_step = 1 if signature.counts_from_1 else 0
        functools.update_wrapper(self, function, updated=())
        self._function = self._make_function()
        self.__signature__ = inspect.signature(self._function)
        register(self)

    @property
    def place(self) -> tuple[str, str]:
        """Where the rule is defined."""
        return self.__module__, self.__qualname__  # type: ignore[attr-defined]

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._function(*arguments, **options)

    def __repr__(self) -> str:
        return f"<rule {self.name}{self.__signature__}>"

    def __reduce__(self) -> str:
        # By its name: a rule pickles if it can be imported.
        return str(self.__qualname__)  # type: ignore[attr-defined]

    def _make_function(self) -> Callable[..., Any]:
        """Return a function with the rule's signature and ``out`` that calls the rule."""
        function = make_function(self.signature, self.entry_point())
        function.__doc__ = self.formula.__doc__
        function.__module__ = self.formula.__module__
        return function

    def entry_point(self) -> Callable[..., Tensor | list[Tensor]]:
        """Return what the rule calls, with all its arguments and then ``out``."""
        is_compiling = torch.compiler.is_compiling

        def call(*arguments: Any) -> Any:
            self._register_for_dtensors()
            if not self.states and arguments[-1] is None:
                arguments = (_dtensor.reduced(arguments[0]), *arguments[1:])
            if is_compiling():
                self._build_for_devices(_device_types(arguments[0]))
                return self._call(*arguments)
            eager = self._eager
            if eager is None:
                self._build_for(_tensors_of(arguments[0]))
                eager = self._eager
            return self._call(*arguments) if eager is None else eager(*arguments)

        return call

    # ---- native code -----------------------------------------------------------------------------

    def compile(self) -> None:
        """Build the rule's native code, or load it from the cache; do nothing if that is done.

        Otherwise this happens at the rule's first use with tensors on the CPU.

        Raises:
            RuntimeError: There is no compiler, it fails, or ``EMERGING_OPTIMIZERS_JIT=0`` is set.
        """
        reason = self._load()
        if reason is not None:
            raise RuntimeError(f"the rule {self.name} cannot be compiled: {reason}")

    @property
    def is_compiled(self) -> bool:
        """Whether the rule's native code is loaded."""
        return self.native is not None

    def _load(self) -> str | None:
        """Load the native code. Return why that is not possible, or None."""
        if self.native is not None:
            return None
        if _native.native is None:
            return _native.reason
        if os.environ.get("EMERGING_OPTIMIZERS_JIT") == "0":
            return "EMERGING_OPTIMIZERS_JIT=0"
        with _LOCK:
            if self.native is None:
                try:
                    stem, handle, eager = _loaded(self.name, self.source)
                except BuildError as error:
                    return f"{error.reason}. {error.remedy}"
                except RuntimeError as error:  # the library cannot be loaded
                    return str(error)
                self._bind(handle, eager, USER_NAMESPACE, stem)
        return None

    def build_for(self, tensors: Iterable[Any]) -> bool:
        """Build the native code if some tensors can use it; return whether there is any."""
        self._build_for(tensors)
        return self.native is not None

    def _build_for(self, tensors: Iterable[Any]) -> None:
        if self._why_not_native is not None and self._has_warned:
            return  # asked at every step
        self._build_for_devices(tuple({t.device.type for t in tensors if isinstance(t, Tensor)}))

    def _build_for_devices(self, devices: tuple[str, ...]) -> None:
        """Build the native code at its first use; warn, once, if the formula runs instead."""
        if self.native is not None:
            return
        reason: str | None
        if "cpu" in devices:
            if self._why_not_native is None:
                self._why_not_native = self._load()
            reason = self._why_not_native
        else:
            others = sorted(set(devices) - set(_WITHOUT_VALUES))
            reason = f"there are no kernels for {' and '.join(others)}" if others else None
        if reason is not None and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"the rule {self.name} runs its formula in PyTorch operations, tensor by tensor:"
                f" {reason}",
                RuntimeWarning,
                stacklevel=_level_of_user(),
            )

    # Called while a graph is traced, not by the graph.
    _build_for_devices._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def complete_class(self, cls: type, defaults: Mapping[str, Any]) -> None:
        """Give a class of optimizers this rule, and an ``__init__`` with its hyperparameters."""
        complete_class(cls, self.name, self.signature, defaults)
        cls._rule = self  # type: ignore[attr-defined]

    # ---- the formula -----------------------------------------------------------------------------

    def compute_update(
        self, grad: Tensor, states: list[Tensor], values: dict[str, Any]
    ) -> Tensor | None:
        """Apply the formula in float32 or float64; return the update, if there is one."""
        real = arithmetic_dtype((grad, *states))
        own_grad = grad.to(real)
        if self._trace.modifies_grad and own_grad is grad:
            own_grad = grad.clone()
        widened = [state.to(real) for state in states]
        result = self.formula(own_grad, *widened, **values)
        update, *new = result if isinstance(result, tuple) else (result, *widened)
        if self._trace.shares:
            # A result may be one of the tensors that are about to be written.
            update, *new = (v.clone() if isinstance(v, Tensor) else v for v in (update, *new))
        for state, wide, value in zip(states, widened, new or widened, strict=True):
            if value is not state:
                store(state, _as_tensor(value, wide))
        return None if update is None else _as_tensor(update, own_grad)

    # ---- what is known ---------------------------------------------------------------------------

    def info(self) -> Info:
        """Return the rule's states, hyperparameters, memory traffic, and the time that this takes.

        The first call in a process measures the memory bandwidth, which takes a moment.
        """
        return describe(self._trace)


def _level_of_user() -> int:
    """Return the ``stacklevel`` with which the caller's warning points at the user's line."""
    level = 1
    frame = sys._getframe(1)
    while frame.f_back is not None and not is_users(frame.f_code):
        level += 1
        frame = frame.f_back
    return level


def _as_tensor(value: Any, like: Tensor) -> Tensor:
    """Return a result as a tensor; the formula may return a number or a condition."""
    if not isinstance(value, Tensor) or value.dim() < like.dim():
        return torch.full_like(like, float(value))
    return value.to(like.dtype)


def _tensors_of(grads: Any) -> Sequence[Any]:
    if isinstance(grads, Tensor):
        return [grads]
    return grads if isinstance(grads, (list, tuple)) else []


def _device_types(grads: Any) -> tuple[str, ...]:
    if isinstance(grads, Tensor):
        return (grads.device.type,)
    return tuple(grad.device.type for grad in grads)


def _loaded(name: str, source: str) -> tuple[str, Any, Callable[..., Any]]:
    """Return what was loaded for a C++ text; load it if it was not."""
    found = _LOADED.get(source)
    if found is None:
        library = library_for(name, source)
        stem = unused_stem(name)
        assert _native.native is not None
        handle, eager = _native.native._load_rule(
            str(library), struct_name(name), operator_namespace=USER_NAMESPACE, name=stem
        )
        found = _LOADED[source] = (stem, handle, eager)
    return found


def register(rule: Named) -> None:
    """Take a rule's name, which may be that of a rule that this one redefines.

    Raises:
        RuleError: Another rule has the name.
    """
    known = _RULES.get(rule.name)
    # One file may be loaded twice: as a script, and as a module.
    if known is not None and known.source != rule.source and known.place != rule.place:
        raise RuleError(
            f"rule {rule.name}: {'.'.join(known.place)} has the same name; rename one of them"
        )
    _RULES[rule.name] = rule
