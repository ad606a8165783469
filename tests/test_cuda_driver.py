"""The driver that compares tuning constants of the CUDA kernel, without a GPU.

One test compiles the driver for the host; the others use a fake compiler that writes a script with
a driver's output.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
DRIVE = ROOT / "benchmarks" / "cuda" / "drive.py"

# Its "programs" take 1 and 1.02 us in turn, or EMOPT_MICROSECONDS, and then run EMOPT_THEN.
COMPILER = r"""#!/bin/sh
time='1.0$(($(wc -l < "$0.runs") % 2 * 2))'
for word in "$@"; do
    case $word in
    --version) echo 'fake 1.2.3'; exit;;
    -DEMOPT_BROKEN=*) echo "driver.cu(3): error: no such thing" >&2; exit 2;;
    -DEMOPT_MICROSECONDS=*) time=${word#*=};;
    -DEMOPT_THEN=*) then=${word#*=};;
    esac
    program=$word
done
cat >&2 <<END
ptxas : Compiling entry function '5sweepINS0_6LaunchINS_4AdamENS_11ApplyUpdateEfLm4096ELb0EEELb1EE'
    0 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 77 registers
END
cat > "$program" <<END
#!/bin/sh
echo run >> "\$0.runs"
echo '{"device": "fake"}'
echo '{"name": "apply/float32/64M", "bytes": 4000, "part_of_copy": 0.5, "seconds":' ${time}e-6}
echo '{"name": "apply/float32/1000x8", "skipped": "takes too much"}'
$then
END
chmod +x "$program"
"""


def drive(output: Path, *arguments: str, wanted: int = 0, **variables: str) -> str:
    """Run drive.py; return its output."""
    done = subprocess.run(
        [sys.executable, str(DRIVE), "--output", str(output), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | variables,
        timeout=120,
    )
    assert done.returncode == wanted, done.stdout + done.stderr
    return done.stdout


def variants_of(output: Path) -> dict[str, dict[str, Any]]:
    report = json.loads((output / "drive.json").read_text())
    return {variant["name"]: variant for variant in report["variants"]}


@pytest.fixture
def fake(tmp_path: Path) -> dict[str, str]:
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    return {"CXX": str(compiler)}


@pytest.fixture
def simulated(tmp_path: Path) -> list[str]:
    return ["--simulate", "--build", str(tmp_path / "build")]


def test_the_driver_itself(tmp_path: Path, simulated: list[str]) -> None:
    cases = ["apply/float32/1M", "16/64M", "1000x8", "gpt2/counters", "odd", "apart"]
    drive(tmp_path, *simulated, "--only", "--cases", *cases)
    shipped = variants_of(tmp_path)["shipped"]
    assert shipped["status"] == "measured"
    log = tmp_path / "runs" / "00-shipped.jsonl"
    checks = [line for line in map(json.loads, log.read_text().splitlines()) if "check" in line]
    assert {line["wrong"] for line in checks} == {""}
    assert len(checks) == 9 * 3 + 6 * 2  # mixes of dtypes and locations of numbers, by epilogue
    lines = shipped["runs"][0]
    assert {"copy/kernel", "copy/driver", "nothing", "apply/float32/64M/apart"} <= lines.keys()
    assert {"apply/float32/gpt2/counters", "store/float16/64M"} <= lines.keys()
    assert "apply/master/1M" not in lines
    line = lines["apply/bfloat16/64M"]
    assert line["bytes"] == 3000 * 14  # four are read, three are written
    assert 0 < line["min"] <= line["seconds"] <= line["max"]
    rate = line["bytes"] / line["seconds"] * 1e-9
    assert line["gigabytes_per_second"] == pytest.approx(rate, abs=0.1)

    (program,) = (path for path in (tmp_path / "build").iterdir() if not path.suffix)
    fault = {"EMOPT_DROP_LAST_BLOCK": "1"}
    done = subprocess.run([program, "--smoke"], stdout=subprocess.PIPE, env=os.environ | fault)
    assert done.returncode == 3
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(line["wrong"] for line in lines if "check" in line)
    assert not any("name" in line for line in lines)  # nothing was timed


def test_differences_within_the_spread_do_not_count(
    tmp_path: Path, simulated: list[str], fake: Mapping[str, str]
) -> None:
    also = [
        f"{name}=EMOPT_MICROSECONDS={time}"
        for name, time in {"much": "0.90", "little": "1.01", "slow": "1.20"}.items()
    ]
    also += ["broken=EMOPT_BROKEN=1", "dies=EMOPT_THEN=kill -9 $$", "fails=EMOPT_THEN=exit 2"]
    text = drive(tmp_path, *simulated, "--only", "--also", *also, **fake)
    variants = variants_of(tmp_path)
    assert len(variants["much"]["runs"]) == 3  # again, because it is better
    assert len(variants["little"]["runs"]) == len(variants["slow"]["runs"]) == 1
    assert len(variants["shipped"]["runs"]) == 5
    assert variants["shipped"]["build"]["kernels"] == [
        {"kernel": "apply float32 4096 device", "registers": 77, "spilled": 12}
    ]
    rows = {row.split()[0]: row.split()[1:] for row in text.rpartition("mean gain")[2].splitlines()}
    assert rows["much"] == ["1", "0", "+13.3%"]  # with a median of 1.02
    assert rows["little"] == ["0", "0", "+1.0%"]
    assert rows["slow"] == ["0", "1", "-15.0%"]
    assert rows["better"][:2] == ["with", "much:"]
    assert variants["broken"]["status"] == "does not compile"
    assert "broken                      does not compile: driver.cu(3): error: no such" in text
    assert variants["dies"]["status"].startswith("failed with SIGKILL")
    assert variants["fails"]["status"].startswith("failed with exit status 2")


def test_the_time_limit_is_kept(
    tmp_path: Path, simulated: list[str], fake: Mapping[str, str]
) -> None:
    """A variant that hangs is stopped early enough for the last run of the shipped constants."""
    begin = time.monotonic()
    also = ["hangs=EMOPT_THEN=sleep 60", "later=EMOPT_MICROSECONDS=2"]
    text = drive(tmp_path, *simulated, "--seconds", "3", "--only", "--also", *also, **fake)
    assert time.monotonic() - begin < 5
    variants = variants_of(tmp_path)
    assert variants["hangs"]["status"] == "stopped: it took too long"
    assert variants["later"]["status"] == "not run"
    assert len(variants["shipped"]["runs"]) == 2
    assert "later                       not run" in text
    assert not json.loads((tmp_path / "drive.json").read_text())["finished"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_killed_run_keeps_its_results(
    tmp_path: Path, simulated: list[str], fake: Mapping[str, str], number: int
) -> None:
    command = [sys.executable, str(DRIVE), "--output", str(tmp_path), *simulated]
    command += ["--only", "--also", "hangs=EMOPT_THEN=echo $$ > $0.pid; exec sleep 60"]
    environment = os.environ | fake
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 20
            while not (pids := [p for p in tmp_path.glob("build/*.pid") if p.read_text()]):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            process.send_signal(number)
            text, _ = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    shipped = variants_of(tmp_path)["shipped"]
    assert shipped["status"] == "measured"
    assert shipped["runs"][0]["apply/float32/64M"]["bytes"] == 4000
    sleeping = int(pids[0].read_text())
    if number == signal.SIGKILL:
        os.kill(sleeping, signal.SIGKILL)
    else:
        assert "apply/float32/64M" in text
        with pytest.raises(ProcessLookupError):
            os.kill(sleeping, 0)


def test_programs_are_kept(tmp_path: Path, simulated: list[str], fake: Mapping[str, str]) -> None:
    for _ in range(2):
        drive(tmp_path, *simulated, "--build-only", "--only", **fake)
        assert variants_of(tmp_path)["shipped"]["build"]["kernels"][0]["registers"] == 77
    (program,) = (path for path in (tmp_path / "build").iterdir() if not path.suffix)
    csrc = tmp_path / "csrc"
    tuning = csrc / "engine" / "cuda" / "tuning.h"
    tuning.parent.mkdir(parents=True)
    tuning.write_text("#ifndef EMOPT_HELD\n#define EMOPT_HELD 8\n#endif\n")
    drive(tmp_path, *simulated, "--csrc", str(csrc), "--build-only", "--only", **fake)
    assert len([path for path in program.parent.iterdir() if not path.suffix]) == 2


def test_the_shipped_constants_must_be_right(
    tmp_path: Path, simulated: list[str], fake: Mapping[str, str]
) -> None:
    compiler = Path(fake["CXX"])
    check = """echo '{"check": "a/b", "wrong": "element 3"}'; exit 3"""
    compiler.write_text(COMPILER.replace("\n$then\n", f"\n{check}\n"))
    text = drive(tmp_path, *simulated, wanted=1, **fake)
    assert variants_of(tmp_path)["shipped"]["status"].endswith("a/b, element 3")
    assert text.splitlines()[-1] == "shipped: wrong in 1 checks, first in a/b, element 3"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    elsewhere = ["--build", str(tmp_path / "build" / "other")]
    drive(tmp_path, "--simulate", *elsewhere, "--build-only", "--only", wanted=1, **fake)


def test_compiler_options_and_duplicates(tmp_path: Path, fake: Mapping[str, str]) -> None:
    """Compiles for this machine's GPU only, and leaves out variants equal to an earlier one."""
    folder = tmp_path / "bin"
    folder.mkdir()
    Path(fake["CXX"]).rename(folder / "nvcc")
    smi = folder / "nvidia-smi"
    smi.write_text("#!/bin/sh\ncase $1 in *compute_cap) echo 9.0;; *) echo GPU, 580;; esac\n")
    smi.chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    arguments = ["--build-only", "--build", str(tmp_path / "build"), "--only", "streaming"]
    same = ["--also", "same=EMOPT_STREAMING=1", "same-as-shipped=EMOPT_HELD=4"]
    drive(tmp_path, *arguments, *same, CUDA_HOME=str(tmp_path), PATH=path)
    report = json.loads((tmp_path / "drive.json").read_text())
    assert {"-arch=sm_90", "-O3", "--fmad=false", "-Xptxas=-v"} <= set(report["command"])
    assert report["machine"] == {"gpu": "GPU, 580", "compiler": "nvcc: fake 1.2.3"}
    assert list(variants_of(tmp_path)) == ["shipped", "streaming"]


def test_the_command_line(tmp_path: Path) -> None:
    assert "EMOPT_HELD=8 EMOPT_BLOCKS=2" in drive(tmp_path, "--list")
    assert not list(tmp_path.iterdir())
    drive(tmp_path, "--only", "no-such", wanted=2)
