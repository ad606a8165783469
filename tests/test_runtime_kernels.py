"""When the CUDA kernels of rules in Python are built, and the messages if they cannot be.

No GPU is needed: a stub takes the place of the compiled module.
"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import emerging_optimizers as eo
from emerging_optimizers import _build_cache, _native, _step
from emerging_optimizers._build_cache import BuildError
from emerging_optimizers._user_rules import background, cuda_kernels, runtime_kernels
from emerging_optimizers._user_rules.cuda_kernels import KERNELS, Kernel
from emerging_optimizers._user_rules.runtime_kernels import RuntimeKernels

SMALL = Kernel("StoreUpdate", "float", is_large=False, needs_setup=False)
LARGE = SMALL._replace(is_large=True)
OTHER = SMALL._replace(real="double")


class Module:
    """The compiled module: which kernels it lacks, and which it was given."""

    cuda_architectures = ("sm_90",)

    def __init__(self) -> None:
        self.wanted: list[tuple[int, Kernel]] = []
        self.attached: list[tuple[int, Kernel]] = []

    def _wanted_kernels(self, handle: object) -> list[tuple[int, Kernel]]:
        wanted, self.wanted = self.wanted, []
        return wanted

    def _attach_kernel(
        self, handle: object, device: int, kernel: tuple[str, str, bool, bool], *_: object
    ) -> None:
        self.attached.append((device, Kernel(*kernel)))


class Compiler:
    """Compiles nothing, or fails.

    Attributes:
        failures: By kernel, what is raised.
        count: How many kernels it was asked for.
    """

    def __init__(self, cubin: Path) -> None:
        self.cubin = cubin
        self.failures: dict[Kernel, Exception] = {}
        self.count = 0

    def __call__(self, rule: str, source: str, kernel: Kernel, architecture: int) -> Path:
        self.count += 1
        if kernel in self.failures:
            raise self.failures[kernel]
        return self.cubin


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Module:
    stub = Module()
    monkeypatch.setattr(_native, "native", stub)
    monkeypatch.setattr(runtime_kernels, "_is_capturing", lambda: False)
    monkeypatch.setattr(runtime_kernels, "_architecture", lambda device: 90)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    return stub


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Compiler:
    cubin = tmp_path / "cubin"
    cubin.write_bytes(b"code")
    stub = Compiler(cubin)
    monkeypatch.setattr(cuda_kernels, "check_compiler", lambda: None)
    monkeypatch.setattr(cuda_kernels, "find_cubin", lambda *_: None)
    monkeypatch.setattr(cuda_kernels, "cubin_for", stub)
    return stub


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """What would run in the background."""
    found: list[Callable[[], None]] = []
    monkeypatch.setattr(background, "run", found.append)
    return found


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(_build_cache, "say", found.append)
    return found


def kernels() -> RuntimeKernels:
    return RuntimeKernels("adopt", "text", object(), KERNELS)


def run(tasks: list[Callable[[], None]]) -> None:
    while tasks:
        tasks.pop(0)()


def test_all_are_loaded_once(module: Module, compiler: Compiler) -> None:
    rule = kernels()
    for device in ("cuda:1", "cuda", "cuda:1"):
        rule.build_all(torch.device(device))
        assert module.attached == [(1, kernel) for kernel in KERNELS]
        assert compiler.count == len(KERNELS)
    rule.build_all(torch.device("cuda:0"))
    assert module.attached[len(KERNELS) :] == [(0, kernel) for kernel in KERNELS]


def test_a_missing_kernel_is_asked_for_once(
    module: Module, compiler: Compiler, tasks: list[Callable[[], None]]
) -> None:
    rule = kernels()
    for _ in range(3):
        module.wanted = [(0, SMALL)]
        assert not rule.start()
    assert len(tasks) == 2
    run(tasks)
    assert module.attached == [(0, SMALL), (0, LARGE)]
    module.wanted = [(0, SMALL)]  # noted before they were loaded
    assert rule.build_missing()
    assert compiler.count == 2
    assert not rule.build_missing()


@pytest.mark.parametrize("count", [0, 2])
def test_a_device_that_is_not_there(
    module: Module, compiler: Compiler, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    message = rf"adopt cannot be compiled: there is no device cuda:2 \(.* is {count}\); name"
    with pytest.raises(RuntimeError, match=message):
        kernels().build_all(torch.device("cuda:2"))
    if count == 0:
        with pytest.raises(RuntimeError, match="there is no device cuda:0"):
            kernels().build_all(torch.device("cuda"))
    assert compiler.count == 0
    assert not module.attached


@pytest.mark.usefixtures("compiler")
def test_a_refusal_is_not_final(
    module: Module, tasks: list[Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = kernels()
    monkeypatch.setenv("EMERGING_OPTIMIZERS_JIT", "0")
    module.wanted = [(0, SMALL)]
    assert not rule.start()
    assert rule.why_not == "EMERGING_OPTIMIZERS_JIT=0"
    module.wanted = [(0, SMALL)]
    with pytest.raises(RuntimeError, match="adopt cannot be compiled: EMERGING_OPTIMIZERS_JIT=0"):
        rule.build_missing()
    monkeypatch.delenv("EMERGING_OPTIMIZERS_JIT")
    module.wanted = [(0, SMALL)]
    assert not rule.start()
    run(tasks)
    assert module.attached == [(0, SMALL), (0, LARGE)]
    assert rule.why_not is None


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (BuildError("the disk is full", "Try again"), "the disk is full. Try again"),
        (RuntimeError("the driver cannot load it"), "the driver cannot load it"),
        (OSError("no such file"), "no such file"),
        (ValueError("wrong"), "ValueError: wrong"),
        (KeyError("name"), "KeyError: 'name'"),
    ],
)
def test_a_failure_is_told_and_compile_tries_again(
    module: Module,
    compiler: Compiler,
    tasks: list[Callable[[], None]],
    said: list[str],
    error: Exception,
    reason: str,
) -> None:
    rule = kernels()
    compiler.failures = {SMALL: error}
    module.wanted = [(0, SMALL)]
    rule.start()
    for task in tasks[:1]:
        task()
    assert rule.why_not == reason
    assert said == [f"the rule adopt runs its formula where a kernel is missing: {reason}"]
    compiler.failures = {}
    rule.build_all(torch.device("cuda:0"))
    assert (0, SMALL) in module.attached
    assert rule.why_not is None


def test_small_launches_suffice(
    module: Module, compiler: Compiler, tasks: list[Callable[[], None]], said: list[str]
) -> None:
    compiler.failures = {LARGE: BuildError("no memory", "Try again")}
    waiting = kernels()
    module.wanted = [(0, SMALL), (0, OTHER)]
    assert waiting.build_missing()
    assert module.attached == [(0, SMALL), (0, OTHER)]
    rule = kernels()
    module.wanted = [(1, SMALL)]
    rule.start()
    run(tasks)
    assert module.attached[2:] == [(1, SMALL)]
    assert rule.why_not is waiting.why_not is None
    assert not said
    with pytest.raises(RuntimeError, match=r"adopt cannot be compiled: no memory\. Try again"):
        rule.build_all(torch.device("cuda:0"))


@pytest.mark.usefixtures("compiler")
def test_nothing_is_loaded_during_a_capture(
    module: Module, tasks: list[Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime_kernels, "_is_capturing", lambda: True)
    module.wanted = [(0, SMALL)]
    assert not kernels().start()
    assert not kernels().build_missing()
    assert not tasks
    assert module.wanted == [(0, SMALL)]


@pytest.mark.parametrize("is_captured", [True, False])
def test_a_captured_step_with_fused(monkeypatch: pytest.MonkeyPatch, is_captured: bool) -> None:
    """The cure is another one than without a capture, and names the parameter's GPU."""
    optimizer = eo.Lion([torch.nn.Parameter(torch.ones(1)) for _ in range(2)], fused=True)
    params = [SimpleNamespace(is_cuda=True, device=torch.device("cuda", i)) for i in range(2)]
    group = {**optimizer.param_groups[0], "params": params}
    monkeypatch.setattr(_step, "_is_cuda_in_use", lambda: True)
    monkeypatch.setattr(_step, "param_name", lambda *_: "weight")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_captured)
    message = "cannot capture the step of weight, which .*" if is_captured else "fused=True, but"
    cure = r"call its compile\('cuda:1'\) before" if is_captured else ".*uses PyTorch operations"
    with pytest.raises(RuntimeError, match=message + cure):
        _step._raise_no_native_step(optimizer, group, [1])
