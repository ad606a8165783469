"""A process that compiles a rule's library, while another one trains.

It is a script, which gets the library's description as JSON on its standard input, and writes what
came of it to its standard output. It finishes the library for the next process if the one that
trains ends before it does. It does not import torch, which would take seconds.
"""

import importlib
import json
import os
import sys
import types
from pathlib import Path
from typing import Any


def _import_without_torch(name: str) -> Any:
    """Import a module of this package. The packages that it is in import torch."""
    rules = Path(__file__).parent
    package = rules.parent.name
    for full_name, folder in ((package, rules.parent), (f"{package}.{rules.name}", rules)):
        module = types.ModuleType(full_name)
        module.__path__ = [str(folder)]
        sys.modules.setdefault(full_name, module)
    return importlib.import_module(f"{package}.{name}")


def _build(folder: str, name: str, source: str, options: list[str]) -> dict[str, Any]:
    build_cache = _import_without_torch("_build_cache")
    library = _import_without_torch("_user_rules.library")
    product = library.RuleLibrary(Path(folder), name, source, options)
    try:
        return {"library": str(build_cache.load_once(product)), "seconds": product.seconds}
    except build_cache.BuildError as error:
        return {"reason": error.reason, "remedy": error.remedy}


def main() -> None:
    """Build one library."""
    del os.environ["EMERGING_OPTIMIZERS_JIT"]  # see background.py
    if hasattr(os, "nice"):
        os.nice(10)  # the other process needs the cores
    outcome = _build(**json.load(sys.stdin))
    json.dump(outcome, sys.stdout)


if __name__ == "__main__":
    main()
