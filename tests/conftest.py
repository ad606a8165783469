import os
from collections.abc import Generator, Iterator

import pytest
import torch

try:
    import hypothesis
except ModuleNotFoundError:  # optional on a machine with a GPU where nothing can be installed
    pass
else:
    hypothesis.settings.register_profile(
        "fixed", derandomize=True, deadline=None, max_examples=50, database=None
    )
    hypothesis.settings.load_profile("fixed")

# Optional packages are imported by the tests that use them, and nvidia/ is a package to install.
collect_ignore = ["megatron_core.py", "nvidia"]

# Real GPUs only, not emulated devices.
HAS_GPU = torch.cuda.is_available()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests that are marked slow, too")
    parser.addoption(
        "--device",
        choices=["cpu", "cuda", "emulated"],
        default="cpu",
        help="where tensors are; emulated: CUDA devices on the host (tests/emulation.py)",
    )
    parser.addoption(
        "--rules",
        choices=["built-in", "user"],
        default="built-in",
        help="the rules that tests are crossed with; user: those of tests/user_rules.py",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cuda" and not HAS_GPU:
        raise pytest.UsageError("--device cuda: there is no CUDA device")
    if config.getoption("--device") == "emulated":
        import emulation

        emulation.start()
    if config.getoption("--rules") == "user":
        # Before oracle.py is imported, here and in the processes that tests start.
        os.environ["EMOPT_TEST_RULES"] = "user"
        import user_rules

        if config.getoption("--device") == "emulated":
            # The emulated module cannot load rules that are built for the compiled one.
            os.environ["EMERGING_OPTIMIZERS_JIT"] = "0"
            config.addinivalue_line("filterwarnings", "ignore:the rule user_.* runs its formula")
            return
        for rule in user_rules.ALL:
            rule.compile()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    is_emulated = config.getoption("--device") == "emulated"
    if is_emulated:
        repeated = [item for item in items if _repeats_the_cpu(item)]
        items[:] = [item for item in items if not _repeats_the_cpu(item)]
        config.hook.pytest_deselected(items=repeated)
    if config.getoption("--rules") == "user":
        others = [item for item in items if item.get_closest_marker("builtin_rules")]
        items[:] = [item for item in items if not item.get_closest_marker("builtin_rules")]
        config.hook.pytest_deselected(items=others)
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
        if item.get_closest_marker("cuda") and not HAS_GPU and not is_emulated:
            item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))
        if item.get_closest_marker("real") and is_emulated:
            item.add_marker(pytest.mark.skip(reason="not on emulated devices"))


def _repeats_the_cpu(item: pytest.Item) -> bool:
    """Whether a test does the same whatever `--device` is."""
    fixtures = getattr(item, "fixturenames", ())
    is_for_the_cpu = "_no_other_device" in fixtures and item.get_closest_marker("cuda") is None
    return is_for_the_cpu or item.get_closest_marker("once") is not None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """On a machine with a GPU, count a skipped CUDA test as failed."""
    report = yield
    is_cuda = item.get_closest_marker("cuda") and not item.get_closest_marker("slow")
    if HAS_GPU and report.skipped and is_cuda:
        report.outcome = "failed"
        report.longrepr = f"skipped on a machine with a GPU: {report.longrepr}"
    return report


@pytest.fixture(scope="session", autouse=True)
def _no_builds_in_the_background() -> Iterator[None]:
    """Rules are compiled where a test asks for it."""
    from emerging_optimizers._user_rules import background

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(background, "run", lambda task: None)
        yield


@pytest.fixture(scope="module")
def _cache_of_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An empty cache for the tests of a file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path_factory.mktemp("extensions")))
        yield


@pytest.fixture
def _no_other_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the names of users' rules during a test."""
    from emerging_optimizers._user_rules import user_rule

    monkeypatch.setattr(user_rule, "_RULES", {})


@pytest.fixture
def _quick_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile rules with -O1, which is much faster, for tests of the text that is written.

    The bits of optimized code are compared in test_rule_bits.py and test_tile_machine.py.
    """
    from emerging_optimizers import _build

    options = ["-O1" if option == "-O3" else option for option in _build.COMPILE_ARGS["unix"]]
    monkeypatch.setitem(_build.COMPILE_ARGS, "unix", options)


@pytest.fixture(scope="session", autouse=True)
def _kernels_of_emulated_devices(request: pytest.FixtureRequest) -> Iterator[None]:
    """Kernels of users' rules are compiled for the host."""
    if request.config.getoption("--device") != "emulated":
        yield
        return
    import emulated_kernels

    from emerging_optimizers._user_rules import cuda_kernels

    with pytest.MonkeyPatch.context() as patch:
        for name in ("check_compiler", "find_cubin", "cubin_for"):
            patch.setattr(cuda_kernels, name, getattr(emulated_kernels, name))
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _default_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Make tensors on the device under test by default; tests for CUDA name their devices."""
    is_named = "cuda" in request.keywords
    if request.config.getoption("--device") == "cpu" and not is_named:
        yield
        return
    with torch.device("cpu" if is_named else "cuda"):
        yield


@pytest.fixture
def num_threads() -> Iterator[None]:
    """Restore the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def _no_other_device(_default_device: None) -> Iterator[None]:
    """Make tensors on the CPU by default, whatever `--device` is."""
    with torch.device("cpu"):
        yield


@pytest.fixture(params=[False, None], ids=["fallback", "native where possible"])
def fused(request: pytest.FixtureRequest) -> bool | None:
    """The optimizers' argument: the fallback, then native steps where possible."""
    return request.param
