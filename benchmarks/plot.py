"""Draw a chart of a committed result; measures nothing.

    python benchmarks/plot.py benchmarks/results/functions-cpu.json docs/functions-cpu.svg
    python benchmarks/plot.py benchmarks/results/optimizers-cpu.json docs/optimizers-cpu.svg

Bars are memory bandwidth, one group a rule; the line over each group is the roof, a plain
loop with the same reads and writes, measured in the same run. The colours and the grey of the text
read on a light page and on a dark one; the background is transparent.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

# Many small tensors spread the contenders over two orders of magnitude: logarithmic panels.
PANELS = {
    "gpt2": ("The 148 tensors of GPT-2 small", "linear"),
    "1000x1000": ("1000 tensors of 1000 elements", "log"),
    "1000x8": ("1000 tensors of 8 elements", "log"),
}
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
    "loop": ("a loop of PyTorch operations", "#999999"),
}
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


def main() -> None:
    """Read a result, write a chart."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("result", type=Path, help="JSON that a suite wrote")
    parser.add_argument("chart", type=Path, help="SVG or PNG to write")
    arguments = parser.parse_args()
    result = json.loads(arguments.result.read_text())
    figures = result["figures"]
    contenders = OPTIMIZERS if "optimizer" in figures[0] else FUNCTIONS
    figures = [f for f in figures if f.get("timing", "back to back") == "back to back"]

    mpl.rcParams["svg.hashsalt"] = "functions"  # the same result gives the same file
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
    arguments.chart.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.chart, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
