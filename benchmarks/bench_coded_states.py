"""AdamW with 8-bit states: bytes of a parameter, and a step's time beside others.

    python benchmarks/bench_coded_states.py                    # all of it, some two minutes
    python benchmarks/bench_coded_states.py --json build/x.json
    python benchmarks/bench_coded_states.py --device cuda      # the device alone, by its clock

Peers are measured if they are installed: torchao's and bitsandbytes' AdamW with 8-bit states. Each
contender has parameters and states of its own. All start with the same parameters, have the same
gradients, and are checked first against PyTorch's AdamW in float32.
"""

import argparse
import gc
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from cuda_device import DeviceClock, Gpu
from gpu import describe_gpu, why_no_gpu
from harness import (
    Clock,
    Comparison,
    Ratio,
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
from problems import SHAPES, Shape
from torch import Tensor
from torch.optim import Optimizer

from emerging_optimizers.scalar_optimizers import AdamW

ARGUMENTS: dict[str, Any] = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.01,
}
MATRICES = Shape("1000x64x64", "1000 matrices of 64 x 64", [(64, 64)] * 1000)
LARGE_MATRIX = (4096, 4096)
CHECKED_STEPS = 5
# The root mean square of a parameter's error after the checked steps, as a part of its movement.
# Rounding a state to 8 bits is off by some 3 % on average.
WORST_ERROR = 0.1

# ---- contenders ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """One way of performing an AdamW step.

    Attributes:
        name: What the report calls it.
        make: Makes the optimizer.
        dtype: The dtype of the parameters and their gradients.
        package: What must be installed.
    """

    name: str
    make: Callable[[Sequence[Tensor]], Optimizer]
    dtype: torch.dtype = torch.float32
    package: str = "torch"

    @property
    def version(self) -> str | None:
        """The package's version; None if it is not installed."""
        if importlib.util.find_spec(self.package) is None:
            return None
        return importlib.metadata.version(self.package)


def _torchao(params: Sequence[Tensor]) -> Optimizer:
    from torchao.optim import AdamW8bit

    made: Optimizer = AdamW8bit(params, **ARGUMENTS)
    return made


def _bitsandbytes(params: Sequence[Tensor]) -> Optimizer:
    from bitsandbytes.optim import AdamW8bit

    made: Optimizer = AdamW8bit(params, **ARGUMENTS)
    return made


OURS = "8-bit"
SMALLEST = "8-bit, bfloat16, split masters"
FLOAT32 = "float32"
FUSED = "torch fused, float32"
TORCHAO = "torchao 8-bit"
BITSANDBYTES = "bitsandbytes 8-bit"

CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender(OURS, lambda params: AdamW(params, state_dtype="8bit", **ARGUMENTS)),
        Contender(
            SMALLEST,
            lambda params: AdamW(params, state_dtype="8bit", master_weights="split", **ARGUMENTS),
            torch.bfloat16,
        ),
        Contender(FLOAT32, lambda params: AdamW(params, **ARGUMENTS)),
        Contender(FUSED, lambda params: torch.optim.AdamW(params, fused=True, **ARGUMENTS)),
        Contender(TORCHAO, _torchao, package="torchao"),
        Contender(BITSANDBYTES, _bitsandbytes, package="bitsandbytes"),
    )
}

# ---- what is to be reached -----------------------------------------------------------------------

MOST_BYTES = 6.25


@dataclass(frozen=True)
class Target:
    """How many times as long as ours another contender takes, at least."""

    shape: Shape
    theirs: str
    ours: str
    at_least: float


TARGETS = {
    "cpu": (
        Target(SHAPES["gpt2"], TORCHAO, OURS, 5.0),
        Target(SHAPES["gpt2"], BITSANDBYTES, OURS, 5.0),
        Target(SHAPES["gpt2"], FLOAT32, SMALLEST, 0.8),
        Target(MATRICES, FUSED, OURS, 1.5),
    ),
    "cuda": (
        Target(SHAPES["gpt2"], FLOAT32, OURS, 1.6),
        Target(SHAPES["gpt2"], FLOAT32, SMALLEST, 1.6),
        Target(MATRICES, FUSED, OURS, 1.5),
    ),
}

# ---- measuring -----------------------------------------------------------------------------------


def make_params(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Return parameters with gradients, the same at each call but for rounding."""
    generator = torch.Generator().manual_seed(0)

    def random(size: Sequence[int]) -> Tensor:
        return torch.randn(size, generator=generator)

    params = [random(size).mul_(0.1).to(device, dtype) for size in shape.sizes]
    for param in params:
        param.requires_grad_()
        param.grad = random(param.shape).to(device, dtype)
    return params


def check(shape: Shape, contenders: Sequence[Contender], device: str) -> None:
    """Raise unless the contenders' steps are AdamW's, on the shape's first few parameters."""
    part = Shape(shape.name, shape.title, [size for size in shape.sizes if len(size) == 2][-8:])
    for contender in contenders:
        moved = []
        for make, dtype in ((CONTENDERS[FUSED].make, torch.float32), (contender.make, None)):
            params = make_params(part, contender.dtype, device)
            if dtype is not None:
                params = [p.detach().to(dtype).requires_grad_() for p in params]
                for param, like in zip(
                    params, make_params(part, contender.dtype, device), strict=True
                ):
                    assert like.grad is not None
                    param.grad = like.grad.to(dtype)
            before = [p.detach().double() for p in params]
            optimizer = make(params)
            for _ in range(CHECKED_STEPS):
                optimizer.step()
            states = [optimizer.state[p] for p in params]
            after = [_weight(p, state) for p, state in zip(params, states, strict=True)]
            moved.append([a - b for a, b in zip(after, before, strict=True)])
        for wanted, found in zip(*moved, strict=True):
            error = ((found - wanted).square().mean() / wanted.square().mean()).sqrt().item()
            if not error < WORST_ERROR:
                raise WrongResultError(f"{contender.name}: the error is {error:.3f} of the step")


def _weight(param: Tensor, state: dict[str, Any]) -> Tensor:
    """Return what updates apply to, in float64."""
    remainder = state.get("master_param")
    if remainder is None:
        return param.detach().double()
    bits = param.detach().view(torch.int16).to(torch.int32) * 0x10000 + remainder
    return bits.view(torch.float32).double()


def measure(shape: Shape, budget: float, device: str) -> Comparison:
    """Check the contenders that a shape's targets name, then time them."""
    targets = [target for target in TARGETS[device] if target.shape is shape]
    names = dict.fromkeys(name for target in targets for name in (target.ours, target.theirs))
    contenders = [CONTENDERS[name] for name in names if CONTENDERS[name].version is not None]
    print(f"{shape.title} ...", file=sys.stderr, flush=True)
    check(shape, contenders, device)
    optimizers = [c.make(make_params(shape, c.dtype, device)) for c in contenders]
    for optimizer in optimizers:
        optimizer.step()
    steps = {c.name: o.step for c, o in zip(contenders, optimizers, strict=True)}
    clock: Clock | None = DeviceClock(Gpu()) if device == "cuda" else None
    result = compare(steps, budget, clock)
    del optimizers, steps
    gc.collect()
    return result


def bytes_of_a_parameter() -> float:
    """Return the bytes of an element, its state and its exact float32 master, but for a counter."""
    shape = Shape("matrix", "a matrix", [LARGE_MATRIX])
    contender = CONTENDERS[SMALLEST]
    (param,) = make_params(shape, contender.dtype)
    optimizer = contender.make([param])
    optimizer.step()
    states = {name: state for name, state in optimizer.state[param].items() if name != "step"}
    return sum(tensor.nbytes for tensor in (param, *states.values())) / param.numel()


# ---- reporting -----------------------------------------------------------------------------------


def report_shape(shape: Shape, comparison: Comparison) -> str:
    """Return the table of a shape."""
    rows = []
    for name, samples in comparison.samples.items():
        ratio = None if name == OURS else comparison.ratio(name, OURS)
        times = "1" if name == OURS else format_ratio(ratio)
        milliseconds = [significant(s * 1e3) for s in (samples.median, samples.minimum)]
        rows.append([name, CONTENDERS[name].version or "", *milliseconds, times])
    header = ["contender", "version", "ms", "min ms", "times 8-bit"]
    return f"\n{shape.title}\n\n{format_table(header, rows)}{busy_warning([comparison])}"


def verdicts(
    targets: Sequence[Target], comparisons: dict[str, Comparison], nbytes: float
) -> list[Verdict]:
    """Return every target."""
    title = "bytes of a parameter, with its states and float32 master"
    wanted = f"<= {MOST_BYTES:g}"
    reached = [Verdict(title, "AdamW", wanted, nbytes, nbytes <= MOST_BYTES)]
    for target in targets:
        if target.shape.name not in comparisons:
            continue
        ratio: Ratio | None = comparisons[target.shape.name].ratio(target.theirs, target.ours)
        met = ratio is not None and ratio.median >= target.at_least
        title = f"{target.shape.title}: {target.theirs} / {target.ours}"
        reached.append(Verdict(title, "AdamW", f">= {target.at_least:g}", ratio, met))
    return reached


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=shapes(), default=list(shapes()))
    parser.add_argument("--device", choices=list(TARGETS), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=40.0, help="seconds of each shape")
    parser.add_argument("--json", type=Path, help="where to write every figure")
    return parser.parse_args()


def shapes() -> dict[str, Shape]:
    """Return the shapes that targets name."""
    return {t.shape.name: t.shape for targets in TARGETS.values() for t in targets}


def main() -> None:
    """Run the suite."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    versions = {c.package: c.version or "not installed" for c in CONTENDERS.values()}
    run = {**describe_run(), **versions}
    if arguments.device == "cuda":
        reason = why_no_gpu()
        if reason is not None:
            sys.exit(f"bench_coded_states: {reason}")
        run |= {"device": describe_gpu()}
    print("\n".join(f"{key}: {value}" for key, value in run.items()), flush=True)

    nbytes = bytes_of_a_parameter()
    comparisons = {}
    for name in arguments.shapes:
        comparisons[name] = measure(shapes()[name], arguments.budget, arguments.device)
        print(report_shape(shapes()[name], comparisons[name]), flush=True)
    reached = verdicts(TARGETS[arguments.device], comparisons, nbytes)
    print(report_targets(reached))
    if arguments.json is not None:
        figures = [
            {
                "shape": shape,
                "contender": name,
                "rounds": len(samples.seconds),
                "median_seconds": samples.median,
                "min_seconds": samples.minimum,
                "times_8bit": None if name == OURS else asdict(comparison.ratio(name, OURS)),  # type: ignore[arg-type]
                "processor_taken_by_others": comparison.taken_by_others,
            }
            for shape, comparison in comparisons.items()
            for name, samples in comparison.samples.items()
        ]
        write_json(arguments.json, {"run": run, "figures": figures, "targets": reached})


if __name__ == "__main__":
    main()
