"""Float16 masters, each with a scale, as in TransformerEngine; float32 while a step runs.

The scale maps the largest finite magnitude to half of float16's range. That is stored as exactly
32752, so storing what was read changes no bits.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .._base import BaseOptimizer
from .._members import find_param
from .._optimizer import ScalarOptimizer
from .._split_masters import merge_master
from .._weights import HALF, MASTER, SPLIT, has_master, local_shard

_LARGEST = torch.finfo(torch.float16).max / 2
# Between these, what is read is finite, and normal in float32.
_LEAST_SCALE = 2.0**-102
_MOST_SCALE = torch.finfo(torch.float32).max / _LARGEST * (1 - 2.0**-23)

# By parameter. They are no states: Megatron-Core takes each state for a tensor of the parameter's
# shape.
Scales: TypeAlias = dict[Tensor, Tensor]


class ScaledMasters(ScalarOptimizer):
    """Keeps the scales of float16 masters, and converts the masters in what is loaded."""

    # None if masters are float32.
    _master_scales: Scales | None = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; missing keys take the defaults."""
        super().add_param_group(param_group)
        if self._master_scales is not None:
            try:
                _check_options(self, len(self.param_groups) - 1)
            except ValueError:
                self.param_groups.pop()
                raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned, of this optimizer or of one with the same states.

        As that of :class:`~emerging_optimizers.scalar_optimizers.ScalarOptimizer`; masters are
        stored as this optimizer's are: from float32 as float16 at once, to or from remainders by
        the next step.

        Args:
            state_dict: The state dict. Tensors that fit are not copied.
        """
        if self._master_scales is not None:
            # Megatron-Core first loads empty states of the dtypes that it has configured.
            states = dict(state_dict["state"])
            for key, state in states.items():
                master = state.get(MASTER) if isinstance(state, dict) else None
                if isinstance(master, Tensor) and master.dtype == torch.float16:
                    states[key] = {**state, MASTER: master.float()}
            state_dict = {**state_dict, "state": states}
        super().load_state_dict(state_dict)

    def _new_master(self, group: dict[str, Any], param: Tensor) -> Tensor | None:
        master = super()._new_master(group, param)
        if master is not None and is_scaled(self, param, MASTER):
            # The first step starts from what is stored if the master is created before.
            local = local_shard(master)
            local.copy_(_decode(*_encode(local)))
        return master

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        if self._master_scales is not None:
            state["_master_scales"] = self._master_scales
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        store_masters(self)


def is_scaled(optimizer: ScaledMasters, param: Tensor, name: str) -> bool:
    """Return whether a parameter's state is a master that is to be stored as float16."""
    return name == MASTER and optimizer._master_scales is not None and param.dtype in HALF


def read_master(optimizer: ScaledMasters, param: Tensor) -> Tensor:
    """Return a parameter's master as float32; a new tensor, if it is stored in another way."""
    master: Tensor = optimizer.state[param][MASTER]
    if master.dtype == torch.int16:
        # A loaded remainder, before the next step.
        merged = torch.empty_like(param, dtype=torch.float32, requires_grad=False)
        merge_master(*map(local_shard, (param.detach(), master, merged)))
        return merged
    if master.dtype != torch.float16:
        return master
    scales = optimizer._master_scales or {}
    if param not in scales:
        raise ValueError(
            f"{find_param(optimizer, param)}: state {MASTER!r} has dtype torch.float16, but its"
            " scale is unknown: set the state by set_scaled_state"
        )
    return _decode(master, scales[param])


def set_master(optimizer: ScaledMasters, param: Tensor, values: Tensor) -> None:
    """Store float32 numbers of the parameter's shape as its master, in place."""
    if values.dtype != torch.float32:
        raise TypeError(
            f"{find_param(optimizer, param)}: a float16 master_param is set from float32 numbers,"
            f" not from dtype {values.dtype}: pass what get_unscaled_state returns without"
            " skip_unscale"
        )
    old = optimizer.state[param][MASTER]
    _store(optimizer, param, values, old if old.dtype == torch.float16 else None)


@contextmanager
def as_float32(optimizer: ScaledMasters) -> Iterator[None]:
    """Replace float16 masters by float32 tensors, and store these at the end."""
    for i in range(len(optimizer.param_groups)):
        _check_options(optimizer, i)
    old: dict[Tensor, Tensor] = {}
    try:
        with torch.no_grad():
            for group in optimizer.param_groups:
                for param in group["params"]:
                    master = _master_of(optimizer, group, param)
                    if master is not None and master.dtype == torch.float16:
                        wide = read_master(optimizer, param)
                        optimizer.state[param][MASTER], old[param] = wide, master
        yield
    finally:
        store_masters(optimizer, old)


def store_masters(optimizer: ScaledMasters, old: Mapping[Tensor, Tensor] | None = None) -> None:
    """Store float32 masters as float16, if the optimizer's are.

    Args:
        optimizer: The optimizer.
        old: By parameter, the tensors to store them in. Others are stored in new ones.
    """
    if optimizer._master_scales is not None:
        for group in optimizer.param_groups:
            for param in group["params"]:
                store_master(optimizer, group, param, (old or {}).get(param))


def store_master(
    optimizer: ScaledMasters, group: dict[str, Any], param: Tensor, old: Tensor | None = None
) -> None:
    """Store a parameter's master as float16, if it is float32 and the optimizer's are float16."""
    master = _master_of(optimizer, group, param)
    # The step raises for a master of another shape.
    if master is not None and master.dtype == torch.float32 and master.shape == param.shape:
        _store(optimizer, param, master, old)


def _master_of(optimizer: ScaledMasters, group: dict[str, Any], param: Tensor) -> Tensor | None:
    """Return a parameter's master, if it is to be stored as float16."""
    if optimizer._master_scales is None or not has_master(group, param):
        return None
    master = optimizer.state.get(param, {}).get(MASTER)
    return master if isinstance(master, Tensor) else None


@torch.no_grad()
def _store(optimizer: ScaledMasters, param: Tensor, values: Tensor, old: Tensor | None) -> None:
    """Store numbers and their scale, in `old` or in a new tensor."""
    assert optimizer._master_scales is not None
    stored = old
    if stored is None:
        stored = torch.empty_like(param, dtype=torch.float16, requires_grad=False)
    codes, scale = _encode(local_shard(values).to(stored.device))
    local_shard(stored).copy_(codes)
    optimizer.state[param][MASTER] = stored
    optimizer._master_scales[param] = scale


def _encode(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return float32 numbers as float16 numbers and their scale."""
    magnitudes = values.abs().nan_to_num_(0.0, posinf=0.0)
    largest = magnitudes.amax() if magnitudes.numel() else magnitudes.new_zeros(())
    # By a tensor: CUDA divides by a Python number inexactly, as a product with its reciprocal.
    scale = (largest / torch.full_like(largest, _LARGEST)).clamp_(_LEAST_SCALE, _MOST_SCALE)
    return (values * scale.reciprocal()).to(torch.float16), scale


def _decode(master: Tensor, scale: Tensor) -> Tensor:
    wide = master.float()
    local_shard(wide).mul_(scale.to(master.device))
    return wide


def _check_options(optimizer: BaseOptimizer, index: int) -> None:
    """Raise for a group whose options do not go with float16 masters."""
    group = optimizer.param_groups[index]
    if not group["master_weights"]:
        return
    for name, is_wrong in (
        ("master_weights", group["master_weights"] == SPLIT),
        ("store_param_remainders", group["store_param_remainders"]),
        ("capturable", group["capturable"]),
    ):
        if is_wrong:
            raise ValueError(
                f"{name}={group[name]!r} cannot be combined with master_weight_dtype=torch.float16:"
                f" use master_weight_dtype=torch.float32 (param_groups[{index}])"
            )
