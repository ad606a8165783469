"""The optimizers under the names that Megatron-Core's distributed optimizer uses.

:class:`FusedAdam` has the constructor of TransformerEngine's optimizer of that name. The other
rules' classes take their own arguments and those of :class:`MegatronMixin`.
"""

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from . import _group_steps
from . import scalar_optimizers as rules
from ._culprits import blame, find_param
from ._groups import STATE_DTYPES
from ._hyperparameters import read_flag, read_optional_flag
from ._loading import count_of
from ._optimizer import SHARED_DEFAULTS, ScalarOptimizer, StepArguments, as_local
from ._rule import GroupRule, store
from ._states import MASTER, check_master_dtype, is_absent, is_begun
from ._values import HYPERPARAMETER, read

__all__ = [
    "AdEMAMix",
    "FusedAdam",
    "LaProp",
    "Lion",
    "MegatronMixin",
    "Signum",
    "SimplifiedAdEMAMix",
    "merge_master",
    "split_master",
]


# ---- remainders ----------------------------------------------------------------------------------


def split_master(master: Tensor, param: Tensor, remainder: Tensor) -> None:
    """Store a float32 master as a bfloat16 parameter and the 16 bits that this leaves.

    The parameter gets the high 16 bits, plus 1 where the low ones are 0x8000 or more, so it is the
    nearest to the master, and of two the one away from zero. The remainder gets the low 16 bits.
    This is how TransformerEngine stores them.

    Args:
        master: A float32 tensor. Every NaN in it becomes 0x7FC00000.
        param: A bfloat16 tensor of its shape; overwritten.
        remainder: An int16 tensor of its shape; overwritten.

    Example:
        >>> import torch
        >>> from emerging_optimizers.megatron import merge_master, split_master
        >>> master = torch.tensor([1.0, 1.00390625, 3.14159274])
        >>> param, remainder = master.bfloat16(), torch.empty(3, dtype=torch.int16)
        >>> split_master(master, param, remainder)
        >>> remainder
        tensor([     0, -32768,   4059], dtype=torch.int16)
        >>> torch.equal(merge_master(param, remainder), master)
        True
    """
    master.nan_to_num_(nan=torch.nan, posinf=torch.inf, neginf=-torch.inf)
    bits = master.view(torch.int32)
    store(remainder, bits)
    store(param.view(torch.int16), torch.add(bits, 0x8000).bitwise_right_shift_(16))


def merge_master(param: Tensor, remainder: Tensor, master: Tensor | None = None) -> Tensor:
    """Return the float32 master that :func:`split_master` stored.

    Args:
        param: A bfloat16 tensor.
        remainder: An int16 tensor of its shape.
        master: A float32 tensor of its shape, to overwrite. None: a new one.
    """
    if master is None:
        master = torch.empty_like(param, dtype=torch.float32, requires_grad=False)
    # What the parameter has too much, where it was rounded up, is what makes a remainder negative.
    bits = master.view(torch.int32)
    store(bits, param.view(torch.int16))
    bits.mul_(0x10000).add_(remainder.to(torch.int32))
    return master


# ---- what all classes have in common -------------------------------------------------------------


class MegatronMixin(ScalarOptimizer):
    """What Megatron-Core expects of an optimizer, beside what ``torch.optim`` does.

    Its distributed optimizer gives each process a part of a flat buffer: the parameters are then
    views at any offset, which replace those that the optimizer was made with. Nothing is kept
    between steps, so parameters, gradients and states may be replaced, and moved, at any time.

    As in TransformerEngine, a group's ``step`` counts the steps of all its parameters, also of
    those that have no gradient or are on other processes. It goes up by 1 at each step that no
    ``found_inf`` skips, and may be set: to a number, or to None for the largest ``step`` of the
    parameters' states. It is an int or, where steps are counted on a device, a tensor there. The
    counters in states follow it; after a load, they are left out until the next step.

    A step makes the states of all parameters before it looks for gradients. So a master is the
    value that its parameter had at the optimizer's first step, whether there was a gradient or not.

    Args:
        params: Parameters, named parameters or parameter groups, as for any ``torch.optim``
            optimizer.
        *arguments: The rule's own.
        master_weights: Keep a float32 master of each bfloat16 or float16 parameter in its state,
            as ``master_param``; a float32 parameter is its own.
        master_weight_dtype: ``torch.float32``; others are refused.
        exp_avg_dtype: The dtype of ``exp_avg`` (and ``exp_avg_slow``): ``torch.float32``,
            ``torch.bfloat16`` or ``torch.float16``. Float16 states are not scaled. Others, such as
            ``torch.uint8`` for FP8, are refused.
        exp_avg_sq_dtype: That of ``exp_avg_sq``, likewise; of no effect where there is none.
        use_decoupled_grad: Gradients are ``param.decoupled_grad``, of any floating-point dtype,
            instead of ``param.grad``.
        store_param_remainders: ``master_param`` of a bfloat16 parameter is the int16 remainder that
            :func:`split_master` leaves. No effect without `master_weights`.
        set_grad_none: Deprecated: what ``zero_grad`` does without an argument.
        **options: The rule's own, and `maximize`, `fused` and `capturable` of
            :class:`~emerging_optimizers.scalar_optimizers.ScalarOptimizer`. ``capturable=True``
            also leaves it to the step to apply a ``GradScaler``'s numbers, as in TransformerEngine.

    Raises:
        ValueError: A dtype that is refused, named by its argument, or a hyperparameter out of
            range.
    """

    _makes_all_states = True
    _option_defaults: ClassVar = {
        **SHARED_DEFAULTS,
        "use_decoupled_grad": False,
        "store_param_remainders": False,
    }

    def __init__(
        self,
        params: ParamsT,
        *arguments: Any,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
        set_grad_none: bool | None = None,
        **options: Any,
    ) -> None:
        _check_dtype("master_weight_dtype", master_weight_dtype, (torch.float32,))
        _check_dtype("exp_avg_dtype", exp_avg_dtype, STATE_DTYPES)
        _check_dtype("exp_avg_sq_dtype", exp_avg_sq_dtype, STATE_DTYPES)
        read_optional_flag("set_grad_none", set_grad_none)
        rule_init: Any = super().__init__
        rule_init(
            params,
            *arguments,
            master_weights=master_weights,
            state_dtype={
                name: exp_avg_sq_dtype if name == "exp_avg_sq" else exp_avg_dtype
                for name in self._state_names
            },
            use_decoupled_grad=use_decoupled_grad,
            store_param_remainders=store_param_remainders,
            **options,
        )
        self.defaults["set_grad_none"] = set_grad_none
        if set_grad_none is not None:
            warnings.warn(
                f"{type(self).__name__}(set_grad_none=...) is deprecated: say"
                " zero_grad(set_to_none=...)",
                DeprecationWarning,
                stacklevel=3,
            )

    def _scales_in_step(self, group: dict[str, Any]) -> bool:
        return super()._scales_in_step(group) or group.get("capturable") is True

    # ---- states, one by one ----------------------------------------------------------------------

    def initialize_state(self, param: Tensor, store_param_remainders: bool | None = None) -> None:
        """Give a parameter new states.

        Args:
            param: One of the optimizer's.
            store_param_remainders: Whether its ``master_param`` is a remainder. None: what the
                optimizer was made with says; so must anything else.
        """
        group = self._group_of(param)
        is_remainder = _stores_remainder(group, param)
        if store_param_remainders not in (None, is_remainder):
            raise ValueError(
                f"{find_param(self, param)}: store_param_remainders={store_param_remainders}, but"
                f" this optimizer {'stores' if is_remainder else 'does not store'} the remainder of"
                " this parameter"
            )
        self.state.pop(param, None)
        self._init_state(group, param)

    def get_unscaled_state(
        self, param: Tensor, state_name: str, skip_unscale: bool = False
    ) -> Tensor:
        """Return a state as float32; counters, and remainders, as they are.

        Args:
            param: One of the optimizer's.
            state_name: The state's key.
            skip_unscale: Return it as it is stored.
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
        return value.float() if value.is_floating_point() and not skip_unscale else value

    @torch.no_grad()
    def set_scaled_state(self, param: Tensor, state_name: str, unscaled_state: Tensor) -> None:
        """Write a state, rounded to the dtype that it is stored in.

        Args:
            param: One of the optimizer's.
            state_name: The state's key. If the parameter has no such state yet, it gets those that
                it lacks.
            unscaled_state: What ``get_unscaled_state`` returned. A remainder may come as float32,
                too, but not a master where there is a remainder, or the other way round. What is no
                tensor is no state and left: Megatron-Core 0.16 passes whether there is padding.
        """
        if not isinstance(unscaled_state, Tensor):
            return
        state = self.state.get(param, {})
        if state_name not in state:
            state = self._init_state(self._group_of(param), param)
        if state_name not in state:
            raise KeyError(f"{type(self).__name__} has no state {state_name!r}")
        value: Tensor = state[state_name]
        if unscaled_state.shape != value.shape:
            raise ValueError(
                f"{find_param(self, param)}: {state_name!r} has shape"
                f" {tuple(unscaled_state.shape)}; expected {tuple(value.shape)}"
            )
        if value.dtype == torch.int16 and unscaled_state.is_floating_point():
            # Megatron's fully reshardable checkpoints hold all states as float32.
            as_integer = unscaled_state.to(torch.int16)
            is_exact = (as_integer.to(unscaled_state.dtype) == unscaled_state).all()
            if read(is_exact, 1):
                unscaled_state = as_integer
        try:
            check_master_dtype(value.dtype == torch.int16, unscaled_state)
        except TypeError as error:
            raise blame(error, find_param(self, param)) from None
        store(value, unscaled_state)

    def _init_group(self, group: dict[str, Any], skip_non_grad_params: bool = False) -> None:
        """Give a group's parameters the states that they lack."""
        for param in group["params"]:
            if not skip_non_grad_params or self._grad(group, param) is not None:
                self._init_state(group, param)

    def _group_of(self, param: Tensor) -> dict[str, Any]:
        for group in self.param_groups:
            if any(own is param for own in group["params"]):
                return group
        raise ValueError("the parameter is in none of the optimizer's groups")

    def _init_state(self, group: dict[str, Any], param: Tensor) -> dict[str, Any]:
        state = self.state[param]
        step = group.get("step")
        if is_absent(state.get("step")) and not _group_steps.is_on_device(step):
            state["step"] = 0 if is_absent(step) else step
        return super()._init_state(group, param)

    def _place_counter(
        self, group: dict[str, Any], param: Tensor, state: dict[str, Any], arguments: StepArguments
    ) -> None:
        _group_steps.place(group, param, state)

    def _init_master(self, group: dict[str, Any], param: Tensor) -> Tensor | None:
        if _stores_remainder(group, param):
            return torch.zeros_like(param, dtype=torch.int16, requires_grad=False)
        if group["master_weights"] and param.dtype == torch.float32:
            return param
        return super()._init_master(group, param)

    def _dtype_of(self, group: dict[str, Any], name: str, param: Tensor) -> torch.dtype | None:
        if name == MASTER and _stores_remainder(group, param):
            return torch.int16
        return super()._dtype_of(group, name, param)

    # ---- gradients -------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Remove the gradients, ``decoupled_grad`` where those are used, or fill them with zeros.

        Args:
            set_to_none: Remove them. None: as `set_grad_none` said, or else True.
        """
        set_grad_none = self.defaults.get("set_grad_none")
        if set_grad_none is not None:
            if set_to_none not in (None, set_grad_none):
                raise ValueError(
                    f"zero_grad(set_to_none={set_to_none}), but the optimizer was made with"
                    f" set_grad_none={set_grad_none}"
                )
            set_to_none = set_grad_none
        if set_to_none is None:
            set_to_none = True
        if not all(group["use_decoupled_grad"] for group in self.param_groups):
            super().zero_grad(set_to_none)
        for group in self.param_groups:
            if not group["use_decoupled_grad"]:
                continue
            for param, grad in zip(group["params"], self._grads(group), strict=True):
                if set_to_none:
                    param.decoupled_grad = None
                elif grad is not None:
                    grad.zero_()

    def _grad(self, group: dict[str, Any], param: Tensor) -> Tensor | None:
        if group["use_decoupled_grad"]:
            return getattr(param, "decoupled_grad", None)
        return super()._grad(group, param)

    # ---- the step --------------------------------------------------------------------------------

    def _step(self, grad_multiplier: float | Tensor | None) -> Tensor | None:
        before = [(group, group.get("step", _ABSENT)) for group in self.param_groups]
        try:
            _group_steps.read_steps(self, getattr(self, "found_inf", None))
            found_inf = super()._step(grad_multiplier)
        except Exception:
            for group, step in before:
                group["step"] = step
                if step is _ABSENT:
                    del group["step"]
            raise
        _group_steps.count(self, found_inf)
        return found_inf

    def _rules_of_one_call(self, groups: Sequence[dict[str, Any]]) -> list[GroupRule] | None:
        for group in groups:
            if group["use_decoupled_grad"] is not False:
                return None
        return super()._rules_of_one_call(groups)

    def _read_weight(self, group: dict[str, Any], param: Tensor) -> Tensor:
        remainder = self._master(group, param)
        if remainder is None or not _stores_remainder(group, param):
            return super()._read_weight(group, param)
        return merge_master(as_local(param), as_local(remainder))

    def _write_weight(
        self,
        group: dict[str, Any],
        param: Tensor,
        weight: Tensor,
        is_still: Tensor | None = None,
    ) -> None:
        remainder = self._master(group, param)
        if remainder is None or not _stores_remainder(group, param):
            return super()._write_weight(group, param, weight, is_still)
        halves = as_local(param), as_local(remainder)
        changed = tuple(map(torch.empty_like, halves))
        split_master(weight, *changed)
        for half, new in zip(halves, changed, strict=True):
            store(half, new if is_still is None else torch.where(is_still, half, new))

    # ---- saving and loading ----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the states, each with its ``step``, and the groups, each with its largest."""
        return super().state_dict()

    def _finish_state_dict(self, saved: dict[str, Any]) -> None:
        super()._finish_state_dict(saved)
        _group_steps.finish_state_dict(self, saved)
        for group, saved_group in zip(self.param_groups, saved["param_groups"], strict=True):
            for param, key in zip(group["params"], saved_group["params"], strict=True):
                state = saved["state"].get(key, {})
                if MASTER in state:
                    state[MASTER] = self.get_unscaled_state(param, MASTER, skip_unscale=True)

    def _settle_counts(self, group: dict[str, Any], states: list[dict[str, Any]]) -> None:
        begun = [state for state in states if is_begun(self, group, state)]
        step = group.pop("step", None)
        if is_absent(step):
            step = max((count_of(state) for state in begun), default=None)
        if step is None:
            return
        group["step"] = int(read(step, 1))
        for state in begun:
            # Megatron-Core copies what is in a state, and has no step to copy.
            state.pop("step", None)

    def _count_from_group(self, group: dict[str, Any]) -> None:
        pass

    def _needs_count(self, group: dict[str, Any]) -> bool:
        # Where there is no key, it is 0: Megatron-Core loads states that it has allocated only.
        return "step" in group and super()._needs_count(group)

    def _is_begun(self, group: dict[str, Any]) -> bool:
        # Before the first step, Megatron-Core gives parameters an exp_avg and an exp_avg_sq.
        step = group.get("step", 0)
        return isinstance(step, Tensor) or step != 0

    def _settle_state(self, group: dict[str, Any], param: Tensor, state: dict[str, Any]) -> None:
        super()._settle_state(group, param, state)
        if group["master_weights"] and param.dtype == torch.float32:
            state[MASTER] = param


_ABSENT = object()


def _check_dtype(name: str, dtype: torch.dtype, supported: Sequence[torch.dtype]) -> None:
    if dtype not in supported:
        raise ValueError(
            f"{name}={dtype} is not supported; expected {' or '.join(map(str, supported))}"
        )


def _stores_remainder(group: dict[str, Any], param: Tensor) -> bool:
    is_wanted = group["master_weights"] and group["store_param_remainders"]
    return bool(is_wanted) and param.dtype == torch.bfloat16


# ---- the classes ---------------------------------------------------------------------------------


class FusedAdam(MegatronMixin, rules.Adam):
    """Adam with the arguments of TransformerEngine's ``FusedAdam``; on any device.

    Differences from it: states have no scales, so FP8 states and float16 masters are refused, and
    float16 averages are stored as they are. Each parameter has a counter ``step`` in its state,
    which its ``load_state_dict`` does not know: what is saved here has to lose it first. What it
    saved loads here.

    Args:
        params: Parameters, named parameters or parameter groups.
        lr: Learning rate.
        betas: Decay rates of the averages of the gradient and of its square, each in [0, 1).
        eps: Added to the denominator; not negative.
        weight_decay: Strength of the weight decay.
        amsgrad: Refused.
        bias_correction: Divide averages by what a constant 1 would have brought them to by now.
        adam_w_mode: Decoupled weight decay. False: decay is added to the gradient.
        capturable: Keep counters and the learning rates, as tensors, on the parameters' devices,
            where CUDA graphs can capture a step.
        master_weights: Keep float32 masters; this and the following as in :class:`MegatronMixin`.
        master_weight_dtype: The masters' dtype.
        exp_avg_dtype: The dtype of ``exp_avg``.
        exp_avg_sq_dtype: The dtype of ``exp_avg_sq``.
        use_decoupled_grad: Read ``param.decoupled_grad``.
        store_param_remainders: Store 16 bits of each bfloat16 parameter's master.
        set_grad_none: Deprecated.

    Raises:
        ValueError: A dtype that is refused, `amsgrad`, or a hyperparameter out of range.

    Example:
        >>> import torch
        >>> from emerging_optimizers.megatron import FusedAdam
        >>> weight = torch.tensor([1.0, -2.0], dtype=torch.bfloat16)
        >>> optimizer = FusedAdam([weight], lr=0.1, master_weights=True, use_decoupled_grad=True)
        >>> weight.decoupled_grad = torch.tensor([2.0, -4.0])  # float32
        >>> optimizer.step()
        >>> weight
        tensor([ 0.8984, -1.8984], dtype=torch.bfloat16)
        >>> optimizer.get_unscaled_state(weight, "master_param")
        tensor([ 0.9000, -1.9000])
        >>> optimizer.param_groups[0]["step"]
        1

    Reference:
        Kingma and Ba, "Adam: A Method for Stochastic Optimization",
        https://arxiv.org/abs/1412.6980; Loshchilov and Hutter, "Decoupled Weight Decay
        Regularization", https://arxiv.org/abs/1711.05101.
    """

    _renamed: ClassVar = {**rules.Adam._renamed, "correct_bias": "bias_correction"}
    _option_defaults: ClassVar = {**MegatronMixin._option_defaults, "bias_correction": True}

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
        set_grad_none: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            bias_correction=bias_correction,
            weight_decay_method="decoupled" if read_flag("adam_w_mode", adam_w_mode) else "l2",
            capturable=capturable,
            master_weights=master_weights,
            master_weight_dtype=master_weight_dtype,
            exp_avg_dtype=exp_avg_dtype,
            exp_avg_sq_dtype=exp_avg_sq_dtype,
            use_decoupled_grad=use_decoupled_grad,
            store_param_remainders=store_param_remainders,
            set_grad_none=set_grad_none,
        )
        # Their name for it is TransformerEngine's alone.
        for group in (self.defaults, *self.param_groups):
            del group["correct_bias"]
        for group in self.param_groups:
            if group["capturable"] and group["params"]:
                device = group["params"][0].device
                group["lr"] = torch.full(
                    (), read(group["lr"], HYPERPARAMETER), dtype=torch.float32, device=device
                )


class AdEMAMix(MegatronMixin, rules.AdEMAMix):
    """:class:`~emerging_optimizers.scalar_optimizers.AdEMAMix` for Megatron.

    Its fast average is the state ``exp_avg``, which Megatron looks for. For the arguments that are
    common to all, see :class:`MegatronMixin`.

    Example:
        >>> import torch
        >>> from emerging_optimizers.megatron import AdEMAMix
        >>> weight = torch.tensor([1.0, -2.0])
        >>> optimizer = AdEMAMix([weight], lr=0.1, use_decoupled_grad=True)
        >>> weight.decoupled_grad = 2 * weight
        >>> optimizer.step()
        >>> sorted(optimizer.state[weight])
        ['exp_avg', 'exp_avg_slow', 'exp_avg_sq', 'step']
    """

    _state_names = ("exp_avg", *rules.AdEMAMix._state_names[1:])


class LaProp(MegatronMixin, rules.LaProp):
    """:class:`~emerging_optimizers.scalar_optimizers.LaProp`, as :class:`MegatronMixin` says."""

    def _parts(
        self, params: Sequence[tuple[dict[str, Any], Tensor]]
    ) -> list[Sequence[tuple[dict[str, Any], Tensor]]]:
        if any(_stores_remainder(*pair) for pair in params):
            return [[pair] for pair in params]
        return super()._parts(params)


class Lion(MegatronMixin, rules.Lion):
    """:class:`~emerging_optimizers.scalar_optimizers.Lion`, as :class:`MegatronMixin` says."""


class Signum(MegatronMixin, rules.Signum):
    """:class:`~emerging_optimizers.scalar_optimizers.Signum`, as :class:`MegatronMixin` says."""


class SimplifiedAdEMAMix(MegatronMixin, rules.SimplifiedAdEMAMix):
    """The class of that name in ``scalar_optimizers``, as :class:`MegatronMixin` says."""
