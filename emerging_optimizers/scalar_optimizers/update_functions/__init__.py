"""Update functions with keyword-only hyperparameters, as in NVIDIA's package."""

from ..madam import calculate_madam_update
from ..rmsprop import calculate_rmsprop_update
from .adam import calculate_adam_update
from .ademamix import calculate_ademamix_update, calculate_sim_ademamix_update
from .laprop import calculate_laprop_update
from .lion import calculate_lion_update
from .signum import calculate_signum_update

__all__ = [
    "calculate_adam_update",
    "calculate_ademamix_update",
    "calculate_laprop_update",
    "calculate_lion_update",
    "calculate_madam_update",
    "calculate_rmsprop_update",
    "calculate_signum_update",
    "calculate_sim_ademamix_update",
]
