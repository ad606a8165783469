"""Runs Megatron-Core's CUDA code on the host.

Megatron-Core makes its scalars and buffers on ``"cuda"``, uses streams, and checks the type names
of parameters, but none of that changes what an optimizer does. To run it without a GPU, this module
patches PyTorch: tensors for CUDA are host tensors that report a CUDA device, except those moved to
the CPU and what derives from them; streams do nothing.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_KEEP_DEVICE = (
    Tensor.detach,
    Tensor.clone,
    Tensor.float,
    Tensor.to,
    Tensor.data.__get__,  # type: ignore[attr-defined]
)


class _Stream:
    """A stream that does nothing: operations on the host are synchronous."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, event: Any = None) -> "_Stream":
        return self


class _OnHost(TorchFunctionMode):
    """Makes tensors for CUDA on the host, and lets them report a CUDA device."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        is_cpu = any(getattr(a, "is_from_cpu", False) for a in args if isinstance(a, Tensor))
        if function is Tensor.type and len(args) == 1 and not is_cpu:
            return args[0].type().replace("torch.", "torch.cuda.")
        if function == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return not is_cpu
        if function is Tensor.pin_memory:
            return args[0]
        if function in (Tensor.cpu, Tensor.cuda):
            result = args[0].clone()
            result.is_from_cpu = function is Tensor.cpu
            return result
        target = next((a for a in (*args[1:2], kwargs.get("device")) if _is_cuda(a)), None)
        kwargs = {k: "cpu" if _is_cuda(v) else v for k, v in kwargs.items() if k != "pin_memory"}
        result = function(*("cpu" if _is_cuda(a) else a for a in args), **kwargs)
        if is_cpu and target is None and function in _KEEP_DEVICE:
            result.is_from_cpu = True
        return result


def _is_cuda(value: Any) -> bool:
    return isinstance(value, str | torch.device) and str(value).startswith("cuda")


@contextlib.contextmanager
def cuda_on_host() -> Iterator[None]:
    """Run code for CUDA on the host."""
    replaced = {
        "current_device": lambda: "cpu",
        "current_stream": lambda *_: _Stream(),
        "default_stream": lambda *_: _Stream(),
        "Stream": _Stream,
        "Event": _Stream,
        "stream": lambda _: contextlib.nullcontext(),
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "device_count": lambda: 1,
    }
    with mock.patch.multiple(torch.cuda, **replaced), _OnHost():
        yield
