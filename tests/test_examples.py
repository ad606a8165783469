"""The examples run from a shell, and write the files that they announce."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import oracle
import pytest
from processes import launch
from support import run_python

ROOT = Path(__file__).parent.parent
RULES = sorted([*oracle.RULES, "adopt"])
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

missing = [name for name in ("matplotlib", "tqdm") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    # In CI everything must be installed: a missing package is a failure.
    bool(missing) and not os.environ.get("CI"),
    reason=f"the demo extra is not installed ({' and '.join(missing)} missing)",
)


def with_root_on_path():
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


# Twelve steps per rule are timed instead of 42.
FASTER = """
import sys
sys.path.insert(0, "examples")
sys.argv = ["examples/train_char_lm.py", *{arguments}]
import train_char_lm
from char_lm import timing
timing.TIMING_ROUNDS = 2
sys.exit(train_char_lm.main())
"""


def run_example(output, *arguments):
    """Run an example from a shell."""
    return subprocess.run(
        [sys.executable, "examples/train_char_lm.py", *arguments, "--output", str(output)],
        cwd=ROOT,
        env=with_root_on_path(),
        capture_output=True,
        text=True,
        timeout=300,
    )


def run_distributed(world_size, script, *arguments):
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    process = subprocess.Popen(
        [sys.executable, "-m", *torchrun, f"examples/{script}", *map(str, arguments)],
        cwd=ROOT,
        env=with_root_on_path() | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, err = process.communicate(timeout=180)
    finally:
        process.terminate()  # torchrun then stops the processes that it started
        process.wait(timeout=60)
    return SimpleNamespace(status=process.returncode, out=out, err=err)


def run_in_processes(world_size, folder, script, *arguments):
    """Run an example as torchrun does, in prepared processes; return the output."""
    launch("example_workers.run_example", world_size, folder, script, *arguments)
    return (folder / "printed").read_text()


def check_outputs(output, done, rules, steps):
    printed = [line.split()[0] for line in done.stdout.splitlines() if line.split()[:1]]
    assert [word for word in printed if word in RULES] == rules
    report = json.loads((output / "table.json").read_text())
    assert [row["rule"] for row in report["table"]] == rules
    for row in report["table"]:
        assert row["steps"] == steps
        assert row["last_held_out_loss"] < row["first_held_out_loss"]
        assert row["native_ms_per_step"] > 0
        assert row["plain_ms_per_step"] > 0
        assert (row["torch_fused_ms_per_step"] is not None) == (row["rule"] == "adam")
    assert report["machine"]["threads"] == 1
    assert report["model"]["tensors"] >= 100
    # The more context a character has, the lower its loss.
    assert report["held_out_baselines"]["bigram"] < report["held_out_baselines"]["unigram"] < 4
    assert (output / "loss.png").read_bytes().startswith(PNG_SIGNATURE)


def test_one_rule_fails_where_it_has_not_learned(tmp_path):
    done = run_example(tmp_path, "--threads", "1", "--rule", "lion", "--steps", "3")
    assert done.returncode == 1, done.stderr
    check_outputs(tmp_path, done, ["lion"], 3)


@pytest.mark.builtin_rules("examples train with built-in rules")
def test_all_rules(tmp_path):
    arguments = f"--threads 1 --rule all --steps 2 --no-check --output {tmp_path}".split()
    done = run_python(FASTER.format(arguments=arguments), package=ROOT)
    assert done.returncode == 0, done.stderr
    check_outputs(tmp_path, done, RULES, 2)
    report = json.loads((tmp_path / "table.json").read_text())
    firsts = {row["first_held_out_loss"] for row in report["table"]}
    assert len(firsts) == 1, "the rules did not start from the same weights"


def test_a_missing_package_is_named_with_its_remedy():
    hidden = "import sys; sys.modules['tqdm'] = None\n"
    done = run_python(hidden + FASTER.format(arguments=[]), package=ROOT)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        'tqdm is missing: pip install "emerging-optimizers-native[demo]"'
    )


def test_fsdp2_resumes_with_another_number_of_processes(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    arguments = ["--checkpoints", str(checkpoints), "--steps", "4", "--save-every", "2"]
    arguments += ["--optimizer", "ademamix"]
    whole = run_in_processes(2, tmp_path, "fsdp2_char_lm.py", *arguments)
    losses = [float(loss) for loss in re.findall(r"^step .* loss (.*)$", whole, re.MULTILINE)]
    assert losses[-1] < losses[0]
    shutil.rmtree(checkpoints / "step-000004")
    (checkpoints / "step-000003").mkdir()  # like an incomplete checkpoint
    rest = run_distributed(1, "fsdp2_char_lm.py", *arguments, "--resume")
    assert rest.status == 0, rest.err
    assert f"loaded {checkpoints / 'step-000002'}\nstep    3" in rest.out
    # The sum of two processes' gradients is rounded differently.
    last, resumed = (
        float(re.search(r"held-out loss ([\d.]+)", text)[1]) for text in (whole, rest.out)
    )
    assert resumed == pytest.approx(last, abs=1e-3)


def test_megatron_shards(tmp_path):
    out = run_in_processes(3, tmp_path, "megatron_shards.py", "--steps", "2")
    # Neither at the start of a parameter nor at a multiple of 16 bytes.
    assert "process 1: from element 381,539," in out
    sharded, of_one = re.findall(r"^(?:sharded|one process): +(\w{16})$", out, re.MULTILINE)
    assert sharded == of_one
    losses = [float(loss) for loss in re.findall(r"^step .* loss (.*)$", out, re.MULTILINE)]
    assert losses[-1] < losses[0]
