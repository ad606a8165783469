"""The operators in PyTorch: opcheck, torch.compile, torch.export, dispatch keys."""

import copy
from collections.abc import Iterator
from itertools import chain
from typing import Any

import pytest
import torch
import torch.distributed as dist
from oracle import RULES, Rule
from support import assert_equal_bits
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

# Compiling raises warnings about code of torch itself.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(params=list(RULES.values()), ids=str)
def rule(request: pytest.FixtureRequest) -> Rule:
    return request.param


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def make_lists(rule: Rule) -> list[list[Tensor]]:
    """The list of gradients, then the list of each state."""
    shapes = ((5, 3), (7,), (2, 3, 4))
    return [[torch.rand(shape) - (i == 0) * 0.5 for shape in shapes] for i in range(_count(rule))]


def _count(rule: Rule) -> int:
    return 1 + len(rule.states)


def at_step(rule: Rule, step: Any) -> dict[str, Any]:
    return rule.usual | ({"step": step} if "step" in rule.usual else {})


def operator(rule: Rule) -> Any:
    return rule.operator


def arguments(rule: Rule, requires_grad: bool) -> tuple[list[Any], dict[str, Any]]:
    lists = make_lists(rule)
    if requires_grad:
        lists[-1][0].requires_grad_()
    updates = [torch.empty_like(grad) for grad in lists[0]]
    names = [argument.name for argument in operator(rule)._schema.arguments]
    options = [rule.usual.get(name, False) for name in names[1 + len(lists) :]]
    return [updates, *lists, *options[:-1]], {}


@pytest.mark.parametrize("requires_grad", [False, True])
# From torch 2.14 on, Dynamo reads the gradients of non-leaf tensors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_opcheck(rule: Rule, requires_grad: bool) -> None:
    args, kwargs = arguments(rule, requires_grad)
    results = torch.library.opcheck(operator(rule), args, kwargs)
    assert set(results.values()) == {"SUCCESS"}


def test_schema_never_specialises_on_the_step(rule: Rule) -> None:
    kinds = {argument.name: str(argument.type) for argument in operator(rule)._schema.arguments}
    assert "str" not in kinds.values()
    if "step" in rule.usual:
        assert "SymInt step" in str(operator(rule)._schema)


def test_compiled_ten_steps(rule: Rule) -> None:
    counter = CompileCounter()

    def train(lists: list[list[Tensor]], step: int) -> list[Tensor]:
        updates = rule.function(*lists, **at_step(rule, step))
        return [update * 2 for update in updates]

    compiled = torch.compile(train, fullgraph=True, backend=counter)
    eager_lists = make_lists(rule)
    lists = copy.deepcopy(eager_lists)
    for step in range(1, 11):
        assert_equal_lists(compiled(lists, step), train(eager_lists, step))
        assert_equal_lists([*chain(*lists)], [*chain(*eager_lists)])
    assert counter.frame_count <= 2


@pytest.mark.builtin_rules("reads a built-in rule's formula")
def test_whole_numbers_that_vary() -> None:
    """Dynamo makes them symbolic, also where the rule takes any number."""
    rule = RULES["madam"]

    def update(lists: list[list[Tensor]], scale_log2: int) -> list[Tensor]:
        updates: list[Tensor] = rule.function(*lists, **rule.usual | {"scale_log2": scale_log2})
        return updates

    compiled = torch.compile(update, fullgraph=True, dynamic=True, backend="eager")
    for scale_log2 in (2, 4, -6):
        lists = make_lists(rule)
        assert_equal_lists(compiled(copy.deepcopy(lists), scale_log2), update(lists, scale_log2))


def assert_equal_lists(got: list[Tensor], wanted: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert_equal_bits(a, b, f"tensor {i}")


@pytest.mark.parametrize("form", ["list", "single", "out", "out is grad", "step tensor"])
def test_compiled_by_inductor(rule: Rule, form: str) -> None:
    def train(lists: list[list[Tensor]], step: Any, out: Any) -> Any:
        if form == "single":
            return rule.function(*(tensors[0] for tensors in lists), **at_step(rule, step))
        return rule.function(*lists, **at_step(rule, step), out=out)

    eager_lists = make_lists(rule)
    lists = copy.deepcopy(eager_lists)
    step = torch.tensor(3) if form == "step tensor" else 3

    def out_for(lists: list[list[Tensor]]) -> list[Tensor] | None:
        if form == "out is grad":
            return lists[0]
        return [torch.empty_like(grad) for grad in lists[0]] if form == "out" else None

    out, eager_out = out_for(lists), out_for(eager_lists)
    got = torch.compile(train, fullgraph=True)(lists, step, out)
    wanted = train(eager_lists, step, eager_out)
    if form == "single":
        got, wanted = [got], [wanted]
    assert_equal_lists(got, wanted)
    assert_equal_lists([*chain(*lists)], [*chain(*eager_lists)])
    if out is not None and eager_out is not None:
        assert_equal_lists(out, eager_out)


def test_exported_graph_keeps_the_operator(rule: Rule) -> None:
    class Step(torch.nn.Module):
        def forward(self, lists: list[list[Tensor]]) -> list[Tensor]:
            return rule.function(*lists, **at_step(rule, 3))

    eager_lists = make_lists(rule)
    lists = copy.deepcopy(eager_lists)
    for strict in (False, True):
        exported = torch.export.export(Step(), (copy.deepcopy(lists),), strict=strict)
        targets = [node.target for node in exported.graph.nodes if node.op == "call_function"]
        assert operator(rule) in targets
    got = exported.module()(lists)
    assert_equal_lists(got, rule.function(*eager_lists, **at_step(rule, 3)))
    assert_equal_lists([*chain(*lists)], [*chain(*eager_lists)])


def test_errors_keep_their_type_when_compiled(rule: Rule) -> None:
    lists = make_lists(rule)
    out = [torch.empty_like(grad) for grad in lists[0]]
    [*lists, out][1][2] = torch.rand(3, 3)
    compiled = torch.compile(
        lambda: rule.function(*lists, **at_step(rule, 3), out=out), backend="eager"
    )
    with pytest.raises(ValueError, match=r"has shape \(3, 3\) but grads\[2\] has shape"):
        compiled()


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceMesh]:
    """A mesh of this process alone."""
    store = tmp_path_factory.mktemp("mesh") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_compiled_on_dtensors(rule: Rule, mesh: DeviceMesh) -> None:
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    placements = (Shard(0), Replicate(), Shard(1))
    wholes = make_lists(rule)
    lists = [
        [distribute_tensor(t.clone(), mesh, [p]) for t, p in zip(tensors, placements, strict=True)]
        for tensors in wholes
    ]
    # Redistribution inside the graph, and a position of plain tensors.
    lists[0][1] = DTensor.from_local(wholes[0][1].clone(), mesh, [Partial()])
    for tensors, whole in zip(lists, wholes, strict=True):
        tensors[2] = whole[2].clone()
    compiled = torch.compile(rule.function, fullgraph=True, backend="aot_eager")
    updates = compiled(*lists, **at_step(rule, 3))
    assert [isinstance(update, DTensor) for update in updates] == [True, True, False]
    wanted = rule.function(*wholes, **at_step(rule, 3))
    for got, expected in zip([updates, *lists], [wanted, *wholes], strict=True):
        whole = [t.full_tensor() if isinstance(t, DTensor) else t for t in got]
        assert_equal_lists(whole, expected)


def test_meta_tensors(rule: Rule) -> None:
    lists = [[t.to("meta") for t in tensors] for tensors in make_lists(rule)]
    updates = rule.function(*lists, **rule.usual)
    assert [u.shape for u in updates] == [t.shape for t in lists[0]]
    assert all(u.is_meta for u in updates)


def test_fake_tensors(rule: Rule) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        lists = [[mode.from_tensor(t) for t in tensors] for tensors in make_lists(rule)]
        updates = rule.function(*lists, **rule.usual)
        assert [u.shape for u in updates] == [t.shape for t in lists[0]]


def test_negative_views_and_zero_tensors(rule: Rule) -> None:
    """Lazy negations and zero tensors are resolved before they reach the kernels."""
    grad = torch.complex(torch.rand(6), torch.rand(6)).conj().imag
    assert grad.is_neg()
    states = [torch.rand(6) for _ in rule.states]
    for lazy in (grad, torch._efficientzerotensor(6)):
        others = copy.deepcopy(states)
        wanted = rule.function(lazy.clone().resolve_neg() + 0, *others, **rule.usual)
        mine = copy.deepcopy(states)
        assert torch.equal(rule.function(lazy, *mine, **rule.usual), wanted)
        assert_equal_lists(mine, others)


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")  # before torch 2.13
def test_profiler_sees_the_operator(rule: Rule) -> None:
    with torch.profiler.profile() as profile:
        rule.function(*make_lists(rule), **rule.usual)
    assert rule.operator.name() in {e.key for e in profile.key_averages()}


def test_operator_releases_the_gil(rule: Rule) -> None:
    """Another Python thread runs while a large call computes."""
    import threading

    large = [[torch.rand(4 << 20)] for _ in range(_count(rule))]
    out = [torch.empty(4 << 20)]
    ticks = 0
    done = threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not done.is_set():
            ticks += 1
            done.wait(1e-4)

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        counts = []
        for _ in range(20):
            before = ticks
            rule.function(*large, **rule.usual, out=out)
            counts.append(ticks - before)
    finally:
        done.set()
        thread.join()
    assert max(counts) > 1
