from emerging_optimizers import registry
from emerging_optimizers.orthogonalized_optimizers.muon import Muon


@registry.register_optimizer("adaptive_muon")
class AdaptiveMuon(Muon):
    pass
