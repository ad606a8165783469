"""Rules are interpreted until a build in the background is done, or for good without a compiler."""

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreting import needs_compiler
from support import needs_native, run_python
from test_jit_faults import write_script

import emerging_optimizers as eo
from emerging_optimizers import _build
from emerging_optimizers._user_rules import UserRule, background, native_code

pytestmark = [
    needs_native,
    pytest.mark.once,
    pytest.mark.usefixtures("_no_other_device"),
    pytest.mark.skipif(sys.platform == "win32", reason="shell scripts as compilers"),
]

# Before the tests' session replaces it.
RUN = background.run
COUNT = 0


def make_rule() -> UserRule:
    """Return a rule that has not been compiled."""
    global COUNT
    COUNT += 1
    name = f"background_{os.getpid()}_{COUNT}"
    namespace: dict[str, Any] = {"eo": eo}
    exec(
        f"@eo.rule\ndef {name}(grad, exp_avg, *, beta=0.9):\n"
        "    exp_avg.mul_(beta).add_(grad, alpha=1 - beta)\n    return exp_avg\n",
        namespace,
    )
    return namespace[name]  # type: ignore[no-any-return]


def call(rule: UserRule) -> list[float]:
    return rule(torch.tensor([1.0, -2.0]), torch.zeros(2), beta=0.5).tolist()  # type: ignore[no-any-return]


RESULT = [0.5, -1.0]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of all rules in an empty cache."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.delenv("EMERGING_OPTIMIZERS_JIT", raising=False)
    return tmp_path / "extensions" / "emerging_optimizers" / "rules"


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[threading.Thread]]:
    """Builds run in the background, as outside of tests. The threads are joined."""
    started: list[threading.Thread] = []

    def run(task: Callable[[], None]) -> None:
        started.append(threading.Thread(target=task))
        started[-1].start()

    monkeypatch.setattr(background, "run", run)
    yield started
    for thread in started:
        thread.join()


@pytest.fixture
def hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that waits while a file exists, and notes its calls."""
    folder = tmp_path / "compiler"
    text = f'echo >> "{folder}/calls"\nwhile test -e "{folder}/hold"; do sleep 0.05; done\n'
    script = write_script(folder / "c++", f'{text}exec c++ "$@"')
    (folder / "hold").touch()
    (folder / "calls").touch()
    monkeypatch.setenv("CXX", str(script))
    return folder / "hold"


def calls_of(hold: Path) -> int:
    return len(hold.with_name("calls").read_text().splitlines())


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@needs_compiler
def test_the_first_call_does_not_wait(
    threads: list[threading.Thread], hold: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rule = make_rule()
    assert call(rule) == RESULT
    wait_for(lambda: calls_of(hold) == 1)
    assert not rule.is_compiled
    assert call(rule) == RESULT
    assert capfd.readouterr().err == ""
    hold.unlink()
    wait_for(lambda: rule.is_compiled)
    assert call(rule) == RESULT
    (thread,) = threads
    thread.join()
    (line,) = capfd.readouterr().err.splitlines()
    assert re.match(rf"emerging_optimizers: compiled the rule {rule.name} in \d", line)
    assert calls_of(hold) == 1


@needs_compiler
def test_a_step_switches_without_a_change(threads: list[threading.Thread], hold: Path) -> None:
    rule = make_rule()

    class Momentum(eo.ScalarOptimizer, rule=rule, lr=0.1):
        """SGD with an average."""

    params = [torch.nn.Parameter(torch.ones(300)) for _ in range(2)]
    optimizers = [Momentum([param], fused=True) for param in params]

    def train(i: int, steps: range) -> None:
        for step in steps:
            params[i].grad = torch.randn(300, generator=torch.Generator().manual_seed(step))
            optimizers[i].step()

    train(0, range(2))
    assert not rule.is_compiled
    hold.unlink()
    wait_for(lambda: rule.is_compiled)
    train(0, range(2, 4))
    train(1, range(4))  # compiled from the first step on
    averages = [o.state[p]["exp_avg"] for o, p in zip(optimizers, params, strict=True)]
    assert torch.equal(*params)
    assert torch.equal(*averages)


@needs_compiler
def test_compile_waits_for_the_build(threads: list[threading.Thread], hold: Path) -> None:
    rule = make_rule()
    call(rule)
    wait_for(lambda: calls_of(hold) == 1)
    threading.Timer(0.3, hold.unlink).start()
    rule.compile()
    assert rule.is_compiled
    assert calls_of(hold) == 1


@needs_compiler
def test_a_library_in_the_cache_is_loaded_at_once(threads: list[threading.Thread]) -> None:
    rule = make_rule()
    rule.compile()
    text = (
        "import emerging_optimizers as eo, torch\n"
        f"code = '''@eo.rule\ndef {rule.name}(grad, exp_avg, *, beta=0.9):\n"
        "    exp_avg.mul_(beta).add_(grad, alpha=1 - beta)\n    return exp_avg\n'''\n"
        f"exec(code)\n{rule.name}(torch.ones(2), torch.zeros(2))\nprint({rule.name}.is_compiled)\n"
    )
    done = run_python(text)
    assert (done.stdout, done.stderr) == ("True\n", "")


@needs_compiler
def test_a_build_outlives_its_process(cache: Path, hold: Path) -> None:
    text = (
        "import emerging_optimizers as eo, torch, pathlib, time\n"
        "code = '''@eo.rule\ndef background_short(grad):\n    return grad * 3\n'''\n"
        f"exec(code)\nprint(background_short(torch.ones(2)).tolist())\n"
        f"while not pathlib.Path({str(hold.with_name('calls'))!r}).read_text(): time.sleep(0.02)\n"
    )
    done = run_python(text)
    assert (done.stdout, done.stderr) == ("[3.0, 3.0]\n", "")
    assert list(cache.glob("*/*.so")) == []
    hold.unlink()
    wait_for(lambda: len(list(cache.glob("background_short-*/*.so"))) == 1)


def test_no_compiler(
    threads: list[threading.Thread],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    rule = make_rule()
    for _ in range(2):
        assert call(rule) == RESULT
    (line,) = capfd.readouterr().err.splitlines()
    assert line == (
        f"emerging_optimizers: the rule {rule.name} is interpreted, which takes longer: no C++"
        " compiler (no-such-compiler) was found. Install one or set CXX, and call the rule's"
        " compile()"
    )
    with pytest.raises(RuntimeError, match=f"the rule {rule.name} cannot be compiled: no C\\+\\+"):
        rule.compile()
    assert threads == []
    assert not rule.is_compiled


def test_switched_off(
    threads: list[threading.Thread],
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("EMERGING_OPTIMIZERS_JIT", "0")
    rule = make_rule()
    assert call(rule) == RESULT
    with pytest.raises(RuntimeError, match="cannot be compiled: EMERGING_OPTIMIZERS_JIT=0"):
        rule.compile()
    assert call(rule) == RESULT
    assert capfd.readouterr().err == ""
    assert threads == []
    assert not cache.exists()


def test_a_compiler_that_fails(
    threads: list[threading.Thread],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    script = write_script(tmp_path / "failing" / "c++", 'echo "x.cpp:1: error: no" >&2; exit 1')
    monkeypatch.setenv("CXX", str(script))
    rule = make_rule()
    assert call(rule) == RESULT
    threads[0].join()
    assert call(rule) == RESULT
    (line,) = capfd.readouterr().err.splitlines()
    start = f"emerging_optimizers: the rule {rule.name} is interpreted, which takes longer: "
    assert line.startswith(f"{start}compilation failed: x.cpp:1: error: no. Fix the errors in ")
    assert len(threads) == 1


def test_a_cache_that_others_can_write(
    threads: list[threading.Thread], cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    rule = make_rule()
    assert call(rule) == RESULT
    (line,) = capfd.readouterr().err.splitlines()
    assert f"the rule {rule.name} is interpreted, which takes longer: {cache} can be" in line
    assert threads == []


@needs_compiler
@pytest.mark.parametrize("executable", ["/no/such/python", "/bin/true", "/bin/echo", "", None])
def test_another_executable_than_python(
    threads: list[threading.Thread], monkeypatch: pytest.MonkeyPatch, executable: str | None
) -> None:
    """The compiler is then called by this process."""
    monkeypatch.setattr(sys, "executable", executable)
    rule = make_rule()
    assert call(rule) == RESULT
    threads[0].join()
    assert rule.is_compiled


@needs_compiler
def test_an_application_that_contains_python(
    threads: list[threading.Thread], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(subprocess, "run", _refuse_python(subprocess.run))
    rule = make_rule()
    call(rule)
    threads[0].join()
    assert rule.is_compiled


def _refuse_python(run: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(command: list[str], **options: Any) -> Any:
        assert command[0] != sys.executable
        return run(command, **options)

    return wrapped


@needs_compiler
def test_a_failed_compile_is_tried_again_in_the_background(
    threads: list[threading.Thread], monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = make_rule()
    with monkeypatch.context() as patch:
        patch.setenv("CXX", "no-such-compiler")
        with pytest.raises(RuntimeError, match="no-such-compiler"):
            rule.compile()
    assert call(rule) == RESULT
    threads[0].join()
    assert rule.is_compiled


@needs_compiler
def test_an_interrupted_first_call(
    threads: list[threading.Thread], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    rule = make_rule()
    with monkeypatch.context() as patch:
        patch.setattr(native_code, "product_for", interrupt)
        with pytest.raises(KeyboardInterrupt):
            call(rule)
    assert call(rule) == RESULT
    threads[0].join()
    assert rule.is_compiled


@needs_compiler
def test_a_library_of_another_rule(
    threads: list[threading.Thread], cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first, second = make_rule(), make_rule()
    first.compile()
    (library,) = cache.glob(f"{first.name}-*/{first.name}.so")
    product = native_code.product_for(second.name, second.source)
    product.make_folder()
    shutil.copy(library, product.folder / f"{second.name}.so")
    capfd.readouterr()
    assert call(second) == RESULT
    (line,) = capfd.readouterr().err.splitlines()
    assert f"the rule {second.name} is interpreted, which takes longer: {product.folder}" in line
    assert line.endswith(f"Remove {product.folder}, and call the rule's compile()")
    with pytest.raises(RuntimeError, match=f"the rule {second.name} cannot be compiled: .* Remove"):
        second.compile()
    shutil.rmtree(product.folder)
    second.compile()
    assert call(second) == RESULT


def test_without_a_standard_error_stream(
    threads: list[threading.Thread], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with open(os.devnull, "w") as closed:
        pass
    for stream in (None, closed):
        monkeypatch.setattr(sys, "stderr", stream)
        assert call(make_rule()) == RESULT


def test_a_thread_that_cannot_start(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(task: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(background, "run", refuse)
    rule = make_rule()
    assert call(rule) == RESULT
    assert "can't start new thread" in capfd.readouterr().err or not _build.has_compiler()


# ---- processes -----------------------------------------------------------------------------------

_FORKS = """
import multiprocessing, os, sys, time
import torch
import test_background_builds as tests

def child(first):
    new = tests.make_rule()
    assert tests.call(new) == tests.call(first) == tests.RESULT
    new.compile()
    assert new.is_compiled
    os._exit(0)

torch.set_num_threads(1)
first = tests.make_rule()
tests.call(first)
for _ in range(3):
    process = multiprocessing.get_context("fork").Process(target=child, args=(first,))
    process.start()
    process.join(60)
    assert process.exitcode == 0, process.exitcode
print("done")
"""


@needs_compiler
def test_forks_during_a_build() -> None:
    done = run_python(_FORKS, PYTHONWARNINGS="ignore")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"


@needs_compiler
def test_an_end_while_the_library_is_loaded(tmp_path: Path) -> None:
    """Loading takes longer than the process lives."""
    slow = tmp_path / "slow.cpp"
    slow.write_text(
        "#include <unistd.h>\n__attribute__((constructor)) static void wait() { usleep(900000); }\n"
    )
    script = write_script(tmp_path / "slow" / "c++", f'exec c++ "$@" {slow}')
    text = (
        "import test_background_builds as tests, time\n"
        "rule = tests.make_rule()\ntests.call(rule)\n"
        "code = rule._code\nload = code._load\nbegun = []\n"
        "def noted(library):\n    begun.append(1)\n    load(library)\n"
        "code._load = noted\n"
        "while not begun: time.sleep(0.01)\n"
        "time.sleep(0.2)\n"
    )
    done = run_python(text, CXX=str(script))
    assert done.returncode == 0, done.stderr


# ---- the queue -----------------------------------------------------------------------------------


def test_one_task_after_the_other() -> None:
    running: list[int] = []
    most: list[int] = []

    def task() -> None:
        running.append(1)
        most.append(len(running))
        time.sleep(0.01)
        running.pop()

    for _ in range(8):
        RUN(task)
    wait_for(lambda: len(most) == 8)
    assert set(most) == {1}


def test_the_queue_goes_on_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    done = threading.Event()

    def fail() -> None:
        raise ZeroDivisionError

    RUN(fail)
    wait_for(lambda: background._thread is None or not background._thread.is_alive())
    RUN(done.set)
    assert done.wait(10)
