from typing import Literal

from torch import Tensor

WeightDecayT = Literal["decoupled", "independent", "l2", "palm"]


class WeightDecayMixin:
    weight_decay_method: str

    def _apply_weight_decay_inplace(
        self, p: Tensor, grad: Tensor, lr: float, weight_decay: float
    ) -> None:
        if self.weight_decay_method == "l2":
            grad.add_(p, alpha=weight_decay)
        else:
            p.mul_(1 - lr * weight_decay)
