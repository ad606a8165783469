"""Time an optimizer's step: native, in PyTorch operations, and PyTorch's fused AdamW."""

import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch.optim import Optimizer

from emerging_optimizers import AdamW, ScalarOptimizer

TIMING_ROUNDS = 7
TIMING_CALLS = 5


def copied(
    optimizer: ScalarOptimizer, optimizer_class: Callable[..., Optimizer], fused: bool | None
) -> Optimizer:
    """Return an optimizer with copies of the parameters, gradients and states of `optimizer`."""
    groups = []
    for group in optimizer.param_groups:
        params = [copy.deepcopy(param) for param in group["params"]]
        for param, original in zip(params, group["params"], strict=True):
            param.grad = original.grad.clone()
        groups.append({**group, "params": params})
    result = optimizer_class(groups)
    result.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group in result.param_groups:
        group["fused"] = fused
    return result


def ways_to_step(optimizer: ScalarOptimizer) -> dict[str, Optimizer]:
    """Return optimizers that repeat the last step, each on its copy of the tensors.

    "native" is the optimizer as trained with; "plain" uses PyTorch operations, parameter by
    parameter. For Adam there is also "torch_fused": ``torch.optim.AdamW(fused=True)``.
    """
    result = {
        "native": copied(optimizer, type(optimizer), fused=None),
        "plain": copied(optimizer, type(optimizer), fused=False),
    }
    if isinstance(optimizer, AdamW):
        result["torch_fused"] = copied(optimizer, torch.optim.AdamW, fused=True)
    return result


def check_agreement(optimizer: ScalarOptimizer) -> None:
    """Raise unless all implementations give close parameters and states."""
    native, *others = ways_to_step(optimizer).values()
    native.step()
    for other in others:
        other.step()
        # A parameter changes by about the learning rate; a thousandth of that is close.
        close = [
            torch.isclose(a, b, rtol=1e-6, atol=1e-3 * group["lr"], equal_nan=True).flatten()
            for group, theirs in zip(native.param_groups, other.param_groups, strict=True)
            for a, b in zip(group["params"], theirs["params"], strict=True)
        ]
        # Rounding may flip the sign of a sum that cancels, so a few parameters may differ more.
        differing = 1 - torch.cat(close).float().mean().item()
        if differing > 1e-4:
            raise RuntimeError(f"{differing:.2%} of the parameters differ after a native step")
        states = (way.state_dict()["state"] for way in (native, other))
        for ours, theirs in zip(*(state.values() for state in states), strict=True):
            for name, value in ours.items():
                # A state may sum normalized gradients, and be larger than 1.
                size = max(1.0, value.abs().max().item())
                torch.testing.assert_close(
                    value, theirs[name], rtol=1e-5, atol=1e-7 * size, equal_nan=True
                )


def time_steps(optimizer: ScalarOptimizer) -> dict[str, float]:
    """Return the median milliseconds of an optimizer step, for each implementation.

    They take turns, so that other load on the machine affects all of them.
    """
    check_agreement(optimizer)
    ways = ways_to_step(optimizer)
    milliseconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(TIMING_ROUNDS):
        for name, way in ways.items():
            way.step()  # evict the others' tensors from the caches
            for _ in range(TIMING_CALLS):
                start = time.perf_counter()
                way.step()
                milliseconds[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(durations) for name, durations in milliseconds.items()}
