"""Workers of the distributed tests of failures."""

import copy
import os
import signal
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed_workers import (
    CASES,
    backward,
    full,
    make_model,
    run_recorded,
    set_recorded_grads,
    shard,
)
from optimizers import SETUPS, Setup
from support import assert_equal_bits
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from emerging_optimizers import AdamW

# ---- killed while saving -------------------------------------------------------------------------


def be_killed(*arguments: Any, **keywords: Any) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


class Planner(DefaultSavePlanner):
    """Kills its process after it has written a given number of tensors."""

    def __init__(self, num_tensors: int) -> None:
        super().__init__()
        self.num_tensors = num_tensors

    def resolve_data(self, write_item: Any) -> Any:
        if self.num_tensors == 0:
            be_killed()
        self.num_tensors -= 1
        return super().resolve_data(write_item)


def train_for_checkpoints() -> tuple[nn.Module, AdamW]:
    model = make_model(True)
    shard(model, "float32")
    return model, AdamW(model.parameters(), lr=0.01)


def save(model: nn.Module, optimizer: AdamW, folder: Path, **options: Any) -> None:
    weights, states = get_state_dict(model, optimizer)
    checkpoint.save(
        {"model": weights, "optimizer": states},
        storage_writer=checkpoint.FileSystemWriter(folder),
        **options,
    )


def save_and_be_killed(rank: int, folder: Path, moment: str, killed: str) -> None:
    model, optimizer = train_for_checkpoints()
    run_recorded(optimizer, list(model.parameters()), [1, 2])
    save(model, optimizer, folder / "step 2")
    run_recorded(optimizer, list(model.parameters()), [3])
    if rank != int(killed):
        save(model, optimizer, folder / "step 3")
    elif moment == "before its first tensor":
        save(model, optimizer, folder / "step 3", planner=Planner(0))
    elif moment == "amid its tensors":
        save(model, optimizer, folder / "step 3", planner=Planner(10))
    elif moment == "before the metadata":
        with mock.patch.object(checkpoint.FileSystemWriter, "finish", be_killed):
            save(model, optimizer, folder / "step 3")
    else:
        assert moment == "before the metadata has its name"
        with mock.patch.object(Path, "rename", be_killed):
            save(model, optimizer, folder / "step 3")


def resume_after_kills(rank: int, folder: Path) -> None:
    """An incomplete checkpoint is rejected, and the one before it continues."""
    for written in folder.iterdir():
        model, optimizer = train_for_checkpoints()
        weights, states = get_state_dict(model, optimizer)
        loaded = {"model": weights, "optimizer": states}
        # As a user finds the last complete one.
        assert [file.parent.name for file in written.glob("*/.metadata")] == ["step 2"], written
        assert (written / "step 3" / "__1_0.distcp").exists(), written
        with pytest.raises(CheckpointException, match="metadata"):
            checkpoint.load(loaded, checkpoint_id=written / "step 3")
        checkpoint.load(loaded, checkpoint_id=written / "step 2")
        set_state_dict(
            model, optimizer, model_state_dict=weights, optim_state_dict=loaded["optimizer"]
        )
        run_recorded(optimizer, list(model.parameters()), [3, 4])
        other = make_model(True)
        reference = AdamW(other.parameters(), lr=0.01)
        run_recorded(reference, list(other.parameters()), range(1, 5))
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert_equal_bits(full(p), full(q), written.name)


# ---- ranks that differ ---------------------------------------------------------------------------


def without_parameters(rank: int, folder: Path) -> None:
    # It warns about its use of torch.jit.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    for setup in SETUPS:
        # One parameter on two processes.
        weight, wanted = (nn.Parameter(torch.arange(6.0).view(2, 3)) for _ in range(2))
        optimizer = ZeroRedundancyOptimizer([weight], setup.make, lr=0.1)
        alone = setup.make([wanted], lr=0.1)
        for step in (1, 2):
            run_recorded(optimizer, [weight], [step])
            run_recorded(alone, [wanted], [step])
        assert_equal_bits(weight.detach(), wanted.detach(), str(setup))

        # A process without parameters runs the same loop as the others.
        params = [nn.Parameter(torch.ones(3))] if rank == 0 else []
        own = setup.make([{"params": params}], lr=0.1)
        scaler = ShardedGradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.ones(()))
        for step in (1, 2):
            if params:
                set_recorded_grads(params, step)
            scaler.unscale_(own)
            scaler.step(own)
            scaler.update()
        own.load_state_dict(own.state_dict())
        assert [state["step"].item() for state in own.state.values()] == [2.0] * len(params)

        # With FSDP2, its shard of every parameter is empty.
        mesh = init_device_mesh("cpu", (2,))
        row, wanted = (nn.Parameter(torch.arange(1.0, 4.0).view(1, 3)) for _ in range(2))
        row = nn.Parameter(distribute_tensor(row.detach(), mesh, [Shard(0)]))
        assert row.to_local().numel() == (3 if rank == 0 else 0)
        run_recorded(setup.make([row], lr=0.1), [row], [1, 2])
        run_recorded(setup.make([wanted], lr=0.1), [wanted], [1, 2])
        assert_equal_bits(full(row), wanted.detach(), str(setup))


def without_gradients(rank: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for name, make, _, _ in CASES:
        for fused in (None, False):
            # Other processes have gradients: this one's rows do not change until it has some, too.
            value = torch.arange(1.0, 9.0).view(4, 2)
            weight = nn.Parameter(distribute_tensor(value, mesh, [Shard(0)]))
            other = nn.Parameter(distribute_tensor(value, mesh, [Shard(1)]))
            optimizer = make([weight, other], lr=0.1, fused=fused)
            set_recorded_grads([weight, other], 1)
            if rank == 1:
                weight.grad = other.grad = None
            optimizer.step()
            moved = (full(weight) != value).any(1).tolist()
            if "frob" in name:
                torch.testing.assert_close(full(weight).norm(), value.norm())
            else:
                assert moved == [True, True, False, False], (name, fused, moved)
            assert len(optimizer.state) == (2 if rank == 0 else 0)
            run_recorded(optimizer, [weight, other], [2])
            assert optimizer.state[weight]["step"].item() == (2 if rank == 0 else 1)

    # With DDP, parameters that one process does not use get their gradients from the others.
    for setup in SETUPS:
        model = DistributedDataParallel(Branches(), find_unused_parameters=True)
        optimizer = setup.make(model.parameters(), lr=0.1)
        for _ in range(3):
            model(torch.ones(2, 3), "both" if rank == 0 else "neither").sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert_same_everywhere(model, str(setup))
    # A GradScaler without any gradient to check.
    for scaler in (torch.amp.GradScaler("cpu"), ShardedGradScaler("cpu")):
        weight = nn.Parameter(torch.ones(2))
        # torch.amp alone raises an error here, because there is no gradient.
        optimizer = AdamW([weight], lr=0.1, fused=True)
        if rank == 0:
            weight.grad = scaler.scale(torch.ones(2))
        else:
            scaler.scale(torch.ones(()))
        if isinstance(scaler, ShardedGradScaler):
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        assert (weight.detach() != 1).tolist() == [rank == 0] * 2


class Branches(nn.Module):
    """A model that can skip all layers but the last."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor, used: str) -> Tensor:
        if used == "both":
            x = self.second(self.first(x))
        return self.last(x)


def assert_same_everywhere(model: nn.Module, label: str) -> None:
    for name, param in model.named_parameters():
        first = full(param).clone()
        dist.broadcast(first, 0)
        assert_equal_bits(full(param), first, f"{label} {name}")


def nan_on_one(rank: int, folder: Path) -> None:
    """After a NaN in one process, all processes skip the step and halve the scale."""
    for setup in SETUPS:
        for kind in ("DDP", "FSDP2", "shards"):
            for fused in (None, True):
                skip_with(setup, kind, rank, fused)


def skip_with(setup: Setup, kind: str, rank: int, fused: bool | None) -> None:
    scaler: Any = torch.amp.GradScaler("cpu", init_scale=8.0)
    if kind == "DDP":
        model: nn.Module = DistributedDataParallel(make_model(True))
    else:
        model = make_model(True)
    if kind == "FSDP2":
        shard(model, "float32")
    if kind == "shards":
        # GradScaler does not know this kind of sharding: each process has different parameters.
        scaler = ShardedGradScaler("cpu", init_scale=8.0)
    params = list(model.parameters())
    optimizer = setup.make(params, lr=0.01, fused=fused)
    for step in range(4):
        is_bad = step in (0, 2)
        before = [full(p).clone() for p in params]
        loss = backward(model, step, rank, scaler.scale)
        assert loss == loss
        if is_bad and rank == 1:
            poison(params, kind)
        if is_bad and kind == "DDP":
            for p in params:
                dist.all_reduce(p.grad)  # as the hooks would with a NaN in the loss
        if kind == "shards" and fused:
            scaler.unscale_(optimizer)  # without it, only infinities of this process are found
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved = any(bool((full(p) != b).any()) for p, b in zip(params, before, strict=True))
        assert moved != is_bad, (setup.name, kind, fused, step)
    assert scaler.get_scale() == 2.0
    assert {optimizer.state[p]["step"].item() for p in params} == {2.0}
    if kind != "shards":
        assert_same_everywhere(model, f"{setup} {kind}")


def poison(params: list[nn.Parameter], kind: str) -> None:
    grads = [p.grad for p in params if p.grad is not None]
    parts = [g.to_local() if isinstance(g, DTensor) else g for g in grads]
    next(part for part in reversed(parts) if part.numel()).view(-1)[0] = float("nan")


# ---- checkpoints that differ ---------------------------------------------------------------------


def other_orders(rank: int, folder: Path) -> None:
    """Checkpoints identify parameters by name: the optimizer may have them in another order."""
    for setup in SETUPS:
        results = []
        for reverse in (False, True):
            model = make_model(True)
            shard(model, "float32")
            params = list(model.parameters())
            optimizer = setup.make(params[::-1] if reverse else params, lr=0.01)
            path = folder / setup.name
            if not reverse:
                run_recorded(optimizer, params, [1, 2])
                weights, states = get_state_dict(model, optimizer)
                checkpoint.save({"model": weights, "optimizer": states}, checkpoint_id=path)
            else:
                weights, states = get_state_dict(model, optimizer)
                loaded = {"model": weights, "optimizer": states}
                checkpoint.load(loaded, checkpoint_id=path)
                set_state_dict(
                    model,
                    optimizer,
                    model_state_dict=loaded["model"],
                    optim_state_dict=loaded["optimizer"],
                )
            run_recorded(optimizer, params, [3, 4])
            results.append([full(p) for p in params])
        for a, b in zip(*results, strict=True):
            assert_equal_bits(a, b, str(setup))


def other_keys(rank: int, folder: Path) -> None:
    model = make_model(True)
    shard(model, "float32")
    params = list(model.parameters())
    for setup in SETUPS:
        if not setup.states:
            continue
        optimizer = setup.make(params, lr=0.01)
        run_recorded(optimizer, params, [1])
        last = setup.states[-1]

        def saved(optimizer: Any = optimizer) -> dict[str, Any]:
            states = get_optimizer_state_dict(model, optimizer)
            # Copies, not the optimizer's dictionaries and tensors.
            return copy.deepcopy(states)

        # A missing state: all processes raise an error that names it.
        states = saved()
        del states["state"]["head.weight"][last]
        with pytest.raises(ValueError, match=rf"\('head\.weight'\) has no '{last}'"):
            set_optimizer_state_dict(model, optimizer, states)
        states = saved()
        del states["state"]["head.weight"]
        with pytest.raises(RuntimeError, match=r"head\.weight"):
            set_optimizer_state_dict(model, optimizer, states)

        # A state that the checkpoint lacks, and that the load asks for.
        states = saved()
        path = folder / setup.name
        whole = {"optimizer": states}
        del states["state"]["head.weight"][last]
        checkpoint.save(whole, checkpoint_id=path)
        with pytest.raises(CheckpointException, match=rf"state\.head\.weight\.{last}"):
            checkpoint.load({"optimizer": saved()}, checkpoint_id=path)

        # Additional entries are kept or left out, and do not change the next step.
        states = saved()
        states["state"]["head.weight"]["later"] = torch.ones(2)
        states["state"]["gone.weight"] = dict(states["state"]["head.weight"])
        other = make_model(True)
        shard(other, "float32")
        with torch.no_grad():
            for p, q in zip(params, other.parameters(), strict=True):
                q.copy_(p)
        fresh = setup.make(other.parameters(), lr=0.02)
        set_optimizer_state_dict(other, fresh, states)
        run_recorded(optimizer, params, [2])
        run_recorded(fresh, list(other.parameters()), [2])
        for p, q in zip(params, other.parameters(), strict=True):
            assert_equal_bits(full(q), full(p), str(setup))
