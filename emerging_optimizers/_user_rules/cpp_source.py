"""The C++ text of a rule: where it is, its structs, the files that it includes, its unit."""

import os
import re
from pathlib import Path
from typing import NamedTuple

from .graph import RuleError

_TOKEN = re.compile(
    r"""//[^\n]* | /\*.*?\*/ | ^[ \t]*\#(?:\\.|[^\n\\])*   # comments and directives
    | R"(?P<mark>\w*)\(.*?\)(?P=mark)" | "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])*'
    | (?P<word>\w[\w']*) | (?P<sign>::|[{}();:=])""",
    re.DOTALL | re.MULTILINE | re.VERBOSE,
)
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*["<]([^">\n]+)[">]', re.MULTILINE)
_CONDITION = re.compile(r"[ \t]*#[ \t]*(if|ifdef|ifndef|elif|else|endif)\b")
_DISABLED = re.compile(r"[ \t]*#[ \t]*if[ \t]+(?:0|false)\b")
_NO_RULE = (
    "a rule is a struct with kName, hyperparameters() and Step, which has a name, is no template"
    " and is in no other struct"
)


class Source(NamedTuple):
    """A C++ text.

    Attributes:
        text: The text.
        label: How messages name it: the file as the user named it.
        path: The absolute path of its file; None if the user passed text.
    """

    text: str
    label: str
    path: Path | None


class Struct(NamedTuple):
    """A struct in a namespace.

    Attributes:
        name: Its name.
        namespace: The namespace, such as ``emopt``; "" for the global one.
        line: The line where its body begins.
        words: The words in its body, except for those in inner braces.
    """

    name: str
    namespace: str
    line: int
    words: set[str]


def read_source(source: str | os.PathLike[str]) -> Source:
    """Return a text, or that of a file. A text has braces or several lines.

    Raises:
        FileNotFoundError: There is no such file.
        IsADirectoryError: It is a folder.
        RuleError: The file is not UTF-8.
    """
    if isinstance(source, str) and ("{" in source or "\n" in source):
        return Source(source.removeprefix("\ufeff"), "C++ text", None)
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(
            f"source must be the path of a header or C++ text, not {type(source).__name__}"
        )
    label = os.fspath(source)
    path = Path(label).absolute()
    if path.is_dir():
        raise IsADirectoryError(f"{label!r} is a folder: pass the path of a header, or C++ text")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"there is no file {label!r} in {Path.cwd()}: pass the path of a header, or C++ text"
        ) from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise RuleError(f"{label}:{line}: the file is not UTF-8: convert it to UTF-8") from None
    return Source(text, label, path)


def find_struct(source: Source, name: str | None) -> Struct:
    """Return the struct of the rule in a text.

    Args:
        source: The text.
        name: The name of the struct; None if there is one rule.

    Raises:
        RuleError: There is no such struct, or there are several rules.
    """
    structs = _structs(source.text)
    rules = [s for s in structs if "kName" in s.words] or [
        s for s in structs if {"hyperparameters", "Step"} & s.words
    ]
    names = ", ".join(s.name for s in rules)
    if name is not None:
        for struct in structs:
            if struct.name == name:
                return struct
        has = f"it has {names}" if names else f"it has none; {_NO_RULE}"
        raise RuleError(f"{source.label} has no struct {name}: {has}")
    if not rules:
        raise RuleError(f"{source.label} has no rule: {_NO_RULE}")
    if len(rules) > 1:
        raise RuleError(f"{source.label} has several rules, {names}: choose one with name=")
    return rules[0]


def _structs(text: str) -> list[Struct]:
    """Return the structs that are in namespaces only, and are not templates."""
    found: dict[tuple[str, str], Struct] = {}
    # What is open: the names of a namespace; a struct; or None, for other braces.
    opened: list[list[str] | Struct | None] = []
    head: list[str] = []  # the tokens since the last statement or brace
    text = _enabled(text)
    for token in _TOKEN.finditer(text):
        word = token["word"] or token["sign"]
        if word is None:
            continue
        inner = opened[-1] if opened else None
        if token["word"] and isinstance(inner, Struct):
            inner.words.add(word)
        if word == "{":
            outer = [names for names in opened if isinstance(names, list)]
            line = text.count("\n", 0, token.start()) + 1
            space = "::".join(name for names in outer for name in names)
            block = _block(head, space, line)
            is_nested = len(outer) < len(opened)
            if isinstance(block, Struct) and not is_nested:
                found.setdefault((block.namespace, block.name), block)
            opened.append(None if is_nested else block)
        elif word == "}" and opened:
            opened.pop()
        if word in "{};":
            head = []
        else:
            head.append(word)
    return list(found.values())


def _enabled(text: str) -> str:
    """Return a text in which the lines that ``#if 0`` disables are empty."""
    lines = []
    depth = 0  # of conditions, from the disabled one on
    for line in text.split("\n"):
        found = _CONDITION.match(line)
        word = "" if found is None else found[1]
        lines.append("" if depth else line)
        if depth == 0:
            depth = 1 if _DISABLED.match(line) else 0
        elif word.startswith("if"):
            depth += 1
        elif word == "endif" or (word and depth == 1):
            depth -= 1
    return "\n".join(lines)


def _block(head: list[str], namespace: str, line: int) -> list[str] | Struct | None:
    """Return what a brace opens after some tokens."""
    if "namespace" in head:
        return [word for word in head[head.index("namespace") + 1 :] if word != "::"]
    if head == ["extern"]:
        return []
    if head[:1] not in (["struct"], ["class"]):
        return None
    name = " ".join(head[1:]).partition(" : ")[0].removesuffix(" final").rpartition(" ")[2]
    return Struct(name, namespace, line, set()) if name.isidentifier() else None


def lacks_brace(text: str) -> bool:
    """Return whether a text opens more braces than it closes."""
    signs = [token["sign"] for token in _TOKEN.finditer(_enabled(text))]
    return signs.count("{") > signs.count("}")


def included_texts(source: Source, csrc: Path) -> list[str]:
    """Return the texts of the files that a text includes, and those include, where they exist.

    Args:
        source: The text.
        csrc: The folder of the package's headers.
    """
    found: dict[Path, str] = {}
    pending = [(source.path, source.text)]
    folders = [*([source.path.parent] if source.path is not None else []), csrc / "rules", csrc]
    while pending:
        path, text = pending.pop()
        for name in _INCLUDE.findall(text):
            nearest = [path.parent] if path is not None else []
            for folder in (*nearest, *folders):
                file = (folder / name).resolve()
                if file.is_file():
                    if file not in found:
                        found[file] = file.read_text(encoding="utf-8", errors="replace")
                        pending.append((file, found[file]))
                    break
    return list(found.values())


def options_of(source: Source, csrc: Path) -> list[str]:
    """Return the compiler's options that tell where a text is: in messages, and for its includes.

    Args:
        source: The text.
        csrc: The folder of the package's headers.
    """
    label = source.label.replace("\\", "\\\\").replace('"', '\\"')
    folders = [source.path.parent] if source.path is not None else []
    return [f'-DEMOPT_SOURCE="{label}"', *(f"-iquote{path}" for path in (*folders, csrc / "rules"))]


def unit_of(source: Source, struct: Struct) -> str:
    """Return the text of a rule's unit. It depends on the user's text, but not on where that is."""
    lines = [
        '#include "engine/rule_unit.h"',
        "// Without an update, a step would do anything.",
        '#pragma GCC diagnostic error "-Wreturn-type"',
        "#line 1 EMOPT_SOURCE",
        source.text,
        "",  # for a backslash at the end
    ]
    if struct.namespace != "emopt":
        name = "::".join(part for part in (struct.namespace, struct.name) if part)
        lines.append(f"namespace emopt {{ using ::{name}; }}")
    return "\n".join([*lines, f"EMOPT_RULE({struct.name})", ""])
