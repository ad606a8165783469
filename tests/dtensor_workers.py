"""Workers of the tests of the functions and optimizers on DTensors."""

import copy
import functools
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed_workers import full
from optimizers import SETUPS, VARIANTS, make_grads, make_params
from oracle import RULES, Rule
from support import Case, assert_equal_bits, calls_in_python
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from emerging_optimizers import AdamW, LaProp, _rule, megatron
from emerging_optimizers._native import native

SHAPES = [(3, 2), (4, 7), (5, 3), (1, 4), (6, 2), (2, 3)]
DTYPES = [torch.float32, torch.bfloat16, torch.float32, torch.float64, torch.float32, torch.float16]


@functools.cache
def meshes() -> tuple[DeviceMesh, DeviceMesh]:
    return init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (1, 2))


def place(whole: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """Distribute a tensor that all processes have."""
    return distribute_tensor(whole.clone(), mesh, placements, src_data_rank=None)


def part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Placed:
    """Lists of DTensors and one plain tensor, and the same tensors undistributed."""

    def __init__(self, rule: Rule, grads_placed_otherwise: bool = False) -> None:
        line, plane = meshes()
        # The last one stays a plain tensor; one process has an empty shard of the one with one row.
        where: list[Any] = [
            (line, [Replicate()]),
            (line, [Shard(0)]),
            (line, [Shard(1)]),
            (line, [Shard(0)]),
            (plane, [Replicate(), Shard(0)]),
            None,
        ]
        names = ("grad", *rule.states, "out")
        generator = torch.Generator().manual_seed(7)
        self.whole = {
            name: [
                torch.rand(shape, generator=generator).to(torch.float32 if i == 1 else dtype)
                for shape, dtype in zip(SHAPES, DTYPES, strict=True)
            ]
            for i, name in enumerate(names)
        }
        self.placed: dict[str, list[Any]] = {
            name: [
                t.clone() if w is None else place(t, *w)
                for t, w in zip(tensors, where, strict=True)
            ]
            for name, tensors in self.whole.items()
        }
        if grads_placed_otherwise:
            first = dist.get_rank() == 0
            grads = self.placed["grad"]
            for i, whole in enumerate(self.whole["grad"][:4]):
                share = whole.clone() if first else torch.zeros_like(whole)
                grads[i] = DTensor.from_local(share, line, [Partial()])
            grads[2] = place(self.whole["grad"][2], line, [Shard(0)])
            grads[3] = place(self.whole["grad"][3], line, [Replicate()])
            grads[4] = place(self.whole["grad"][4], plane, [Shard(1), Shard(0)])

    def states(self) -> list[str]:
        return list(self.whole)[1:-1]

    def call(self, rule: Rule, case: Case, form: str) -> tuple[list[Any], list[Tensor]]:
        """Call with both; return the updates."""
        results: list[Any] = []
        for lists in (self.placed, self.whole):
            *arguments, out = lists.values()
            if form == "single":
                results.append([rule.function(*row, **case) for row in zip(*arguments)])  # noqa: B905
                continue
            if form == "list":
                out = None
            elif form == "out is grad":
                out = arguments[0]
            results.append(rule.function(*arguments, **case, out=out))
            if out is not None:
                assert results[-1] is out
        return results[0], results[1]


def without_native() -> AbstractContextManager[Any]:
    """Use the fallback instead of the compiled module."""
    patches = [mock.patch.object(_rule, "native", None)]
    patches += [mock.patch.object(*calls_in_python(rule)) for rule in RULES.values()]
    stack = ExitStack()
    for patch in patches:
        stack.enter_context(patch)
    return stack


def update_dtensors(rank: int, folder: Path) -> None:
    """The functions on DTensors: bits as on one process, placements of the states."""
    for rule in RULES.values():
        case = rule.usual | ({"use_shape_scaling": True} if rule.has_shape_scaling else {})
        for way in (nullcontext, without_native):
            for form in ("list", "single", "out", "out is grad"):
                for otherwise in (False, True):
                    if form == "out is grad" and otherwise:
                        continue  # an error: see below
                    lists = Placed(rule, otherwise)
                    check_updates(rule, case, form, lists, way())
            if rule.states and (way is nullcontext or rule.name in ("user_adam", "adam", "signum")):
                with way():
                    refuse_dtensors(rule)
    step_in_a_dtensor()
    call_the_operator()
    tell_autograd_of_steps()
    pass_steps_their_numbers()
    normalize_halved_masters()
    split_masters()
    scale_masters()


def check_updates(
    rule: Rule, case: Case, form: str, lists: Placed, way: AbstractContextManager[Any]
) -> None:
    modified = [lists.placed[name] for name in lists.states()]
    if "out" in form:
        modified.append(lists.placed["out" if form == "out" else "grad"])
    versions = [[t._version for t in tensors] for tensors in modified]
    with way:
        updates, wanted = lists.call(rule, case, form)
    for label, got, expected in [
        ("update", updates, wanted),
        *((name, lists.placed[name], lists.whole[name]) for name in lists.whole),
    ]:
        for i, (a, b) in enumerate(zip(got, expected, strict=True)):
            assert a.dtype == b.dtype, (label, i)
            if label == "out" and form != "out":
                continue
            assert_equal_bits(full(a), b, f"{rule.name} {form} {label}[{i}]")
    # A gradient that is a partial sum is replicated for a rule without states.
    models = lists.placed[next(iter(lists.states()), "grad")]
    for update, state in zip(updates, models, strict=True):
        assert isinstance(update, DTensor) == isinstance(state, DTensor)
        if isinstance(state, DTensor):
            assert rule.states or not any(p.is_partial() for p in update.placements)
            assert not rule.states or update.placements == state.placements
            assert update.stride() == state.stride()
            assert not update.requires_grad
    for before, tensors in zip(versions, modified, strict=True):
        assert all(t._version > v for t, v in zip(tensors, before, strict=True)), form


def refuse_dtensors(rule: Rule) -> None:
    """All processes raise the same error, with the position, before anything is modified."""
    line, plane = meshes()
    state = rule.states[-1]

    def replace(name: str, i: int, value: Callable[[Tensor], Any]) -> Callable[[Placed], None]:
        def apply(lists: Placed) -> None:
            lists.placed[name][i] = value(lists.whole[name][i])

        return apply

    def partial(whole: Tensor) -> DTensor:
        return DTensor.from_local(whole, line, [Partial()])

    rows: list[tuple[Callable[[Placed], None], type[Exception], str]] = [
        (replace(state, 1, torch.clone), TypeError, f"{state}s[1] is a Tensor but grads[1] is a D"),
        (replace("grad", 2, torch.clone), TypeError, "[2] is a DTensor but grads[2] is a Tensor"),
        (replace("out", 2, torch.clone), TypeError, "out[2] is a Tensor but grads[2] is a DTensor"),
        (
            replace(state, 2, lambda t: place(t, plane, [Replicate(), Shard(1)])),
            ValueError,
            f"{state}s[2] is on {plane} but grads[2] is on {line}",
        ),
        (
            # Both processes have equally many of the first rows.
            replace(state, 3, lambda t: place(t[:, :2], line, [Shard(0)])),
            ValueError,
            f"{state}s[3] has shape (1, 2) but grads[3] has shape (1, 4)",
        ),
        (
            replace("out", 2, lambda t: place(t, line, [Shard(0)])),
            ValueError,
            f"out[2] has placements {(Shard(0),)} but {rule.states[0]}s[2] has placements"
            f" {(Shard(1),)}",
        ),
        (
            replace("grad", 1, lambda t: place(t.long(), line, [Shard(0)])),
            TypeError,
            "grads[1] has dtype int64",
        ),
        (lambda lists: lists.placed[state].pop(), ValueError, f"{state}s has 5 tensors but grads"),
    ]
    if len(rule.states) == 1:
        rows.append(
            (replace(state, 0, partial), ValueError, f"{state}s[0] has placements {(Partial(),)}; ")
        )
    for change, error, message in rows:
        lists = Placed(rule)
        change(lists)
        before = [[part(t).clone() for t in tensors] for tensors in lists.placed.values()]
        *arguments, out = lists.placed.values()
        with pytest.raises(error, match=re.escape(message)) as caught:
            rule.function(*arguments, **rule.usual, out=out)
        assert type(caught.value) is error
        for tensors, old in zip(lists.placed.values(), before, strict=True):
            for a, b in zip(tensors, old, strict=True):
                assert_equal_bits(part(a), b, message)
    grad, other = (place(torch.rand(4, 2), m, [Shard(0)] * m.ndim) for m in (line, plane))
    states = [other] * len(rule.states)
    with pytest.raises(ValueError, match=f"^{rule.states[0]} is on "):
        rule.function(grad, *states, **rule.usual)
    if rule.has_shape_scaling:
        flat = place(torch.rand(4), line, [Shard(0)])
        with pytest.raises(ValueError, match="grad has 1 dim"):
            rule.function(flat, flat.clone(), **rule.usual, use_shape_scaling=True)
        nothing = place(torch.empty(0, 0), line, [Replicate()])
        update = rule.function(nothing, nothing.clone(), **rule.usual, use_shape_scaling=True)
        assert update.shape == (0, 0)


def step_in_a_dtensor() -> None:
    rule = RULES["adam"]
    step = place(torch.tensor(3), meshes()[0], [Replicate()])
    for way in (nullcontext, without_native):
        lists = Placed(rule)
        *arguments, _ = lists.placed.values()
        *wholes, _ = lists.whole.values()
        with way():
            got = rule.function(*arguments, **rule.usual | {"step": step})
            plain = rule.function(torch.ones(2), *torch.ones(2, 2), **rule.usual | {"step": step})
        for a, b in zip(got, rule.function(*wholes, **rule.usual | {"step": 3}), strict=True):
            assert_equal_bits(full(a), b, "step")
        assert not isinstance(plain, DTensor)


def call_the_operator() -> None:
    lists = Placed(RULES["lion"])
    grads, exp_avgs, updates = lists.placed.values()
    operator = RULES["lion"].operator
    operator(updates, grads, exp_avgs, 0.9, 0.99)
    grads, exp_avgs, wanted = lists.whole.values()
    operator(wanted, grads, exp_avgs, 0.9, 0.99)
    for a, b in zip(updates, wanted, strict=True):
        assert_equal_bits(full(a), b, "operator")


def pass_steps_their_numbers() -> None:
    """The learning rate and the multiplier may be DTensors, replicated or partial."""
    rank = dist.get_rank()
    line = meshes()[0]
    lr = torch.tensor(0.125)
    rates = [place(lr, line, [Replicate()]), DTensor.from_local(lr / 2, line, [Partial()])]
    for fused in (None, False):
        for rate in rates:
            lists = [[nn.Parameter(torch.ones(3)) for _ in range(2)] for _ in range(2)]
            optimizer, reference = (AdamW(params, lr=0.125, fused=fused) for params in lists)
            optimizer.param_groups[0]["lr"] = rate
            for step in range(3):
                # Processes create states at different steps, which takes one more call.
                for param in (p for params in lists for p in params[: 1 + (step >= rank)]):
                    param.grad = torch.tensor([1.0, -2.0, 3.0])
                optimizer.step(grad_multiplier=rate)
                reference.step(grad_multiplier=0.125)
            for got, wanted in zip(*lists, strict=True):
                assert_equal_bits(got.detach(), wanted.detach(), str((fused, rate)))
                states = optimizer.state[got].values(), reference.state[wanted].values()
                for one, other in zip(*states, strict=True):
                    assert_equal_bits(one, other, str((fused, rate)))


def normalize_halved_masters() -> None:
    """With `frob_normalize` and remainders: processes communicate even without a gradient."""
    for fused in (None, False):
        lists = []
        optimizers = []
        for store in (False, True):
            torch.manual_seed(3)
            wholes = [torch.rand(4, 3).bfloat16() for _ in range(3)]
            lists.append([place(whole, meshes()[0], [Shard(0)]) for whole in wholes])
            options: Any = {"master_weights": True, "store_param_remainders": store}
            groups = [{"params": lists[-1], "fused": fused}]
            optimizers.append(megatron.LaProp(groups, lr=0.1, frob_normalize=True, **options))
        for step in range(3):
            for params, optimizer in zip(lists, optimizers, strict=True):
                for param in params[: 1 + step]:
                    param.grad = torch.ones_like(param)
                optimizer.step()
        for one, other in zip(*lists, strict=True):
            assert_equal_bits(part(other).float(), part(one).float(), str(fused))


def split_masters() -> None:
    """Masters of shards have the same bits split and not, also where a step converts them."""
    for setup in SETUPS:
        for fused in (None, False):
            lists, optimizers = [], []
            for value in ("split", True, "split", True):
                plain = make_params([(5, 4)] * 3, torch.bfloat16)
                lists.append([place(p.detach(), meshes()[0], [Shard(0)]) for p in plain])
                groups = [{"params": lists[-1], "fused": fused}]
                optimizers.append(setup.make(groups, lr=0.01, master_weights=value))
            for step in range(1, 5):
                for params, optimizer in zip(lists, optimizers, strict=True):
                    for p, grad in zip(params, make_grads(plain, step), strict=True):
                        p.grad = place(grad, meshes()[0], [Shard(0)])
                    optimizer.step()
                if step == 2:
                    optimizers[2].param_groups[0]["master_weights"] = True
                    optimizers[3].param_groups[0]["master_weights"] = "split"
            found = [
                [o.state[p]["master_param"] for p in o_params]
                for o, o_params in zip(optimizers, lists, strict=True)
            ]
            int16, float32 = torch.int16, torch.float32
            dtypes = [masters[0].dtype for masters in found]
            assert dtypes == [int16, float32, float32, int16], str(setup)
            wanted = list(map(part, found[1]))
            for params, masters in zip(lists, found, strict=True):
                for p, master, expected in zip(params, masters, wanted, strict=True):
                    assert master.placements == p.placements
                    whole = part(master)
                    if whole.dtype == int16:
                        whole = megatron.merge_master(part(p), whole)
                    assert_equal_bits(whole, expected, str((setup, fused)))


def scale_masters() -> None:
    """A float16 master of a DTensor has a scale per shard; one process has an empty shard."""
    options: dict[str, Any] = {
        "lr": 0.1,
        "master_weights": True,
        "master_weight_dtype": torch.float16,
    }
    for fused in (None, False):
        wholes = [torch.randn(n, 4, generator=torch.Generator().manual_seed(n)) for n in (5, 1)]
        params = [place(whole.bfloat16(), meshes()[0], [Shard(0)]) for whole in wholes]
        shards = [part(param).clone() for param in params]
        optimizers = [
            megatron.FusedAdam([{"params": tensors, "fused": fused}], **options)
            for tensors in (params, shards)
        ]
        for step in range(3):
            for param, shard in zip(params, shards, strict=True):
                param.grad = place(param.full_tensor() * step, meshes()[0], [Shard(0)])
                shard.grad = part(param.grad).clone()
            for optimizer in optimizers:
                optimizer.step()
        for optimizer in optimizers:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for param, shard in zip(params, shards, strict=True):
            assert_equal_bits(part(param), shard, "parameter")
            stored = optimizers[0].state[param]["master_param"]
            assert stored.dtype == torch.float16
            assert stored.placements == param.placements
            assert_equal_bits(part(stored), optimizers[1].state[shard]["master_param"], "stored")
            masters = [
                optimizer.get_unscaled_state(p, "master_param")
                for optimizer, p in zip(optimizers, (param, shard), strict=True)
            ]
            assert_equal_bits(part(masters[0]), masters[1], "master")
            optimizers[0].set_scaled_state(param, "master_param", masters[0])
            assert_equal_bits(part(stored), optimizers[1].state[shard]["master_param"], "set")


def tell_autograd_of_steps() -> None:
    """Autograd notices that a step modified tensors saved for a backward pass."""
    for setup in SETUPS:
        for fused in (None, False):
            weight = nn.Parameter(place(torch.rand(3, 2), meshes()[0], [Shard(0)]))
            weight.grad = place(torch.rand(3, 2), meshes()[0], [Shard(0)])
            optimizer = setup.make([weight], lr=0.1, fused=fused)
            optimizer.step()
            states = [optimizer.state[weight][name] for name in setup.states]
            versions = [tensor._version for tensor in (weight, *states)]
            loss = (weight * weight).sum()
            optimizer.step()
            for tensor, version in zip((weight, *states), versions, strict=True):
                assert tensor._version > version, (str(setup), fused)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


def step_dtensors(rank: int, folder: Path) -> None:
    """Every optimizer on DTensors: results as on one process, and errors for wrong states."""
    line, plane = meshes()
    placed: list[list[Placement]] = [[Shard(0)], [Replicate()], [Shard(1)]]
    ways = (False, None if native is None else True)
    cases: list[Any] = [(s.make, {"fused": way}) for s in SETUPS + VARIANTS for way in ways]
    cases += [(LaProp, {"frob_normalize": True, "lr": 0.1, "fused": way}) for way in ways]
    for make, options in cases:
        plain = make_params([(5, 4)] * 3)
        params = [
            nn.Parameter(place(p.detach(), line, where))
            for p, where in zip(plain, placed, strict=True)
        ]
        optimizer, other = make(params, **options), make(plain, **options)
        for step in (1, 2, 3, 4):
            grads = make_grads(plain, step)
            for p, q, g, where in zip(params, plain, grads, placed, strict=True):
                q.grad = g
                # A gradient that is a partial sum, or sharded differently.
                share = g if rank == 0 else torch.zeros_like(g)
                p.grad = {
                    1: DTensor.from_local(share, line, [Partial()]),
                    2: place(g, line, [Shard(1)]),
                    3: place(g, line, where),
                    4: place(g, plane, [Replicate(), Shard(0)]),
                }[step]
            optimizer.step()
            other.step()
        for p, q, where in zip(params, plain, placed, strict=True):
            torch.testing.assert_close(full(p), q, msg=str(options))
            for name, state in optimizer.state[p].items():
                if name != "step":
                    assert isinstance(state, DTensor), name
                    assert list(state.placements) == where, name
        name = list(optimizer.state[params[1]])[-1]
        before = [full(p).clone() for p in params]
        for wrong in (torch.zeros(5, 4), place(torch.zeros(5, 4), line, [Shard(0)])):
            optimizer.state[params[1]][name] = wrong
            with pytest.raises((TypeError, ValueError), match=f"state {name!r}"):
                optimizer.step()
        assert all(torch.equal(full(p), q) for p, q in zip(params, before, strict=True))
