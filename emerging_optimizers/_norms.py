"""Frobenius norms of weights, which a step can keep."""

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
        """Log an error where the group has weight decay, too."""
        if group["weight_decay"] != 0.0:
            _logger.error(
                "%s with frob_normalize=True restores the norm that weight_decay=%g shrinks;"
                " use weight_decay=0",
                type(optimizer).__name__,
                group["weight_decay"],
            )

    def joins(self, param: Tensor) -> bool:
        """Return whether other processes, which may have a gradient, add up the norm with this."""
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
        """Scale the weights, where the factor is finite."""
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
    """Return the norm of a DTensor, of whose shards each process has the norm of one."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    # Each dimension of the mesh that shards the tensor has shards of the sum of squares.
    placements = [Replicate() if p.is_replicate() else Partial() for p in param.placements]
    squares = DTensor.from_local(norm.square(), param.device_mesh, placements, run_check=False)
    total: Tensor = squares.full_tensor()
    return total.sqrt()
