"""Emulated CUDA devices for tests without a GPU: the CUDA engine's code, run on the host.

The package's module is compiled again with its CUDA parts, whose blocks of threads run on the host
(tests/cpp/emulated_engine.cpp), and PyTorch gets CUDA devices whose memory is the host's
(tests/cpp/emulated_device.cpp). There are no streams and no graphs.
"""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils import cpp_extension

_ROOT = Path(__file__).parent.parent
_ARGS = ["-O1", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp"]


def start() -> ModuleType:
    """Build the module, and install it as the package's compiled module."""
    assert "emerging_optimizers" not in sys.modules, "too late: the package was imported"
    assert torch.version.cuda is None, "PyTorch has CUDA kernels of its own: use a real device"
    csrc = _ROOT / "csrc"
    patterns = (
        "units/*.cpp",
        "engine/cpu/*.cpp",
        "engine/cuda/erased_enqueue.cpp",
        "bindings/*.cpp",
    )
    sources = [source for pattern in patterns for source in csrc.glob(pattern)]
    sources += (_ROOT / "tests" / "cpp").glob("emulated_*.cpp")
    folder = _ROOT / "build" / "emulation"
    folder.mkdir(parents=True, exist_ok=True)
    module = cpp_extension.load(
        "emulated_cuda",
        [str(source) for source in sorted(sources)],
        # The tests of the CUDA engine need no other instruction set than the baseline.
        extra_cflags=["-DEMOPT_CUDA=1", "-DEMOPT_X86_UNITS=0", *_ARGS],
        extra_include_paths=[str(csrc)],
        extra_ldflags=["-fopenmp"],
        build_directory=str(folder),
    )
    sys.modules["emerging_optimizers._C"] = module
    # PyTorch calls these before it makes or prints a CUDA tensor.
    torch.cuda._lazy_init = lambda: None
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 2
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    deepcopy_of_storage = torch.Tensor.__deepcopy__

    def deepcopy(tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
        if tensor.is_cuda and tensor.is_leaf:  # PyTorch cannot create storage on it
            return memo.setdefault(id(tensor), tensor.detach().clone())
        return deepcopy_of_storage(tensor, memo)

    torch.Tensor.__deepcopy__ = deepcopy
    return module
