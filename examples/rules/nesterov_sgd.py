"""SGD with momentum, Nesterov's by default.

Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013,
https://proceedings.mlr.press/v28/sutskever13.html, in the form of `torch.optim.SGD`.
"""

import emerging_optimizers as eo


@eo.rule
def nesterov_sgd(grad, buffer: eo.SignedState, *, momentum: eo.Beta = 0.9, nesterov: bool = True):
    """Return the accumulated gradients, with Nesterov momentum one step ahead."""
    buffer.mul_(momentum).add_(grad)
    if nesterov:
        return grad.add(buffer, alpha=momentum)
    return buffer


class NesterovSGD(eo.ScalarOptimizer, rule=nesterov_sgd, lr=1e-2):
    """SGD with momentum, ICML 2013."""
