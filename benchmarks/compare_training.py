"""Train the demo's model with float32 and with 8-bit states, and compare how well it learns.

    python benchmarks/compare_training.py --json build/training.json
    python benchmarks/compare_training.py --rules adam lion --steps 200 --json build/x.json

Every rule of the package and of examples/rules with a state that may be 8-bit trains the model of
examples/train_char_lm.py several times: for each seed with float32 and with 8-bit states, from the
same initial weights and on the same batches. Some rules have a third run for each seed, the
control: float32 again, but every initial weight of a matrix is the next larger float32. It shows
how far apart runs end that differ in nothing but rounding.

Each run ends with the loss on held-out text. On the way, the script records training losses, and
how far the steps move the matrices, whose states are 8-bit: the root mean square of their changes
in every tenth step of the second half.

Every finished run is stored in the JSON. Started again, the script goes on with those missing.
"""

import argparse
import importlib
import inspect
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import Verdict, describe_run, format_table, write_json
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from emerging_optimizers import ScalarOptimizer
from emerging_optimizers._codes import scale_key

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from char_lm.model import CharacterModel
from char_lm.text import Text, held_out_batches, load_text, random_batch
from train_char_lm import (
    MAX_GRAD_NORM,
    RULES,
    Rule,
    evaluate,
    learning_rate_factor,
    optimizer_class,
    parameter_groups,
)

FLOAT32, CODED, CONTROL = "float32", "8-bit", "control"
WITH_CONTROL = ("adam", "adopt", "laprop", "lion", "sim_ademamix")
STEPS_PER_LOSS = 50  # training losses are means of so many steps
STEPS_PER_MOVEMENT = 10
EVALUATION_BATCHES = 16
MOST_DIFFERENCE = 0.005  # of the held-out losses

# ---- rules ---------------------------------------------------------------------------------------

# Classes of examples/rules, and what they are trained with. The demo has the package's rules, and
# ADOPT.
GALLERY: Mapping[str, tuple[str, Rule]] = {
    "acclip": ("ACClip", Rule(1.0)),  # updates are as large as gradients
    "adabelief": ("AdaBelief", Rule(2e-3)),
    "adabound": ("AdaBound", Rule(2e-3)),
    "adadelta": ("Adadelta", Rule(1.0)),
    "adagrad": ("Adagrad", Rule(4e-3)),
    "adamax": ("Adamax", Rule(2e-3)),
    "adan": ("Adan", Rule(2e-3)),
    "cautious_adam": ("CautiousAdam", Rule(2e-3)),
    "grams": ("Grams", Rule(2e-3)),
    "nadam": ("NAdam", Rule(2e-3)),
    "nesterov_sgd": ("NesterovSGD", Rule(0.1)),
    "radam": ("RAdam", Rule(2e-3)),
    # Made for whole batches: signs of noisy gradients would shrink most steps to nothing by factors
    # of 0.5 and 1.2, and let the others grow without end.
    "rprop": ("Rprop", Rule(5e-4, lambda steps: {"etas": (0.8, 1.1), "limits": (0.01, 2.0)})),
    "tiger": ("Tiger", Rule(3e-4)),
    "yogi": ("Yogi", Rule(1e-2)),
}
NAMES = [*RULES, *GALLERY]
# The demo's hyperparameters are for batches of 16. With smaller ones, gradients are so noisy that
# runs of these rules that differ in nothing but rounding end percents apart.
CALMER: Mapping[str, dict[str, Any]] = {
    "lion": {"lr": 3e-4},
    "rmsprop": {"lr": 1e-4, "alpha": 0.99},
    "signum": {"lr": 3e-4},
}


def class_and_rule(name: str) -> tuple[type[ScalarOptimizer], Rule]:
    """Return a rule's optimizer, and what it is trained with."""
    if name in RULES:
        return optimizer_class(name), RULES[name]
    class_name, rule = GALLERY[name]
    return getattr(importlib.import_module(f"rules.{name}"), class_name), rule


def hyperparameters(name: str, steps: int) -> dict[str, Any]:
    """Return the peak learning rate and the other hyperparameters that are not the defaults."""
    cls, rule = class_and_rule(name)
    lr = inspect.signature(cls).parameters["lr"].default if rule.lr is None else rule.lr
    return {"lr": lr, **rule.options(steps), **CALMER.get(name, {})}


# ---- training ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A run to be made.

    Attributes:
        rule: A name.
        arm: Float32 states, 8-bit states or the control.
        seed: Of the initial weights and the batches.
        hyperparameters: Of the optimizer.
    """

    rule: str
    arm: str
    seed: int
    hyperparameters: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Return what it is recognized by in a JSON."""
        result: dict[str, Any] = json.loads(json.dumps(vars(self)))
        return result


@dataclass(frozen=True)
class Settings:
    """What all runs of a JSON have in common."""

    steps: int
    batch: int
    compiled: bool


def tasks_of(names: Sequence[str], seeds: Sequence[int], steps: int) -> Iterator[Task]:
    """Yield the runs of some rules."""
    for name in names:
        for seed in seeds:
            for arm in (FLOAT32, CODED, CONTROL):
                if arm != CONTROL or name in WITH_CONTROL:
                    yield Task(name, arm, seed, hyperparameters(name, steps))


def make_model(task: Task, text: Text) -> CharacterModel:
    """Return a model with the weights of its seed."""
    torch.manual_seed(task.seed)
    model = CharacterModel(text.num_symbols)
    if task.arm == CONTROL:
        with torch.no_grad():
            for matrix in matrices(model):
                matrix.copy_(matrix.nextafter(torch.tensor(math.inf)))
    return model


def matrices(model: CharacterModel) -> list[Tensor]:
    """Return the parameters whose states are 8-bit."""
    return [param for param in model.parameters() if param.ndim >= 2]


def make_optimizer(task: Task, model: CharacterModel) -> ScalarOptimizer:
    """Return the optimizer of a run."""
    cls, _ = class_and_rule(task.rule)
    state_dtype = "8bit" if task.arm == CODED else None
    return cls(parameter_groups(model), state_dtype=state_dtype, **task.hyperparameters)


def train(task: Task, settings: Settings, text: Text) -> dict[str, Any]:
    """Train a model; return the losses, and the movement of its matrices."""
    model = make_model(task, text)
    optimizer = make_optimizer(task, model)
    scheduler = LambdaLR(optimizer, lambda done: learning_rate_factor(done + 1, settings.steps))
    generator = torch.Generator().manual_seed(task.seed)
    loss_of: Callable[..., Tensor] = model.loss
    if settings.compiled:
        loss_of = torch.compile(model.loss, dynamic=False)
    losses: list[float] = []
    movements: list[float] = []
    for step in range(1, settings.steps + 1):
        optimizer.zero_grad()
        loss = loss_of(*random_batch(text, generator, settings.batch))
        loss.backward()
        is_late = step > settings.steps // 2
        is_measured = is_late and (settings.steps - step) % STEPS_PER_MOVEMENT == 0
        before = [matrix.detach().clone() for matrix in matrices(model)] if is_measured else []
        optimizer.step(max_norm=MAX_GRAD_NORM)
        if before:
            movements.append(mean_square_change(before, matrices(model)))
        scheduler.step()
        losses.append(loss.item())
    check_states(task, optimizer, model)
    return {
        "held_out_loss": evaluate(model, held_out_batches(text, EVALUATION_BATCHES)),
        "training_losses": [
            round(statistics.fmean(losses[at : at + STEPS_PER_LOSS]), 5)
            for at in range(0, len(losses), STEPS_PER_LOSS)
        ],
        "movement": math.sqrt(statistics.fmean(movements)),
    }


@torch.no_grad()
def mean_square_change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Return the mean square of the changes of all elements."""
    total = sum((b - a).square().sum().item() for a, b in zip(before, after, strict=True))
    return total / sum(tensor.numel() for tensor in before)


def check_states(task: Task, optimizer: ScalarOptimizer, model: CharacterModel) -> None:
    """Raise unless each matrix has 8-bit states in the arm with 8-bit states, and only there."""
    for matrix in matrices(model):
        state = optimizer.state[matrix]
        is_coded = any(scale_key(name) in state for name in state)
        if is_coded != (task.arm == CODED):
            raise RuntimeError(f"{task.rule}, {task.arm}: the states are {list(state)}")


# ---- results -------------------------------------------------------------------------------------


class Results:
    """The runs of a JSON, which grows by one at a time.

    Args:
        path: The file. None: nothing is stored.
        settings: Those of all runs.

    Raises:
        ValueError: The file's runs have other settings.
    """

    def __init__(self, path: Path | None, settings: Settings) -> None:
        self._path = path
        self._settings = vars(settings)
        self.runs: list[dict[str, Any]] = []
        if path is not None and path.exists():
            stored = json.loads(path.read_text())
            if stored["settings"] != self._settings:
                raise ValueError(f"{path} has runs with {stored['settings']}: use another file")
            self.runs = stored["runs"]

    def has(self, task: Task) -> bool:
        """Return whether a run is there, with the same hyperparameters."""
        wanted = task.as_json()
        return any(wanted.items() <= run.items() for run in self.runs)

    def add(self, task: Task, result: Mapping[str, Any]) -> None:
        """Store a run."""
        self.runs.append({**task.as_json(), **result})
        self.write()

    def write(self) -> None:
        """Replace the file in one go, so that it is complete whenever the script is stopped."""
        if self._path is None:
            return
        figures = compare_all(self.runs)
        report = {
            "run": describe_run(),
            "settings": self._settings,
            "runs": self.runs,
            "figures": figures,
            "targets": verdicts(figures),
        }
        new = self._path.with_suffix(".new")
        write_json(new, report)
        os.replace(new, self._path)


@dataclass(frozen=True)
class Figure:
    """An arm of a rule, compared with float32.

    Attributes:
        loss: Float32's held-out loss; the mean over the seeds.
        differences: By how much the arm's is larger, relative to float32's, for each seed.
        difference: Their mean.
        spread: Their standard deviation; None of a single seed.
        movement: Of the matrices, relative to float32's; the geometric mean over the seeds.
    """

    rule: str
    arm: str
    lr: float
    loss: float
    differences: list[float]
    difference: float
    spread: float | None
    movement: float


def compare_all(runs: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Return a figure for each rule, learning rate and arm, in the order of `NAMES`."""
    by_key = {key_of(run): run for run in runs}
    ordered = sorted(by_key, key=lambda key: (NAMES.index(key[0]), *key[1:]))
    groups = dict.fromkeys((rule, lr, arm) for rule, lr, arm, _ in ordered if arm != FLOAT32)
    figures = []
    for rule, lr, arm in groups:
        seeds = [seed for *group, seed in ordered if group == [rule, lr, arm]]
        pairs = [
            (by_key[rule, lr, FLOAT32, seed], by_key[rule, lr, arm, seed])
            for seed in seeds
            if (rule, lr, FLOAT32, seed) in by_key
        ]
        if pairs:
            figures.append(compare(pairs))
    return figures


def key_of(run: Mapping[str, Any]) -> tuple[str, float, str, int]:
    """Return what identifies a run."""
    return run["rule"], run["hyperparameters"]["lr"], run["arm"], run["seed"]


def compare(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> Figure:
    """Return the figure of pairs of runs, one of each float32's, with equal seeds."""
    _, other = pairs[0]
    differences = [b["held_out_loss"] / a["held_out_loss"] - 1 for a, b in pairs]
    return Figure(
        other["rule"],
        other["arm"],
        other["hyperparameters"]["lr"],
        statistics.fmean(a["held_out_loss"] for a, _ in pairs),
        differences,
        statistics.fmean(differences),
        statistics.stdev(differences) if len(differences) > 1 else None,
        statistics.geometric_mean(b["movement"] / a["movement"] for a, b in pairs),
    )


def verdicts(figures: Sequence[Figure]) -> list[Verdict]:
    """Return for which rules the losses with 8-bit states are as good as float32's."""
    return [
        Verdict(
            "difference of the held-out loss",
            f"{figure.rule}, lr {figure.lr:g}",
            f"within {MOST_DIFFERENCE:.1%}",
            figure.difference,
            abs(figure.difference) <= MOST_DIFFERENCE,
        )
        for figure in figures
        if figure.arm == CODED
    ]


def table(figures: Sequence[Figure]) -> str:
    """Return a table of all figures, in Markdown."""
    header = ["rule", "arm", "lr", "float32's loss", "difference", "movement"]
    rows = []
    for figure in figures:
        spread = "" if figure.spread is None else f" ± {figure.spread:.2%}"
        difference = f"{figure.difference:+.2%}{spread}"
        numbers = [f"{figure.lr:g}", f"{figure.loss:.3f}", difference, f"{figure.movement:.3f}"]
        rows.append([figure.rule, figure.arm, *numbers])
    return format_table(header, rows)


# ---- the script ----------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rules", nargs="+", choices=NAMES, default=NAMES, metavar="RULE")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=2, help="sequences in a batch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="the model, by torch.compile")
    parser.add_argument("--json", type=Path, help="where to store the runs, and to find them")
    return parser.parse_args()


def main() -> None:
    """Make the runs that are missing, and print the table."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    text = load_text()
    settings = Settings(arguments.steps, arguments.batch, arguments.compile)
    results = Results(arguments.json, settings)
    for task in tasks_of(arguments.rules, arguments.seeds, arguments.steps):
        if results.has(task):
            continue
        start = time.perf_counter()
        result = train(task, settings, text)
        results.add(task, result)
        print(
            f"{task.rule}, {task.arm}, seed {task.seed}: loss {result['held_out_loss']:.4f},"
            f" {time.perf_counter() - start:.0f} s",
            flush=True,
        )
    results.write()
    print(f"\n{table(compare_all(results.runs))}")


if __name__ == "__main__":
    main()
