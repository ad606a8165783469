from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, optim
from torch.optim.optimizer import ParamsT

from emerging_optimizers import mixin as opt_mixin
from emerging_optimizers import utils
from emerging_optimizers.utils import FP32MatmulPrecT


class OrthogonalizedOptimizer(opt_mixin.WeightDecayMixin, optim.Optimizer):
    def __init__(
        self,
        params: ParamsT,
        lr: float,
        momentum_beta: float,
        weight_decay: float,
        *,
        use_nesterov: bool,
        weight_decay_method: opt_mixin.WeightDecayT,
        fp32_matmul_prec: FP32MatmulPrecT,
        scaled_orthogonalize_fn: Callable[..., Tensor],
        **kwargs: Any,
    ) -> None:
        self.use_nesterov = use_nesterov
        self.weight_decay_method = weight_decay_method
        self.fp32_matmul_prec = fp32_matmul_prec
        self.scaled_orthogonalize_fn = scaled_orthogonalize_fn
        defaults = {"lr": lr, "momentum_beta": momentum_beta, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, **kwargs})

    def _init_group(self, group: dict[str, Any], skip_non_grad_params: bool = True) -> None:
        for p in group["params"]:
            if not self.state[p] and not (skip_non_grad_params and p.grad is None):
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            self._init_group(group)
            options = {key: value for key, value in group.items() if key != "params"}
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum, beta = self.state[p]["momentum_buffer"], group["momentum_beta"]
                self._apply_weight_decay_inplace(p, p.grad, group["lr"], group["weight_decay"])
                momentum.lerp_(p.grad, 1 - beta)
                update = p.grad.lerp(momentum, beta) if self.use_nesterov else momentum
                with utils.fp32_matmul_precision(self.fp32_matmul_prec):
                    update = self.orthogonalize(p, update, **options)
                p.add_(update, alpha=-group["lr"])

    def orthogonalize(self, p: Tensor, grad: Tensor, **kwargs: Any) -> Tensor:
        return self.scaled_orthogonalize_fn(grad)
