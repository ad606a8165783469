"""Native multi-tensor kernels for element-wise optimizers, as a PyTorch extension."""

from typing import TYPE_CHECKING, Any

from ._distribution import __version__, explain_import_error
from ._distribution import namesake as _namesake

try:
    from . import scalar_optimizers
    from ._clipping import clip_coefficient
    from ._codes import SignedState, UnsignedState
    from ._config import show_config
    from ._hyperparameters import Beta, NonNegative, ScalarState
    from .scalar_optimizers import *  # noqa: F403
except ImportError as error:
    raise explain_import_error(error) from error

if TYPE_CHECKING:
    from ._user_rules import RuleError as RuleError
    from ._user_rules import load_rule as load_rule
    from ._user_rules import rule as rule

# The modules that are not here are those of NVIDIA's package, if it is installed, and so is the
# version, which Megatron-Core compares with versions of that package.
if _namesake is not None:
    __path__.append(str(_namesake.folder))  # noqa: F405
    __version__ = _namesake.package_version()

__all__ = ["Beta", "NonNegative", "RuleError", "ScalarState", "__version__", "load_rule", "rule"]
__all__ += ["SignedState", "UnsignedState", "clip_coefficient", "scalar_optimizers", "show_config"]
# The optimizers, but not the update functions. Type checkers read the first line only.
__all__ += scalar_optimizers.__all__
__all__ = sorted(name for name in __all__ if not name.startswith("calculate_"))


def __getattr__(name: str) -> Any:
    """Import what only users' rules need, or what describes NVIDIA's package."""
    if name in ("RuleError", "load_rule", "rule"):
        from . import _user_rules

        return getattr(_user_rules, name)
    value = None if _namesake is None else _namesake.describe(name)
    if value is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return value
