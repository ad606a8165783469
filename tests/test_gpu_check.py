"""The GPU check without a GPU: its command line, its stages, and failures of all kinds."""

import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gpu_check
import gpu_processes
import gpu_recorder
import gpu_stages
import gpu_tests
import pytest
from gpu_processes import Session
from gpu_stages import STAGES, Stage
from gpu_tests import DELIBERATE, Outcome, judge, run_tests

ROOT = Path(__file__).parent.parent

NAMES = [stage.name for stage in STAGES]
# Why tests of the stages are skipped if something is missing.
MISSING = re.compile(
    r"(there are )?no native kernels|there is no CUDA device|not on emulated devices"
    r"|torch's test utilities need it"
)


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "why_no_gpu", lambda: None)
    monkeypatch.setattr(gpu_check, "describe_gpu", lambda: {"name": "Simulated"})
    monkeypatch.setattr(gpu_stages, "_for_this_gpu", lambda: {"TORCH_CUDA_ARCH_LIST": "9.0"})


def report_of(output: Path) -> dict[str, Any]:
    stages: dict[str, Any] = json.loads((output / "report.json").read_text())["stages"]
    return stages


# ---- the command line ----------------------------------------------------------------------------


def commands() -> list[str]:
    """All command lines in the documentation."""
    pages = [gpu_check.__doc__ or "", (ROOT / "CONTRIBUTING.md").read_text()]
    pages += [page.read_text() for page in [ROOT / "README.md", *ROOT.glob("docs/*.md")]]
    found = re.findall(r"python tools/gpu_check\.py([^#`\n|]*)", "\n".join(pages))
    found += re.findall(r"GPU_CHECK_ARGS=\"([^\"]*)\"", "\n".join(pages))
    return sorted({command.strip() for command in found})


def test_documented_commands() -> None:
    assert len(commands()) >= 5
    for command in commands():
        gpu_check.parse_arguments(shlex.split(command))


def test_names_are_separated_by_commas_or_spaces() -> None:
    parsed = gpu_check.parse_arguments(["--only", "build,bits", "speed", "--skip", "bits"])
    assert (parsed.only, parsed.skip) == (["build", "bits", "speed"], ["bits"])


def test_an_unknown_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        gpu_check.main(["--only", "build,bit"])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert "no stage is called 'bit'" in error
    assert ", ".join(NAMES) in error


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    assert all(f"{stage.limit} s" in line for stage, line in zip(STAGES, lines, strict=True))


def test_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_check, "why_no_gpu", lambda: "torch finds no GPU")
    assert gpu_check.main(["--output", str(tmp_path / "none")]) == 3
    assert not (tmp_path / "none").exists()


# ---- the commands of the stages ------------------------------------------------------------------


def test_each_stage_fits_a_call() -> None:
    assert all(stage.limit + gpu_check.GRACE <= gpu_check.BUDGET for stage in STAGES)
    for i, stage in enumerate(STAGES):
        assert stage.needs is None or stage.needs in NAMES[:i]


@pytest.mark.parametrize("stage", gpu_stages.TESTS)
def test_stages_name_tests_that_are_there(stage: str) -> None:
    arguments = gpu_stages.TESTS[stage]
    tests = {}
    for argument in arguments:
        if argument.startswith("tests/"):
            path, _, name = argument.partition("::")
            text = (ROOT / path).read_text()
            tests[path] = re.findall(r"^def (test_\w+)", text, re.MULTILINE)
            assert not name or name in tests[path], argument
            assert "-m" not in arguments or "mark.cuda" in text, argument
            if "-k" in arguments:
                word = arguments[arguments.index("-k") + 1]
                assert any(word in test for test in tests[path]), argument
    assert all(tests.values())


def test_each_test_for_cuda_is_in_a_stage() -> None:
    named = " ".join(argument for arguments in gpu_stages.TESTS.values() for argument in arguments)
    for file in (ROOT / "tests").glob("test_*.py"):
        if re.search(r"^[^#\n]*pytest\.mark\.cuda\b", file.read_text(), re.MULTILINE):
            assert f"tests/{file.name}" in named, file.name


def test_marked_files_name_a_stage() -> None:
    pattern = re.compile(r"pytest\.mark\.on_devices\(\"?([^\")]*)")
    for file in (ROOT / "tests").glob("test_*.py"):
        for stage in pattern.findall(file.read_text()) if file.name != Path(__file__).name else ():
            assert stage == "" or stage in gpu_stages.TESTS, file.name


def test_each_reason_to_skip_is_classified() -> None:
    """Each reason is either deliberate, or says that something is missing."""
    files = {
        argument.partition("::")[0]
        for arguments in gpu_stages.TESTS.values()
        for argument in arguments
        if argument.startswith("tests/")
    }
    pattern = re.compile(r'(?:pytest\.skip\(|reason=)\s*"([^"]+)"')
    reasons = {
        reason
        for file in [*files, "tests/conftest.py"]
        for reason in pattern.findall((ROOT / file).read_text())
    }
    assert len(reasons) > 5
    for reason in reasons:
        assert bool(DELIBERATE.match(reason)) != bool(MISSING.match(reason)), reason


class Recorded(Session):
    """Records commands instead of running them."""

    def __init__(self, output: Path) -> None:
        super().__init__(output)
        self.commands: list[Sequence[str]] = []

    def run(self, command: Sequence[str], **environment: str) -> Any:
        self.commands.append(command)
        return gpu_stages.Finished(0, "swept\nstepped by\n")


def test_commands_of_the_benchmarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    session = Recorded(tmp_path)
    for stage in STAGES:
        if stage.name in ("speed", "speed-8bit", "bench"):
            stage.run(session)
    scripts = []
    for command in session.commands:
        script = ROOT / command[1]
        scripts.append(script.stem)
        monkeypatch.setattr(sys, "argv", command[1:])
        assert importlib.import_module(script.stem).parse_arguments().json.parent == tmp_path
    assert scripts == ["bench_cuda", "bench_coded_states", "bench_cuda"]
    assert [("--quick" in command) for command in session.commands] == [True, False, False]


def test_programs_of_the_other_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_stages, "find_program", lambda name: f"/cuda/bin/{name}")
    session = Recorded(tmp_path)
    outcomes = {
        stage.name: stage.run(session)
        for stage in STAGES
        if stage.name in ("bits", "memcheck", "racecheck", "variants")
    }
    assert outcomes["memcheck"].status == outcomes["racecheck"].status == "passed"
    assert outcomes["bits"].status == "failed"  # nothing was compared
    programs = [
        a for command in session.commands for a in command if re.match("(benchmarks|tools)/", a)
    ]
    assert len(programs) == 4
    for program in programs:
        assert (ROOT / program).exists(), program
    (driver,) = (command for command in session.commands if "--seconds" in command)
    subprocess.run([*driver, "--list"], cwd=ROOT, check=True, capture_output=True)


def test_missing_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_stages, "find_program", lambda name: None)
    monkeypatch.setattr(gpu_stages, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu_tests, "find_spec", lambda name: None)
    for stage in STAGES:
        if stage.name.startswith("tests-") or stage.name in (
            *("variants", "megatron", "memcheck", "racecheck"),
        ):
            outcome = stage.run(Recorded(tmp_path))
            assert outcome.status == "unavailable", stage.name
            assert outcome.summary, stage.name


def test_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tests, "find_spec", lambda name: None)
    kept, left_out = gpu_tests._without_missing(gpu_stages.TESTS["tests-functions"])
    assert "tests/test_functions.py" in kept
    assert "tests/test_properties.py" not in kept
    assert left_out == ["left out test_properties.py: hypothesis is not installed"]


def test_a_missed_target_is_no_failure(tmp_path: Path) -> None:
    class Measured(Recorded):
        def run(self, command: Sequence[str], **environment: str) -> Any:
            target = {"rule": "adam", "target": "copy", "wanted": 0.9, "measured": {"median": 0.51}}
            figures = {"targets": [{**target, "met": False}, {**target, "met": True}]}
            Path(command[-1]).write_text(json.dumps(figures))
            return super().run(command)

    outcome = gpu_stages.bench("speed", "bench_cuda.py", ["--quick"], Measured(tmp_path))
    assert (outcome.status, outcome.summary) == ("passed", "1 of 2 targets met")
    assert outcome.details["missed"] == ["MISSED: adam: copy 0.9: 0.51"]


# ---- tests that fail -----------------------------------------------------------------------------


def run_file(
    tmp_path: Path,
    text: str,
    shards: int = 2,
    broken: str | None = None,
    session: Session | None = None,
) -> Outcome:
    """Run a test file, and optionally a broken one, as a stage does."""
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    files = [tmp_path / "test_it.py"]
    files[0].write_text(f"import os, time, pytest\n{text}")
    if broken is not None:
        files.append(tmp_path / "test_broken.py")
        files[1].write_text(broken)
    session = session or Session(tmp_path, time.monotonic() + 60.0)
    return run_tests(session, "it", [str(file) for file in files], shards)


def names(tests: Any) -> list[str]:
    return sorted(test.rpartition("::")[2] for test in tests)


def test_outcomes(tmp_path: Path) -> None:
    outcome = run_file(
        tmp_path,
        """
def test_a(): pass
def test_b(): assert 1 == 2, "as planned"
@pytest.fixture
def broken():
    raise ValueError("fixture")
def test_c(broken): pass
@pytest.mark.skipif(True, reason="there are no native kernels")
def test_d(): pass
def test_e(): pytest.importorskip("no_such_module")
@pytest.mark.parametrize("i", range(3))
def test_f(i): pytest.skip("of gradients only")
@pytest.fixture
def leaking():
    yield
    raise ValueError("teardown")
def test_g(leaking): pass
""",
        broken="import no_such_module",
    )
    assert outcome.status == "failed"
    assert outcome.summary == (
        "1 passed, 3 failed, 1 error, 3 skipped on purpose, 2 skipped that must run"
    )
    details = outcome.details
    assert names(details["failed"]) == ["test_b", "test_broken.py", "test_c", "test_g"]
    assert names(details["skipped_that_must_run"]) == ["test_d", "test_e"]
    assert details["skipped"]["of gradients only"] == 3
    for words in ("as planned", "fixture", "teardown", "no_such_module"):
        assert any(words in why for why in details["failed"].values())


def test_crashes_cost_one_test_each(tmp_path: Path) -> None:
    """After an illegal access, all later tests of the process would fail."""
    outcome = run_file(
        tmp_path,
        """
lost = False
@pytest.mark.parametrize("i", range(6))
def test_a(i):
    global lost
    if i == 1: os.abort()
    if i == 2: os._exit(9)
    lost |= i == 3
    if lost: raise RuntimeError("CUDA error: an illegal memory access was encountered")
""",
        shards=1,
    )
    assert (outcome.status, outcome.summary) == ("failed", "3 passed, 1 failed, 2 crashed")
    failed = {test.rpartition("::")[2]: why for test, why in outcome.details["failed"].items()}
    assert failed.pop("test_a[3]").startswith("failed: ")
    assert failed == {
        "test_a[1]": "crashed: its process ended with SIGABRT",
        "test_a[2]": "crashed: its process ended with exit status 9",
    }


def test_a_hanging_test_costs_one_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tests, "TEST_LIMIT", 1.0)
    outcome = run_file(
        tmp_path,
        """
@pytest.mark.parametrize("i", range(4))
def test_a(i):
    if i == 1: time.sleep(1000)
""",
    )
    assert (outcome.status, outcome.summary) == ("failed", "3 passed, 1 hung")
    assert outcome.details["failed"] == {"test_it.py::test_a[1]": "hung: stopped after 1 s"}


def test_a_stage_that_takes_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished outcomes are kept, even if the test ignores the interrupt."""
    signals = ((signal.SIGINT, 0.2), (signal.SIGTERM, 0.2), (signal.SIGKILL, 5.0))
    monkeypatch.setattr(gpu_processes, "SIGNALS", signals)

    class Late(Session):
        @property
        def deadline(self) -> float:  # type: ignore[override]
            return float("-inf") if (tmp_path / "reached").exists() else float("inf")

        def __init__(self, output: Path) -> None:
            self.output = output

    outcome = run_file(
        tmp_path,
        f"""
import signal
@pytest.mark.parametrize("i", range(4))
def test_a(i):
    if i == 2:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        open({str(tmp_path / "reached")!r}, "w").close()
        time.sleep(1000)
""",
        shards=1,
        session=Late(tmp_path),
    )
    assert outcome.status == "failed"
    assert outcome.summary == "2 passed, 1 cut short, 1 not run; stopped for taking too long"
    assert names(outcome.details["cut_short"]) == ["test_a[2]"]


def line(outcome: str, test: str, message: str = "") -> list[dict[str, Any]]:
    begun = {"stage": "it", "event": "start", "test": test}
    return [begun, {**begun, "event": "end", "outcome": outcome, "message": message}]


def test_nothing_passed() -> None:
    assert judge([]).status == "failed"
    of_purpose = line("skipped", "test_a", "slow: run with --slow")
    assert judge(of_purpose).status == "failed"
    assert judge([*of_purpose, *line("passed", "test_b")]).status == "passed"
    assert judge([*line("passed", "test_b"), {"event": "collected", "count": 2}]).status == "failed"


def test_outcomes_are_those_of_the_last_run(tmp_path: Path) -> None:
    path = tmp_path / "tests.jsonl"
    for stage, outcome in (("it", "failed"), ("other", "passed"), ("it", "passed")):
        gpu_recorder.append(path, stage, "begin")
        gpu_recorder.append(path, stage, "start", test="test_a")
        gpu_recorder.append(path, stage, "end", test="test_a", outcome=outcome, message="")
    with path.open("a") as file:
        file.write('{"stage": "it", "event": "sta')  # cut off by a kill
    outcome = judge(gpu_recorder.lines_of("it", gpu_recorder.read(path)))
    assert (outcome.status, outcome.summary) == ("passed", "1 passed")


# ---- stages that fail ----------------------------------------------------------------------------


def passes(session: Session) -> Outcome:
    finished = session.run([sys.executable, "-c", "print('fine')"])
    return gpu_stages.judged(finished, finished.output.strip())


def fails(session: Session) -> Outcome:
    return gpu_stages.judged(session.run([sys.executable, "-c", "exit('broken')"]), "")


def raises(session: Session) -> Outcome:
    raise ValueError("a bug of the check")


def hangs(session: Session) -> Outcome:
    return gpu_stages.judged(session.run(["sleep", "1000"]), "")


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def put(*stages: Stage) -> None:
        monkeypatch.setattr(gpu_check, "STAGES", stages)

    return put


def test_outcomes_are_kept_and_stages_go_on(stages: Any, tmp_path: Path) -> None:
    stages(
        Stage("build", "", 9, passes, None),
        Stage("bits", "", 9, raises),
        Stage("speed", "", 1, hangs),
        Stage("bench", "", 600, passes),
        Stage("megatron", "", 9, lambda _: Outcome("unavailable", "not installed")),
    )
    assert gpu_check.main(["--output", str(tmp_path)]) == 1
    report = report_of(tmp_path)
    assert {name: stage["status"] for name, stage in report.items()} == {
        "build": "passed",
        "bits": "failed",
        "speed": "failed",
        "bench": "not run",
        "megatron": "unavailable",
    }
    assert report["bits"]["summary"] == "ValueError: a bug of the check"
    assert report["speed"]["summary"] == "stopped for taking too long"
    assert report["bench"]["summary"].startswith("no time: ")
    assert report["build"]["gpu"] == "Simulated"
    assert "fine" in (tmp_path / "log.txt").read_text()
    # Again with the same folder: outcomes are kept, and passed stages are not repeated.
    stages(
        Stage("build", "", 9, raises, None),
        Stage("bits", "", 9, passes),
        Stage("speed", "", 9, raises),
        Stage("bench", "", 600, passes),
        Stage("megatron", "", 9, raises),
    )
    assert gpu_check.main(["--output", str(tmp_path), "--resume", "--only", "build,bits"]) == 0
    assert [stage["status"] for stage in report_of(tmp_path).values()] == [
        *("passed", "passed", "failed", "not run", "unavailable")
    ]
    assert gpu_check.main(["--output", str(tmp_path), "--only", "bench"]) == 5
    assert gpu_check.main(["--output", str(tmp_path), "--only", "bench", "--budget", "inf"]) == 0


def test_a_failed_build(stages: Any, tmp_path: Path) -> None:
    stages(
        Stage("build", "", 9, fails, None),
        Stage("bits", "", 9, raises),
        Stage("variants", "", 9, passes, None),
        Stage("wheel", "", 9, fails, None),
        Stage("first-import", "", 9, raises, "wheel"),
    )
    assert gpu_check.main(["--output", str(tmp_path)]) == 1
    assert {name: (s["status"], s["summary"]) for name, s in report_of(tmp_path).items()} == {
        "build": ("failed", "exit 1"),
        "bits": ("not run", "the stage build failed"),
        "variants": ("passed", "fine"),
        "wheel": ("failed", "exit 1"),
        "first-import": ("not run", "the stage wheel failed"),
    }
    assert "broken" in report_of(tmp_path)["build"]["details"]["tail"]
    # A later call remembers it.
    assert gpu_check.main(["--output", str(tmp_path), "--only", "bits"]) == 5


def test_the_build_is_in_use(tmp_path: Path) -> None:
    class Unusable(Recorded):
        def run(self, command: Sequence[str], **environment: str) -> Any:
            return gpu_stages.Finished(0, "CUDA: no\n")

    outcome = gpu_stages.build(Unusable(tmp_path))
    assert (outcome.status, outcome.summary) == ("failed", "for 9.0: compiled, but not in use")


def test_no_import_compiles(tmp_path: Path) -> None:
    code = "import os; print(os.environ['EMERGING_OPTIMIZERS_JIT'])"
    assert Session(tmp_path).run([sys.executable, "-c", code]).output == "0\n"


KILLED = """
import sys
from pathlib import Path
from types import ModuleType

sys.modules["torch"] = torch = ModuleType("torch")  # its import takes most of the time
torch.__version__ = "0"
import gpu_check
from gpu_stages import Stage
from gpu_tests import Outcome, run_tests

gpu_check.why_no_gpu = lambda: None
gpu_check.describe_gpu = lambda: {"name": "Simulated"}
file = str(Path(sys.argv[2]) / "test_it.py")
gpu_check.STAGES = (
    Stage("build", "", 9, lambda _: Outcome("passed", "built"), None),
    Stage("tests-cuda", "", 60, lambda session: run_tests(session, "tests-cuda", [file], 1)),
)
sys.exit(gpu_check.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_a_killed_check(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_it.py").write_text(
        "import os, time\ndef test_a(): pass\ndef test_b():\n"
        f"    open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        f"    while not os.path.exists({str(tmp_path / 'go on')!r}): time.sleep(0.1)\n"
    )
    command = [sys.executable, "-c", KILLED, "--output", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tools")}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
        assert report_of(tmp_path)["tests-cuda"]["status"] == "running"
        process.send_signal(number)
        status = process.wait(60)
    child = int((tmp_path / "pid").read_text())
    wait_for(lambda: not Path(f"/proc/{child}").exists() or is_zombie(child))
    if number == signal.SIGTERM:
        assert status == 4
        why = "the check was interrupted (SIGTERM)"
    else:
        assert status == -9
        # The next call notices.
        done = subprocess.run([*command, "--only", "build"], env=environment, check=False)
        assert done.returncode == 0
        why = "the check was killed"
    report = report_of(tmp_path)
    assert report["build"]["status"] == "passed"
    assert report["tests-cuda"]["status"] == "interrupted"
    assert report["tests-cuda"]["summary"] == f"{why}; 1 passed, 1 cut short"
    assert names(report["tests-cuda"]["details"]["cut_short"]) == ["test_b"]
    # It can be resumed.
    (tmp_path / "go on").touch()
    assert subprocess.run([*command, "--resume"], env=environment, check=False).returncode == 0
    report = report_of(tmp_path)
    assert report["build"]["summary"] == "built"
    assert (report["tests-cuda"]["status"], report["tests-cuda"]["summary"]) == (
        "passed",
        "2 passed",
    )


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_zombie(pid: int) -> bool:
    try:
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
