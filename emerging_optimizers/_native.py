"""The compiled module, where there is one."""

import importlib
import warnings
from types import ModuleType

import torch  # noqa: F401  (the compiled module is linked against its libraries)

native: ModuleType | None
reason = ""

try:
    native = importlib.import_module("._C", __package__)
except ImportError as error:
    native = None
    reason = str(error)
    warnings.warn(
        f"emerging_optimizers runs without its native kernels, on plain PyTorch: {error}. To build"
        " them, install a C++ compiler and reinstall with"
        " `pip install --no-build-isolation emerging-optimizers-native`.",
        RuntimeWarning,
        stacklevel=2,
    )

if native is not None:
    native.active_isa()  # a wrong EMERGING_OPTIMIZERS_ISA is an error now, not in the first step
