"""Training in several processes: FSDP2, alone and with tensor parallelism; DDP; checkpoints."""

from pathlib import Path

import pytest
from processes import launch

from emerging_optimizers._native import native

needs_native = pytest.mark.skipif(native is None, reason="no native kernels")


@needs_native
@pytest.mark.parametrize(
    ("world_size", "kind"), [(2, "float32"), (4, "float32"), (2, "mixed precision"), (4, "2-D")]
)
def test_fsdp2(world_size: int, kind: str, tmp_path: Path) -> None:
    launch("train_sharded", world_size, tmp_path, kind)


@pytest.mark.parametrize("sharded_states", ["none", "ZeRO"])
def test_replicas(sharded_states: str, tmp_path: Path) -> None:
    launch("train_replicas", 2, tmp_path, sharded_states)


def test_checkpoints_of_other_world_sizes(tmp_path: Path) -> None:
    launch("save_checkpoints", 4, tmp_path)
    for world_size in (2, 1):
        launch("resume_checkpoints", world_size, tmp_path)


def test_functions_on_dtensors(tmp_path: Path) -> None:
    launch("dtensor_workers.update_dtensors", 2, tmp_path)
