"""Optimizers of `megatron` continue from checkpoints, with the steps of their groups."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from megatron_support import (
    AWARE,
    BF16,
    F32,
    OPTIONS,
    decouple_grads,
    devices,
    every_class,
    make_params,
    run,
)
from optimizers import assert_same, contents
from torch import Tensor

from emerging_optimizers.megatron import FusedAdam

pytestmark = [
    pytest.mark.on_devices("tests-cuda"),
    pytest.mark.usefixtures("_no_other_device"),
]


@every_class
@pytest.mark.parametrize("fused", [None, False], ids=["native", "fallback"])
def test_step_of_a_group_is_that_of_its_parameters(cls: Any, fused: bool | None) -> None:
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
def test_step_of_a_group_without_local_parameters(cls: Any, device: str, capturable: bool) -> None:
    """A process without parameters of a group saves the step that the others continue from."""

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
def test_a_group_counts_after_losing_its_parameters(device: str, capturable: bool) -> None:
    params = make_params(F32, device)
    groups = [{"params": params}, {"params": []}]
    optimizer = FusedAdam(groups, use_decoupled_grad=True, capturable=capturable, **OPTIONS)
    run(optimizer, [1, 2])
    first, second = optimizer.param_groups
    first["params"], second["params"] = second["params"], first["params"]
    run(optimizer, [3, 4])
    assert {state["step"].item() for state in optimizer.state.values()} == {4}
    assert [int(first["step"]), int(second["step"])] == [4, 4]


def test_step_of_a_group_takes_precedence() -> None:
    """Older versions saved a step for each parameter, and the largest one in the group."""
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
    """A state dict like TransformerEngine's: one step per group, and float32 states."""
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
def test_loaded_step_of_a_group(cls: Any) -> None:
    """Megatron creates states by a step with zeros, loads the groups, and then copies states."""
    if not cls._state_names:
        pytest.skip("the rule has no states")
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
        # It copies into existing states, and has no step to copy.
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


@every_class
@pytest.mark.parametrize("how", ["pickle", "deepcopy", "state dict"])
def test_copies_continue(cls: Any, how: str) -> None:
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


def test_storage_options_are_not_loaded() -> None:
    """Loading changes the hyperparameters of a group, but not which tensors it reads and stores."""
    params = make_params()
    optimizer = FusedAdam(params, **AWARE)
    run(optimizer, [1])
    other = FusedAdam(params, lr=0.5, master_weights=True)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == 0.05
    assert not other.param_groups[0]["use_decoupled_grad"]
