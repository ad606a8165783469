"""State dicts contain types that torch's tools accept, and tensors independent of defaults."""

import copy
import io
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from optimizers import MEGATRON as TABLE
from optimizers import SETUPS, Setup, assert_same, contents, make_params, run
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from emerging_optimizers import AdamW, AdEMAMix, megatron

BF16, F32 = torch.bfloat16, torch.float32
MEGATRON = [cls for cls in TABLE.values() if cls._state_names]


def _make_with_dtype(setup: Setup) -> Any:
    return lambda params: setup.make(params, state_dtype=F32)


def _make_with_dtypes(setup: Setup) -> Any:
    return lambda params: setup.make(params, state_dtype={setup.states[0]: BF16})


def _make_with_split_masters(setup: Setup) -> Any:
    return lambda params: setup.make(params, state_dtype=F32, master_weights="split")


def _make_for_megatron(cls: Any) -> Any:
    return lambda params: cls(params, exp_avg_dtype=BF16, master_weights=True)


MAKERS = [
    # PyTorch's tools do not load full state dicts without any state of a dimension.
    *(pytest.param(_make_with_dtype(s), id=f"{s}-dtype") for s in SETUPS if s.states),
    *(pytest.param(_make_with_dtypes(s), id=f"{s}-dtypes") for s in SETUPS if s.states),
    *(pytest.param(_make_with_split_masters(s), id=f"{s}-split") for s in SETUPS if s.states),
    *(pytest.param(_make_for_megatron(c), id=f"megatron.{c.__name__}") for c in MEGATRON),
]
every_maker = pytest.mark.parametrize("make", MAKERS)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = make_params()


def assert_accepted(value: Any) -> None:
    if isinstance(value, Mapping):
        assert type(value) is dict
        for item in value.values():
            assert_accepted(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            assert_accepted(item)
    else:
        assert value is None or isinstance(value, (Tensor, bool, int, float, str, bytes))


@every_maker
def test_groups_hold_what_tools_accept(make: Any) -> None:
    model = Model()
    optimizer = make(model.parameters())
    seen: list[Any] = []
    optimizer.register_state_dict_post_hook(lambda _, saved: seen.append(copy.deepcopy(saved)))
    run(optimizer, list(model.parameters()), [1])
    saved = optimizer.state_dict()
    assert_accepted(saved["param_groups"])
    assert seen[0]["param_groups"] == saved["param_groups"]
    # Older checkpoints have all of these keys, and tools look for them.
    assert optimizer.param_groups[0].keys() <= saved["param_groups"][0].keys()
    assert not isinstance(optimizer.param_groups[0]["state_dtype"], str)


@every_maker
@pytest.mark.parametrize(
    "options",
    [{"cpu_offload": True}, {"full_state_dict": True}, {"flatten_optimizer_state_dict": True}],
    ids=lambda options: next(iter(options)),
)
def test_through_torchs_tools(make: Any, options: Any) -> None:
    model, other_model = Model(), Model()
    optimizer, other = make(model.parameters()), make(other_model.parameters())
    run(optimizer, list(model.parameters()), [1, 2])
    settings = StateDictOptions(**options)
    saved = get_optimizer_state_dict(model, optimizer, options=settings)
    other_model.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other_model, other, copy.deepcopy(saved), options=settings)
    with torch.no_grad():
        for param, same in zip(other_model.parameters(), model.parameters(), strict=True):
            param.copy_(same)
    assert other.param_groups[0]["state_dtype"] == optimizer.param_groups[0]["state_dtype"]
    run(optimizer, list(model.parameters()), [3])
    run(other, list(other_model.parameters()), [3])
    assert_same(contents(other), contents(optimizer))


@pytest.mark.parametrize("cls", [AdamW, AdEMAMix, megatron.FusedAdam])
def test_numbers_of_other_types(cls: Any) -> None:
    model = Model()
    optimizer = cls(
        model.parameters(),
        lr=np.float64(0.5),
        betas=np.array([0.5, 0.25, 0.75][: 3 if cls is AdEMAMix else 2], dtype=np.float32),
        weight_decay=Fraction(1, 4),
    )
    group = optimizer.param_groups[0]
    method = np.str_("palm")
    group.update(eps=np.float32(0.125), maximize=np.True_, weight_decay_method=method)
    if cls is AdEMAMix:
        group["num_alpha_warmup_steps"] = np.int64(7)
    run(optimizer, list(model.parameters()), [1])
    settings = StateDictOptions(full_state_dict=True, cpu_offload=True)
    saved = get_optimizer_state_dict(model, optimizer, options=settings)
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["param_groups"][0]
    wanted: dict[str, Any] = {"lr": 0.5, "weight_decay": 0.25, "eps": 0.125, "maximize": True}
    wanted["weight_decay_method"] = "palm"
    if cls is AdEMAMix:
        wanted["num_alpha_warmup_steps"] = 7
    assert {key: loaded[key] for key in wanted} == wanted
    assert {key: type(loaded[key]) for key in wanted} == {k: type(v) for k, v in wanted.items()}
    assert loaded["betas"] == tuple(group["betas"].tolist())
    assert group["weight_decay_method"] is method  # the group does not change


@pytest.mark.parametrize("state_dtype", [F32, {"exp_avg": BF16}], ids=["dtype", "dtypes"])
def test_groups_that_hold_dtypes_load(state_dtype: Any) -> None:
    """Older state dicts contain dtypes."""
    params = make_params()
    optimizer = AdamW(params, state_dtype=state_dtype)
    run(optimizer, params, [1, 2])
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["state_dtype"] = state_dtype
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    other = AdamW(others, state_dtype=state_dtype)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.param_groups[0]["state_dtype"] == state_dtype
    run(optimizer, params, [3])
    run(other, others, [3])
    assert_same(contents(other), contents(optimizer))


def test_torch_continues_with_dtypes_as_text() -> None:
    ours, theirs = make_params(), make_params()
    optimizer = AdamW(ours, state_dtype=F32, lr=0.05)
    run(optimizer, ours, [1, 2])
    with torch.no_grad():
        torch._foreach_copy_(theirs, ours)
    reference = torch.optim.AdamW(theirs)
    reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(optimizer, ours, [3, 4])
    run(reference, theirs, [3, 4])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# ---- defaults of the process ---------------------------------------------------------------------


class _Defaults:
    """A context with another default dtype and another default device."""

    def __init__(self, is_set: bool) -> None:
        self.is_set = is_set

    def __enter__(self) -> None:
        self.dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        self.context = torch.device("meta")
        if self.is_set:
            torch.set_default_device("meta")
        else:
            self.context.__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.set_default_dtype(self.dtype)
        if self.is_set:
            torch.set_default_device(None)
        else:
            self.context.__exit__(*error)


@pytest.mark.parametrize("is_set", [False, True], ids=["context", "set"])
@pytest.mark.parametrize("fused", [None, False], ids=["native", "fallback"])
@pytest.mark.parametrize("make", [*MAKERS, _make_for_megatron])
def test_states_do_not_depend_on_defaults(make: Any, fused: bool | None, is_set: bool) -> None:
    if make is _make_for_megatron:  # its learning rates are also tensors
        make = lambda params: megatron.FusedAdam(params, capturable=True)  # noqa: E731
    params, others = make_params(dtype=BF16), make_params(dtype=BF16)

    def train(params: Any) -> Any:
        optimizer = make([{"params": params, "fused": fused}])
        for values in ([0.5, 0.25], [1.0, -1.0]):
            for param, value in zip(params, values, strict=True):
                param.grad = torch.full_like(param, value)
            optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())
        # Older versions of PyTorch save counters like this.
        for state, step in zip(saved["state"].values(), (2, 2.0), strict=True):
            state["step"] = step
        optimizer.load_state_dict(saved)
        for param in params:
            param.grad = torch.full_like(param, 0.125)
        optimizer.step()
        return optimizer

    wanted = train(others)
    with _Defaults(is_set):
        optimizer = train(params)
        saved = copy.deepcopy(optimizer.state_dict())
    assert_same(contents(optimizer), contents(wanted))
    for state in (*optimizer.state.values(), *saved["state"].values()):
        assert state["step"].dtype == F32
        assert state["step"].item() == 3
        assert {t.device for t in state.values()} == {params[0].device}
    rates = optimizer.param_groups[0]["lr"], wanted.param_groups[0]["lr"]
    assert rates[0] == rates[1]
    assert not isinstance(rates[0], Tensor) or rates[0].dtype == F32


@pytest.mark.parametrize("cls", MEGATRON)
def test_states_created_before_the_first_step(cls: Any) -> None:
    """States created before the first step get their step from the group."""
    optimizer = cls(make_params())
    optimizer.initialize_state(optimizer.param_groups[0]["params"][0])
    with torch.device("meta"):
        saved = optimizer.state_dict()["state"][0]["step"]
    assert (saved.device.type, saved.dtype) == ("cpu", F32)
