"""``benchmarks/bench_cuda.py`` without a GPU: runs every case and its checks, but times nothing.

On emulated devices, the results come from the CUDA engine's code.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.on_devices()

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_cuda
    import cuda_contenders

    device = torch.get_default_device().type
    monkeypatch.setattr(bench_cuda.StandIn, "type", device)
    if device != "cpu" and torch.version.cuda is None:  # emulated devices have no random generator
        monkeypatch.setattr(torch, "Generator", HostGenerator)
        for name in ("rand", "randn"):
            monkeypatch.setattr(torch, name, on_the_host(getattr(torch, name)))
    # Smaller than the tensors, so that both of their ends are compared.
    monkeypatch.setattr(cuda_contenders, "_END", 3)
    # Called before each comparison, it would take most of the time.
    monkeypatch.setattr(gc, "collect", lambda *_: 0)
    return bench_cuda


class HostGenerator(torch.Generator):
    """A generator of the host, whatever device is requested."""

    def __new__(cls, device: str) -> "HostGenerator":
        return super().__new__(cls, "cpu")


def on_the_host(function: Any) -> Any:
    def made(*args: Any, device: Any = None, **kwargs: Any) -> Any:
        values = function(*args, device="cpu", **kwargs)
        return values.to(device or torch.get_default_device())

    return made


def make_suite(bench: Any) -> Any:
    return bench.Suite(bench.StandIn(), budget=0.0, quick=True)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
def test_every_case(bench: Any, tmp_path: Path) -> None:
    suite = make_suite(bench)
    rules = [bench.RULES[name] for name in ("adam", "lion")]
    for case in bench.CASES:
        for rule in rules:
            suite.run(case, rule)
        assert bench.report_case(suite, case) or case == "launches"
    assert suite.errors == {}
    # Some of PyTorch's contenders have no kernels for the CPU or for emulated devices.
    assert all(where.startswith("adamw-") for where in suite.unavailable)
    file = tmp_path / "report.json"
    bench.write_json(file, suite.report({}))
    report = json.loads(file.read_text())
    timed = {(figure["case"], figure["rule"], figure["contender"]) for figure in report["figures"]}
    for case in bench.CASES.keys() - {"launches"}:
        for rule in rules:
            assert (case, rule.name, "aligned" if case == "offsets" else "package") in timed
            if case.startswith("step-"):
                assert (case, rule.name, "capturable") in timed
    targets = {
        (target["target"].partition(": ")[2], target["wanted"]) for target in report["targets"]
    }
    assert targets >= {
        ("bandwidth / copy", ">= 0.9"),
        ("bandwidth / copy", ">= 0.85"),
        ("bandwidth / aligned", ">= 0.8"),
        ("host ms of a call", "<= 0.6"),
        ("kernels of a call", "<= 2"),
    }


def test_the_other_rules(bench: Any) -> None:
    suite = make_suite(bench)
    with torch.no_grad():
        for rule in bench.RULES.values():
            for case in ("large", *bench.DTYPES, "offsets"):
                suite.run(case, rule)
    assert suite.errors == {}
    assert suite.unavailable == {}


@torch.no_grad()
def test_a_wrong_step_is_reported(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in any column of any tensor is reported."""
    steps = sys.modules["cuda_steps"]
    stepper = steps.OURS[0]
    prepare = stepper.prepare
    for storage in bench.STORAGES.values():
        shape = bench.Shape("few", "few", [(3, 5)])
        problem = steps.StoredProblem(bench.RULES["adam"], shape, storage, bench.StandIn.type)
        check = steps.StepCheck(problem)
        for name, (tensor,) in zip(problem.names, problem.modified, strict=True):

            def spoil(step: Any, at: int, tensor: torch.Tensor = tensor) -> Any:
                """Return a step whose last call is wrong."""
                calls = iter(range(1, at + 1))

                def wrong_step() -> None:
                    step()
                    if next(calls) == at:
                        tensor.view(-1)[2].add_(10_000)

                return wrong_step

            with pytest.raises(AssertionError, match=f": {name}: 1 of 15 elements differ"):
                check(stepper, spoil(prepare(problem), at=3))
            check(stepper, prepare(problem))  # the problem is unchanged

            def prepare_wrong(one: Any, problem: Any = problem, spoil: Any = spoil) -> Any:
                return spoil(prepare(one), at=1) if one is problem else prepare(one)

            with monkeypatch.context() as patch:
                patch.setattr(stepper, "prepare", prepare_wrong)
                with pytest.raises(AssertionError, match=f": 1 elements of {name} differ in"):
                    steps.check_bits_of_step(problem)
            steps.check_bits_of_step(problem)
