from emerging_optimizers.orthogonalized_optimizers.adaptive_muon import AdaptiveMuon
from emerging_optimizers.orthogonalized_optimizers.muon import Muon, get_muon_scale_factor
from emerging_optimizers.orthogonalized_optimizers.orthogonalized_optimizer import (
    OrthogonalizedOptimizer,
)

__all__ = ["AdaptiveMuon", "Muon", "OrthogonalizedOptimizer", "get_muon_scale_factor"]
