from typing import Any

import torch
from torch import optim
from torch.optim.optimizer import ParamsT

from emerging_optimizers import mixin as opt_mixin
from emerging_optimizers import registry, utils
from emerging_optimizers.scalar_optimizers import update_functions
from emerging_optimizers.soap import soap_utils


@registry.register_optimizer("soap")
class SOAP(opt_mixin.WeightDecayMixin, optim.Optimizer):
    def __init__(
        self,
        params: ParamsT,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        weight_decay_method: opt_mixin.WeightDecayT = "decoupled",
        nesterov: bool = False,
        correct_bias: bool = True,
    ) -> None:
        self.weight_decay_method = weight_decay_method
        self.nesterov = nesterov
        self.correct_bias = correct_bias
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def _init_group(self, group: dict[str, Any], skip_non_grad_params: bool = True) -> None:
        for p in group["params"]:
            if not self.state[p] and not (skip_non_grad_params and p.grad is None):
                self.state[p] = {
                    "step": 0,
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                    "L": torch.zeros(p.shape[0], p.shape[0]),
                    "R": torch.zeros(p.shape[1], p.shape[1]),
                }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            self._init_group(group)
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["step"] += 1
                state["L"].lerp_(p.grad @ p.grad.mT, 1 - group["betas"][1])
                state["R"].lerp_(p.grad.mT @ p.grad, 1 - group["betas"][1])
                bases = [utils.eigenbasis(state["L"]), utils.eigenbasis(state["R"])]
                self._apply_weight_decay_inplace(p, p.grad, group["lr"], group["weight_decay"])
                update = update_functions.calculate_adam_update(
                    soap_utils.project(p.grad, bases),
                    state["exp_avg"],
                    state["exp_avg_sq"],
                    betas=group["betas"],
                    eps=group["eps"],
                    correct_bias=self.correct_bias,
                    nesterov=self.nesterov,
                    step=state["step"],
                )
                update = soap_utils.project(update, [basis.mT for basis in bases])
                p.add_(update, alpha=-group["lr"])
