"""Builds at the first import under odd compilers, in odd folders, and without locks."""

import errno
import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import without_torchs_own
from test_jit import MODULE, recipe_of

from emerging_optimizers import _build, _build_cache, _compile, _jit, _library

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="shell scripts as compilers")


def write_script(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "stub.cpp"
    path.write_text(MODULE)
    return path


# ---- compilers of several words ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("env c++", ["a b"]),
        ("\t env\tc++  -m64 ", ["-m64", "a b"]),
        ("c++ -DTEXT='1  2' \"-I/x y\"", ["-DTEXT=1  2", "-I/x y", "a b"]),
        ("X=1 c++", ["a b"]),
        ("{folder}/my compilers/c++", ["a b"]),
        ("'{folder}/my compilers/c++' -O1", ["-O1", "a b"]),
        ("env {folder}/my\\ compilers/c++", ["a b"]),
        ("my\\ compilers/c++", ["a b"]),
        ("env ./launcher my\\ compilers/c++", ["a b"]),
        ("{folder}/$HOME/c++ -O1", ["-O1", "a b"]),
    ],
)
@pytest.mark.parametrize("variable", ["CXX", "CC"])
def test_compilers_are_one_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, words: list[str], variable: str
) -> None:
    show = 'for word in "$@"; do echo "$word"; done'
    for folder in ("", "my compilers", "$HOME"):
        write_script(tmp_path / folder / "c++", show)
    write_script(tmp_path / "launcher", 'exec "$@"')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv(variable, command.format(folder=tmp_path))
    assert variable == "CC" or _build.has_compiler()
    folder = tmp_path / "scripts of $1"
    variables = _build.compiler_variables(folder)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    value = variables[variable]
    assert shlex.split(value.replace("$", "$$")) == [value], "a shell or ninja would change it"
    done = subprocess.run([value, "a b"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == words


def test_compilers_of_one_word_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    assert _build.compiler_variables(tmp_path) == {}
    monkeypatch.setenv("CXX", "g++-12")
    monkeypatch.setenv("CC", "/usr/bin/gcc")
    assert _build.compiler_variables(tmp_path) == {"CXX": "g++-12", "CC": "/usr/bin/gcc"}
    monkeypatch.setenv("CXX", " ")
    assert _build.compiler_variables(tmp_path)["CXX"] == _build.compiler() == "c++"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["missing-c++ -m64", "'c++", "''", '"missing c++"', "$CXX"])
def test_missing_compiler_of_several_words(
    source: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("CXX", command)
    with pytest.raises(_jit.BuildError) as caught:
        _jit.load_once(recipe_of(source), source.parent)
    assert caught.value.reason == f"no C++ compiler ({command}) was found"


def test_build_with_a_compiler_of_several_words(
    source: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    source.write_text(MODULE.replace("42", "sizeof(TEXT)"))
    compiler = write_script(source.parent / "my compilers" / "cc of $USER", 'exec c++ "$@"')
    monkeypatch.setenv("CXX", f"""env "{compiler}" '-DTEXT="a  $b"' """)
    before = dict(os.environ)
    folder = source.parent / "extensions of $USER, 100 each"
    assert _jit.load_once(recipe_of(source), folder).answer == len("a  $b") + 1
    assert len(without_torchs_own(capfd.readouterr().err)) == 1
    assert os.environ == before
    assert len(list(folder.iterdir())) == 2


@pytest.mark.slow
def test_setup_with_compilers_of_several_words(source: Path) -> None:
    """Setuptools splits CXX, torch's part of the build quotes it, and takes options from CC."""
    source.write_text(MODULE.replace("42", "sizeof(TEXT)"))
    script = source.with_name("setup.py")
    script.write_text(
        "import os, sys\n"
        "from pathlib import Path\n"
        "import setuptools\n"
        "from torch.utils import cpp_extension\n"
        "from emerging_optimizers import _build\n"
        "os.environ.update(_build.compiler_variables(Path('build/compilers').absolute()))\n"
        "setuptools.setup(name='stub', py_modules=[],"
        " ext_modules=[cpp_extension.CppExtension('stub', ['stub.cpp'])],"
        " cmdclass={'build_ext': cpp_extension.BuildExtension})\n"
    )
    variables = {
        "CXX": """env c++ '-DTEXT="a b"'""",
        "CC": "env cc -DUNUSED",
        "PYTHONPATH": str(Path(_build.__file__).parent.parent),
    }
    done = subprocess.run(
        [sys.executable, str(script), "build_ext", "--inplace"],
        cwd=source.parent,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    code = "import stub; print(stub.answer)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=source.parent, capture_output=True, text=True, check=True)
    assert done.stdout == "4\n"


# ---- compilers that fail -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failing", "error", "remedy"),
    [
        ("exit 3", "the compiler printed nothing", "Fix the errors in {log}, and"),
        (
            "kill -9 $$",
            "Killed",
            "Fix the errors in {log} (MAX_JOBS=1 needs the least memory), and",
        ),
        ("exec env missing-c++", "env: .*missing-c[+][+].*: No such file or directory", "Fix"),
        (
            '[ "$LC_ALL" = C ] && echo "a.cpp:1:1: error: English" || echo Fehler; exit 1',
            "a.cpp:1:1: error: English",
            "Fix",
        ),
    ],
    ids=["silent", "killed", "missing", "localized"],
)
def test_compiler_that_fails(
    source: Path, monkeypatch: pytest.MonkeyPatch, failing: str, error: str, remedy: str
) -> None:
    monkeypatch.setenv("CXX", str(write_script(source.parent / "error" / "c++", failing)))
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    folder = source.parent / "kept"
    with pytest.raises(_jit.BuildError) as caught:
        _jit.load_once(recipe_of(source), folder)
    assert re.match(f"compilation failed: {error}", caught.value.reason)
    assert caught.value.remedy.startswith(remedy.format(log=folder / "error.txt"))


def test_ninja_that_is_missing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compile, "_path", lambda: str(source.parent))
    with pytest.raises(_jit.BuildError) as caught:
        _jit.load_once(recipe_of(source), source.parent / "kept")
    assert caught.value.reason == "ninja was not found"
    assert "pip install ninja" in caught.value.remedy
    assert not (source.parent / "kept").exists()


def test_warnings_of_torchs_tools(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def recipe(_: Path) -> _build.Recipe:
        warnings.warn("deprecated", DeprecationWarning, stacklevel=1)
        return recipe_of(source)

    monkeypatch.setattr(torch._C, "_dispatch_get_all_op_names", list)
    monkeypatch.setattr(_build, "recipe", recipe)
    monkeypatch.setattr(_jit, "load_once", lambda *_: "loaded")
    warnings.simplefilter("error")
    assert _jit.load_module() == "loaded"


# ---- file systems without locks ------------------------------------------------------------------

NO_LOCKS = ("ENOLCK", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EINVAL", "EIO", "EACCES")


def refuse_locks(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    import fcntl

    def flock(*_: object) -> None:
        code = getattr(errno, name)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("name", NO_LOCKS)
def test_build_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    refuse_locks(monkeypatch, name)
    other = tmp_path / f"{_build_cache._prefix()}of-another-process"
    other.mkdir()
    killed = tmp_path / "build-of-last-week"
    killed.mkdir()
    os.utime(killed, (0, 0))
    builds = []

    def build(_: object, build: Path, log: Path) -> SimpleNamespace:
        builds.append(build)
        assert build.is_dir()
        assert other.is_dir()
        assert not killed.exists()
        return SimpleNamespace(answer=42)

    monkeypatch.setattr(_build_cache, "_build_product", build)
    assert _jit.load_once(recipe_of(tmp_path / "stub.cpp"), tmp_path).answer == 42
    assert builds[0].parent == tmp_path
    assert not builds[0].exists()
    reason = os.strerror(getattr(errno, name))
    (said,) = capfd.readouterr().err.splitlines()
    assert said == (
        f"emerging_optimizers: {tmp_path / 'lock'} cannot be locked ({reason}); other processes may"
        " compile at the same time"
    )


def test_builders_without_locks(
    source: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The last one's library replaces those before; one that fails takes a finished one."""
    refuse_locks(monkeypatch, "ENOLCK")
    folder = source.parent / "kept"
    module = _jit.load_once(recipe_of(source), folder)
    kept = Path(str(module.__file__))
    assert module.answer == 42
    assert {path.name for path in folder.iterdir()} == {"lock", kept.name}
    aside = kept.rename(source.parent / "aside.so")
    # While it compiles, another process finishes, and a third one removes its folder.
    finishes = f"mv {shlex.quote(str(aside))} {shlex.quote(str(kept))}; exit 1"
    monkeypatch.setenv("CXX", str(write_script(source.parent / "c++", finishes)))
    assert _jit.load_once(recipe_of(source), folder).answer == 42
    assert {path.name for path in folder.iterdir()} == {"lock", kept.name}
    assert len(without_torchs_own(capfd.readouterr().err)) == 4


def test_builds_of_other_machines_are_left(tmp_path: Path) -> None:
    ours, others = tmp_path / f"{_build_cache._prefix()}1", tmp_path / "build-another-machine-1"
    ours.mkdir()
    others.mkdir()
    _build_cache._remove_killed(tmp_path, is_locked=True)
    assert [path.name for path in tmp_path.iterdir()] == [others.name]


# ---- folders -------------------------------------------------------------------------------------


def test_relative_folder(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(source.parent)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "my: extensions")
    monkeypatch.setenv("CXX", "env c++")
    recipe = recipe_of(source)
    module = _jit.load_once(recipe, _jit._folder(recipe))
    assert Path(str(module.__file__)).is_relative_to(source.parent / "my: extensions")
    assert _library.fault(Path(str(module.__file__))) == ""

    # What is complete is loaded where nothing can be written, too.
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert _jit.load_once(recipe, _jit._folder(recipe)).answer == 42


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
@pytest.mark.parametrize("what", ["mkdir", "open", "mkdtemp"])
def test_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, code: int
) -> None:
    error = OSError(code, os.strerror(code))

    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(_build_cache.tempfile if what == "mkdtemp" else Path, what, refuse)
    with pytest.raises(_jit.BuildError) as caught:
        _jit.load_once(recipe_of(tmp_path / "stub.cpp"), tmp_path)
    reason = f"{tmp_path} cannot be written ({type(error).__name__}: {error})"
    assert caught.value.reason == reason
    assert "TORCH_EXTENSIONS_DIR" in caught.value.remedy


@pytest.mark.parametrize("name", ["file", "file/folder"])
def test_folder_that_is_a_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(_jit.BuildError) as caught:
        _jit.load_once(recipe_of(tmp_path / "stub.cpp"), tmp_path / name)
    assert caught.value.reason.startswith(f"{tmp_path / name} cannot be written (")
    assert "TORCH_EXTENSIONS_DIR" in caught.value.remedy


def test_library_that_cannot_be_kept(
    source: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(_library, "seal", refuse)
    folder = source.parent / "kept"
    assert _jit.load_once(recipe_of(source), folder).answer == 42
    assert [path.name for path in folder.iterdir()] == ["lock"]
    _, said = without_torchs_own(capfd.readouterr().err)
    assert f"could not be saved in {folder} ([Errno 28] No space left on device)" in said


def test_full_disk(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a.cpp:9:1: fatal error: error writing to /tmp/a.s: No space left on device"
    failing = write_script(source.parent / "c++", f"echo '{text}' >&2; exit 1")
    monkeypatch.setenv("CXX", str(failing))
    folder = source.parent / "kept"
    (folder / "error.txt").mkdir(parents=True)  # which cannot be written
    with pytest.raises(_jit.BuildError) as caught:
        _jit.load_once(recipe_of(source), folder)
    assert caught.value.reason == f"compilation failed: {text}"


def test_no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for an unknown user
    recipe = _build.Recipe([], [], [], [], [], "", "")
    with pytest.raises(_jit.BuildError) as caught:
        _jit._folder(recipe)
    assert "there is no home directory" in caught.value.reason
    assert "TORCH_EXTENSIONS_DIR" in caught.value.remedy
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tmp_path in _jit._folder(recipe).parents
