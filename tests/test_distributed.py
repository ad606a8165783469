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


def test_optimizers_on_dtensors(tmp_path: Path) -> None:
    launch("dtensor_workers.step_dtensors", 2, tmp_path)


# Which process is killed, and when.
MOMENTS = {
    "before its first tensor": 1,
    "amid its tensors": 1,
    "before the metadata": 0,
    "before the metadata has its name": 0,
}


def test_killed_while_saving(tmp_path: Path) -> None:
    for moment, rank in MOMENTS.items():
        folder = tmp_path / moment
        launch("fault_workers.save_and_be_killed", 2, folder, moment, str(rank), killed=rank)
    launch("fault_workers.resume_after_kills", 2, tmp_path)


@pytest.mark.parametrize(
    "worker",
    ["without_parameters", "without_gradients", "nan_on_one", "other_orders", "other_keys"],
)
def test_faults(worker: str, tmp_path: Path) -> None:
    launch(f"fault_workers.{worker}", 2, tmp_path, timeout=100)
