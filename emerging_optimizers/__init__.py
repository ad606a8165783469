"""Native multi-tensor kernels for element-wise optimizers, as a PyTorch extension."""

from typing import TYPE_CHECKING, Any

from ._distribution import __version__, explain_import_error

try:
    from . import scalar_optimizers
    from ._config import show_config
    from ._hyperparameters import Beta, NonNegative
    from .scalar_optimizers import *  # noqa: F403
except ImportError as error:
    raise explain_import_error(error) from error

if TYPE_CHECKING:
    from ._user_rules import RuleError as RuleError
    from ._user_rules import rule as rule

__all__ = ["Beta", "NonNegative", "RuleError", "__version__", "rule", "scalar_optimizers"]
__all__ += ["show_config"]
# The optimizers, but not the update functions. Type checkers read the first line only.
__all__ += scalar_optimizers.__all__
__all__ = sorted(name for name in __all__ if not name.startswith("calculate_"))


def __getattr__(name: str) -> Any:
    """Import what only programs with rules of their own need."""
    if name not in ("RuleError", "rule"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import _user_rules

    return getattr(_user_rules, name)
