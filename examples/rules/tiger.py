"""Tiger: the sign of an average, one state.

Su, "Tiger: A Tight-fisted Optimizer", 2023, https://github.com/bojone/tiger. The learning rates
that it gives to each kind of layer are options of parameter groups here.
"""

import emerging_optimizers as eo


@eo.rule
def tiger(grad, exp_avg: eo.SignedState, *, beta: eo.Beta = 0.965):
    """Return the sign of the average of the gradients."""
    exp_avg.mul_(beta).add_(grad, alpha=1 - beta)
    return exp_avg.sign()


class Tiger(eo.ScalarOptimizer, rule=tiger, lr=1e-3):
    """Tiger, https://github.com/bojone/tiger."""
