from torch import Tensor


def project(matrix: Tensor, bases: list[Tensor]) -> Tensor:
    return bases[0].mT @ matrix @ bases[1]
