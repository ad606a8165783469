"""Train on shards of flat buffers, like Megatron-Core's distributed optimizer.

    torchrun --standalone --nproc-per-node 3 examples/megatron_shards.py

All bfloat16 parameters of the character model of ``train_char_lm.py`` are views of one flat buffer,
and their gradients are views of another. The buffers are cut into one shard per process, at any
element of any parameter. In a step, the gradients are reduce-scattered, each process updates its
shard, and the parameters are all-gathered. Besides the bfloat16 parameters, a process only holds
the states of its shard: two float32 averages, and the 16-bit remainders that extend the bfloat16
parameters to float32 master weights. Megatron itself is not needed.

As a check, each process also runs the same steps on unsharded parameters, as a single process
would. The exit status is 1 unless all parameters are bit-identical at the end.
"""

import argparse
import copy
import hashlib
import sys

import torch
import torch.distributed as dist
from fsdp2_char_lm import join_processes, print_once, sum_over_processes
from torch import Tensor, nn
from torch.optim import Optimizer
from train_char_lm import WEIGHT_DECAY, CharacterModel, load_text, positive, random_batch

from emerging_optimizers.megatron import FusedAdam

LR = 1e-3
PRINT_EVERY = 5


class FlatBuffers:
    """A model's parameters and gradients, each in one flat bfloat16 buffer, and a shard of both.

    Args:
        model: Its parameters become views of the buffer, one after the other.
        num_shards: The buffers are padded to a multiple of it.
        shard: The index of the shard that `optimizer` updates.
    """

    def __init__(self, model: nn.Module, num_shards: int, shard: int) -> None:
        model_params = list(model.parameters())
        device = model_params[0].device
        self.numel = sum(param.numel() for param in model_params)
        self.shard_numel = -(-self.numel // num_shards)
        padded = num_shards * self.shard_numel
        self.params = torch.zeros(padded, dtype=torch.bfloat16, device=device)
        self.grads = torch.zeros(padded, dtype=torch.bfloat16, device=device)
        self.num_shards = num_shards
        self.first = shard * self.shard_numel

        decayed: list[Tensor] = []
        others: list[Tensor] = []
        start = 0
        for param in model_params:
            end = start + param.numel()
            self.params[start:end].copy_(param.detach().flatten())
            param.data = self.params[start:end].view(param.shape)
            param.grad = self.grads[start:end].view(param.shape)  # backward adds to it
            first, last = max(start, self.first), min(end, self.first + self.shard_numel)
            if first < last:
                part = self.params[first:last]
                part.grad = self.grads[first:last]
                (decayed if param.ndim >= 2 else others).append(part)
            start = end
        self.optimizer = make_optimizer(decayed, others)

    def shard_of(self, buffer: Tensor) -> Tensor:
        """Return a view of this process's shard."""
        return buffer[self.first : self.first + self.shard_numel]

    def step(self) -> None:
        """Reduce-scatter the gradients, update the shard, and all-gather the parameters."""
        dist.reduce_scatter(self.shard_of(self.grads), list(self.grads.chunk(self.num_shards)))
        self.optimizer.step()
        dist.all_gather(list(self.params.chunk(self.num_shards)), self.shard_of(self.params))


def make_optimizer(decayed: list[Tensor], others: list[Tensor]) -> Optimizer:
    """Return the optimizer of one shard. Either list may be empty, and so may both."""
    groups = [
        {"params": decayed, "weight_decay": WEIGHT_DECAY},
        {"params": others, "weight_decay": 0.0},
    ]
    return FusedAdam(groups, lr=LR, master_weights=True, store_param_remainders=True)


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train on shards of flat bfloat16 buffers, in several processes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=positive, default=20)
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches")
    return parser.parse_args()


def main() -> int:
    """Train sharded and unsharded, compare, and return the exit status."""
    arguments = read_arguments()
    device = join_processes()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    text = load_text()
    torch.manual_seed(arguments.seed)  # the same initial weights in every process
    model = CharacterModel(text.num_symbols).to(device, torch.bfloat16)
    whole = FlatBuffers(copy.deepcopy(model), num_shards=1, shard=0)
    sharded = FlatBuffers(model, world_size, rank)

    shards: list[tuple[int, int]] = [(0, 0)] * world_size
    num_views = sum(len(group["params"]) for group in sharded.optimizer.param_groups)
    dist.all_gather_object(shards, (sharded.first, num_views))
    print_once(f"{sharded.numel:,} parameters, {world_size} processes, {device.type}")
    for number, (first, views) in enumerate(shards):
        print_once(f"process {number}: from element {first:,}, in {views} views")

    generator = torch.Generator().manual_seed(arguments.seed + rank)  # batches differ
    for step in range(1, arguments.steps + 1):
        sharded.grads.zero_()
        inputs, targets = random_batch(text, generator)
        loss = model.loss(inputs.to(device), targets.to(device)) / world_size
        loss.backward()
        sharded.step()

        # The result of a sum depends on its order, so both use the gradients of one reduction.
        summed = [torch.empty_like(sharded.shard_of(sharded.grads)) for _ in range(world_size)]
        dist.all_gather(summed, sharded.shard_of(sharded.grads))
        whole.grads.copy_(torch.cat(summed)[: whole.numel])
        whole.optimizer.step()
        mean_loss = sum_over_processes(loss)
        if step == 1 or step % PRINT_EVERY == 0 or step == arguments.steps:
            print_once(f"step {step:3}: loss {mean_loss:.3f}")

    results = [b.params[: b.numel].view(torch.int16) for b in (sharded, whole)]
    is_same = torch.equal(*results)
    digest, of_one = (hashlib.sha256(r.cpu().numpy().tobytes()).hexdigest()[:16] for r in results)
    print_once(f"sharded:     {digest}\none process: {of_one}")
    print_once(f"the same bits: {'yes' if is_same else 'NO'}")
    dist.destroy_process_group()
    return 0 if is_same else 1


if __name__ == "__main__":
    sys.exit(main())
