"""Native multi-tensor kernels for element-wise optimizers, as a PyTorch extension."""

from ._config import __version__, explain_import_error, show_config

try:
    from . import scalar_optimizers
    from .scalar_optimizers import (
        Adam,
        AdamW,
        AdEMAMix,
        LaProp,
        Lion,
        ScalarOptimizer,
        Signum,
        SimplifiedAdEMAMix,
    )
except ImportError as error:
    raise explain_import_error(error) from error

__all__ = [
    "AdEMAMix",
    "Adam",
    "AdamW",
    "LaProp",
    "Lion",
    "ScalarOptimizer",
    "Signum",
    "SimplifiedAdEMAMix",
    "__version__",
    "scalar_optimizers",
    "show_config",
]
