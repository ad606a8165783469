import torch


class TwoMomentsOptimizer(torch.optim.Optimizer):
    pass
