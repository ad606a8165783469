"""Rules with scalar states, their optimizers, and NAdam in float64."""

import math
from typing import Any

import numpy as np
import torch
from optimizers import assert_same, contents, make_params, run
from torch import Tensor

import emerging_optimizers as eo
from emerging_optimizers.megatron import MegatronMixin


@eo.rule
def scalar_nadam(
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    betas: tuple[eo.Beta, eo.Beta] = (0.9, 0.999),
    momentum_decay: eo.NonNegative = 4e-3,
    eps: eo.NonNegative = 1e-8,
    mu_product: eo.ScalarState = 1.0,
    step: int,
) -> Any:
    """NAdam of torch.optim, with states in place."""
    beta1, beta2 = betas
    mu = beta1 * (1 - 0.5 * 0.96 ** (step * momentum_decay))
    mu_next = beta1 * (1 - 0.5 * 0.96 ** ((step + 1) * momentum_decay))
    mu_product = mu_product * mu
    # PyTorch fuses `alpha` and `value` into one rounding where it can.
    exp_avg.mul_(beta1).add_(grad * (1 - beta1))
    exp_avg_sq.mul_(beta2).add_(grad * grad * (1 - beta2))
    denominator = (exp_avg_sq / (1 - beta2**step)).sqrt() + eps
    update = grad * ((1 - mu) / (1 - mu_product))
    update = update + exp_avg * (mu_next / (1 - mu_product * mu_next))
    return update / denominator, mu_product


@eo.rule
def scalar_averages(
    grad: Tensor,
    exp_avg: Tensor,
    *,
    beta: float = 0.5,
    total: eo.ScalarState = 0,
    scale: eo.ScalarState = 1.0,
    previous: eo.ScalarState = -1.0,
) -> Any:
    """Several scalar states that depend on each other's values before the step."""
    exp_avg = beta * exp_avg + (1 - beta) * grad * scale
    return exp_avg - previous * grad, exp_avg, total + scale, scale * beta, total


@eo.rule
def scalar_phases(grad: Tensor, *, mu: eo.ScalarState = 1.0) -> Any:
    """A rule without other states, whose cases are chosen by a scalar state."""
    if math.isnan(mu):
        return grad * 0.5, 1.0
    if mu < 0.3:
        return None, mu + 1.0
    if mu < 0.6:
        return -grad, mu / 2
    return grad * mu, mu * 0.5


class ScalarNAdam(eo.ScalarOptimizer, rule=scalar_nadam, lr=2e-3):
    """NAdam."""


class ScalarAverages(eo.ScalarOptimizer, rule=scalar_averages, lr=0.1):
    """Several scalar states."""


class ScalarPhases(eo.ScalarOptimizer, rule=scalar_phases, lr=0.1):
    """No states but a scalar one."""


class MegatronNAdam(MegatronMixin, ScalarNAdam):
    """NAdam for Megatron-Core."""


class Float64NAdam:
    """NAdam's updates in float64, and its states. The product is rounded to float32, as stored."""

    def __init__(self, shape: tuple[int, ...], decay: float = 4e-3) -> None:
        self.exp_avg, self.exp_avg_sq = np.zeros(shape), np.zeros(shape)
        self.mu_product = np.float32(1.0)
        self.step, self.decay = 0, decay

    def mu(self, step: int) -> float:
        return 0.9 * (1 - 0.5 * math.exp(step * self.decay * math.log(0.96)))

    def update(self, grad: Tensor) -> Any:
        g = grad.double().numpy()
        self.step += 1
        mu, mu_next = self.mu(self.step), self.mu(self.step + 1)
        product = float(self.mu_product) * mu
        self.mu_product = np.float32(product)
        self.exp_avg = 0.9 * self.exp_avg + 0.1 * g
        self.exp_avg_sq = 0.999 * self.exp_avg_sq + 0.001 * g**2
        numerator = g * (1 - mu) / (1 - product)
        numerator = numerator + self.exp_avg * mu_next / (1 - product * mu_next)
        return numerator / (np.sqrt(self.exp_avg_sq / (1 - 0.999**self.step)) + 1e-8)


def scalar(value: float = 1.0, **options: Any) -> Tensor:
    return torch.tensor(value, dtype=options.pop("dtype", torch.float32), **options)


def inference_tensor() -> Tensor:
    with torch.inference_mode():
        return scalar()


def without_memory() -> Tensor:
    tensor = scalar()
    tensor.untyped_storage().resize_(0)
    return tensor


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def products(optimizer: Any) -> list[float]:
    params = (param for group in optimizer.param_groups for param in group["params"])
    return [optimizer.state[p]["mu_product"].item() for p in params if optimizer.state.get(p)]


def trained(cls: Any = ScalarNAdam, steps: int = 3, **options: Any) -> tuple[Any, list[Any]]:
    dtype = options.pop("dtype", torch.float32)
    params = make_params(dtype=dtype)
    optimizer = cls(params, **options)
    run(optimizer, params, range(1, steps + 1))
    return optimizer, params


def continue_alike(optimizer: Any, other: Any) -> None:
    """Assert that two optimizers are equal, and are after another step."""
    for step in (7, 8):
        assert_same(contents(other), contents(optimizer))
        for each in (optimizer, other):
            run(each, [p for group in each.param_groups for p in group["params"]], [step])
    assert_same(contents(other), contents(optimizer))
