"""Fresh interpreters, forked from one that has imported torch and nothing else.

Importing torch takes two seconds, longer than most code that tests run in an interpreter.
"""

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

_TIMEOUT = 300


@functools.cache
def _server() -> "subprocess.Popen[str]":
    """Start the interpreter that the others are forked from. It ends with this process."""
    server = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(server.communicate)
    return server


def run(
    code: str, folder: Path, path: str, environment: Mapping[str, str]
) -> "subprocess.CompletedProcess[str]":
    """Run code as ``python -c`` does in a folder, with this PYTHONPATH and environment.

    Of the variables that Python reads at its start, only PYTHONWARNINGS has an effect.
    """
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as scratch:
        outputs = [Path(scratch, name) for name in ("stdout", "stderr")]
        request = {
            "code": code,
            "folder": str(folder),
            "path": path.split(os.pathsep),
            "environment": {**environment, "PYTHONPATH": path},
            "outputs": [str(output) for output in outputs],
        }
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        written = (output.read_text() for output in outputs)
        return subprocess.CompletedProcess(["python", "-c", code], status, *written)


def _serve() -> str:
    """Fork a process for each request; in that process, return the code to run."""
    import signal
    import warnings

    import torch  # noqa: F401

    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    for line in sys.stdin:
        pid = os.fork()
        if pid:
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            print(status, flush=True)
            continue
        request = json.loads(line)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for stream, output in enumerate(request["outputs"], start=1):
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), stream)
        signal.alarm(_TIMEOUT)
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        if "PYTHONWARNINGS" in os.environ:
            warnings.simplefilter(os.environ["PYTHONWARNINGS"])  # type: ignore[arg-type]
        others = [entry for entry in sys.path[1:] if entry not in inherited]
        sys.path[:] = ["", *request["path"], *others]
        sys.argv = ["-c"]
        return str(request["code"])
    sys.exit()


if __name__ == "__main__":
    code = _serve()
    exec(code, {"__name__": "__main__"})
