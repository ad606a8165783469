"""Compares the bits of the GPU's kernels with those of the CPU's, rule by rule.

PYTHONPATH=.:tests python tools/gpu_bits.py build/bits.json  # exit status 1 where some differ
"""

import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch
from oracle import RULES
from support import MIXES, call, has_equal_bits, make_operands

from emerging_optimizers._native import native, reason

# Every combination of specials across the operands is tested.
SPECIALS = (
    *(0.0, -0.0, 1.0, -1.0, float("inf"), -float("inf"), float("nan")),
    *(2.0**-149, -(2.0**-149), 2.0**-130, 2.0**-126, 1e-30, 3.4028234663852886e38),
)
ROWS, COLUMNS = 2048, 1031


def need_kernels() -> None:
    """Exit unless the CUDA kernels are in use: the fallback would run instead."""
    if native is None or not native.cuda_architectures:
        sys.exit(f"no CUDA kernels: {reason or 'the package is compiled without them'}")


def compare_bits(
    device: str = "cuda", rows: int = ROWS, results: Path | None = None
) -> dict[str, dict[str, Any]]:
    """Return how a device's results differ from the CPU's, by rule; write them after each rule."""
    report: dict[str, dict[str, Any]] = {}
    for rule in RULES.values():
        operands = make_operands(rule, (rows, COLUMNS), MIXES["float32"])
        combinations = torch.tensor(list(product(SPECIALS, repeat=1 + len(rule.states))))
        for tensor, values in zip(operands, combinations[: rows * COLUMNS].T, strict=True):
            tensor.view(-1)[: len(values)] = values
        row: dict[str, Any] = {"elements": 0, "differing": 0, "largest_ulp": 0, "cases": {}}
        for name, case in rule.cases.items():
            here, there = operands.clone(), operands.clone()
            there.grad, there.states = there.grad.to(device), [s.to(device) for s in there.states]
            wanted, got = call(rule, case, here), call(rule, case, there)
            of_case = {"differing": 0, "largest_ulp": 0}
            for a, b in zip((got, *there.states), (wanted, *here.states), strict=True):
                a = a.cpu()
                is_equal = has_equal_bits(a, b)
                row["elements"] += a.numel()
                if is_equal.all():
                    continue
                of_case["differing"] += int((~is_equal).sum())
                distance = (_ordinal(a[~is_equal]) - _ordinal(b[~is_equal])).abs().max()
                of_case["largest_ulp"] = max(of_case["largest_ulp"], int(distance))
            if of_case["differing"]:
                row["cases"][name] = of_case
                row["differing"] += of_case["differing"]
                row["largest_ulp"] = max(row["largest_ulp"], of_case["largest_ulp"])
        report[rule.name] = row
        print(rule.name, row, flush=True)
        if results is not None:
            results.write_text(json.dumps(report, indent=1))
    return report


def _ordinal(values: torch.Tensor) -> torch.Tensor:
    """Return the rank of each float32 number: neighbours differ by 1."""
    integers = values.contiguous().view(torch.int32).long()
    return torch.where(integers < 0, -(integers & 0x7FFFFFFF), integers)


if __name__ == "__main__":
    need_kernels()
    rules = compare_bits(results=Path(sys.argv[1]))
    sys.exit(any(rule["differing"] for rule in rules.values()))
