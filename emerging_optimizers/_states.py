"""A parameter and its state: creating it, its dtypes, and checks."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from . import _checks
from ._base import BaseOptimizer, StepCall, check_tensors, members_of
from ._coded_states import (
    check_groups,
    code_in,
    is_coded,
    is_to_be_coded,
    new_codes,
    option_of,
    wide_dtype,
)
from ._codes import scale_key, scale_shape
from ._counters import (
    check_complete,
    check_count,
    is_absent,
    is_number,
    new_counter,
    place_scalars,
    set_counter,
)
from ._dtensor import is_dtensor
from ._groups import find_unknown_numbers, scales_by_shape
from ._members import Member, blame
from ._overlap import overlaps_itself, span_of
from ._rule import refuse_trace
from ._scalar_states import as_float32, check_scalar
from ._values import PLAIN_TYPES, check_has_value, has_value, is_tracing, read
from ._weights import (
    MASTER,
    check_master_dtype,
    convert_master,
    has_master,
    local_shard,
    master_of,
)

_SPARSE = (
    torch.sparse_coo,
    torch.sparse_csr,
    torch.sparse_csc,
    torch.sparse_bsr,
    torch.sparse_bsc,
)


# ---- creation ------------------------------------------------------------------------------------


def dtype_of(
    optimizer: BaseOptimizer, group: dict[str, Any], name: str, param: Tensor
) -> torch.dtype | None:
    """Return the dtype that a new state gets if it is not coded; None for the parameter's."""
    return wide_dtype(option_of(group, name), param)


def complete(optimizer: BaseOptimizer, member: Member) -> Member:
    """Create a parameter's missing states, in the optimizer.

    Returns:
        The parameter with its state: that of the optimizer, if it has one by now.
    """
    group, param, rule = member.group, member.param, member.rule
    state: dict[str, Any] = optimizer.state.get(param) or member.state
    step = state.get("step")
    if not isinstance(step, Tensor):
        device = param.device if group["capturable"] else torch.device("cpu")
        count: Any = optimizer._counters.start(group) if is_absent(step) else step
        check_count("state 'step'", count)
        set_counter(state, new_counter(read(count, 0.0), device))
    for name in rule.state_names:
        if is_absent(state.get(name)):
            if is_to_be_coded(optimizer, group, name, param):
                state[name], state[scale_key(name)] = new_codes(param)
                continue
            dtype = dtype_of(optimizer, group, name, param)
            state[name] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
    for name, first in rule.rule.scalar_states.items():
        if not isinstance(state.get(name), Tensor):
            number = first if is_absent(state.get(name)) else state[name]
            check_scalar(name, number)
            state[name] = new_counter(as_float32(number), state["step"].device)
    if is_absent(state.get(MASTER)):
        state.pop(MASTER, None)
        master = optimizer._new_master(group, param)
        if master is not None:
            state[MASTER] = master
    state = optimizer.state[param] = optimizer._as_stored(state)
    return member if state is member.state else member._replace(state=state)


def operands_of(member: Member) -> dict[str, Any]:
    """Return the part of a parameter's state that its step reads or modifies."""
    names = member.rule.state_names
    scales = [scale_key(name) for name in names if is_coded(member.state, name)]
    keys = ["step", *member.rule.scalar_names, *names, *scales]
    if has_master(member.group, member.param):
        keys.append(MASTER)
    return {key: member.state[key] for key in keys if key in member.state}


def lay_out_alike(members: Iterable[Member]) -> bool:
    """Replace states that lie in memory in another order than their parameter by copies.

    Returns:
        Whether any was replaced. None is for a parameter with gaps, which no copy is like.
    """
    is_changed = False
    for member in members:
        param = member.param
        for name, state in operands_of(member).items():
            has_no_layout = is_number(member.rule, name) or state.shape != param.shape
            if has_no_layout or _lies_like(state, param):
                continue
            copied = torch.empty_like(param, dtype=state.dtype, memory_format=torch.preserve_format)
            if _lies_like(copied, param):
                member.state[name] = copied.copy_(state)
                is_changed = True
    return is_changed


def _lies_like(tensor: Tensor, param: Tensor) -> bool:
    local, other = local_shard(tensor), local_shard(param)
    both_are_contiguous = local.is_contiguous() and other.is_contiguous()
    return both_are_contiguous or local.stride() == other.stride()


# ---- checks --------------------------------------------------------------------------------------


def check_param(member: Member, must_be_matrix: bool) -> None:
    """Raise for a parameter or a gradient that a step cannot use."""
    param, grad = member.param, member.grad
    assert grad is not None
    if not (_is_ordinary(param, param) and _is_ordinary(grad, param)):
        _check_param(member, grad)
    if must_be_matrix and param.dim() != 2:
        raise ValueError(
            f"use_shape_scaling needs 2-D parameters; this one has shape {tuple(param.shape)}"
        )


def _is_ordinary(tensor: Any, param: Tensor) -> bool:
    """Return whether a tensor obviously fits an ordinary parameter, so that no check is needed."""
    return (
        span_of(tensor) is not None
        and tensor.is_floating_point()
        and tensor.shape == param.shape
        and tensor.device == param.device
        and not tensor.is_inference()
    )


def _check_param(member: Member, grad: Tensor) -> None:
    param = member.param
    _check_layout("the parameter", param)
    if grad.layout in _SPARSE:
        raise RuntimeError(
            f"{type(member.optimizer).__name__} does not support sparse gradients, and its gradient"
            f" has layout {grad.layout}; make it dense (.to_dense()), or use"
            " torch.optim.SparseAdam"
        )
    _check_layout("its gradient", grad)
    if grad.shape != param.shape:
        # `param.data` can do that: autograd checks only what is assigned to `.grad`.
        raise RuntimeError(
            f"the parameter has shape {tuple(param.shape)} but its gradient has shape"
            f" {tuple(grad.shape)}"
        )
    if not param.is_floating_point() and not param.is_complex():
        raise TypeError(f"the parameter has dtype {param.dtype}, which cannot be optimized")
    _check_beside("its gradient", grad, param)
    _check_memory("its gradient", grad)
    _check_modified("the parameter", param)


def settle_state(member: Member) -> None:
    """Raise for a state that does not fit its parameter; convert a loaded master."""
    state, param = member.state, member.param
    may_be_ordinary = type(param) in PLAIN_TYPES and param.is_floating_point()
    for name in member.rule.state_names:
        if not (may_be_ordinary and _is_ordinary(state.get(name), param)):
            check_tensor(member, name)
    if master_of(member) is not None:
        check_tensor(member, MASTER)
        convert_master(member)
    step = state["step"]
    if not is_tracing():
        check_has_value("state 'step'", step, param)
    check_count("state 'step'", step)
    _check_modified("state 'step'", step)
    for name in member.rule.scalar_names:
        check_scalar_state(member, name)


def check_scalar_state(member: Member, name: str) -> None:
    """Raise for a scalar state that is no number, or cannot be modified."""
    value = member.state[name]
    if not is_tracing():
        check_has_value(f"state {name!r}", value, member.param)
    check_scalar(name, value)
    if isinstance(value, Tensor):
        _check_modified(f"state {name!r}", value)


def settle_master(member: Member) -> None:
    """Raise for a master that does not fit its parameter; convert a loaded one."""
    if master_of(member) is not None:
        try:
            check_tensor(member, MASTER)
            convert_master(member)
        except (TypeError, ValueError, RuntimeError) as error:
            raise blame(error, member.name) from None


def check_tensor(member: Member, name: str, is_loaded: bool = False) -> None:
    """Raise for one of a parameter's states that does not fit it."""
    value, param = member.state.get(name), member.param
    if not isinstance(value, Tensor):
        raise TypeError(f"state {name!r} must be a Tensor, not {type(value).__name__}")
    if value.shape != param.shape:
        raise ValueError(
            f"state {name!r} has shape {tuple(value.shape)} but the parameter has shape"
            f" {tuple(param.shape)}"
        )
    as_stored = None
    if is_coded(member.state, name):
        as_stored = torch.uint8
        _check_scales(member, name, is_loaded)
    if name == MASTER:
        check_master_dtype(value, param)
        as_stored = value.dtype
    _check_beside(f"state {name!r}", value, param, as_stored, is_loaded)
    if not _is_placed_like(value, param):
        raise ValueError(f"state {name!r} is not placed as the parameter is")
    _check_modified(f"state {name!r}", value)


def _check_scales(member: Member, name: str, is_loaded: bool) -> None:
    """Raise for a coded state without the scales that it needs."""
    key, codes, param = scale_key(name), member.state[name], member.param
    if code_in(member.rule, name) is None:
        raise TypeError(
            f"state {name!r} has dtype {codes.dtype}, but {member.rule.rule.name} does not allow"
            " 8-bit codes for it"
        )
    scales = member.state.get(key)
    if not isinstance(scales, Tensor) or scales.dtype != torch.uint8:
        found = f"dtype {scales.dtype}" if isinstance(scales, Tensor) else type(scales).__name__
        raise TypeError(
            f"state {name!r} has dtype torch.uint8, so {key!r} must be a Tensor of that dtype, not"
            f" {found}"
        )
    if scales.shape != scale_shape(param.shape):
        raise ValueError(
            f"state {key!r} has shape {tuple(scales.shape)}; expected {scale_shape(param.shape)}"
        )
    _check_beside(f"state {key!r}", scales, param, torch.uint8, is_loaded)
    if not _is_placed_like(scales, param):
        raise ValueError(f"state {key!r} is not placed as the parameter is")
    _check_modified(f"state {key!r}", scales)
    check_groups(codes)


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
    """Raise for a tensor that does not fit a parameter of the same shape."""
    is_number = tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == as_stored
    if not is_number or tensor.is_complex() != param.is_complex():
        raise TypeError(
            f"the parameter has dtype {param.dtype} but {name} has dtype {tensor.dtype}"
        )
    _check_layout(name, tensor)
    # Loaded tensors are moved to the device; but a meta tensor has no values to move.
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
    if _checks.has_no_memory(local_shard(tensor)):
        raise ValueError(f"{name} has no memory: its storage was resized to 0")


def _check_modified(name: str, tensor: Tensor) -> None:
    """Raise for a tensor that cannot be modified in place."""
    _check_memory(name, tensor)
    if tensor.is_conj():
        raise RuntimeError(f"{name} is a lazily conjugated view; pass resolve_conj() of it")
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{name} is an inference tensor, which cannot be modified outside of inference mode"
        )
    local = local_shard(tensor)
    if not local.is_contiguous() and overlaps_itself(local) is not False:
        raise ValueError(
            f"{name} overlaps itself in memory (an expanded tensor, with shape"
            f" {tuple(tensor.shape)} and strides {tensor.stride()})"
        )


def _is_placed_like(tensor: Any, param: Any) -> bool:
    if not is_dtensor(param):
        return True
    return bool(tensor.device_mesh == param.device_mesh and tensor.placements == param.placements)


# ---- both ----------------------------------------------------------------------------------------


def prepare(call: StepCall, i: int, indices: Iterable[int] | None = None) -> list[int]:
    """Check parameters of a group, and complete their states.

    Returns:
        The indices of those that have a gradient.
    """
    refuse_trace("an optimizer's step")
    optimizer, group, counters = call.optimizer, call.groups[i], call.optimizer._counters
    check_tensors(optimizer, group)
    members = members_of(optimizer, group, indices)
    with_grad = [member for member in members if member.grad is not None]
    if is_tracing():
        for member in with_grad:
            member.param.detach()  # raises if the tracer takes no real tensors
    rule = optimizer._rule_of(group)
    numbers = zip(call.scalars._fields, call.scalars, strict=True)
    unknown = [*find_unknown_numbers(group, rule), *(n for n in numbers if not has_value(n[1]))]
    must_be_matrices = scales_by_shape(group, rule)
    for member in with_grad:
        try:
            check_param(member, must_be_matrices)
            for name, value in unknown:
                check_has_value(name, value, member.param)
        except (TypeError, ValueError, RuntimeError) as error:
            raise blame(error, member.name) from None
    if not optimizer._makes_all_states:
        members = with_grad
    if counters.may_have_begun(group):
        is_counter_needed = counters.is_needed(group, rule)
        for member in members:
            if member.state:
                check_complete(member, is_counter_needed)
    counters.take_group_step(optimizer, members)
    for member in members:
        is_new = not member.state
        try:
            member = complete(optimizer, member)
            if not is_new:
                settle_state(member)
        except (TypeError, ValueError, RuntimeError) as error:
            raise blame(error, member.name) from None
        counters.place(member, call.scalars.found_inf)
        place_scalars(member)
    return [member.param_index for member in with_grad]
