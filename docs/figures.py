"""The performance page's tables, of the committed results."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
SHAPES = {
    "large": "one of 48 Mi",
    "gpt2": "GPT-2 small",
    "1000x1000": "1000 of 1000",
    "1000x8": "1000 of 8",
}
FUNCTIONS = {
    "compiled": "`torch.compile`, per tensor",
    "foreach": "`torch._foreach_*`",
    "eager": "eager, per tensor",
    "roof": "the roof",
}
OPTIMIZERS = {
    "fused": "`torch.optim.AdamW(fused=True)`",
    "deepspeed": "DeepSpeed's CPU Adam",
    "foreach": "`torch.optim.AdamW(foreach=True)`",
    "loop": "`torch.optim.AdamW(foreach=False)`",
    "package-plain": "`AdamW(fused=False)` of this package",
    "roof": "the roof",
}
RULE_CONTENDERS = {
    "built in": "the built-in Adam",
    "roof": "the roof",
    "loop": "the formula, tensor by tensor",
    "compiled": "the formula under `torch.compile`, tensor by tensor",
}
CLIPPING = {
    "in_place": "`clip_grad_norm_`, then `AdamW.step()`",
    "fused": "`clip_grad_norm_`, then `torch.optim.AdamW(fused=True)`",
    "coefficient": "`clip_coefficient`, then `AdamW.step(grad_multiplier=...)`",
    "unclipped": "`AdamW.step()`, without clipping",
}


CODED = {
    "torchao 8-bit": "torchao's `AdamW8bit`",
    "bitsandbytes 8-bit": "bitsandbytes' `AdamW8bit`",
    "torch fused, float32": "`torch.optim.AdamW(fused=True)`, float32",
    "float32": "`AdamW`, float32",
    "8-bit, bfloat16, split masters": "`AdamW`, 8-bit, bfloat16 parameters with split masters",
}
CODED_SHAPES = {"gpt2": "GPT-2 small", "1000x64x64": "1000 of 64 x 64"}
TRAINING_ARMS = {"8-bit": "8-bit", "control": "float32, control"}


def substitutions() -> dict[str, str]:
    """Return the pieces of the page, by their names in it."""
    functions = _read("functions-cpu.json")
    optimizers = _read("optimizers-cpu.json")
    distributed = _read("distributed-cpu.json")
    rules = _read("rules-cpu.json")
    interpreter = _read("interpreter-cpu.json")
    clipping = _read("clipping-cpu.json")
    coded = _read("coded-states-cpu.json")
    offsets = _read("offsets-cpu.json")
    training = _read("training-cpu.json")
    long_training = _read("training-long-cpu.json")
    return {
        "functions_caption": _caption(functions, "functions-cpu.json"),
        "functions_table": _ratios(_of_adam(functions), FUNCTIONS),
        "optimizers_caption": _caption(optimizers, "optimizers-cpu.json"),
        "optimizers_table": _ratios(_of_adam(optimizers), OPTIMIZERS),
        "optimizers_missed": _missed(optimizers["targets"]),
        "coded_caption": _caption(coded, "coded-states-cpu.json"),
        "coded_table": _coded(coded["figures"]),
        "coded_missed": _missed(coded["targets"]),
        "coded_avx2": _coded_slowdown(_read("coded-states-avx2-cpu.json")["figures"]),
        "clipping_caption": _caption(clipping, "clipping-cpu.json"),
        "clipping_table": _ratios(clipping["figures"], CLIPPING),
        "offsets_caption": _caption(offsets, "offsets-cpu.json"),
        "offsets_table": _offsets(offsets["figures"]),
        "offsets_missed": _missed(offsets["targets"]),
        "rules_caption": _caption(rules, "rules-cpu.json"),
        "rules_table": _rules(rules["figures"]),
        "interpreter_caption": _caption(interpreter, "interpreter-cpu.json"),
        "interpreter_table": _interpreter(interpreter["figures"]),
        "interpreter_missed": _missed(interpreter["targets"]),
        "interpreter_switches": ", ".join(
            f"{slowest:.2f} ({around:.2f})" for slowest, around in interpreter["switches"]
        ),
        "training_caption": _training_caption(training, "training-cpu.json"),
        "training_table": _training(training["figures"]),
        "training_missed": _training_missed(training),
        "long_training_caption": _training_caption(long_training, "training-long-cpu.json"),
        "long_training_table": _training(long_training["figures"]),
        "distributed_caption": _caption(distributed, "distributed-cpu.json"),
        "distributed_table": _distributed(distributed["figures"]),
    }


def readme_sentence() -> str:
    """Return what the README says of small tensors that are in the caches."""
    times = {
        f["shape"]: _round(f["times_as_long"]["median"])
        for f in _of_adam(_read("optimizers-cpu.json"))
        if f["contender"] == "fused" and f["timing"] == "back to back"
    }
    return (
        "Back to back, when they are in the caches, `torch.optim.AdamW(fused=True)` takes"
        f" {times['1000x1000']} and {times['1000x8']} times as long."
    )


def _read(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return result


def _caption(result: dict[str, Any], name: str) -> str:
    run = result["run"]
    return (
        f"{run['cpu']}, {run['threads']} {'thread' if run['threads'] == 1 else 'threads'}, float32,"
        f" torch {run['torch']}, instruction set {run['instruction_set']}, {run['date'][:10]}:"
        f" `{run['command']}`. All figures: `benchmarks/results/{name}`."
    )


def _of_adam(result: dict[str, Any]) -> list[dict[str, Any]]:
    figures = result["figures"]
    return [f for f in figures if f["rule"] == "adam" and f["compared_with"] == "package"]


def _ratios(figures: list[dict[str, Any]], contenders: dict[str, str]) -> str:
    """Return a table of how many times as long the contenders take."""
    times = {
        (f["contender"], f["shape"], f.get("timing", "")): f["times_as_long"]["median"]
        for f in figures
    }
    columns = {
        (shape, timing): f"{SHAPES[shape]}{', cold' if timing.endswith('cold') else ''}"
        for shape in SHAPES
        for _, measured, timing in times
        if measured == shape
    }
    rows = [
        [title, *(_round(times[(name, *column)]) for column in columns)]
        for name, title in contenders.items()
    ]
    return _table(["", *columns.values()], rows)


def _coded(figures: list[dict[str, Any]]) -> str:
    """Return a table of how many times as long as with 8-bit states a step takes."""
    times = {
        (f["contender"], f["shape"]): _round(f["times_8bit"]["median"])
        for f in figures
        if f["times_8bit"] is not None
    }
    rows = [
        [title, *(times.get((name, shape), "") for shape in CODED_SHAPES)]
        for name, title in CODED.items()
    ]
    return _table(["", *CODED_SHAPES.values()], rows)


def _coded_slowdown(figures: list[dict[str, Any]]) -> str:
    """Return how many times as long as with float32 states a step takes with 8-bit ones."""
    (float32,) = (f["times_8bit"]["median"] for f in figures if f["contender"] == "float32")
    return _round(1 / float32)


def _training_caption(result: dict[str, Any], name: str) -> str:
    settings = result["settings"]
    options = f"--steps {settings['steps']} --batch {settings['batch']}"
    return (
        f"torch {result['run']['torch']}: `python benchmarks/compare_training.py {options}"
        f"{' --compile' if settings['compiled'] else ''}`, which continues where it was stopped."
        f" All figures: `benchmarks/results/{name}`."
    )


def _training(figures: list[dict[str, Any]]) -> str:
    """Return a table of losses and movements, relative to float32's."""
    rows = [
        [
            f"`{f['rule']}`",
            TRAINING_ARMS[f["arm"]],
            str(len(f["differences"])),
            f"{f['lr']:g}",
            f"{f['loss']:.3f}",
            _percent(f["difference"]),
            "" if f["spread"] is None else f"{f['spread']:.2%}".replace("%", " %"),
            f"{f['movement']:.3f}",
        ]
        for f in figures
    ]
    head = ["rule", "states", "seeds", "learning rate", "loss with float32 states"]
    return _table([*head, "difference", "spread", "movement"], rows)


def _percent(value: float) -> str:
    return f"{value:+.2%}".replace("%", " %")


def _training_missed(result: dict[str, Any]) -> str:
    """Return a sentence that names the rules whose loss differs by more than it may."""
    targets = result["targets"]
    missed = [f"{t['rule']} ({_percent(t['measured'])})" for t in targets if not t["met"]]
    wanted, count = targets[0]["wanted"].replace("%", " %"), len(targets)
    if not missed:
        return f"With 8-bit states, the mean difference is {wanted} in all {count} rows."
    return (
        f"With 8-bit states, the mean difference is {wanted} in {count - len(missed)} of {count}"
        f" rows, but not for {'; '.join(missed)}."
    )


def _offsets(figures: list[dict[str, Any]]) -> str:
    """Return a table of the best offset's time over the worst one's."""
    least = {(f["rule"], f["moved"]): f["best_over_worst"] for f in figures}
    moves = list(dict.fromkeys(moved for _, moved in least))
    rules = dict.fromkeys(rule for rule, _ in least)
    rows = [[rule, *(_round(least[rule, moved]) for moved in moves)] for rule in rules]
    return _table(["moved", *moves], rows)


def _missed(targets: list[dict[str, Any]]) -> str:
    rows = [
        [t["target"], t["rule"], t["wanted"].replace(">= ", "at least "), _measured(t)]
        for t in targets
        if not t["met"]
    ]
    return _table(["target", "of", "wanted", "measured"], rows)


def _measured(target: dict[str, Any]) -> str:
    measured = target["measured"]
    # Precise enough to tell it from what was wanted.
    return f"{measured['median'] if isinstance(measured, dict) else measured:.4g}"


def _distributed(figures: list[dict[str, Any]]) -> str:
    rows = [
        [f["what"], f["who"], _round(f["times_as_long"]["median"]), f["compared_with"]]
        for f in figures
        if f["who"] != f["compared_with"]
    ]
    return _table(["case", "contender", "time ratio", "relative to"], rows)


def _rules(figures: list[dict[str, Any]]) -> str:
    rows = [
        [
            f"{f['rule']}, {f['what']}",
            SHAPES[f["shape"]],
            RULE_CONTENDERS[f["contender"]],
            _round(f["times_as_long"]["median"]),
        ]
        for f in figures
        if f["contender"] in RULE_CONTENDERS
    ]
    return _table(["rule", "tensors", "contender", "time ratio"], rows)


def _interpreter(figures: list[dict[str, Any]]) -> str:
    """Return a table of the interpreter's time, relative to the compiled rule and the formula."""
    times = {(f["rule"], f["shape"], f["contender"]): f["times_as_long"]["median"] for f in figures}
    shapes = list(dict.fromkeys(shape for _, shape, _ in times))
    rows = []
    for rule in dict.fromkeys(rule for rule, _, _ in times):
        row = [rule]
        for shape in shapes:
            row.append(_round(1 / times[rule, shape, "compiled"]))
            row.append(_round(times[rule, shape, "loop"]))
        rows.append(row)
    head = [
        f"{SHAPES[shape]}: {what}"
        for shape in shapes
        for what in ("interpreted / compiled", "formula / interpreted")
    ]
    return _table(["", *head], rows)


def _round(value: float) -> str:
    places = next(i for i, least in enumerate((10.0, 2.0, 0.1, 0.0)) if value >= least)
    return f"{value:.{places}f}"


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
