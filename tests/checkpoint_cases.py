"""The optimizers whose checkpoints are in tests/checkpoints, and the program that writes them.

    python tests/checkpoint_cases.py tests/checkpoints/<name>.tar.gz

Run it with the version of the package whose format is to be recorded. Every later version must load
these checkpoints and continue from them (test_old_checkpoints.py).
"""

import pickle
import sys
import tarfile
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from optimizers import MEGATRON, METHODS, SETUPS, VARIANTS, make_grads, make_params
from processes import launch
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from emerging_optimizers import AdamW, LaProp, Lion, Signum, megatron

SHAPES = ((3, 4), (5, 2), (2, 7))
SAVED_AFTER = 3
STEPS_AFTERWARDS = (4, 5)


@dataclass(frozen=True)
class Case:
    """An optimizer, its arguments, and the dtype of its parameters."""

    name: str
    make: Callable[..., torch.optim.Optimizer]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    groups: str = "one"

    @property
    def is_decoupled(self) -> bool:
        return bool(self.arguments.get("use_decoupled_grad"))

    def params(self) -> list[nn.Parameter]:
        return make_params(SHAPES, self.dtype)

    def optimizer(self, params: list[nn.Parameter]) -> torch.optim.Optimizer:
        a, b, c = params
        if self.groups == "one":
            return self.make(params, **self.arguments)
        if self.groups == "named":
            return self.make([("a", a), ("b", b), ("c", c)], **self.arguments)
        return self.make([{"params": [a]}, {"params": [b, c], "lr": 0.003}], **self.arguments)

    def run(self, optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: Any) -> None:
        torch.manual_seed(sum(steps))
        for step in steps:
            for param, grad in zip(params, make_grads(params, step), strict=True):
                setattr(param, "decoupled_grad" if self.is_decoupled else "grad", grad)
            if self.groups == "frozen":
                params[1].grad = None
            optimizer.step()


def _cases() -> dict[str, Case]:
    cases = []

    def add(
        what: str,
        make: Any,
        dtype: torch.dtype = torch.float32,
        groups: str = "one",
        **arguments: Any,
    ) -> None:
        cases.append(Case(what, make, {"lr": 0.01, **arguments}, dtype, groups))

    half = torch.bfloat16
    for setup in [*SETUPS, *VARIANTS]:
        add(setup.name, setup.make, weight_decay=0.1)
    for setup in SETUPS:
        name, make = setup.name, setup.make
        add(f"{name}, bfloat16", make, half)
        add(f"{name}, masters", make, half, master_weights=True, weight_decay=0.1)
        add(f"{name}, split masters", make, half, master_weights="split", weight_decay=0.1)
        add(f"{name}, stochastic rounding", make, half, stochastic_rounding=True)
        add(f"{name}, bfloat16 states", make, state_dtype=half)
        add(f"{name}, one float16 state", make, state_dtype={setup.states[-1]: torch.float16})
        add(f"{name}, fallback", make, fused=False, weight_decay=0.1)
        add(f"{name}, groups", make, groups="two", maximize=True, capturable=True)
    for method in METHODS:
        add(f"AdamW, {method}", AdamW, weight_decay=0.1, weight_decay_method=method)
    add("AdamW, named", AdamW, groups="named")
    add("AdamW, frozen", AdamW, groups="frozen")
    add("AdamW, fused", AdamW, fused=True)
    add("AdamW, tensor lr", AdamW, lr=torch.tensor(0.01))
    add("AdamW, float64", AdamW, torch.float64)
    add("AdamW, complex64", AdamW, torch.complex64)
    add("AdamW, float16 masters", AdamW, torch.float16, master_weights=True)
    add("LaProp, frob_normalize", LaProp, frob_normalize=True)
    add("Lion, masters, named", Lion, half, groups="named", master_weights=True)
    add("Signum, tensor lr", Signum, lr=torch.tensor(0.01), nesterov=True)

    remainders = {"master_weights": True, "store_param_remainders": True}
    for name, make in MEGATRON.items():
        add(f"megatron.{name}", make, weight_decay=0.1)
        add(f"megatron.{name}, masters", make, half, master_weights=True)
        add(f"megatron.{name}, remainders", make, half, **remainders)
        add(f"megatron.{name}, groups", make, groups="two", use_decoupled_grad=True)
    adam = megatron.FusedAdam
    add("megatron.FusedAdam, float32 masters", adam, master_weights=True)
    add("megatron.FusedAdam, capturable", adam, capturable=True)
    add("megatron.FusedAdam, l2", adam, adam_w_mode=False, bias_correction=False, weight_decay=0.1)
    add("megatron.FusedAdam, states", adam, exp_avg_dtype=half, exp_avg_sq_dtype=torch.float16)
    return {case.name: case for case in cases}


CASES = _cases()

# ---- distributed checkpoints ---------------------------------------------------------------------

MODEL_CASES = {
    "AdamW": (AdamW, torch.float32, {"weight_decay": 0.1}),
    "Lion": (Lion, torch.float32, {}),
    "masters": (AdamW, torch.bfloat16, {"master_weights": True}),
    "megatron": (megatron.FusedAdam, torch.float32, {}),
    "megatron masters": (megatron.FusedAdam, torch.bfloat16, {"master_weights": True}),
}


def make_model(name: str, is_sharded: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    cls, dtype, arguments = MODEL_CASES[name]
    model = nn.Sequential(nn.Linear(4, 7), nn.Linear(7, 3)).to(dtype)
    values = make_params([tuple(param.shape) for param in model.parameters()], dtype)
    with torch.no_grad():
        for param, value in zip(model.parameters(), values, strict=True):
            param.copy_(value)
    if is_sharded:
        fully_shard(model)
    return model, cls(model.parameters(), lr=0.01, **arguments)


def run_model(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Any) -> None:
    params: list[Any] = list(model.parameters())
    for step in steps:
        for param, grad in zip(params, make_grads(params, step), strict=True):
            if isinstance(param, DTensor):
                param.grad = distribute_tensor(grad, param.device_mesh, param.placements)
            else:
                param.grad = grad
        optimizer.step()


def distributed_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, flat: bool
) -> dict[str, Any]:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
    return {"model": model_state, "optimizer": optimizer_state}


def distributed_folders(folder: Path, world_size: int) -> dict[tuple[str, bool], Path]:
    """The folders of the checkpoints of the models, flat or not."""
    return {
        (name, flat): folder / f"{name.replace(' ', '_')}-{world_size}{'-flat' if flat else ''}"
        for name in MODEL_CASES
        for flat in (False, True)
    }


def write_distributed(rank: int, folder: Path, world_size: str) -> None:
    """Save as one of `world_size` processes."""
    is_sharded = int(world_size) > 1
    for (name, flat), path in distributed_folders(folder, int(world_size)).items():
        model, optimizer = make_model(name, is_sharded)
        run_model(model, optimizer, range(1, SAVED_AFTER + 1))
        checkpoint.save(distributed_state(model, optimizer, flat), checkpoint_id=path)


def load_distributed(rank: int, folder: Path, world_size: str) -> None:
    """Load what the same number of processes saved, and compare the results of two more steps."""
    wanted = torch.load(folder / "continued.pt")
    for (name, flat), path in distributed_folders(folder, int(world_size)).items():
        model, optimizer = make_model(name, int(world_size) > 1)
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        state = distributed_state(model, optimizer, flat)
        checkpoint.load(state, checkpoint_id=path)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=options,
        )
        run_model(model, optimizer, STEPS_AFTERWARDS)
        for got, expected in zip(outcome(optimizer), wanted[name], strict=True):
            assert got.keys() == expected.keys(), (name, flat, got.keys())
            for key, value in expected.items():
                tensor: Any = got[key]
                total = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                digits = 2.0**-7 if value.dtype == torch.bfloat16 else 1e-5
                torch.testing.assert_close(total, value, rtol=digits, atol=digits * 1e-2)


# ---- writing -------------------------------------------------------------------------------------


def outcome(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    """Return copies of all parameters and states, by name."""
    return [
        {"param": param.detach().clone()}
        | {
            name: value.detach().clone()
            for name, value in optimizer.state.get(param, {}).items()
            if isinstance(value, Tensor)
        }
        for group in optimizer.param_groups
        for param in group["params"]
    ]


def write(folder: Path, names: Collection[str]) -> None:
    """Write the checkpoints of the named cases to a folder."""
    folder.mkdir(parents=True)
    saved, pickled = {}, {}
    for case in map(CASES.__getitem__, names):
        params = case.params()
        optimizer = case.optimizer(params)
        case.run(optimizer, params, range(1, SAVED_AFTER + 1))
        buffer = pickle.dumps(optimizer.state_dict())
        saved[case.name] = {
            "params": [param.detach().clone() for param in params],
            "state_dict": pickle.loads(buffer),
        }
        if case.name in ("AdamW", "Lion, masters", "megatron.FusedAdam, remainders"):
            pickled[case.name] = pickle.dumps(optimizer)
        case.run(optimizer, params, STEPS_AFTERWARDS)
        saved[case.name]["continued"] = outcome(optimizer)
    torch.save(saved, folder / "optimizers.pt")
    (folder / "pickled_optimizers.pkl").write_bytes(pickle.dumps(pickled))

    continued = {}
    for name in MODEL_CASES:
        model, optimizer = make_model(name, is_sharded=False)
        run_model(model, optimizer, range(1, SAVED_AFTER + 1))
        run_model(model, optimizer, STEPS_AFTERWARDS)
        continued[name] = outcome(optimizer)
    torch.save(continued, folder / "continued.pt")
    write_distributed(0, folder, "1")
    launch("checkpoint_cases.write_distributed", 2, folder, "2")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        write(Path(scratch, "checkpoints"), CASES)
        with tarfile.open(sys.argv[1], "w:gz") as archive:
            archive.add(Path(scratch, "checkpoints"), arcname=".")
