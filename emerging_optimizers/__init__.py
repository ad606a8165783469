"""Native multi-tensor kernels for element-wise optimizers, as a PyTorch extension."""

from ._distribution import __version__, explain_import_error

try:
    from . import scalar_optimizers
    from ._config import show_config
    from .scalar_optimizers import *  # noqa: F403
except ImportError as error:
    raise explain_import_error(error) from error

__all__ = ["__version__", "scalar_optimizers", "show_config"]
# The optimizers, but not the update functions. Type checkers read the first line only.
__all__ += scalar_optimizers.__all__
__all__ = sorted(name for name in __all__ if not name.startswith("calculate_"))
