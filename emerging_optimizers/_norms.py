"""A hook that preserves the Frobenius norms of weights."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ._dtensor import is_dtensor
from ._hooks import WeightHook

_logger = logging.getLogger(__name__)


class KeepNorms(WeightHook):
    """Scales each updated weight to the Frobenius norm that it had before the update."""

    flag = "frob_normalize"

    def check_group(self, optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> None:
        """Log an error if the group has weight decay as well."""
        if group["weight_decay"] != 0.0:
            _logger.error(
                "%s with frob_normalize=True restores the norm that weight_decay=%g reduces;"
                " use weight_decay=0",
                type(optimizer).__name__,
                group["weight_decay"],
            )

    def joins(self, param: Tensor) -> bool:
        """Return whether the norm is summed over processes, any of which may have a gradient."""
        return is_dtensor(param)

    def before_update(self, weights: Sequence[Tensor], params: Sequence[Tensor]) -> list[Tensor]:
        """Return the norms, as float64 scalars."""
        norms = torch._foreach_norm(list(weights), 2, torch.float64)
        return [
            _over_processes(norm, param) if is_dtensor(param) else norm
            for norm, param in zip(norms, params, strict=True)
        ]

    def after_update(
        self, weights: Sequence[Tensor], params: Sequence[Tensor], kept: Sequence[Tensor]
    ) -> list[Tensor]:
        """Scale each weight to its former norm, if the factor is finite."""
        are_still = []
        new_norms = self.before_update(weights, params)
        for weight, norm, new_norm in zip(weights, kept, new_norms, strict=True):
            factor = norm / new_norm
            factor = torch.where(factor.isfinite(), factor, torch.ones_like(factor))
            weight.mul_(factor)
            are_still.append(factor == 1.0)
        return are_still


KEEP_NORMS = KeepNorms()


def _over_processes(norm: Tensor, param: Any) -> Tensor:
    """Return the norm of a DTensor from the norms of the processes' shards."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    # Along each sharded dimension of the mesh, processes have partial sums of squares.
    placements = [Replicate() if p.is_replicate() else Partial() for p in param.placements]
    squares = DTensor.from_local(norm.square(), param.device_mesh, placements, run_check=False)
    total: Tensor = squares.full_tensor()
    return total.sqrt()
