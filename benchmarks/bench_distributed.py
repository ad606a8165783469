"""What an optimizer's step costs each of several processes that share the parameters, over gloo.

    python benchmarks/bench_distributed.py                     # all of it, some two minutes
    python benchmarks/bench_distributed.py --json build/x.json

Parameters, gradients and states are DTensors, as FSDP2 makes them. Three questions:

- Does a step's processor time in each of 1, 2 and 4 processes fall as the shard does? The total is
  so small that the last-level cache holds it. Each process uses one thread; where there are fewer
  cores, processes wait for each other, which is no processor time.
- How long is a step at a size that no cache holds? This depends on how many cores there are, and on
  how much memory bandwidth.
- What does the way through DTensors cost a small parameter, here and in PyTorch's fused AdamW, on
  the same DTensors?

All are checked first: against the same steps in float64, and shards against the bits of the whole.
All numbers of processes take turns in the same 4 processes, with a barrier before each sample.
"""

import argparse
import gc
import os
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from harness import (
    Comparison,
    ProcessorTime,
    Ratio,
    Samples,
    Verdict,
    WrongResultError,
    busy_warning,
    compare,
    describe_run,
    format_ratio,
    format_table,
    report_targets,
    significant,
    write_json,
)
from problems import RULES, SHAPES, OptimizerProblem, Shape
from step_contenders import STEP_CONTENDERS, check_steps
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

WORLD_SIZES = (1, 2, 4)
RULE = RULES["adam"]
OURS = STEP_CONTENDERS["package"]
FUSED = STEP_CONTENDERS["fused"]

CACHED = Shape("cached", "one parameter of 512 Ki elements", [(2048, 256)])
LARGE = Shape("large", "one parameter of 16 Mi elements", [(16384, 1024)])
SMALL = SHAPES["1000x8"]  # of each process
CHECKED_STEPS = 3

# ---- what is to be reached -----------------------------------------------------------------------

# With n processes, a step takes each of them at most 1 / (0.85 n) of the processor time.
SCALING = 0.85
# At many small parameters, PyTorch's fused step on the same DTensors takes so many times as long.
TIMES_CHEAPER = 5.0
HOST_ROUNDS = 31

# ---- in each process -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Contest:
    """A shape whose parameters are shared, and how a step on it is timed.

    Attributes:
        shape: The shape of the whole.
        clock: Returns seconds.
        of_processes: What the seconds of the processes amount to.
        rounds: Samples of each number of processes.
        calls: Steps of a sample: of short ones so many that it takes a millisecond, beside which
            the clock, and caches that are cold after a barrier, are little.
    """

    shape: Shape
    clock: Callable[[], float]
    of_processes: Callable[[Sequence[float]], float]
    rounds: int
    calls: int


def as_shards(problem: OptimizerProblem, mesh: DeviceMesh) -> OptimizerProblem:
    """Return a problem on DTensors of which this process has the problem's own tensors.

    As with FSDP2, a gradient has its parameter's own specification of where it is, and the states,
    which are made as zeros_like(param), have one in common.
    """
    sharded: Any = problem.mapped(
        lambda tensors: [
            DTensor.from_local(tensor, mesh, [Shard(0)], run_check=False) for tensor in tensors
        ]
    )
    for param, grad, *states in zip(sharded.params, sharded.grads, *sharded.states, strict=True):
        grad._spec = param._spec
        like_param: Any = torch.zeros_like(param)
        for state in states:
            state._spec = like_param._spec
    return sharded  # type: ignore[no-any-return]


def part_of(problem: OptimizerProblem, rank: int, world_size: int) -> OptimizerProblem:
    """Return the problem that is left to a process, on copies that begin at a page each.

    Where tensors lie, relative to each other, must not depend on the shard's size: on a Zen 4, a
    step takes up to 40 % longer where they are 64 bytes apart but for whole pages, for then a load
    has the last 12 bits of its address in common with a store that has just been issued.
    """
    return problem.mapped(lambda tensors: [at_page(t.chunk(world_size)[rank]) for t in tensors])


def at_page(tensor: Tensor, page: int = 4096) -> Tensor:
    """Return a copy whose memory begins at a multiple of so many bytes."""
    buffer = tensor.new_empty(tensor.numel() + page // tensor.itemsize)
    skipped = -buffer.data_ptr() % page // tensor.itemsize
    return buffer[skipped : skipped + tensor.numel()].view(tensor.shape).copy_(tensor)


def check_bits(
    whole: OptimizerProblem, part: OptimizerProblem, mesh: DeviceMesh, rank: int
) -> None:
    """Raise unless some steps on the shards have the bits of those on the whole."""
    whole = part_of(whole, 0, 1)
    steps = [OURS.prepare(whole), OURS.prepare(as_shards(part, mesh))]
    for _ in range(CHECKED_STEPS):
        for step in steps:
            step()
    wanted = part_of(whole, rank, mesh.size())
    for got, expected in zip(part.modified, wanted.modified, strict=True):
        if not all(map(torch.equal, got, expected)):
            raise WrongResultError(f"process {rank} of {mesh.size()}: not the bits of the whole")


def prepare(shape: Shape, meshes: Mapping[int, DeviceMesh], rank: int) -> dict[str, Any]:
    """Return a step for each number of processes of which this is one, checked."""
    whole = OptimizerProblem(RULE, shape)
    steps: dict[str, Any] = {}
    for world_size, mesh in meshes.items():
        if rank >= world_size:
            continue
        part = part_of(whole, rank, world_size)
        check_bits(whole, part, mesh, rank)
        step = OURS.prepare(as_shards(part, mesh))
        check_steps(part, [OURS], {OURS.name: step})
        steps[str(world_size)] = step
    # What a step costs that has nothing to do.
    empty = Shape("empty", "one parameter of no elements", [(0, *shape.sizes[0][1:])])
    steps["empty"] = OURS.prepare(as_shards(OptimizerProblem(RULE, empty), meshes[4]))
    return steps


def take_turns(steps: Mapping[str, Callable[[], object]], contest: Contest) -> Comparison:
    """Time the steps in turn; to be called by all processes, of which some have fewer steps."""
    names = [*map(str, WORLD_SIZES), "empty"]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    processor = ProcessorTime.now()
    for number in range(contest.rounds):
        for name in names if number % 2 == 0 else reversed(names):
            step = steps.get(name)
            dist.barrier()
            if step is None:
                continue
            step()  # brings the tensors into the caches
            start = contest.clock()
            for _ in repeat(None, contest.calls):
                step()
            seconds[name].append((contest.clock() - start) / contest.calls)
    gc.enable()
    of_all: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, (seconds, processor.used()))
    samples = {}
    for name in names:
        by_process = [theirs[name] for theirs, _ in of_all if theirs[name]]
        by_round = map(contest.of_processes, zip(*by_process, strict=True))
        samples[name] = Samples(contest.calls, dict(enumerate(by_round)))
    return Comparison(samples, processor.taken_by_others(sum(used for _, used in of_all)))


def measure_shards(rank: int, contests: Sequence[Contest]) -> list[Comparison]:
    """Return the times of a step by the number of processes, for each contest."""
    meshes = {n: DeviceMesh("cpu", list(range(n))) for n in WORLD_SIZES}
    return [take_turns(prepare(c.shape, meshes, rank), c) for c in contests]


def measure_host(rank: int, budget: float) -> Comparison | None:
    """Return what many small parameters cost as DTensors, and as tensors; in one process."""
    mesh = DeviceMesh("cpu", list(range(dist.get_world_size())))
    result = None
    if rank == 0:
        problem = OptimizerProblem(RULE, SMALL)
        sharded = as_shards(problem, mesh)
        contenders = [OURS, FUSED]
        steps = {c.name: c.prepare(sharded) for c in contenders}
        plain = {f"{c.name}, tensors": c.prepare(problem) for c in contenders}
        check_steps(problem, contenders, steps)
        result = compare({**steps, **plain}, budget, min_rounds={FUSED.name: HOST_ROUNDS})
    dist.barrier()
    return result


# ---- from one process to several -----------------------------------------------------------------


def in_processes(world_size: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function with each process's rank, and return what the first one's returns."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(
            _process, (world_size, folder, function, *arguments), nprocs=world_size
        )
        return pickle.loads(Path(folder, "result").read_bytes())


def _process(
    rank: int, world_size: int, folder: str, function: Callable[..., Any], *arguments: Any
) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    result = function(rank, *arguments)
    if rank == 0:
        Path(folder, "result").write_bytes(pickle.dumps(result))
    dist.destroy_process_group()


# ---- reporting -----------------------------------------------------------------------------------


def scaling(comparison: Comparison, name: str) -> Ratio | None:
    """Return 1 where the time has fallen as the shard, less where it has fallen by less."""
    ratio = comparison.ratio("1", name)
    return None if name == "empty" or ratio is None else ratio.scaled(1 / int(name))


def scaling_of_elements(comparison: Comparison, name: str) -> float | None:
    """Return the same of the medians, less what a step costs that has nothing to do."""
    if name == "empty":
        return None
    one, some, empty = (comparison.samples[key].median for key in ("1", name, "empty"))
    return (one - empty) / (some - empty) / int(name)


def report_shards(title: str, comparison: Comparison) -> str:
    """Return the table of a shape whose parameters are shared."""
    header = ["processes", "elements of each", "us", "min us", "part of ideal", "less the empty's"]
    rows = []
    for name, samples in comparison.samples.items():
        elements = scaling_of_elements(comparison, name)
        rows.append(
            [
                "4" if name == "empty" else name,
                "none" if name == "empty" else f"1 / {name}",
                significant(samples.median * 1e6),
                significant(samples.minimum * 1e6),
                format_ratio(scaling(comparison, name)),
                "-" if elements is None else f"{elements:.2f}",
            ]
        )
    return f"\n{title}\n\n{format_table(header, rows)}{busy_warning([comparison])}"


def report_host(title: str, comparison: Comparison) -> str:
    """Return the table of many small parameters."""
    header = ["contender", "on", "us per parameter", "min", "times ours"]
    rows = []
    for name, samples in comparison.samples.items():
        contender, _, kind = name.partition(", ")
        per_param = 1e6 / len(SMALL.sizes)
        rows.append(
            [
                STEP_CONTENDERS[contender].title,
                kind or "DTensors",
                f"{samples.median * per_param:.2f}",
                f"{samples.minimum * per_param:.2f}",
                format_ratio(comparison.ratio(name, OURS.name)),
            ]
        )
    return f"\n{title}\n\n{format_table(header, rows)}{busy_warning([comparison])}"


def figures(what: str, compared_with: str, comparison: Comparison) -> list[dict[str, Any]]:
    """Return rows for the JSON report."""
    return [
        {
            "what": what,
            "who": name,
            "rounds": len(samples.seconds),
            "calls_per_sample": samples.calls,
            "median_seconds": samples.median,
            "min_seconds": samples.minimum,
            "compared_with": compared_with,
            "times_as_long": comparison.ratio(name, compared_with),
            "processor_taken_by_others": comparison.taken_by_others,
        }
        for name, samples in comparison.samples.items()
    ]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=301, help="samples of processor time")
    parser.add_argument("--budget", type=float, default=8.0, help="seconds per number of processes")
    parser.add_argument("--json", type=Path, help="where to write every figure")
    return parser.parse_args()


def main() -> None:
    """Run the suite."""
    arguments = parse_arguments()
    torch.set_num_threads(1)
    run = {**describe_run(), "load_average": os.getloadavg()[0]}
    print("\n".join(f"{key}: {value}" for key, value in run.items()), flush=True)

    contests = (
        Contest(CACHED, time.process_time, statistics.fmean, arguments.rounds, calls=20),
        Contest(LARGE, time.perf_counter, max, rounds=31, calls=3),
    )
    cached, large = in_processes(max(WORLD_SIZES), measure_shards, contests)
    titles = (
        f"{CACHED.title}: processor time of a step in each process",
        f"{LARGE.title}: wall time of a step until the last process is done",
    )
    for title, comparison in zip(titles, (cached, large), strict=True):
        print(report_shards(title, comparison), flush=True)

    reached = []
    for world_size in WORLD_SIZES[1:]:
        ratio = scaling(cached, str(world_size))
        met = ratio is not None and ratio.median >= SCALING
        target = f"{CACHED.title}: part of ideal, {world_size} processes"
        reached.append(Verdict(target, RULE.optimizer.__name__, f">= {SCALING:g}", ratio, met))

    rows = [row for t, c in zip(titles, (cached, large), strict=True) for row in figures(t, "1", c)]
    for world_size in WORLD_SIZES[:2]:
        title = f"{SMALL.title} in each process, mesh of {world_size}"
        comparison = in_processes(world_size, measure_host, arguments.budget)
        print(report_host(title, comparison), flush=True)
        rows += figures(title, OURS.name, comparison)
        ratio = comparison.ratio(FUSED.name, OURS.name)
        met = ratio is not None and ratio.median >= TIMES_CHEAPER
        target = f"{title}: {FUSED.name} / {OURS.name}"
        reached.append(
            Verdict(target, RULE.optimizer.__name__, f">= {TIMES_CHEAPER:g}", ratio, met)
        )

    print(report_targets(reached))
    if arguments.json is not None:
        write_json(arguments.json, {"run": run, "figures": rows, "targets": reached})


if __name__ == "__main__":
    main()
