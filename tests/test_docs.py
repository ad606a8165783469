"""The documentation's code runs as it stands, and prints what it says; its pages are complete."""

import ast
import importlib
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in ROOT.glob("docs/**/*.md"))]
every_page = pytest.mark.parametrize("page", PAGES)

# A block of Python; one that a line "% cuda" precedes needs a CUDA device.
BLOCK = re.compile(r"^(% cuda\n)?```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROMISE = re.compile(r"^print\(.*\)  # (.*)$", re.MULTILINE)


def run_blocks(page: str, with_cuda: bool) -> list[str]:
    """Run a page's blocks, each of which goes on from those before; return what they promise."""
    text = (ROOT / page).read_text()
    assert text.count("```python\n") == len(BLOCK.findall(text)), "a block is not recognised"
    namespace = {"__name__": "documentation"}
    promised = []
    for block in BLOCK.finditer(text):
        code = block[2]
        lines_before = text.count("\n", 0, block.start(2))
        compiled = compile("\n" * lines_before + code, page, "exec")
        if with_cuda or block[1] is None:
            exec(compiled, namespace)
            promised += PROMISE.findall(code)
    return promised


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # Rules of other tests may have the names of those of a page.
    module = importlib.import_module("emerging_optimizers._user_rules.user_rule")
    monkeypatch.setattr(module, "_RULES", {})


@every_page
def test_code(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    promised = run_blocks(page, with_cuda=False)
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line in promised] == promised


@pytest.mark.cuda
@pytest.mark.real
@pytest.mark.parametrize("page", [p for p in PAGES if "\n% cuda\n" in (ROOT / p).read_text()])
def test_cuda_code(page: str) -> None:
    run_blocks(page, with_cuda=True)


@every_page
def test_commands(page: str) -> None:
    """Targets and scripts that a page names are there."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for block in re.findall(r"^```(?:sh)?\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S):
        for line in block.splitlines():
            for target in re.findall(r"^(?:\$ )?make ([a-z-]+)", line):
                assert target in targets, line
            for script in re.findall(r"^(?:\$ )?(?:python|torchrun).* (\w+/\w+\.py)", line):
                assert (ROOT / script).exists(), line


def test_readme_has_the_committed_figures() -> None:
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "figures.py")
    assert spec is not None
    assert spec.loader is not None
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    assert figures.readme_sentence() in " ".join((ROOT / "README.md").read_text().split())


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "SECURITY.md", "examples/README.md"])
def test_links_to_files(page: str) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_every_module_is_in_the_design() -> None:
    page = (ROOT / "docs" / "design.md").read_text()
    modules = [
        path.name
        for folder in ("", "megatron", "_user_rules")  # rules have files of the same kind
        for path in (ROOT / "emerging_optimizers" / folder).glob("*.py")
        if not path.name.startswith("__")
    ]
    assert [name for name in modules if f"`{name}`" not in page] == []


def test_caption_of_the_chart() -> None:
    """The README's chart was measured as its caption says."""
    result = ROOT / "benchmarks" / "results" / "optimizers-cpu.json"
    run = json.loads(result.read_text())["run"]
    caption = re.findall(r"<sub>(.*?)</sub>", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    torch_version = ".".join(run["torch"].split(".")[:2])
    for fact in (run["cpu"], f"{run['threads']} threads", f"torch {torch_version}"):
        assert fact in " ".join(caption.split())


# ---- error messages ------------------------------------------------------------------------------


def messages_of_python(path: Path) -> Iterator[list[str]]:
    """Yield the constant parts of what is raised, warned of or exited with."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            arguments = node.exc.args
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "sys.exit",
            "warnings.warn",
            "_logger.error",
        ):
            arguments = node.args
        else:
            continue
        if not arguments:
            continue
        constants = (n.value for n in ast.walk(arguments[0]) if isinstance(n, ast.Constant))
        yield [value for value in constants if isinstance(value, str)]


def messages_of_cpp(path: Path) -> Iterator[list[str]]:
    text = re.sub(r'"\s*\n\s*"', "", path.read_text())  # literals that continue
    for call in re.findall(r"(?:TORCH_CHECK\w*|throw std::\w+)\((.*?)\);", text, re.DOTALL):
        yield re.findall(r'"((?:[^"\\]|\\.)*)"', call)
    if path.name == "rule_requirements.h":
        for message in re.findall(r'static_assert\([^"]*"((?:[^"\\]|\\.)*)"\)', text):
            yield [message.replace('\\"', '"')]


def all_messages() -> Iterator[tuple[str, str]]:
    """Yield each message's file and its longest constant part of one line."""
    sources = {
        messages_of_python: [ROOT / "setup.py", *ROOT.glob("emerging_optimizers/**/*.py")],
        messages_of_cpp: [*ROOT.glob("csrc/bindings/*.*"), *ROOT.glob("csrc/engine/**/*.*")],
    }
    for messages_of, paths in sources.items():
        for path in paths:
            for parts in messages_of(path):
                pieces = (piece for part in parts for piece in re.split(r"\n|\\n|%[a-z]", part))
                yield str(path.relative_to(ROOT)), max(pieces, key=len, default="")


def test_every_error_message_is_explained() -> None:
    def plain(text: str) -> str:
        return " ".join(re.sub(r"[`*]", "", text).split())

    page = plain((ROOT / "docs" / "troubleshooting.md").read_text())
    messages = sorted(set(all_messages()))
    missing = [(path, part) for path, part in messages if plain(part) not in page]
    assert len(messages) > 50
    assert missing == []
