"""Train the character model of ``train_char_lm.py`` in several processes, sharded with FSDP2.

    torchrun --standalone --nproc-per-node 4 examples/fsdp2_char_lm.py

With GPUs, each process uses one and communicates over NCCL; otherwise processes compute on the CPU
and communicate over gloo. ``fully_shard`` turns each parameter, its gradient and its optimizer
states into DTensors; each process holds and updates one shard. ``--optimizer`` takes a name from
``emerging_optimizers.registry``.

The processes divide the rows of each batch among them, so their number only changes the order of
sums. A checkpoint is saved every ``--save-every`` steps and at the end. A run can resume from it
with a different number of processes::

    torchrun --standalone --nproc-per-node 2 examples/fsdp2_char_lm.py --resume
"""

import argparse
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F  # noqa: N812  (torch's own name for it)
from torch.optim import Optimizer
from train_char_lm import (
    MAX_GRAD_NORM,
    RULES,
    CharacterModel,
    Text,
    baselines,
    held_out_batches,
    learning_rate_factor,
    load_text,
    parameter_groups,
    positive,
    random_batch,
)

from emerging_optimizers import ScalarOptimizer
from emerging_optimizers.registry import get_optimizer_cls

DEFAULT_STEPS = 100
PRINT_EVERY = 10

# Learning rates and hyperparameters by registry name.
SETTINGS = {**RULES, "adamw": RULES["adam"]}

# The logits are a view, which is safe as long as nothing modifies them in place.
warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")


def join_processes() -> torch.device:
    """Join the process group that torchrun started; return this process's device."""
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    # Checkpoints exchange CPU data over gloo.
    dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    return device


def print_once(line: str) -> None:
    """Print a line, only in the first process."""
    if dist.get_rank() == 0:
        print(line, flush=True)


def make_model(text: Text, seed: int, device: torch.device) -> CharacterModel:
    """Return a model that is sharded over the processes."""
    torch.manual_seed(seed)  # the same initial weights in every process
    model = CharacterModel(text.num_symbols).to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def make_optimizer(name: str, model: nn.Module, num_steps: int) -> ScalarOptimizer:
    """Return the optimizer with this registry name."""
    settings = SETTINGS[name]
    optimizer_cls: Any = get_optimizer_cls(name)
    return optimizer_cls(parameter_groups(model), lr=settings.lr, **settings.options(num_steps))


def loss_of_share(model: nn.Module, batch: tuple[Tensor, Tensor], device: torch.device) -> Tensor:
    """Return the contribution of this process's rows to the mean loss of a batch."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    inputs, targets = (part[rank::world_size].to(device) for part in batch)
    total = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="sum")
    return total / batch[1].numel()


def sum_over_processes(loss: Tensor) -> float:
    """Return the sum of the processes' losses."""
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item()


def train_step(
    model: CharacterModel,
    optimizer: ScalarOptimizer,
    batch: tuple[Tensor, Tensor],
    device: torch.device,
) -> float:
    """Run one training step; return the loss before it."""
    optimizer.zero_grad()
    loss = loss_of_share(model, batch, device)
    (loss * dist.get_world_size()).backward()  # FSDP averages gradients over processes
    optimizer.step(max_norm=MAX_GRAD_NORM)
    return sum_over_processes(loss)


@torch.no_grad()
def evaluate(model: CharacterModel, text: Text, device: torch.device) -> float:
    """Return the mean held-out loss."""
    losses = [loss_of_share(model, batch, device) for batch in held_out_batches(text)]
    return sum_over_processes(torch.stack(losses).mean())


# --- Checkpoints ----------------------------------------------------------------------------------


def save(folder: Path, step: int, model: nn.Module, optimizer: Optimizer) -> None:
    """Write a checkpoint; each process writes its shards."""
    weights, states = get_state_dict(model, optimizer)
    path = folder / f"step-{step:06}"
    checkpoint.save({"model": weights, "optimizer": states, "step": step}, checkpoint_id=path)
    print_once(f"saved {path}")


def saved(folder: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first: ``.metadata`` is written last."""
    return sorted(path.parent for path in folder.glob("step-*/.metadata"))


def load(path: Path, model: nn.Module, optimizer: Optimizer) -> int:
    """Load a checkpoint, written by any number of processes; return its step."""
    weights, states = get_state_dict(model, optimizer)
    loaded = {"model": weights, "optimizer": states, "step": 0}
    checkpoint.load(loaded, checkpoint_id=path)
    set_state_dict(
        model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"]
    )
    print_once(f"loaded {path}")
    return loaded["step"]


# --- The script -----------------------------------------------------------------------------------


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train a small character model in several processes, with FSDP2.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--optimizer", choices=SETTINGS, default="adamw", help="registry name")
    parser.add_argument("--steps", type=positive, default=DEFAULT_STEPS, help="total steps")
    parser.add_argument("--stop-after", type=positive, help="stop early, to --resume later")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches")
    parser.add_argument(
        "--checkpoints", type=Path, default=Path("build/fsdp2_char_lm"), help="checkpoint folder"
    )
    parser.add_argument("--save-every", type=positive, default=50, help="steps between checkpoints")
    parser.add_argument("--resume", action="store_true", help="resume from the last checkpoint")
    return parser.parse_args()


def main() -> None:
    """Train, save, evaluate."""
    arguments = read_arguments()
    device = join_processes()
    print_once(f"{dist.get_world_size()} processes, {device.type}, {arguments.optimizer}")
    text = load_text()
    model = make_model(text, arguments.seed, device)
    optimizer = make_optimizer(arguments.optimizer, model, arguments.steps)

    done = 0
    checkpoints = saved(arguments.checkpoints)
    if arguments.resume:
        if not checkpoints:
            sys.exit(f"no checkpoint to resume from in {arguments.checkpoints}")
        done = load(checkpoints[-1], model, optimizer)
    elif checkpoints:
        sys.exit(f"{checkpoints[-1]} exists: pass --resume, or another --checkpoints folder")

    last = min(arguments.steps, arguments.stop_after or arguments.steps)
    for step in range(done + 1, last + 1):
        # Seeded by the step, so that a resumed run sees the same batches.
        batch = random_batch(text, torch.Generator().manual_seed(arguments.seed + step))
        for group in optimizer.param_groups:
            group["lr"] = SETTINGS[arguments.optimizer].lr * learning_rate_factor(
                step, arguments.steps
            )
        loss = train_step(model, optimizer, batch, device)
        if step == done + 1 or step % PRINT_EVERY == 0 or step == last:
            print_once(f"step {step:4}: loss {loss:.3f}")
        if step % arguments.save_every == 0 or step == last:
            save(arguments.checkpoints, step, model, optimizer)

    held_out, unigram = evaluate(model, text, device), baselines(text)["unigram"]
    print_once(f"held-out loss {held_out:.4f}; of guessing by frequency, {unigram:.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
