"""Element-wise ("scalar") optimizers: update functions over tensors and lists, and optimizers."""

from .._optimizer import ScalarOptimizer
from . import update_functions as update_functions
from .adam import Adam, AdamW, calculate_adam_update
from .ademamix import AdEMAMix, calculate_ademamix_update
from .base import SingleMomentumOptimizer, TwoMomentsOptimizer
from .laprop import LaProp, calculate_laprop_update
from .lion import Lion, calculate_lion_update
from .madam import MAdam, calculate_madam_update
from .rmsprop import RMSprop, calculate_rmsprop_update
from .signum import Signum, calculate_signum_update
from .sim_ademamix import SimplifiedAdEMAMix, calculate_sim_ademamix_update

__all__ = [
    "AdEMAMix",
    "Adam",
    "AdamW",
    "LaProp",
    "Lion",
    "MAdam",
    "RMSprop",
    "ScalarOptimizer",
    "Signum",
    "SimplifiedAdEMAMix",
    "SingleMomentumOptimizer",
    "TwoMomentsOptimizer",
    "calculate_adam_update",
    "calculate_ademamix_update",
    "calculate_laprop_update",
    "calculate_lion_update",
    "calculate_madam_update",
    "calculate_rmsprop_update",
    "calculate_signum_update",
    "calculate_sim_ademamix_update",
]
