"""The compiled module, where there is one that fits."""

import importlib
import warnings
from types import ModuleType

import torch

native: ModuleType | None
reason = ""

try:
    native = importlib.import_module("._C", __package__)
except ImportError as error:
    native = None
    reason = str(error)

if native is not None:
    native.active_isa()  # a wrong EMERGING_OPTIMIZERS_ISA is an error now, not in the first step
    if torch.__version__.split(".")[:2] != native.torch_version.split(".")[:2]:
        reason = f"compiled for torch {native.torch_version}, but this is torch {torch.__version__}"
        native = None

if native is None:
    warnings.warn(
        f"emerging_optimizers runs without its native kernels, on plain PyTorch: {reason}. To have"
        " them, compile the package against this torch: `pip install --no-build-isolation .` in its"
        " source folder, and run from another one (or add `--editable`).",
        RuntimeWarning,
        stacklevel=2,
    )
