"""An optimizer's step: one native call for all groups, and the fallback for what remains."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor

from . import _fallback_step
from ._base import (
    BaseOptimizer,
    StepCall,
    StepScalars,
    check_tensors,
    grads_of,
    hook_of,
    members_of,
)
from ._clipping import clip_for_step
from ._counters import split_counters
from ._dtensor import is_dtensor, whole
from ._fallback_step import placed_like
from ._groups import check_flags, check_group, check_state_dtypes
from ._hooks import after_update, before_update
from ._hyperparameters import read_number
from ._members import Member, param_name
from ._native import native
from ._rounding import draw_seed
from ._states import lay_out_alike, prepare, settle_master
from ._step_overlap import Place, check_overlap, find_followers
from ._values import HYPERPARAMETER, have_values, is_fake, is_tracing, read
from ._weights import HALF, has_master

_is_cuda_in_use = torch.cuda.is_initialized  # every step asks: without looking up modules

# By the index of a group, the indices of its parameters that are left to the fallback. Their states
# are complete.
Left: TypeAlias = dict[int, Collection[int]]


def run_step(
    optimizer: BaseOptimizer,
    grad_multiplier: float | Tensor | None,
    max_norm: float | None = None,
) -> Tensor | None:
    """Update the parameters of all groups.

    Args:
        optimizer: The optimizer.
        grad_multiplier: Every gradient is multiplied by it.
        max_norm: The largest norm of the gradients that result, if they are to be clipped.

    Returns:
        The ``found_inf`` of a ``GradScaler``, if there is one: if it is not 0, nothing has changed.
    """
    # `is None` first: `isinstance` is a call.
    if grad_multiplier is not None:
        grad_multiplier = _read_multiplier(grad_multiplier)
    if max_norm is not None:
        return _run_clipped_step(optimizer, grad_multiplier, max_norm)
    is_captured = _is_cuda_in_use() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]
    if is_captured:
        _check_capturable(optimizer)
    # A GradScaler sets these for the duration of the call.
    grad_scale = getattr(optimizer, "grad_scale", None)
    found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
    if grad_scale is not None:
        grad_scale = whole(grad_scale)
    if found_inf is not None:
        if isinstance(found_inf, Tensor):
            found_inf = whole(found_inf)
            if not found_inf.is_cuda and read(found_inf, 0.0) != 0.0:
                return found_inf
        else:
            found_inf = None  # a GradScaler without gradients passes the sum of no tensors, 0
    groups = list(optimizer.param_groups)
    positions, rules = [], []
    num_params = 0
    draws = has_state_dtypes = False
    are_rates_floats = True
    is_one_call = native is not None
    for group in groups:
        rule = optimizer._rule_of(group)
        fused = group["fused"]
        if rule[0] is None and fused is not False:  # `rule.native`, faster
            rule = optimizer._build_rule(group)
        if rule[0] is None or (fused is not None and fused is not True):
            is_one_call = False
        if group["stochastic_rounding"] is not False:
            draws = True
        if group["state_dtype"] is not None:
            has_state_dtypes = True
        if type(group["lr"]) is not float:
            are_rates_floats = False
        rules.append(rule)
        positions.append(num_params)
        num_params += len(group["params"])
    for flag in optimizer._slow_flags:
        for group in groups:
            if group[flag] is not False:
                is_one_call = False
    if not are_rates_floats:
        # DTensors are gathered here, by all processes: what remains may differ between them.
        groups = [{**g, "lr": whole(g["lr"])} if is_dtensor(g["lr"]) else g for g in groups]
    if has_state_dtypes:
        check_state_dtypes(optimizer, groups)  # no native step reads them
    seed = 0 if not draws else _draw_seed(optimizer, groups)
    scalars = (grad_multiplier, grad_scale, found_inf, seed)
    has_values = (
        are_rates_floats and grad_multiplier is None and grad_scale is None and found_inf is None
    ) or have_values((*(group["lr"] for group in groups), *scalars))
    found: Any = None
    if is_one_call and has_values and optimizer.state:
        assert native is not None
        # Called here, for the functions below take as long as five small parameters. If any
        # parameters remain, nothing is done.
        try:
            found = native.step(optimizer.state, groups, positions, rules, scalars, None, False)
        except (TypeError, ValueError) as error:
            _explain(optimizer, error)
        if found is None:
            return found_inf
    call = StepCall(optimizer, groups, positions, StepScalars(*scalars))
    with torch.no_grad():
        if not has_values:
            left = _prepare_all(call)
        elif is_one_call:
            left = _step_rest(call, found)
        else:
            left = _step_by_group(call)
        for i, indices in sorted(left.items()):
            if is_captured:
                _check_captured(optimizer, groups[i], indices)
            communicates = _communicates(optimizer, groups[i])
            _fallback_step.update_group(call, i, indices, communicates)
    return found_inf


def _run_clipped_step(
    optimizer: BaseOptimizer, grad_multiplier: float | Tensor | None, max_norm: float
) -> Tensor | None:
    # Before the step is checked or skipped: other processes wait for this one's part of the norm.
    norm, multiplier = clip_for_step(optimizer, max_norm, grad_multiplier)
    found_inf = run_step(optimizer, multiplier)
    optimizer.grad_norm = norm
    return found_inf


def _read_multiplier(grad_multiplier: Any) -> Any:
    if not isinstance(grad_multiplier, Tensor):
        return read_number("grad_multiplier", grad_multiplier)
    if grad_multiplier.numel() != 1:
        raise ValueError("Tensor grad_multiplier must be 1-element")
    return whole(grad_multiplier)


def _check_capturable(optimizer: BaseOptimizer) -> None:
    for i, group in enumerate(optimizer.param_groups):
        if not group["capturable"]:
            raise RuntimeError(
                "a CUDA graph cannot capture a step that is counted on the host: set"
                f" capturable=True (param_groups[{i}] has False)"
            )


def _check_captured(
    optimizer: BaseOptimizer, group: dict[str, Any], indices: Collection[int]
) -> None:
    """Raise if a captured step would run in PyTorch operations, which read the device's numbers."""
    for k in indices:
        p = group["params"][k]
        if p.is_cuda:
            raise RuntimeError(
                f"a CUDA graph cannot capture the step of {param_name(optimizer, group, k)}, which"
                f" has no native step; for a rule in Python, call its compile('{p.device}') before"
            )


def _draw_seed(optimizer: BaseOptimizer, groups: Sequence[dict[str, Any]]) -> int:
    for i, group in enumerate(groups):
        check_flags(optimizer, group, f"param_groups[{i}]")  # before a seed is drawn
    return draw_seed() if any(group["stochastic_rounding"] for group in groups) else 0


def has_native_step(optimizer: BaseOptimizer, group: dict[str, Any]) -> bool:
    """Return whether a group's parameters can have a native step."""
    if native is None or optimizer._rule_of(group).native is None:
        return False
    if group["fused"] is not None and not group["fused"]:
        return False
    if hook_of(optimizer, group) is None:
        return True
    # A hook modifies weights after the update; 16-bit weights would be rounded twice.
    return all(has_master(group, p) or p.dtype not in HALF for p in group["params"])


def _has_to_be_native(optimizer: BaseOptimizer, group: dict[str, Any]) -> bool:
    return bool(group["fused"]) or not optimizer._rule_of(group).rule.has_formula


def _communicates(optimizer: BaseOptimizer, group: dict[str, Any]) -> bool:
    """Return whether processes communicate for parameters without a gradient, too."""
    return hook_of(optimizer, group) is not None and not has_native_step(optimizer, group)


# ---- when one native call is not enough ----------------------------------------------------------


def _prepare_all(call: StepCall) -> Left:
    """Leave all parameters to the fallback, which needs no values."""
    _check_groups(call.optimizer)
    return {i: prepare(call, i) for i in range(len(call.groups))}


def _step_by_group(call: StepCall) -> Left:
    """Update the groups that have a native step by one native call."""
    optimizer, groups, positions, _ = call
    for i, group in enumerate(groups):
        check_flags(optimizer, group, f"param_groups[{i}]")  # first: they decide what follows
    chosen = []
    left: Left = {}
    are_native = [has_native_step(optimizer, group) for group in groups]
    if not all(are_native):
        _check_groups(optimizer)
        split_counters(optimizer.state.values(), optimizer._all_scalar_names)
    kept = _before_native(call, are_native)
    for i, group in enumerate(groups):
        if are_native[i]:
            chosen.append(i)
            continue
        indices = prepare(call, i)
        if indices and _has_to_be_native(optimizer, group):
            _raise_no_native_step(optimizer, group, indices)
        if indices or _communicates(optimizer, group):
            left[i] = indices
    followers = _settle_order(call, left)
    if chosen:
        all_grads = {i: grads_of(optimizer, groups[i]) for i in chosen}
        for i, k in followers:
            all_grads[i][k] = None  # not to be updated natively
        native_call = call._replace(
            groups=[groups[i] for i in chosen], positions=[positions[i] for i in chosen]
        )
        grads = list(all_grads.values())
        found = _call_native(native_call, grads, may_leave=False)
        if found is not None:
            more = _step_rest(native_call, found, grads)
            left.update((chosen[k], indices) for k, indices in more.items())
        for i, k in followers:
            left[i] = sorted({*left.get(i, ()), k})
    _after_native(call, kept, left)
    return left


def _settle_order(call: StepCall, left: Mapping[int, Collection[int]]) -> set[Place]:
    """Check which tensors share memory, if the fallback updates some of the parameters.

    Returns:
        Further parameters that the fallback must update, after those. Their states are complete.
    """
    if not any(left.values()):
        return set()  # the native step does it
    optimizer, groups = call.optimizer, call.groups
    followers = find_followers(check_overlap(optimizer, groups), left)
    for i, k in followers:
        if _has_to_be_native(optimizer, groups[i]):
            _raise_no_native_step(optimizer, groups[i], [k])
        prepare(call, i, [k])
    return followers


def _step_rest(
    call: StepCall,
    found: Sequence[Collection[int]] | None,
    grads: list[list[Tensor | None]] | None = None,
) -> Left:
    """Complete states, place gradients as their parameters are, and call the native step.

    Args:
        call: The call of ``step``, with the groups that have a native step.
        found: For each group, the indices of parameters that an earlier native call, which did
            nothing, could not update. None: there was no call, and all may need it.
        grads: The parameters' gradients, if not all groups' and parameters' own.
    """
    optimizer, groups = call.optimizer, call.groups
    if found is None:
        _check_groups(optimizer)
        found = [range(len(group["params"])) for group in groups]
    params = (g["params"][i] for g, indices in zip(groups, found, strict=True) for i in indices)
    if is_tracing() or any(map(is_fake, params)):
        return _prepare_all(call)
    split_counters(optimizer.state.values(), optimizer._all_scalar_names)
    ready = [prepare(call, i, indices) for i, indices in enumerate(found)]
    if grads is None:
        grads = [grads_of(optimizer, group) for group in groups]
    for group, indices, group_grads in zip(groups, ready, grads, strict=True):
        for k in indices:
            group_grads[k] = placed_like(group_grads[k], group["params"][k])
    # The native step knows only of fused=True.
    required = [{**g, "fused": True} if _has_to_be_native(optimizer, g) else g for g in groups]
    still = _call_native(call._replace(groups=required), grads, may_leave=True)
    left = {i: indices for i, indices in enumerate(still or ()) if indices}
    first = next((i for i in left if _has_to_be_native(optimizer, groups[i])), None)
    if first is not None:  # nothing was done
        # Without a formula, states in another layout than their parameter's have no other step.
        members = (
            member
            for group, indices in zip(groups, ready, strict=True)
            if not optimizer._rule_of(group).rule.has_formula
            for member in members_of(optimizer, group, indices)
        )
        if optimizer._rule_of(groups[first]).rule.build_missing() or lay_out_alike(members):
            return _step_rest(call, found, grads)
        _raise_no_native_step(optimizer, groups[first], left[first])
    return left


def _call_native(call: StepCall, grads: list[list[Tensor | None]], may_leave: bool) -> Any:
    optimizer, groups, positions, scalars = call
    assert native is not None
    rules = [optimizer._rule_of(group) for group in groups]
    try:
        return native.step(optimizer.state, groups, positions, rules, scalars, grads, may_leave)
    except (TypeError, ValueError) as error:
        _explain(optimizer, error)


def _check_groups(optimizer: BaseOptimizer) -> None:
    for i, group in enumerate(optimizer.param_groups):
        check_group(optimizer, group, f"param_groups[{i}]")


def _explain(optimizer: BaseOptimizer, error: Exception) -> NoReturn:
    """Raise the native step's error, with the parameter's or the group's name if it is found."""
    try:
        for i, group in enumerate(optimizer.param_groups):
            check_group(optimizer, group, f"param_groups[{i}]")
            check_tensors(optimizer, group)
        check_overlap(optimizer, optimizer.param_groups)
    except (TypeError, ValueError, RuntimeError) as explained:
        raise explained from None
    raise error


def _raise_no_native_step(
    optimizer: BaseOptimizer, group: dict[str, Any], indices: Collection[int]
) -> NoReturn:
    name, rule = param_name(optimizer, group, min(indices)), optimizer._rule_of(group).rule
    if not rule.has_formula:
        raise RuntimeError(
            f"{type(optimizer).__name__} has no native step for {name}, and its rule {rule.name},"
            " which is written in C++, has no formula in PyTorch operations: use parameters on the"
            " CPU, without gaps in memory"
        )
    if _is_cuda_in_use() and torch.cuda.is_current_stream_capturing():  # type: ignore[no-untyped-call]
        _check_captured(optimizer, group, indices)
    raise RuntimeError(
        f"fused=True, but {type(optimizer).__name__} has no native step for {name}; fused=None"
        " uses PyTorch operations there"
    )


# ---- hooks ---------------------------------------------------------------------------------------

_Kept: TypeAlias = list[tuple[int, Member, Any]]


def _before_native(call: StepCall, are_native: Sequence[bool]) -> _Kept:
    """Call the hook before a native call; return what `_after_native` needs."""
    optimizer = call.optimizer
    hook = optimizer._hook
    found: list[tuple[int, Member]] = []
    if hook is None:
        return []
    for i, group in enumerate(call.groups):
        # With lr = 0, not even a product with 1 may touch a parameter: it could change a NaN.
        if are_native[i] and hook_of(optimizer, group) and not _is_zero(group["lr"]):
            for member in members_of(optimizer, group):
                if member.grad is not None or hook.joins(member.param):
                    settle_master(member)
                    found.append((i, member))
    kept = before_update(hook, [member for _, member in found])
    return [(i, member, item) for (i, member), item in zip(found, kept, strict=True)]


def _after_native(call: StepCall, kept: _Kept, left: Left) -> None:
    """Call the hook for what was updated natively."""
    optimizer = call.optimizer
    done = [(m, item) for i, m, item in kept if m.param_index not in left.get(i, ())]
    if done and optimizer._hook is not None:
        # The step may have created a state.
        states = optimizer.state
        members = [m if m.state else m._replace(state=states.get(m.param, {})) for m, _ in done]
        after_update(optimizer._hook, members, [item for _, item in done])


def _is_zero(lr: Any) -> bool:
    """Return whether a learning rate is 0, and known to the host."""
    return not (isinstance(lr, Tensor) and lr.is_cuda) and read(lr, HYPERPARAMETER) == 0.0
