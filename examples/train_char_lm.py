"""Train a small character-level language model with any of the six rules.

The text is Python's own help topics (``pydoc_data.topics``), so nothing is downloaded. The last
tenth of it is held out. The optimizers are this package's, in a training loop like any other: see
``train``.

Train with one rule::

    python examples/train_char_lm.py --rule lion --steps 1000

Compare all six, from the same initial weights on the same batches, in a few minutes::

    python examples/train_char_lm.py --rule all

Both print a table and write ``loss.png`` and ``table.json`` into ``--output``. The exit status is 1
if a rule has not learned: its last held-out loss must be half a nat below that of guessing each
character by its frequency alone. The table also has the time of an optimizer's step: of the native
one, of the same in plain PyTorch operations (``fused=False``) and, for Adam, of
``torch.optim.AdamW(fused=True)``. Ctrl-C ends a run early with the table so far. tqdm and
matplotlib come with ``pip install "emerging-optimizers-native[demo]"``.
"""

import argparse
import contextlib
import copy
import io
import itertools
import json
import math
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (torch's own name for it)
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import emerging_optimizers
from emerging_optimizers import (
    AdamW,
    AdEMAMix,
    LaProp,
    Lion,
    ScalarOptimizer,
    Signum,
    SimplifiedAdEMAMix,
)

try:
    import matplotlib
    import matplotlib.pyplot as plt
    from tqdm import tqdm
except ModuleNotFoundError as missing:
    sys.exit(f'{missing.name} is missing: pip install "emerging-optimizers-native[demo]"')

# A model that two CPU cores train in half a minute, with as many small tensors as a real one has.
CONTEXT = 64
BATCH = 16
WIDTH = 96
HEADS = 4
LAYERS = 10

DEFAULT_STEPS = 160
WARMUP_STEPS = 20
WEIGHT_DECAY = 0.1
MAX_GRAD_NORM = 1.0

HELD_OUT_SHARE = 0.1
NUM_EVALUATIONS = 10
NUM_EVALUATION_BATCHES = 4
LEARNED_MARGIN = 0.5  # nats below the held-out unigram cross-entropy

TIMING_ROUNDS = 7
TIMING_CALLS = 5

COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]


# --- The rules ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """An optimizer, and how this script uses it.

    Args:
        optimizer: The class.
        lr: Default peak learning rate.
        options: Hyperparameters, given the number of steps of the run.
    """

    optimizer: Callable[..., ScalarOptimizer]
    lr: float
    options: Callable[[int], dict[str, Any]]


# Second moments forget within 100 steps and slow moments within 70, because a run is short: the
# 0.999 and 0.9999 of long runs would still be warming up at its end. An update's typical size tells
# how the learning rates compare: below 1 for Adam and LaProp, 1 for signs, up to 1 + alpha for
# the two AdEMAMix. At 160 steps, sim_ademamix with 1e-3 stays near the unigram's loss.
RULES = {
    "adam": Rule(AdamW, 2e-3, lambda steps: {"betas": (0.9, 0.99)}),
    "ademamix": Rule(
        AdEMAMix,
        2e-3,
        lambda steps: {
            "betas": (0.9, 0.99, 0.99),
            "alpha": 2.0,
            "num_beta_slow_warmup_steps": steps,
            "num_alpha_warmup_steps": steps,
        },
    ),
    "laprop": Rule(LaProp, 2e-3, lambda steps: {"betas": (0.9, 0.99)}),
    "lion": Rule(Lion, 8e-4, lambda steps: {"betas": (0.9, 0.98)}),
    "signum": Rule(Signum, 8e-4, lambda steps: {"momentum": 0.9, "nesterov": True}),
    "sim_ademamix": Rule(
        SimplifiedAdEMAMix,
        4e-4,
        lambda steps: {
            "betas": (0.98, 0.99),
            "alpha": 2.0,
            "num_beta_fast_warmup_steps": steps,
            "min_beta_fast": 0.9,
        },
    ),
}


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return groups that decay the weights, and neither biases nor gains."""
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]


def make_optimizer(run: "Run", model: nn.Module, num_steps: int) -> ScalarOptimizer:
    """Return the optimizer of `run`."""
    rule = RULES[run.name]
    return rule.optimizer(parameter_groups(model), lr=run.lr, **rule.options(num_steps))


# --- The text -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """Characters as numbers, split into a training part and the held-out part after it."""

    train: Tensor
    held_out: Tensor
    num_symbols: int


def load_text() -> Text:
    """Return the help topics that come with Python, in the order of their names."""
    characters = "".join(topics.topics[name] for name in sorted(topics.topics))
    numbers = {character: i for i, character in enumerate(sorted(set(characters)))}
    encoded = torch.tensor([numbers[character] for character in characters])
    split = round(len(encoded) * (1 - HELD_OUT_SHARE))
    return Text(encoded[:split], encoded[split:], len(numbers))


def baselines(text: Text) -> dict[str, float]:
    """Return the held-out cross-entropies, in nats, of two models that only count characters.

    Counts are those of the training part, plus one so that nothing is impossible. The unigram model
    knows how frequent each character is; the bigram model, how frequent after each other one.
    """
    size = text.num_symbols
    unigram = torch.bincount(text.train, minlength=size).double() + 1
    pairs = text.train[:-1] * size + text.train[1:]
    bigram = torch.bincount(pairs, minlength=size * size).double().view(size, size) + 1
    unigram_nats = -(unigram / unigram.sum()).log()
    bigram_nats = -(bigram / bigram.sum(dim=1, keepdim=True)).log()
    before, after = text.held_out[:-1], text.held_out[1:]
    return {
        "unigram": unigram_nats[text.held_out].mean().item(),
        "bigram": bigram_nats[before, after].mean().item(),
    }


def windows(part: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Return one row of inputs per start, and as targets the same moved on by a character."""
    rows = part[starts.unsqueeze(1) + torch.arange(CONTEXT + 1)]
    return rows[:, :-1], rows[:, 1:]


def random_batch(text: Text, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return windows from anywhere in the training part."""
    starts = torch.randint(len(text.train) - CONTEXT, (BATCH,), generator=generator)
    return windows(text.train, starts)


def held_out_batches(text: Text) -> list[tuple[Tensor, Tensor]]:
    """Return the same evenly spread windows every time."""
    last = len(text.held_out) - CONTEXT - 1
    starts = torch.linspace(0, last, NUM_EVALUATION_BATCHES * BATCH).long()
    return [windows(text.held_out, some) for some in starts.split(BATCH)]


# --- The model ------------------------------------------------------------------------------------


class Block(nn.Module):
    """Causal self-attention, then a two-layer perceptron; each normalises its input first."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        self.attention_out = nn.Linear(WIDTH, WIDTH)
        self.perceptron_norm = nn.LayerNorm(WIDTH)
        self.perceptron_in = nn.Linear(WIDTH, 4 * WIDTH)
        self.perceptron_out = nn.Linear(4 * WIDTH, WIDTH)

    def attend(self, x: Tensor) -> Tensor:
        """Mix each position with those before it; `x` is (batch, length, width)."""
        batch, length, _ = x.shape
        mixed = self.query_key_value(x).view(batch, length, 3, HEADS, WIDTH // HEADS)
        query, key, value = mixed.permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.attention_out(heads.transpose(1, 2).reshape(batch, length, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Add both parts to the residual stream `x`."""
        x = x + self.attend(self.attention_norm(x))
        hidden = F.gelu(self.perceptron_in(self.perceptron_norm(x)))
        return x + self.perceptron_out(hidden)


class CharacterModel(nn.Module):
    """A GPT: symbol and position embeddings, blocks, and logits for the next character."""

    def __init__(self, num_symbols: int) -> None:
        super().__init__()
        self.symbols = nn.Embedding(num_symbols, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*[Block() for _ in range(LAYERS)])
        self.norm = nn.LayerNorm(WIDTH)
        self.logits = nn.Linear(WIDTH, num_symbols)
        self.apply(self._init)
        for block in self.blocks:
            # Keeps the residual stream's variance from growing with depth.
            block.attention_out.weight.data.div_(math.sqrt(2 * LAYERS))
            block.perceptron_out.weight.data.div_(math.sqrt(2 * LAYERS))

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def forward(self, symbols: Tensor) -> Tensor:
        """Return logits (batch, length, symbols) for `symbols` (batch, length)."""
        positions = torch.arange(symbols.shape[1], device=symbols.device)
        x = self.symbols(symbols) + self.positions(positions)
        return self.logits(self.norm(self.blocks(x)))

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats."""
        return F.cross_entropy(self(inputs).flatten(0, 1), targets.flatten())


# --- Training -------------------------------------------------------------------------------------


@dataclass
class Run:
    """What one rule achieved; filled in as it goes, so that an interrupted run is of use."""

    name: str
    lr: float
    train_losses: list[float] = field(default_factory=list)
    held_out_steps: list[int] = field(default_factory=list)
    held_out_losses: list[float] = field(default_factory=list)
    step_ms: dict[str, float] = field(default_factory=dict)  # as `time_steps` returns it

    def has_learned(self, bar: float) -> bool:
        """Say whether the last held-out loss is at most `bar`; a NaN is not."""
        return self.held_out_losses[-1] <= bar


def learning_rate_factor(step: int, num_steps: int) -> float:
    """Return a linear warm-up to 1, then a half cosine down to a tenth."""
    warmup = min(WARMUP_STEPS, max(1, num_steps // 10))
    if step <= warmup:
        return step / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return 0.55 + 0.45 * math.cos(math.pi * progress)


@torch.no_grad()
def evaluate(model: CharacterModel, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Return the mean loss over `batches`, which are all of one size."""
    return statistics.fmean(model.loss(*batch).item() for batch in batches)


def train(run: Run, text: Text, num_steps: int, seed: int) -> ScalarOptimizer:
    """Train a new model with the rule of `run`, record losses there, and return the optimizer."""
    torch.manual_seed(seed)  # the same initial weights for every rule ...
    model = CharacterModel(text.num_symbols)
    generator = torch.Generator().manual_seed(seed)  # ... and the same batches
    evaluation_batches = held_out_batches(text)
    evaluate_every = max(1, num_steps // NUM_EVALUATIONS)
    optimizer = make_optimizer(run, model, num_steps)
    scheduler = LambdaLR(optimizer, lambda done: learning_rate_factor(done + 1, num_steps))

    def record_held_out_loss(step: int) -> None:
        run.held_out_steps.append(step)
        run.held_out_losses.append(evaluate(model, evaluation_batches))

    record_held_out_loss(0)
    with tqdm(
        range(1, num_steps + 1), desc=f"{run.name:>12}", unit="step", mininterval=0.5
    ) as progress:
        for step in progress:
            optimizer.zero_grad()
            loss = model.loss(*random_batch(text, generator))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            scheduler.step()
            run.train_losses.append(loss.item())
            if step % evaluate_every == 0 or step == num_steps:
                record_held_out_loss(step)
            progress.set_postfix_str(
                f"train {run.train_losses[-1]:.3f}, held-out {run.held_out_losses[-1]:.3f}",
                refresh=False,
            )
    return optimizer


# --- Timing ---------------------------------------------------------------------------------------


def copied(
    optimizer: ScalarOptimizer, optimizer_class: Callable[..., Optimizer], fused: bool | None
) -> Optimizer:
    """Return an optimizer with copies of the parameters, gradients and states of `optimizer`."""
    groups = []
    for group in optimizer.param_groups:
        params = [copy.deepcopy(param) for param in group["params"]]
        for param, original in zip(params, group["params"], strict=True):
            param.grad = original.grad.clone()
        groups.append({**group, "params": params})
    result = optimizer_class(groups)
    result.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group in result.param_groups:
        group["fused"] = fused
    return result


def ways_to_step(optimizer: ScalarOptimizer) -> dict[str, Optimizer]:
    """Return optimizers that repeat the last step, each on tensors of its own.

    "native" steps as training does. "plain" does so in PyTorch operations, parameter by parameter.
    For Adam there is "torch_fused" as well: ``torch.optim.AdamW(fused=True)``.
    """
    result = {
        "native": copied(optimizer, type(optimizer), fused=None),
        "plain": copied(optimizer, type(optimizer), fused=False),
    }
    if isinstance(optimizer, AdamW):
        result["torch_fused"] = copied(optimizer, torch.optim.AdamW, fused=True)
    return result


def check_agreement(optimizer: ScalarOptimizer) -> None:
    """Raise unless all ways to step give close parameters and states."""
    native, *others = ways_to_step(optimizer).values()
    native.step()
    for other in others:
        other.step()
        # A parameter moves by about the learning rate: a thousandth of that is close.
        close = [
            torch.isclose(a, b, rtol=1e-6, atol=1e-3 * group["lr"], equal_nan=True).flatten()
            for group, theirs in zip(native.param_groups, other.param_groups, strict=True)
            for a, b in zip(group["params"], theirs["params"], strict=True)
        ]
        # Rounding may turn the sign of a sum that cancels: hence a share, no largest difference.
        differing = 1 - torch.cat(close).float().mean().item()
        if differing > 1e-4:
            raise RuntimeError(f"{differing:.2%} of the parameters differ after a native step")
        torch.testing.assert_close(
            native.state_dict()["state"],
            other.state_dict()["state"],
            rtol=1e-5,
            atol=1e-7,
            equal_nan=True,
        )


def time_steps(optimizer: ScalarOptimizer) -> dict[str, float]:
    """Return the median milliseconds of an optimizer step, for each way to step.

    They take turns, round by round, so that a busy moment of the machine meets all.
    """
    check_agreement(optimizer)
    ways = ways_to_step(optimizer)
    milliseconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(TIMING_ROUNDS):
        for name, way in ways.items():
            way.step()  # brings the others' tensors out of the caches
            for _ in range(TIMING_CALLS):
                start = time.perf_counter()
                way.step()
                milliseconds[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(durations) for name, durations in milliseconds.items()}


# --- Results --------------------------------------------------------------------------------------


def table_rows(runs: list[Run], bar: float) -> list[dict[str, Any]]:
    """Return one row per rule; None stands for what was not measured or is not finite."""
    rows = []
    for run in runs:
        native, plain = run.step_ms.get("native"), run.step_ms.get("plain")
        rows.append(
            {
                "rule": run.name,
                "lr": run.lr,
                "steps": len(run.train_losses),
                "first_held_out_loss": finite(run.held_out_losses[0]),
                "last_held_out_loss": finite(run.held_out_losses[-1]),
                "learned": run.has_learned(bar),
                "native_ms_per_step": native,
                "plain_ms_per_step": plain,
                "torch_fused_ms_per_step": run.step_ms.get("torch_fused"),
                "plain_over_native": plain / native if plain and native else None,
            }
        )
    return rows


def finite(value: float) -> float | None:
    """Return `value`, or None for a NaN or an infinity, which JSON has no words for."""
    return value if math.isfinite(value) else None


def print_table(rows: list[dict[str, Any]], nats: dict[str, float], bar: float) -> None:
    """Print the rows under a header, and what to compare the losses with."""

    def cell(value: Any, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    layout = "{:<14}{:>9}{:>7}{:>11}{:>11}{:>9}{:>12}{:>13}{:>8}{:>13}"
    print()
    for header in (
        ("", "", "", "held-out", "held-out", "", "optimizer", "fused=False", "", "torch fused"),
        ("rule", "lr", "steps", "first", "last", "learned", *["ms/step"] * 2, "ratio", "ms/step"),
    ):
        print(layout.format(*header))
    for row in rows:
        print(
            layout.format(
                row["rule"],
                f"{row['lr']:g}",
                row["steps"],
                cell(row["first_held_out_loss"], 3),
                cell(row["last_held_out_loss"], 3),
                "yes" if row["learned"] else "no",
                cell(row["native_ms_per_step"], 3),
                cell(row["plain_ms_per_step"], 3),
                cell(row["plain_over_native"], 1),
                cell(row["torch_fused_ms_per_step"], 3),
            )
        )
    print(
        f"\nHeld-out cross-entropy in nats: unigram {nats['unigram']:.3f},"
        f" bigram {nats['bigram']:.3f}; learned means at most {bar:.3f}."
    )


def running_mean(values: list[float], width: int) -> list[float]:
    """Return the mean of each value and up to `width` - 1 before it."""
    return [
        statistics.fmean(values[max(0, end - width) : end]) for end in range(1, len(values) + 1)
    ]


def draw(runs: list[Run], nats: dict[str, float], path: Path) -> None:
    """Draw training and held-out losses against steps, side by side."""
    matplotlib.use("Agg")  # draws into files; needs no display
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(13, 5), sharex=True, sharey=True, layout="constrained"
    )
    smoothing = 10
    for run, color in zip(runs, itertools.cycle(COLORS)):
        steps = range(1, len(run.train_losses) + 1)
        left.plot(steps, running_mean(run.train_losses, smoothing), color=color, label=run.name)
        right.plot(
            run.held_out_steps,
            run.held_out_losses,
            color=color,
            marker="o",
            markersize=4,
            label=f"{run.name} ({run.held_out_losses[-1]:.2f})",
        )
    for axes in (left, right):
        # Each label stands where no curve is likely to pass.
        for name, style, x, align in (
            ("unigram", "--", 0.99, "right"),
            ("bigram", ":", 0.01, "left"),
        ):
            axes.axhline(nats[name], color="0.35", linestyle=style, linewidth=1.2, zorder=1)
            axes.annotate(
                f"held-out {name} {nats[name]:.2f}",
                (x, nats[name]),
                xycoords=axes.get_yaxis_transform(),
                xytext=(0, 3),
                textcoords="offset points",
                ha=align,
                color="0.35",
                fontsize=9,
            )
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_title(f"Training loss (mean of {smoothing} steps)")
    left.set_ylabel("cross-entropy per character (nats)")
    right.set_title("Held-out loss")
    # What sets the rules apart happens below the unigram's loss, so the first steps are cut off.
    ends = [run.held_out_losses[-1] for run in runs if finite(run.held_out_losses[-1])]
    left.set_ylim(top=max(nats["unigram"], *ends) + 0.5)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        title="rule (last held-out loss)",
        loc="outside right center",
        frameon=False,
    )
    figure.suptitle("Character model: same initial weights, same batches, one rule per curve")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def describe_machine() -> dict[str, Any]:
    """Return what a reader of the timings needs to know."""
    configuration = io.StringIO()
    with contextlib.redirect_stdout(configuration):
        emerging_optimizers.show_config()
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "emerging_optimizers": emerging_optimizers.__version__,
        "configuration": configuration.getvalue().splitlines(),
    }


def cpu_name() -> str:
    """Return the processor's model, from Linux where it is that."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


# --- The script -----------------------------------------------------------------------------------


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train a small character model with one rule, or compare all six.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rule", choices=[*RULES, "all"], default="adam", help="rule to use")
    parser.add_argument("--steps", type=positive, default=DEFAULT_STEPS, help="steps per rule")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches")
    parser.add_argument("--lr", type=float, help="peak learning rate; None: the rule's own")
    parser.add_argument("--threads", type=positive, help="CPU threads; None: PyTorch's choice")
    parser.add_argument("--output", type=Path, default=Path("build/demo"), help="folder to fill")
    parser.add_argument(
        "--no-check", action="store_true", help="exit with 0 whether or not the rules have learned"
    )
    return parser.parse_args()


def positive(value: str) -> int:
    """Read a whole number from 1."""
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def main() -> int:
    """Train, time, report; return the exit status."""
    start = time.perf_counter()
    arguments = read_arguments()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    text = load_text()
    nats = baselines(text)
    bar = nats["unigram"] - LEARNED_MARGIN
    sizes = [param.numel() for param in CharacterModel(text.num_symbols).parameters()]
    machine = describe_machine()
    print(*machine["configuration"], f"cpu: {machine['cpu']}", sep="\n")
    print(f"model: {sum(sizes):,} parameters in {len(sizes)} tensors")
    print(f"text: {len(text.train):,} characters, and {len(text.held_out):,} held out", flush=True)

    runs: list[Run] = []
    interrupted = False
    try:
        for name in RULES if arguments.rule == "all" else [arguments.rule]:
            runs.append(Run(name, RULES[name].lr if arguments.lr is None else arguments.lr))
            optimizer = train(runs[-1], text, arguments.steps, arguments.seed)
            runs[-1].step_ms = time_steps(optimizer)
    except KeyboardInterrupt:
        interrupted = True
        runs = [run for run in runs if run.held_out_losses]

    rows = table_rows(runs, bar)
    print_table(rows, nats, bar)
    seconds = time.perf_counter() - start
    report = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine,
        "model": {"parameters": sum(sizes), "tensors": len(sizes)},
        "seed": arguments.seed,
        "seconds": seconds,
        "interrupted": interrupted,
        "held_out_baselines": nats,
        "learned_at_most": bar,
        "table": rows,
        "held_out_curves": {
            run.name: {"steps": run.held_out_steps, "losses": [*map(finite, run.held_out_losses)]}
            for run in runs
        },
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    table_path, chart_path = arguments.output / "table.json", arguments.output / "loss.png"
    table_path.write_text(json.dumps(report, indent=2) + "\n")
    draw(runs, nats, chart_path)
    print(f"{seconds:.0f} s; wrote {table_path} and {chart_path}")
    if interrupted:
        return 130  # what a shell reports after Ctrl-C
    return 0 if arguments.no_check or all(row["learned"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
