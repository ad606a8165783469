"""The optimizers under the names that Megatron-Core's distributed optimizer uses.

:class:`FusedAdam` has the constructor of TransformerEngine's optimizer of that name. The other
rules' classes take their own arguments and those of :class:`MegatronMixin`.
"""

from .mixin import MegatronMixin
from .optimizers import AdEMAMix, FusedAdam, LaProp, Lion, Signum, SimplifiedAdEMAMix
from .remainders import merge_master, split_master

__all__ = [
    "AdEMAMix",
    "FusedAdam",
    "LaProp",
    "Lion",
    "MegatronMixin",
    "Signum",
    "SimplifiedAdEMAMix",
    "merge_master",
    "split_master",
]
