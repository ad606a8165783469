"""NAdam: Adam with Nesterov momentum, whose coefficient warms up.

Dozat, "Incorporating Nesterov Momentum into Adam",
https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ. `mu_product` is the product of all momenta so
far, as in `torch.optim.NAdam`: the optimizer carries it from step to step, beside the averages.
"""

import emerging_optimizers as eo


@eo.rule
def nadam(
    grad,
    exp_avg: eo.SignedState,
    exp_avg_sq: eo.UnsignedState,
    *,
    betas=(0.9, 0.999),
    eps=1e-8,
    momentum_decay: eo.NonNegative = 4e-3,
    mu_product: eo.ScalarState = 1.0,
    step,
):
    """Return an average that gives the gradient its next weight, over Adam's denominator."""
    beta1, beta2 = betas
    mu = beta1 * (1 - 0.5 * 0.96 ** (step * momentum_decay))
    next_mu = beta1 * (1 - 0.5 * 0.96 ** ((step + 1) * momentum_decay))
    mu_product = mu_product * mu
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (exp_avg_sq / (1 - beta2**step)).sqrt() + eps
    average = grad * ((1 - mu) / (1 - mu_product)) + exp_avg * (
        next_mu / (1 - mu_product * next_mu)
    )
    return average / denominator, mu_product


class NAdam(eo.ScalarOptimizer, rule=nadam, lr=2e-3):
    """NAdam, with the schedule of momentum that torch.optim.NAdam has."""
