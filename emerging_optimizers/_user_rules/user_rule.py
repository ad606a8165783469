"""The rules that users define."""

import functools
import inspect
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import _dtensor, _native
from .._operators import USER_NAMESPACE
from .._rounding import store
from .._rule import Rule, arithmetic_dtype
from .._scalar_states import read_scalar, write_scalar
from . import runtime_kernels
from .assembler import assemble
from .emitter import Emitter
from .graph import RuleError
from .info import Info, describe
from .native_code import NativeCode, native_code
from .optimizer_class import complete_class
from .origins import is_users
from .signature import make_function
from .tracer import trace_rule

# The rules of this process, by name and top-level module: packages do not know of each other.
_RULES: weakref.WeakValueDictionary[tuple[str, str], "Named"] = weakref.WeakValueDictionary()

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
        emitter = Emitter(trace)
        self.source = emitter.text()
        self._program = assemble(trace, emitter)
        self.formula = function
        self.signature = trace.signature
        self._trace = trace
        self._check = None
        self._code: NativeCode | None = None
        self._has_warned = False
        # Whether there is native code, which nothing has begun to compile for the CPU.
        self._is_only_on_gpus = False
        signature = trace.signature
        self._describe(
            signature.name,
            signature.states,
            signature.hyperparameters,
            signature.scalar_states,
            signature.codes,
        )
        self.title = self.name
        self._lowest_step = 1 if signature.counts_from_1 else 0
        functools.update_wrapper(self, function, updated=())
        self._function = self._make_function()
        self.__signature__ = inspect.signature(self._function)
        register(self)

    @property
    def place(self) -> tuple[str, str]:
        """Where the rule is defined."""
        # Code that `exec` runs may be of no module.
        return self.__module__ or "__main__", self.__qualname__  # type: ignore[attr-defined]

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
            elif self._is_only_on_gpus:
                self._build_for(_tensors_of(arguments[0])[:1])
            return self._call(*arguments) if eager is None else eager(*arguments)

        return call

    # ---- native code -----------------------------------------------------------------------------

    def compile(self, device: torch.device | str = "cpu") -> None:
        """Load the rule's compiled code, or build it; do nothing if that is done.

        It is loaded from the cache; for the CPU, first from the rule's package, if that ships it.

        Otherwise this begins in the background at the rule's first use with tensors on a device.
        Until it is done, the rule is interpreted on the CPU, with the same results; on a GPU, its
        formula runs.

        Args:
            device: The CPU, or one GPU, for which all its kernels are built: ``"cuda:1"``, or
                ``"cuda"`` for the current one. A CUDA graph that captures the rule needs them
                before.

        Raises:
            RuntimeError: There is no compiler, it fails, ``EMERGING_OPTIMIZERS_JIT=0`` is set,
                ``emerging_optimizers`` was built without CUDA, or the device is no GPU.
        """
        device = torch.device(device)
        code = self._native_code()
        if code is None:
            raise RuntimeError(f"the rule {self.name} cannot be compiled: {_native.reason}")
        if device.type == "cpu":
            code.compile()
            self._is_only_on_gpus = False
        elif device.type == "cuda" and runtime_kernels.are_possible():
            code.kernels.build_all(device)
        else:
            raise RuntimeError(
                f"the rule {self.name} cannot be compiled: there are no kernels for {device.type}"
            )
        self._bind_to(code)

    @property
    def is_compiled(self) -> bool:
        """Whether the rule's compiled code for the CPU is loaded."""
        return self._code is not None and self._code.is_compiled

    @property
    def summary(self) -> str:
        """The name, and why the rule is interpreted, if it is."""
        if self._code is None or self.is_compiled or self._is_only_on_gpus:
            return self.name
        reason = self._code.why_not or "not compiled yet"
        return f"{self.name} (interpreted: {reason})"

    def _native_code(self) -> NativeCode | None:
        """Return the rule's native code; None if there are no native kernels."""
        if self._code is None and _native.native is not None:
            self._code = native_code(self._program, self.source, any(self.codes), self.place[0])
            self._is_only_on_gpus = True
        return self._code

    def _bind_to(self, code: NativeCode) -> None:
        if self.native is None:
            self._bind(code.handle, code.eager, USER_NAMESPACE, code.stem)

    def _interpreted(self) -> "UserRule":
        """Return a rule of the same function that is never compiled, for tests."""
        twin = UserRule(self.formula)
        twin._code = NativeCode(self._program, self.source, any(self.codes))
        twin._bind_to(twin._code)
        return twin

    def build_for(self, tensors: Iterable[Any]) -> bool:
        """Make the native code if some tensors can use it; return whether there is any."""
        self._build_for(tensors)
        return self.native is not None

    def _build_for(self, tensors: Iterable[Any]) -> None:
        if self._has_warned and _native.native is None:
            return  # asked at every step
        self._build_for_devices(tuple({t.device.type for t in tensors if isinstance(t, Tensor)}))

    def _build_for_devices(self, devices: tuple[str, ...]) -> None:
        """Make the native code at its first use; warn, once, if the formula runs instead."""
        is_on_cpu = "cpu" in devices
        if self.native is not None and not (is_on_cpu and self._is_only_on_gpus):
            return
        reason: str | None
        if is_on_cpu or ("cuda" in devices and runtime_kernels.are_possible()):
            code = self._native_code()
            if code is not None:
                if is_on_cpu:
                    code.start_build()
                    self._is_only_on_gpus = False
                self._bind_to(code)
                return
            reason = _native.reason
        else:
            others = sorted(set(devices) - set(_WITHOUT_VALUES))
            reason = f"there are no kernels for {' and '.join(others)}" if others else None
        if reason is not None:
            self._warn(reason)

    def _warn(self, reason: str) -> None:
        """Warn, once, that the formula runs."""
        if self._has_warned:
            return
        self._has_warned = True
        warnings.warn(
            f"the rule {self.name} runs its formula in PyTorch operations, tensor by tensor:"
            f" {reason}",
            RuntimeWarning,
            stacklevel=_level_of_user(),
        )

    def build_missing(self) -> bool:
        """Build the kernels that a step on a GPU was missing; return whether there were any."""
        return self._code is not None and self._code.kernels.build_missing()

    def operate_on_devices(self, *arguments: Any, step_tensor: Tensor | None = None) -> None:
        """The operator's kernel for other devices: kernels if they are there, else the formula."""
        if not self._operate_by_kernels(arguments, step_tensor):
            super().operate_on_devices(*arguments, step_tensor=step_tensor)

    def _operate_by_kernels(self, arguments: Sequence[Any], step_tensor: Tensor | None) -> bool:
        """Update by kernels if all that are needed are there; return whether that is done."""
        code = self._code
        if code is None or not runtime_kernels.are_possible():
            return False
        num_lists = 2 + len(self.states)
        updates, *lists = arguments[:num_lists]
        values = [
            step_tensor if name == "step" and step_tensor is not None else value
            for name, value in zip(self.argument_names, arguments[num_lists:], strict=True)
        ]
        call = (*lists, *values, updates)
        module: Any = _native.native
        if module._compute_if_native(code.handle, call):
            return True
        return code.kernels.start() and bool(module._compute_if_native(code.handle, call))

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
        if grad.is_cuda and self._code is not None:
            self._code.kernels.start()
            if self._code.kernels.why_not is not None:
                self._warn(self._code.kernels.why_not)
        real = arithmetic_dtype((grad, *states))
        own_grad = grad.to(real)
        if self._trace.modifies_grad and own_grad is grad:
            own_grad = grad.clone()
        widened = [state.to(real) for state in states]
        tensors = {name: values[name] for name in self.scalar_states}
        scalars = {name: read_scalar(tensors[name], self.scalar_states[name]) for name in tensors}
        result: Any = self.formula(own_grad, *widened, **(values | scalars))
        update, *new = result if isinstance(result, tuple) else (result, *widened)
        num_states = len(new) - len(tensors)
        for tensor, number in zip(tensors.values(), new[num_states:], strict=True):
            write_scalar(tensor, number)
        new = new[:num_states]
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


def register(rule: Named) -> None:
    """Take a rule's name, which may be that of a rule that this one redefines.

    Raises:
        RuleError: Another rule of the same package has the name.
    """
    owner = _package_of(rule)
    for known in all_rules():
        # One file may be loaded twice: as a script, and as a module.
        is_other = known.source != rule.source and known.place != rule.place
        if known.name == rule.name and is_other and _package_of(known) in (owner, ""):
            raise RuleError(
                f"rule {rule.name}: {'.'.join(known.place)} has the same name; rename one of them"
            )
    _RULES[rule.name, owner] = rule


def _package_of(rule: Named) -> str:
    """Return the top-level module of a rule; "" for a rule in C++, which may be anybody's."""
    module = rule.place[0].partition(".")[0]
    return module if module.isidentifier() else ""


def all_rules() -> list[Named]:
    """Return the rules of this process."""
    return list(_RULES.values())
