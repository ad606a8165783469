"""Train a small character-level language model with any of the rules.

One of them, ADOPT, is not the package's: ``rules/adopt.py`` defines it in Python.

The text is Python's help topics (``pydoc_data.topics``), so nothing is downloaded. The last tenth
is held out. ``train`` is an ordinary training loop with an optimizer of this package.

Train with one rule::

    python examples/train_char_lm.py --rule lion --steps 1000

Compare all rules, from the same initial weights and on the same batches, in a few minutes::

    python examples/train_char_lm.py --rule all

Both print a table and write ``loss.png`` and ``table.json`` into ``--output``. The exit status is 1
if a rule has not learned: its last held-out loss must be half a nat below the unigram
cross-entropy. The table also shows the time of an optimizer's step: native, in PyTorch operations
(``fused=False``) and, for Adam, with ``torch.optim.AdamW(fused=True)``. Ctrl-C ends a run early
and prints the table so far. tqdm and matplotlib come with
``pip install "emerging-optimizers-native[demo]"``.
"""

import argparse
import inspect
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from emerging_optimizers import ScalarOptimizer
from emerging_optimizers.registry import (
    get_optimizer_cls,
    get_optimizer_names,
    register_optimizer,
)

try:
    from char_lm.results import Run, describe_machine, draw, finite, print_table, table_rows
    from tqdm import tqdm
except ModuleNotFoundError as missing:
    sys.exit(f'{missing.name} is missing: pip install "emerging-optimizers-native[demo]"')
from char_lm.model import CharacterModel
from char_lm.text import Text, baselines, held_out_batches, load_text, random_batch
from char_lm.timing import time_steps
from rules.adopt import Adopt

DEFAULT_STEPS = 160
WARMUP_STEPS = 20
WEIGHT_DECAY = 0.1
MAX_GRAD_NORM = 1.0
NUM_EVALUATIONS = 10
LEARNED_MARGIN = 0.5  # nats below the held-out unigram cross-entropy


# --- The rules ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """The hyperparameters that this script trains a rule with.

    Args:
        lr: Default peak learning rate. None: the optimizer's default.
        options: Other hyperparameters, given the number of steps of the run.
    """

    lr: float | None = None
    options: Callable[[int], dict[str, Any]] = lambda steps: {}


# A run is short, so second moments forget within 100 steps and slow moments within 70; the 0.999
# and 0.9999 of long runs would still be warming up at its end. The learning rates follow from an
# update's typical size: below 1 for Adam and LaProp, 1 for signs, up to 1 + alpha for both AdEMAMix
# rules, up to 10 for RMSprop with momentum. At 160 steps, sim_ademamix with 1e-3 stays near the
# unigram's loss.
_TUNED = {
    "adopt": Rule(2e-3, lambda steps: {"betas": (0.9, 0.99)}),
    "adam": Rule(2e-3, lambda steps: {"betas": (0.9, 0.99)}),
    "ademamix": Rule(
        2e-3,
        lambda steps: {
            "betas": (0.9, 0.99, 0.99),
            "alpha": 2.0,
            "num_beta_slow_warmup_steps": steps,
            "num_alpha_warmup_steps": steps,
        },
    ),
    "laprop": Rule(2e-3, lambda steps: {"betas": (0.9, 0.99)}),
    "lion": Rule(8e-4, lambda steps: {"betas": (0.9, 0.98)}),
    "madam": Rule(2e-3, lambda steps: {"betas": (0.9, 0.99)}),
    "rmsprop": Rule(5e-4, lambda steps: {"alpha": 0.95, "momentum": 0.9}),
    "signum": Rule(8e-4, lambda steps: {"momentum": 0.9, "nesterov": True}),
    "sim_ademamix": Rule(
        4e-4,
        lambda steps: {
            "betas": (0.98, 0.99),
            "alpha": 2.0,
            "num_beta_fast_warmup_steps": steps,
            "min_beta_fast": 0.9,
        },
    ),
}
# Rules in Python train like the others.
register_optimizer("adopt")(Adopt)
# Every registered rule. Adam is trained as AdamW.
RULES = {name: _TUNED.get(name, Rule()) for name in get_optimizer_names() if name != "adamw"}


def optimizer_class(name: str) -> type[ScalarOptimizer]:
    """Return the optimizer that trains with a rule."""
    return get_optimizer_cls("adamw" if name == "adam" else name)


def default_lr(name: str) -> float:
    """Return the peak learning rate of a rule."""
    default = inspect.signature(optimizer_class(name)).parameters["lr"].default
    return default if RULES[name].lr is None else RULES[name].lr


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return groups with weight decay for matrices, but not for biases and gains."""
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]


def make_optimizer(run: "Run", model: nn.Module, num_steps: int) -> ScalarOptimizer:
    """Return the optimizer of `run`."""
    options = RULES[run.name].options(num_steps)
    return optimizer_class(run.name)(parameter_groups(model), lr=run.lr, **options)


# --- Training -------------------------------------------------------------------------------------


def learning_rate_factor(step: int, num_steps: int) -> float:
    """Return a linear warm-up to 1, then a half cosine down to a tenth."""
    warmup = min(WARMUP_STEPS, max(1, num_steps // 10))
    if step <= warmup:
        return step / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return 0.55 + 0.45 * math.cos(math.pi * progress)


@torch.no_grad()
def evaluate(model: CharacterModel, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Return the mean loss over `batches`, which have equal sizes."""
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
            optimizer.step(max_norm=MAX_GRAD_NORM)
            scheduler.step()
            run.train_losses.append(loss.item())
            if step % evaluate_every == 0 or step == num_steps:
                record_held_out_loss(step)
            progress.set_postfix_str(
                f"train {run.train_losses[-1]:.3f}, held-out {run.held_out_losses[-1]:.3f}",
                refresh=False,
            )
    return optimizer


# --- The script -----------------------------------------------------------------------------------


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train a small character model with one rule, or compare all.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rule", choices=[*RULES, "all"], default="adam", help="rule to use")
    parser.add_argument("--steps", type=positive, default=DEFAULT_STEPS, help="steps per rule")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and the batches")
    parser.add_argument("--lr", type=float, help="peak learning rate; None: the rule's default")
    parser.add_argument("--threads", type=positive, help="CPU threads; None: PyTorch's choice")
    parser.add_argument("--output", type=Path, default=Path("build/demo"), help="output folder")
    parser.add_argument(
        "--no-check", action="store_true", help="exit with 0 whether or not the rules have learned"
    )
    return parser.parse_args()


def positive(value: str) -> int:
    """Parse a positive integer."""
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
            runs.append(Run(name, default_lr(name) if arguments.lr is None else arguments.lr))
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
