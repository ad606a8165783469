"""Train the character model of ``train_char_lm.py`` in several processes, sharded with FSDP2.

    torchrun --standalone --nproc-per-node 4 examples/fsdp2_char_lm.py

On GPUs, each process has one and they talk over NCCL; elsewhere they compute on the CPU and talk
over gloo. ``fully_shard`` makes each parameter, its gradient and its optimizer states DTensors, of
which each process has, and steps, a part. ``--optimizer`` is any of this package's, by its name in
``emerging_optimizers.registry``.

All processes share the rows of each batch, so that their number changes nothing but the order of
sums. A run is saved every ``--save-every`` steps and at its end, and goes on from there, with as
many processes as are there then::

    torchrun --standalone --nproc-per-node 2 examples/fsdp2_char_lm.py --resume
"""

import argparse
import os
import sys
import warnings
from pathlib import Path

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

from emerging_optimizers.registry import get_optimizer_cls

DEFAULT_STEPS = 100
PRINT_EVERY = 10

# Learning rates and hyperparameters, by the optimizers' names in the registry.
SETTINGS = {**RULES, "adamw": RULES["adam"]}

# The logits are a view, which is safe as long as nothing modifies them in place.
warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")


def join_processes() -> torch.device:
    """Meet the other processes that torchrun started, and return the device of this one."""
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    # gloo as well, for what checkpoints exchange between hosts.
    dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    return device


def print_once(line: str) -> None:
    """Print a line, in the first process only."""
    if dist.get_rank() == 0:
        print(line, flush=True)


def make_model(text: Text, seed: int, device: torch.device) -> CharacterModel:
    """Return a model of which each process has a part."""
    torch.manual_seed(seed)  # the same initial weights in every process
    model = CharacterModel(text.num_symbols).to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def make_optimizer(name: str, model: nn.Module, num_steps: int) -> Optimizer:
    """Return the optimizer that the registry has under this name."""
    settings = SETTINGS[name]
    optimizer_cls = get_optimizer_cls(name)
    return optimizer_cls(parameter_groups(model), lr=settings.lr, **settings.options(num_steps))


def loss_of_share(model: nn.Module, batch: tuple[Tensor, Tensor], device: torch.device) -> Tensor:
    """Return what this process's rows of a batch add to the mean loss of all of it."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    inputs, targets = (part[rank::world_size].to(device) for part in batch)
    total = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="sum")
    return total / batch[1].numel()


def sum_over_processes(loss: Tensor) -> float:
    """Return the sum of what each process has."""
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item()


def train_step(
    model: CharacterModel,
    optimizer: Optimizer,
    batch: tuple[Tensor, Tensor],
    device: torch.device,
) -> float:
    """Do one step, and return the loss before it."""
    optimizer.zero_grad()
    loss = loss_of_share(model, batch, device)
    (loss * dist.get_world_size()).backward()  # FSDP takes the mean of the processes' gradients
    nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
    optimizer.step()
    return sum_over_processes(loss)


@torch.no_grad()
def evaluate(model: CharacterModel, text: Text, device: torch.device) -> float:
    """Return the mean held-out loss."""
    losses = [loss_of_share(model, batch, device) for batch in held_out_batches(text)]
    return sum_over_processes(torch.stack(losses).mean())


# --- Checkpoints ----------------------------------------------------------------------------------


def save(folder: Path, step: int, model: nn.Module, optimizer: Optimizer) -> None:
    """Write a checkpoint, each process its part."""
    weights, states = get_state_dict(model, optimizer)
    path = folder / f"step-{step:06}"
    checkpoint.save({"model": weights, "optimizer": states, "step": step}, checkpoint_id=path)
    print_once(f"saved {path}")


def saved(folder: Path) -> list[Path]:
    """Return the checkpoints that are complete, the oldest first: ``.metadata`` is written last."""
    return sorted(path.parent for path in folder.glob("step-*/.metadata"))


def load(path: Path, model: nn.Module, optimizer: Optimizer) -> int:
    """Go back to a checkpoint, whatever number of processes wrote it, and return its step."""
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
    parser.add_argument("--optimizer", choices=SETTINGS, default="adamw", help="its name")
    parser.add_argument("--steps", type=positive, default=DEFAULT_STEPS, help="of the whole run")
    parser.add_argument("--stop-after", type=positive, help="leave the rest to --resume")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches")
    parser.add_argument(
        "--checkpoints", type=Path, default=Path("build/fsdp2_char_lm"), help="their folder"
    )
    parser.add_argument("--save-every", type=positive, default=50, help="steps")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
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
            sys.exit(f"there is no checkpoint in {arguments.checkpoints} to resume from")
        done = load(checkpoints[-1], model, optimizer)
    elif checkpoints:
        sys.exit(f"{checkpoints[-1]} is there: --resume goes on from it")

    last = min(arguments.steps, arguments.stop_after or arguments.steps)
    for step in range(done + 1, last + 1):
        # From the step alone, so that a run that goes on sees what it would have seen.
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
