"""8-bit states of DTensors: FSDP2, other placements, and checkpoints."""

from pathlib import Path

import pytest
from processes import launch

from emerging_optimizers._native import native

pytestmark = pytest.mark.builtin_rules("their states are codes")
needs_native = pytest.mark.skipif(native is None, reason="there are no native kernels")


@pytest.mark.parametrize("world_size", [2, 4])
def test_fsdp2(world_size: int, tmp_path: Path) -> None:
    launch("coded_workers.train_sharded", world_size, tmp_path)


@needs_native
def test_other_placements(tmp_path: Path) -> None:
    launch("coded_workers.place_otherwise", 2, tmp_path)


@needs_native
def test_blocks(tmp_path: Path) -> None:
    launch("coded_workers.place_blocks", 4, tmp_path)


def test_checkpoints_of_other_world_sizes(tmp_path: Path) -> None:
    launch("coded_workers.save_checkpoints", 4, tmp_path)
    for world_size in (2, 1):
        launch("coded_workers.resume_checkpoints", world_size, tmp_path)


@pytest.mark.parametrize("world_size", [2, 4])
def test_full_state_dicts(world_size: int, tmp_path: Path) -> None:
    launch("coded_workers.full_state_dicts", world_size, tmp_path)
