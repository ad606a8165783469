"""The wheel as users install it: built from the source distribution, with only torch installed.

The environment contains only torch and its requirements, which a .pth file finds in a folder of
links: installing a second copy of torch would take a minute.
"""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import wheel_check
from packaging.requirements import Requirement
from support import without_torchs_own

from emerging_optimizers._native import native

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="wheels are checked on Linux"),
]

SMOKE = """
import gc, json, sys, time, warnings
import torch
gc.collect()  # of torch's objects, which takes longer than the import, and may come at any time
begin = time.perf_counter()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import emerging_optimizers as package
seconds = time.perf_counter() - begin

grads = [torch.tensor([1.0, -2.0, 0.0]), torch.ones(2, 2, dtype=torch.bfloat16)]
exp_avgs = [torch.zeros_like(grad) for grad in grads]
updates = package.scalar_optimizers.calculate_lion_update(grads, exp_avgs, momentum_beta=0.9)
param = torch.nn.Parameter(torch.ones(1000))
param.grad = torch.ones(1000)
package.AdamW([param], lr=0.5, weight_decay=0.0, fused=True).step()

from emerging_optimizers._native import native
print(json.dumps({
    "seconds": seconds,
    "warnings": [str(warning.message) for warning in caught],
    "package": package.__file__,
    "version": package.__version__,
    "module": native and native.__file__,
    "torch": native and native.torch_version,
    "isas": native and native.compiled_isas(),
    "lion": updates[0].tolist(),
    "adamw": [param.min().item(), param.max().item()],
    "others": sorted({"numpy", "pytest", "pip", "ninja"} & set(sys.modules)),
}))
"""


@dataclass
class Environment:
    """A virtual environment with torch and the installed wheel."""

    folder: Path
    wheel: Path
    sdist: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def package(self) -> Path:
        (found,) = self.folder.glob("lib/python*/site-packages/emerging_optimizers")
        return found

    def smoke(self, **environment: str) -> tuple[dict[str, Any], list[str]]:
        """Use the package, without a compiler unless `environment` provides one."""
        variables = {"PATH": str(self.python.parent), "HOME": str(self.folder), **environment}
        assert ("CXX" in variables) == (shutil.which("c++", path=variables["PATH"]) is not None)
        done = subprocess.run(
            [str(self.python), "-c", SMOKE],
            # torch warns if there is no NumPy.
            env={"PYTHONWARNINGS": "ignore:Failed to initialize NumPy", **variables},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        seen = json.loads(done.stdout)
        assert seen["lion"] == [1.0, -1.0, 0.0]
        assert seen["adamw"] == pytest.approx([0.5, 0.5], abs=1e-6)
        return seen, without_torchs_own(done.stderr)


def link(folder: Path, *names: str) -> None:
    """Fill a folder with links to distributions and what they require, and to nothing else."""
    folder.mkdir()
    waiting, seen = list(map(Requirement, names)), set()
    while waiting:
        wanted = waiting.pop()
        try:
            distribution = importlib.metadata.distribution(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            continue  # required on other systems
        for required in map(Requirement, distribution.requires or []):
            extras = [{"extra": extra} for extra in ("", *wanted.extras)]
            is_required = required.marker is None or any(map(required.marker.evaluate, extras))
            if is_required and str(required) not in seen:
                waiting.append(required)
                seen.add(str(required))
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (folder / top).exists():  # several distributions may share a folder
                (folder / top).symlink_to(str(distribution.locate_file(top)))


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, wheel_check.__file__, str(folder / "dist")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("dist/*.whl")
    (sdist,) = folder.glob("dist/*.tar.gz")
    made = Environment(folder / "venv", wheel, sdist)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(made.folder)], check=True)
    links = folder / "torch"
    link(links, "torch")
    (site,) = made.folder.glob("lib/python*/site-packages")
    (site / "torch.pth").write_text(f"{links}\n")
    # Fails if a requirement is missing.
    pip = [sys.executable, "-m", "pip", "--python", str(made.python)]
    subprocess.run([*pip, "install", "--quiet", "--no-index", str(made.wheel)], check=True)
    return made


def test_wheel_without_a_compiler(environment: Environment) -> None:
    seen, written = environment.smoke()
    assert written == []
    assert seen["warnings"] == []
    assert seen["others"] == []
    assert Path(seen["package"]).parent == environment.package
    assert Path(seen["module"]).parent == environment.package
    assert seen["torch"] == native.torch_version
    assert seen["isas"] == native.compiled_isas()
    base = environment.sdist.name.removesuffix(".tar.gz").rpartition("-")[2]
    major, minor = torch.__version__.split(".")[:2]
    assert re.fullmatch(rf"{re.escape(base)}\+torch{major}{minor}(cpu|cu\d+)", seen["version"])
    assert f"-{seen['version']}-" in environment.wheel.name


def test_import_time(environment: Environment) -> None:
    """In addition to torch's import; the minimum of several runs, on a busy machine."""
    seconds: list[float] = []
    while len(seconds) < 6 and min(seconds, default=1.0) > 0.06:
        seconds.append(environment.smoke()[0]["seconds"])
    assert min(seconds) <= 0.06, seconds


def test_first_import_compiles_what_the_wheel_carries(
    environment: Environment, tmp_path: Path
) -> None:
    extensions = tmp_path / "extensions"
    copy = tmp_path / "site" / environment.package.name
    shutil.copytree(environment.package, copy, ignore=shutil.ignore_patterns("_C.*"))
    (compiled,) = environment.package.glob("_C.*")
    variables = {"PYTHONPATH": str(copy.parent), "TORCH_EXTENSIONS_DIR": str(extensions)}
    variables["EMERGING_OPTIMIZERS_CUDA"] = "0"  # nvcc would take minutes
    compiler = tmp_path / "c++"  # halves the time
    compiler.write_text('#!/bin/sh\nexec c++ "$@" -O0\n')
    compiler.chmod(0o755)
    seen, written = environment.smoke(**variables, CXX=str(compiler), PATH=os.environ["PATH"])
    (line,) = written
    assert line.startswith("emerging_optimizers: compiling the native kernels for torch")
    assert seen["warnings"] == []
    assert Path(seen["package"]).parent == copy
    assert extensions in Path(seen["module"]).parents
    assert seen["isas"] == native.compiled_isas()

    # Later imports use it, even if the installed module was compiled for another torch.
    library = compiled.read_bytes()
    mark = b"is built for torch " + native.torch_version.encode()
    assert library.count(mark) == 1
    other = mark[: -len(native.torch_version)] + b"9" * len(native.torch_version)
    (copy / compiled.name).write_bytes(library.replace(mark, other))
    again, written = environment.smoke(**variables)
    assert written == []
    assert again["warnings"] == []
    assert again["module"] == seen["module"]


RULE = """
import json, sys, warnings
import torch
import emerging_optimizers as eo
code = '''
@eo.rule
def momentum(grad, exp_avg, *, beta=0.9):
    exp_avg.mul_(beta).add_(grad, alpha=1 - beta)
    return exp_avg
'''
exec(code)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    update = momentum(torch.tensor([1.0, -2.0]), torch.zeros(2), beta=0.5)
    is_native = momentum.native is not None
    try:
        momentum.compile()
        error = None
    except RuntimeError as raised:
        error = str(raised)
    momentum(torch.zeros(2), torch.zeros(2))
messages = [str(warning.message) for warning in caught]
print(json.dumps([update.tolist(), is_native, error, messages]))
"""


@pytest.mark.parametrize("has_compiler", [True, False])
def test_rules_in_python(environment: Environment, tmp_path: Path, has_compiler: bool) -> None:
    """A rule is compiled against the wheel's headers; without a compiler, it is interpreted."""
    path = str(environment.python.parent) + (f":{os.environ['PATH']}" if has_compiler else "")
    done = subprocess.run(
        [str(environment.python), "-W", "ignore:Failed to initialize NumPy", "-c", RULE],
        env={"PATH": path, "HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    update, native_at_once, error, messages = json.loads(done.stdout)
    assert update == [0.5, -1.0]
    assert native_at_once
    assert messages == []
    (line,) = without_torchs_own(done.stderr)
    if has_compiler:
        assert error is None
        assert line.startswith("emerging_optimizers: compiled the rule momentum in ")
    else:
        assert error.startswith("the rule momentum cannot be compiled: no C++ compiler (c++) was")
        assert line.startswith("emerging_optimizers: the rule momentum is interpreted, which takes")


def test_gallery_without_a_compiler(environment: Environment, tmp_path: Path) -> None:
    """The gallery's tests pass with the wheel, where nothing can be compiled."""
    tests = Path(__file__).parent
    tools = tmp_path / "tools"
    link(tools, "pytest", "numpy", "packaging")
    done = subprocess.run(
        [
            *(str(environment.python), "-m", "pytest", "-q", "-c", os.devnull),
            *("-p", "no:cacheprovider", "--rootdir", str(tests)),
            str(tests / "test_rule_gallery.py"),
        ],
        env={
            "PATH": str(environment.python.parent),
            "HOME": str(tmp_path),
            "PYTHONPATH": str(tools),
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (counts,) = re.findall(r"^(\d+) passed, (\d+) skipped", done.stdout, re.MULTILINE)
    passed, skipped = map(int, counts)
    assert passed > 250, done.stdout
    assert 0 < skipped < passed / 2, done.stdout  # those of compiled rules


SHIPPED = """
import json
from pathlib import Path
import torch
import example_rules
grad = torch.tensor([1.0, -2.0, 0.0])
updates = [
    example_rules.heavy_ball(grad, torch.ones(3), momentum=0.5),
    example_rules.smooth_lion(grad, torch.zeros(3), temperature=0.1),
]
weight = torch.nn.Parameter(torch.ones(3))
weight.grad = grad
example_rules.HeavyBall([weight], lr=0.5, fused=True).step()
lines = Path("/proc/self/maps").read_text().splitlines()
print(json.dumps({
    "package": example_rules.__file__,
    "updates": [update.tolist() for update in updates],
    "weight": weight.tolist(),
    "is_compiled": example_rules.heavy_ball.is_compiled,
    "loaded": len({line.split()[-1] for line in lines if "/example_rules/_emopt_rules/" in line}),
}))
"""


def test_package_that_ships_rules(environment: Environment, tmp_path: Path) -> None:
    """The example: installed as editable, which ships nothing, and as a wheel, which does."""
    source, dist, tools = (tmp_path / name for name in ("source", "dist", "tools"))
    ignored = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
    shutil.copytree(
        Path(__file__).parent.parent / "examples" / "rules_package", source, ignore=ignored
    )
    link(tools, "pip", "setuptools")
    bare = {"HOME": str(tmp_path), "PYTHONWARNINGS": "ignore:Failed to initialize NumPy"}
    bare["PATH"] = str(environment.python.parent)
    building = {**bare, "PATH": f"{bare['PATH']}:{os.environ['PATH']}", "PYTHONPATH": str(tools)}

    def run(*arguments: str, variables: dict[str, str], folder: Path = source) -> str:
        done = subprocess.run(
            [str(environment.python), *arguments],
            env=variables,
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert variables is not bare or without_torchs_own(done.stderr) == []
        return done.stdout

    def use(variables: dict[str, str]) -> dict[str, Any]:
        seen: dict[str, Any] = json.loads(run("-c", SHIPPED, variables=variables, folder=tmp_path))
        heavy_ball, smooth_lion = seen["updates"]
        assert heavy_ball == [1.5, -1.5, 0.5]
        assert smooth_lion == pytest.approx([0.76159, -0.96403, 0.0], abs=1e-5)
        assert seen["weight"] == [0.5, 2.0, 1.0]
        return seen

    pip = ["-m", "pip", "--quiet", "--disable-pip-version-check"]
    options = ["--no-index", "--no-build-isolation"]
    run(*pip, "install", *options, "--editable", ".", variables=building)
    seen = use({**building, "EMERGING_OPTIMIZERS_ISA": "baseline"})
    assert Path(seen["package"]).parent == source / "example_rules"
    assert seen["loaded"] == 0
    run(*pip, "uninstall", "--yes", "example-rules", variables=building)

    run(*pip, "wheel", *options, "--no-deps", "--wheel-dir", str(dist), ".", variables=building)
    (wheel,) = dist.iterdir()
    assert re.fullmatch(r"example_rules-1\.0-py3-none-linux_\w+\.whl", wheel.name)
    assert not (source / "example_rules" / "_emopt_rules").exists()
    run(*pip, "install", "--no-index", str(wheel), variables=building)
    try:
        seen = use(bare)
        assert environment.folder in Path(seen["package"]).parents
        assert seen["is_compiled"]
        assert seen["loaded"] == 2
    finally:
        run(*pip, "uninstall", "--yes", "example-rules", variables=building)
