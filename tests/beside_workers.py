"""What interpreters do that find this package first, then NVIDIA's (test_beside_nvidia.py).

Nothing is imported before a function is called. Each function prints its result as JSON.
"""

import importlib
import importlib.util
import json
import pickle
import pkgutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def locate(names: list[str]) -> None:
    """Print where modules of these names come from, and what the package says of itself."""
    package: Any = importlib.import_module("emerging_optimizers")
    walked = [
        found.name for found in pkgutil.walk_packages(package.__path__, "emerging_optimizers.")
    ]
    modules = {name: importlib.import_module(f"emerging_optimizers.{name}") for name in names}
    registry: Any = importlib.import_module("emerging_optimizers.registry")
    names_of_optimizers = registry.get_optimizer_name_list()
    classes = [registry.get_optimizer_cls(name) for name in names_of_optimizers]
    assert [pickle.loads(pickle.dumps(cls)) for cls in classes] == classes
    seen = {
        "path": list(package.__path__),
        "version": package.__version__,
        "files": {name: module.__file__ for name, module in modules.items()},
        "walked": walked,
        "names": names_of_optimizers,
        "described": [
            getattr(package, name, None)
            for name in ("__shortversion__", "__package_name__", "__nothing__", "nothing")
        ],
    }
    print(json.dumps(seen))


def make_problem() -> tuple[nn.Module, Tensor, Tensor]:
    """Return a small network, inputs and targets."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    inputs = torch.randn(64, 8)
    return model, inputs, torch.sin(inputs @ torch.randn(8, 4))


def train_with_muon() -> None:
    """Train matrices with NVIDIA's Muon, the rest with this package's AdamW; print the losses."""
    importlib.import_module("emerging_optimizers.orthogonalized_optimizers")
    registry: Any = importlib.import_module("emerging_optimizers.registry")
    model, inputs, targets = make_problem()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    muon = registry.get_configured_optimizer_cls("Muon", lr=0.02, use_nesterov=True)(matrices)
    # Raises without native kernels.
    adamw = registry.get_configured_optimizer_cls("AdamW", lr=0.02, fused=True)(others)
    losses = []
    for _ in range(60):
        loss = (model(inputs) - targets).square().mean()
        losses.append(loss.item())
        model.zero_grad()
        loss.backward()
        muon.step()
        adamw.step()
    states = [
        sorted(optimizer.state[p]) for optimizer, p in ((muon, matrices[0]), (adamw, others[0]))
    ]
    print(json.dumps({"losses": losses, "states": states, "modules": [type(muon).__module__]}))


def step_with_soap(name: str, reference: str) -> None:
    """Step with NVIDIA's SOAP; print the parameters with this package's function, and with theirs.

    Args:
        name: The module that has it.
        reference: The file of NVIDIA's `calculate_adam_update`.
    """
    spec: Any = importlib.util.spec_from_file_location("reference", reference)
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    soap: Any = importlib.import_module(f"emerging_optimizers.{name}")
    stepped = []
    for functions in (soap.update_functions, theirs):
        soap.update_functions = functions
        model, inputs, targets = make_problem()
        matrices = [p for p in model.parameters() if p.ndim == 2]
        (model(inputs) - targets).square().mean().backward()
        soap.SOAP(matrices, lr=0.01).step()
        stepped.append([functions.__file__, [p.tolist() for p in matrices]])
    print(json.dumps(stepped))


def import_as_megatron() -> None:
    """Import what newer versions of Megatron-Core import, and make the table that they make."""
    text = """
from inspect import signature

import emerging_optimizers
from emerging_optimizers import registry, utils as eopt_utils
from emerging_optimizers.orthogonalized_optimizers import (
    AdaptiveMuon, OrthogonalizedOptimizer, get_muon_scale_factor,
)
from emerging_optimizers.orthogonalized_optimizers.muon_utils import NSCoeffT, newton_schulz_tp
from emerging_optimizers.scalar_optimizers import Lion
from emerging_optimizers.soap import SOAP
from emerging_optimizers.triton_kernels import HAS_TRITON_340
from packaging.version import Version
"""
    found: dict[str, Any] = {}
    exec(text, found)
    registry = found["registry"]
    table = {}
    for name in registry.get_optimizer_name_list():
        cls = registry.get_optimizer_cls(name)
        table[name] = list(found["signature"](cls.__init__).parameters)
    result = {
        "lion": found["Lion"].__module__,
        "is_0_2": found["Version"](found["emerging_optimizers"].__version__)
        >= found["Version"]("0.2"),
        "table": table,
    }
    print(json.dumps(result))


def run_megatron() -> None:
    """Train with Megatron-Core's Muon, replicated and by layers; print what it is made of."""
    warnings.simplefilter("ignore")
    core: Any = importlib.import_module("megatron_core")
    muon: Any = importlib.import_module("megatron.core.optimizer.muon")
    store = Path(tempfile.mkdtemp(), "store")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=0, world_size=1
    )
    made = []
    with core.in_megatron(on_host=True):
        for dtype, by_layers in (
            (torch.float32, False),
            (torch.bfloat16, False),
            (torch.bfloat16, True),
        ):
            settings = core.DistributedDataParallelConfig(grad_reduce_in_fp32=True)
            model = core.DistributedDataParallel(core.CONFIG, settings, core.Model(dtype).cuda())
            config = core.core.OptimizerConfig(bf16=dtype == torch.bfloat16, **core.OPTIONS)
            optimizer = muon.get_megatron_muon_optimizer(
                config, [model], layer_wise_distributed_optimizer=by_layers
            )
            core.train(model, optimizer, [1, 2, 3])
            names = [type(inner.optimizer).__name__ for inner in optimizer.chained_optimizers]
            made.append([names, by_layers])
            # As by Adam alone, except for the matrices.
            wanted = core.reference({}, [1, 2, 3], dtype)
            for param, adams in zip(model.parameters(), wanted, strict=True):
                assert param.isfinite().all()
                assert torch.equal(param, adams) == (param.ndim != 2)
    torch.distributed.destroy_process_group()
    print(json.dumps(made))
