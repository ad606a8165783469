"""Runs every kernel of every rule, for compute-sanitizer.

    PYTHONPATH=.:benchmarks:tests compute-sanitizer --tool memcheck python tools/gpu_sanitized.py

Each rule runs with sizes around every boundary of the kernels' work distribution, at odd offsets in
buffers that end with the operand, in all mixes of dtypes that have separate code, and with a step
on the device; then its optimizer runs, with counters on the host and on the device. Each tensor has
a separate allocation, so that an access beyond one does not fall into another. Lists of many small
tensors take the kernel for large launches, with 32 KB of arguments.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from contenders import Package
from gpu_bits import need_kernels
from problems import RULES, Problem, Rule, Shape

from emerging_optimizers.megatron import FusedAdam

SIZES = [1, 2, 3, 7, 8, 9, 17, 255, 257, 2047, 2049, 4096, 5000]
# More than fit into a launch with 4 KB of arguments: about 75 rows with two states.
MANY = [1 + i % 9 for i in range(300)]

# States that are stored as codes, and ones that are too small for that, in turn.
CODED = [(129, 32), (3, 32), (131, 64), (2, 65, 32), (32, 1), (300, 96)]

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
STOCHASTIC: dict[str, Any] = {"stochastic_rounding": True}
MASTERS: dict[str, Any] = {"master_weights": True}
REMAINDERS: dict[str, Any] = {**MASTERS, "store_param_remainders": True}
EIGHT_BIT: dict[str, Any] = {"state_dtype": "8bit"}


def call(
    rule: Rule,
    sizes: Sequence[int],
    dtypes: tuple[torch.dtype, torch.dtype],
    offsets: Sequence[int],
    device: str,
) -> None:
    """Call a rule's function, with numbers on the host, and then with a step on the device."""
    shape = Shape("sizes", "sizes", [(size,) for size in sizes])
    problem = Problem(rule, shape, dtypes[0], state_dtype=dtypes[1], offsets=offsets)
    for tensors in (problem.grads, *problem.states, problem.updates):
        for i, tensor in enumerate(tensors):
            base = tensor if tensor._base is None else tensor._base
            begin = tensor.storage_offset()
            tensors[i] = base.to(device)[begin : begin + tensor.numel()]
    Package().prepare(problem)()
    if "step" in rule.options:
        values = rule.options | {"step": torch.tensor(3).to(device)}
        rule.function(*problem.arguments(), *values.values(), out=problem.updates)


def step(
    cls: Callable[..., torch.optim.Optimizer],
    shapes: Sequence[int | tuple[int, ...]],
    dtype: torch.dtype,
    options: dict[str, Any],
    device: str,
    offset: int = 1,
) -> None:
    """Take two steps of an optimizer."""
    sizes = [torch.Size([s] if isinstance(s, int) else s) for s in shapes]
    buffers = [torch.ones(size.numel() + offset, dtype=dtype, device=device) for size in sizes]
    params = [
        torch.nn.Parameter(buffer[offset:].view(size))
        for buffer, size in zip(buffers, sizes, strict=True)
    ]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = cls(params, **options)
    for _ in range(2):
        optimizer.step()


def main(device: str) -> None:
    """Run all rules and optimizers."""
    for rule in RULES.values():
        lists = 2 + len(rule.states)
        for offsets in ([0] * lists, [1] * lists, [2 * i + 1 for i in range(lists)]):
            for dtypes in ((F32, F32), (BF16, F32), (F16, BF16), (F64, F32), (F64, F64)):
                call(rule, SIZES, dtypes, offsets, device)
        for dtype, options in ((F32, {}), (BF16, STOCHASTIC), (F16, MASTERS), (F64, {})):
            for capturable in (False, True):
                options = {**options, "capturable": capturable, "fused": True}
                step(rule.optimizer, SIZES, dtype, options, device)
        # Two mixes are enough: only the number of rows differs.
        for dtypes in ((F32, F32), (BF16, F32)):
            call(rule, MANY, dtypes, [0] * lists, device)
        for dtype, options in ((F32, {"capturable": True}), (BF16, MASTERS)):
            step(rule.optimizer, MANY, dtype, {**options, "fused": True}, device)
        for dtype, options in ((F32, {}), (BF16, STOCHASTIC), (BF16, {"master_weights": "split"})):
            options = {**EIGHT_BIT, **options, "fused": True}
            step(rule.optimizer, CODED, dtype, options, device, offset=0)
            step(rule.optimizer, CODED, dtype, {**options, "capturable": True}, device)
        step(rule.optimizer, [(128, 32)] * 150, F32, {**EIGHT_BIT, "fused": True}, device)
    step(FusedAdam, MANY, BF16, REMAINDERS, device)
    codes = {"exp_avg_dtype": torch.uint8, "exp_avg_sq_dtype": torch.uint8}
    step(FusedAdam, SIZES, BF16, {**REMAINDERS, **codes}, device, offset=0)
    if device == "cuda":
        torch.cuda.synchronize()
    print("swept")


if __name__ == "__main__":
    need_kernels()
    main("cuda")
