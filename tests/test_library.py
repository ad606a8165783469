"""Truncated and damaged libraries are found before loading them would kill the process."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support import run_python, without_torchs_own
from test_jit import FIRST_IMPORT, MODULE, PACKAGE, recipe_of

from emerging_optimizers import _build_cache, _jit, _library, _native

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads headers of ELF")

# Of bytes, or of the file; from its end where they are negative.
LENGTHS = (1, 63, 64, 100, 4096, 5000, 0.5, 0.9, -4096, -100)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a library that was built at a first import."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "stub.cpp"
    # Longer than a page or two.
    source.write_text(MODULE + "extern const char filling[40000] = {1};\n")
    _jit.load_once(recipe_of(source), folder / "kept")
    return folder / "kept"


@pytest.fixture
def library(built: Path, tmp_path: Path) -> Path:
    """The library in a folder of its own, which is to be spoilt."""
    (found,) = built.glob("*.so")
    return Path(shutil.copy(found, tmp_path))


def unsealed(library: Path) -> int:
    """Cut the checksum off, as an earlier version or an installed module has none."""
    os.truncate(library, library.stat().st_size - _library._SEAL_SIZE)
    return library.stat().st_size


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("has_seal", [True, False], ids=["sealed", "unsealed"])
def test_truncated(library: Path, length: float, has_seal: bool) -> None:
    size = library.stat().st_size if has_seal else unsealed(library)
    assert _library.fault(library) == ""
    cut = int(size * length) if isinstance(length, float) else int(length) % size
    os.truncate(library, cut)
    if cut < 4:
        assert "has no ELF header" in _library.fault(library)
    else:
        assert _library.fault(library).startswith("is truncated")


def test_no_length_is_overlooked(tmp_path: Path) -> None:
    """Of the module under test, to every block of a disk, and by one byte."""
    copy = Path(shutil.copy(_native.native.__file__, tmp_path / "copy.so"))
    if copy.read_bytes()[-_library._SEAL_SIZE :].startswith(_library._SEAL):
        unsealed(copy)
    size = copy.stat().st_size
    for length in (size - 1, *range(size // 4096 * 4096, 0, -4096)):
        os.truncate(copy, length)
        assert _library.fault(copy).startswith("is truncated"), length


def test_checksum_that_is_cut_off(library: Path) -> None:
    os.truncate(library, library.stat().st_size - 1)
    assert _library.fault(library) == ""
    assert _jit._load(library).answer == 42


def spoil(library: Path, at: int, data: bytes) -> None:
    with library.open("r+b") as file:
        file.seek(at, os.SEEK_SET if at >= 0 else os.SEEK_END)
        file.write(data)


def make_folder(library: Path) -> None:
    library.unlink()
    library.mkdir()


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (lambda library: os.truncate(library, 0), "is empty"),
    "folder": (make_folder, "is a folder, not a library"),
    "link to nothing": (
        lambda library: (library.unlink(), library.symlink_to("missing")),
        "cannot be read (No such file or directory)",
    ),
    "no library": (
        lambda library: spoil(library, 0, b"version https://git-lfs.github.com"),
        "is damaged: it has no ELF header",
    ),
    "zeros": (
        lambda library: library.write_bytes(bytes(library.stat().st_size)),
        "is damaged: it has no ELF header",
    ),
    "zeros at the end": (
        lambda library: spoil(library, -4096, bytes(4096)),
        "is damaged: its section headers are invalid",
    ),
    "one bit": (
        lambda library: spoil(library, 6000, b"\x5a"),
        "is damaged: its checksum does not match",
    ),
    "other processor": (
        lambda library: spoil(library, 18, b"\xf3\x00"),
        "was compiled for another processor",
    ),
    "other word size": (
        lambda library: spoil(library, 4, b"\x01"),
        "was compiled for another processor",
    ),
}
every_fault = pytest.mark.parametrize(("spoilt", "fault"), FAULTS.values(), ids=list(FAULTS))


@every_fault
def test_damaged(library: Path, spoilt: Callable[[Path], None], fault: str) -> None:
    spoilt(library)
    assert _library.fault(library) == fault


def test_permission(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # root may read what nobody may
    assert _library.fault(library) == "cannot be read (Permission denied)"


def test_bad_library_is_built_again(
    built: Path, library: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    os.truncate(library, 5000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", "missing-c++")
        with pytest.raises(_jit.BuildError) as caught:
            _jit.load_once(recipe_of(built.parent / "stub.cpp"), tmp_path)
    fault = _library.fault(library)
    lack = "no C++ compiler (missing-c++) was found"
    assert caught.value.reason == f"{library} {fault}, and {lack}"
    module = _jit.load_once(recipe_of(built.parent / "stub.cpp"), tmp_path)
    assert module.answer == 42
    said = without_torchs_own(capfd.readouterr().err)
    assert said[0] == f"emerging_optimizers: {library} {fault}; recompiling"
    assert len(said) == 2
    assert _library.fault(Path(str(module.__file__))) == ""
    assert {path.name for path in tmp_path.iterdir()} == {"lock", Path(str(module.__file__)).name}
    assert _jit.load_once(recipe_of(tmp_path / "missing"), tmp_path).answer == 42
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("spoilt", ["empty", "folder", "link to nothing", "one bit"])
def test_bad_library_is_removed(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoilt: str
) -> None:
    FAULTS[spoilt][0](library)
    monkeypatch.setattr(_build_cache, "_build_product", lambda *_: not os.path.lexists(library))
    assert _jit.load_once(recipe_of(tmp_path / "missing"), tmp_path) is True


# ---- a module that is installed ------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(FAULTS) - {"one bit"}))  # which has no checksum
def test_bad_module_that_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    spoilt, fault = FAULTS[name]
    installed = Path(shutil.copy(_native.native.__file__, tmp_path))
    monkeypatch.setattr(_native, "__file__", str(tmp_path / "_native.py"))
    monkeypatch.delitem(sys.modules, _native._NAME)
    spoilt(installed)
    with pytest.raises(ImportError) as caught:
        _native._compiled()
    if fault in ("is a folder, not a library", "cannot be read (No such file or directory)"):
        assert str(caught.value) == "no compiled module is installed"
    else:
        assert str(caught.value) == f"{installed} {fault}; reinstall the package"


def test_import_with_a_truncated_module(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__")
    copy = Path(shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=ignored))
    (installed,) = copy.glob("_C.*")
    os.truncate(installed, installed.stat().st_size // 2)
    done = run_python(
        f"{FIRST_IMPORT}\nemerging_optimizers.show_config()",
        package=tmp_path,
        EMERGING_OPTIMIZERS_JIT="0",
        PYTHONWARNINGS="error",
    )
    assert done.returncode == 0, done.stderr
    result, *config = done.stdout.splitlines()
    assert json.loads(result) == [[0.5, 0.5, 0.5], []]
    text = f"{installed} {_library.fault(installed)}; reinstall the package"
    (said,) = without_torchs_own(done.stderr)
    assert said == f"emerging_optimizers: {text}; EMERGING_OPTIMIZERS_JIT=0"
    assert any(text in line for line in config)
