"""Builds the source distribution and, from it, the wheel, and checks both: `make wheel`.

    python tools/wheel_check.py dist

The wheel is for the running torch and Python, which its name states; it contains CUDA kernels if
setup.py finds what they need. On Linux, auditwheel tags it. The check fails if

- a file is missing: a module, a source or header, the licence, py.typed;
- the compiled module needs a library that comes neither with the system nor with torch;
- the wheel exceeds its size limit;
- a package index would reject the metadata.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "emerging_optimizers"
MAX_MB = {"cpu": 6, "cuda": 60}
# Generated files.
MADE = (".git", ".venv", "build", "dist", "*.egg-info", "*.so", "__pycache__", ".*_cache")
# Libraries that torch provides. A second OpenMP runtime, for example, would start more threads.
FROM_TORCH = ("libc10*.so", "libtorch*.so", "libgomp.so.1", "libcudart.so.*")
MAY_NEED = re.compile(
    r"lib(c|m|stdc\+\+|gcc_s|pthread|dl|rt)\.so\.\d+|ld-linux.*"  # the system's
    r"|libc10(_cuda)?\.so|libtorch(_cpu|_cuda|_python)?\.so|libgomp\.so\.1|libcudart\.so\.\d+"
)


def run(*command: str, cwd: Path = ROOT, **environment: str) -> str:
    """Run a command and return its output; if it fails, exit with that."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    environment = {**os.environ, "PATH": path, **environment}
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-8000:]}")
    return done.stdout


def build(output: Path) -> tuple[Path, Path]:
    """Build the source distribution, and the wheel from it; return their paths.

    Builds a copy, because setuptools creates folders in the source tree that a concurrent build
    would remove.
    """
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "source")
        shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*MADE))
        command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder]
        settings = {"EMERGING_OPTIMIZERS_NATIVE": "1", "EMERGING_OPTIMIZERS_ALLOW_CLASH": "1"}
        log = run(*command, cwd=source, **settings)
        print(*sorted(set(re.findall(rf"^{PACKAGE}: .*", log, re.MULTILINE))), sep="\n")
        (sdist,) = Path(folder).glob("*.tar.gz")
        (built,) = Path(folder).glob("*.whl")
        if sys.platform == "linux":
            excluded = [f"--exclude={pattern}" for pattern in FROM_TORCH]
            repaired = Path(folder, "repaired")
            run("auditwheel", "repair", *excluded, f"--wheel-dir={repaired}", str(built))
            (built,) = repaired.glob("*.whl")
        return sdist.replace(output / sdist.name), built.replace(output / built.name)


def files(*patterns: str) -> set[str]:
    """Return the files of the checkout that match, relative to its root."""
    return {
        str(path.relative_to(ROOT))
        for pattern in patterns
        for path in ROOT.glob(pattern)
        if path.is_file()
    }


def check_sdist(sdist: Path) -> list[str]:
    """Return the findings about a source distribution."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = files(f"{PACKAGE}/**/*.py", "csrc/**/*", "tests/**/*.py", "tests/cpp/*")
    wanted |= files("benchmarks/**/*.py", "tools/*.py")
    wanted |= {"LICENSE", "README.md", "pyproject.toml", "setup.py", "Makefile", "CMakeLists.txt"}
    wanted |= {f"{PACKAGE}/py.typed"}
    return [f"{sdist.name} lacks {name}" for name in sorted(wanted - names)]


def check_wheel(wheel: Path) -> list[str]:
    """Return the findings about a wheel."""
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        modules = [name for name in names if name.startswith(f"{PACKAGE}/_C.")]
        needed = needed_libraries(Path(archive.extract(modules[0], folder))) if modules else []
    wanted = files(f"{PACKAGE}/**/*.py") | {f"{PACKAGE}/py.typed"}
    wanted |= {f"{PACKAGE}/{name}" for name in files("csrc/**/*")}
    findings = [f"lacks {name}" for name in sorted(wanted - names)]
    others = {name for name in names - wanted - set(modules) if ".dist-info/" not in name}
    findings += [f"has {name}" for name in sorted(others)]
    findings += [] if len(modules) == 1 else [f"has {len(modules)} compiled modules"]
    findings += [] if any(name.endswith("/LICENSE") for name in names) else ["lacks the licence"]
    findings += [f"needs {name}" for name in needed if not MAY_NEED.fullmatch(name)]
    major, minor = torch.__version__.split(".")[:2]
    tag = re.search(rf"\+torch{major}{minor}(cpu|cu\d+)-", wheel.name)
    if tag is None:
        findings.append(f"does not name torch {major}.{minor}")
    if sys.platform == "linux" and "-manylinux_" not in wheel.name:
        findings.append("is not tagged manylinux")
    size = wheel.stat().st_size / 1e6
    bound = MAX_MB["cpu" if tag is None or tag[1] == "cpu" else "cuda"]
    print(f"{wheel.name}: {size:.2f} MB (at most {bound}); needs {', '.join(sorted(needed))}")
    if size > bound:
        findings.append(f"has {size:.2f} MB, more than {bound}")
    return [f"{wheel.name} {finding}" for finding in findings]


def needed_libraries(library: Path) -> list[str]:
    """Return the shared libraries that a library needs, and its search paths."""
    if sys.platform != "linux":
        return []
    dynamic = run("readelf", "--dynamic", "--wide", str(library))
    paths = re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.*)\]", dynamic)
    return re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic) + [f"the path {path}" for path in paths]


def main() -> None:
    """Build both, and exit with the findings."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path, help="the folder for both")
    sdist, wheel = build(parser.parse_args().output.resolve())
    findings = check_sdist(sdist) + check_wheel(wheel)
    print(
        run(
            sys.executable,
            "-m",
            "twine",
            "check",
            "--strict",
            str(sdist),
            str(wheel),
            NO_COLOR="1",
            COLUMNS="200",
        ),
        end="",
    )
    if findings:
        sys.exit("\n".join(findings))


if __name__ == "__main__":
    main()
