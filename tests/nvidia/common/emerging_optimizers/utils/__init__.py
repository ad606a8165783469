from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from .eig import eigenbasis

__all__ = ["FP32MatmulPrecT", "eigenbasis", "fp32_matmul_precision"]

FP32MatmulPrecT = Literal["highest", "high", "medium"]


@contextmanager
def fp32_matmul_precision(precision: FP32MatmulPrecT) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
