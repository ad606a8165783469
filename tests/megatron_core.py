"""Megatron-Core with these optimizers in place of TransformerEngine's, in one or more processes.

Its distributed optimizer trains a small model whose full gradients are the same for any number of
processes, so all runs are bit-identical. Without a GPU, they run on the host.
"""

import contextlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from host_cuda import cuda_on_host
from optimizers import make_grads
from support import assert_equal_bits
from torch import Tensor, nn

from emerging_optimizers import megatron

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # such as the one about the missing TransformerEngine
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core import optimizer as core
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
    )
    from megatron.core.optimizer import distrib_optimizer, optimizer_config
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import MegatronModule

__all__ = ["HybridDeviceOptimizer"]

CONFIG = TransformerConfig(
    num_layers=1, hidden_size=8, num_attention_heads=1, bf16=True, params_dtype=torch.bfloat16
)
OPTIONS: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "clip_grad": 0.0}
# How parameters, masters and averages are stored, and the same options for our optimizer alone.
MODES: dict[str, dict[str, Any]] = {
    "masters by Megatron": {},
    "masters": {"use_precision_aware_optimizer": True, "store_param_remainders": False},
    "remainders": {
        "use_precision_aware_optimizer": True,
        "store_param_remainders": True,
        "exp_avg_dtype": torch.bfloat16,
    },
}
# Each shard has a scale, so results depend on the number of processes. Megatron-Core configures
# remainders by default; they do not apply.
FLOAT16_MASTERS: dict[str, dict[str, Any]] = {
    name: {
        "use_precision_aware_optimizer": True,
        "main_params_dtype": torch.float16,
        "store_param_remainders": store,
    }
    for name, store in (("by default", True), ("without remainders", False))
}
# The 8-bit states of a shard differ from those of the parameter: its groups are others.
CODES: dict[str, Any] = {
    "use_precision_aware_optimizer": True,
    "store_param_remainders": True,
    "exp_avg_dtype": torch.uint8,
    "exp_avg_sq_dtype": torch.uint8,
}
AVERAGES = ("exp_avg", "exp_avg_sq")


class Model(MegatronModule):
    """Parameters whose sizes are not divisible by any number of processes but 1."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(config=CONFIG)
        torch.manual_seed(0)
        self.ddp_config = DistributedDataParallelConfig()
        self.first = nn.Linear(23, 17, dtype=dtype)
        self.second = nn.Linear(17, 31, dtype=dtype)


@contextlib.contextmanager
def in_place_of_transformer_engine(cls: Any) -> Iterator[None]:
    """Let Megatron-Core use a class as TransformerEngine's ``FusedAdam``."""
    package, pytorch, optimizers = (
        ModuleType(f"transformer_engine{name}") for name in ("", ".pytorch", ".pytorch.optimizers")
    )
    optimizers.FusedAdam = cls  # type: ignore[attr-defined]
    is_new_enough = {"is_te_min_version": lambda *_, **__: True}
    with contextlib.ExitStack() as stack:
        for patch in (
            mock.patch.multiple(
                core, Adam=cls, CPUAdam=cls, USING_PYTORCH_OPTIMIZER=False, **is_new_enough
            ),
            mock.patch.multiple(optimizer_config, **is_new_enough),
            mock.patch.multiple(
                distrib_optimizer, Adam=cls, HAVE_APEX_OR_TE=True, USING_TE_OPTIMIZER=True
            ),
        ):
            stack.enter_context(patch)
        for module in (package, pytorch, optimizers):
            assert sys.modules.setdefault(module.__name__, module) is module
            stack.callback(sys.modules.pop, module.__name__)
        yield


def make_sharded(options: dict[str, Any]) -> tuple[Any, Any]:
    """Return a model and its distributed optimizer."""
    config = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    model = DistributedDataParallel(CONFIG, config, Model().cuda())
    settings = {"bf16": True, "use_distributed_optimizer": True, **OPTIONS, **options}
    return model, core.get_megatron_optimizer(core.OptimizerConfig(**settings), [model])


def make_plain(model: Any) -> Any:
    """Return an optimizer that is replicated on each process."""
    is_half = next(model.parameters()).dtype == torch.bfloat16
    return core.get_megatron_optimizer(core.OptimizerConfig(bf16=is_half, **OPTIONS), [model])


def train(model: Any, optimizer: Any, steps: Sequence[int]) -> None:
    params = list(model.parameters())
    for step in steps:
        optimizer.zero_grad()
        for param, grad in zip(params, recorded_grads(params, step), strict=True):
            if hasattr(param, "main_grad"):
                param.main_grad.copy_(grad)
            else:
                param.main_grad = grad
        assert optimizer.step()[0]


def recorded_grads(params: Sequence[Tensor], step: int) -> list[Tensor]:
    grads = make_grads([p.detach().float() for p in params], step)
    return [grad.to(p.device) for grad, p in zip(grads, params, strict=True)]


def reference(
    options: dict[str, Any], steps: Sequence[int], dtype: torch.dtype = torch.bfloat16
) -> list[Tensor]:
    """The parameters that one optimizer without Megatron yields."""
    params = [p.detach() for p in Model(dtype).parameters()]
    optimizer = megatron.FusedAdam(
        params,
        lr=0.01,
        weight_decay=0.1,
        master_weights=True,
        use_decoupled_grad=True,
        exp_avg_dtype=options.get("exp_avg_dtype", torch.float32),
        store_param_remainders=options.get("store_param_remainders", False),
        master_weight_dtype=options.get("main_params_dtype", torch.float32),
    )
    for step in steps:
        for param, grad in zip(params, recorded_grads(params, step), strict=True):
            param.decoupled_grad = grad  # type: ignore[attr-defined]
        optimizer.step()
    return params


def assert_trained(model: Any, options: dict[str, Any], steps: Sequence[int], label: str) -> None:
    params = [p.detach().cpu() for p in model.parameters()]
    for param, wanted in zip(params, reference(options, steps, params[0].dtype), strict=True):
        assert_equal_bits(param, wanted, label)


def steps_of(optimizer: Any) -> set[int]:
    return {group["step"] for group in optimizer.param_groups}


def averages(optimizer: Any) -> dict[str, list[Tensor]]:
    """The averages of all shards on this process, as numbers."""
    (chained,) = optimizer.chained_optimizers
    inner = chained.optimizer
    shards = [shard for group in inner.param_groups for shard in group["params"]]
    return {name: [inner.get_unscaled_state(s, name).cpu() for s in shards] for name in AVERAGES}


def sharded_state(model: Any, optimizer: Any, is_loading: bool, kind: str) -> dict[str, Any]:
    weights = model.sharded_state_dict()
    states = optimizer.sharded_state_dict(
        weights, is_loading=is_loading, metadata={"distrib_optim_sharding_type": kind}
    )
    return {"model": weights, "optimizer": states}


def write(model: Any, optimizer: Any, folder: Path, kind: str = "fully_reshardable") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    dist_checkpointing.save(sharded_state(model, optimizer, False, kind), str(folder))


def read(model: Any, optimizer: Any, folder: Path, kind: str = "fully_reshardable") -> None:
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    wanted = sharded_state(model, optimizer, True, kind)
    loaded = dist_checkpointing.load(wanted, str(folder))
    model.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])


def save(
    folder: Path,
    kind: str = "fully_reshardable",
    modes: dict[str, dict[str, Any]] = MODES,
) -> None:
    """Train three steps and save, in each mode."""
    for name, options in modes.items():
        model, optimizer = make_sharded(options)
        train(model, optimizer, [1, 2, 3])
        assert_trained(model, options, [1, 2, 3], name)
        assert steps_of(optimizer) == {3}
        write(model.module, optimizer, folder / name, kind)


def resume(
    folder: Path,
    kind: str = "fully_reshardable",
    modes: dict[str, dict[str, Any]] = MODES,
) -> None:
    """Load what any number of processes saved, and continue as without interruption."""
    for name, options in modes.items():
        model, optimizer = make_sharded(options)
        read(model.module, optimizer, folder / name, kind)
        assert_trained(model, options, [1, 2, 3], name)
        train(model, optimizer, [4, 5, 6])
        assert_trained(model, options, range(1, 7), name)
        assert steps_of(optimizer) == {6}


@contextlib.contextmanager
def in_megatron(on_host: bool) -> Iterator[None]:
    """Initialise a process of Megatron-Core with our optimizer, on the host or a GPU."""
    with contextlib.ExitStack() as stack:
        if on_host:
            stack.enter_context(cuda_on_host())
        stack.enter_context(in_place_of_transformer_engine(megatron.FusedAdam))
        parallel_state.initialize_model_parallel()
        stack.callback(parallel_state.destroy_model_parallel)
        yield


def resume_and_save(rank: int, folder: Path) -> None:
    """Continue from another number of processes, and save for yet another."""
    with in_megatron(on_host=True):
        resume(folder / "before")
        save(folder / "after")


def reshard_codes(rank: int, folder: Path) -> None:
    """Load 8-bit states from another number of processes, and save them."""
    with in_megatron(on_host=True):
        for kind in ("fully_reshardable", "dp_reshardable"):
            model, optimizer = make_sharded(CODES)
            read(model.module, optimizer, folder / "before" / kind, kind)
            write(model.module, optimizer, folder / "after" / kind, kind)
