"""The package's imports go one way, and files stay short. Both are read from the sources."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import emerging_optimizers

PACKAGE = Path(emerging_optimizers.__file__).parent
ROOT = PACKAGE.parent
LONGEST = {"emerging_optimizers": 400, "tests": 600, "benchmarks": 600, "tools": 600}
LONGEST["examples"] = 600


def module_of(path: Path, package: Path) -> str:
    """Return a file's name as an import has it."""
    names = (package.name, *path.relative_to(package).with_suffix("").parts)
    return ".".join(names).removesuffix(".__init__")


def imported_names(path: Path, module: str) -> Iterator[str]:
    """Yield absolute names of all that a file imports, in functions and for type checkers, too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                parents = module.split(".")
                up = node.level - (path.name == "__init__.py")
                source = ".".join(parents[: len(parents) - up] + ([source] if source else []))
            yield from (f"{source}.{name.name}" for name in node.names)


def import_graph(package: Path) -> dict[str, set[str]]:
    """Return for each module of a package the other ones that it imports."""
    files = {module_of(path, package): path for path in package.rglob("*.py")}
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        graph[module] = set()
        for name in imported_names(path, module):
            # A module, or what is defined in one.
            found = name if name in files else name.rpartition(".")[0]
            if found in files:
                graph[module].add(found)
    return graph


def circle(package: Path) -> str:
    """Return a circle of imports, from each module to the one that it imports; "" if none."""
    try:
        graphlib.TopologicalSorter(import_graph(package)).prepare()
    except graphlib.CycleError as error:
        # The sorter lists each module before the one that imports it.
        return " -> ".join(reversed(error.args[1]))
    return ""


def test_package_has_no_circle() -> None:
    assert circle(PACKAGE) == ""


CIRCLES = {
    "two": ({"a": "from . import b", "b": "from .a import name"}, ["a", "b"]),
    "in functions": (
        {"a": "def f():\n    from . import b", "b": "def f():\n    import package.c",
         "c": "from .a import *"},
        ["a", "b", "c"],
    ),
    "for type checkers": (
        {"a": "from package.b import B", "b": "if TYPE_CHECKING:\n    from package import a"},
        ["a", "b"],
    ),
    "itself": ({"a": "import package.a"}, ["a"]),
    "the package": ({"__init__": "from .a import name", "a": "from . import name"}, ["", "a"]),
    "across folders": (
        {"a": "from .inner import name", "inner/__init__": "from .b import name",
         "inner/b": "from ..a import name"},
        ["a", "inner", "inner.b"],
    ),
    "none": ({"__init__": "from . import a, b", "a": "from . import b", "b": "import torch"}, []),
}  # fmt: skip


@pytest.mark.parametrize(("sources", "modules"), CIRCLES.values(), ids=list(CIRCLES))
def test_circles_are_named(tmp_path: Path, sources: dict[str, str], modules: list[str]) -> None:
    package = tmp_path / "package"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").touch()
    for name, source in sources.items():
        (package / f"{name}.py").write_text(source)
    names = [f"package.{name}".removesuffix(".") for name in modules]
    # In the direction of the imports, from any of them.
    expected = [" -> ".join([*names[i:], *names[:i], names[i]]) for i in range(len(names))]
    assert circle(package) in (expected or [""])


@pytest.mark.parametrize(("folder", "longest"), LONGEST.items(), ids=list(LONGEST))
def test_files_are_short(folder: str, longest: int) -> None:
    top = PACKAGE if folder == PACKAGE.name else ROOT / folder
    if not top.is_dir():
        pytest.skip(f"there is no {folder}/ beside the package")
    lengths = {path: len(path.read_text().splitlines()) for path in top.rglob("*.py")}
    assert lengths
    long = {str(path.relative_to(top)): n for path, n in lengths.items() if n > longest}
    assert not long, f"split these by subject, at {longest} lines a file"
