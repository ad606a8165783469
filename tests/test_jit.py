"""The build at the first import: who builds, what is kept, and what is said where it fails.

Most of it with a module of a few lines, which is compiled in a second; the package's own sources
are compiled this way in test_wheel.py.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import run_python, without_torchs_own

import emerging_optimizers
from emerging_optimizers import _build, _build_cache, _jit
from emerging_optimizers._native import _built_for, native

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="shell scripts as compilers")

PACKAGE = Path(emerging_optimizers.__file__).parent

MODULE = """
#include <Python.h>
#define INIT(name) PyInit_##name
#define INIT_OF(name) INIT(name)
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "stub"};
PyMODINIT_FUNC INIT_OF(TORCH_EXTENSION_NAME)() {
  PyObject* module = PyModule_Create(&definition);
  PyModule_AddIntConstant(module, "answer", 42);
  return module;
}
"""
BROKEN = "#error first\n#error second\n"

WORKER = """
import sys
from pathlib import Path
from emerging_optimizers import _build, _jit
recipe = _build.Recipe([Path(sys.argv[1])], [], [], [], [], "", "")
try:
    print("answer", _jit.load_once(recipe, Path(sys.argv[2])).answer)
except _jit.BuildError as error:
    print("failed", error.reason)
"""

# Notes each compilation, which does not begin while there is a file called `hold`.
COMPILER = """#!/bin/sh
case " $* " in
*" {option} "*)
  echo compiled >> "{folder}/log"
  for i in $(seq 600); do [ -e "{folder}/hold" ] || break; sleep 0.1; done;;
esac
exec c++ "$@"
"""


def recipe_of(source: Path) -> _build.Recipe:
    return _build.Recipe([source], [], [], [], [], "", "")


class Workers:
    """Processes that all want one library, by a compiler that notes its calls."""

    code = WORKER
    option = "-c"  # of the calls that count

    def __init__(self, folder: Path, source: str) -> None:
        self.source = folder / "stub.cpp"
        self.source.write_text(source)
        self.folder = folder / "built"
        self.hold = folder / "hold"
        self.log = folder / "log"
        self.log.touch()
        self.compiler = folder / "c++"
        self.compiler.write_text(COMPILER.format(folder=folder, option=self.option))
        self.compiler.chmod(0o755)
        self.processes: list[subprocess.Popen[bytes]] = []
        self.outputs: list[Path] = []

    def start(self, count: int) -> None:
        for _ in range(count):
            self.outputs.append(self.log.with_name(f"output{len(self.outputs)}"))
            with self.outputs[-1].open("w") as output:
                process = subprocess.Popen(
                    [sys.executable, "-c", self.code, str(self.source), str(self.folder)],
                    env={
                        **os.environ,
                        "CXX": str(self.compiler),
                        "OMP_NUM_THREADS": "1",
                        "PYTHONPATH": str(PACKAGE.parent),
                    },
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # so that it can be ended with its compilers
                )
            self.processes.append(process)

    def wait(self) -> None:
        for process in self.processes:
            process.wait(120)

    def written(self) -> list[str]:
        return [line for o in self.outputs for line in without_torchs_own(o.read_text())]

    def count(self, text: str) -> int:
        return sum(text in line for line in self.written())

    @property
    def compilations(self) -> int:
        return len(self.log.read_text().splitlines())

    def end(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(autouse=True)
def _is_switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EMERGING_OPTIMIZERS_JIT", raising=False)


@pytest.fixture
def workers(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Workers]:
    workers = Workers(tmp_path, getattr(request, "param", MODULE))
    yield workers
    workers.end()


def wait_until(condition: Callable[[], bool], workers: Workers) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, workers.written()
        time.sleep(0.05)


@pytest.mark.slow
def test_eight_processes_at_once_build_once(workers: Workers) -> None:
    workers.start(8)
    workers.wait()
    assert workers.count("answer 42") == 8, workers.written()
    assert workers.compilations == 1
    assert workers.count("compiling the native kernels") == 1
    others = [line for line in workers.written() if line != "answer 42"]
    assert all(line.startswith("emerging_optimizers: ") for line in others), others
    kept = {path.name for path in workers.folder.iterdir()}
    assert kept == {"lock", "emerging_optimizers_native.so"}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [BROKEN], indirect=True)
def test_processes_that_waited_do_not_repeat_a_failure(workers: Workers) -> None:
    workers.hold.touch()
    workers.start(3)
    wait_until(lambda: workers.count("waiting for another process") == 2, workers)
    workers.hold.unlink()
    workers.wait()
    assert workers.count("failed compilation failed") == 3, workers.written()
    assert workers.count("#error first") == 3
    assert workers.compilations == 1


@pytest.mark.slow
def test_build_after_a_killed_one(workers: Workers) -> None:
    workers.hold.touch()
    workers.start(1)
    wait_until(lambda: workers.compilations == 1, workers)
    workers.processes[0].kill()
    workers.processes[0].wait()
    (left,) = workers.folder.glob("build-*")
    assert (left / "lock").exists(), "torch would wait for this file to go, for ever"
    workers.hold.unlink()  # now the compiler that the killed one left begins
    workers.start(1)
    workers.wait()
    assert workers.count("answer 42") == 1, workers.written()
    assert workers.compilations == 2
    assert not left.exists()


def test_time_limit_names_the_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import fcntl

    lock = tmp_path / "lock"
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(_jit.BuildError) as caught:
            _jit.load_once(recipe_of(tmp_path / "stub.cpp"), tmp_path, limit=0.2)
    assert caught.value.reason == f"another process has held {lock} for more than 0.2 seconds"
    (said,) = capfd.readouterr().err.splitlines()
    assert said.startswith(
        "emerging_optimizers: waiting for another process to compile the native kernels "
    )
    assert said.endswith(f"({lock})")


def test_failure_then_success(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source, folder = tmp_path / "stub.cpp", tmp_path / "built"
    source.write_text(BROKEN)
    with pytest.raises(_jit.BuildError) as caught:
        _jit.load_once(recipe_of(source), folder)
    assert re.fullmatch(
        r"compilation failed: .*stub\.cpp:1:2: error: #error first", caught.value.reason
    )
    log = folder / "error.txt"
    assert str(log) in caught.value.remedy
    assert "#error second" in log.read_text()
    capfd.readouterr()

    source.write_text(MODULE)
    module = _jit.load_once(recipe_of(source), folder)
    assert module.answer == 42
    (said,) = without_torchs_own(capfd.readouterr().err)
    text = f"compiling the native kernels for torch {torch.__version__} into {folder}; this takes"
    assert text in said
    assert str(folder) in said
    assert Path(str(module.__file__)).parent == folder
    assert {path.name for path in folder.iterdir()} == {"lock", Path(str(module.__file__)).name}

    source.unlink()  # what is there is loaded, and nothing is compiled
    assert _jit.load_once(recipe_of(source), folder).answer == 42
    assert capfd.readouterr().err == ""


def test_cuda_kernels_that_are_missing_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    source = tmp_path / "stub.cpp"
    source.write_text(BROKEN)
    recipe = replace(recipe_of(source), why_no_cuda="no nvcc was found")
    with pytest.raises(_jit.BuildError):
        _jit.load_once(recipe, tmp_path / "built")
    (said,) = without_torchs_own(capfd.readouterr().err)
    assert said.endswith("disables it); no CUDA kernels: no nvcc was found")


def test_folder_depends_on_what_the_build_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    source = tmp_path / "stub.cpp"
    source.write_text(MODULE)
    recipe = recipe_of(source)
    folder = _jit._folder(recipe)
    assert folder == _jit._folder(recipe)
    assert folder.parent == tmp_path / "emerging_optimizers"
    version = emerging_optimizers.__version__.partition("+")[0]
    assert folder.name.startswith(f"{version}-torch{torch.__version__}-")

    folders = {folder, _jit._folder(replace(recipe, cxx_args=["-O1"]))}
    folders.add(_jit._folder(replace(recipe, architectures="9.0")))
    monkeypatch.setattr(torch, "__version__", "9.9.0")
    folders.add(_jit._folder(recipe))
    source.write_text(MODULE + "//")
    folders.add(_jit._folder(recipe))
    assert len(folders) == 5


def test_operators_are_registered_once() -> None:
    with pytest.raises(_jit.BuildError, match="registered the operators of another build"):
        _jit.load_module()


def test_torch_of_a_library_is_read_without_loading_it(tmp_path: Path) -> None:
    assert _built_for(native.__file__) == native.torch_version
    library = tmp_path / "_C.so"
    library.write_bytes(b"")
    assert _built_for(str(library)) == "unknown"


# ---- a first import ------------------------------------------------------------------------------


@pytest.fixture
def uncompiled(tmp_path: Path) -> Path:
    """A folder with the package's sources, and nothing compiled."""
    ignored = shutil.ignore_patterns("__pycache__", "_C.*")
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=ignored)
    shutil.copytree(_build_cache.csrc(), tmp_path / "csrc", dirs_exist_ok=True)
    compiler = tmp_path / "broken"
    compiler.write_text(BROKEN_COMPILER)
    compiler.chmod(0o755)
    return tmp_path


BROKEN_COMPILER = """#!/bin/sh
case " $* " in *" -c "*) echo 'x.h:1:2: error: out of order' >&2; exit 1;; esac
exec c++ "$@"
"""

FIRST_IMPORT = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import emerging_optimizers
import torch
param = torch.nn.Parameter(torch.ones(3))
param.grad = torch.ones(3)
emerging_optimizers.Lion([param], lr=0.5, weight_decay=0.0).step()
print(json.dumps([param.tolist(), [(w.category.__name__, str(w.message)) for w in caught]]))
"""


@pytest.mark.parametrize(
    ("environment", "reasons", "lines"),
    [
        ({"CXX": "missing-c++"}, ["no C++ compiler (missing-c++)", "Install one"], 0),
        (
            {"CXX": "{folder}/broken"},
            ["compilation failed: x.h:1:2: error: out of order", "Fix the errors in {folder}"],
            1,
        ),
        ({"TORCH_EXTENSIONS_DIR": "/dev/null"}, ["NotADirectoryError", "'/dev/null/"], 0),
    ],
    ids=["no compiler", "broken compiler", "no folder"],
)
def test_import_without_kernels(
    uncompiled: Path, environment: dict[str, str], reasons: list[str], lines: int
) -> None:
    environment = {name: value.format(folder=uncompiled) for name, value in environment.items()}
    environment.setdefault("TORCH_EXTENSIONS_DIR", str(uncompiled / "extensions"))
    done = run_python(FIRST_IMPORT, package=uncompiled, **environment)
    assert done.returncode == 0, done.stderr
    values, warnings = json.loads(done.stdout)
    assert values == [0.5, 0.5, 0.5]
    ((category, message),) = warnings
    assert category == "RuntimeWarning"
    for part in ["runs without its native kernels", "no compiled module is installed; ", *reasons]:
        assert part.format(folder=uncompiled) in message
    said = [line for line in done.stderr.splitlines() if line.startswith("emerging_optimizers:")]
    assert len(said) == lines, done.stderr


def test_import_with_the_build_switched_off(uncompiled: Path) -> None:
    code = f"{FIRST_IMPORT}\nemerging_optimizers.show_config()"
    switches = {"EMERGING_OPTIMIZERS_JIT": "0", "PYTHONWARNINGS": "error"}
    done = run_python(code, package=uncompiled, **switches)
    assert done.returncode == 0, done.stderr
    result, *config = done.stdout.splitlines()
    assert json.loads(result) == [[0.5, 0.5, 0.5], []]
    assert without_torchs_own(done.stderr) == []
    reason = "no compiled module is installed; EMERGING_OPTIMIZERS_JIT=0"
    assert f"CPU instruction sets: none, falling back to PyTorch operations ({reason})" in config
