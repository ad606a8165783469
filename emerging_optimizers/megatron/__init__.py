"""The optimizers under the names that Megatron-Core's distributed optimizer uses.

:class:`FusedAdam` has the constructor of TransformerEngine's optimizer of that name. The other
rules' classes take their own arguments and those of :class:`MegatronMixin`.
"""

from .._split_masters import merge_master, split_master
from . import optimizers
from .mixin import MegatronMixin
from .optimizers import *  # noqa: F403

__all__ = ["MegatronMixin", "merge_master", "split_master"]
__all__ += optimizers.__all__
