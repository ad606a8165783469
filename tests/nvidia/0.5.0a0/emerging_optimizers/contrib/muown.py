from emerging_optimizers import registry
from emerging_optimizers.orthogonalized_optimizers import Muon


@registry.register_optimizer("muown")
class Muown(Muon):
    pass
