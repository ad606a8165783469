"""Train a small character-level language model with any of the six rules.

The text is Python's own help topics (``pydoc_data.topics``), so nothing is downloaded. The last
tenth of it is held out. Each step calls a rule once, on the list of all gradients, and moves all
parameters with ``torch._foreach_add_``: see ``ListOptimizer.step``.

Train with one rule::

    python examples/train_char_lm.py --rule lion --steps 1000

Compare all six, from the same initial weights on the same batches, in a few minutes::

    python examples/train_char_lm.py --rule all

Both print a table and write ``loss.png`` and ``table.json`` into ``--output``. The exit status is 1
if a rule has not learned: its last held-out loss must be half a nat below that of guessing each
character by its frequency alone. Ctrl-C ends a run early with the table so far. tqdm and matplotlib
come with ``pip install "emerging-optimizers-native[demo]"``.
"""

import argparse
import contextlib
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

import emerging_optimizers
from emerging_optimizers.scalar_optimizers import (
    adam,
    ademamix,
    calculate_adam_update,
    calculate_ademamix_update,
    calculate_laprop_update,
    calculate_lion_update,
    calculate_signum_update,
    calculate_sim_ademamix_update,
    laprop,
    lion,
    signum,
    sim_ademamix,
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
    """An update function, and how this script uses it.

    Args:
        update: The list function.
        formula: The same in plain PyTorch operations, for one tensor.
        num_states: State tensors per parameter.
        lr: Default peak learning rate.
        options: Hyperparameters, given the step (from 1) and the number of steps of the run.
    """

    update: Callable[..., list[Tensor]]
    formula: Callable[..., Tensor]
    num_states: int
    lr: float
    options: Callable[[int, int], dict[str, Any]]


# Second moments forget within 100 steps and slow moments within 70, because a run is short: the
# 0.999 and 0.9999 of long runs would still be warming up at its end. An update's typical size tells
# how the learning rates compare: below 1 for Adam and LaProp, 1 for signs, up to 1 + alpha for
# the two AdEMAMix. At 160 steps, sim_ademamix with 1e-3 stays near the unigram's loss.
RULES = {
    "adam": Rule(
        calculate_adam_update,
        adam._adam,
        num_states=2,
        lr=2e-3,
        options=lambda step, steps: {
            "betas": (0.9, 0.99),
            "correct_bias": True,
            "use_nesterov": False,
            "step": step,
            "eps": 1e-8,
        },
    ),
    "ademamix": Rule(
        calculate_ademamix_update,
        ademamix._ademamix,
        num_states=3,
        lr=2e-3,
        options=lambda step, steps: {
            "num_beta_slow_warmup_steps": steps,
            "num_alpha_warmup_steps": steps,
            "betas": (0.9, 0.99, 0.99),
            "step": step,
            "eps": 1e-8,
            "correct_bias": True,
            "alpha": 2.0,
        },
    ),
    "laprop": Rule(
        calculate_laprop_update,
        laprop._laprop,
        num_states=2,
        lr=2e-3,
        options=lambda step, steps: {
            "correct_bias": True,
            "betas": (0.9, 0.99),
            "step": step,
            "eps": 1e-8,
        },
    ),
    "lion": Rule(
        calculate_lion_update,
        lion._lion,
        num_states=1,
        lr=8e-4,
        options=lambda step, steps: {"momentum_beta": 0.9, "momentum_beta2": 0.98},
    ),
    "signum": Rule(
        calculate_signum_update,
        signum._signum,
        num_states=1,
        lr=8e-4,
        options=lambda step, steps: {
            "momentum_beta": 0.9,
            "correct_bias": True,
            "use_nesterov": True,
            "step": step,
            # It is for matrices alone; this model's biases and gains are vectors.
            "use_shape_scaling": False,
        },
    ),
    "sim_ademamix": Rule(
        calculate_sim_ademamix_update,
        sim_ademamix._sim_ademamix,
        num_states=2,
        lr=4e-4,
        options=lambda step, steps: {
            "num_beta_fast_warmup_steps": steps,
            "min_beta_fast": 0.9,
            "betas": (0.98, 0.99),
            "step": step,
            "eps": 1e-8,
            "correct_bias": True,
            "alpha": 2.0,
        },
    ),
}


class ListOptimizer:
    """A rule, the parameters that it moves, and its states: one list per state."""

    def __init__(self, rule: Rule, params: list[nn.Parameter], num_steps: int) -> None:
        self.rule = rule
        self.params = params
        self.matrices = [param for param in params if param.ndim >= 2]
        self.states = [[torch.zeros_like(p) for p in params] for _ in range(rule.num_states)]
        self.updates = [torch.zeros_like(p) for p in params]
        self.num_steps = num_steps
        self.steps_done = 0

    def options(self) -> dict[str, Any]:
        """Return the hyperparameters of the step that is due or, inside `step`, being taken."""
        return self.rule.options(max(self.steps_done, 1), self.num_steps)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update the states from the gradients, and the parameters from the states."""
        self.steps_done += 1
        grads = [param.grad for param in self.params]
        updates = self.rule.update(grads, *self.states, **self.options(), out=self.updates)
        torch._foreach_mul_(self.matrices, 1 - lr * WEIGHT_DECAY)
        torch._foreach_add_(self.params, updates, alpha=-lr)


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
        positions = torch.arange(symbols.shape[1])
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
    native_ms: float | None = None
    plain_ms: float | None = None

    def has_learned(self, bar: float) -> bool:
        """Say whether the last held-out loss is at most `bar`; a NaN is not."""
        return self.held_out_losses[-1] <= bar


def learning_rate(step: int, num_steps: int, peak: float) -> float:
    """Return a linear warm-up to `peak`, then a half cosine down to a tenth of it."""
    warmup = min(WARMUP_STEPS, max(1, num_steps // 10))
    if step <= warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return peak * (0.55 + 0.45 * math.cos(math.pi * progress))


@torch.no_grad()
def evaluate(model: CharacterModel, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Return the mean loss over `batches`, which are all of one size."""
    return statistics.fmean(model.loss(*batch).item() for batch in batches)


def train(run: Run, text: Text, num_steps: int, seed: int) -> ListOptimizer:
    """Train a new model with the rule of `run`, record losses there, and return the optimizer."""
    torch.manual_seed(seed)  # the same initial weights for every rule ...
    model = CharacterModel(text.num_symbols)
    generator = torch.Generator().manual_seed(seed)  # ... and the same batches
    evaluation_batches = held_out_batches(text)
    evaluate_every = max(1, num_steps // NUM_EVALUATIONS)
    optimizer = ListOptimizer(RULES[run.name], list(model.parameters()), num_steps)

    def record_held_out_loss(step: int) -> None:
        run.held_out_steps.append(step)
        run.held_out_losses.append(evaluate(model, evaluation_batches))

    record_held_out_loss(0)
    with tqdm(
        range(1, num_steps + 1), desc=f"{run.name:>12}", unit="step", mininterval=0.5
    ) as progress:
        for step in progress:
            model.zero_grad()
            loss = model.loss(*random_batch(text, generator))
            loss.backward()
            nn.utils.clip_grad_norm_(optimizer.params, MAX_GRAD_NORM)
            optimizer.step(learning_rate(step, num_steps, run.lr))
            run.train_losses.append(loss.item())
            if step % evaluate_every == 0 or step == num_steps:
                record_held_out_loss(step)
            progress.set_postfix_str(
                f"train {run.train_losses[-1]:.3f}, held-out {run.held_out_losses[-1]:.3f}",
                refresh=False,
            )
    return optimizer


# --- Timing ---------------------------------------------------------------------------------------


class StepCopy:
    """Copies of a trained model's parameters, gradients and states, to repeat its last step on."""

    def __init__(self, optimizer: ListOptimizer, lr: float) -> None:
        self.rule = optimizer.rule
        self.options = optimizer.options()
        self.lr = lr
        self.params = [param.detach().clone() for param in optimizer.params]
        self.grads = [param.grad.clone() for param in optimizer.params]
        self.states = [[tensor.clone() for tensor in state] for state in optimizer.states]
        self.updates = [torch.zeros_like(param) for param in self.params]

    @torch.no_grad()
    def native(self) -> list[Tensor]:
        """Take a step as training does: one call for the list of all tensors."""
        updates = self.rule.update(self.grads, *self.states, **self.options, out=self.updates)
        torch._foreach_add_(self.params, updates, alpha=-self.lr)
        return updates

    @torch.no_grad()
    def plain(self) -> list[Tensor]:
        """Take the same step with the formula in PyTorch operations, tensor by tensor."""
        updates = [
            self.rule.formula(grad, *states, **self.options)
            for grad, *states in zip(self.grads, *self.states, strict=True)
        ]
        torch._foreach_add_(self.params, updates, alpha=-self.lr)
        return updates


def check_agreement(optimizer: ListOptimizer, lr: float) -> None:
    """Raise unless the native step and the plain one give close updates and states."""
    native, plain = StepCopy(optimizer, lr), StepCopy(optimizer, lr)
    ours = torch.cat([update.flatten() for update in native.native()])
    theirs = torch.cat([update.flatten() for update in plain.plain()])
    # Rounding may turn the sign of a sum that cancels, hence a share and not a largest difference.
    differing = (
        (~torch.isclose(ours, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)).float().mean().item()
    )
    if differing > 1e-4:
        raise RuntimeError(f"{differing:.2%} of the native updates differ from the plain ones")
    torch.testing.assert_close(native.states, plain.states, rtol=1e-5, atol=1e-7, equal_nan=True)


def time_steps(optimizer: ListOptimizer, lr: float) -> tuple[float, float]:
    """Return the median milliseconds of a native and of a plain optimizer step.

    The two take turns, round by round, so that a busy moment of the machine meets both.
    """
    check_agreement(optimizer, lr)
    native, plain = StepCopy(optimizer, lr).native, StepCopy(optimizer, lr).plain
    milliseconds: dict[Callable[[], list[Tensor]], list[float]] = {native: [], plain: []}
    for _ in range(TIMING_ROUNDS):
        for take_step, durations in milliseconds.items():
            take_step()  # brings the other's tensors out of the caches
            for _ in range(TIMING_CALLS):
                start = time.perf_counter()
                take_step()
                durations.append(1e3 * (time.perf_counter() - start))
    return statistics.median(milliseconds[native]), statistics.median(milliseconds[plain])


# --- Results --------------------------------------------------------------------------------------


def table_rows(runs: list[Run], bar: float) -> list[dict[str, Any]]:
    """Return one row per rule; None stands for what was not measured or is not finite."""
    rows = []
    for run in runs:
        timed = run.native_ms is not None and run.plain_ms is not None
        rows.append(
            {
                "rule": run.name,
                "lr": run.lr,
                "steps": len(run.train_losses),
                "first_held_out_loss": finite(run.held_out_losses[0]),
                "last_held_out_loss": finite(run.held_out_losses[-1]),
                "learned": run.has_learned(bar),
                "native_ms_per_step": run.native_ms,
                "plain_ms_per_step": run.plain_ms,
                "plain_over_native": run.plain_ms / run.native_ms if timed else None,
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

    layout = "{:<14}{:>9}{:>7}{:>11}{:>11}{:>9}{:>12}{:>11}{:>8}"
    print()
    print(layout.format("", "", "", "held-out", "held-out", "", "optimizer", "plain", ""))
    print(
        layout.format(
            *("rule", "lr", "steps", "first", "last", "learned", "ms/step", "ms/step", "ratio")
        )
    )
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
            runs[-1].native_ms, runs[-1].plain_ms = time_steps(optimizer, runs[-1].lr)
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
