"""What storing Adam's states in 8 bits does to its updates: several formats, beside float32.

    python benchmarks/compare_state_formats.py                     # everything, in some minutes
    python benchmarks/compare_state_formats.py --formats float32 chosen --betas2 0.999
    python benchmarks/compare_state_formats.py --json benchmarks/results/state-formats.json

Adam runs on random gradients, in float32. After every step, both states go through a format, as
they do in memory. The formats get the same gradients, and are compared with float32:

- *beside a neighbour*: a group has one element whose gradients are 1, 1000 or 10,000 times larger.
  The updates of the others over the last 100 of 1000 steps, and the largest one ever, relative to
  the largest that float32 had for that element until then.
- *shrinking*: after 1000 steps, the gradients of all but one element become 100 times smaller. The
  updates over the last 1000 of another 9000 steps, and over the 1000 that differ most.
- *movement*: after 1000 steps, the gradients of all but one element are exactly 0. How far their
  parameters move during the next 5000 steps.
- *mean exp_avg_sq*: of a group with like gradients, after 2000 steps, and the last 100 updates.

The sizes of updates are root mean squares. Every figure is of many groups of 32 elements, but for
formats with blocks of 256: there, a block consists of eight such groups.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import Verdict, describe_run, format_table, one_thread, report_targets, write_json
from torch import Tensor

from emerging_optimizers._codes import E4M3, GROUP, UE5M3, Code, decode, encode

BLOCK = 256  # of the dynamic map
DROPPED = 20  # bits of a float32's mantissa that a code lacks
BETA1, EPS = 0.9, 1e-8
NEIGHBOURS = (1, 1_000, 10_000)

# ---- formats -------------------------------------------------------------------------------------


class Format:
    """Stores both states of Adam; this one keeps float32."""

    def store(self, exp_avg: Tensor, exp_avg_sq: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is read back."""
        return exp_avg, exp_avg_sq


class SmallFloats(Format):
    """The package's codes: E4M3 for exp_avg and unsigned E5M3 for exp_avg_sq, in groups of 32.

    Args:
        random_bits: What stochastic rounding adds; with 0, numbers are rounded to nearest.
        is_shared: Whether both states use the same ones.
    """

    def __init__(self, random_bits: int = 16, is_shared: bool = False) -> None:
        self._random_bits = random_bits
        self._is_shared = is_shared
        self._generator = torch.Generator().manual_seed(1)

    def store(self, exp_avg: Tensor, exp_avg_sq: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is read back."""
        noise = self._noise(exp_avg)
        first = self._stored(E4M3, exp_avg, noise)
        if not self._is_shared:
            noise = self._noise(exp_avg_sq)
        return first, self._stored(UE5M3, exp_avg_sq, noise)

    def _noise(self, like: Tensor) -> Tensor | None:
        if self._random_bits == 0:
            return None
        missing = DROPPED - self._random_bits
        shape, limit = like.shape, 1 << self._random_bits
        noise = torch.randint(limit, shape, dtype=torch.int32, generator=self._generator)
        # The middle of what the missing bits might be.
        return (noise << missing) + ((1 << missing) >> 1)

    @staticmethod
    def _stored(code: Code, values: Tensor, noise: Tensor | None) -> Tensor:
        return decode(*encode(values, code, noise), code)


class SquareRoots(Format):
    """Signed square roots of exp_avg, fourth roots of exp_avg_sq, as parts of the largest.

    The largest magnitude is stored in float16. A second moment above 0 has at least code 1.
    """

    def __init__(self, is_stochastic: bool = False) -> None:
        self._generator = torch.Generator().manual_seed(1) if is_stochastic else None

    def store(self, exp_avg: Tensor, exp_avg_sq: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is read back."""
        largest = _in_half(_largest(exp_avg))
        part = self._rounded((exp_avg.abs() / largest).clamp_(max=1).sqrt_() * 127) / 127
        roots = exp_avg_sq.sqrt()
        largest_root = _in_half(_largest(roots))
        codes = self._rounded((roots / largest_root).clamp_(max=1).sqrt_() * 255)
        codes = torch.where(exp_avg_sq > 0, codes.clamp(min=1), codes) / 255
        return part.square().copysign(exp_avg) * largest, (codes.square() * largest_root).square()

    def _rounded(self, codes: Tensor) -> Tensor:
        if self._generator is None:
            return codes.round()
        return (codes + torch.rand(codes.shape, generator=self._generator)).floor()


class FlashOptim(Format):
    """FlashOptim's codes: softsign of exp_avg and square roots of exp_avg_sq, to nearest."""

    def store(self, exp_avg: Tensor, exp_avg_sq: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is read back."""
        largest = _largest(exp_avg)
        part = exp_avg / largest
        code = (2 * part / (1 + part.abs()) * 127 + 0.5).floor() / 127
        roots = exp_avg_sq.sqrt()
        largest_root = _largest(roots)
        root = (roots / largest_root * 255 + 0.5).floor() / 255
        return (
            code / (2 - code.abs()) * largest.half().float(),
            (root * largest_root.half().float()).square(),
        )


class DynamicMap(Format):
    """The dynamic quantization of Dettmers et al. (2021), in blocks of 256, to nearest."""

    def __init__(self) -> None:
        self._signed = create_dynamic_map(is_signed=True)
        self._unsigned = create_dynamic_map(is_signed=False)

    def store(self, exp_avg: Tensor, exp_avg_sq: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is read back."""
        return self._stored(self._signed, exp_avg), self._stored(self._unsigned, exp_avg_sq)

    @staticmethod
    def _stored(numbers: Tensor, values: Tensor) -> Tensor:
        blocks = values.view(-1, BLOCK)
        largest = _largest(blocks)
        nearest = torch.bucketize(blocks / largest, (numbers[1:] + numbers[:-1]) / 2)
        return (numbers[nearest] * largest).view_as(values)


def create_dynamic_map(is_signed: bool) -> Tensor:
    """Return the numbers from -1 or 0 to 1 that codes stand for.

    After the sign, zeros count the decades below 1, a one ends them, and the other bits divide the
    decade, from a tenth to 1, evenly. Their numbers are the middles of its parts. Two codes are 0
    and 1.
    """
    magnitudes = []
    for decade in range(7):
        parts = 2 ** (decade if is_signed else decade + 1)
        ends = torch.linspace(0.1, 1.0, parts + 1, dtype=torch.float64)
        magnitudes.append((ends[1:] + ends[:-1]) / 2 * 10.0 ** (decade - 6))
    numbers = torch.cat([*magnitudes, torch.tensor([0.0, 1.0], dtype=torch.float64)])
    if is_signed:
        numbers = torch.cat([numbers, -torch.cat(magnitudes)])
    return numbers.sort().values.float()


def _largest(values: Tensor) -> Tensor:
    return values.abs().amax(-1, keepdim=True).clamp_(min=1e-12)


def _in_half(largest: Tensor) -> Tensor:
    """Return numbers as float16 stores them, but not as 0, which would be divided by."""
    return largest.half().float().clamp_(min=2.0**-24)


REFERENCE, CHOSEN = "float32", "chosen"
# Titles, and how to make a format with its random numbers at the start.
FORMATS: Mapping[str, tuple[str, Callable[[], Format]]] = {
    REFERENCE: ("float32", Format),
    CHOSEN: ("**8-bit floats, stochastic rounding**", SmallFloats),
    "nearest": ("8-bit floats, to nearest", lambda: SmallFloats(0)),
    "roots": ("square-root codes, to nearest", SquareRoots),
    "stochastic-roots": ("square-root codes, stochastic rounding", lambda: SquareRoots(True)),
    "flashoptim": ("FlashOptim: softsign, square roots", FlashOptim),
    "dynamic": ("bitsandbytes, torchao: dynamic map", DynamicMap),
    "all-bits": ("8-bit floats, 20 random bits", lambda: SmallFloats(20)),
    "shared-bits": (
        "8-bit floats, both states with the same random bits",
        lambda: SmallFloats(is_shared=True),
    ),
}

# ---- Adam ----------------------------------------------------------------------------------------


class Adam:
    """Adam's states, which go through a format after every step."""

    def __init__(self, shape: Sequence[int], beta2: float, storage: Format) -> None:
        self.exp_avg, self.exp_avg_sq = torch.zeros(shape), torch.zeros(shape)
        self._beta2 = beta2
        self._storage = storage

    def update(self, grad: Tensor, step: int) -> Tensor:
        """Return the update of a step, without the learning rate."""
        exp_avg = BETA1 * self.exp_avg + (1 - BETA1) * grad
        exp_avg_sq = self._beta2 * self.exp_avg_sq + (1 - self._beta2) * grad * grad
        self.exp_avg, self.exp_avg_sq = self._storage.store(exp_avg, exp_avg_sq)
        root = (exp_avg_sq / (1 - self._beta2**step)).sqrt_()
        return exp_avg / (1 - BETA1**step) / (root + EPS)


Updates = tuple[int, dict[str, Tensor]]
Values = dict[str, float]  # by format


class Run:
    """Adam in all formats, on the same gradients.

    Attributes:
        names: Of the formats.
        adams: By format.
    """

    def __init__(self, names: Sequence[str], beta2: float, groups: int) -> None:
        self.names = names
        self._shape = (groups, GROUP)
        self.adams = {name: Adam(self._shape, beta2, FORMATS[name][1]()) for name in names}

    def steps(self, count: int, factors: Callable[[int], float | Tensor]) -> Iterator[Updates]:
        """Yield each step's number, from 1, and its updates of each format.

        The gradients are standard normal numbers times ``factors(step)``.
        """
        generator = torch.Generator().manual_seed(0)
        for step in range(1, count + 1):
            grad = torch.randn(self._shape, generator=generator) * factors(step)
            yield step, {name: adam.update(grad, step) for name, adam in self.adams.items()}


def _factors(first: float, others: float) -> Tensor:
    """Return factors of a group's elements, the first of which is the neighbour."""
    return torch.tensor([first] + [others] * (GROUP - 1))


class SquareSums:
    """Sums of the squares of updates, by format."""

    def __init__(self, names: Sequence[str]) -> None:
        self._sums = dict.fromkeys(names, 0.0)

    def add(self, updates: Mapping[str, Tensor]) -> None:
        """Add those of a step."""
        for name, update in updates.items():
            self._sums[name] += update.double().square().sum().item()

    def relative(self) -> Values:
        """Return the root mean squares, relative to float32's."""
        sums = self._sums
        return {name: math.sqrt(total / sums[REFERENCE]) for name, total in sums.items()}


def beside_neighbour(run: Run, size: int) -> tuple[Values, Values]:
    """Return the sizes of updates beside a neighbour, and the largest ones."""
    factors = _factors(size, 1)
    sums = SquareSums(run.names)
    peak = torch.zeros(())
    largest = dict.fromkeys(run.names, 0.0)
    for step, updates in run.steps(1000, lambda _: factors):
        others = {name: update[:, 1:] for name, update in updates.items()}
        peak = torch.maximum(peak, others[REFERENCE].abs())
        for name, update in others.items():
            largest[name] = max(largest[name], (update.abs() / peak).max().item())
        if step > 900:
            sums.add(others)
    return sums.relative(), largest


def after_shrinking(run: Run) -> tuple[Values, Values]:
    """Return the sizes of updates when the gradients have become smaller: meanwhile, and at last.

    Meanwhile: of the nine thousands of steps, the one whose updates differ most from float32's.
    """
    small = _factors(1, 0.01)
    thousands = [SquareSums(run.names) for _ in range(9)]
    for step, updates in run.steps(10_000, lambda step: small if step > 1000 else 1.0):
        if step > 1000:
            others = {name: update[:, 1:] for name, update in updates.items()}
            thousands[(step - 1001) // 1000].add(others)
    sizes = [sums.relative() for sums in thousands]
    furthest = {
        name: max((by_format[name] for by_format in sizes), key=lambda size: abs(math.log(size)))
        for name in run.names
    }
    return furthest, sizes[-1]


def movement(run: Run, size: int) -> Values:
    """Return how far parameters move after the last gradient that is not 0."""
    before, after = _factors(size, 1), _factors(size, 0)
    totals = {name: torch.zeros(()) for name in run.names}
    for step, updates in run.steps(6000, lambda step: after if step > 1000 else before):
        if step > 1000:
            totals = {name: totals[name] + update for name, update in updates.items()}
    means = {name: total[:, 1:].abs().mean().item() for name, total in totals.items()}
    return {name: mean / means[REFERENCE] for name, mean in means.items()}


def homogeneous(run: Run) -> tuple[Values, Values]:
    """Return the means of exp_avg_sq, and the sizes of the updates."""
    sums = SquareSums(run.names)
    for step, updates in run.steps(2000, lambda _: 1.0):
        if step > 1900:
            sums.add(updates)
    means = {name: adam.exp_avg_sq.mean().item() for name, adam in run.adams.items()}
    return {name: mean / means[REFERENCE] for name, mean in means.items()}, sums.relative()


# ---- figures -------------------------------------------------------------------------------------

UPDATES, LARGEST, MOVEMENT = "updates beside {}", "largest update beside {}", "movement beside {}"
WHILE_SHRINKING, SHRINKING = "updates while shrinking", "updates after shrinking"
MEAN, ALIKE = "mean exp_avg_sq", "updates of like gradients"


@dataclass(frozen=True)
class Figure:
    """Something of a format, relative to float32."""

    format: str
    beta2: float
    what: str
    value: float


def measure(names: Sequence[str], beta2: float, groups: int) -> Iterator[Figure]:
    """Yield all figures with this beta2."""

    def run(what: str) -> Run:
        print(f"beta2 {beta2:g}, {what} ...", file=sys.stderr, flush=True)
        return Run(names, beta2, groups)

    values: dict[str, Values] = {}
    for size in NEIGHBOURS:
        sizes = beside_neighbour(run(UPDATES.format(size)), size)
        values[UPDATES.format(size)], values[LARGEST.format(size)] = sizes
    values[WHILE_SHRINKING], values[SHRINKING] = after_shrinking(run(SHRINKING))
    for size in NEIGHBOURS[:2]:
        values[MOVEMENT.format(size)] = movement(run(MOVEMENT.format(size)), size)
    values[MEAN], values[ALIKE] = homogeneous(run(MEAN))
    for what, by_format in values.items():
        for name, value in by_format.items():
            yield Figure(name, beta2, what, value)


# ---- reporting -----------------------------------------------------------------------------------


def table(figures: Sequence[Figure], beta2: float) -> str:
    """Return the table of the documentation, in Markdown."""
    values = {(f.format, f.what): f.value for f in figures if f.beta2 == beta2}

    def cell(name: str, *quantities: str) -> str:
        return " / ".join(_short(values[name, what]) for what in quantities)

    header = [
        f"beta2 = {beta2:g}",
        "updates beside " + _sizes(NEIGHBOURS),
        "largest update beside " + _sizes(NEIGHBOURS),
        "updates while / after shrinking",
        "movement beside " + _sizes(NEIGHBOURS[:2]),
        "mean `exp_avg_sq`",
        "updates, like gradients",
    ]
    rows = [
        [
            FORMATS[name][0],
            cell(name, *map(UPDATES.format, NEIGHBOURS)),
            cell(name, *map(LARGEST.format, NEIGHBOURS)),
            cell(name, WHILE_SHRINKING, SHRINKING),
            cell(name, *map(MOVEMENT.format, NEIGHBOURS[:2])),
            cell(name, MEAN),
            cell(name, ALIKE),
        ]
        for name in dict.fromkeys(name for name, _ in values)
    ]
    return format_table(header, rows)


def _sizes(sizes: Sequence[int]) -> str:
    return " / ".join(f"{size:,}" for size in sizes)


def _short(value: float) -> str:
    """Return two decimals of a small number, two digits of a large one."""
    if value < 99.995:
        return f"{value:.2f}"
    return f"{value:,.0f}" if value < 1e6 else f"{value:.0e}".replace("e+0", "e")


# What the chosen format has to reach.
LIMITS: Mapping[str, tuple[float, float]] = {
    **{UPDATES.format(size): (0.8, 1.25) for size in NEIGHBOURS},
    **{LARGEST.format(size): (0.0, 2.0) for size in NEIGHBOURS},
    SHRINKING: (0.8, 1.25),
    **{MOVEMENT.format(size): (0.67, 1.5) for size in NEIGHBOURS[:2]},
}


def verdicts(figures: Sequence[Figure]) -> list[Verdict]:
    """Return whether the chosen format stays within its limits."""
    reached = []
    for figure in figures:
        if figure.format != CHOSEN or figure.what not in LIMITS:
            continue
        low, high = LIMITS[figure.what]
        wanted = f"{low:g} to {high:g}" if low else f"<= {high:g}"
        is_met = low <= figure.value <= high
        rule = f"Adam, beta2 {figure.beta2:g}"
        reached.append(Verdict(figure.what, rule, wanted, figure.value, is_met))
    return reached


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--betas2", nargs="+", type=float, default=[0.99, 0.999])
    parser.add_argument("--groups", type=int, default=256, help="of 32 elements")
    parser.add_argument("--json", type=Path, help="where to write every figure")
    arguments = parser.parse_args()
    if REFERENCE not in arguments.formats:
        parser.error(f"--formats must include {REFERENCE}, which the others are compared with")
    if arguments.groups % (BLOCK // GROUP):
        parser.error(f"--groups must be a multiple of {BLOCK // GROUP}: blocks have {BLOCK}")
    return arguments


def main() -> None:
    """Run the comparison."""
    arguments = parse_arguments()
    with one_thread():  # tensors are small
        run = describe_run()
        print("\n".join(f"{key}: {value}" for key, value in run.items()), flush=True)
        figures: list[Figure] = []
        for beta2 in arguments.betas2:
            figures += measure(arguments.formats, beta2, arguments.groups)
            print(f"\n{table(figures, beta2)}\n", flush=True)
    reached = verdicts(figures)
    print(report_targets(reached))
    if arguments.json is not None:
        write_json(
            arguments.json,
            {"run": run, "groups": arguments.groups, "figures": figures, "targets": reached},
        )


if __name__ == "__main__":
    main()
