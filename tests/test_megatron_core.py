"""The optimizers in a released Megatron-Core.

Without a GPU, Megatron-Core's CUDA code runs on the host (host_cuda.py): it creates scalars and
buffers on ``"cuda"``, uses streams, and accepts only parameters of CUDA types. On a machine with a
GPU, the tests marked `real` do the same on it, in one process with NCCL.
"""

import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import launch
from support import assert_equal_bits

from emerging_optimizers.megatron import FusedAdam

# Raised by Megatron-Core, and by the parts of PyTorch that it uses.
pytestmark = pytest.mark.filterwarnings("ignore")

where = pytest.mark.parametrize(
    "device",
    ["host", pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.real])],
    indirect=True,
)


@pytest.fixture(scope="module", autouse=True)
def _megatron() -> None:
    """Skip if it is not installed; in CI, fail."""
    if not os.environ.get("CI"):
        pytest.importorskip("megatron.core")


@pytest.fixture
def core() -> Any:
    return importlib.import_module("megatron_core")


@pytest.fixture
def device(request: pytest.FixtureRequest, core: Any, tmp_path: Path) -> Iterator[str]:
    """Initialise Megatron-Core with one process on this device."""
    is_host = request.param == "host"
    torch.distributed.init_process_group(
        "gloo" if is_host else "nccl",
        init_method=f"file://{tmp_path / 'store'}",
        rank=0,
        world_size=1,
    )
    try:
        with core.in_megatron(on_host=is_host):
            yield "cpu" if is_host else "cuda"
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@where
def test_replicated(core: Any, dtype: torch.dtype, device: str) -> None:
    """Replicated optimizers; with bfloat16 parameters, Megatron keeps the masters."""
    model = core.Model(dtype).to(device)
    optimizer = core.make_plain(model)
    for inner in optimizer.chained_optimizers:
        assert type(inner.optimizer) is FusedAdam
    core.train(model, optimizer, [1, 2, 3])
    core.assert_trained(model, {}, [1, 2, 3], "trained")
    assert core.steps_of(optimizer) == {3}


@where
def test_replicated_checkpoints(core: Any, device: str, tmp_path: Path) -> None:
    """Megatron creates states without gradients, and saves one step for all of them."""
    for dtype in (torch.float32, torch.bfloat16):
        folder = tmp_path / str(dtype)
        folder.mkdir()
        model, other = core.Model(dtype).to(device), core.Model(dtype).to(device)
        optimizer, resumed = core.make_plain(model), core.make_plain(other)
        core.train(model, optimizer, [1, 2, 3])
        core.write(model, optimizer, folder)
        core.read(other, resumed, folder)
        core.assert_trained(other, {}, [1, 2, 3], "loaded")
        core.train(other, resumed, [4, 5])
        core.assert_trained(other, {}, range(1, 6), "resumed")
        assert core.steps_of(resumed) == {5}


@where
def test_offloaded(core: Any, device: str) -> None:
    """Megatron's hybrid optimizer keeps some states on the CPU."""
    options = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5}
    model, optimizer = core.make_sharded(options)
    hybrid = optimizer.chained_optimizers[0].optimizer
    assert type(hybrid) is core.HybridDeviceOptimizer
    assert {type(inner) for inner in hybrid.sub_optimizers} == {FusedAdam}
    assert hybrid.gpu_optimizer is not None
    assert hybrid.cpu_optimizers
    core.train(model, optimizer, [1, 2, 3])
    core.assert_trained(model, {}, [1, 2, 3], "trained")


@pytest.mark.parametrize("overlap", [False, True])
@where
def test_hybrid_device_optimizer(core: Any, overlap: bool, device: str) -> None:
    model = core.Model().to(device)
    params = list(model.parameters())
    optimizer = core.HybridDeviceOptimizer(
        params,
        offload_fraction=0.5,
        cpu_optimizer_cls=FusedAdam,
        gpu_optimizer_cls=FusedAdam,
        param_update_in_fp32=True,
        overlap_cpu_optimizer_d2h_h2d=overlap,
        lr=0.01,
        weight_decay=0.1,
        bias_correction=True,
        fused=True,
    )
    for step in (1, 2, 3):
        for param, grad in zip(params, core.recorded_grads(params, step), strict=True):
            param.decoupled_grad = grad
        optimizer.step()
    for param, wanted in zip(params, core.reference({}, [1, 2, 3]), strict=True):
        assert_equal_bits(param.detach().cpu(), wanted, "parameter")
    for state in optimizer.state.values():
        assert state["step"].item() == 3


@pytest.mark.parametrize("modes", ["MODES", "FLOAT16_MASTERS"])
@pytest.mark.parametrize(
    "kind",
    # Megatron-Core 0.16 no longer supports "fully_sharded_model_space": its tensors raise an error.
    ["fully_reshardable", "dp_reshardable", "dp_zero_gather_scatter"],
)
@where
def test_distributed_optimizer(
    core: Any, kind: str, modes: str, device: str, tmp_path: Path
) -> None:
    """With each checkpoint format; another test below reshards."""
    core.save(tmp_path, kind, getattr(core, modes))
    core.resume(tmp_path, kind, getattr(core, modes))


@where
def test_without_transformer_engine(
    core: Any, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Megatron then reads a step from each state, even before it loads, so states must have one."""
    for name in ("HAVE_APEX_OR_TE", "USING_TE_OPTIMIZER"):
        monkeypatch.setattr(core.distrib_optimizer, name, False)
    for kind in ("fully_reshardable", "dp_reshardable"):
        model, optimizer = core.make_sharded({})
        other, resumed = core.make_sharded({})
        core.train(model, optimizer, [1, 2, 3])
        core.train(other, resumed, [1])
        core.write(model.module, optimizer, tmp_path / kind, kind)
        core.read(other.module, resumed, tmp_path / kind, kind)
        core.train(other, resumed, [4, 5])
        core.assert_trained(other, {}, range(1, 6), kind)


@where
def test_moved_to_the_cpu_and_back(core: Any, device: str) -> None:
    """With Megatron's masters. (Moving would detach shards, which are views, from their buffer.)"""
    model, optimizer = core.make_sharded({})
    core.train(model, optimizer, [1, 2])
    optimizer.offload_to_cpu()
    optimizer.restore_from_cpu()
    core.train(model, optimizer, [3])
    core.assert_trained(model, {}, [1, 2, 3], "trained")


@pytest.mark.parametrize("device", ["host"], indirect=True)
def test_resharded_checkpoints(core: Any, device: str, tmp_path: Path) -> None:
    """One process saves; three continue over gloo, with odd boundaries, and save; one continues."""
    core.save(tmp_path / "before")
    launch("megatron_core.resume_and_save", 3, tmp_path)
    core.resume(tmp_path / "after")
