"""What Megatron-Core's distributed optimizer expects: names, flat buffers, replaced tensors, steps.

With Megatron-Core itself: test_megatron_core.py.
"""

import copy
import inspect
import io
import pickle
import weakref
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from optimizers import assert_same, contents, make_grads
from support import assert_equal_bits
from torch import Tensor

from emerging_optimizers import Adam, megatron, scalar_optimizers
from emerging_optimizers._base import members_of
from emerging_optimizers._hooks import after_update, before_update
from emerging_optimizers._native import native
from emerging_optimizers._norms import KEEP_NORMS
from emerging_optimizers.megatron import (
    FusedAdam,
    MegatronMixin,
    merge_master,
    remainders,
    split_master,
)

CLASSES: list[type[MegatronMixin]] = [
    FusedAdam,
    megatron.AdEMAMix,
    megatron.LaProp,
    megatron.Lion,
    megatron.Signum,
    megatron.SimplifiedAdEMAMix,
]
every_class = pytest.mark.parametrize("cls", CLASSES)
devices = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda, id="cuda")]
)
BF16, F32 = torch.bfloat16, torch.float32
OPTIONS: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1}
# How Megatron makes it where parameters are bfloat16: with masters, and gradients of their own.
AWARE: dict[str, Any] = {**OPTIONS, "master_weights": True, "use_decoupled_grad": True}


@pytest.fixture(autouse=True)
def _no_other_device(_default_device: None) -> Iterator[None]:
    """Make tensors on the CPU, whatever device others are run on; those for CUDA name it."""
    with torch.device("cpu"):
        yield


def make_params(
    dtype: torch.dtype = BF16, device: str = "cpu", sizes: Sequence[int] = (37, 1, 0, 130)
) -> list[Tensor]:
    """Vectors that are no parameters of a module, as shards are."""
    generator = torch.Generator("cpu").manual_seed(7)
    return [torch.randn(n, generator=generator).to(device, dtype) for n in sizes]


def decouple_grads(params: Sequence[Tensor], step: int, dtype: torch.dtype = F32) -> None:
    for param, grad in zip(params, make_grads([p.float() for p in params], step), strict=True):
        param.decoupled_grad = grad.to(param.device, dtype)  # type: ignore[attr-defined]


def run(optimizer: Any, steps: Sequence[int], dtype: torch.dtype = F32) -> None:
    for step in steps:
        decouple_grads(
            [p for group in optimizer.param_groups for p in group["params"]], step, dtype
        )
        optimizer.step()


def masters(optimizer: Any) -> list[Tensor]:
    """The float32 masters, also where their remainders are stored."""
    found = []
    for param in (p for group in optimizer.param_groups for p in group["params"]):
        master = optimizer.get_unscaled_state(param, "master_param")
        found.append(merge_master(param, master) if master.dtype == torch.int16 else master)
    return found


# ---- remainders ----------------------------------------------------------------------------------


def check_split(bits: "np.ndarray[Any, np.dtype[np.uint32]]", shape: Any = -1) -> None:
    """Split float32 numbers of these bits, and put them together again."""
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    whole = np.where(is_nan, np.uint32(0x7FC00000), bits)
    high, low = whole >> 16, whole & 0xFFFF
    rounded = high + (low >= 0x8000)
    assert (rounded <= 0xFFFF).all()
    master = torch.from_numpy(bits.view(np.float32).copy()).reshape(shape)
    param = torch.empty_like(master, dtype=BF16)
    remainder = torch.empty_like(master, dtype=torch.int16)
    split_master(master, param, remainder)
    assert_bits = np.testing.assert_array_equal
    assert_bits(param.view(torch.int16).numpy().view(np.uint16).reshape(-1), rounded)
    assert_bits(remainder.numpy().view(np.uint16).reshape(-1), low)
    again = merge_master(param, remainder)
    assert again.shape == master.shape
    assert_bits(again.numpy().view(np.uint32).reshape(-1), whole)


def test_remainders_of_every_exponent() -> None:
    """Both signs, all exponents: subnormals, infinities and NaNs; ties, and their neighbours."""
    low = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF]
    high = [0, 1, 2, 0x3F, 0x40, 0x7E, 0x7F]
    mantissas = [h << 16 | x for h in high for x in low]
    exponents = np.arange(512, dtype=np.uint32) << np.uint32(23)
    check_split((exponents[:, None] | np.array(mantissas, dtype=np.uint32)).reshape(-1))


@given(st.lists(st.integers(0, 2**32 - 1), max_size=40))
def test_remainders_of_any_bits(bits: list[int]) -> None:
    check_split(np.array(bits, dtype=np.uint32))


@pytest.mark.parametrize("shape", [(), (0,), (2, 3, 4)])
def test_remainders_of_any_shape(shape: tuple[int, ...]) -> None:
    count = int(np.prod(shape))
    check_split(np.arange(0x3F807FF0, 0x3F807FF0 + count, dtype=np.uint32), shape)


def test_a_stored_parameter_is_the_nearest_and_away_from_zero_at_ties() -> None:
    master = torch.tensor([1.00390625, -1.00390625, 3.4e38, -0.0, 1e-45])
    param, remainder = torch.empty(5, dtype=BF16), torch.empty(5, dtype=torch.int16)
    split_master(master, param, remainder)
    wanted = torch.tensor([1.0078125, -1.0078125, torch.inf, -0.0, 0.0], dtype=BF16)
    assert_equal_bits(param, wanted, "parameter")
    assert_equal_bits(merge_master(param, remainder), master, "master")


@devices
@every_class
@pytest.mark.parametrize("fused", [None, False], ids=["native", "plain"])
@pytest.mark.parametrize("dtype", [F32, BF16, torch.float64], ids=str)
def test_remainders_are_as_good_as_masters(
    cls: Any, fused: bool | None, dtype: torch.dtype, device: str
) -> None:
    def make(store: bool) -> Any:
        # On a GPU, the plain path steps remainders beside float64: so masters, here.
        is_plain = dtype == torch.float64 and device != "cpu" and not store
        groups = [
            {"params": params, "fused": False if is_plain else fused}
            for params in (make_params(device=device), make_params(device=device, sizes=(9, 80)))
        ]
        return cls(groups, store_param_remainders=store, **AWARE)

    whole, stored = make(False), make(True)
    run(whole, range(1, 5), dtype)
    run(stored, range(1, 5), dtype)
    assert_same(masters(stored), masters(whole))
    for param, state in stored.state.items():
        assert state["master_param"].dtype == torch.int16
        other = torch.empty_like(param), torch.empty_like(state["master_param"])
        split_master(merge_master(param, state["master_param"]), *other)
        assert_same([param, state["master_param"].view(BF16)], [other[0], other[1].view(BF16)])
    assert {state["step"].item() for state in stored.state.values()} == {4}


@devices
@pytest.mark.skipif(native is None, reason="no native kernels")
def test_the_native_step_makes_no_masters(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(megatron, "merge_master")
    monkeypatch.delattr(megatron, "split_master")
    for use_decoupled_grad in (True, False):
        options = {**AWARE, "use_decoupled_grad": use_decoupled_grad}
        optimizer = FusedAdam(make_params(device=device), store_param_remainders=True, **options)
        optimizer.param_groups[0]["fused"] = True
        for param in optimizer.param_groups[0]["params"]:
            param.grad = torch.ones_like(param)
        run(optimizer, [1, 2])
        assert {state["step"].item() for state in optimizer.state.values()} == {2}


@pytest.mark.parametrize("fused", [None, False], ids=["native", "plain"])
def test_masters_that_do_not_move_keep_their_halves(fused: bool | None) -> None:
    """Where the learning rate is 0, be they NaNs of any kind."""
    optimizer = FusedAdam(make_params(sizes=[40]), store_param_remainders=True, **AWARE)
    run(optimizer, [1])
    (param,) = optimizer.param_groups[0]["params"]
    remainder = optimizer.state[param]["master_param"]
    param.view(torch.int16)[:2] = torch.tensor([0x7FC1, -1])
    remainder[:2] = torch.tensor([3, -5])
    before = param.clone(), remainder.clone()
    optimizer.param_groups[0].update(lr=0.0, fused=fused)
    run(optimizer, [2])
    assert torch.equal(param.view(torch.int16), before[0].view(torch.int16))
    assert torch.equal(remainder, before[1])


def test_a_wrong_gradient_changes_nothing_where_remainders_are_stored() -> None:
    params = make_params(sizes=(3, 4))
    optimizer = FusedAdam(params, store_param_remainders=True, **AWARE)
    run(optimizer, [1])
    before = contents(optimizer)
    decouple_grads(params, 2)
    params[1].decoupled_grad = torch.ones(5)  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match=r"shape \(4,\) but its gradient has shape \(5,\)"):
        optimizer.step()
    assert_same([t.float() for t in contents(optimizer)], [t.float() for t in before])


# ---- the constructor -----------------------------------------------------------------------------


def test_the_constructor_of_transformer_engine() -> None:
    parameters = list(inspect.signature(FusedAdam).parameters.values())
    assert [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == [
        ("params", inspect.Parameter.empty),
        ("lr", 1e-3),
        ("betas", (0.9, 0.999)),
        ("eps", 1e-8),
        ("weight_decay", 0.0),
        ("amsgrad", False),
    ]
    assert [(p.name, p.default) for p in parameters if p.kind is p.KEYWORD_ONLY] == [
        ("bias_correction", True),
        ("adam_w_mode", True),
        ("capturable", False),
        ("master_weights", False),
        ("master_weight_dtype", F32),
        ("exp_avg_dtype", F32),
        ("exp_avg_sq_dtype", F32),
        ("use_decoupled_grad", False),
        ("store_param_remainders", False),
        ("set_grad_none", None),
    ]


@pytest.mark.parametrize("adam_w_mode", [True, False])
@pytest.mark.parametrize("bias_correction", [True, False])
def test_its_arguments_are_adams(adam_w_mode: bool, bias_correction: bool) -> None:
    params, others = make_params(F32), make_params(F32)
    optimizer = FusedAdam(
        params,
        bias_correction=bias_correction,
        adam_w_mode=adam_w_mode,
        use_decoupled_grad=True,
        **OPTIONS,
    )
    other = scalar_optimizers.Adam(
        others,
        correct_bias=bias_correction,
        weight_decay_method="decoupled" if adam_w_mode else "l2",
        **OPTIONS,
    )
    for step in (1, 2, 3):
        decouple_grads(params, step)
        for param, grad in zip(others, make_grads(others, step), strict=True):
            param.grad = grad
        optimizer.step()
        other.step()
    assert_same(contents(optimizer), contents(other))


def test_a_group_has_the_names_of_transformer_engine() -> None:
    """Also as Megatron's hybrid optimizer makes one: of groups that hold everything."""
    group = {"params": make_params(), "bias_correction": False, "lr": 0.5, "pin_cpu_grads": True}
    optimizer = FusedAdam([group, {"params": make_params(F32)}])
    optimizer.add_param_group({"params": make_params(sizes=(3,)), "bias_correction": False})
    found = [group["bias_correction"] for group in optimizer.param_groups]
    assert found == [False, True, False]
    assert not any("correct_bias" in group for group in optimizer.param_groups)
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 1e-3, 1e-3]


def test_amsgrad_is_refused() -> None:
    with pytest.raises(ValueError, match="amsgrad=True is not supported"):
        FusedAdam(make_params(), amsgrad=True)


@pytest.mark.parametrize("name", ["exp_avg_dtype", "exp_avg_sq_dtype", "master_weight_dtype"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn, torch.float64])
def test_a_dtype_that_is_refused_is_named(name: str, dtype: torch.dtype) -> None:
    expected = f"^{name}={dtype} is not supported; expected torch.float32"
    with pytest.raises(ValueError, match=expected):
        FusedAdam(make_params(), **{name: dtype})  # type: ignore[arg-type]


def test_half_masters_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^master_weight_dtype=torch\.float16 is not supported"):
        FusedAdam(make_params(), master_weights=True, master_weight_dtype=torch.float16)


@every_class
@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16])
def test_dtypes_of_states(cls: Any, dtype: torch.dtype) -> None:
    optimizer = cls(make_params(), exp_avg_dtype=dtype, exp_avg_sq_dtype=BF16, **AWARE)
    run(optimizer, [1, 2])
    for state in optimizer.state.values():
        for name in state.keys() - {"step"}:
            wanted = {"exp_avg_sq": BF16, "master_param": F32}.get(name, dtype)
            assert state[name].dtype == wanted, name


@devices
def test_remainders_of_a_capturable_one(device: str) -> None:
    whole, stored = (
        FusedAdam(
            make_params(device=device), capturable=True, store_param_remainders=store, **AWARE
        )
        for store in (False, True)
    )
    run(whole, [1, 2, 3])
    run(stored, [1, 2, 3])
    assert_same(masters(stored), masters(whole))
    assert {state["step"].device.type for state in stored.state.values()} == {device}


@devices
def test_a_capturable_one_has_tensors_for_learning_rates(device: str) -> None:
    params = make_params(F32, device)
    optimizer = FusedAdam([{"params": params[:2]}, {"params": params[2:]}], lr=0.5, capturable=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert [rate.item() for rate in rates] == [0.5, 0.5]
    assert rates[0] is not rates[1]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    # Not read by the host, where it is on a device.
    assert [int(group["step"]) for group in optimizer.param_groups] == [1, 1]
    assert {type(group["step"]) for group in optimizer.state_dict()["param_groups"]} == {int}
    assert all(rate.device == params[0].device for rate in rates)


# ---- gradients -----------------------------------------------------------------------------------


@devices
@every_class
@pytest.mark.parametrize("grad_dtype", [F32, BF16])
@pytest.mark.parametrize("fused", [None, False], ids=["native", "plain"])
def test_decoupled_gradients(
    cls: Any, grad_dtype: torch.dtype, fused: bool | None, device: str
) -> None:
    """They are read in place of ``.grad``, whatever that is; where there is none, nothing moves."""
    params, others = make_params(device=device), make_params(device=device)
    optimizer = cls([{"params": params, "fused": fused}], **AWARE)
    other = cls([{"params": others, "fused": fused}], master_weights=True, **OPTIONS)
    for step in (1, 2, 3):
        decouple_grads(params, step, grad_dtype)
        for i, (param, same) in enumerate(zip(params, others, strict=True)):
            if i == step:
                param.decoupled_grad = None  # type: ignore[attr-defined]
                param.grad = torch.ones_like(param)
                same.grad = None
            else:
                assert param.decoupled_grad is not None  # type: ignore[attr-defined]
                same.grad_dtype = grad_dtype
                same.grad = param.decoupled_grad.clone()  # type: ignore[attr-defined]
        optimizer.step()
        other.step()
    assert_same(contents(optimizer), contents(other))


def test_a_parameter_without_the_attribute_has_no_gradient() -> None:
    params = make_params()
    optimizer = FusedAdam(params, **AWARE)
    optimizer.step()
    assert_same(params, make_params())
    assert optimizer.param_groups[0]["step"] == 1


@pytest.mark.parametrize("set_grad_none", [None, True, False])
@pytest.mark.parametrize("set_to_none", [None, True, False])
@pytest.mark.parametrize("decoupled", [False, True])
def test_zero_grad(set_grad_none: bool | None, set_to_none: bool | None, decoupled: bool) -> None:
    params = make_params(F32, sizes=(2, 3))
    options = {"use_decoupled_grad": decoupled, "set_grad_none": set_grad_none}
    if set_grad_none is None:
        optimizer = FusedAdam(params, **options)  # type: ignore[arg-type]
    else:
        with pytest.warns(DeprecationWarning, match=r"FusedAdam\(set_grad_none=\.\.\.\)"):
            optimizer = FusedAdam(params, **options)  # type: ignore[arg-type]
    name = "decoupled_grad" if decoupled else "grad"
    setattr(params[0], name, torch.ones(2))
    setattr(params[1], name, None)
    if None not in (set_grad_none, set_to_none) and set_grad_none != set_to_none:
        with pytest.raises(ValueError, match=f"set_to_none={set_to_none}.*={set_grad_none}"):
            optimizer.zero_grad(set_to_none)
        return
    optimizer.zero_grad(set_to_none)
    to_none = next((x for x in (set_grad_none, set_to_none) if x is not None), True)
    grad = getattr(params[0], name)
    assert (grad is None) if to_none else torch.equal(grad, torch.zeros(2))
    assert getattr(params[1], name) is None


# ---- flat buffers --------------------------------------------------------------------------------

SHAPES = ((5, 7), (7,), (3, 11), (1,), (40, 3))


class FlatBuffer:
    """Bfloat16 parameters in one buffer, of which each of some ranks has a part, and gradients.

    The parts begin and end anywhere, also inside of parameters.
    """

    def __init__(self, num_ranks: int) -> None:
        sizes = [int(np.prod(shape)) for shape in SHAPES]
        ends = np.cumsum(sizes)
        total = int(ends[-1])
        # Uneven on purpose; the last rank may have little.
        cuts = sorted({0, total, *(total * r // num_ranks | 1 for r in range(1, num_ranks))})
        self.parts = list(pairwise(cuts))
        self.params = make_params(sizes=[total])[0]
        self.grads = torch.zeros(total)
        self.ranges = list(zip(ends - sizes, ends, strict=True))

    def shards(self, rank: int) -> list[tuple[Tensor, slice]]:
        """What a rank has of each parameter, as views of the buffer, and where that is."""
        start, end = self.parts[rank]
        pieces = [slice(max(start, a), min(end, b)) for a, b in self.ranges]
        return [(self.params[piece], piece) for piece in pieces if piece.start < piece.stop]

    def reduce_scatter(self, step: int, num_ranks: int) -> list[Tensor]:
        """Each rank's part of the sum of all ranks' gradients."""
        parts = [make_grads([self.grads], 100 * step + r)[0] for r in range(3)]
        self.grads = torch.stack(parts).sum(0)
        return [self.grads[start:end] for start, end in self.parts]


@every_class
@pytest.mark.parametrize("num_ranks", [2, 3, 5, 8])
@pytest.mark.parametrize("store_param_remainders", [False, True], ids=["masters", "remainders"])
def test_shards_of_flat_buffers(cls: Any, num_ranks: int, store_param_remainders: bool) -> None:
    """The bits are those of one process, wherever the boundaries are."""
    options = {**AWARE, "store_param_remainders": store_param_remainders}
    if cls is megatron.Signum:
        options["nesterov"] = True
    alone, sharded = FlatBuffer(1), FlatBuffer(num_ranks)
    assert any(start % 2 for start, _ in sharded.parts)
    whole = [alone.params[a:b] for a, b in alone.ranges]
    reference = cls(whole, **options)
    ranks = []
    for rank in range(num_ranks):
        # Made with the model's parameters, as Megatron does, and given the shards then.
        optimizer = cls(make_params(sizes=(35, 7)), **options)
        shards = [shard for shard, _ in sharded.shards(rank)]
        optimizer.param_groups = [{**optimizer.param_groups[0], "params": shards}]
        optimizer.load_state_dict(optimizer.state_dict())
        ranks.append(optimizer)
    for step in (1, 2, 3, 4):
        alone.reduce_scatter(step, 1)
        grads = sharded.reduce_scatter(step, num_ranks)
        for param, (a, b) in zip(whole, alone.ranges, strict=True):
            param.decoupled_grad = alone.grads[a:b]  # type: ignore[attr-defined]
        reference.step()
        gathered = torch.full_like(sharded.params, torch.nan)
        for rank, optimizer in enumerate(ranks):
            start, end = sharded.parts[rank]
            shards = optimizer.param_groups[0]["params"]
            for shard, (_, piece) in zip(shards, sharded.shards(rank), strict=True):
                shard.decoupled_grad = grads[rank][piece.start - start : piece.stop - start]
            optimizer.step()
            gathered[start:end] = sharded.params[start:end]
        sharded.params.copy_(gathered)  # the all-gather
    assert_equal_bits(sharded.params, alone.params, "parameters")
    for name in reference.state[whole[0]].keys() - {"step"}:
        parts = [o.state[p][name] for o in ranks for p in o.param_groups[0]["params"]]
        wanted = torch.cat([reference.state[p][name] for p in whole])
        as_float = [
            t.view(BF16) if t.dtype == torch.int16 else t for t in (torch.cat(parts), wanted)
        ]
        assert_equal_bits(*as_float, name)


# ---- what is replaced and moved between steps ----------------------------------------------------


@every_class
def test_parameters_replaced_after_construction(cls: Any) -> None:
    params, others = make_params(), make_params()
    optimizer, other = cls(make_params(F32), **AWARE), cls(others, **AWARE)
    optimizer.param_groups[0]["params"][:] = params
    run(optimizer, [1, 2])
    run(other, [1, 2])
    assert_same(contents(optimizer), contents(other))


@devices
@every_class
@pytest.mark.parametrize("store_param_remainders", [False, True], ids=["masters", "remainders"])
def test_data_and_states_moved_away_and_back(
    cls: Any, store_param_remainders: bool, device: str
) -> None:
    def make() -> Any:
        params = make_params(device=device) + make_params(F32, device, sizes=(5,))
        return cls(params, store_param_remainders=store_param_remainders, **AWARE)

    optimizer, other = make(), make()
    run(optimizer, [1, 2])
    run(other, range(1, 5))
    for target in ("cpu", device):
        for param in optimizer.param_groups[0]["params"]:
            param.data = param.data.to(target, copy=True)
        for state in optimizer.state.values():
            for name, value in state.items():
                if value.device.type != target or name == "step":
                    state[name] = value.to("cpu" if name == "step" else target, copy=True)
    run(optimizer, [3, 4])
    assert_same(
        [t.float() for t in contents(optimizer)], [t.float() for t in contents(other)], "moved"
    )


# ---- steps ---------------------------------------------------------------------------------------


@every_class
@pytest.mark.parametrize("fused", [None, False], ids=["native", "plain"])
def test_a_groups_step_is_its_parameters(cls: Any, fused: bool | None) -> None:
    first, second = make_params(), make_params()
    groups = [{"params": first, "fused": fused}, {"params": second, "fused": fused}]
    optimizer = cls(groups, **AWARE)
    for step in (1, 2, 3):
        decouple_grads(first, step)
        decouple_grads(second, step)
        if step == 2:
            for param in second:
                param.decoupled_grad = None  # type: ignore[attr-defined]
        optimizer.step()
        steps = [{optimizer.state[p]["step"].item() for p in ps} for ps in (first, second)]
        assert [{group["step"]} for group in optimizer.param_groups] == steps
    assert steps == [{3}, {3}]


@every_class
@devices
@pytest.mark.parametrize("capturable", [False, True])
def test_steps_of_a_group_that_is_elsewhere(cls: Any, device: str, capturable: bool) -> None:
    """A process that has none of a group's parameters saves the step that others go on from."""

    def make(*groups: list[Tensor]) -> Any:
        options = {**OPTIONS, "use_decoupled_grad": True, "capturable": capturable}
        return cls([{"params": params} for params in groups], **options)

    params = make_params(F32, device)
    here, there = make([], []), make([], params)
    for step in (1, 2, 3, 4, 5):
        decouple_grads(params, step)
        for optimizer in (here, there):
            if step < 5:
                optimizer.found_inf = torch.tensor(float(step == 2), device=device)
            optimizer.step()
            vars(optimizer).pop("found_inf", None)
    assert [int(group["step"]) for group in here.param_groups] == [4, 4]
    saved = copy.deepcopy(there.state_dict())
    assert [group["step"] for group in saved["param_groups"]] == [4, 4]
    for state in saved["state"].values():
        del state["step"]
    for group, from_here in zip(
        saved["param_groups"], here.state_dict()["param_groups"], strict=True
    ):
        group["step"] = from_here["step"]

    resumed = make([], [param.clone() for param in params])
    resumed.load_state_dict(saved)
    run(there, [6])
    run(resumed, [6])
    assert_same(contents(resumed), contents(there))
    assert there.state[params[0]]["step"].item() == 5


@devices
@pytest.mark.parametrize("capturable", [False, True])
def test_a_group_that_has_lost_its_parameters_counts_alone(device: str, capturable: bool) -> None:
    params = make_params(F32, device)
    groups = [{"params": params}, {"params": []}]
    optimizer = FusedAdam(groups, use_decoupled_grad=True, capturable=capturable, **OPTIONS)
    run(optimizer, [1, 2])
    first, second = optimizer.param_groups
    first["params"], second["params"] = second["params"], first["params"]
    run(optimizer, [3, 4])
    assert {state["step"].item() for state in optimizer.state.values()} == {4}
    assert [int(first["step"]), int(second["step"])] == [4, 4]


def test_a_groups_step_counts_where_parameters_differ() -> None:
    """Older versions saved a step of each parameter, and their largest as the group's."""
    params, others = make_params(), make_params()
    optimizer, other = FusedAdam(params, **AWARE), FusedAdam(others, **AWARE)
    run(optimizer, [1, 2, 3])
    run(other, [1, 2, 3])
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["step"] = torch.tensor(1.0)
    loaded = FusedAdam(params, **AWARE)
    loaded.load_state_dict(saved)
    run(loaded, [4])
    run(other, [4])
    assert_same(contents(loaded), contents(other))


def saved_by_transformer_engine(optimizer: Any) -> dict[str, Any]:
    """A state dict as TransformerEngine's optimizer saves it: one step a group, float32 states."""
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        kept = ("lr", "bias_correction", "betas", "eps", "weight_decay", "params", "step")
        for key in group.keys() - set(kept):
            del group[key]
    for state in saved["state"].values():
        del state["step"]
        for name, value in state.items():
            state[name] = value if value.dtype == torch.int16 else value.float()
    return saved


@pytest.mark.parametrize("store_param_remainders", [False, True], ids=["masters", "remainders"])
@pytest.mark.parametrize("exp_avg_dtype", [F32, BF16])
def test_a_checkpoint_of_transformer_engine(
    store_param_remainders: bool, exp_avg_dtype: torch.dtype
) -> None:
    options = {
        **AWARE,
        "store_param_remainders": store_param_remainders,
        "exp_avg_dtype": exp_avg_dtype,
    }
    params = make_params()
    optimizer, resumed = FusedAdam(params, **options), FusedAdam(make_params(), **AWARE)
    run(optimizer, [1, 2, 3])
    resumed = FusedAdam([p.clone() for p in params], **{**options, "lr": 0.5})
    resumed.load_state_dict(saved_by_transformer_engine(optimizer))
    assert resumed.param_groups[0]["step"] == 3
    assert resumed.param_groups[0]["lr"] == 0.05
    run(optimizer, [4])
    run(resumed, [4])
    assert_same(
        [t.float() for t in contents(resumed)], [t.float() for t in contents(optimizer)], "resumed"
    )


@every_class
def test_a_loaded_groups_step_is_right(cls: Any) -> None:
    """Megatron takes a step with zeros to make states, loads groups, and then each state."""
    params, others = make_params(F32), make_params(F32)
    options = {**OPTIONS, "use_decoupled_grad": True}
    optimizer, other = cls(params, **options), cls(others, **options)
    run(other, [1, 2, 3])
    for param in params:
        param.decoupled_grad = torch.zeros_like(param)  # type: ignore[attr-defined]
    optimizer.step()
    saved = optimizer.state_dict()
    saved["param_groups"][0]["step"] = 3
    optimizer.load_state_dict(saved)
    for param, same in zip(params, others, strict=True):
        # It copies what there is, and has no step to copy.
        wanted = {"param": same, **other.state[same]}
        del wanted["step"]
        for name, value in {"param": param, **optimizer.state[param]}.items():
            value.copy_(wanted[name])
    assert optimizer.state_dict()["param_groups"][0]["step"] == 3
    assert {s["step"].item() for s in optimizer.state_dict()["state"].values()} == {3}
    run(optimizer, [4])
    run(other, [4])
    assert_same(sorted_contents(optimizer), sorted_contents(other))


def sorted_contents(optimizer: Any) -> list[Tensor]:
    for param, state in optimizer.state.items():
        optimizer.state[param] = dict(sorted(state.items()))
    return contents(optimizer)


# ---- states --------------------------------------------------------------------------------------


@every_class
def test_names(cls: Any) -> None:
    """It looks for exp_avg in all states, and for exp_avg_sq in those of adaptive rules."""
    params = make_params()
    optimizer = cls(params, **AWARE)
    optimizer.initialize_state(params[0])
    names = set(optimizer.state[params[0]])
    assert {"step", "exp_avg", "master_param"} <= names
    assert ("exp_avg_sq" in names) == (cls not in (megatron.Lion, megatron.Signum))
    assert names - {"step", "exp_avg", "exp_avg_sq", "master_param"} == (
        {"exp_avg_slow"} if cls is megatron.AdEMAMix else set()
    )


def test_ademamix_under_other_names_is_the_same() -> None:
    params, others = make_params(F32), make_params(F32)
    options = {**OPTIONS, "num_beta_slow_warmup_steps": 3}
    optimizer = megatron.AdEMAMix(params, use_decoupled_grad=True, **options)
    other = scalar_optimizers.AdEMAMix(others, **options)
    for step in (1, 2):
        decouple_grads(params, step)
        for param, same in zip(params, others, strict=True):
            same.grad = param.decoupled_grad  # type: ignore[attr-defined]
        optimizer.step()
        other.step()
    assert_same(contents(optimizer), contents(other))
    with pytest.raises(ValueError, match="has no state 'exp_avg_fast'; it has 'exp_avg', 'exp_avg"):
        optimizer.add_param_group({"params": [], "state_dtype": {"exp_avg_fast": BF16}})


@every_class
@pytest.mark.parametrize("how", ["initialize_state", "_init_group", "by hand"])
def test_states_made_without_gradients(cls: Any, how: str) -> None:
    params, others = make_params(), make_params()
    optimizer, other = cls(params, **AWARE), cls(others, **AWARE)
    if how == "initialize_state":
        for param in params:
            optimizer.initialize_state(param)
    elif how == "_init_group":
        optimizer._init_group(optimizer.param_groups[0], skip_non_grad_params=True)
        assert not optimizer.state
        for group in optimizer.param_groups:
            optimizer._init_group(group, skip_non_grad_params=False)
    else:
        for param in params:
            optimizer.state[param]["exp_avg"] = torch.zeros_like(param, dtype=F32)
            optimizer.state[param]["exp_avg_sq"] = torch.zeros_like(param, dtype=F32)
    assert len(optimizer.state) == len(params)
    run(optimizer, [1, 2])
    run(other, [1, 2])
    for param, same in zip(params, others, strict=True):
        wanted = other.state[same]
        assert_same([optimizer.state[param][name] for name in wanted], list(wanted.values()))
    assert_same(params, others)


def test_initialize_state_starts_anew() -> None:
    params = make_params()
    optimizer = FusedAdam(params, store_param_remainders=True, **AWARE)
    run(optimizer, [1, 2])
    optimizer.initialize_state(params[0], True)
    state = optimizer.state[params[0]]
    assert state["step"].item() == 2  # which is the group's
    assert all(not value.any() for name, value in state.items() if name != "step")
    with pytest.raises(
        ValueError, match=r"store_param_remainders=False, but this optimizer stores"
    ):
        optimizer.initialize_state(params[0], False)
    with pytest.raises(ValueError, match=r"in none of the optimizer's groups"):
        optimizer.initialize_state(torch.zeros(3))
    plain = FusedAdam(params)
    with pytest.raises(ValueError, match=r"store_param_remainders=True, but .* does not store"):
        plain.initialize_state(params[0], True)


@every_class
@pytest.mark.parametrize("store_param_remainders", [False, True], ids=["masters", "remainders"])
def test_states_from_one_optimizer_to_another(cls: Any, store_param_remainders: bool) -> None:
    options = {**AWARE, "exp_avg_dtype": BF16, "store_param_remainders": store_param_remainders}
    params = make_params()
    optimizer = cls(params, **options)
    run(optimizer, [1, 2])
    others = [p.clone() for p in params]
    other = cls(others, **options)
    for param, same in zip(params, others, strict=True):
        for name, stored in optimizer.state[param].items():
            value = optimizer.get_unscaled_state(param, name)
            assert value.dtype == (torch.int16 if stored.dtype == torch.int16 else F32)
            assert optimizer.get_unscaled_state(param, name, skip_unscale=True) is stored
            # As Megatron's fully reshardable checkpoints have them.
            other.set_scaled_state(same, name, value.float())
    run(optimizer, [3])
    run(other, [3])
    assert_same([t.float() for t in contents(other)], [t.float() for t in contents(optimizer)])


def test_a_float32_parameter_is_its_own_master() -> None:
    """Megatron asks for the master of every parameter."""
    params = make_params(F32, sizes=(3, 4))
    optimizer = FusedAdam(params, **AWARE)
    run(optimizer, [1])
    for _ in range(2):
        for param in params:
            param.data = param.data.clone()
            assert_equal_bits(optimizer.get_unscaled_state(param, "master_param"), param, "master")
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        run(optimizer, [2])
    assert not optimizer.state_dict()["state"][0]["master_param"].requires_grad
    optimizer.set_scaled_state(params[0], "master_param", torch.ones(3))
    assert params[0].tolist() == [1, 1, 1]


def test_errors_of_states() -> None:
    params = make_params()
    whole, stored = (FusedAdam(params, store_param_remainders=s, **AWARE) for s in (False, True))
    whole.set_scaled_state(params[0], "padding", False)  # type: ignore[arg-type]
    assert not whole.state
    with pytest.raises(KeyError, match="the parameter has no state 'exp_avg'"):
        whole.get_unscaled_state(params[0], "exp_avg")
    with pytest.raises(KeyError, match="FusedAdam has no state 'exp_avg_slow'"):
        whole.set_scaled_state(params[0], "exp_avg_slow", torch.zeros(37))
    with pytest.raises(ValueError, match=r"'exp_avg' has shape \(1,\); expected \(37,\)"):
        whole.set_scaled_state(params[0], "exp_avg", torch.zeros(1))
    remainder = torch.zeros(37, dtype=torch.int16)
    with pytest.raises(TypeError, match=r"dtype torch\.int16, but this optimizer stores float32"):
        whole.set_scaled_state(params[0], "master_param", remainder)
    with pytest.raises(TypeError, match=r"dtype torch\.float32, but this optimizer stores int16"):
        stored.set_scaled_state(params[0], "master_param", torch.full((37,), 0.5))
    run(stored, [1])
    with pytest.raises(TypeError, match=r"dtype torch\.int16, but this optimizer stores float32"):
        whole.load_state_dict(stored.state_dict())
    stored.state[params[0]]["master_param"] = torch.zeros(37)
    decouple_grads(params, 2)
    with pytest.raises(TypeError, match=r"dtype torch\.float32, but this optimizer stores int16"):
        stored.step()


@every_class
@pytest.mark.parametrize("how", ["pickle", "deepcopy", "state dict"])
def test_copies_go_on(cls: Any, how: str) -> None:
    optimizer = cls(make_params(), store_param_remainders=True, **AWARE)
    run(optimizer, [1, 2])
    if how == "pickle":
        other = pickle.loads(pickle.dumps(optimizer))
    elif how == "deepcopy":
        other = copy.deepcopy(optimizer)
    else:
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        params = [p.clone() for p in optimizer.param_groups[0]["params"]]
        other = cls(params, store_param_remainders=True, **AWARE)
        other.load_state_dict(torch.load(file, weights_only=True))
    run(optimizer, [3])
    run(other, [3])
    assert_same([t.float() for t in contents(other)], [t.float() for t in contents(optimizer)])
    assert other.param_groups[0]["step"] == 3


def test_what_is_stored_how_is_not_loaded() -> None:
    """A loaded group says how to go on, but not what this optimizer reads and stores."""
    params = make_params()
    optimizer = FusedAdam(params, **AWARE)
    run(optimizer, [1])
    other = FusedAdam(params, lr=0.5, master_weights=True)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == 0.05
    assert not other.param_groups[0]["use_decoupled_grad"]


def make_normalized(store_param_remainders: bool, fused: bool | None, sizes: Any) -> Any:
    groups = [{"params": make_params(sizes=sizes), "fused": fused}]
    return megatron.LaProp(
        groups,
        lr=0.1,
        frob_normalize=True,
        master_weights=True,
        use_decoupled_grad=True,
        store_param_remainders=store_param_remainders,
    )


@pytest.mark.parametrize("fused", [None, False], ids=["native", "plain"])
def test_laprop_keeps_the_norms_of_halved_masters(fused: bool | None) -> None:
    whole, stored = (make_normalized(store, fused, (50, 60)) for store in (False, True))
    norms = [master.float().norm() for master in make_params(sizes=(50, 60))]
    for optimizer in (whole, stored):
        run(optimizer, [1, 2, 3])
    assert_same(masters(stored), masters(whole))
    for master, norm in zip(masters(stored), norms, strict=True):
        torch.testing.assert_close(master.norm(), norm)


def test_laprop_needs_no_memory_for_all_masters(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = make_normalized(True, None, [40] * 10)
    run(optimizer, [1])
    alive: set[int] = set()
    most = 0
    merge = remainders.merge_master

    def measured(*arguments: Any) -> Tensor:
        nonlocal most
        master = merge(*arguments)
        alive.add(id(master))
        weakref.finalize(master, alive.discard, id(master))
        most = max(most, len(alive))
        return master

    monkeypatch.setattr(remainders, "merge_master", measured)
    run(optimizer, [2])
    assert 0 < most <= 2


def test_halves_that_are_scaled_by_1_keep_every_bit() -> None:
    optimizer = make_normalized(True, None, [3])
    run(optimizer, [1])
    (group,) = optimizer.param_groups
    (param,) = group["params"]
    remainder = optimizer.state[param]["master_param"]
    param.view(torch.int16).copy_(torch.tensor([0x7FC1, -1, 0x7F80]))
    remainder.copy_(torch.tensor([3, -5, 3]))
    before = param.clone(), remainder.clone()
    members = members_of(optimizer, group)
    around = KEEP_NORMS, optimizer._masters, members
    after_update(*around, before_update(*around))
    assert torch.equal(param.view(torch.int16), before[0].view(torch.int16))
    assert torch.equal(remainder, before[1])


@pytest.mark.parametrize("cls", [FusedAdam, megatron.LaProp])
@pytest.mark.parametrize("store", [False, True])
def test_masters_that_are_stored_otherwise_than_before(cls: Any, store: bool) -> None:
    optimizer = cls(make_params(), store_param_remainders=store, **AWARE)
    run(optimizer, [1])
    before = [tensor.clone() for tensor in contents(optimizer)]
    for group in optimizer.param_groups:
        group["store_param_remainders"] = not store
        if "frob_normalize" in group:
            group["frob_normalize"] = True
    with pytest.raises(
        TypeError, match="set store_param_remainders as it was when the state was saved"
    ):
        run(optimizer, [2])
    assert_same([t.float() for t in contents(optimizer)], [t.float() for t in before])


def test_plain_optimizers_do_not_take_remainders() -> None:
    saved = FusedAdam(make_params(), store_param_remainders=True, **AWARE)
    run(saved, [1])
    other = Adam(make_params(), master_weights=True)
    with pytest.raises(TypeError, match="but this optimizer stores float32 masters"):
        other.load_state_dict(saved.state_dict())
    # But what was made masters of them, without the options.
    state_dict = saved.state_dict()
    for state, master in zip(state_dict["state"].values(), masters(saved), strict=True):
        state["master_param"] = master
    other = Adam(make_params(), master_weights=True, fused=True if native else None)
    other.load_state_dict(state_dict)
    assert "store_param_remainders" not in other.param_groups[0]
    for param in other.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    other.step()


@pytest.mark.parametrize("store_param_remainders", [False, True], ids=["masters", "remainders"])
def test_parameters_that_require_gradients(store_param_remainders: bool) -> None:
    """Leaves, and views of leaves, which Megatron makes of float32 parameters' shards."""

    def make(requires_grad: bool) -> Any:
        params = [p.requires_grad_(requires_grad) for p in make_params()]
        wide = torch.linspace(-1, 1, 12).reshape(3, 4).requires_grad_(requires_grad)
        optimizer = FusedAdam(params, store_param_remainders=store_param_remainders, **AWARE)
        optimizer.param_groups[0]["params"].append(wide.view(-1)[1:8])
        return optimizer

    optimizer, other = make(True), make(False)
    for each in (optimizer, other):
        for param in each.param_groups[0]["params"]:
            each.initialize_state(param)
        run(each, [1, 2])
        saved = copy.deepcopy(each.state_dict())
        for param in each.param_groups[0]["params"][:-1]:
            each.set_scaled_state(param, "exp_avg", each.get_unscaled_state(param, "exp_avg") / 2)
        each.load_state_dict(saved)
        run(each, [3])
    shards = [each.param_groups[0]["params"][-1] for each in (optimizer, other)]
    assert shards[0].grad_fn is not None
    assert_same(*([t.detach().float() for t in contents(each)] for each in (optimizer, other)))


@pytest.mark.skipif(native is None, reason="no native kernels")
def test_the_native_steps_gradients_and_names_are_checked() -> None:
    optimizer = FusedAdam(make_params(F32), **AWARE)
    run(optimizer, [1])
    assert native is not None
    rule = optimizer._group_rule
    call = (optimizer.state, optimizer.param_groups, [0])
    numbers = (None, None, None, 0)
    with pytest.raises(TypeError, match=r"the gradient given for params\[0\] must be a Tensor"):
        native.step(*call, [rule], numbers, [["no tensor", None, None, None]], False)
    with pytest.raises(ValueError, match="there are 1 gradients for 4 parameters"):
        native.step(*call, [rule], numbers, [[None]], False)
    short = rule._replace(state_names=rule.state_names[:1])
    with pytest.raises(ValueError, match="state_names has 1 names; expected 2"):
        native.step(*call, [short], numbers, None, False)
