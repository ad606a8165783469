from torch import Tensor

HAS_TRITON_340 = False


def tsyrk_ex(matrix: Tensor) -> Tensor:
    return matrix @ matrix.mT
