"""What Megatron-Core expects of an optimizer beyond ``torch.optim``."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .._base import SHARED_DEFAULTS, grads_of, members_of
from .._coded_states import (
    EIGHT_BIT,
    code_in,
    decoded,
    is_coded,
    names_with_codes,
    set_coded,
)
from .._codes import Code, scale_key
from .._groups import STATE_DTYPES
from .._hyperparameters import read_flag, read_optional_flag
from .._members import find_param
from .._optimizer import MasterWeights
from .._rounding import store
from .._states import complete
from .._values import read
from .._weights import MASTER, is_split
from . import group_steps, scaled_masters
from .shard_states import ShardState, fill_allocated


class MegatronMixin(scaled_masters.ScaledMasters):
    """What Megatron-Core expects of an optimizer beyond ``torch.optim``.

    Megatron-Core's distributed optimizer gives each process a shard of a flat buffer. The
    parameters are then views at any offset, and replace those that the optimizer was created
    with. Nothing is cached between steps: parameters, gradients and states may be replaced or moved
    at any time.

    As in TransformerEngine, a group's ``step`` counts the steps of all its parameters, including
    those without a gradient and those on other processes. Each step adds 1, unless ``found_inf``
    skips it. You may set it to a number, or to None for the largest ``step`` in the states of its
    parameters. It is an int, or a tensor if steps are counted on a device. The counters in the
    states follow it at the next step; loading removes them until then.

    A step first completes the states of all parameters, with or without a gradient. So a master has
    the value that its parameter had at the optimizer's first step.

    Args:
        params: Parameters, named parameters or parameter groups, as for any ``torch.optim``
            optimizer.
        *arguments: Positional arguments of the rule's optimizer.
        master_weights: Keep a master weight of each bfloat16 or float16 parameter in its state, as
            ``master_param``. A float32 parameter is its own master. "split" is the same as True
            with `store_param_remainders`.
        master_weight_dtype: ``torch.float32``, or ``torch.float16``: then each master has a scale,
            and a step makes temporary float32 masters.
        exp_avg_dtype: The dtype of ``exp_avg`` (and ``exp_avg_slow`` or ``grad_avg``):
            ``torch.float32``, ``torch.bfloat16``, ``torch.float16`` or ``torch.uint8``. Float16
            states are not scaled. With ``torch.uint8``, states are 8-bit codes, of which 32 share a
            scale; those of a parameter with one dimension, which may be a shard, are counted from
            its start. States that must stay wide are float32; see `state_dtype` of
            :class:`~emerging_optimizers.scalar_optimizers.ScalarOptimizer`.
        exp_avg_sq_dtype: The dtype of ``exp_avg_sq`` (and ``max_exp_avg_sq``), if the rule has that
            state.
        use_decoupled_grad: Read gradients, of any floating-point dtype, from
            ``param.decoupled_grad`` instead of ``param.grad``.
        store_param_remainders: Store as ``master_param`` of a bfloat16 parameter only the int16
            remainder that :func:`split_master` leaves. No effect without `master_weights`, and on
            float16 masters.
        set_grad_none: Deprecated. The default of ``zero_grad``'s argument.
        **options: Keyword arguments of the rule's optimizer, including `maximize`, `fused` and
            `capturable` of :class:`~emerging_optimizers.scalar_optimizers.ScalarOptimizer`. As in
            TransformerEngine, ``capturable=True`` also leaves it to ``step`` to apply a
            ``GradScaler``'s scale and ``found_inf``.

    Raises:
        ValueError: A dtype that is not supported, a hyperparameter out of range, or float16 masters
            with `capturable` or ``master_weights="split"``.
    """

    _makes_all_states = True
    _has_flat_shards = True
    _counters = group_steps.GroupSteps()
    _own_flags: ClassVar[tuple[str, ...]] = ("use_decoupled_grad", "store_param_remainders")
    _slow_flags: ClassVar[tuple[str, ...]] = ("use_decoupled_grad",)
    _option_defaults: ClassVar = {
        **SHARED_DEFAULTS,
        "use_decoupled_grad": False,
        "store_param_remainders": False,
    }

    def __init__(
        self,
        params: ParamsT,
        *arguments: Any,
        master_weights: MasterWeights = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
        set_grad_none: bool | None = None,
        **options: Any,
    ) -> None:
        _check_dtype("master_weight_dtype", master_weight_dtype, (torch.float32, torch.float16))
        _check_dtype("exp_avg_dtype", exp_avg_dtype, (*STATE_DTYPES, torch.uint8))
        _check_dtype("exp_avg_sq_dtype", exp_avg_sq_dtype, (*STATE_DTYPES, torch.uint8))
        read_optional_flag("set_grad_none", set_grad_none)
        if master_weight_dtype == torch.float16:
            self._master_scales = {}
            read_flag("store_param_remainders", store_param_remainders)
            store_param_remainders = False  # Megatron-Core's default is True
        rule_init: Any = super().__init__
        rule_init(
            params,
            *arguments,
            master_weights=master_weights,
            state_dtype={
                name: self._state_dtype(
                    name, exp_avg_sq_dtype if "exp_avg_sq" in name else exp_avg_dtype
                )
                for name in self._all_state_names
            },
            use_decoupled_grad=use_decoupled_grad,
            store_param_remainders=store_param_remainders,
            **options,
        )
        self.defaults["set_grad_none"] = set_grad_none
        if set_grad_none is not None:
            warnings.warn(
                f"{type(self).__name__}(set_grad_none=...) is deprecated: use"
                " zero_grad(set_to_none=...)",
                DeprecationWarning,
                stacklevel=3,
            )

    def _scales_in_step(self, group: dict[str, Any]) -> bool:
        return super()._scales_in_step(group) or group.get("capturable") is True

    def _new_master(self, group: dict[str, Any], param: Tensor) -> Tensor | None:
        if group["master_weights"] and param.dtype == torch.float32:
            return param
        return super()._new_master(group, param)

    def _state_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype | str:
        """Return the dtype of a state as the option `state_dtype` has it."""
        if dtype != torch.uint8:
            return dtype
        return EIGHT_BIT if name in names_with_codes(self) else torch.float32

    # ---- states, one by one ----------------------------------------------------------------------

    def initialize_state(self, param: Tensor, store_param_remainders: bool | None = None) -> None:
        """Replace a parameter's state by a new one.

        Args:
            param: One of the optimizer's parameters.
            store_param_remainders: Whether its ``master_param`` is a remainder. Must be None, or
                what the optimizer was created with.

        Raises:
            ValueError: Another value than the optimizer was created with.
        """
        group, index = self._place_of(param)
        is_remainder = is_split(group, param)
        if store_param_remainders not in (None, is_remainder):
            raise ValueError(
                f"{find_param(self, param)}: store_param_remainders={store_param_remainders}, but"
                f" this optimizer {'stores' if is_remainder else 'does not store'} the remainder of"
                " this parameter"
            )
        self.state.pop(param, None)
        self._complete(group, index)

    def get_unscaled_state(
        self, param: Tensor, state_name: str, skip_unscale: bool = False
    ) -> Tensor:
        """Return one of a parameter's states as float32; what holds no numbers as it is.

        That is a counter, a remainder, or the scales of 8-bit codes. A float16 master is multiplied
        by its scale.

        Args:
            param: One of the optimizer's parameters.
            state_name: The state's key.
            skip_unscale: Return the state in the dtype that it is stored in.

        Raises:
            KeyError: The parameter has no such state.
            ValueError: A float16 master whose scale is unknown, since its state was another
                parameter's.
        """
        state = self.state.get(param, {})
        if state_name not in state:
            raise KeyError(
                f"{find_param(self, param)}: the parameter has no state {state_name!r}; it has"
                f" {list(state)}"
            )
        if state_name == MASTER and param.dtype == torch.float32:
            return param.detach()
        value: Tensor = state[state_name]
        if not skip_unscale and scaled_masters.is_scaled(self, param, state_name):
            return scaled_masters.read_master(self, param)
        code = self._code_in(param, state_name)
        if code is not None and not skip_unscale:
            return decoded(state, state_name, code)
        return value.float() if value.is_floating_point() and not skip_unscale else value

    @torch.no_grad()
    def set_scaled_state(self, param: Tensor, state_name: str, unscaled_state: Tensor) -> None:
        """Set one of a parameter's states, rounded to the dtype that it is stored in.

        Args:
            param: One of the optimizer's parameters.
            state_name: The state's key. If the parameter does not have the state yet, its missing
                states are created.
            unscaled_state: What ``get_unscaled_state`` returned. 8-bit codes are set from numbers,
                rounded to nearest; setting their scales has no effect. A float16 master is set from
                float32, which determines its scale. A remainder may also be float32; a master is
                refused where a remainder is stored, and vice versa. Anything but a tensor is
                ignored: Megatron-Core 0.16 passes its padding flags, too.

        Raises:
            KeyError: The optimizer has no such state.
            ValueError: A tensor of another shape.
            TypeError: A master for a remainder, a remainder for a master, another dtype than
                float32 for a float16 master, or integers for an average, such as 8-bit codes.
        """
        if not isinstance(unscaled_state, Tensor):
            return
        state = self.state.get(param, {})
        if state_name not in state:
            state = self._complete(*self._place_of(param))
        if state_name not in state:
            raise KeyError(f"{type(self).__name__} has no state {state_name!r}")
        coded = [name for name in state if self._code_in(param, name)]
        if state_name in map(scale_key, coded):
            return
        value: Tensor = state[state_name]
        if unscaled_state.shape != value.shape:
            raise ValueError(
                f"{find_param(self, param)}: {state_name!r} has shape"
                f" {tuple(unscaled_state.shape)}; expected {tuple(value.shape)}"
            )
        if scaled_masters.is_scaled(self, param, state_name):
            return scaled_masters.set_master(self, param, unscaled_state)
        if value.dtype == torch.int16 and unscaled_state.is_floating_point():
            # Megatron's fully reshardable checkpoints hold all states as float32.
            as_integer = unscaled_state.to(torch.int16)
            is_exact = (as_integer.to(unscaled_state.dtype) == unscaled_state).all()
            if read(is_exact, 1):
                unscaled_state = as_integer
        is_master = state_name == MASTER
        if is_master and (value.dtype == torch.int16) != (unscaled_state.dtype == torch.int16):
            stored = "int16 remainders" if value.dtype == torch.int16 else "float32 masters"
            raise TypeError(
                f"{find_param(self, param)}: a master_param has dtype {unscaled_state.dtype}, but"
                f" this optimizer stores {stored}: set master_weights and store_param_remainders"
                " as they were when the state was saved"
            )
        if state_name in self._all_state_names and not unscaled_state.is_floating_point():
            raise TypeError(
                f"{find_param(self, param)}: {state_name!r} is set from numbers, not from dtype"
                f" {unscaled_state.dtype}: pass what get_unscaled_state returns without"
                " skip_unscale"
            )
        code = self._code_in(param, state_name)
        if code is None:
            store(value, unscaled_state)
        else:
            set_coded(state, state_name, code, unscaled_state)

    def _code_in(self, param: Tensor, state_name: str) -> Code | None:
        """Return the format of a parameter's state, if it is stored as codes."""
        state = self.state.get(param, {})
        if not is_coded(state, state_name):
            return None
        return code_in(self._rule_of(self._place_of(param)[0]), state_name)

    def _as_stored(self, state: dict[str, Any]) -> dict[str, Any]:
        has_codes = any(is_coded(state, name) for name in state)
        return ShardState(state) if has_codes and not isinstance(state, ShardState) else state

    def _init_group(self, group: dict[str, Any], skip_non_grad_params: bool = False) -> None:
        """Create the missing states of a group's parameters, with or without a gradient."""
        super()._init_group(group, skip_non_grad_params)
        scaled_masters.store_masters(self)

    def _place_of(self, param: Tensor) -> tuple[dict[str, Any], int]:
        for group in self.param_groups:
            for index, other in enumerate(group["params"]):
                if other is param:
                    return group, index
        raise ValueError("the parameter is in none of the optimizer's groups")

    def _complete(self, group: dict[str, Any], index: int) -> dict[str, Any]:
        """Create a parameter's missing states; return its state."""
        (member,) = members_of(self, group, [index])
        state = complete(self, member).state
        scaled_masters.store_master(self, group, member.param)
        return state

    # ---- gradients -------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Set the gradients to None or to zero; of a group with `use_decoupled_grad`, those.

        Args:
            set_to_none: Set them to None. Defaults to `set_grad_none`, or else to True.

        Raises:
            ValueError: Another value than `set_grad_none`.
        """
        set_grad_none = self.defaults.get("set_grad_none")
        if set_grad_none is not None:
            if set_to_none not in (None, set_grad_none):
                raise ValueError(
                    f"zero_grad(set_to_none={set_to_none}), but the optimizer was created"
                    f" with set_grad_none={set_grad_none}"
                )
            set_to_none = set_grad_none
        if set_to_none is None:
            set_to_none = True
        if not all(group["use_decoupled_grad"] for group in self.param_groups):
            super().zero_grad(set_to_none)
        for group in self.param_groups:
            if not group["use_decoupled_grad"]:
                continue
            for param, grad in zip(group["params"], grads_of(self, group), strict=True):
                if set_to_none:
                    param.decoupled_grad = None
                elif grad is not None:
                    grad.zero_()

    def _grad(self, group: Mapping[str, Any], param: Tensor) -> Tensor | None:
        if group["use_decoupled_grad"]:
            return getattr(param, "decoupled_grad", None)
        return super()._grad(group, param)

    # ---- the step --------------------------------------------------------------------------------

    def _step(
        self, grad_multiplier: float | Tensor | None, max_norm: float | None = None
    ) -> Tensor | None:
        before = [(group, group.get("step", _ABSENT)) for group in self.param_groups]
        try:
            group_steps.read_steps(self, getattr(self, "found_inf", None))
            if self._master_scales is None:
                found_inf = super()._step(grad_multiplier, max_norm)
            else:
                with scaled_masters.as_float32(self):
                    found_inf = super()._step(grad_multiplier, max_norm)
        except Exception:
            for group, step in before:
                group["step"] = step
                if step is _ABSENT:
                    del group["step"]
            raise
        group_steps.count(self, found_inf)
        return found_inf

    # ---- saving and loading ----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the states, each with its ``step``, and the groups, each with its largest."""
        return super().state_dict()

    def _translate_state(self, group: Mapping[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
        return fill_allocated(saved, self._rule_of(group))

    def _finish_state_dict(self, saved: dict[str, Any]) -> None:
        super()._finish_state_dict(saved)
        group_steps.finish_state_dict(self, saved)
        for group, saved_group in zip(self.param_groups, saved["param_groups"], strict=True):
            # The groups have the dtypes of all rules' states. Checkpoints have those of a group's.
            dtypes = saved_group["state_dtype"]
            if isinstance(dtypes, dict):
                names = self._rule_of(group).state_names
                kept = {name: dtype for name, dtype in dtypes.items() if name in names}
                saved_group["state_dtype"] = kept
            for param, key in zip(group["params"], saved_group["params"], strict=True):
                state = saved["state"].get(key, {})
                if MASTER in state:
                    state[MASTER] = self.get_unscaled_state(param, MASTER)


_ABSENT = object()


def _check_dtype(name: str, dtype: torch.dtype, supported: Sequence[torch.dtype]) -> None:
    if dtype not in supported:
        raise ValueError(
            f"{name}={dtype} is not supported; expected {' or '.join(map(str, supported))}"
        )
