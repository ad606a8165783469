import torch
from torch import Tensor


def eigenbasis(matrix: Tensor) -> Tensor:
    return torch.linalg.eigh(matrix).eigenvectors
