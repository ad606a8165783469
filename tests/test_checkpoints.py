"""Copies and state dicts continue as their optimizer does, and PyTorch's optimizers from ours."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from optimizers import Setup, assert_same, contents, every_optimizer_with_states, make_params, run
from torch import Tensor

import emerging_optimizers
from emerging_optimizers import Adam, AdamW

pytestmark = pytest.mark.on_devices("tests-optimizers")


@every_optimizer_with_states
@pytest.mark.parametrize(
    "how",
    ["deepcopy", *(pytest.param(how, marks=pytest.mark.real) for how in ("pickle", "state_dict"))],
)
@pytest.mark.parametrize("masters", [True, "split"])
def test_copies_continue(setup: Setup, how: str, masters: Any, fused: bool | None) -> None:
    params = make_params(dtype=torch.bfloat16)
    arguments: dict[str, Any] = {"fused": fused, "master_weights": masters, "weight_decay": 0.1}
    arguments["state_dtype"] = {setup.states[0]: torch.float32}
    optimizer = setup.make(params, **arguments)
    run(optimizer, params, [1, 2])
    if how == "deepcopy":
        other = copy.deepcopy(optimizer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(optimizer))
    else:
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        buffer.seek(0)
        copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
        other = setup.make(copies, **arguments)
        other.load_state_dict(state_dict=torch.load(buffer, weights_only=True))
    assert repr(other) == repr(optimizer)
    others = other.param_groups[0]["params"]
    run(optimizer, params, [3, 4])
    run(other, others, [3, 4])
    assert_same(contents(other), contents(optimizer))


@every_optimizer_with_states
@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16], ids=str)
def test_loaded_dtypes(setup: Setup, saved: torch.dtype, fused: bool | None) -> None:
    params = make_params(dtype=torch.bfloat16)
    optimizer = setup.make(params, state_dtype=saved, fused=fused)
    run(optimizer, params, [1])
    state_dict = optimizer.state_dict()
    for option in (None, torch.float32, torch.float16):
        other = setup.make(make_params(dtype=torch.bfloat16), state_dtype=option, fused=fused)
        other.load_state_dict(copy.deepcopy(state_dict))
        for state in other.state.values():
            assert {state[name].dtype for name in setup.states} == {option or saved}
            assert state["step"].dtype == torch.float32
        run(other, other.param_groups[0]["params"], [2])


def test_additional_entries_load_unchanged(fused: bool | None) -> None:
    params = make_params()
    optimizer = AdamW(params, state_dtype=torch.bfloat16, fused=fused)
    run(optimizer, params, [1])
    optimizer.state[params[0]]["extra"] = torch.tensor([1 + 2**20, 3])
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    extra = optimizer.state[params[0]]["extra"]
    assert extra.dtype == torch.int64
    assert extra.tolist() == [1 + 2**20, 3]


@every_optimizer_with_states
def test_older_state_dicts(setup: Setup, fused: bool | None) -> None:
    params = make_params()
    optimizer = setup.make(params, lr=0.05, fused=fused)
    run(optimizer, params, [1, 2])
    state_dict = copy.deepcopy(optimizer.state_dict())
    group = state_dict["param_groups"][0]
    for key in list(group):
        if key not in ("params", "lr"):
            del group[key]
    group["unknown"] = "kept"
    group["step"] = torch.tensor(6.0)  # for what has none
    state_dict["state"][0]["step"] = 2
    del state_dict["state"][1]["step"]
    state_dict["state"]["of no parameter"] = {"tensor": torch.ones(2)}
    others = make_params()
    other = setup.make(others, lr=0.9, fused=fused)
    seen = []
    other.register_load_state_dict_pre_hook(
        lambda _, loaded: seen.append(loaded["state"][0]["step"])
    )
    other.load_state_dict(state_dict)
    assert seen == [2]
    loaded = other.param_groups[0]
    assert loaded["lr"] == 0.05
    assert loaded["unknown"] == "kept"
    assert loaded["weight_decay_method"] == other.defaults["weight_decay_method"]
    assert torch.equal(other.state["of no parameter"]["tensor"], torch.ones(2))  # type: ignore[index]
    assert isinstance(other.state[others[0]]["step"], Tensor)
    run(other, others, [3])
    assert [other.state[p]["step"].item() for p in others] == [3, 7]
    assert "step" not in loaded
    with pytest.raises(ValueError, match="different number of parameter groups"):
        setup.make(others).load_state_dict({"state": {}, "param_groups": []})


OF_TORCH: list[tuple[str, dict[str, Any]]] = [
    ("Adam", {}),
    ("AdamW", {}),
    ("Adam", {"amsgrad": True}),
    ("AdamW", {"amsgrad": True}),
    ("RMSprop", {}),
    ("RMSprop", {"centered": True}),
    ("RMSprop", {"momentum": 0.9}),
    ("RMSprop", {"centered": True, "momentum": 0.9}),
]


@pytest.mark.parametrize(("name", "options"), OF_TORCH, ids=str)
@pytest.mark.parametrize("direction", ["from torch", "to torch"])
def test_interchange_with_torch(
    name: str, options: dict[str, Any], direction: str, fused: bool | None
) -> None:
    ours, theirs = make_params(), make_params()
    options = {"lr": 0.05, "weight_decay": 0.1, **options}
    optimizer = getattr(emerging_optimizers, name)(ours, fused=fused, **options)
    reference = getattr(torch.optim, name)(theirs, **options)
    run(optimizer, ours, [1, 2])
    run(reference, theirs, [1, 2])
    if direction == "from torch":
        optimizer = getattr(emerging_optimizers, name)(ours, fused=fused)
        optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    else:
        reference = getattr(torch.optim, name)(theirs)
        reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.state[ours[0]].keys() == reference.state[theirs[0]].keys()
    run(optimizer, ours, [3, 4])
    run(reference, theirs, [3, 4])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("decoupled", [False, True])
def test_weight_decay_continues_in_torch(decoupled: bool, fused: bool | None) -> None:
    ours, theirs = make_params(), make_params()
    options: dict[str, Any] = {"weight_decay": 0.5, "decoupled_weight_decay": decoupled}
    optimizer = Adam(ours, lr=0.05, fused=fused, **options)
    seen = []
    optimizer.register_state_dict_post_hook(lambda _, saved: seen.append(saved))
    run(optimizer, ours, [1, 2])
    reference = torch.optim.Adam(theirs, lr=0.05, **options)
    run(reference, theirs, [1, 2])
    reference = torch.optim.Adam(theirs)
    reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert seen[0]["param_groups"][0]["decoupled_weight_decay"] == decoupled
    optimizer.load_state_dict(optimizer.state_dict())
    assert "decoupled_weight_decay" not in optimizer.param_groups[0]
    run(optimizer, ours, [3, 4])
    run(reference, theirs, [3, 4])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_decoupled_weight_decay_of_torch() -> None:
    params = make_params()
    assert Adam(params, decoupled_weight_decay=True).defaults["weight_decay_method"] == "decoupled"
    loaded = Adam(params)
    loaded.load_state_dict(torch.optim.AdamW(params).state_dict())
    assert loaded.param_groups[0]["weight_decay_method"] == "decoupled"
