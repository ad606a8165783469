"""Workers of the distributed tests: functions that `processes.launch` runs in each process."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from optimizers import SETUPS, VARIANTS, make_grads
from support import assert_equal_bits
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from emerging_optimizers import AdamW, LaProp

# By name: how to make it, whether it takes only matrices, and its tolerance.
CASES: list[tuple[str, Callable[..., Any], bool, float]] = [
    (setup.name, setup.make, "scaling" in setup.name, 0.0)
    for setup in [*SETUPS, *(v for v in VARIANTS if "scaling" in v.name)]
]


def frob_normalized(params: Any, **arguments: Any) -> LaProp:
    return LaProp(params, frob_normalize=True, **arguments)


# Its norms are sums over processes, in a different order.
CASES.append(("LaProp frob_normalize", frob_normalized, False, 1e-6))


class Block(nn.Module):
    """A transformer layer whose sizes are not divisible by any number of processes but 1."""

    def __init__(self, width: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.down(nn.functional.gelu(self.up(x)))


class Transformer(nn.Module):
    """A language model of 11 characters."""

    def __init__(self, bias: bool, width: int = 7, hidden: int = 13) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.blocks = nn.ModuleList([Block(width, hidden, bias)])
        # One row: all processes but one have an empty shard of it.
        self.gate = nn.Linear(width, 1, bias=bias)
        self.head = nn.Linear(width, 11, bias=bias)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x * self.gate(x).sigmoid())


def make_model(bias: bool, **sizes: int) -> Transformer:
    torch.manual_seed(0)
    return Transformer(bias, **sizes)


def next_batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    """A sequence that counts upwards, so that there is something to learn."""
    start = torch.Generator().manual_seed(1000 * step + rank)
    tokens = torch.randint(11, (4, 1), generator=start) + torch.arange(9)
    return tokens[:, :-1] % 11, tokens[:, 1:] % 11


def backward(
    model: nn.Module, step: int, rank: int, scale: Callable[[Tensor], Tensor] = lambda loss: loss
) -> float:
    tokens, targets = next_batch(step, rank)
    loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    scale(loss).backward()
    return loss.item()


def full(tensor: Any) -> Tensor:
    whole: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach()


def shard(model: Transformer, kind: str) -> None:
    """Shard a model's parameters."""
    world_size = dist.get_world_size()
    if kind == "2-D":
        mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("data", "tensor"))
        for block in model.blocks:
            assert isinstance(block, Block)
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(block, mesh["tensor"], plan)
        options: dict[str, Any] = {"mesh": mesh["data"]}
    else:
        options = {"mesh": init_device_mesh("cpu", (world_size,))}
    if kind == "mixed precision":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)


def train_sharded(rank: int, folder: Path, kind: str) -> None:
    """Train shards, and unsharded parameters with the gathered gradients; compare the bits."""
    steps = 3 if kind == "2-D" else 6
    for name, make, is_of_matrices, tolerance in CASES:
        sizes = {"hidden": 12} if kind == "2-D" else {}
        model, other = (make_model(not is_of_matrices, **sizes) for _ in range(2))
        shard(model, kind)
        params, others = list(model.parameters()), list(other.parameters())
        assert all(isinstance(p, DTensor) for p in params)
        options = {"lr": 0.003, "fused": True}
        if "frob" not in name:
            options["weight_decay"] = 0.1
        optimizer, reference = make(params, **options), make(others, **options)
        losses = []
        for step in range(steps):
            losses.append(backward(model, step, rank))
            for p, q in zip(params, others, strict=True):
                q.grad = full(p.grad)
            optimizer.step()
            reference.step()
            optimizer.zero_grad()
        # Three steps are too few for every rule to learn: only the bits are compared.
        assert kind == "2-D" or min(losses[1:]) < losses[0], (name, losses)
        for (label, p), q in zip(model.named_parameters(), others, strict=True):
            state, wanted = optimizer.state[p], reference.state[q]
            assert state.keys() == wanted.keys()
            for key in state:
                if key == "step":
                    assert state[key].item() == wanted[key].item() == steps
                    continue
                assert isinstance(state[key], DTensor), (name, key)
                assert state[key].placements == p.placements, (name, key)
            tensors = [(p, q), *((state[key], wanted[key]) for key in state if key != "step")]
            for got, expected in tensors:
                if tolerance:
                    torch.testing.assert_close(full(got), full(expected), rtol=1e-4, atol=1e-6)
                else:
                    assert_equal_bits(full(got), full(expected), f"{name} {label}")
            if tolerance:
                assert abs(full(p).norm() / full(q).norm() - 1) < tolerance


def train_replicas(rank: int, folder: Path, sharded_states: str) -> None:
    """DDP: after 15 steps, the parameters are bit-identical on all processes."""
    # It warns about its use of torch.jit.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    for name, make, is_of_matrices, _ in CASES:
        model = DistributedDataParallel(make_model(not is_of_matrices))
        if sharded_states == "ZeRO":
            optimizer: Any = ZeroRedundancyOptimizer(model.parameters(), make, lr=0.003)
        else:
            optimizer = make(model.parameters(), lr=0.003)
        losses = []
        for step in range(15):
            optimizer.zero_grad()
            losses.append(backward(model, step, rank))
            optimizer.step()
        assert min(losses[5:]) < losses[0], (name, losses)
        for label, param in model.named_parameters():
            first = param.detach().clone()
            dist.broadcast(first, 0)
            assert_equal_bits(param.detach(), first, f"{name} {label}")


def set_recorded_grads(params: Sequence[Any], step: int) -> None:
    """Set the same full gradients for any number of processes."""
    grads = make_grads([full(p) for p in params], step)
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
        if isinstance(param, DTensor):
            param.grad = distribute_tensor(grad, param.device_mesh, param.placements)


def run_recorded(optimizer: Any, params: Sequence[Any], steps: Sequence[int]) -> None:
    for step in steps:
        set_recorded_grads(params, step)
        optimizer.step()
    optimizer.zero_grad()


def with_masters(params: Any, **arguments: Any) -> AdamW:
    return AdamW(params, master_weights=True, state_dtype=torch.bfloat16, **arguments)


def with_split_masters(params: Any, **arguments: Any) -> AdamW:
    return AdamW(params, master_weights="split", state_dtype=torch.float32, **arguments)


CHECKPOINTS = [
    *CASES,
    ("AdamW bfloat16", with_masters, False, 0.0),
    ("AdamW bfloat16, split masters", with_split_masters, False, 0.0),
]


def dtype_of(name: str) -> torch.dtype:
    return torch.bfloat16 if "bfloat16" in name else torch.float32


def save_checkpoints(rank: int, folder: Path) -> None:
    for name, make, is_of_matrices, _ in CHECKPOINTS:
        model = make_model(not is_of_matrices).to(dtype_of(name))
        shard(model, "float32")
        optimizer = make(model.parameters(), lr=0.01)
        run_recorded(optimizer, list(model.parameters()), [1, 2, 3])
        weights, states = get_state_dict(model, optimizer)
        checkpoint.save({"model": weights, "optimizer": states}, checkpoint_id=folder / name)


def resume_checkpoints(rank: int, folder: Path) -> None:
    """Load, possibly with another number of processes, and continue as without interruption."""
    for name, make, is_of_matrices, tolerance in CHECKPOINTS:
        torch.manual_seed(1)
        model = Transformer(not is_of_matrices).to(dtype_of(name))
        other = make_model(not is_of_matrices).to(dtype_of(name))
        shard(model, "float32")
        optimizer = make(model.parameters(), lr=0.02)
        before = [full(p).clone() for p in model.parameters()]
        # Creates missing states by a step with lr 0.
        weights, states = get_state_dict(model, optimizer)
        for p, old in zip(model.parameters(), before, strict=True):
            assert_equal_bits(full(p), old, f"{name}: moved by the making of states")
        loaded = {"model": weights, "optimizer": states}
        checkpoint.load(loaded, checkpoint_id=folder / name)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=loaded["model"],
            optim_state_dict=loaded["optimizer"],
        )
        assert optimizer.param_groups[0]["lr"] == 0.01
        run_recorded(optimizer, list(model.parameters()), [4, 5, 6])
        reference = make(other.parameters(), lr=0.01)
        run_recorded(reference, list(other.parameters()), range(1, 7))
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert optimizer.state[p]["step"].item() == 6
            if tolerance:
                torch.testing.assert_close(full(p), full(q), rtol=1e-5, atol=1e-6)
            else:
                assert_equal_bits(full(p), full(q), name)
