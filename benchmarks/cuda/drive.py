"""Compare values of tuning.h's constants: which make the CUDA kernel fastest on this machine's GPU?

    python benchmarks/cuda/drive.py --output build/drive --seconds 300
    python benchmarks/cuda/drive.py --list

Compiles ``driver.cu`` with the shipped constants and as each variant, in parallel; then runs them
in turn, the shipped one first, last and in between. Each checks its results before it is timed. A
variant counts as better in a case only if its gain exceeds the spread of the shipped one's runs.
``drive.json`` in the output folder is written after each build and each run, so that an interrupted
run keeps its results. Needs Python, nvcc and a GPU, but neither torch nor numpy.

Exit status: 0; 1 if the shipped constants do not compile, give wrong results or cannot be timed;
130 or 143 if it was interrupted.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import programs
import report
from programs import ROOT
from variants import VARIANTS, Variant, select

_BETWEEN = 4  # variants between two runs of the shipped one
_PASSES = 3  # the most runs of a variant
_PART_FOR_BUILDS = 0.5  # of the time
_WRONG = 3  # the driver's exit status
# A driver hangs if it takes this many times as long as the shipped one, but at least this long.
_HANGS = 4
_SHORTEST_HANG = 30.0


def run_variant(
    variant: Variant, command: list[str], folder: Path, deadline: float
) -> dict[str, Any]:
    """Run the driver once, append its figures, and return its description of the device."""
    number = len(list(folder.glob("*.jsonl")))
    out = folder / f"{number:02}-{variant.name}.jsonl"
    err = out.with_suffix(".log")
    status = programs.run(command, deadline, out, err)
    lines = []
    for line in out.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # the last line of a driver that died
            lines.append(json.loads(line))
    variant.runs.append({line["name"]: line for line in lines if "name" in line})
    if status == 0:
        variant.status = "measured"
    elif status == _WRONG:
        faults = [f"{line['check']}, {line['wrong']}" for line in lines if line.get("wrong")]
        variant.status = f"wrong in {len(faults)} checks, first in {''.join(faults[:1])}"
    elif status is not None:
        last = err.read_text(errors="replace").strip().rpartition("\n")[2]
        how = f"exit status {status}" if status > 0 else signal.Signals(-status).name
        variant.status = f"failed with {how}: {last}"
    elif variant.status != "measured":
        variant.status = "stopped: it took too long"
    return next((line for line in lines if "device" in line), {})


class Session:
    """Builds and runs the variants, and keeps the results so far."""

    def __init__(self, arguments: argparse.Namespace, variants: list[Variant]) -> None:
        self.arguments = arguments
        self.begin = time.monotonic()
        self.deadline = self.begin + arguments.seconds
        self.output: Path = arguments.output
        self.shipped, self.others = variants[0], variants[1:]
        self.programs: dict[str, Path] = {}
        self.longest = 0.0  # seconds of a run
        self.report: dict[str, Any] = {"seconds": arguments.seconds, "finished": False}

    def write(self) -> None:
        """Replace drive.json."""
        self.report["spent"] = round(time.monotonic() - self.begin, 1)
        self.report["variants"] = [asdict(variant) for variant in (self.shipped, *self.others)]
        unfinished = self.output / "drive.json.tmp"
        text = json.dumps(self.report, indent=1) + "\n"
        unfinished.write_text(text.replace(f"{ROOT}{os.sep}", ""))
        unfinished.replace(self.output / "drive.json")

    def build(self) -> None:
        """Compile all variants, one per core at a time."""
        arguments = self.arguments
        command = programs.compiler(arguments.simulate, arguments.arch, arguments.csrc)
        self.report["command"] = list(command)
        machine = self.report["machine"] = programs.describe_machine(command[0])
        arguments.build.mkdir(parents=True, exist_ok=True)
        digest = programs.digest_of_sources(arguments.csrc, machine["compiler"])
        command.append(f"-DEMOPT_SOURCES={digest}")
        deadline = self.deadline
        if not arguments.build_only:  # keep time to measure
            deadline -= (1 - _PART_FOR_BUILDS) * arguments.seconds
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = {
                pool.submit(programs.compile_variant, v, command, arguments.build, deadline): v
                for v in (self.shipped, *self.others)
            }
            try:
                for job in as_completed(jobs):
                    self.programs[jobs[job].name] = job.result()
                    self.write()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                programs.stop_all()
                raise

    def run(self, variant: Variant) -> None:
        """Run a variant and print its status."""
        begin = time.monotonic()
        options = ["--smoke"] if self.arguments.simulate else []
        command = [str(self.programs[variant.name]), *options, *self.arguments.cases]
        deadline = self.deadline
        if variant is not self.shipped:
            longest = max(_SHORTEST_HANG, _HANGS * self.longest)
            deadline = min(deadline - 1.2 * self.longest, begin + longest)
        device = run_variant(variant, command, self.output / "runs", deadline)
        self.report.setdefault("device", device)
        seconds = time.monotonic() - begin
        if variant.status == "measured":
            self.longest = max(self.longest, seconds)
        print(f"drive: {variant.name}: {variant.status} ({seconds:.1f} s)", flush=True)
        self.write()

    def has_time(self) -> bool:
        """Whether there is time for a run and the final run of the shipped constants."""
        return bool(self.deadline - time.monotonic() > 2.4 * self.longest)

    def measure(self) -> None:
        """Run all in turn; then repeat the promising ones while there is time."""
        self.run(self.shipped)
        turns = [variant for variant in self.others if variant.status == "not run"]
        for _ in range(_PASSES):
            if self.shipped.status != "measured" or not turns or not self.has_time():
                break
            for i, variant in enumerate(turns):
                if i > 0 and i % _BETWEEN == 0 and self.has_time():
                    self.run(self.shipped)
                if self.has_time():
                    self.run(variant)
            self.run(self.shipped)
            turns = [v for v in self.others if report.is_promising(self.shipped, v)]
        self.report["finished"] = all(v.status != "not run" for v in self.others)
        self.write()


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, help="folder for drive.json and the runs' output")
    parser.add_argument("--seconds", type=float, default=300.0, help="time limit, including builds")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="variants to run")
    parser.add_argument("--also", nargs="+", default=[], metavar="NAME=MACRO=VALUE,MACRO=VALUE")
    parser.add_argument(
        "--cases", nargs="+", default=[], metavar="TEXT", help="texts in case names"
    )
    parser.add_argument("--list", action="store_true", help="list the variants and exit")
    parser.add_argument("--build-only", action="store_true", help="needs no GPU")
    parser.add_argument("--arch", metavar="sm_90", help="default: that of this machine's GPU")
    parser.add_argument("--simulate", action="store_true", help="on the host, with small tensors")
    parser.add_argument("--csrc", type=Path, default=ROOT / "csrc", help="sources to measure")
    folder = ROOT / "build" / "drive-programs"
    parser.add_argument(
        "--build", type=Path, default=folder, help="folder for programs, which are kept"
    )
    parsed = parser.parse_args(arguments)
    if parsed.output is None and not parsed.list:
        parser.error("the following arguments are required: --output")
    unknown = set(parsed.only or ()) - {variant.name for variant in VARIANTS}
    if unknown:
        parser.error(f"unknown variant {', '.join(sorted(unknown))}; see --list")
    return parsed


def main(arguments: list[str] | None = None) -> int:
    """Build, run and report."""
    parsed = parse_arguments(arguments)
    variants = select(parsed.csrc, parsed.only, parsed.also)
    if parsed.list:
        for variant in variants:
            macros = " ".join(f"{name}={value}" for name, value in variant.macros.items())
            print(f"{variant.name:<28}{variant.expected}\n{'':<28}{macros}".rstrip())
        return 0
    # SIGTERM as well: a shell's background jobs ignore SIGINT.
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, lambda number, _: sys.exit(128 + number))
    (parsed.output / "runs").mkdir(parents=True, exist_ok=True)
    session = Session(parsed, variants)
    shipped = session.shipped
    try:
        session.build()
        if not parsed.build_only and "error" not in shipped.build:
            session.measure()
    finally:
        programs.stop_all()
        session.write()
        print(report.text(shipped, session.others), flush=True)
    is_fine = "error" not in shipped.build if parsed.build_only else shipped.status == "measured"
    return 0 if is_fine else 1


if __name__ == "__main__":
    sys.exit(main())
