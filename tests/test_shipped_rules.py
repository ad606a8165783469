"""Packages that ship the libraries of their rules: how they are built, found and rejected."""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from interpreting import needs_compiler
from support import needs_native, run_python, without_torchs_own

from emerging_optimizers import _build, _build_cache
from emerging_optimizers._user_rules.shipped import FOLDER, LIST

pytestmark = [
    needs_native,
    needs_compiler,
    pytest.mark.once,
    pytest.mark.skipif(sys.platform == "win32", reason="rules are not compiled there"),
]

EXAMPLE = Path(__file__).parent.parent / "examples" / "rules_package" / "example_rules"
BUILD = """
import runpy, sys
sys.argv = ["emerging_optimizers", *{arguments}]
runpy.run_module("emerging_optimizers", run_name="__main__")
"""
# Prints the updates, whether the first one is compiled, and the loaded libraries.
USE = """
import json
from pathlib import Path
import torch
import example_rules
grad = torch.linspace(-3, 3, 1001)
states = [torch.linspace(1, 2, 1001) for _ in range(2)]
updates = [
    example_rules.heavy_ball(grad, states[0], momentum=0.7),
    example_rules.smooth_lion(grad, states[1], temperature=0.1),
]
bits = [t.view(torch.int32).tolist() for t in (*updates, *states)]
maps = Path("/proc/self/maps")
lines = maps.read_text().splitlines() if maps.exists() else []
print(json.dumps({
    "bits": bits,
    "is_compiled": example_rules.heavy_ball.is_compiled,
    "loaded": sorted({line.split()[-1] for line in lines if "/_emopt_rules/" in line}),
}))
"""
Run = CompletedProcess[str]


def run(code: str, folder: Path, **environment: str) -> Run:
    """Run code in an interpreter that finds the packages of a folder."""
    code = f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"
    return run_python(code, TORCH_EXTENSIONS_DIR=str(folder / "extensions"), **environment)


def build(folder: Path, *packages: str, **environment: str) -> Run:
    arguments = ["build-rules", *packages]
    return run(BUILD.format(arguments=arguments), folder, **environment)


def use(folder: Path, code: str = USE, **environment: str) -> Run:
    """Use the package where nothing can be compiled, unless CXX is given."""
    environment = {"CXX": str(folder / "no-compiler"), **environment}
    done = run(code, folder, **environment)
    assert done.returncode == 0, done.stderr
    return done


def written(done: Run) -> list[str]:
    return without_torchs_own(done.stderr)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example's package, whose rules are built, and the cache of the build."""
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(EXAMPLE, folder / EXAMPLE.name, ignore=shutil.ignore_patterns("__pycache__"))
    done = build(folder, EXAMPLE.name)
    assert done.returncode == 0, done.stderr
    paths = re.findall(r"^(.*) \(\d+ kB\)$", done.stdout, re.MULTILINE)
    assert {Path(path).parent for path in paths} == {folder / EXAMPLE.name / FOLDER}
    assert all(Path(path).is_file() for path in paths)
    return folder


@pytest.fixture
def package(built: Path, tmp_path: Path) -> Path:
    """A copy of the built package, without the cache."""
    return Path(shutil.copytree(built / EXAMPLE.name, tmp_path / EXAMPLE.name))


@pytest.fixture(scope="module")
def bits(built: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """What the rules compute if they are compiled here, for one instruction set."""
    folder = tmp_path_factory.mktemp("unbuilt")
    ignored = shutil.ignore_patterns(FOLDER)
    shutil.copytree(built / EXAMPLE.name, folder / EXAMPLE.name, ignore=ignored)
    code = f"import example_rules; example_rules.heavy_ball.compile()\n{USE}"
    seen = json.loads(use(folder, code, CXX=_build.compiler()).stdout)
    assert seen["is_compiled"]
    assert seen["loaded"] == []
    return seen["bits"]  # type: ignore[no-any-return]


def test_what_is_built(built: Path) -> None:
    folder = built / EXAMPLE.name / FOLDER
    listed = json.loads((folder / LIST).read_text())
    assert listed["abi"] == _build.abi(_build_cache.csrc())
    assert set(listed["rules"]) == {"heavy_ball", "smooth_lion.h:SmoothLion"}
    assert {path.name for path in folder.iterdir()} == {LIST, *listed["rules"].values()}
    for label, name in listed["rules"].items():
        assert re.fullmatch(rf"{label.rpartition(':')[2]}-[0-9a-f]{{16}}\.so", name)


def test_codes_of_shipped_rules(package: Path) -> None:
    code = """
import torch
import example_rules
for cls in (example_rules.HeavyBall, example_rules.SmoothLion):
    weight = torch.nn.Parameter(torch.ones(64, 64))
    optimizer = cls([weight], state_dtype="8bit", fused=True)
    weight.grad = torch.ones(64, 64)
    optimizer.step()
    print([(key, str(value.dtype)) for key, value in optimizer.state[weight].items()])
"""
    done = use(package.parent, code, EMERGING_OPTIMIZERS_JIT="0")
    for line, name in zip(done.stdout.splitlines(), ("velocity", "exp_avg"), strict=True):
        codes = [(name, "torch.uint8"), (f"{name}_scale", "torch.uint8")]
        assert line == repr([("step", "torch.float32"), *codes])


@pytest.mark.parametrize(("isa", "jit"), [("baseline", "0"), ("avx2", "0"), ("avx512", "")])
def test_loaded_without_a_compiler(
    package: Path, bits: list[list[int]], isa: str, jit: str
) -> None:
    from emerging_optimizers._native import native

    if isa not in native.supported_isas():
        pytest.skip(f"this machine has no {isa}")
    done = use(package.parent, EMERGING_OPTIMIZERS_ISA=isa, EMERGING_OPTIMIZERS_JIT=jit)
    assert written(done) == []
    seen = json.loads(done.stdout)
    assert seen["is_compiled"]
    assert seen["bits"] == bits
    if sys.platform == "linux":
        assert len(seen["loaded"]) == 2
    assert not (package.parent / "extensions").exists()


def test_compile_takes_what_is_shipped(package: Path) -> None:
    code = "import example_rules; example_rules.heavy_ball.compile(); print('loaded')"
    done = use(package.parent, code, EMERGING_OPTIMIZERS_JIT="0")
    assert (done.stdout, written(done)) == ("loaded\n", [])


def test_script_of_the_package(package: Path) -> None:
    """``python -m example_rules.train`` has its rules in ``__main__``."""
    shutil.copy(package / "heavy_ball.py", package / "train.py")
    with (package / "train.py").open("a") as file:
        file.write("heavy_ball.compile()\nprint(heavy_ball.place[0])\n")
    code = "import runpy; runpy.run_module('example_rules.train', run_name='__main__')"
    # As python -m does, unlike runpy by default.
    code = code.replace("__main__')", "__main__', alter_sys=True)")
    done = use(package.parent, code, EMERGING_OPTIMIZERS_JIT="0")
    assert done.stdout == "__main__\n"


# ---- what is not used ----------------------------------------------------------------------------


def change_list(package: Path, **values: str) -> None:
    file = package / FOLDER / LIST
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def change(package: Path, file: str, old: str, new: str) -> None:
    text = (package / file).read_text()
    assert old in text
    (package / file).write_text(text.replace(old, new))


def library(package: Path, name: str = "heavy_ball") -> Path:
    (found,) = (package / FOLDER).glob(f"{name}-*.so")
    return found


def replace_library(package: Path, data: bytes) -> None:
    library(package).write_bytes(data)


Spoil = Callable[[Path], object]
SPOILT: dict[str, tuple[Spoil, str]] = {
    "other version": (
        lambda p: change_list(p, version="9.9", abi="0x123"),
        r"they were compiled for emerging_optimizers 9\.9 \(headers 0x123\), and this is"
        r" \S+ \(headers 0x[0-9a-f]{16}\)",
    ),
    "damaged list": (
        lambda p: (p / FOLDER / LIST).write_text("{"),
        r".*/rules\.json cannot be read or is damaged",
    ),
    "list of something else": (
        lambda p: (p / FOLDER / LIST).write_text("[1]"),
        r".*/rules\.json cannot be read or is damaged",
    ),
    "changed": (
        lambda p: change(p, "heavy_ball.py", "add_(grad)", "add_(grad, alpha=1.0).mul_(1.0)"),
        r"the rule heavy_ball, or what it includes, has changed since it was built",
    ),
    "missing": (
        lambda p: library(p).unlink(),
        r".*/heavy_ball-\w+\.so cannot be read \(No such file or directory\)",
    ),
    "truncated": (
        lambda p: os.truncate(library(p), 5000),
        r".*/heavy_ball-\w+\.so is truncated: it has 5000 of at least \d+ bytes",
    ),
    "flipped": (
        lambda p: replace_library(p, library(p).read_bytes().replace(b"heavy_ball", b"heavy_bell")),
        r".*/heavy_ball-\w+\.so is damaged: its checksum does not match",
    ),
    "of another rule": (
        lambda p: replace_library(p, library(p, "SmoothLion").read_bytes()),
        r".*/heavy_ball-\w+\.so has no rule .*",
    ),
}
CURE = r"\. Rebuild the package: python -m emerging_optimizers build-rules example_rules"


@pytest.mark.skipif(sys.platform != "linux", reason="reads headers of ELF")
@pytest.mark.parametrize("spoilt", list(SPOILT))
def test_interpreted_where_the_library_is_of_no_use(
    package: Path, bits: list[list[int]], spoilt: str
) -> None:
    """One line tells why and what to do; the results are the same."""
    spoil, reason = SPOILT[spoilt]
    spoil(package)
    # The rule in C++ can be compiled, the one in Python is only interpreted.
    code = "\n".join(
        [
            "import emerging_optimizers._user_rules.background as background",
            "background.run = lambda task: None",
            USE,
            "example_rules.heavy_ball(grad, states[0])",
        ]
    )
    done = use(package.parent, code, CXX=_build.compiler())
    seen = json.loads(done.stdout)
    assert not seen["is_compiled"]
    if spoilt != "changed":
        assert seen["bits"] == bits
    line, *others = written(done)
    start = "emerging_optimizers: the compiled rules of example_rules are not used: "
    assert re.fullmatch(re.escape(start) + reason + CURE, line), line
    # The message comes once for both rules if they share the reason.
    shares = spoilt in ("other version", "damaged list", "list of something else")
    assert [other.partition(" in ")[0] for other in others] == (
        ["emerging_optimizers: compiled the rule SmoothLion"] if shares else []
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads headers of ELF")
def test_rule_in_cpp_that_changed(package: Path) -> None:
    change(package, "smooth_lion.h", "// Lion", "// Smooth Lion")
    done = run(USE, package.parent, CXX=str(package / "no-compiler"))
    assert done.returncode == 1
    line, *_, last = written(done)
    assert "the rule SmoothLion, or what it includes, has changed since it was built" in line
    assert last.startswith("RuntimeError: the rule SmoothLion cannot be loaded: no C++ compiler")
    library(package, "SmoothLion").unlink()
    shutil.copytree(EXAMPLE, package, dirs_exist_ok=True)
    done = run(USE, package.parent, CXX=str(package / "no-compiler"))
    assert "SmoothLion-" in written(done)[0]
    assert "cannot be read (No such file or directory)" in written(done)[0]


def test_header_that_a_rule_includes(package: Path) -> None:
    (package / "constants.h").write_text("#pragma once\n")
    change(package, "smooth_lion.h", "#include <cmath>", '#include <cmath>\n#include "constants.h"')
    assert build(package.parent, "example_rules").returncode == 0
    assert written(use(package.parent)) == []
    (package / "constants.h").write_text("#pragma once\n// changed\n")
    done = run(USE, package.parent, CXX=str(package / "no-compiler"))
    assert "the rule SmoothLion, or what it includes, has changed" in written(done)[0]


def test_folder_that_is_no_package(package: Path) -> None:
    """Libraries beside a header are not loaded if no package was imported from there."""
    code = "import emerging_optimizers as eo; eo.load_rule({!r})".format(
        str(package / "smooth_lion.h")
    )
    done = run(code, package.parent, CXX=str(package / "no-compiler"))
    assert written(done)[-1].startswith("RuntimeError: the rule SmoothLion cannot be loaded: no C")


# ---- builds --------------------------------------------------------------------------------------


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_build_again(package: Path, built: Path) -> None:
    """What changed is compiled, what is left over is removed; even a bad list is no obstacle."""
    cache = {"TORCH_EXTENSIONS_DIR": str(built / "extensions")}
    before = digests(package / FOLDER)
    (package / FOLDER / LIST).write_text("{")
    (package / FOLDER / "old-0123.so").touch()
    code = f"import os; os.environ.update({cache!r})\n"
    code += BUILD.format(arguments=["build-rules", "example_rules"])
    done = run(code, package.parent)
    assert (done.returncode, written(done)) == (0, [])
    assert digests(package / FOLDER) == before

    change(package, "heavy_ball.py", "add_(grad)", "add_(grad, alpha=2.0)")
    done = run(code, package.parent)
    (line,) = written(done)
    assert line.startswith("emerging_optimizers: compiled the rule heavy_ball in ")
    after = digests(package / FOLDER)
    assert len(after) == 3
    assert len(after.items() - before.items()) == 2  # the library and the list


RULE = """\
import emerging_optimizers as eo
@eo.rule
def {name}(grad):
    return {body}
"""


def test_which_rules_a_package_has(tmp_path: Path) -> None:
    files = {
        "__init__.py": "",
        "first.py": RULE.format(name="first", body="grad * 2"),
        "inner/__init__.py": "",
        "inner/second.py": "from other import third\n" + RULE.format(name="second", body="-grad"),
        "__main__.py": "raise SystemExit('a script')",
        "optional.py": "import package_that_is_not_installed\n",
        "../other.py": RULE.format(name="third", body="grad * 3"),
        "../package_of_another/__init__.py": RULE.format(name="fourth", body="grad * 4"),
        "../empty/__init__.py": "",
        "../space/package/__init__.py": "",
        "../failing/__init__.py": "import package_that_is_not_installed\n",
    }
    for name, text in files.items():
        path = tmp_path / "package" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    done = build(tmp_path, "package", "empty")
    assert done.returncode == 0, done.stderr
    listed = json.loads((tmp_path / "package" / FOLDER / LIST).read_text())
    assert set(listed["rules"]) == {"first", "second"}
    assert not (tmp_path / "empty" / FOLDER).exists()
    (left_out,) = (line for line in written(done) if "left out" in line)
    assert left_out == (
        "emerging_optimizers: package.optional cannot be imported, so rules that it defines are"
        " left out: ModuleNotFoundError: No module named 'package_that_is_not_installed'"
    )
    code = "import package.inner.second as s; s.second.compile(); print('loaded')"
    assert use(tmp_path, code, EMERGING_OPTIMIZERS_JIT="0").stdout == "loaded\n"
    # Another rule of the package, which was not there, takes the usual way without a message.
    (tmp_path / "package" / "new.py").write_text(RULE.format(name="new", body="grad * 5"))
    code = "import torch; from package.new import new; print(new(torch.ones(1)).item())"
    done = use(tmp_path, code, EMERGING_OPTIMIZERS_JIT="0")
    assert (done.stdout, written(done)) == ("5.0\n", [])
    (tmp_path / "package" / "new.py").unlink()

    for arguments, message in {
        ("empty",): "no rules were found in empty. Define them in modules",
        ("nothing",): "there is no package nothing in ",
        ("other",): "other is a module or a namespace. Name a package that has an __init__.py",
        ("space",): "space is a module or a namespace. Name a package that has an __init__.py",
        ("failing",): "No module named 'package_that_is_not_installed'",
    }.items():
        done = build(tmp_path, *arguments)
        assert done.returncode == 1
        assert message in written(done)[-1]
    done = build(tmp_path, "package", EMERGING_OPTIMIZERS_JIT="0")
    assert done.returncode == 0  # from the cache
    (tmp_path / "package" / "first.py").write_text(RULE.format(name="first", body="grad * 7"))
    done = build(tmp_path, "package", CXX="no-compiler")
    assert done.returncode == 1
    assert "emerging_optimizers: no C++ compiler (no-compiler) was found. " in written(done)[-1]
