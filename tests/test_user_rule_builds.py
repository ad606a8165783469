"""Libraries of users' rules: compiled once, cached, and loaded only if nobody else wrote them.

Most of it with a text of one line, which is compiled in a tenth of a second.
"""

import ctypes
import errno
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import needs_native, run_python
from test_jit import Workers, wait_until
from test_jit_faults import NO_LOCKS, refuse_locks, write_script
from test_library import FAULTS

from emerging_optimizers import _build, _build_cache, _file_lock, _library
from emerging_optimizers._build_cache import BuildError
from emerging_optimizers._user_rules import build
from emerging_optimizers._user_rules.build import library_for

pytestmark = [
    needs_native,
    pytest.mark.skipif(sys.platform == "win32", reason="shell scripts as compilers"),
]

EXPORT = 'extern "C" __attribute__((visibility("default")))'
TEXT = f"{EXPORT} int answer() {{ return 42; }}\n"
BROKEN = "#error first\n#error second\n"
RULE = """\
#include "rules/schedules.h"
#include "engine/rule_unit.h"
namespace emopt {
struct Halving {
  static constexpr const char* kName = "halving";
  double scale;
  static constexpr auto hyperparameters() {
    return std::make_tuple(hyperparameter("scale", &Halving::scale), StepArgument{});
  }
  template <class Real>
  struct Step {
    Real scale;
    EMOPT_FN Step(const Halving& rule, double step)
        : scale(static_cast<Real>(rule.scale * one_minus_power(0.5, step))) {}
    EMOPT_FN Real operator()(Real grad) const { return scale * grad; }
  };
};
}  // namespace emopt
EMOPT_RULE(Halving)
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of all rules in an empty cache."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    return tmp_path / "extensions" / "emerging_optimizers" / "rules"


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Return how often the compiler was called."""
    script = write_script(
        tmp_path / "counting" / "c++", f'echo >> "{tmp_path}/calls"; exec c++ "$@"'
    )
    monkeypatch.setenv("CXX", str(script))
    (tmp_path / "calls").touch()
    return lambda: len((tmp_path / "calls").read_text().splitlines())


def answer(library: Path) -> int:
    return int(ctypes.CDLL(str(library)).answer())


def error_of(text: str = TEXT) -> BuildError:
    with pytest.raises(BuildError) as caught:
        library_for("stub", text)
    return caught.value


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---- the cache -----------------------------------------------------------------------------------


def test_compiled_once(
    cache: Path, calls: Callable[[], int], capfd: pytest.CaptureFixture[str]
) -> None:
    library = library_for("stub", TEXT)
    assert answer(library) == 42
    folder = library.parent
    assert folder.parent == cache
    assert re.fullmatch(r"stub-[0-9a-f]{16}", folder.name)
    assert names(folder) == {"lock", "stub.cpp", "stub.so"}
    assert (folder / "stub.cpp").read_text() == TEXT
    (said,) = capfd.readouterr().err.splitlines()
    pattern = r"emerging_optimizers: compiled the rule stub in \d+\.\d s \(cached in (.*)\)"
    found = re.fullmatch(pattern, said)
    assert found is not None, said
    assert found[1] == str(folder)
    assert library_for("stub", TEXT) == library
    assert calls() == 1
    assert capfd.readouterr().err == ""


FRESH = """
import gc, sys, time
from pathlib import Path
import torch
import emerging_optimizers
sys.dont_write_bytecode = False  # as on users' machines, where only the first import compiles
gc.collect()  # of torch's objects, which takes longer than the import, and may come at any time
start = time.perf_counter()
from emerging_optimizers._native import native
from emerging_optimizers._user_rules.build import library_for
native._load_rule(str(library_for("halving", Path({text!r}).read_text())), "Halving")
print(time.perf_counter() - start)
print("torch.utils.cpp_extension" in sys.modules)
from emerging_optimizers._rule import Rule
from emerging_optimizers._hyperparameters import Step
def halving(grad: torch.Tensor, scale: float, step: Step) -> torch.Tensor: ...
print(Rule("halving", halving).entry_point()(torch.tensor([1.0, -2.0]), 4.0, 2, None).tolist())
"""


def test_cached_rule_is_loaded_fast(tmp_path: Path) -> None:
    """By an interpreter that has imported the package; without torch's tools for extensions.

    The minimum of several runs, on a busy machine.
    """
    text = tmp_path / "halving.cpp"
    text.write_text(RULE)
    library_for("halving", RULE)
    times: list[float] = []
    while len(times) < 10 and min(times, default=1.0) >= 0.05:
        done = run_python(FRESH.format(text=str(text)))
        assert done.returncode == 0, done.stderr
        seconds, *others = done.stdout.splitlines()
        assert others == ["False", "[3.0, -6.0]"]
        assert done.stderr == ""
        times.append(float(seconds))
    assert min(times) < 0.05, times


def test_default_folder_is_torchs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils import cpp_extension

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    (tmp_path / "link").symlink_to(tmp_path)
    for home in (tmp_path, tmp_path / "link"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(home))
        expected = Path(cpp_extension.get_default_build_root()) / "emerging_optimizers"
        assert _build_cache.root("") == expected
    # A torch that has moved what torch's function calls.
    monkeypatch.delattr(torch._appdirs, "user_cache_dir")
    monkeypatch.setattr(cpp_extension, "get_default_build_root", lambda: str(tmp_path / "moved"))
    assert _build_cache.root("") == tmp_path / "moved" / "emerging_optimizers"


def test_folder_depends_on_what_the_build_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_build_cache, "load_once", lambda product: product.folder)
    csrc = tmp_path / "csrc"
    for name in ("engine/rule_unit.h", "rules/schedules.h", "rules/inner.h", "rules/unused.h"):
        (csrc / name).parent.mkdir(parents=True, exist_ok=True)
        (csrc / name).write_text('#include "inner.h"\n' if name == "rules/schedules.h" else "")
    monkeypatch.setattr(_build_cache, "csrc", lambda: csrc)
    first = library_for("stub", RULE)
    folders = {first, library_for("stub", RULE + "//"), library_for("other", RULE)}

    def changes(patch: pytest.MonkeyPatch) -> Iterator[None]:
        patch.setenv("CXX", "g++-99")
        yield
        patch.setitem(_build.COMPILE_ARGS, "unix", ["-O1"])
        yield
        patch.setattr("platform.machine", lambda: "riscv64")
        yield
        patch.setattr(build, "native", SimpleNamespace(active_isa=lambda: "another"))
        yield

    for name in ("engine/rule_unit.h", "rules/schedules.h", "rules/inner.h"):
        (csrc / name).write_text((csrc / name).read_text() + "// changed")
        folders.add(library_for("stub", RULE))
    last = library_for("stub", RULE)
    with pytest.MonkeyPatch.context() as patch:
        for _ in changes(patch):
            folders.add(library_for("stub", RULE))
    assert len(folders) == 10
    # Neither the place of the headers nor others of them matter.
    (csrc / "rules/unused.h").write_text("// changed")
    csrc = csrc.rename(tmp_path / "moved")
    assert library_for("stub", RULE) == last


def test_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    show = write_script(tmp_path / "c++", f'printf "%s\\n" "$@" > "{tmp_path}/words"; exit 1')
    monkeypatch.setenv("CXX", f"env {show} '-DTEXT=1  2'")
    error_of()
    first, *words = (tmp_path / "words").read_text().splitlines()
    assert first == "-DTEXT=1  2"
    assert build.native is not None
    csrc = _build_cache.csrc()
    (recipe_abi,) = (o for o in _build.recipe(csrc).cxx_args if o.startswith("-DEMOPT_ABI="))
    isa = build.native.active_isa()
    for option in (
        *("-std=c++20", "-shared", "-fPIC", *_build.COMPILE_ARGS["unix"], f"-I{csrc}"),
        *(recipe_abi, "-DEMOPT_CUDA=0", f"-DEMOPT_ONLY_ISA_{isa}"),
    ):
        assert option in words


def test_compiler_of_several_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_script(tmp_path / "my compilers" / "c++", 'exec c++ "$@"')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CXX", "env 'my compilers/c++' '-DTEXT=\"a  b\"'")
    assert answer(library_for("stub", f"{EXPORT} int answer() {{ return sizeof(TEXT); }}")) == 5


# ---- several at once -----------------------------------------------------------------------------


class RuleWorkers(Workers):
    """Processes that all want one rule's library."""

    option = "-shared"
    code = """
import ctypes, os, sys
from pathlib import Path
os.environ["TORCH_EXTENSIONS_DIR"] = sys.argv[2]
from emerging_optimizers._build_cache import BuildError
from emerging_optimizers._user_rules.build import library_for
try:
    library = library_for("stub", Path(sys.argv[1]).read_text())
    print("answer", ctypes.CDLL(str(library)).answer())
except BuildError as error:
    print("failed", error.reason)
"""

    @property
    def built(self) -> Path:
        (folder,) = self.folder.glob("emerging_optimizers/rules/stub-*")
        return folder


@pytest.fixture
def workers(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[RuleWorkers]:
    workers = RuleWorkers(tmp_path, getattr(request, "param", TEXT))
    yield workers
    workers.end()


@pytest.mark.slow
def test_eight_processes_at_once_build_once(workers: RuleWorkers) -> None:
    workers.start(8)
    workers.wait()
    assert workers.count("answer 42") == 8, workers.written()
    assert workers.compilations == 1
    assert workers.count("compiled the rule stub") == 1
    others = [line for line in workers.written() if line != "answer 42"]
    assert all(line.startswith("emerging_optimizers: ") for line in others), others
    assert names(workers.built) == {"lock", "stub.cpp", "stub.so"}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [BROKEN], indirect=True)
def test_processes_that_waited_do_not_repeat_a_failure(workers: RuleWorkers) -> None:
    workers.hold.touch()
    workers.start(3)
    waiting = "waiting for another process to compile the rule stub ("
    wait_until(lambda: workers.count(waiting) == 2, workers)
    workers.hold.unlink()
    workers.wait()
    assert workers.count("failed compilation failed") == 3, workers.written()
    assert workers.count("#error first") == 3
    assert workers.compilations == 1


@pytest.mark.slow
def test_build_after_a_killed_one(workers: RuleWorkers) -> None:
    workers.hold.touch()
    workers.start(1)
    wait_until(lambda: workers.compilations == 1, workers)
    workers.processes[0].kill()
    workers.processes[0].wait()
    (left,) = workers.built.glob("build-*")
    workers.hold.unlink()  # now the compiler that the killed one left begins
    workers.start(1)
    workers.wait()
    assert workers.count("answer 42") == 1, workers.written()
    assert workers.compilations == 2
    assert not left.exists()
    assert names(workers.built) == {"lock", "stub.cpp", "stub.so"}


def test_threads_build_once(calls: Callable[[], int]) -> None:
    with ThreadPoolExecutor(4) as pool:
        libraries = set(pool.map(lambda _: library_for("stub", TEXT), range(4)))
    assert len(libraries) == calls() == 1


@pytest.mark.parametrize("name", NO_LOCKS)
def test_build_without_locks(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    refuse_locks(monkeypatch, name)
    library = library_for("stub", TEXT)
    assert answer(library) == 42
    first, second = capfd.readouterr().err.splitlines()
    reason = os.strerror(getattr(errno, name))
    assert f"{library.parent / 'lock'} cannot be locked ({reason}); other processes may" in first
    assert "compiled the rule stub in" in second


def test_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def acquire(*_: object) -> None:
        raise TimeoutError

    monkeypatch.setattr(_file_lock, "acquire", acquire)
    error = error_of()
    assert re.match(r"another process has held .*/lock for more than 1800 seconds", error.reason)
    assert error.remedy == "Wait for that process or end it, then call the rule's compile()"


# ---- what fails ----------------------------------------------------------------------------------


def test_failure_then_success(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    write_script(tmp_path / "c++", 'exec c++ -DBROKEN "$@"')
    text = f"#ifdef BROKEN\n{BROKEN}#endif\n{TEXT}"
    error = error_of(text)
    (folder,) = cache.iterdir()
    source, log = folder / "stub.cpp", folder / "error.txt"
    assert error.reason == f"compilation failed: {source}:2:2: error: #error first"
    assert error.remedy == (
        f"Fix the errors in {log}, and call the rule's compile(); or set EMERGING_OPTIMIZERS_JIT=0"
    )
    assert "#error second" in log.read_text()
    assert source.read_text() == text
    assert names(folder) == {"error.txt", "lock", "stub.cpp"}
    write_script(tmp_path / "c++", 'exec c++ "$@"')
    assert answer(library_for("stub", text)) == 42
    assert names(folder) == {"lock", "stub.cpp", "stub.so"}


@pytest.mark.parametrize(
    ("failing", "reason"),
    [
        ("exit 3", r"the compiler printed nothing \(exit status 3\)"),
        ("kill -9 $$", r"the compiler printed nothing \(Killed\)"),
        ("exec env missing-c++", "env: .*missing-c[+][+].*: No such file or directory"),
        ("exit 0", r"\[Errno 2\] No such file or directory: .*stub\.so.*"),
        ("echo 'a.cpp:1:1: error: '\"$LC_ALL\"; exit 1", "a.cpp:1:1: error: C"),
    ],
    ids=["silent", "killed", "missing", "no library", "localized"],
)
def test_compiler_that_fails(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, reason: str
) -> None:
    monkeypatch.setenv("CXX", str(write_script(tmp_path / "c++", failing)))
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    error = error_of()
    assert re.fullmatch(f"compilation failed: {reason}", error.reason)
    (folder,) = cache.iterdir()
    log = folder / "error.txt"
    assert error.remedy.startswith(f"Fix the errors in {log}, and call the rule's compile()")
    assert names(folder) == {"error.txt", "lock", "stub.cpp"}


def test_no_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "missing-c++ -m64")
    error = error_of()
    assert error.reason == "no C++ compiler (missing-c++ -m64) was found"
    assert error.remedy == "Install one or set CXX, and call the rule's compile()"
    assert not cache.exists()


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for an unknown user
    error = error_of()
    assert error.reason == "there is no home directory for the compiled library"
    assert error.remedy.endswith("and call the rule's compile()")


@pytest.mark.parametrize(
    ("owner", "function"),
    [(Path, "mkdir"), (Path, "touch"), (tempfile, "mkdtemp"), (_library, "seal")],
)
def test_folder_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, owner: Any, function: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(owner, function, refuse)
    error = error_of()
    assert re.match(r".*/stub-\w+ cannot be written \(OSError: \[Errno 28\]", error.reason)
    assert error.remedy == (
        "Set TORCH_EXTENSIONS_DIR to a writable folder, and call the rule's compile()"
    )


def test_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert error_of().reason == "rules are not compiled on Windows yet"


@pytest.mark.skipif(sys.platform != "linux", reason="reads headers of ELF")
@pytest.mark.parametrize("spoilt", list(FAULTS))
def test_bad_library_is_compiled_again(
    spoilt: str, calls: Callable[[], int], capfd: pytest.CaptureFixture[str]
) -> None:
    library = library_for("stub", f"{TEXT}extern const char filling[40000] = {{1}};\n")
    size = library.stat().st_size
    capfd.readouterr()
    spoil, fault = FAULTS[spoilt]
    spoil(library)
    again = library_for("stub", f"{TEXT}extern const char filling[40000] = {{1}};\n")
    assert again == library
    assert library.stat().st_size == size
    assert _library.fault(library) == ""
    assert calls() == 2
    said = capfd.readouterr().err.splitlines()
    assert len(said) == (1 if spoilt == "link to nothing" else 2)
    assert spoilt == "link to nothing" or f"{library} {fault}; recompiling" in said[0]


# ---- who can have written it ---------------------------------------------------------------------

REMEDY = "Remove it, or set TORCH_EXTENSIONS_DIR to a folder of your own"
PLACES: dict[str, Callable[[Path], Path]] = {
    "library": lambda library: library,
    "folder": lambda library: library.parent,
    "rules": lambda library: library.parent.parent,
}
every_place = pytest.mark.parametrize("place", list(PLACES.values()), ids=list(PLACES))


def change_owner(patch: pytest.MonkeyPatch, path: Path, owner: int, *functions: str) -> None:
    """Make `os.lstat` or `os.stat` tell another owner of a path."""
    for function in functions:
        original = getattr(os, function)

        def tell(
            asked: Any, *args: Any, original: Any = original, **options: Any
        ) -> os.stat_result:
            found = original(asked, *args, **options)
            if str(asked) != str(path):
                return found
            return os.stat_result([*found[:4], owner, *found[5:]])

        patch.setattr(os, function, tell)


def contents(cache: Path) -> dict[Path, tuple[int, bytes]]:
    return {
        path: (path.lstat().st_mode, path.read_bytes() if path.is_file() else b"")
        for path in (cache, *cache.rglob("*"))
    }


@every_place
def test_other_owner(
    place: Callable[[Path], Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = library_for("stub", TEXT)
    path, before = place(library), contents(cache)
    with pytest.MonkeyPatch.context() as patch:
        change_owner(patch, path, 54321, "lstat")
        error = error_of()
    assert error.reason == f"{path} belongs to another user (owner 54321, mode 700)"
    assert error.remedy == REMEDY
    assert contents(cache) == before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 54321)
        for each in PLACES.values():
            change_owner(patch, each(library), 0, "lstat")  # root may write everything anyway
        assert library_for("stub", TEXT) == library


@every_place
@pytest.mark.parametrize("mode", [0o720, 0o775, 0o702, 0o1777])
def test_writable_by_others(place: Callable[[Path], Path], cache: Path, mode: int) -> None:
    library = library_for("stub", TEXT)
    path = place(library)
    path.chmod(mode)
    before = contents(cache)
    error = error_of()
    pattern = rf"{re.escape(str(path))} can be written by other users \(owner \w+, mode {mode:o}\)"
    assert re.fullmatch(pattern, error.reason), error.reason
    assert error.remedy == REMEDY
    assert contents(cache) == before
    path.chmod(0o755)  # they may read it
    assert library_for("stub", TEXT) == library


@pytest.mark.parametrize("kind", ["rules", "folder"])
def test_nothing_is_built_where_others_can_write(
    cache: Path, calls: Callable[[], int], kind: str
) -> None:
    library = library_for("stub", TEXT)
    path = PLACES[kind](library)
    for file in library.parent.iterdir():
        file.unlink()
    if kind == "rules":
        library.parent.rmdir()
    path.chmod(0o777)
    assert "can be written by other users" in error_of().reason
    assert list(path.iterdir()) == []
    assert calls() == 1


@every_place
def test_links(
    place: Callable[[Path], Path], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = library_for("stub", TEXT)
    path = place(library)
    target = path.rename(tmp_path / "elsewhere")
    path.symlink_to(target)
    assert library_for("stub", TEXT) == library
    assert answer(library) == 42
    with pytest.MonkeyPatch.context() as patch:
        change_owner(patch, path, 54321, "lstat")
        assert "belongs to another user (owner 54321, mode 777)" in error_of().reason
    with pytest.MonkeyPatch.context() as patch:
        change_owner(patch, path, 54321, "stat")  # what it points to
        assert "belongs to another user (owner 54321, mode 700)" in error_of().reason
    target.chmod(0o770)
    assert f"{path} can be written by other users" in error_of().reason
    assert path.is_symlink()


@pytest.mark.skipif("os.geteuid() != 0", reason="only root can give files away")
@every_place
def test_files_that_were_given_away(place: Callable[[Path], Path]) -> None:
    path = place(library_for("stub", TEXT))
    os.chown(path, 54321, -1)
    assert f"{path} belongs to another user (owner 54321, mode 700)" == error_of().reason


def test_place_that_cannot_be_inspected(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "lstat", refuse)
    error = error_of()
    assert error.reason == f"{cache} cannot be inspected (Permission denied)"
    assert error.remedy == REMEDY


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077])
def test_modes(cache: Path, tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        library = library_for("stub", TEXT)
        error_of(BROKEN)
    finally:
        os.umask(before)
    found = {path: path.stat().st_mode & 0o777 for path in (cache, *cache.rglob("*"))}
    for path, mode in found.items():
        assert mode == (0o700 if path.is_dir() or path == library else 0o600), path
    assert {path.name for path in found} >= {"error.txt", "lock", "stub.cpp", "stub.so"}
    for folder in (cache.parent, tmp_path / "extensions"):
        assert folder.stat().st_mode & 0o022 == 0


@pytest.mark.skipif(sys.platform != "linux", reason="asks ldd")
def test_library_is_independent_of_torch() -> None:
    """So that it outlives an upgrade of torch."""
    done = subprocess.run(
        ["ldd", str(library_for("halving", RULE))], capture_output=True, text=True, check=True
    )
    assert "torch" not in done.stdout
    assert "python" not in done.stdout
