"""Compiles rules to shared libraries, as the package's are compiled."""

import dataclasses
import re
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import oracle

from emerging_optimizers import _build
from emerging_optimizers._native import native
from emerging_optimizers._rule import Rule

_TESTS = Path(__file__).parent
CSRC = _TESTS.parent / "csrc"
IS_EMULATED = native is not None and native.__name__ == "emulated_cuda"
_KERNELS = """
#include "enqueue_on_host.h"
#define EMOPT_CUDA_WITH(Rule, ...)                                                            \\
  template int emopt::cuda::enqueue_rows<emopt::Rule, emopt::__VA_ARGS__>(                    \\
      const emopt::RuleInstance&, const emopt::HostOrDeviceScalar&, const void*,              \\
      const void* const*, size_t, const emopt::cuda::Chip&, void*);
#define EMOPT_CUDA_RULE(Rule)                \\
  EMOPT_CUDA_WITH(Rule, StoreUpdate, float)  \\
  EMOPT_CUDA_WITH(Rule, StoreUpdate, double) \\
  EMOPT_CUDA_WITH(Rule, ApplyUpdate, float)  \\
  EMOPT_CUDA_WITH(Rule, ApplyUpdate, double) \\
  EMOPT_CUDA_WITH(Rule, ApplyUpdate, float, true)
"""


def compile_rules(
    headers: Sequence[str],
    structs: Sequence[str],
    library: Path,
    *arguments: str,
    has_kernels: bool = False,
) -> Path:
    """Compile structs to a library; a ``subprocess.CalledProcessError`` has the compiler's output.

    Args:
        headers: The headers that define the structs.
        structs: The structs' names.
        library: The path of the library.
        *arguments: Compiler options, added to the package's.
        has_kernels: Add their CUDA kernels, for emulated devices.
    """
    lines = [f'#include "{name}"' for name in [*headers, "engine/rule_unit.h"]]
    if has_kernels:
        lines += [_KERNELS, *(f"EMOPT_CUDA_RULE({struct})" for struct in structs)]
    lines += [f"EMOPT_RULE({struct})" for struct in structs]
    source = library.with_suffix(".cpp")
    source.write_text("\n".join([*lines, ""]))
    # The emulated module is compiled without a version stamp.
    stamp = [] if IS_EMULATED else [f"-DEMOPT_ABI={_build.abi(CSRC)}"]
    folders = [library.parent, CSRC, CSRC / "rules", _TESTS / "cpp"]
    command = ["c++", "-std=c++20", "-shared", "-fPIC", *_build.COMPILE_ARGS["unix"], *stamp]
    command += [f"-I{folder}" for folder in folders]
    command += [f"-DEMOPT_CUDA={int(has_kernels)}", *arguments, str(source), "-o", str(library)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


def library_path(folder: Path, name: str) -> Path:
    return folder / f"{name}{sysconfig.get_config_var('SHLIB_SUFFIX') or '.so'}"


def load_copies(folder: Path) -> dict[str, Rule]:
    """Compile the package's rules under other names; return them by their usual names."""
    headers = []
    for path in sorted({_header_of(name) for name in oracle.ALL_RULES} - {None}):
        header = folder / f"copy_of_{path.name}"
        header.write_text(path.read_text().replace('kName = "', 'kName = "plugin_'))
        headers.append(header.name)
    # Not -O3, to save time; the bits do not depend on it.
    path = library_path(folder, "copies")
    structs = [struct_of(name) for name in oracle.ALL_RULES]
    compile_rules(headers, structs, path, "-O1", has_kernels=IS_EMULATED)
    assert native is not None
    for struct in structs:
        native._load_rule(str(path), struct)
    return {name: plugin_of(rule.implementation) for name, rule in oracle.ALL_RULES.items()}


def struct_of(name: str) -> str | None:
    """Return the struct of a rule, as its header names it; None if it has none."""
    header = _header_of(name)
    found = None if header is None else re.search(_NAMED.format(name), header.read_text())
    return None if found is None else found[1]


def _header_of(name: str) -> Path | None:
    headers = sorted((CSRC / "rules").glob("*.h"))
    return next((h for h in headers if re.search(_NAMED.format(name), h.read_text())), None)


_NAMED = r'struct (\w+)[ :\w]* {{\s*static constexpr const char\* kName = "{}";'


def plugin_of(rule: Rule) -> Rule:
    return Rule(f"plugin_{rule.name}", rule.formula, rule._check)


def as_row(plugin: Rule, row: oracle.Rule) -> oracle.Rule:
    """Return a row of the table of rules with a plug-in's function."""
    enter = plugin.entry_point()

    def function(*tensors: Any, out: Any = None, **case: Any) -> Any:
        values = row.complete(case)
        return enter(*tensors, *(values[name] for name in plugin.hyperparameter_names), out)

    return dataclasses.replace(row, function=function)
