"""What optimizers with 8-bit states store, and what sharding does to them: other libraries' beside.

    python benchmarks/compare_peer_states.py                       # in some minutes
    python benchmarks/compare_peer_states.py --json benchmarks/results/peer-states.json

torchao's and bitsandbytes' AdamW are compared if they are installed; all on CPUs.

- *bytes*: of both states, for each element of a matrix.
- *zero below*: second moments smaller than this part of the largest in their block become 0; None
  if none does. *smallest*: the smallest that is stored otherwise.
- *two processes*: a matrix under FSDP2, compared with one process after five steps.
- *resharded*: the same, but the first three steps are taken by one process, and their states loaded
  by two, with ``torch.distributed.checkpoint``.

The last two are of matrices with 320 columns. Half of 96 rows is a multiple of 256 elements; half
of 100 rows is not.
"""

import argparse
import importlib.metadata
import importlib.util
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench_distributed import in_processes
from harness import describe_run, format_table, write_json
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from emerging_optimizers import AdamW
from emerging_optimizers._codes import UE5M3, decode

# torch 2.13 takes compiled code for AdamW8bit from its cache for AdamWFp8.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

BLOCK = 256  # a multiple of all group sizes
COLUMNS, ROWS = 320, (96, 100)
LAST = 5
ARGUMENTS: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.99)}
SMALLEST_TRIED = 2.0**-60

# ---- contenders ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """An optimizer with 8-bit states.

    Attributes:
        make: Creates it for parameters.
        second_moment: Returns the numbers that a parameter's state stands for.
        package: What must be installed.
    """

    make: Callable[[list[Tensor]], Any]
    second_moment: Callable[[dict[str, Any]], Tensor]
    package: str = "emerging_optimizers"

    @property
    def is_installed(self) -> bool:
        """Whether it can be measured."""
        return importlib.util.find_spec(self.package) is not None


def _from_torchao(name: str) -> Peer:
    def make(params: list[Tensor]) -> Any:
        import torchao.optim

        return getattr(torchao.optim, name)(params, **ARGUMENTS)

    return Peer(make, lambda state: state["exp_avg_sq"].dequantize(), "torchao")


def _bitsandbytes(params: list[Tensor]) -> Any:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(params, **ARGUMENTS)


def _second_moment_of_bitsandbytes(state: dict[str, Any]) -> Tensor:
    numbers: Tensor = state["qmap2"][state["state2"].long()]
    return numbers * state["absmax2"].repeat_interleave(BLOCK).view_as(numbers)


PEERS = {
    "this package": Peer(
        lambda params: AdamW(params, state_dtype="8bit", **ARGUMENTS),
        lambda state: decode(state["exp_avg_sq"], state["exp_avg_sq_scale"], UE5M3),
    ),
    "torchao AdamW8bit": _from_torchao("AdamW8bit"),
    "torchao AdamWFp8": _from_torchao("AdamWFp8"),
    "bitsandbytes AdamW8bit": Peer(_bitsandbytes, _second_moment_of_bitsandbytes, "bitsandbytes"),
}

# ---- on one process ------------------------------------------------------------------------------


def step_once(peer: Peer, grad: Tensor) -> dict[str, Any]:
    """Return a parameter's state after one step."""
    param = nn.Parameter(torch.zeros_like(grad))
    optimizer = peer.make([param])
    param.grad = grad
    optimizer.step()
    state: dict[str, Any] = optimizer.state[param]
    return state


def bytes_of(value: Any) -> int:
    """Return how many bytes a state takes; one that wraps others takes those."""
    inner = [getattr(value, name) for name in getattr(value, "tensor_attrs", ())]
    if inner:
        return sum(map(bytes_of, inner))
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def bytes_per_element(peer: Peer) -> float:
    """Return how many bytes both states of a matrix take for an element."""
    grad = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    return sum(map(bytes_of, step_once(peer, grad).values())) / grad.numel()


def stored(peer: Peer, ratios: Tensor) -> Tensor:
    """Return what second moments are stored as; both are relative to the largest in their block."""
    grad = ratios.sqrt().unsqueeze(1).repeat(1, BLOCK)
    grad[:, 0] = 1.0
    numbers = peer.second_moment(step_once(peer, grad))
    return numbers[:, 1] / numbers[:, 0]


def smallest_moments(peer: Peer) -> tuple[float | None, float]:
    """Return below which part of the largest they become 0, and the smallest other one."""
    low, high = SMALLEST_TRIED, 1.0
    while high / low > 1.00001:
        ratios = torch.logspace(math.log2(low), math.log2(high), 64, base=2.0)
        numbers = stored(peer, ratios)
        zeros = int((numbers == 0).sum())
        if zeros == 0:
            return None, numbers[0].item()
        low, high = ratios[zeros - 1].item(), ratios[zeros].item()
    return high, numbers[zeros].item()


# ---- on several processes ------------------------------------------------------------------------


class Run:
    """An optimizer of one matrix, sharded by FSDP2."""

    def __init__(self, name: str, rows: int) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(COLUMNS, rows, bias=False)
        fully_shard(self.model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        self.weight: Any = self.model.weight
        self.optimizer = PEERS[name].make([self.weight])

    def steps(self, numbers: Sequence[int]) -> None:
        """Take steps, whose numbers determine the gradients."""
        for number in numbers:
            generator = torch.Generator().manual_seed(number)
            grad = torch.randn(self.weight.shape, generator=generator)
            self.weight.grad = self._shard(grad)
            self.optimizer.step()

    def _shard(self, whole: Tensor) -> DTensor:
        return distribute_tensor(whole, self.weight.device_mesh, self.weight.placements)

    def result(self) -> Tensor:
        """Return the weights."""
        whole: Tensor = self.weight.full_tensor().detach()
        return whole

    def save(self, folder: str) -> None:
        """Save the weights and the states."""
        torch.save(self.result(), Path(folder, "weight"))
        states = get_optimizer_state_dict(self.model, self.optimizer)
        checkpoint.save(states, checkpoint_id=Path(folder, "states"))

    def load(self, folder: str) -> None:
        """Load what any number of processes saved."""
        self.steps([0])  # creates the states
        states = get_optimizer_state_dict(self.model, self.optimizer)
        checkpoint.load(states, checkpoint_id=Path(folder, "states"))
        set_optimizer_state_dict(self.model, self.optimizer, states)
        with torch.no_grad():
            self.weight.copy_(self._shard(torch.load(Path(folder, "weight"))))


def train(rank: int, name: str, rows: int) -> Tensor | str:
    """Return the weights after all steps, or the error."""
    try:
        run = Run(name, rows)
        run.steps(range(1, LAST + 1))
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return run.result()


def save(rank: int, name: str, rows: int, folder: str) -> None:
    """Take the first steps, and save."""
    run = Run(name, rows)
    run.steps(range(1, 4))
    run.save(folder)


def resume(rank: int, name: str, rows: int, folder: str) -> Tensor | str:
    """Return the weights after all steps, the first of which were saved, or the error."""
    try:
        run = Run(name, rows)
        run.load(folder)
        run.steps(range(4, LAST + 1))
    except checkpoint.CheckpointException as error:
        (first, *_) = error.failures.values()
        return f"{type(first[0]).__name__}: {first[0]}"
    return run.result()


def compared(found: Tensor | str, wanted: Tensor | str) -> str:
    """Return how a result differs from one process's."""
    if isinstance(found, str) or isinstance(wanted, str):
        return found if isinstance(found, str) else str(wanted)
    if torch.equal(found, wanted):
        return "the same bits"
    return f"differs by up to {(found - wanted).abs().max():.2g}"


# ---- figures -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """Something of an optimizer."""

    peer: str
    what: str
    value: float | str | None


def measure(name: str) -> Iterator[Figure]:
    """Yield all figures of an optimizer."""
    print(f"{name} ...", file=sys.stderr, flush=True)
    peer = PEERS[name]
    yield Figure(name, "bytes", bytes_per_element(peer))
    zero_below, smallest = smallest_moments(peer)
    yield Figure(name, "zero below", zero_below)
    yield Figure(name, "smallest", smallest)
    for rows in ROWS:
        alone = in_processes(1, train, name, rows)
        value = compared(in_processes(2, train, name, rows), alone)
        yield Figure(name, f"two processes, {rows} rows", value)
        if isinstance(alone, str):
            continue
        with tempfile.TemporaryDirectory() as folder:
            in_processes(1, save, name, rows, folder)
            value = compared(in_processes(2, resume, name, rows, folder), alone)
        yield Figure(name, f"resharded, {rows} rows", value)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = [name for name, peer in PEERS.items() if peer.is_installed]
    figures = [figure for name in names for figure in measure(name)]
    print(
        format_table(["optimizer", "", "value"], [[f.peer, f.what, str(f.value)] for f in figures])
    )
    if arguments.json:
        packages = sorted({PEERS[name].package for name in names} - {"emerging_optimizers"})
        versions = {package: importlib.metadata.version(package) for package in packages}
        write_json(arguments.json, {"run": {**describe_run(), **versions}, "figures": figures})


if __name__ == "__main__":
    main()
