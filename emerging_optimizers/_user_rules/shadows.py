"""What PyTorch itself makes of a rule's operations: each runs on small tensors, too.

So a rule that PyTorch refuses is refused at its definition, and not where the formula first runs.
The dtypes also tell what an operation does: the sum of two conditions is a condition in PyTorch.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .graph import RuleError

# As in the formula with operands in float64, beside which tensors made of numbers are float32.
DTYPE = torch.float64


def of_argument() -> Tensor:
    """Return the shadow of a tensor that the rule takes."""
    return torch.full((2,), 0.5, dtype=DTYPE, device="cpu")


def apply(
    what: str,
    function: Callable[..., Any],
    arguments: Sequence[Any],
    options: Mapping[str, Any],
) -> Tensor:
    """Return what PyTorch computes from shadows.

    Raises:
        RuleError: PyTorch refuses the operation.
    """
    try:
        with torch.no_grad():
            shadow: Tensor = function(*arguments, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0].partition(", but expected one of")[0]
        raise RuleError(f"{what}: PyTorch refuses it: {reason}") from None
    return shadow
