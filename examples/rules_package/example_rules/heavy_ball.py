"""SGD with Polyak's momentum: a rule in Python."""

import emerging_optimizers as eo


@eo.rule
def heavy_ball(grad, velocity: eo.SignedState, *, momentum: eo.Beta = 0.9):
    """Return the sum of all gradients, older ones with less weight."""
    velocity.mul_(momentum).add_(grad)
    return velocity


class HeavyBall(eo.ScalarOptimizer, rule=heavy_ball, lr=1e-2):
    """SGD with Polyak's momentum."""
