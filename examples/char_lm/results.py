"""Results of a run and their report: a table, a chart and the machine."""

import contextlib
import io
import itertools
import math
import platform
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import torch

import emerging_optimizers

COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]


@dataclass
class Run:
    """The results of one rule, recorded during training, so that a run can be interrupted."""

    name: str
    lr: float
    train_losses: list[float] = field(default_factory=list)
    held_out_steps: list[int] = field(default_factory=list)
    held_out_losses: list[float] = field(default_factory=list)
    step_ms: dict[str, float] = field(default_factory=dict)  # the result of `time_steps`

    def has_learned(self, bar: float) -> bool:
        """Return whether the last held-out loss is at most `bar`. A NaN is not."""
        return self.held_out_losses[-1] <= bar


def table_rows(runs: list[Run], bar: float) -> list[dict[str, Any]]:
    """Return one row per rule; None for values that were not measured or are not finite."""
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
    """Return `value`; None for a NaN or an infinity, which JSON cannot represent."""
    return value if math.isfinite(value) else None


def print_table(rows: list[dict[str, Any]], nats: dict[str, float], bar: float) -> None:
    """Print the rows under a header, followed by the baselines' losses."""

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
    """Return the moving average of up to `width` values."""
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
        # The labels are where curves are unlikely to pass.
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
    # The rules differ below the unigram's loss, so the first steps are cut off.
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
    """Return the machine and the versions that the timings depend on."""
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
    """Return the processor's model."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
