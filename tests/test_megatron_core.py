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

every_kind = pytest.mark.parametrize(
    "kind",
    # Megatron-Core 0.16 no longer supports "fully_sharded_model_space": its tensors raise an error.
    ["fully_reshardable", "dp_reshardable", "dp_zero_gather_scatter"],
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
@every_kind
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


# ---- 8-bit states --------------------------------------------------------------------------------


@every_kind
@where
def test_8bit_states_continue_with_the_same_bits(
    core: Any, kind: str, device: str, tmp_path: Path
) -> None:
    """In a new optimizer, for which Megatron allocates states, and in one that has trained."""
    expected_model, expected = core.make_sharded(core.CODES)
    core.train(expected_model, expected, range(1, 7))
    model, optimizer = core.make_sharded(core.CODES)
    core.train(model, optimizer, [1, 2, 3])
    core.write(model.module, optimizer, tmp_path / kind, kind)
    for steps in ([], [1]):
        other, resumed = core.make_sharded(core.CODES)
        core.train(other, resumed, steps)
        core.read(other.module, resumed, tmp_path / kind, kind)
        core.train(other, resumed, [4, 5, 6])
        assert core.steps_of(resumed) == {6}
        for param, wanted in zip(other.parameters(), expected_model.parameters(), strict=True):
            assert_equal_bits(param.detach(), wanted.detach(), "parameter")
        assert_same_averages(core, resumed, expected)


def assert_same_averages(core: Any, optimizer: Any, expected: Any) -> None:
    found, wanted = core.averages(optimizer), core.averages(expected)
    for name in core.AVERAGES:
        for average, other in zip(found[name], wanted[name], strict=True):
            assert_equal_bits(average, other, name)


def assert_close_averages(core: Any, optimizer: Any, expected: Any, limit: float) -> None:
    found, wanted = core.averages(optimizer), core.averages(expected)
    for name in core.AVERAGES:
        for average, other in zip(found[name], wanted[name], strict=True):
            smallest = other.abs().max() / 57_344
            assert ((average - other).abs() <= limit * other.abs() + smallest).all(), name


@every_kind
@where
def test_8bit_states_are_saved_as_numbers(
    core: Any, kind: str, device: str, tmp_path: Path
) -> None:
    """So checkpoints load with float32 states, and those with float32 states load as 8-bit."""
    wide = {**core.CODES, "exp_avg_dtype": torch.float32, "exp_avg_sq_dtype": torch.float32}
    made = {}
    for label, options in (("codes", core.CODES), ("wide", wide)):
        model, made[label] = core.make_sharded(options)
        core.train(model, made[label], [1, 2, 3])
        core.write(model.module, made[label], tmp_path / label, kind)
    model, from_codes = core.make_sharded(wide)
    core.read(model.module, from_codes, tmp_path / "codes", kind)
    assert_same_averages(core, from_codes, made["codes"])
    model, from_wide = core.make_sharded(core.CODES)
    core.read(model.module, from_wide, tmp_path / "wide", kind)
    assert_close_averages(core, from_wide, made["wide"], 1 / 16)
    core.train(model, from_wide, [4])


@pytest.mark.parametrize("device", ["host"], indirect=True)
def test_resharded_8bit_states(core: Any, device: str, tmp_path: Path) -> None:
    """From one process to three, whose shards have other groups, and back: rounded twice."""
    model, optimizer = core.make_sharded(core.CODES)
    core.train(model, optimizer, [1, 2, 3])
    kinds = ("fully_reshardable", "dp_reshardable")
    for kind in kinds:
        core.write(model.module, optimizer, tmp_path / "before" / kind, kind)
    launch("megatron_core.reshard_codes", 3, tmp_path)
    for kind in kinds:
        other, resumed = core.make_sharded(core.CODES)
        core.read(other.module, resumed, tmp_path / "after" / kind, kind)
        assert_close_averages(core, resumed, optimizer, 1 / 8)
        for param, wanted in zip(other.parameters(), model.parameters(), strict=True):
            assert_equal_bits(param.detach(), wanted.detach(), "parameter")
        core.train(other, resumed, [4])
        assert core.steps_of(resumed) == {4}
