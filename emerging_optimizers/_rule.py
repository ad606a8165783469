"""A rule's formula in PyTorch operations, and the calls of its native operator.

Eager calls of an update function enter the compiled module directly. Calls that ``torch.compile``
or ``torch.export`` traces go through ``torch.ops``. Without native kernels (on another device, or
with nothing compiled), the formula is applied tensor by tensor.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from . import _checks, _dtensor, _operators
from ._checks import Operand
from ._codes import Code, code_of, scale_key
from ._hyperparameters import (
    Hyperparameter,
    check_domain,
    check_step,
    read_step_tensor,
    read_whole_number,
)
from ._native import native
from ._rounding import store
from ._scalar_states import check_arguments, check_kinds

# A table, because a call of torch.promote_types would be recorded in a traced graph.
_PROMOTED = {(a, b): torch.promote_types(a, b) for a in _checks.DTYPES for b in _checks.DTYPES}

# Where a group keeps a hyperparameter: a key; or a key, an index into the numbers under that key,
# and how many numbers there are.
GroupKey: TypeAlias = str | tuple[str, int, int]


class GroupRule(NamedTuple):
    """A rule as parameter groups store it. The native step takes all but the last.

    Attributes:
        native: The compiled module's handle of the rule, or None.
        keys: Where a group keeps each hyperparameter.
        state_names: The keys of a parameter's states.
        scalar_names: The keys of its scalar states.
        codes: For each state, the key of its scales and whether it has a sign, if it may be stored
            as 8-bit codes; else None.
        rule: The rule.
    """

    native: Any
    keys: tuple[GroupKey, ...]
    state_names: tuple[str, ...]
    scalar_names: tuple[str, ...]
    codes: tuple[tuple[str, bool] | None, ...]
    rule: "Rule"


class Rule:
    """A rule: its name, and its formula in PyTorch operations.

    The formula's signature describes the rule, in the order of the update function's arguments:
    tensors (the gradient, then the states), then hyperparameters, with their domains as types. The
    formula modifies the states in place, does not modify the gradient, and returns the update; or
    None, if the step leaves the weights as they are.

    Args:
        name: Stem of the operator, ``{name}_update_``.
        formula: The equations.
        check: Raises an error if hyperparameters do not go together.
        lowest_step: 1 if steps count from 1 with any hyperparameters.
    """

    # Whether there is a formula in PyTorch operations; a rule that a user wrote in C++ has none.
    has_formula = True

    def __init__(
        self,
        name: str,
        formula: Callable[..., Tensor | None],
        check: Callable[..., None] | None = None,
        lowest_step: int = 0,
    ) -> None:
        parameters = list(inspect.signature(formula).parameters.values())
        tensors = [p for p in parameters if p.annotation is Tensor or code_of(p.annotation)]
        states = tuple(p.name for p in tensors)[1:]
        declared = [
            Hyperparameter.from_annotation(p.name, p.annotation)
            for p in parameters
            if p not in tensors
        ]
        self.formula = formula
        self._check = check
        self._lowest_step = lowest_step
        codes = tuple(code_of(p.annotation) for p in tensors)[1:]
        self._describe(name, states, declared, codes=codes)
        if native is not None and name in native.rules:
            self._bind(
                native.rules[name], getattr(native, f"{name}_update"), _operators.NAMESPACE, name
            )

    def _describe(
        self,
        name: str,
        states: tuple[str, ...],
        declared: Sequence[Hyperparameter],
        scalar_states: Mapping[str, float] | None = None,
        codes: tuple[Code | None, ...] = (),
    ) -> None:
        """Take the rule's description. It has no native code yet."""
        self.name = name
        # How errors name the update function.
        self.title = f"calculate_{name}_update"
        self.states = states
        # The formats in which they may be stored as 8-bit codes.
        self.codes = codes or (None,) * len(states)
        # With their first values.
        self.scalar_states = dict(scalar_states or {})
        self._declared = list(declared)
        self.hyperparameter_names = [declared.name for declared in self._declared]
        # The operator's arguments after its lists, without `step_tensor`.
        self.argument_names = [*self.hyperparameter_names, *self.scalar_states]
        self.hyperparameters = [declared for declared in self._declared if declared.kind != "step"]
        # The compiled module's handle of the rule, and the function that eager calls enter.
        self.native: Any = None
        self._eager: Any = None
        self._operator: Any = None
        # The device types for which the operator has kernels.
        self._native_devices: tuple[str, ...] = ()
        self._register_for_dtensors = _operators.dtensor_registration(None)

    def _bind(self, handle: Any, eager: Callable[..., Any], namespace: str, stem: str) -> None:
        """Take the native code.

        Args:
            handle: The compiled module's handle of the rule.
            eager: The compiled module's function for eager calls.
            namespace: The operator's namespace.
            stem: The operator is ``{stem}_update_``.
        """
        self._operator = _operators.connect(self, namespace, stem)
        has_cuda = _operators.has_cuda_kernel(self._operator)
        self._native_devices = ("cpu", "cuda") if has_cuda else ("cpu",)
        self._register_for_dtensors = _operators.dtensor_registration(self._operator)
        self._register_for_dtensors()
        self._eager = eager
        self.native = handle

    @property
    def summary(self) -> str:
        """The name, and what is special about the native code."""
        return self.name

    def build_for(self, tensors: Iterable[Any]) -> bool:
        """Return whether there is native code; a user's rule is built at its first use."""
        return self.native is not None

    def build_missing(self) -> bool:
        """Build the kernels that a step was missing; return whether there were any."""
        return False

    def complete_class(self, cls: type, defaults: Mapping[str, Any]) -> None:
        """Give a class of optimizers this rule; only users' rules do that."""
        raise TypeError(
            f"class {cls.__name__}: rule= must be a rule made by emerging_optimizers.rule or"
            " load_rule; the package's rules have classes already"
        )

    def for_groups(
        self, renamed: Mapping[str, GroupKey], state_names: tuple[str, ...]
    ) -> GroupRule:
        """Return the rule as parameter groups store it.

        Args:
            renamed: Where a group keeps a hyperparameter, if not under its name.
            state_names: The keys of a parameter's states, in the order of the formula.
        """
        keys = tuple(renamed.get(declared.name, declared.name) for declared in self.hyperparameters)
        codes = tuple(
            None if code is None else (scale_key(name), code.is_signed)
            for name, code in zip(state_names, self.codes, strict=True)
        )
        return GroupRule(self.native, keys, state_names, tuple(self.scalar_states), codes, self)

    def entry_point(self) -> Callable[..., Tensor | list[Tensor]]:
        """Return what the update function calls, with all its arguments and then ``out``."""
        if self._operator is None:
            return self._call
        eager = self._eager
        traced = self._call
        is_compiling = torch.compiler.is_compiling
        register_for_dtensors = self._register_for_dtensors

        def call(*arguments: Any) -> Any:
            register_for_dtensors()
            return traced(*arguments) if is_compiling() else eager(*arguments)

        return call

    def _call(self, *arguments: Any) -> Any:
        """Call the operator through ``torch.ops`` if there is one, else apply the formula."""
        if not torch.compiler.is_compiling():
            refuse_trace(self.title)
        num_tensors = 1 + len(self.states)
        out = arguments[-1]
        grads = _checks.read_operand("grad", arguments[0])
        states = [
            _checks.read_operand(name, value, grads)
            for name, value in zip(self.states, arguments[1:num_tensors], strict=True)
        ]
        values, step_tensor = self._read_numbers(arguments[num_tensors:-1])
        if out is None:
            # Laid out as the first state, or as the gradient where a rule has no states.
            updates = _new_updates(grads, states[0] if states else grads)
            out = updates.tensors[0] if grads.is_single else updates.tensors
        else:
            updates = _checks.read_operand("out", out, grads)
        operands = [grads, *states, updates]
        if native is not None and self._operator is not None and grads.tensors:
            self._operate(operands, values, step_tensor)
        elif any(_dtensor.is_dtensor(tensor) for o in operands for tensor in o.tensors):
            self._apply_locally(self._apply, operands, values, step_tensor)
        else:
            self._apply(operands, values, step_tensor)
        return out

    def _read_numbers(self, arguments: Sequence[Any]) -> tuple[dict[str, Any], Tensor | None]:
        """Return hyperparameters and scalar states by name, and the step if it is a tensor."""
        values: dict[str, Any] = {}
        step_tensor = None
        num_declared = len(self._declared)
        for declared, value in zip(self._declared, arguments[:num_declared], strict=True):
            name = declared.name
            if declared.kind != "step":
                values[name] = declared.read(name, value)
            elif isinstance(value, Tensor):
                values[name] = 0
                step_tensor = value
            else:
                values[name] = read_whole_number(name, value, "an int")
        scalars = dict(zip(self.scalar_states, arguments[num_declared:], strict=True))
        return values | check_kinds(scalars), step_tensor

    def check_hyperparameters(self, values: dict[str, Any]) -> None:
        """Raise for hyperparameters outside their domains."""
        for declared in self._declared:
            value = values[declared.name]
            if declared.kind == "step":
                check_step(value, values.get("correct_bias", False), self._lowest_step)
            elif declared.kind == "numbers":
                for i, number in enumerate(value):
                    check_domain(f"{declared.name}[{i}]", number, declared.domain)
            elif declared.kind != "flag" and value is not None:
                check_domain(declared.name, value, declared.domain)
        self.check_together(values)

    def check_together(self, values: dict[str, Any]) -> None:
        """Raise for hyperparameters that do not go together."""
        if self._check is not None:
            self._check(**values)

    def scale_of(self, shape: Sequence[int]) -> float:
        """Return the factor by which ``use_shape_scaling`` multiplies the update of a matrix."""
        return shape_scale(shape)

    def operate_on_devices(self, *arguments: Any, step_tensor: Tensor | None = None) -> None:
        """The operator's kernel for other devices. Arguments are in the order of its schema."""
        self._apply(*self._read_operator(arguments), step_tensor)

    def operate_on_dtensors(self, *arguments: Any, step_tensor: Tensor | None = None) -> None:
        """The operator's kernel for DTensors, likewise."""
        operands, values = self._read_operator(arguments)
        check_kinds({name: values[name] for name in self.scalar_states})
        self._apply_locally(self._operate, operands, values, step_tensor)

    def _read_operator(self, arguments: Sequence[Any]) -> tuple[list[Operand], dict[str, Any]]:
        num_lists = 2 + len(self.states)
        updates, grads, *states = arguments[:num_lists]
        # The update comes last: a new one was made like the first state.
        names = ("grad", *self.states, "out")
        is_single = native is not None and bool(native.is_single_tensor_call())
        operands = [
            Operand(name, tensors, is_single, name != "grad")
            for name, tensors in zip(names, (grads, *states, updates), strict=True)
        ]
        return operands, dict(zip(self.argument_names, arguments[num_lists:], strict=True))

    def _operate(
        self, operands: Sequence[Operand], values: dict[str, Any], step_tensor: Tensor | None
    ) -> None:
        *lists, updates = (operand.tensors for operand in operands)
        self._operator(updates, *lists, *values.values(), step_tensor=step_tensor)

    def _apply_locally(
        self,
        apply: Callable[[Sequence[Operand], dict[str, Any], Tensor | None], None],
        operands: Sequence[Operand],
        values: dict[str, Any],
        step_tensor: Tensor | None,
    ) -> None:
        """Apply to the local tensors of DTensors."""
        grads = operands[0]
        is_scaled = values.get("use_shape_scaling", False)
        if is_scaled:
            # Scaled below, by the shapes of the DTensors.
            values = values | {"use_shape_scaling": False}
            for position in range(len(grads.tensors)):
                _checks.check_is_matrix(grads, position)
        local = _dtensor.local_operands(operands)
        apply(local, values, _dtensor.whole(step_tensor))
        if is_scaled:
            lists = (operand.tensors for operand in local)
            for grad, *read, update in zip(grads.tensors, *lists, strict=True):
                if update.numel() != 0:
                    # Exact so far: the update is a sign, which every dtype holds.
                    scaled = update.to(arithmetic_dtype(read)).mul_(self.scale_of(grad.shape))
                    store(update, scaled)
        _dtensor.increment_versions(chain(*(o.tensors for o in operands if o.in_place)))

    @torch.no_grad()
    def _apply(
        self, operands: Sequence[Operand], values: dict[str, Any], step_tensor: Tensor | None
    ) -> None:
        if step_tensor is not None:
            _checks.check_step_device(step_tensor, operands[0])
            step = read_whole_number("step", read_step_tensor(step_tensor), "an int")
            values = values | {"step": step}
        self.check_hyperparameters(values)
        _checks.check_operands(operands, values.get("use_shape_scaling", False))
        scalars = {name: values[name] for name in self.scalar_states}
        check_arguments(scalars, operands, step_tensor)
        for grad, *states, update in zip(*(o.tensors for o in operands), strict=True):
            if grad.numel() == 0 and not scalars:
                continue
            # Each position advances copies of the scalar states, to the same values.
            values = values | {name: tensor.clone() for name, tensor in scalars.items()}
            if self._operator is not None and grad.device.type in self._native_devices:
                row = [[tensor] for tensor in (update, grad, *states)]
                self._operator(*row, *values.values())
            else:
                self._apply_formula(update, grad, states, values)
        if operands[0].tensors and not operands[0].tensors[0].is_meta:
            for name, tensor in scalars.items():
                tensor.copy_(values[name])

    def _apply_formula(
        self, update: Tensor, grad: Tensor, states: list[Tensor], values: dict[str, Any]
    ) -> None:
        if (computed := self.compute_update(grad, states, values)) is None:
            update.zero_()
        else:
            store(update, computed)

    def compute_update(
        self, grad: Tensor, states: list[Tensor], values: dict[str, Any]
    ) -> Tensor | None:
        """Apply the formula in float32 or float64, and return the update in that dtype.

        The states and the scalar states, which are 0-dim tensors, are updated in place.

        Returns None if the step leaves the weights as they are.
        """
        real = arithmetic_dtype((grad, *states))
        widened = [state.to(real) for state in states]
        update = self.formula(grad.to(real), *widened, **values)
        for state, wide in zip(states, widened, strict=True):
            if wide is not state:
                store(state, wide)
        return update


def refuse_trace(what: str) -> None:
    """Raise under ``torch.jit.trace``, which would record the step number as a constant."""
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError(
            f"torch.jit.trace cannot record {what}: use torch.compile or torch.export, or call it"
            " outside of what is traced"
        )


def _new_updates(grads: Operand, layouts: Operand) -> Operand:
    """Return new updates, with the layouts and dtypes that the operator would give them."""
    updates = []
    for position, (grad, layout) in enumerate(zip(grads.tensors, layouts.tensors, strict=True)):
        _checks.check_storage(grads, position)
        _checks.check_storage(layouts, position)
        dtype = _PROMOTED[grad.dtype, layout.dtype]
        updates.append(torch.empty_like(layout, dtype=dtype, requires_grad=False))
    return Operand("out", updates, grads.is_single, True)


def arithmetic_dtype(read: Sequence[Tensor]) -> torch.dtype:
    is_double = any(tensor.dtype == torch.float64 for tensor in read)
    return torch.float64 if is_double else torch.float32


def shape_scale(shape: Sequence[int]) -> float:
    """Return the factor by which ``use_shape_scaling`` multiplies the update of a matrix."""
    return 2 / (shape[0] + shape[1])
