"""``benchmarks/compare_training.py`` resumes; the committed runs are complete, and in the docs."""

import importlib
import importlib.util
import json
import math
import os
from itertools import product
from pathlib import Path
from typing import Any

import oracle
import pytest
from rule_references import GALLERY_RULES
from support import run_python

from emerging_optimizers.registry import get_optimizer_cls

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"

missing = [name for name in ("matplotlib", "tqdm") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.once,
    pytest.mark.builtin_rules("the comparison trains with built-in rules"),
    pytest.mark.skipif(
        # In CI everything must be installed: a missing package is a failure.
        bool(missing) and not os.environ.get("CI"),
        reason=f"the demo extra is not installed ({' and '.join(missing)} missing)",
    ),
]

# The demo registers ADOPT, so not in the tests' process.
SETUP = """
import json, sys
from dataclasses import asdict
from pathlib import Path
sys.path[:0] = ["benchmarks", "examples"]
import compare_training
compare_training.EVALUATION_BATCHES = 1

def run(*arguments):
    sys.argv = ["benchmarks/compare_training.py", *arguments]
    compare_training.main()
"""
RESUME = """
run("--steps", "2", "--batch", "1", "--rules", "adam", "--seeds", "0", "--json", {path!r})
print("again")
run("--steps", "2", "--batch", "1", "--rules", "adam", "--seeds", "0", "1", "--json", {path!r})
try:
    run("--steps", "3", "--batch", "1", "--rules", "adam", "--json", {path!r})
except ValueError as error:
    print(error)
"""
RECOMPUTE = """
runs = json.loads(Path("benchmarks/results/{name}").read_text())["runs"]
figures = compare_training.compare_all(runs)
print(json.dumps(
    {{
        "names": compare_training.NAMES,
        "with control": compare_training.WITH_CONTROL,
        "tasks": [task.as_json() for task in compare_training.tasks_of(
            compare_training.NAMES, [0, 1, 2], 1000
        )],
        "figures": [asdict(figure) for figure in figures],
        "targets": [asdict(target) for target in compare_training.verdicts(figures)],
    }}
))
"""


def read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def test_resumes(tmp_path: Path) -> None:
    path = tmp_path / "training.json"
    done = run_python(SETUP + RESUME.format(path=str(path)), package=ROOT)
    assert done.returncode == 0, done.stderr
    first, again = done.stdout.split("again\n")
    arms = ("float32", "8-bit", "control")
    for printed, seed in ((first, 0), (again, 1)):
        assert printed.count("adam, ") == len(arms)
        for arm in arms:
            assert f"adam, {arm}, seed {seed}: loss " in printed
    assert "has runs with {'steps': 2, 'batch': 1, 'compiled': False}: use another file" in again

    result = json.loads(path.read_text())
    losses = {(run["arm"], run["seed"]): run["held_out_loss"] for run in result["runs"]}
    assert losses.keys() == set(product(arms, (0, 1)))
    coded, control = result["figures"]
    assert (coded["arm"], control["arm"]) == ("8-bit", "control")
    expected = [losses["8-bit", seed] / losses["float32", seed] - 1 for seed in (0, 1)]
    assert coded["differences"] == pytest.approx(expected)
    assert coded["difference"] == pytest.approx(sum(expected) / 2)
    assert coded["spread"] == pytest.approx(abs(expected[0] - expected[1]) / math.sqrt(2))
    # Two steps from the same weights: almost the same updates, and the control's even more so.
    assert 0.9 < coded["movement"] < 1.1
    assert control["movement"] == pytest.approx(1, abs=1e-3)
    assert abs(control["difference"]) < 1e-4


@pytest.mark.parametrize("name", ["training-cpu.json", "training-long-cpu.json"])
def test_committed_figures(name: str) -> None:
    done = run_python(SETUP + RECOMPUTE.format(name=name), package=ROOT)
    assert done.returncode == 0, done.stderr
    computed = json.loads(done.stdout)
    result = read(name)
    assert result["settings"]["steps"] >= 1000
    assert result["targets"] == computed["targets"]
    for committed, figure in zip(result["figures"], computed["figures"], strict=True):
        assert committed.pop("differences") == pytest.approx(figure.pop("differences"))
        assert committed == pytest.approx(figure)
    if name == "training-long-cpu.json":
        assert {(run["rule"], run["arm"]) for run in result["runs"]} >= {
            ("adam", "float32"),
            ("adam", "8-bit"),
        }
        return

    # Every rule with a state that may be 8-bit, with the hyperparameters of the script.
    package = [n for n in oracle.RULES if has_codes(get_optimizer_cls(n))]
    gallery = [n for n, rule in GALLERY_RULES.items() if has_codes(rule.optimizer)]
    assert sorted(computed["names"]) == sorted([*package, *gallery])
    keys = ("rule", "arm", "seed", "hyperparameters")
    runs = [{key: run[key] for key in keys} for run in result["runs"]]
    ran = {run["rule"] for run in runs}
    assert ran >= {*package, "adagrad", "adopt", "radam"}
    # A rule of the gallery that has been run has been run with all seeds.
    assert [task for task in computed["tasks"] if task["rule"] in ran and task not in runs] == []


def has_codes(cls: Any) -> bool:
    """Return whether an optimizer may store a state in 8 bits."""
    return any(code is not None for code in cls._rule.codes)


def test_documented_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    texts = importlib.import_module("figures").substitutions()
    page = (ROOT / "docs" / "numerics.md").read_text()
    for prefix, name in (("", "training-cpu.json"), ("long_", "training-long-cpu.json")):
        assert f"{{{{ {prefix}training_table }}}}" in page
        assert f"{{{{ {prefix}training_caption }}}}" in page
        _, _, *rows = texts[f"{prefix}training_table"].splitlines()
        for row, figure in zip(rows, read(name)["figures"], strict=True):
            rule, _, seeds, lr, loss, difference, _, movement = row.strip("| ").split(" | ")
            assert (rule, seeds) == (f"`{figure['rule']}`", str(len(figure["differences"])))
            assert (lr, loss) == (f"{figure['lr']:g}", f"{figure['loss']:.3f}")
            number = float(difference.removesuffix(" %"))
            assert number == pytest.approx(100 * figure["difference"], abs=0.005)
            assert movement == f"{figure['movement']:.3f}"
    assert "{{ training_missed }}" in page
    for target in read("training-cpu.json")["targets"]:
        assert target["met"] == (f"{target['rule']} (" not in texts["training_missed"])


def test_statements() -> None:
    """What the page says beside the tables."""
    result = read("training-cpu.json")
    for figure in result["figures"]:
        if figure["loss"] < 3:
            assert figure["movement"] == pytest.approx(1, abs=0.05)
        if figure["rule"] in ("lion", "signum"):
            assert figure["movement"] == pytest.approx(1, abs=1e-3)
    coded = {
        (f["rule"], f["lr"]): f["differences"] for f in result["figures"] if f["arm"] == "8-bit"
    }
    assert sum(difference > 0.005 for difference in coded["laprop", 2e-3]) == 1
    assert max(coded["sim_ademamix", 4e-4]) < 0
    control = {f["rule"]: f["differences"] for f in result["figures"] if f["arm"] == "control"}
    for rule, largest in (("laprop", "0.5"), ("sim_ademamix", "0.3")):
        assert f"{100 * max(map(abs, control[rule])):.1f}" == largest
    losses = [
        run["held_out_loss"]
        for run in result["runs"]
        if (run["rule"], run["arm"], run["hyperparameters"]["lr"]) == ("rmsprop", "float32", 5e-4)
    ]
    assert sum(loss > 3.3 for loss in losses) == 2
