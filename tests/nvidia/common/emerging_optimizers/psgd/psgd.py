import torch

import emerging_optimizers.utils as utils
from emerging_optimizers import registry

assert utils.eigenbasis(torch.eye(2)).shape == (2, 2)


@registry.register_optimizer("psgd_pro")
class PSGDPro(torch.optim.SGD):
    pass
