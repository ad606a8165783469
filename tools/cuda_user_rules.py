"""Compiles the kernels of rules written in Python, with NVRTC, for `cuda_check`."""

import importlib
import itertools
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from cuda_sources import Sources

from emerging_optimizers._build_cache import BuildError
from emerging_optimizers._user_rules.cuda_compiler import compile_by_nvrtc
from emerging_optimizers._user_rules.cuda_kernels import (
    Kernel,
    kernel_options,
    kernels_of,
)

# Of examples/rules: with two formulas, one of which leaves weights as they are; with four states;
# with a scalar state.
USER_RULES = ("adopt", "adan", "nadam")
MAX_SECONDS = 4  # for a kernel
_EXAMPLES = Path(__file__).parent.parent / "examples" / "rules"


class Unit(NamedTuple):
    """One kernel, compiled for one architecture.

    Attributes:
        architecture: Such as "sm_90".
        report: The report of ptxas.
        ptx: The code that ptxas assembled.
        cubin: The path of the machine code.
        seconds: The time that it took.
    """

    architecture: str
    report: str
    ptx: str
    cubin: Path
    seconds: float


def compile_user_rules(
    sources: Sources, rules: Sequence[str], out: Path, architectures: Sequence[str]
) -> list[Unit]:
    """Compile the kernels for small launches; those for large ones have the same code."""
    jobs = [
        (text, kernel, architecture)
        for text, kernels in _texts(sources, rules, out)
        for kernel, architecture in itertools.product(kernels, architectures)
        if not kernel.is_large
    ]

    def compile_one(job: tuple[Path, Kernel, str]) -> Unit:
        text, kernel, architecture = job
        options = kernel_options(text.stem, kernel, int(architecture.removeprefix("sm_")))
        options += ["-lineinfo", "--ptxas-options=-v"]
        done = compile_by_nvrtc(text, options, sources.csrc)
        cubin = out / f"{kernel.symbol(text.stem)}.{architecture}.cubin"
        cubin.write_bytes(done.cubin)
        return Unit(architecture, done.log, done.ptx, cubin, done.seconds)

    try:
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(compile_one, jobs))
    except BuildError as error:
        sys.exit(f"cuda-check: {error.reason}; `make cuda-check` installs it")
    except subprocess.CalledProcessError as error:
        sys.exit(f"cuda-check: does not compile\n{error.output.decode()}")


def _texts(
    sources: Sources, rules: Sequence[str], out: Path
) -> Iterator[tuple[Path, list[Kernel]]]:
    """Write the C++ texts of rules, and expect their kernels.

    Yields:
        The text's path, and the rule's kernels.
    """
    sys.path.insert(0, str(_EXAMPLES))
    for name in rules:
        rule = getattr(importlib.import_module(name), name)
        codes, has_scalars = [code for code in rule.codes if code], bool(rule.scalar_states)
        sources.add_user_rule(name, len(rule.states), len(codes), has_scalars)
        text = out / f"{name}.cpp"
        text.write_text(rule.source)
        yield text, kernels_of(has_codes=bool(codes), has_scalars=has_scalars)
