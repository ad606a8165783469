"""The base class of the optimizers: constructor, groups, ``step`` and state dicts."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import ParamsT

from ._base import BaseOptimizer, hook_of, members_of
from ._checkpoint import before_load, finish_state_dict, settle
from ._coded_states import check_filter, read_filter
from ._groups import check_group, flags_of, read_group_flag
from ._states import complete
from ._step import run_step

# Every step asks: without looking up modules.
_is_compiling = torch.compiler.is_compiling
_is_profiling = torch.autograd._profiler_enabled  # type: ignore[attr-defined]

StateDtype: TypeAlias = (
    torch.dtype | Literal["8bit"] | Mapping[str, torch.dtype | Literal["8bit"]] | None
)
StateDtypeFilter: TypeAlias = Callable[[str | None, Tensor], bool] | None
MasterWeights: TypeAlias = bool | Literal["split"]


class SharedOptions(TypedDict, total=False):
    """The keyword-only options of every optimizer; `ScalarOptimizer` documents them."""

    maximize: bool
    fused: bool | None
    capturable: bool
    state_dtype: StateDtype
    state_dtype_filter: StateDtypeFilter
    master_weights: MasterWeights
    stochastic_rounding: bool
    differentiable: bool


class ScalarOptimizer(BaseOptimizer):
    r"""Base of the optimizers whose update is computed element by element.

    With :math:`\gamma` as `lr` and :math:`\lambda` as `weight_decay`, the weight decay methods are

    - "decoupled": :math:`p \leftarrow p - \gamma \lambda p`,
    - "independent": :math:`p \leftarrow p - \lambda p`,
    - "palm": :math:`p \leftarrow p - \gamma^2 \lambda p`, and
    - "l2": :math:`g \leftarrow g + \lambda p`, which does not modify ``p.grad``.

    The right-hand sides use the parameter as it is before the step.

    The options below are keyword arguments of all optimizers; each parameter group may set them.
    Arithmetic is float32; it is float64 if the parameter, its gradient or one of its states is.
    Each result is rounded once.

    Args:
        params: Parameters, named parameters or parameter groups, as for any ``torch.optim``
            optimizer.
        hyperparameters: The defaults of a group's hyperparameters: ``lr``, ``weight_decay``,
            ``weight_decay_method`` and those of the rule.
        maximize: Maximize the objective instead of minimizing it.
        fused: None: native kernels where available, else PyTorch operations. False: PyTorch
            operations. True: native kernels, or an error. With True in every group, a
            ``GradScaler`` leaves it to ``step`` to unscale gradients and to skip the step, and on
            CUDA the host does not wait for ``found_inf``. Otherwise the ``GradScaler`` unscales
            gradients before the step, and waits.
        capturable: Keep step counters on the parameters' devices, so that CUDA graphs can capture
            the step.
        state_dtype: The dtype of the states of real parameters: float32, bfloat16, float16 or
            ``"8bit"``, or a dict of these by state key. None: the parameter's dtype, or that of a
            loaded state. With ``"8bit"``, states are 8-bit codes, of which 32 along the last
            dimension share a scale in the state ``{key}_scale``. States stay float32 if their rule
            does not allow codes, and if their parameter has fewer than 4096 elements, fewer than
            two dimensions, or a last dimension that is no multiple of 32; those of float64
            parameters stay float64.
        state_dtype_filter: Called with a parameter's name (None if it has none) and the parameter,
            when its group is added. Returns whether its states may be 8-bit codes. Copies and
            pickles keep the answers, but not the function.
        master_weights: True: keep a float32 master weight of each bfloat16 or float16 parameter in
            its state, as ``master_param``. Updates apply to the master; the parameter is the
            master, rounded. A master starts with the parameter's value at its first step; values
            that are written to the parameter later are lost. "split": of a bfloat16 parameter's
            master, the state has only the 16 bits that the parameter lacks, as int16. Masters have
            the same bits as with True. The parameter is the master, rounded to nearest, ties away
            from zero.
        stochastic_rounding: Round updated bfloat16 and float16 parameters up or down at random,
            without bias. The random bits depend only on a seed that each step draws from PyTorch's
            default CPU generator, the step number, the parameter's position in the optimizer and
            the element's index. So replicas need generators in the same state. For a DTensor
            whose shard is contiguous in the full tensor, as with ``Shard(0)``, the index is that
            in the full tensor; other shards of DTensors draw independently of each other. For a
            shard that is an ordinary tensor, the index is that in the shard: there, processes need
            generators in different states.
        differentiable: Not supported; True raises a ValueError.

    Attributes:
        grad_norm: The norm of the gradients in the last ``step(max_norm=...)``, before clipping; a
            0-dim tensor on the first gradient's device. None before. It is not saved. A step that a
            ``GradScaler`` skips without calling it leaves the norm as it was.
    """

    if TYPE_CHECKING:

        @overload
        def __init__(
            self, params: ParamsT, hyperparameters: dict[str, Any], options: SharedOptions
        ) -> None: ...

        # Classes with `rule=`, whose `__init__` is made when they are.
        @overload
        def __init__(self, params: ParamsT, lr: float | Tensor = ..., **arguments: Any) -> None: ...

        def __init__(self, *arguments: Any, **options: Any) -> None: ...

    else:

        def __init__(
            self, params: ParamsT, hyperparameters: dict[str, Any], options: SharedOptions
        ) -> None:
            own = dict(options)
            self._state_dtype_filter = check_filter(own.pop("state_dtype_filter", None))
            self._filtered = {}
            for name in own:
                if name not in self._option_defaults:
                    cls = type(self).__name__
                    raise TypeError(f"{cls}.__init__() got an unexpected keyword argument {name!r}")
            defaults = {**hyperparameters, **self._option_defaults, **own}
            check_group(self, defaults, is_new=True)
            super().__init__(params, defaults)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether ``torch.amp.GradScaler`` leaves it to ``step`` to unscale and to skip.

        This is one answer for all groups, so all of them must be fused.
        """
        return bool(self.param_groups) and all(map(self._scales_in_step, self.param_groups))

    def _scales_in_step(self, group: dict[str, Any]) -> bool:
        """Return whether a group's step has to apply a ``GradScaler``'s scale and ``found_inf``."""
        return group.get("fused") is True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; missing keys take the defaults."""
        if isinstance(param_group, dict):
            if "state_dtype_filter" in param_group:
                raise TypeError(
                    "state_dtype_filter is an argument of the optimizer, not of a group: it is"
                    " called for the parameters of all groups"
                )
            where = f"param_groups[{len(self.param_groups)}]"
            check_group(self, {**self.defaults, **param_group}, where, is_new=True)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if self._state_dtype_filter is not None:
            try:
                read_filter(self, group)
            except BaseException:
                self.param_groups.pop()
                raise
        for name in flags_of(self, group):
            group[name] = read_group_flag(group, name)  # numpy's are not for state dicts
        hook = hook_of(self, group)
        if hook is not None:
            hook.check_group(self, group)

    def _init_group(self, group: dict[str, Any], skip_non_grad_params: bool = True) -> None:
        """Create the missing states of a group's parameters, for code that sets their values.

        Args:
            group: One of the optimizer's groups.
            skip_non_grad_params: Leave out parameters without a gradient.
        """
        for member in members_of(self, group):
            if not skip_non_grad_params or member.grad is not None:
                complete(self, member)

    # ---- the step --------------------------------------------------------------------------------

    @overload
    def step(
        self,
        closure: None = None,
        *,
        grad_multiplier: float | Tensor | None = None,
        max_norm: float | None = None,
    ) -> None: ...

    @overload
    def step(
        self,
        closure: Callable[[], float],
        *,
        grad_multiplier: float | Tensor | None = None,
        max_norm: float | None = None,
    ) -> float: ...

    def step(
        self,
        closure: Callable[[], float] | None = None,
        *,
        grad_multiplier: float | Tensor | None = None,
        max_norm: float | None = None,
    ) -> float | None:
        """Update the parameters that have a gradient.

        In a function that ``torch.compile`` compiles, the call is a graph break and runs eagerly.

        Args:
            closure: Reevaluates the model, with gradients enabled, and returns the loss. Hooks see
                it as a positional argument.
            grad_multiplier: A number or a one-element tensor. Every gradient is multiplied by it on
                the fly. ``p.grad`` is not modified.
            max_norm: The largest norm (of order 2) of all gradients, as in
                :func:`torch.nn.utils.clip_grad_norm_`. It is the norm of the gradients after
                ``GradScaler``'s unscaling and after `grad_multiplier`, and becomes `grad_norm`.
                Every gradient is multiplied by the clipping coefficient on the fly; see
                :func:`~emerging_optimizers.clip_coefficient`.

        Returns:
            What `closure` returned, or None.
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
            if max_norm is not None:
                options["max_norm"] = max_norm
            loss: float | None = self._observed_step(*arguments, **options)
            return loss
        if closure is not None or _is_compiling():
            return self._unobserved_step(
                closure, grad_multiplier=grad_multiplier, max_norm=max_norm
            )
        self._step(grad_multiplier, max_norm)
        return None

    # Keeps torch from wrapping it, which would take longer than a step of one small parameter.
    step.hooked = True  # type: ignore[attr-defined]

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the ``step`` of a subclass as torch does, with hooks and a profiler's record."""
        wrapper = torch.optim.Optimizer.profile_hook_step(func)
        wrapper.runs_hooks = True  # type: ignore[attr-defined]
        return wrapper

    def _unobserved_step(
        self,
        closure: Callable[[], float] | None = None,
        *,
        grad_multiplier: float | Tensor | None = None,
        max_norm: float | None = None,
    ) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        run = self._step_between_graphs if _is_compiling() else self._step
        run(grad_multiplier, max_norm)
        return loss

    # With hooks, and with a profiler's record under the name of the class.
    _observed_step: Callable[..., Any] = torch.optim.Optimizer.profile_hook_step(_unobserved_step)

    @_disable_dynamo
    def _step_between_graphs(
        self, grad_multiplier: float | Tensor | None, max_norm: float | None
    ) -> None:
        self._step(grad_multiplier, max_norm)

    # Not a method that calls it: every step would pay for the call.
    _step = run_step

    # ---- saving and loading ----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the states and the groups, in types that every state-dict tool accepts.

        `state_dtype` is text, which is not loaded; numpy's numbers become Python's.
        """
        # First of all hooks, so that the user's see the result.
        finish: Any = type(self)._finish_state_dict
        hook = self.register_state_dict_post_hook(finish, prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def _finish_state_dict(self, saved: dict[str, Any]) -> None:
        """Turn what ``torch`` has saved into what should be saved."""
        finish_state_dict(self, saved)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned, of this optimizer or of one with the same states.

        States are cast to `state_dtype`, if it is set. Hyperparameters are loaded; missing ones
        take the defaults. Options that determine how a group is stored and run (`fused`,
        `capturable`, `state_dtype`, `master_weights`, `stochastic_rounding`) are not loaded.

        Args:
            state_dict: The state dict. Tensors that fit are not copied.
        """
        # Last of all hooks, so that it sees what the user's return.
        check: Any = before_load
        hook = self.register_load_state_dict_pre_hook(check)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled or copied."""
        state: dict[str, Any] = super().__getstate__()
        return {**state, "_filtered": self._filtered} if self._filtered else state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what was pickled, copied or loaded; of an older version, too."""
        settle(self, state)  # first, because it can fail
        super().__setstate__(state)
        self.__dict__.setdefault("_filtered", {})
