"""Workers of the tests of 8-bit states in several processes."""

import copy
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_workers import full, run_recorded
from optimizers import make_params
from support import assert_equal_bits
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from emerging_optimizers import AdamW, AdEMAMix, Lion
from emerging_optimizers._codes import E4M3, UE5M3, decode, scale_key

U8 = torch.uint8
# No number of rows is divisible by 2. All processes but one have an empty shard of the one with one
# row; the last two have no codes.
SHAPES = [(129, 32), (65, 64), (1, 4096), (5, 32, 32), (43, 96), (7,), (61, 65)]
NUM_CODED = 5
# By name: the class, its options, and the dtype of the parameters.
CASES: dict[str, tuple[Callable[..., Any], dict[str, Any], torch.dtype]] = {
    "AdamW": (AdamW, {"weight_decay": 0.1}, torch.float32),
    "AdamW fallback": (AdamW, {"fused": False}, torch.float32),
    "AdEMAMix": (AdEMAMix, {}, torch.float32),
    "Lion": (Lion, {}, torch.float32),
    "AdamW bfloat16": (AdamW, {"stochastic_rounding": True}, torch.bfloat16),
    "AdamW masters": (AdamW, {"master_weights": True}, torch.bfloat16),
    "AdamW by key": (AdamW, {"state_dtype": {"exp_avg_sq": "8bit"}}, torch.float32),
}


class Weights(nn.Module):
    """Parameters of all shapes, in two units of FSDP."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        params = make_params(SHAPES, dtype)
        self.first = nn.ParameterList(params[:3])
        self.rest = nn.ParameterList(params[3:])


def make(name: str, is_sharded: bool, lr: float = 0.01) -> tuple[Weights, Any, list[Any]]:
    cls, options, dtype = CASES[name]
    model = Weights(dtype)
    if is_sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model.first, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = cls(model.parameters(), **{"lr": lr, "state_dtype": "8bit", **options})
    return model, optimizer, list(model.parameters())


def step_alike(optimizer: Any, params: Sequence[Any], steps: Sequence[int]) -> None:
    """Steps whose stochastic rounding has the same seeds on each process."""
    for step in steps:
        torch.manual_seed(step)
        run_recorded(optimizer, params, [step])


def compare(optimizer: Any, params: Sequence[Any], reference: Any, others: Sequence[Any]) -> None:
    for i, (param, other) in enumerate(zip(params, others, strict=True)):
        assert_equal_bits(full(param), full(other), f"parameter {i}")
        state, wanted = optimizer.state[param], reference.state[other]
        assert state.keys() == wanted.keys()
        for name, value in wanted.items():
            assert_equal_bits(full(state[name]), full(value), f"{name} of parameter {i}")
            if name != "step" and isinstance(param, DTensor):
                assert isinstance(state[name], DTensor), name
                assert state[name].placements == param.placements
                assert state[name].device_mesh == param.device_mesh
                assert state[name].shape == value.shape
        is_coded = any(value.dtype == U8 for value in state.values())
        assert is_coded == (i < NUM_CODED)


def train_sharded(rank: int, folder: Path) -> None:
    for name in CASES:
        _, optimizer, params = make(name, True)
        _, reference, others = make(name, False)
        for step in (1, 2, 3):
            step_alike(optimizer, params, [step])
            step_alike(reference, others, [step])
            compare(optimizer, params, reference, others)


# ---- other placements ----------------------------------------------------------------------------


def placed(param: Tensor, mesh: Any, placements: Sequence[Any]) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(param.detach().clone(), mesh, placements))


def place_otherwise(rank: int, folder: Path) -> None:
    line = init_device_mesh("cpu", (2,))
    plane = init_device_mesh("cpu", (1, 2))
    replicated(line, [Replicate()])
    replicated(plane, [Replicate(), Shard(0)])
    replicated(plane, [Shard(0), Replicate()])
    for fused in (None, False):
        blocks(line, lambda param: [Shard(param.dim() - 1)], fused)
        gaps(line, fused)
        columns_that_cut_groups(line, fused)
        scales_placed_otherwise(line, fused)


def place_blocks(rank: int, folder: Path) -> None:
    """Of 4 processes: parts of rows of parts of columns."""
    mesh = init_device_mesh("cpu", (2, 2))
    for fused in (None, False):
        blocks(mesh, lambda param: [Shard(0), Shard(param.dim() - 1)], fused)
        blocks(mesh, lambda param: [Shard(param.dim() - 1), Shard(0)], fused)
        blocks(mesh, lambda param: [Replicate(), Shard(param.dim() - 1)], fused)


def replicated(mesh: Any, placements: Sequence[Any]) -> None:
    """The bits are those of an unsharded parameter."""
    shapes = [(129, 32), (5, 32, 32)]
    params, others = make_params(shapes), make_params(shapes)
    sharded = [placed(p, mesh, placements) for p in params]
    options: dict[str, Any] = {"lr": 0.01, "fused": True, "state_dtype": "8bit"}
    optimizer, reference = AdamW(sharded, **options), AdamW(others, **options)
    step_alike(optimizer, sharded, [1, 2, 3])
    step_alike(reference, others, [1, 2, 3])
    for param, other in zip(sharded, others, strict=True):
        assert_equal_bits(full(param), other.detach(), f"{placements}")
        for name, value in reference.state[other].items():
            assert_equal_bits(full(optimizer.state[param][name]), value, f"{placements}: {name}")


def blocks(mesh: Any, placements: Callable[[Tensor], Sequence[Any]], fused: bool | None) -> None:
    """The bits are those of an unsharded parameter, whose rows the shards have parts of."""
    shapes = [(64, 128), (129, 64), (5, 32, 64)]
    params, others = make_params(shapes), make_params(shapes)
    sharded = [placed(p, mesh, placements(p)) for p in params]
    options: dict[str, Any] = {"lr": 0.01, "fused": fused, "state_dtype": "8bit"}
    optimizer, reference = AdEMAMix(sharded, **options), AdEMAMix(others, **options)
    step_alike(optimizer, sharded, [1, 2, 3])
    step_alike(reference, others, [1, 2, 3])
    for param, other in zip(sharded, others, strict=True):
        assert param.to_local().shape[-1] < param.shape[-1]
        assert_equal_bits(full(param), other.detach(), "block")
        for name, value in reference.state[other].items():
            assert_equal_bits(full(optimizer.state[param][name]), value, f"block: {name}")


def gaps(mesh: Any, fused: bool | None) -> None:
    """Of a shard with other gaps in its parameter, random bits are its own.

    They are those of its elements' places in the shard, together with its number. So the codes are
    other ones of the same numbers, and bits differ from the unsharded parameter's.
    """
    whole = make_params([(8, 64, 32)])
    param = placed(whole[0], mesh, [Shard(1)])
    options: dict[str, Any] = {"lr": 0.01, "fused": fused, "state_dtype": "8bit"}
    optimizer, reference = AdamW([param], **options), AdamW(whole, **options)
    step_alike(optimizer, [param], [1])
    step_alike(reference, whole, [1])
    state, wanted = optimizer.state[param], reference.state[whole[0]]
    # The first update is made before anything is rounded.
    assert_equal_bits(full(param), whole[0].detach(), "parameter")
    for name, code in (("exp_avg", E4M3), ("exp_avg_sq", UE5M3)):
        assert state[name].to_local().shape == (8, 32, 32)
        assert state[scale_key(name)].to_local().shape == (8, 32, 1)
        assert state[scale_key(name)].shape == (8, 64, 1)
        codes, scales = full(state[name]), full(state[scale_key(name)])
        assert_equal_bits(scales, wanted[scale_key(name)], scale_key(name))
        got, expected = (
            decode(c, s, code)
            for c, s in ((codes, scales), (wanted[name], wanted[scale_key(name)]))
        )
        is_different = codes != wanted[name]
        assert is_different.float().mean() > 0.05
        torch.testing.assert_close(got, expected, rtol=0.13, atol=1e-2 * expected.abs().max())
    step_alike(optimizer, [param], [2, 3, 4])
    step_alike(reference, whole, [2, 3, 4])
    torch.testing.assert_close(full(param), whole[0].detach(), rtol=1e-2, atol=5e-3)


def columns_that_cut_groups(mesh: Any, fused: bool | None) -> None:
    whole = make_params([(64, 96), (64, 64)])
    params = [placed(p, mesh, [Shard(1)]) for p in whole]
    named = [("free", params[1]), ("cut", params[0])]
    before = [full(p).clone() for p in params]
    options: dict[str, Any] = {"lr": 0.01, "fused": fused, "state_dtype": "8bit"}
    optimizer = AdamW(named, **options)
    text = (
        "param_groups[0]['params'][1] ('cut'): its last dimension is sharded in pieces of 48, which"
        " cuts a group of 32 elements that share a scale: shard another dimension, or exclude the"
        " parameter by state_dtype_filter"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        step_alike(optimizer, [params[1], params[0]], [1])
    for param, old in zip(params, before, strict=True):
        assert_equal_bits(full(param), old, "parameter")
    # As the message says.
    optimizer = AdamW(named, state_dtype_filter=lambda name, param: name != "cut", **options)
    step_alike(optimizer, [params[1], params[0]], [1, 2])
    assert optimizer.state[params[1]]["exp_avg"].dtype == U8
    assert optimizer.state[params[0]]["exp_avg"].dtype == torch.float32
    # Nor can such codes be loaded.
    refusing = AdamW(params[:1], **options)
    saved = refusing.state_dict()
    codes = torch.zeros_like(params[0], dtype=U8, requires_grad=False)
    scales = distribute_tensor(torch.zeros(64, 3, dtype=U8), mesh, [Shard(1)])
    state: dict[str, Any] = {"step": torch.tensor(1.0)}
    for name in ("exp_avg", "exp_avg_sq"):
        state |= {name: codes.clone(), scale_key(name): scales.clone()}
    saved["state"][0] = state
    with pytest.raises(ValueError, match="cuts a group of 32 elements"):
        refusing.load_state_dict(saved)
    # Nor can numbers be loaded that would have to be cut.
    for name in ("exp_avg", "exp_avg_sq"):
        del state[scale_key(name)]
        state[name] = torch.zeros_like(params[0], requires_grad=False)
    start = (
        r"^the loaded state of param_groups\[0\]\['params'\]\[0\]: its last dimension is sharded"
    )
    with pytest.raises(ValueError, match=start):
        refusing.load_state_dict(saved)
    assert not refusing.state


def scales_placed_otherwise(mesh: Any, fused: bool | None) -> None:
    (whole,) = make_params([(64, 64)])
    param = placed(whole, mesh, [Shard(0)])
    optimizer = AdamW([param], fused=fused, state_dtype="8bit")
    step_alike(optimizer, [param], [1])
    state = optimizer.state[param]
    scales = state["exp_avg_scale"].to_local()
    state["exp_avg_scale"] = DTensor.from_local(
        scales, mesh, [Replicate()], run_check=False, shape=torch.Size((64, 2)), stride=(2, 1)
    )
    before = full(param).clone()
    with pytest.raises(ValueError, match="state 'exp_avg_scale' is not placed as the parameter is"):
        step_alike(optimizer, [param], [2])
    assert_equal_bits(full(param), before, "parameter")


# ---- checkpoints ---------------------------------------------------------------------------------


def save_checkpoints(rank: int, folder: Path) -> None:
    for name in CASES:
        for flat in (False, True):
            model, optimizer, params = make(name, True)
            step_alike(optimizer, params, [1, 2, 3])
            options = StateDictOptions(flatten_optimizer_state_dict=flat)
            weights, states = get_state_dict(model, optimizer, options=options)
            path = folder / f"{name}-{flat}"
            checkpoint.save({"model": weights, "optimizer": states}, checkpoint_id=path)


def resume_checkpoints(rank: int, folder: Path) -> None:
    """Load with another number of processes, and continue as without interruption."""
    for name in CASES:
        _, reference, others = make(name, False)
        step_alike(reference, others, [1, 2, 3, 4, 5])
        for flat in (False, True):
            model, optimizer, params = make(name, True, lr=0.5)
            with torch.no_grad():
                for param in params:
                    param.zero_()
            options = StateDictOptions(flatten_optimizer_state_dict=flat)
            weights, states = get_state_dict(model, optimizer, options=options)
            loaded: dict[str, Any] = {"model": weights, "optimizer": states}
            checkpoint.load(loaded, checkpoint_id=folder / f"{name}-{flat}")
            set_state_dict(
                model,
                optimizer,
                model_state_dict=loaded["model"],
                optim_state_dict=loaded["optimizer"],
                options=options,
            )
            assert optimizer.param_groups[0]["lr"] == 0.01
            step_alike(optimizer, params, [4, 5])
            compare(optimizer, params, reference, others)


def full_state_dicts(rank: int, folder: Path) -> None:
    """State dicts of unsharded tensors on the CPU, taken and loaded."""
    for name in CASES:
        _, reference, others = make(name, False)
        step_alike(reference, others, [1, 2, 3])
        model, optimizer, params = make(name, True)
        step_alike(optimizer, params, [1, 2, 3])
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(model, options=options)
        states = get_optimizer_state_dict(model, optimizer, options=options)
        if rank == 0:
            names = [key for key, _ in model.named_parameters()]
            for key, other in zip(names, others, strict=True):
                for state_name, value in reference.state[other].items():
                    saved = states["state"][key][state_name]
                    assert not isinstance(saved, DTensor)
                    assert_equal_bits(saved, value, f"{state_name} of {key}")
        for broadcast in (False, True):
            given: list[Any]
            fresh, loading, loaded = make(name, True, lr=0.5)
            with torch.no_grad():
                for param in loaded:
                    param.zero_()
            if broadcast:
                options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
                given = [weights, states] if rank == 0 else [{}, {}]
            else:
                given = copy.deepcopy([weights, states])  # loading modifies them
                dist.broadcast_object_list(given, 0)
            set_model_state_dict(fresh, given[0], options=options)
            set_optimizer_state_dict(fresh, loading, given[1], options=options)
            continued, others_continued = make(name, False)[1:]
            step_alike(continued, others_continued, [1, 2, 3, 4, 5])
            step_alike(loading, loaded, [4, 5])
            compare(loading, loaded, continued, others_continued)
