"""An optimizer's step in PyTorch operations, parameter by parameter."""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._base import BaseOptimizer, StepCall, StepScalars, hook_of, members_of
from ._coded_states import decoded, is_any_coded, is_coded, noise_of, set_coded
from ._dtensor import increment_versions, is_dtensor
from ._groups import SHAPE_SCALING, read_hyperparameters, scales_by_shape
from ._hooks import WeightHook, after_update, before_update
from ._members import Member
from ._rounding import element_indices, random_bits, round_stochastically, rounding_key, store
from ._rule import shape_scale
from ._sharding import ShardPlace, shard_place
from ._values import HYPERPARAMETER, read
from ._weights import HALF, as_local, read_weight, write_weight

# The fraction of a weight that weight decay removes.
_LOST: dict[str, Callable[[float, float], float]] = {
    "decoupled": lambda lr, weight_decay: lr * weight_decay,
    "independent": lambda lr, weight_decay: weight_decay,
    "palm": lambda lr, weight_decay: lr * lr * weight_decay,
    "l2": lambda lr, weight_decay: 0.0,
}


class _GroupConstants(NamedTuple):
    """What is the same for all parameters of a group.

    Attributes:
        hyperparameters: The arguments of the rule's formula, except tensors and ``step``.
        has_step: Whether the formula takes ``step``, too.
        scales_by_shape: Whether the update of a matrix is scaled by its shape.
        lr: The learning rate.
        grad_factor: Gradients are multiplied by it.
        l2: The strength of weight decay that is added to gradients.
        lost: The fraction of weights that weight decay removes.
        seed: The seed of stochastic rounding; None without it.
        hook: The hook around the update of weights.
    """

    hyperparameters: dict[str, Any]
    has_step: bool
    scales_by_shape: bool
    lr: float
    grad_factor: float
    l2: float
    lost: float
    seed: int | None
    hook: WeightHook | None


def update_group(
    call: StepCall, i: int, indices: Collection[int], communicates: bool = False
) -> None:
    """Update parameters of a group.

    Numbers on a device are read, including counters, so that no CUDA graph can capture this. The
    caller disables autograd.

    Args:
        call: The call of ``step``.
        i: The group's index.
        indices: The indices of the parameters, which have gradients and complete states.
        communicates: Whether processes communicate for the group's other parameters, too.
    """
    optimizer, groups, positions, scalars = call
    if scalars.found_inf is not None and read(scalars.found_inf, 0.0) != 0.0:
        return
    group = groups[i]
    constants = _read_constants(optimizer, group, scalars)
    hook = constants.hook
    for member in members_of(optimizer, group, None if communicates else indices):
        if not communicates or member.param_index in indices:
            _update(optimizer, member, constants, positions[i] + member.param_index)
        elif hook is not None and hook.joins(member.param) and constants.lr != 0.0:
            kept = before_update(hook, [member])
            after_update(hook, [member], kept)


def _read_constants(
    optimizer: BaseOptimizer, group: dict[str, Any], scalars: StepScalars
) -> _GroupConstants:
    rule = optimizer._rule_of(group)
    hyperparameters = read_hyperparameters(group, rule)
    # Done by `_update`: the formula would see the shape of a shard, or of pairs of real numbers.
    is_scaled = scales_by_shape(group, rule)
    if is_scaled:
        hyperparameters[SHAPE_SCALING] = False
    lr = read(group["lr"], HYPERPARAMETER)
    weight_decay = read(group["weight_decay"], HYPERPARAMETER)
    method = group["weight_decay_method"]
    return _GroupConstants(
        hyperparameters=hyperparameters,
        has_step="step" in rule.rule.hyperparameter_names,
        scales_by_shape=is_scaled,
        lr=lr,
        grad_factor=_grad_factor(group, scalars),
        l2=weight_decay if method == "l2" else 0.0,
        lost=_LOST[method](lr, weight_decay),
        seed=scalars.seed if group["stochastic_rounding"] else None,
        hook=hook_of(optimizer, group),
    )


def _grad_factor(group: dict[str, Any], scalars: StepScalars) -> float:
    """Return the factor of gradients."""
    factor = 1.0
    if scalars.grad_multiplier is not None:
        factor = read(scalars.grad_multiplier, HYPERPARAMETER)
    if scalars.grad_scale is not None:
        factor /= read(scalars.grad_scale, HYPERPARAMETER)
    return -factor if group["maximize"] else factor


def _update(
    optimizer: BaseOptimizer, member: Member, constants: _GroupConstants, position: int
) -> None:
    counter = member.state["step"]
    counter += 1
    step = int(read(counter, 1))

    def update(member: Member) -> None:
        _update_at(step, optimizer, member, constants, position)

    optimizer._around_update(member, update)


def _update_at(
    step: int,
    optimizer: BaseOptimizer,
    member: Member,
    constants: _GroupConstants,
    position: int,
) -> None:
    param, state, rule = member.param, member.state, member.rule.rule
    stored = read_weight(member)
    states = _read_states(member)
    grad = placed_like(member.grad, param)
    if is_dtensor(param):
        increment_versions(t for t in (param, *state.values()) if isinstance(t, Tensor))
    if is_dtensor(param) or param.is_complex():
        grad, *states = map(as_local, (grad, *states))

    is_double = torch.float64 in (grad.dtype, stored.dtype, *(s.dtype for s in states))
    real = torch.float64 if is_double else torch.float32
    grad = grad.to(real)
    weight = stored.to(real)
    if constants.grad_factor != 1.0:
        grad = grad * constants.grad_factor
    if constants.l2 != 0.0:
        grad = grad + weight * constants.l2
    hyperparameters = constants.hyperparameters
    if constants.has_step:
        hyperparameters = {**hyperparameters, "step": step}
    if rule.scalar_states:
        hyperparameters = {**hyperparameters, **{name: state[name] for name in rule.scalar_states}}
    update = rule.compute_update(grad, states, hyperparameters)
    if is_any_coded(member):
        _write_codes(member, states, position, step)
    if update is None or constants.lr == 0.0:
        return  # 0 times a NaN would be a NaN

    hook = constants.hook
    kept = None if hook is None else hook.before_update([weight], [param])
    if constants.scales_by_shape and param.numel() != 0:
        update.mul_(shape_scale(param.shape))
    _subtract(weight, update.mul_(constants.lr), constants.lost)
    if hook is not None and kept is not None:
        hook.after_update([weight], [param], kept)

    if weight is not stored:
        if constants.seed is not None and stored.dtype in HALF:
            bits = _random_bits(param, stored, constants.seed, position, step)
            store(stored, round_stochastically(weight.float(), stored.dtype, bits))
        else:
            store(stored, weight)
    write_weight(member, stored)


def _read_states(member: Member) -> list[Tensor]:
    """Return a parameter's states; coded ones as new numbers, of this process's shard."""
    pairs = zip(member.rule.state_names, member.rule.rule.codes, strict=True)
    return [
        decoded(member.state, name, code)
        if code is not None and is_coded(member.state, name)
        else member.state[name]
        for name, code in pairs
    ]


def _write_codes(member: Member, states: list[Tensor], position: int, step: int) -> None:
    """Store the numbers of coded states, rounded stochastically."""
    for k, (name, code) in enumerate(
        zip(member.rule.state_names, member.rule.rule.codes, strict=True)
    ):
        if code is not None and is_coded(member.state, name):
            noise = noise_of(member, k, position, step)
            set_coded(member.state, name, code, states[k], noise)


def _subtract(weight: Tensor, update: Tensor, lost: float) -> None:
    """Subtract an update, which is overwritten, and a fraction of itself from a weight."""
    if lost >= 0.5:
        weight.mul_(1 - lost)
    elif lost != 0.0:
        # Rounding 1 - lost would leave few bits of a small fraction. An infinite weight remains
        # infinite: it loses a finite amount.
        largest = torch.finfo(weight.dtype).max
        update.add_(weight.clamp(-largest, largest), alpha=lost)
    weight.sub_(update)


def _random_bits(param: Tensor, stored: Tensor, seed: int, position: int, step: int) -> Tensor:
    place = shard_place(param) if is_dtensor(param) else ShardPlace(0, 0)
    key = rounding_key(seed, place.number << 32 | position, step)
    return random_bits(key, element_indices(stored) + place.first_index)


def placed_like(grad: Any, param: Any) -> Any:
    """Return a gradient with the parameter's placement, and without lazy negation."""
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
