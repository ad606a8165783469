"""Workers of the tests of scalar states in several processes."""

from pathlib import Path
from typing import Any

import torch
from distributed_workers import full, make_model, run_recorded, shard
from scalar_rules import ScalarAverages, ScalarNAdam
from support import assert_equal_bits
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

CASES = [
    (cls, fused, flat)
    for cls, fused in ((ScalarNAdam, None), (ScalarAverages, None), (ScalarAverages, False))
    for flat in (False, True)
]


def train_and_save(rank: int, folder: Path) -> None:
    """Shards, some empty, step like whole parameters, and save their numbers."""
    for cls, fused, flat in CASES:
        model, other = make_model(True), make_model(True)
        shard(model, "float32")
        optimizer = cls(model.parameters(), lr=0.01, fused=fused)
        reference = cls(other.parameters(), lr=0.01, fused=fused)
        params, others = list(model.parameters()), list(other.parameters())
        # The first parameter misses a step.
        run_recorded(optimizer, params, [1])
        run_recorded(reference, others, [1])
        run_recorded(optimizer, params[1:], [2])
        run_recorded(reference, others[1:], [2])
        for p, q in zip(params, others, strict=True):
            assert_equal_bits(full(p), full(q), "parameter")
            for name, wanted in reference.state[q].items():
                state = optimizer.state[p][name]
                assert isinstance(state, DTensor) == (name == "exp_avg" or name == "exp_avg_sq")
                assert_equal_bits(full(state), wanted, name)
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        weights, states = get_state_dict(model, optimizer, options=options)
        path = folder / f"{cls.__name__}-{fused}-{flat}"
        checkpoint.save({"model": weights, "optimizer": states}, checkpoint_id=path)


def load_and_continue(rank: int, folder: Path) -> None:
    for cls, fused, flat in CASES:
        torch.manual_seed(1)
        model, other = make_model(True), make_model(True)
        shard(model, "float32")
        optimizer = cls(model.parameters(), lr=0.02, fused=fused)
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        weights, states = get_state_dict(model, optimizer, options=options)
        loaded: dict[str, Any] = {"model": weights, "optimizer": states}
        checkpoint.load(loaded, checkpoint_id=folder / f"{cls.__name__}-{fused}-{flat}")
        set_state_dict(
            model,
            optimizer,
            model_state_dict=loaded["model"],
            optim_state_dict=loaded["optimizer"],
            options=options,
        )
        reference = cls(other.parameters(), lr=0.01, fused=fused)
        params, others = list(model.parameters()), list(other.parameters())
        run_recorded(reference, others, [1])
        run_recorded(reference, others[1:], [2])
        for step in (3, 4):
            run_recorded(optimizer, params, [step])
            run_recorded(reference, others, [step])
        for p, q in zip(params, others, strict=True):
            assert_equal_bits(full(p), full(q), "parameter")
            for name, wanted in reference.state[q].items():
                assert_equal_bits(full(optimizer.state[p][name]), wanted, name)
