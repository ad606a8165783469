"""What the optimizers share: everything but the rule, its hyperparameters and its documentation."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, NoReturn, TypeAlias, TypedDict, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import ParamsT

from . import _checks, _overlap
from ._culprits import blame, check_tensors, find_param, param_name
from ._dtensor import increment_versions, is_dtensor, whole
from ._groups import (
    check_flags,
    check_group,
    check_state_dtypes,
    flags_of,
    numbers_of,
    read_group_flag,
    read_option,
)
from ._hyperparameters import as_saved, read_number
from ._loading import before_load, settle, settle_counts, settle_state
from ._native import native
from ._rounding import (
    draw_seed,
    element_indices,
    random_bits,
    round_stochastically,
    rounding_key,
)
from ._rule import GroupKey, GroupRule, Rule, refuse_trace, store
from ._sharding import ShardPlace, shard_place
from ._states import (
    HALF,
    MASTER,
    check_complete,
    check_count,
    check_master_dtype,
    has_master,
    is_absent,
    new_counter,
    set_counter,
    split_counters,
)
from ._step_overlap import Place, check_overlap, find_followers
from ._values import (
    HYPERPARAMETER,
    check_has_value,
    has_value,
    have_values,
    is_fake,
    is_tracing,
    read,
)

# What every step asks; without looking up each module on the way.
_is_compiling = torch.compiler.is_compiling
_is_profiling = torch.autograd._profiler_enabled  # type: ignore[attr-defined]
_is_cuda_in_use = torch.cuda.is_initialized

StateDtype: TypeAlias = torch.dtype | Mapping[str, torch.dtype] | None


class SharedOptions(TypedDict, total=False):
    """The keyword-only options of every optimizer; `ScalarOptimizer` documents them."""

    maximize: bool
    fused: bool | None
    capturable: bool
    state_dtype: StateDtype
    master_weights: bool
    stochastic_rounding: bool
    differentiable: bool


SHARED_DEFAULTS: dict[str, Any] = {
    "maximize": False,
    "fused": None,
    "capturable": False,
    "state_dtype": None,
    "master_weights": False,
    "stochastic_rounding": False,
    "differentiable": False,
}

# The fraction of a parameter that a step takes from it.
_LOST: dict[str, Callable[[float, float], float]] = {
    "decoupled": lambda lr, weight_decay: lr * weight_decay,
    "independent": lambda lr, weight_decay: weight_decay,
    "palm": lambda lr, weight_decay: lr * lr * weight_decay,
    "l2": lambda lr, weight_decay: 0.0,
}


class StepArguments(NamedTuple):
    """What one call of ``step`` passes to every group's step.

    Args:
        grad_multiplier: Every gradient is multiplied by it, if it is there.
        grad_scale: Every gradient is divided by it, if it is there; from a ``GradScaler``.
        found_inf: Nothing is to change where it is there and not 0; from a ``GradScaler``.
        seed: 64 random bits; 0 where no group rounds stochastically.
    """

    grad_multiplier: float | Tensor | None
    grad_scale: Tensor | None
    found_inf: Tensor | None
    seed: int


class ScalarOptimizer(torch.optim.Optimizer):
    r"""Base of the optimizers whose update is computed element by element.

    With :math:`\gamma` as `lr` and :math:`\lambda` as `weight_decay`, the methods of weight decay
    are

    - "decoupled": :math:`p \leftarrow p - \gamma \lambda p`,
    - "independent": :math:`p \leftarrow p - \lambda p`,
    - "palm": :math:`p \leftarrow p - \gamma^2 \lambda p`, all with the old :math:`p`, and
    - "l2": :math:`g \leftarrow g + \lambda p`, without a change of ``p.grad``.

    The options below are keyword arguments of all the optimizers; each parameter group may set them
    for itself. Arithmetic is float32, or float64 where a parameter, its gradient or one of its
    states is. Each result is rounded once.

    Args:
        params: Parameters, named parameters or parameter groups, as for any ``torch.optim``
            optimizer.
        hyperparameters: The defaults of a group's own keys: ``lr``, ``weight_decay``,
            ``weight_decay_method`` and what the rule needs.
        maximize: Go up instead of down.
        fused: None: one native call, of what there is one for, and a loop of plain PyTorch
            operations for the rest. False: the loop. True: the native call, or an error. With True
            in every group, a ``GradScaler`` leaves it to the step to unscale gradients and to skip
            it, and on CUDA the host does not wait for ``found_inf``. Otherwise the ``GradScaler``
            unscales them before the step, and waits.
        capturable: Keep the step counters on the parameters' devices, where the native step counts
            them without the host: CUDA graphs can capture it.
        state_dtype: The dtype of the states of real parameters: float32, bfloat16 or float16, or a
            dict of them by state key. None: that of the parameter, or of the loaded state.
        master_weights: Keep a float32 copy of each bfloat16 or float16 parameter in its state, as
            ``master_param``. It is updated, and the parameter is its rounding. It starts as the
            parameter's value at its first step; what else is written to that later is lost.
        stochastic_rounding: Round updated bfloat16 and float16 parameters up or down at random, so
            that their mean is right. The bits depend on a seed that each step draws from PyTorch's
            default CPU generator, the step number, the parameter's position in the optimizer and
            the element's index, and on nothing else: replicas need generators of one state. The
            index is that in the whole parameter where this is a DTensor whose shard is contiguous
            in it, as with ``Shard(0)``; other shards of DTensors draw independently of each other.
            Of a tensor that is a shard without being a DTensor, it is the index in that tensor:
            there, processes need generators of different states.
        differentiable: Refused.
    """

    _rule: ClassVar[Rule]
    # Where a group has an option of the rule, if not under the option's name: a key; or a key, an
    # index of the numbers that are there, and how many those are.
    _renamed: ClassVar[Mapping[str, GroupKey]] = {}
    # The keys of a parameter's states, in the order of the rule's formula.
    _state_names: ClassVar[tuple[str, ...]]
    # Made of these.
    _group_rule: ClassVar[GroupRule]
    # What an error calls one of the ``betas``, as torch.optim's or NVIDIA's class of the name does.
    _beta_title: ClassVar[str] = "beta"
    _option_defaults: ClassVar[Mapping[str, Any]] = SHARED_DEFAULTS
    # Whether a step makes the states of parameters without a gradient, too.
    _makes_all_states: ClassVar[bool] = False

    def __init_subclass__(cls, **arguments: Any) -> None:
        """Read the class's rule."""
        super().__init_subclass__(**arguments)
        if "_rule" in vars(cls) and "_state_names" not in vars(cls):
            cls._state_names = cls._rule.states
        if hasattr(cls, "_rule"):
            cls._group_rule = cls._rule.for_groups(cls._renamed, cls._state_names)

    def __init__(
        self, params: ParamsT, hyperparameters: dict[str, Any], options: SharedOptions
    ) -> None:
        for name in options:
            if name not in self._option_defaults:
                raise TypeError(
                    f"{type(self).__name__}.__init__() got an unexpected keyword argument {name!r}"
                )
        defaults = {**hyperparameters, **self._option_defaults, **options}
        check_group(self, defaults, is_new=True)
        super().__init__(params, defaults)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether ``torch.amp.GradScaler`` leaves it to ``step`` to unscale and to skip.

        It tells so of the optimizer, whose groups may differ: all of them have to be fused.
        """
        return bool(self.param_groups) and all(map(self._scales_in_step, self.param_groups))

    def _scales_in_step(self, group: dict[str, Any]) -> bool:
        """Return whether a group's step was asked to apply a ``GradScaler``'s numbers itself."""
        return group.get("fused") is True

    # ---- what a rule adds ------------------------------------------------------------------------

    def _rule_of(self, group: Mapping[str, Any]) -> GroupRule:
        """Return the rule of a group, which may depend on its options."""
        return self._group_rule

    def _plain_options(self, group: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of the rule's formula, but for the tensors and ``step``.

        The native step reads them from the group itself.
        """
        _, keys, _, rule = self._rule_of(group)
        pairs = zip(rule.hyperparameters, keys, strict=True)
        return {option.name: read_option(group, key, option) for option, key in pairs}

    def _grad(self, group: dict[str, Any], param: Tensor) -> Tensor | None:
        """Return a parameter's gradient, if it has one."""
        return param.grad

    def _update_scale(self, group: dict[str, Any], param: Tensor) -> float:
        """Return by what the update of this parameter is multiplied, beside the learning rate."""
        return 1.0

    def _check_param(self, group: dict[str, Any], param: Tensor) -> None:
        """Raise for a parameter that cannot be updated, or not with its gradient."""
        grad = self._grad(group, param)
        assert grad is not None
        _check_layout("the parameter", param)
        if grad.layout in _SPARSE:
            raise RuntimeError(
                f"{type(self).__name__} does not support sparse gradients, and its gradient has"
                f" layout {grad.layout}; make it dense (.to_dense()), or use torch.optim.SparseAdam"
            )
        _check_layout("its gradient", grad)
        if grad.shape != param.shape:
            # Only by way of `param.data`: autograd checks what is assigned to `.grad`.
            raise RuntimeError(
                f"the parameter has shape {tuple(param.shape)} but its gradient has shape"
                f" {tuple(grad.shape)}"
            )
        if not param.is_floating_point() and not param.is_complex():
            raise TypeError(f"the parameter has dtype {param.dtype}, which cannot be optimized")
        _check_beside("its gradient", grad, param)
        _check_memory("its gradient", grad)
        _check_modified("the parameter", param)

    def _check_state(self, group: dict[str, Any], param: Tensor, state: dict[str, Any]) -> None:
        """Raise for a state that is not one of this parameter."""
        for name in (*self._rule_of(group).state_names, MASTER):
            if name != MASTER or state.get(name) is not None:
                self._check_part(group, param, name, state.get(name))
        step = state["step"]
        if not is_tracing():
            check_has_value("state 'step'", step, param)
        check_count("state 'step'", step)

    def _check_part(
        self,
        group: dict[str, Any],
        param: Tensor,
        name: str,
        value: Any,
        is_loaded: bool = False,
    ) -> None:
        if not isinstance(value, Tensor):
            raise TypeError(f"state {name!r} must be a Tensor, not {type(value).__name__}")
        if value.shape != param.shape:
            raise ValueError(
                f"state {name!r} has shape {tuple(value.shape)} but the parameter has shape"
                f" {tuple(param.shape)}"
            )
        as_stored = None
        if name == MASTER:
            as_stored = self._dtype_of(group, name, param)
            check_master_dtype(as_stored == torch.int16, value)
            if value.dtype != as_stored:
                raise TypeError(f"state {name!r} has dtype {value.dtype}; expected {as_stored}")
        _check_beside(f"state {name!r}", value, param, as_stored, is_loaded)
        if not _is_placed_like(value, param):
            raise ValueError(f"state {name!r} is not distributed as the parameter is")
        _check_modified(f"state {name!r}", value)

    # ---- groups ----------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, whose missing keys take the defaults."""
        if isinstance(param_group, dict):
            where = f"param_groups[{len(self.param_groups)}]"
            check_group(self, {**self.defaults, **param_group}, where, is_new=True)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name in flags_of(self, group):
            group[name] = read_group_flag(group, name)  # numpy's are not for state dicts

    # ---- states ----------------------------------------------------------------------------------

    def _dtype_of(self, group: dict[str, Any], name: str, param: Tensor) -> torch.dtype | None:
        """Return the dtype that a state is to have; None where nothing says."""
        if name == MASTER:
            return torch.float32
        option = group["state_dtype"]
        if param.is_complex():
            return None
        dtype: torch.dtype | None = option.get(name) if isinstance(option, Mapping) else option
        return dtype

    def _init_state(self, group: dict[str, Any], param: Tensor) -> dict[str, Any]:
        """Return a parameter's state, with what is missing from it added."""
        state: dict[str, Any] = self.state[param]
        step = state.get("step")
        if not isinstance(step, Tensor):
            device = param.device if group["capturable"] else torch.device("cpu")
            count: Any = 0 if is_absent(step) else step
            check_count("state 'step'", count)
            set_counter(state, new_counter(float(count), device))
        for name in self._rule_of(group).state_names:
            if is_absent(state.get(name)):
                state[name] = torch.zeros_like(
                    param,
                    dtype=self._dtype_of(group, name, param),
                    memory_format=torch.preserve_format,
                )
        if is_absent(state.get(MASTER)):
            state.pop(MASTER, None)
            master = self._init_master(group, param)
            if master is not None:
                state[MASTER] = master
        return state

    def _init_master(self, group: dict[str, Any], param: Tensor) -> Tensor | None:
        """Return a master of the parameter as it is, if it is to have one."""
        return param.detach().to(torch.float32) if has_master(group, param) else None

    def state_dict(self) -> dict[str, Any]:
        """Return the states and the groups, of types that every state-dict tool accepts.

        So `state_dtype` is there as text, and numpy's numbers as Python's. `state_dtype` is not
        loaded.
        """
        # Before the user's hooks see it.
        finish: Any = type(self)._finish_state_dict
        hook = self.register_state_dict_post_hook(finish, prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def _finish_state_dict(self, saved: dict[str, Any]) -> None:
        """Change what ``torch`` has saved to what is to be saved."""
        for group in saved["param_groups"]:
            group.update({key: as_saved(group[key]) for key in self.defaults if key in group})
            # The keys stay, those of a mapping too: tools look for what older checkpoints have.
            group["state_dtype"] = _dtype_text(group["state_dtype"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned, of this optimizer or of one with the same states.

        States take the dtype that `state_dtype` says, or stay as they were saved. Hyperparameters
        are loaded, and those that are missing take the defaults; what says how a group is stored
        and run (`fused`, `capturable`, `state_dtype`, `master_weights`, `stochastic_rounding`)
        stays.

        Args:
            state_dict: The optimizer's state. Its tensors are not copied where they fit.
        """
        # Registered only now, so that it sees what the user's hooks return.
        check: Any = before_load
        hook = self.register_load_state_dict_pre_hook(check)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()

    def _translate_group(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Return a saved group in this optimizer's terms."""
        return saved

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what was pickled, copied or loaded; of an older version, too."""
        settle(self, state)  # what can fail comes first
        super().__setstate__(state)

    def _settle_counts(self, group: dict[str, Any], states: list[dict[str, Any]]) -> None:
        """Bring the counters of a loaded group's begun states, and its own, into agreement."""
        settle_counts(self, group, states)

    def _settle_state(self, group: dict[str, Any], param: Tensor, state: dict[str, Any]) -> None:
        """Give what was loaded the device and the dtype that it has in this optimizer."""
        settle_state(self, group, param, state)

    # ---- the step --------------------------------------------------------------------------------

    @overload
    def step(
        self, closure: None = None, *, grad_multiplier: float | Tensor | None = None
    ) -> None: ...

    @overload
    def step(
        self, closure: Callable[[], float], *, grad_multiplier: float | Tensor | None = None
    ) -> float: ...

    def step(
        self,
        closure: Callable[[], float] | None = None,
        *,
        grad_multiplier: float | Tensor | None = None,
    ) -> float | None:
        """Update the parameters that have a gradient.

        In a function that ``torch.compile`` compiles, the call is a graph break: it runs as it is.

        Args:
            closure: Evaluates the model again, with gradients enabled, and returns the loss. Hooks
                see it as a positional argument.
            grad_multiplier: A number or a one-element tensor, by which every gradient is multiplied
                on the way, such as the coefficient of a clipped norm. ``p.grad`` is not modified.

        Returns:
            What `closure` returned.
        """
        is_observed = (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or torch_optimizer._global_optimizer_pre_hooks
            or torch_optimizer._global_optimizer_post_hooks
            or _is_profiling()
        )
        if is_observed and not getattr(type(self).step, "runs_hooks", False):
            arguments = () if closure is None else (closure,)
            options = {} if grad_multiplier is None else {"grad_multiplier": grad_multiplier}
            loss: float | None = self._observed_step(*arguments, **options)
            return loss
        if closure is not None or _is_compiling():
            return self._unobserved_step(closure, grad_multiplier=grad_multiplier)
        self._step(grad_multiplier)
        return None

    # So torch does not wrap it, which would take longer than a step of one small parameter.
    step.hooked = True  # type: ignore[attr-defined]

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the ``step`` of a subclass as torch does, for hooks and profilers."""
        wrapper = torch.optim.Optimizer.profile_hook_step(func)
        wrapper.runs_hooks = True  # type: ignore[attr-defined]
        return wrapper

    def _unobserved_step(
        self,
        closure: Callable[[], float] | None = None,
        *,
        grad_multiplier: float | Tensor | None = None,
    ) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        run = self._step_between_graphs if _is_compiling() else self._step
        run(grad_multiplier)
        return loss

    # With hooks, and for profilers, which see it by the class's name.
    _observed_step: Callable[..., Any] = torch.optim.Optimizer.profile_hook_step(_unobserved_step)

    @_disable_dynamo
    def _step_between_graphs(self, grad_multiplier: float | Tensor | None) -> None:
        self._step(grad_multiplier)

    def _step(self, grad_multiplier: float | Tensor | None) -> Tensor | None:
        """Step all groups.

        Returns:
            What a ``GradScaler`` says: where it is there and not 0, nothing was changed.
        """
        # None is looked for first: whether something is a Tensor takes a call to find out.
        if grad_multiplier is not None:
            if not isinstance(grad_multiplier, Tensor):
                grad_multiplier = read_number("grad_multiplier", grad_multiplier)
            elif grad_multiplier.numel() == 1:
                grad_multiplier = whole(grad_multiplier)
            else:
                raise ValueError("Tensor grad_multiplier must be 1-element")
        if _is_cuda_in_use() and torch.cuda.is_current_stream_capturing():  # type: ignore[no-untyped-call]
            for i, group in enumerate(self.param_groups):
                if not group["capturable"]:
                    raise RuntimeError(
                        f"a CUDA graph cannot capture a step that is counted on the host: set"
                        f" capturable=True (param_groups[{i}] has False)"
                    )
        # A GradScaler sets these for the duration of the call.
        grad_scale = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if grad_scale is not None:
            grad_scale = whole(grad_scale)
        if found_inf is not None:
            if isinstance(found_inf, Tensor):
                found_inf = whole(found_inf)
                if not found_inf.is_cuda and read(found_inf, 0.0) != 0.0:
                    return found_inf
            else:
                found_inf = None  # of a GradScaler that found no gradients, their sum: 0
        groups = list(self.param_groups)
        positions = []
        num_params = 0
        draws = has_state_dtypes = False
        are_rates_floats = True
        has_tensors = not (grad_multiplier is None and grad_scale is None and found_inf is None)
        for group in groups:
            positions.append(num_params)
            num_params += len(group["params"])
            draws = draws or group["stochastic_rounding"] is not False
            has_state_dtypes = has_state_dtypes or group["state_dtype"] is not None
            are_rates_floats = are_rates_floats and type(group["lr"]) is float
        if not are_rates_floats:
            # Those of DTensors once, by all processes, whatever is then left to each of them.
            groups = [{**g, "lr": whole(g["lr"])} if is_dtensor(g["lr"]) else g for g in groups]
            has_tensors = True
        if has_state_dtypes:
            check_state_dtypes(self, groups)  # no native step reads them
        if draws:
            for i, group in enumerate(groups):
                check_flags(self, group, f"param_groups[{i}]")  # before a seed is drawn
            draws = any(group["stochastic_rounding"] for group in groups)
        seed = draw_seed() if draws else 0
        arguments = (grad_multiplier, grad_scale, found_inf, seed)
        if has_tensors and not have_values((*(group["lr"] for group in groups), *arguments)):
            left = self._prepare_all(groups, StepArguments(*arguments))
        elif native is not None and (rules := self._rules_of_one_call(groups)) is not None:
            # Here, for the layers below take as long as five small parameters do. Nothing is done
            # where any are left.
            try:
                found = native.step(self.state, groups, positions, rules, arguments, None, False)
            except (TypeError, ValueError) as error:
                self._explain(error)
            if found is None:
                return found_inf
            left = self._step_left(groups, positions, StepArguments(*arguments), found)
        else:
            for i, group in enumerate(groups):
                check_flags(self, group, f"param_groups[{i}]")  # which say what else is checked
            if not all(map(self._has_native_step, groups)):
                for i, group in enumerate(groups):
                    check_group(self, group, f"param_groups[{i}]")
            left = self._native_step(groups, positions, StepArguments(*arguments))
        for i, indices in sorted(left.items()):
            self._plain_step(groups[i], positions[i], StepArguments(*arguments), indices)
        return found_inf

    def _rules_of_one_call(self, groups: Sequence[dict[str, Any]]) -> list[GroupRule] | None:
        """Return groups' rules if their step may be one native call, and None if not.

        If so, `_native_step` and `_grad` are passed by.
        """
        rules = []
        for group in groups:
            if group["fused"] is not None and group["fused"] is not True:
                return None
            rule = self._rule_of(group)
            if rule[0] is None:  # `native`, faster
                return None
            rules.append(rule)
        return rules

    def _steps_together(self, group: dict[str, Any]) -> bool:
        """Return whether processes communicate for parameters without a gradient, too."""
        return False

    def _prepare_all(
        self, groups: Sequence[dict[str, Any]], arguments: StepArguments
    ) -> dict[int, Collection[int]]:
        """Leave all parameters to the plain step, where there are no values to compute with.

        Returns:
            As `_native_step`.
        """
        for i, group in enumerate(self.param_groups):
            check_group(self, group, f"param_groups[{i}]")
        return {
            i: self._prepare(group, range(len(group["params"])), arguments)
            for i, group in enumerate(groups)
        }

    def _has_native_step(self, group: dict[str, Any]) -> bool:
        """Return whether there may be a native step for what a group asks."""
        is_native = native is not None and self._rule_of(group).native is not None
        return is_native and (group["fused"] is None or bool(group["fused"]))

    def _native_step(
        self,
        groups: Sequence[dict[str, Any]],
        positions: Sequence[int],
        arguments: StepArguments,
    ) -> dict[int, Collection[int]]:
        """Step what can be, in one native call.

        Returns:
            By the index of a group, the indices of its parameters that are left. Their states are
            there.
        """
        left: dict[int, Collection[int]] = {}
        chosen = []
        if not all(map(self._has_native_step, groups)):
            split_counters(self.state.values())
        for i, group in enumerate(groups):
            if self._has_native_step(group):
                chosen.append(i)
                continue
            indices = self._prepare(group, range(len(group["params"])), arguments)
            if indices and group["fused"]:
                self._raise_no_native_step(group, indices)
            if indices or self._steps_together(group):
                left[i] = indices
        followers = self._settle_order(groups, left, arguments)
        if not chosen:
            return left
        all_grads = {i: self._grads(groups[i]) for i in chosen}
        for i, k in followers:
            all_grads[i][k] = None  # not to be stepped natively
        groups = [groups[i] for i in chosen]
        positions = [positions[i] for i in chosen]
        grads = list(all_grads.values())
        found = self._call_native(groups, positions, arguments, grads, may_leave=False)
        if found is not None:
            more = self._step_left(groups, positions, arguments, found, grads)
            left.update((chosen[k], indices) for k, indices in more.items())
        for i, k in followers:
            left[i] = sorted({*left.get(i, ()), k})
        return left

    def _settle_order(
        self,
        groups: Sequence[dict[str, Any]],
        left: Mapping[int, Collection[int]],
        arguments: StepArguments,
    ) -> set[Place]:
        """Check what shares memory where the fallback steps some of the parameters.

        Returns:
            What else has to be left to the fallback, after those. Its states are there.
        """
        if not any(left.values()):
            return set()  # the native step does it
        followers = find_followers(check_overlap(self, groups), left)
        for i, k in followers:
            if groups[i]["fused"]:
                self._raise_no_native_step(groups[i], [k])
            self._prepare(groups[i], [k], arguments)
        return followers

    def _step_left(
        self,
        groups: Sequence[dict[str, Any]],
        positions: Sequence[int],
        arguments: StepArguments,
        found: Sequence[Collection[int]],
        grads: list[list[Tensor | None]] | None = None,
    ) -> dict[int, Collection[int]]:
        """Step by another native call, after one that has done nothing.

        States that were missing are made, and gradients are brought to where parameters are.

        Args:
            groups: All that are to be stepped natively.
            positions: The number of each group's first parameter.
            arguments: What the call of ``step`` passes.
            found: For each group, the indices of its parameters that were left.
            grads: For each group, what that call was given as the parameters' gradients.

        Returns:
            By the index of a group, the indices of its parameters that are still left.
        """
        params = (g["params"][i] for g, indices in zip(groups, found, strict=True) for i in indices)
        if is_tracing() or any(map(is_fake, params)):
            return self._prepare_all(groups, arguments)
        split_counters(self.state.values())
        ready = [
            self._prepare(group, indices, arguments)
            for group, indices in zip(groups, found, strict=True)
        ]
        if grads is None:
            grads = [self._grads(group) for group in groups]
        for group, indices, own in zip(groups, ready, grads, strict=True):
            with torch.no_grad():
                for i in indices:
                    own[i] = _placed_like(own[i], group["params"][i])
        still = self._call_native(groups, positions, arguments, grads, may_leave=True)
        left = {i: indices for i, indices in enumerate(still or ()) if indices}
        for i, indices in left.items():
            if groups[i]["fused"]:
                self._raise_no_native_step(groups[i], indices)  # nothing was done
        return left

    def _call_native(
        self,
        groups: Sequence[dict[str, Any]],
        positions: Sequence[int],
        arguments: StepArguments,
        grads: list[list[Tensor | None]],
        may_leave: bool,
    ) -> Any:
        assert native is not None
        rules = [self._rule_of(group) for group in groups]
        try:
            return native.step(self.state, groups, positions, rules, arguments, grads, may_leave)
        except (TypeError, ValueError) as error:
            self._explain(error)

    def _explain(self, error: Exception) -> NoReturn:
        """Raise what the native step has raised, with the culprit's name where one is found."""
        try:
            for i, group in enumerate(self.param_groups):
                check_group(self, group, f"param_groups[{i}]")
                check_tensors(self, group)
            check_overlap(self, self.param_groups)
        except (TypeError, ValueError, RuntimeError) as explained:
            raise explained from None
        raise error

    @torch.no_grad()
    def _prepare(
        self, group: dict[str, Any], indices: Iterable[int], arguments: StepArguments
    ) -> list[int]:
        """Check parameters, and make the states that they lack.

        Returns:
            The indices of those that have a gradient.
        """
        refuse_trace("an optimizer's step")
        params = group["params"]
        check_tensors(self, group)
        found = list(indices)
        indices = [i for i in found if self._grad(group, params[i]) is not None]
        if is_tracing():
            for i in indices:
                params[i].detach()  # an error, before states are made, where no real one is taken
        numbers = {**numbers_of(self, group), **arguments._asdict()}
        unknown = [(name, value) for name, value in numbers.items() if not has_value(value)]
        for i in indices:
            try:
                self._check_param(group, params[i])
                for name, value in unknown:
                    check_has_value(name, value, params[i])
            except (TypeError, ValueError, RuntimeError) as error:
                raise blame(error, param_name(self, group, i)) from None
        begun = found if self._makes_all_states else indices
        for i in begun:
            state = self.state.get(params[i])
            if state and self._is_begun(group):
                check_complete(self, group, state, f"the state of {param_name(self, group, i)}")
        if not is_absent(group.get("step")):
            self._count_from_group(group)
        for i in begun:
            try:
                state = self._init_state(group, params[i])
                self._check_state(group, params[i], state)
            except (TypeError, ValueError, RuntimeError) as error:
                raise blame(error, param_name(self, group, i)) from None
            self._place_counter(group, params[i], state, arguments)
        return indices

    def _place_counter(
        self, group: dict[str, Any], param: Tensor, state: dict[str, Any], arguments: StepArguments
    ) -> None:
        """Replace a counter that has the wrong device or dtype."""
        step = state["step"]
        # From the first step that carries one, counters are where CUDA parameters are, so that the
        # host need not know whether they advance.
        needs_device = group["capturable"] or arguments.found_inf is not None
        if needs_device and param.device.type == "cuda" and step.is_cpu:
            state["step"] = new_counter(read(step, 0.0), param.device)
        elif step.dtype != torch.float32:
            state["step"] = step.to(torch.float32)

    def _needs_count(self, group: dict[str, Any]) -> bool:
        """Return whether an update depends on a count that a group's ``step`` does not say."""
        return is_absent(group.get("step")) and "step" in self._rule_of(group).rule.options

    def _is_begun(self, group: dict[str, Any]) -> bool:
        """Return whether a state may hold steps that were taken, so that it has to be complete."""
        return True

    def _count_from_group(self, group: dict[str, Any]) -> None:
        """Let begun states that have no counter count from their group's ``step``."""
        for param in group["params"]:
            check_has_value("the group's 'step'", group["step"], param)
        check_count("the group's 'step'", group["step"])
        states = [state for param in group["params"] if (state := self.state.get(param))]
        for own in self.param_groups:  # of which `group` may be a copy
            if own["params"] is group["params"]:
                settle_counts(self, own, states)

    def _operands_of(
        self, group: dict[str, Any], param: Tensor, state: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return what of a parameter's state its step reads or modifies."""
        keys = ["step", *self._rule_of(group).state_names]
        if has_master(group, param):
            keys.append(MASTER)
        return {key: state[key] for key in keys if key in state}

    def _grads(self, group: dict[str, Any]) -> list[Tensor | None]:
        return [self._grad(group, param) for param in group["params"]]

    def _raise_no_native_step(self, group: dict[str, Any], indices: Collection[int]) -> NoReturn:
        raise RuntimeError(
            f"fused=True, but {type(self).__name__} has no native step for"
            f" {param_name(self, group, min(indices))}; fused=None takes one where there is one"
        )

    @torch.no_grad()
    def _plain_step(
        self,
        group: dict[str, Any],
        first_position: int,
        arguments: StepArguments,
        indices: Collection[int],
    ) -> None:
        # Numbers on a device are read here, those of the counters included: this is the loop for
        # devices without kernels, and it cannot be captured in a CUDA graph.
        if arguments.found_inf is not None and read(arguments.found_inf, 0.0) != 0.0:
            return
        factor = _grad_factor(group, arguments)
        lr = read(group["lr"], HYPERPARAMETER)
        for i in indices:
            param = group["params"][i]
            self._plain_update(group, param, lr, factor, first_position + i, arguments.seed)

    def _plain_update(
        self,
        group: dict[str, Any],
        param: Tensor,
        lr: float,
        factor: float,
        position: int,
        seed: int,
    ) -> None:
        weight_decay, method = (
            read(group["weight_decay"], HYPERPARAMETER),
            group["weight_decay_method"],
        )
        state = self.state[param]
        state["step"] += 1
        step = int(read(state["step"], 1))
        values = self._read_weight(group, param)
        _, _, state_names, rule = self._rule_of(group)
        states = [as_local(state[name]) for name in state_names]
        increment_versions(t for t in (param, *state.values()) if isinstance(t, Tensor))
        grad = as_local(_placed_like(self._grad(group, param), param))

        is_double = torch.float64 in (grad.dtype, values.dtype, *(s.dtype for s in states))
        real = torch.float64 if is_double else torch.float32
        grad = grad.to(real)
        weights = values.to(real)
        if factor != 1.0:
            grad = grad * factor
        if method == "l2" and weight_decay != 0.0:
            grad = grad + weights * weight_decay
        options = {**self._plain_options(group), "step": step}
        if "step" not in rule.options:
            del options["step"]
        update = rule.compute_update(grad, states, options)
        if lr == 0.0:
            return  # not even 0 times a NaN reaches the parameter

        norms = None
        if group.get("frob_normalize", False):
            norms = frobenius_norms([weights], [param])
        scale = self._update_scale(group, param)
        if scale != 1.0:
            update.mul_(scale)
        _move(weights, update.mul_(lr), _LOST[method](lr, weight_decay))
        if norms is not None:
            restore_norms([weights], [param], norms)

        if weights is not values:
            if group["stochastic_rounding"] and values.dtype in HALF:
                place = shard_place(param) if is_dtensor(param) else ShardPlace(0, 0)
                key = rounding_key(seed, place.number << 32 | position, step)
                bits = random_bits(key, element_indices(values) + place.first_index)
                store(values, round_stochastically(weights.float(), values.dtype, bits))
            else:
                store(values, weights)
        self._write_weight(group, param, values)

    def _read_weight(self, group: dict[str, Any], param: Tensor) -> Tensor:
        """Return what an update is applied to, this process's part: a master, if there is one.

        It is the state's or the parameter's own memory, or else `_write_weight` stores it.
        """
        return as_local(param if (master := self._master(group, param)) is None else master)

    def _write_weight(
        self,
        group: dict[str, Any],
        param: Tensor,
        weight: Tensor,
        is_still: Tensor | None = None,
    ) -> None:
        """Store a weight where `_read_weight` found it, and round it to the parameter.

        Where `is_still`, of one element, is true, every bit stays.
        """
        if self._master(group, param) is not None:
            part = as_local(param)
            rounded = weight.to(part.dtype)
            store(part, rounded if is_still is None else torch.where(is_still, part, rounded))

    def _master(self, group: dict[str, Any], param: Tensor) -> Tensor | None:
        """Return the state that is a parameter's master, or the remainder of one."""
        master: Tensor | None = self.state.get(param, {}).get(MASTER)
        if not has_master(group, param) or master is None:
            return None
        try:
            self._check_part(group, param, MASTER, master)
        except (TypeError, ValueError, RuntimeError) as error:
            raise blame(error, find_param(self, param)) from None
        return master


def _dtype_text(state_dtype: StateDtype) -> str | dict[str, Any] | None:
    if isinstance(state_dtype, Mapping):
        return {name: _dtype_text(dtype) for name, dtype in state_dtype.items()}
    return None if state_dtype is None else str(state_dtype)


def _grad_factor(group: dict[str, Any], arguments: StepArguments) -> float:
    """Return by what gradients are multiplied."""
    factor = 1.0
    if arguments.grad_multiplier is not None:
        factor = read(arguments.grad_multiplier, HYPERPARAMETER)
    if arguments.grad_scale is not None:
        factor /= read(arguments.grad_scale, HYPERPARAMETER)
    return -factor if group["maximize"] else factor


# ---- one parameter -------------------------------------------------------------------------------


def _move(weights: Tensor, update: Tensor, lost: float) -> None:
    """Take an update, which is overwritten, and a fraction of themselves from weights."""
    if lost >= 0.5:
        weights.mul_(1 - lost)
    elif lost != 0.0:
        # 1 - lost would be rounded to 24 bits, of which a small fraction has few. An infinite
        # weight stays what it is: it loses a finite amount.
        largest = torch.finfo(weights.dtype).max
        update.add_(weights.clamp(-largest, largest), alpha=lost)
    weights.sub_(update)


_SPARSE = (
    torch.sparse_coo,
    torch.sparse_csr,
    torch.sparse_csc,
    torch.sparse_bsr,
    torch.sparse_bsc,
)


def _check_layout(name: str, tensor: Tensor) -> None:
    if tensor.is_nested:
        raise TypeError(f"{name} is a nested tensor; expected a strided (dense) tensor")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} has layout {tensor.layout}; expected a strided (dense) tensor")


def _check_beside(
    name: str,
    tensor: Tensor,
    param: Tensor,
    as_stored: torch.dtype | None = None,
    is_loaded: bool = False,
) -> None:
    """Raise for a tensor of a parameter's shape that yet is none for it."""
    is_number = tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == as_stored
    if not is_number or tensor.is_complex() != param.is_complex():
        raise TypeError(
            f"the parameter has dtype {param.dtype} but {name} has dtype {tensor.dtype}"
        )
    _check_layout(name, tensor)
    # What is loaded is moved; but a meta tensor has no values to move.
    is_elsewhere = tensor.is_meta != param.is_meta if is_loaded else tensor.device != param.device
    if is_elsewhere:
        raise ValueError(f"the parameter is on {param.device} but {name} is on {tensor.device}")
    if not is_tracing():
        check_has_value(name, tensor, param)
    if is_dtensor(tensor) != is_dtensor(param):
        raise TypeError(
            f"the parameter is a {type(param).__name__} but {name} is a {type(tensor).__name__}"
        )


def _check_memory(name: str, tensor: Tensor) -> None:
    if _checks.has_no_memory(_local_part(tensor)):
        raise ValueError(f"{name} has no memory: its storage was resized to 0")


def _check_modified(name: str, tensor: Tensor) -> None:
    """Raise for a tensor that cannot be modified in place."""
    _check_memory(name, tensor)
    if tensor.is_conj():
        raise RuntimeError(f"{name} is conjugated lazily: resolve_conj() makes it its own")
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{name} is an inference tensor, which cannot be modified outside of inference mode"
        )
    local = _local_part(tensor)
    if not local.is_contiguous() and _overlap.overlaps_itself(local) is not False:
        raise ValueError(
            f"{name} overlaps itself in memory (an expanded tensor, with shape"
            f" {tuple(tensor.shape)} and strides {tensor.stride()})"
        )


def _local_part(tensor: Any) -> Tensor:
    local: Tensor = tensor.to_local() if is_dtensor(tensor) else tensor
    return local


def as_local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor, as real numbers."""
    tensor = _local_part(tensor)
    if tensor.is_complex():
        # A gradient can be a view with its conjugation still to be done.
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor


def _is_placed_like(tensor: Any, param: Any) -> bool:
    if not is_dtensor(param):
        return True
    return bool(tensor.device_mesh == param.device_mesh and tensor.placements == param.placements)


def _placed_like(grad: Any, param: Any) -> Any:
    """Return a gradient that lies as the parameter does: redistributed, or negated at last."""
    if not is_dtensor(param):
        return grad.resolve_neg() if grad.is_neg() else grad
    if grad.device_mesh != param.device_mesh:
        from torch.distributed.tensor import DTensor, Replicate

        mesh = param.device_mesh
        everywhere = [Replicate()] * mesh.ndim
        grad = DTensor.from_local(grad.full_tensor(), mesh, everywhere, run_check=False)
    if grad.placements != param.placements:
        grad = grad.redistribute(placements=param.placements)
    return grad


# ---- norms ---------------------------------------------------------------------------------------


def frobenius_norms(parts: Sequence[Tensor], likes: Sequence[Any]) -> list[Tensor]:
    """Return norms in float64: of the parts, over all processes where `likes` are DTensors."""
    norms = torch._foreach_norm(list(parts), 2, torch.float64)
    pairs = zip(norms, likes, strict=True)
    return [_over_processes(norm, like) if is_dtensor(like) else norm for norm, like in pairs]


def restore_norms(
    parts: Sequence[Tensor], likes: Sequence[Any], norms: Sequence[Tensor]
) -> list[Tensor]:
    """Scale to the norms that are given what has a finite factor for it; return the factors."""
    factors = []
    for part, norm, new_norm in zip(parts, norms, frobenius_norms(parts, likes), strict=True):
        factor = norm / new_norm
        factors.append(torch.where(factor.isfinite(), factor, torch.ones_like(factor)))
        part.mul_(factors[-1])
    return factors


def _over_processes(norm: Tensor, like: Any) -> Tensor:
    from torch.distributed.tensor import DTensor, Partial, Replicate

    # Each dimension of the mesh that shards the tensor has parts of the sum of squares.
    placements = [Replicate() if p.is_replicate() else Partial() for p in like.placements]
    parts = DTensor.from_local(norm.square(), like.device_mesh, placements, run_check=False)
    squares: Tensor = parts.full_tensor()
    return squares.sqrt()
