"""Runs an example for several processes in those of `processes.launch`."""

import runpy
import sys
from contextlib import redirect_stdout
from pathlib import Path
from unittest import mock

import torch.distributed as dist

_EXAMPLES = Path(__file__).parent.parent / "examples"


def run_example(rank: int, folder: Path, script: str, *arguments: str) -> None:
    """Run an example script; its output goes to the file `printed` in the folder."""
    sys.path.insert(0, str(_EXAMPLES))
    sys.argv = [script, *arguments]
    joined = {"init_process_group": lambda _: None, "destroy_process_group": lambda: None}
    with (
        mock.patch.multiple(dist, **joined),
        (folder / "printed").open("a") as file,  # from all processes: only one prints
        redirect_stdout(file),
    ):
        try:
            runpy.run_path(str(_EXAMPLES / script), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
