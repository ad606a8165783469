"""SignSGD: the sign of the gradient, no state.

Bernstein et al., "signSGD: Compressed Optimisation for Non-Convex Problems",
https://arxiv.org/abs/1802.04434.
"""

import emerging_optimizers as eo


@eo.rule
def sign_sgd(grad):
    """Return the sign of the gradient."""
    return grad.sign()


class SignSGD(eo.ScalarOptimizer, rule=sign_sgd, lr=1e-4):
    """SignSGD, arXiv:1802.04434."""
