r"""Draw a chart of a committed result; measures nothing.

    python benchmarks/plot.py benchmarks/results/functions-cpu.json docs/functions-cpu.svg
    python benchmarks/plot.py benchmarks/results/optimizers-cpu.json docs/optimizers-cpu.svg
    python benchmarks/plot.py benchmarks/results/optimizers-cpu.json docs/adamw-cpu.svg \
        --summary adam
    python benchmarks/plot.py benchmarks/results/optimizers-cpu.json docs/small-cpu.svg \
        --small adam
    python benchmarks/plot.py benchmarks/results/offsets-cpu.json docs/offsets-cpu.svg --offsets
    python benchmarks/plot.py benchmarks/results/training-cpu.json docs/training-cpu.svg --training

Bars are memory bandwidth, one group a rule. The line over each group is the roof: a loop with the
same reads and writes, measured in the same run. With ``--summary``, bars are how many times as long
the contenders of one rule take, in a chart that can be read at half its size. With
``--small``, they are that for many small tensors, in and out of the caches. Lines span from the
tenth to the ninetieth percentile. The colours are legible on light and dark pages; the
background is transparent.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Many small tensors spread the contenders over two orders of magnitude: logarithmic panels.
PANELS = {
    "gpt2": ("The 148 tensors of GPT-2 small", "linear"),
    "1000x1000": ("1000 tensors of 1000 elements", "log"),
    "1000x8": ("1000 tensors of 8 elements", "log"),
}
SUMMARY = {
    "gpt2": "GPT-2 small",
    "1000x1000": "1000 of 1000",
    "1000x8": "1000 of 8",
}
SUMMARY_FONT = 20
SMALL_FONT = 15
# Of the two suites, which name some contenders alike; not all of them measure all rules.
FUNCTIONS = {
    "package": ("this package", "#0072b2"),
    "compiled": ("torch.compile, per tensor", "#e69f00"),
    "foreach": ("torch._foreach", "#cc79a7"),
    "eager": ("eager, per tensor", "#999999"),
}
OPTIMIZERS = {
    "package": ("this package", "#0072b2"),
    "fused": ("torch.optim, fused", "#e69f00"),
    "deepspeed": ("DeepSpeed", "#009e73"),
    "foreach": ("torch.optim, foreach", "#cc79a7"),
    "loop": ("a PyTorch loop", "#999999"),
}
COLD = "single calls, caches cold"
SMALL = {"1000x1000": "1000 of 1000", "1000x8": "1000 of 8"}
TIMINGS = {COLD: "caches cold", "back to back": "back to back"}
# Of compare_training.py.
TRAINING = {
    "float32": ("float32 states", "#0072b2", "-"),
    "8-bit": ("8-bit states", "#d55e00", "--"),
}
TRAINING_COLUMNS = 6
ROOF = "#d55e00"
GREY = "#808080"


def draw_panel(
    axes: Axes,
    title: str,
    scale: str,
    figures: list[dict[str, Any]],
    contenders: dict[str, tuple[str, str]],
) -> None:
    """Draw one shape: a group of bars for each rule."""
    speed = {(f["rule"], f["contender"]): f["gigabytes_per_second"] for f in figures}
    rules = list(dict.fromkeys(f["rule"] for f in figures))
    width = 0.8 / len(contenders)
    bars: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in contenders}
    for group, rule in enumerate(rules):
        present = [name for name in contenders if (rule, name) in speed]
        for i, name in enumerate(present):
            at, heights = bars[name]
            at.append(group + (i - (len(present) - 1) / 2) * width)
            heights.append(speed[rule, name])
    for name, (label, color) in contenders.items():
        axes.bar(*bars[name], width, color=color, label=label)
    roofs = [speed[rule, "roof"] for rule in rules]
    axes.hlines(
        roofs,
        [group - 0.45 for group in range(len(rules))],
        [group + 0.45 for group in range(len(rules))],
        color=ROOF,
        linewidth=2,
        label="roof: a plain loop",
    )
    axes.set_title(title, color=GREY)
    axes.set_yscale(scale)
    axes.set_xticks(range(len(rules)), rules, rotation=30, ha="right")
    axes.tick_params(which="both", colors=GREY)
    axes.grid(axis="y", color=GREY, alpha=0.3, linewidth=0.5)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GREY)


def chart_rules(result: dict[str, Any]) -> Figure:
    """Return a chart of the bandwidth of all rules."""
    figures = result["figures"]
    contenders = OPTIMIZERS if "optimizer" in figures[0] else FUNCTIONS
    figures = [f for f in figures if f.get("timing", "back to back") == "back to back"]
    figure, panels = plt.subplots(1, len(PANELS), figsize=(13, 4), layout="constrained")
    for axes, (shape, (title, scale)) in zip(panels, PANELS.items(), strict=True):
        draw_panel(axes, title, scale, [f for f in figures if f["shape"] == shape], contenders)
    panels[0].set_ylabel("GB/s read and written (median)", color=GREY)
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=len(contenders) + 1,
        frameon=False,
        labelcolor=GREY,
    )
    run = result["run"]
    figure.supxlabel(
        f"{run['cpu']}, {run['threads']} threads, float32, torch {run['torch']}: {run['command']}",
        color=GREY,
        fontsize="small",
    )
    return figure


def chart_summary(result: dict[str, Any], rule: str) -> Figure:
    """Return a chart of how many times as long as a rule's optimizer its contenders take."""
    figures = [f for f in result["figures"] if f["rule"] == rule]
    figure, panels = plt.subplots(
        1, len(SUMMARY), figsize=(10, 3.6), sharey=True, layout="constrained"
    )
    for axes, (shape, title) in zip(panels, SUMMARY.items(), strict=True):
        of_shape = [f for f in figures if f["shape"] == shape]
        timings = {f["timing"] for f in of_shape}
        timing = COLD if COLD in timings else "back to back"
        caches = TIMINGS[timing] if len(timings) > 1 else ""
        chosen = [f for f in of_shape if f["timing"] == timing]
        draw_times(axes, f"{title}\n{caches}", chosen, SUMMARY_FONT)
    return figure


def chart_small(result: dict[str, Any], rule: str) -> Figure:
    """Return a chart of the same for many small tensors: by shape, and by what the caches hold."""
    figures = [f for f in result["figures"] if f["rule"] == rule]
    figure, rows = plt.subplots(
        len(SMALL), len(TIMINGS), figsize=(10, 4.6), sharey=True, layout="constrained"
    )
    for row, (shape, title) in zip(rows, SMALL.items(), strict=True):
        for axes, (timing, caches) in zip(row, TIMINGS.items(), strict=True):
            chosen = [f for f in figures if (f["shape"], f["timing"]) == (shape, timing)]
            draw_times(axes, f"{title}, {caches}", chosen, SMALL_FONT)
    return figure


def draw_times(axes: Axes, title: str, figures: list[dict[str, Any]], font: int) -> None:
    """Draw one case of an optimizer: a horizontal bar for each contender."""
    measured = {f["contender"]: f["times_as_long"] for f in figures}
    times = {name: measured[name] for name in OPTIMIZERS if name in measured}
    most = max(time["p90"] for time in times.values())
    for at, (name, time) in enumerate(times.items()):
        label, color = OPTIMIZERS[name]
        axes.barh(label, time["median"], 0.7, color=color)
        if name != "package":
            axes.hlines(at, time["p10"], time["p90"], color=GREY, linewidth=2)
        text = f"{time['median']:.{0 if time['median'] >= 10 else 1}f}"
        axes.text(time["p90"] + most / 30, at, text, color=GREY, va="center", fontsize=font)
    axes.set_ylim(len(times) - 0.5, -0.5)  # the first at the top
    axes.set_xlim(0, most * 1.3)
    axes.set_title(title, color=GREY, fontsize=font)
    axes.tick_params(length=0, colors=GREY, labelsize=font)
    axes.set_xticks([])
    for side, spine in axes.spines.items():
        spine.set_visible(side == "left")
        spine.set_color(GREY)


def chart_offsets(result: dict[str, Any]) -> Figure:
    """Return a chart of the relative times at all offsets, a line for each rule."""
    moves = list(dict.fromkeys(f["moved"] for f in result["figures"]))
    columns = min(len(moves), 3)
    rows = -(-len(moves) // columns)
    figure, panels = plt.subplots(
        rows,
        columns,
        figsize=(13, 3.6 * rows),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes in panels.flat[len(moves) :]:
        axes.set_axis_off()
    for axes, move in zip(panels.flat, moves, strict=False):
        axes.set_prop_cycle(color=mpl.colormaps["tab20"].colors)
        for f in result["figures"]:
            if f["moved"] == move:
                times = f["relative_times"]
                axes.plot([int(at) for at in times], times.values(), linewidth=1, label=f["rule"])
        axes.set_title(f"moved: {move}", color=GREY)
        axes.set_xlabel("bytes modulo 4096", color=GREY)
        axes.tick_params(colors=GREY)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(GREY)
    figure.supylabel("time / median of all offsets", color=GREY, fontsize="medium")
    handles = panels[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside right center", frameon=False, labelcolor=GREY)
    return figure


def chart_training(result: dict[str, Any]) -> Figure:
    """Return a chart of training losses: a panel for each rule, a line for each kind of states."""
    runs, steps = result["runs"], result["settings"]["steps"]
    rules = list(dict.fromkeys((f["rule"], f["lr"]) for f in result["figures"]))
    rows = -(-len(rules) // TRAINING_COLUMNS)
    figure, panels = plt.subplots(
        rows,
        TRAINING_COLUMNS,
        figsize=(13, 2.1 * rows),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes in panels.flat[len(rules) :]:
        axes.set_axis_off()
    for axes, (rule, lr) in zip(panels.flat, rules, strict=False):
        of_rule = [r for r in runs if (r["rule"], r["hyperparameters"]["lr"]) == (rule, lr)]
        for arm, (label, color, style) in TRAINING.items():
            curves = [r["training_losses"] for r in of_rule if r["arm"] == arm]
            means = [sum(losses) / len(losses) for losses in zip(*curves, strict=True)]
            at = [steps * (i + 0.5) / len(means) for i in range(len(means))]
            axes.plot(at, means, color=color, linestyle=style, label=label)
        axes.set_title(f"{rule}, lr {lr:g}", color=GREY, fontsize="medium")
        axes.tick_params(colors=GREY)
        axes.grid(color=GREY, alpha=0.3, linewidth=0.5)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(GREY)
    figure.supxlabel("step", color=GREY, fontsize="medium")
    figure.supylabel("training loss (nats)", color=GREY, fontsize="medium")
    figure.legend(
        *panels[0][0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=len(TRAINING),
        frameon=False,
        labelcolor=GREY,
    )
    return figure


def main() -> None:
    """Read a result, write a chart."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("result", type=Path, help="JSON that a suite wrote")
    parser.add_argument("chart", type=Path, help="SVG or PNG to write")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--summary", metavar="RULE", help="compare one rule's times")
    kinds.add_argument("--small", metavar="RULE", help="the same for many small tensors")
    kinds.add_argument("--offsets", action="store_true", help="draw a result of bench_offsets.py")
    kinds.add_argument(
        "--training", action="store_true", help="draw a result of compare_training.py"
    )
    arguments = parser.parse_args()
    result = json.loads(arguments.result.read_text())

    mpl.rcParams["svg.hashsalt"] = "functions"  # the same result gives the same file
    if arguments.offsets:
        figure = chart_offsets(result)
    elif arguments.training:
        figure = chart_training(result)
    elif arguments.summary is not None:
        figure = chart_summary(result, arguments.summary)
    elif arguments.small is not None:
        figure = chart_small(result, arguments.small)
    else:
        figure = chart_rules(result)
    arguments.chart.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.chart, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
