"""CUDA as far as Megatron-Core asks for it, on the host.

Megatron-Core makes its scalars and buffers on ``"cuda"``, asks for streams, and tells parameters by
their type's name. All that an optimizer is asked for is the same on another device. So that its
code runs without a GPU, what it asks of PyTorch gets the host's answer here: tensors for CUDA are
the host's and say that they are CUDA's, and a stream is nothing.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode


class _Stream:
    """Does nothing, as all that is done on the host is done at once."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, event: Any = None) -> "_Stream":
        return self


class _OnHost(TorchFunctionMode):
    """Makes and moves tensors for CUDA on the host, and lets them say that they are CUDA's."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.type and len(args) == 1 and not kwargs:
            return args[0].type().replace("torch.", "torch.cuda.")
        if function is torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        if function is torch.Tensor.cuda:
            return args[0]
        if function is torch.Tensor.pin_memory:
            return args[0]
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        if kwargs.pop("pin_memory", False):
            kwargs["pin_memory"] = False
        args = tuple("cpu" if isinstance(a, str) and a.startswith("cuda") else a for a in args)
        return function(*args, **kwargs)


@contextlib.contextmanager
def cuda_on_host() -> Iterator[None]:
    """Give code that asks for CUDA the host."""
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
