import torch

from emerging_optimizers import registry


@registry.register_optimizer("lion")
class Lion(torch.optim.SGD):
    pass
