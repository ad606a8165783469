"""Float32 masters of bfloat16 parameters, stored as remainders by ``master_weights="split"``."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from optimizers import (
    Setup,
    assert_same,
    contents,
    every_optimizer,
    every_variant,
    make_grads,
    make_params,
    run,
    set_grads,
)
from support import assert_equal_bits
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import Parameter

from emerging_optimizers import AdamW, LaProp, Lion, ScalarOptimizer, _weights
from emerging_optimizers._native import native
from emerging_optimizers.megatron import merge_master, split_master

pytestmark = pytest.mark.on_devices("tests-optimizers")

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def masters(optimizer: ScalarOptimizer, params: Sequence[Tensor]) -> list[Tensor]:
    """Copies of the float32 masters, merged if only their remainders are stored."""
    found = []
    for param in params:
        master = optimizer.state[param]["master_param"]
        is_remainder = master.dtype == torch.int16
        found.append(merge_master(param.detach(), master) if is_remainder else master.clone())
    return found


def stored_dtypes(optimizer: ScalarOptimizer) -> set[torch.dtype]:
    return {state["master_param"].dtype for state in optimizer.state.values()}


def check_params(optimizer: ScalarOptimizer, params: Sequence[Tensor]) -> None:
    """Each parameter is its master, rounded to nearest, ties away from zero."""
    for param, master in zip(params, masters(optimizer, params), strict=True):
        rounded, remainder = torch.empty_like(param), torch.empty_like(param, dtype=torch.int16)
        split_master(master, rounded.detach(), remainder)
        assert_equal_bits(param.detach(), rounded.detach(), "parameter")


def tied_params() -> list[Parameter]:
    """Parameters whose masters, less 2**-9 times gradients of 1, are halfway between two."""
    return [Parameter(torch.tensor([1.0, 1.0078125, -1.0, -1.0078125] * 9, dtype=BF16))]


# ---- steps ---------------------------------------------------------------------------------------


@every_variant
def test_masters_have_the_same_bits(setup: Setup, fused: bool | None) -> None:
    shapes = [(3, 4), (37, 5), (1, 1), (0, 3), (130, 9)]
    params, others = make_params(shapes, BF16), make_params(shapes, BF16)
    options = {"lr": 0.01, "weight_decay": 0.1, "state_dtype": F32, "fused": fused}
    optimizer = setup.make(params, master_weights="split", **options)
    other = setup.make(others, master_weights=True, **options)
    for step in range(1, 6):
        run(optimizer, params, [step])
        run(other, others, [step])
        assert_same(masters(optimizer, params), masters(other, others), f"step {step}")
        check_params(optimizer, params)
    assert stored_dtypes(optimizer) == {torch.int16}
    for param, same in zip(params, others, strict=True):
        for name in ("step", *setup.states):
            assert_equal_bits(optimizer.state[param][name], other.state[same][name], name)


@every_optimizer
def test_the_native_step_merges_no_masters(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    if native is None:
        pytest.skip("no native kernels")
    params = make_params(dtype=BF16)
    optimizer = setup.make(params, master_weights="split", fused=True)
    monkeypatch.delattr(_weights, "merge_master")
    monkeypatch.delattr(_weights, "split_master")
    run(optimizer, params, [1, 2])
    assert [state["step"].item() for state in optimizer.state.values()] == [2, 2]


def test_ties_are_rounded_away_from_zero(fused: bool | None) -> None:
    params, others = tied_params(), tied_params()
    optimizer = _sgd(params, master_weights="split", fused=fused)
    other = _sgd(others, master_weights=True, fused=fused)
    for each, (param,) in ((optimizer, params), (other, others)):
        param.grad = -param.detach().sign()
        each.step()
    assert_same(masters(optimizer, params), masters(other, others))
    assert params[0][:2].tolist() == [1.0078125, 1.015625]
    assert others[0][:2].tolist() == [1.0, 1.015625]


def _sgd(params: Any, **options: Any) -> ScalarOptimizer:
    """Return an optimizer whose step subtracts 2**-8 times the sign of gradients."""
    return Lion(params, lr=2.0**-8, weight_decay=0.0, **options)


@every_optimizer
def test_parameters_of_other_dtypes(setup: Setup, fused: bool | None) -> None:
    dtypes = [F16, F32, torch.float64, torch.complex64, BF16]
    lists = [[make_params([(5, 3)], dtype)[0] for dtype in dtypes] for _ in range(2)]
    optimizers = [
        setup.make(params, master_weights=value, fused=fused)
        for params, value in zip(lists, ("split", True), strict=True)
    ]
    for optimizer, params in zip(optimizers, lists, strict=True):
        for step in (1, 2, 3):
            for param in params:
                param.grad = make_grads([param], step)[0]
            optimizer.step()
    found = [optimizers[0].state[param].get("master_param") for param in lists[0]]
    got = [None if master is None else master.dtype for master in found]
    assert got == [F32, None, None, None, torch.int16]
    assert_same([p.detach() for p in lists[0][:-1]], [p.detach() for p in lists[1][:-1]])
    assert_same(masters(optimizers[0], lists[0][-1:]), masters(optimizers[1], lists[1][-1:]))


def test_each_group_has_its_own(fused: bool | None) -> None:
    params = [make_params([(3, 4)], BF16)[0] for _ in range(3)]
    values = (False, True, "split")
    groups = [{"params": [p], "master_weights": v} for p, v in zip(params, values, strict=True)]
    optimizer = AdamW(groups, lr=0.01, fused=fused)
    for step in (1, 2):
        for param in params:
            set_grads([param], step)
        optimizer.step()
    found = [optimizer.state[p].get("master_param") for p in params]
    assert [None if x is None else x.dtype for x in found] == [None, F32, torch.int16]
    assert_same(masters(optimizer, params[1:2]), masters(optimizer, params[2:]))


@every_optimizer
@pytest.mark.parametrize("overflow", [False, True])
def test_scaled_gradients(setup: Setup, overflow: bool, fused: bool | None) -> None:
    params, others = make_params(dtype=BF16), make_params(dtype=BF16)
    optimizer = setup.make(params, master_weights="split", fused=fused)
    other = setup.make(others, master_weights=True, fused=fused)
    for each, tensors in ((optimizer, params), (other, others)):
        run(each, tensors, [1])
        each.grad_scale = torch.tensor(4.0)  # type: ignore[attr-defined]
        each.found_inf = torch.tensor(float(overflow))  # type: ignore[attr-defined]
        set_grads(tensors, 2)
    before = contents(optimizer)
    optimizer.step()
    other.step()
    if overflow:
        assert_same(contents(optimizer), before)
    assert_same(masters(optimizer, params), masters(other, others))


@pytest.mark.parametrize(
    ("options", "arguments"),
    [({"capturable": True}, {}), ({}, {"max_norm": 0.5}), ({"maximize": True}, {})],
    ids=str,
)
@every_optimizer
def test_with_other_options(setup: Setup, options: Any, arguments: Any, fused: bool | None) -> None:
    params, others = make_params(dtype=BF16), make_params(dtype=BF16)
    optimizer = setup.make(params, master_weights="split", fused=fused, **options)
    other = setup.make(others, master_weights=True, fused=fused, **options)
    for each, tensors in ((optimizer, params), (other, others)):
        for step in (1, 2, 3):
            set_grads(tensors, step)
            each.step(**arguments)
    assert_same(masters(optimizer, params), masters(other, others))


def test_float64_gradients(fused: bool | None) -> None:
    params, others = make_params(dtype=BF16), make_params(dtype=BF16)
    optimizer = AdamW(params, master_weights="split", fused=fused)
    other = AdamW(others, master_weights=True, fused=fused)
    for each, tensors in ((optimizer, params), (other, others)):
        for step in (1, 2):
            for param, grad in zip(tensors, make_grads(tensors, step), strict=True):
                param.grad_dtype = torch.float64
                param.grad = grad.double()
            each.step()
    assert_same(masters(optimizer, params), masters(other, others))


def test_norms_of_weights(fused: bool | None) -> None:
    params, others = make_params(dtype=BF16), make_params(dtype=BF16)
    norms = [param.detach().float().norm() for param in params]
    options: dict[str, Any] = {"lr": 0.1, "frob_normalize": True, "fused": fused}
    optimizer = LaProp(params, master_weights="split", **options)
    other = LaProp(others, master_weights=True, **options)
    run(optimizer, params, [1, 2, 3])
    run(other, others, [1, 2, 3])
    assert_same(masters(optimizer, params), masters(other, others))
    for master, norm in zip(masters(optimizer, params), norms, strict=True):
        torch.testing.assert_close(master.norm(), norm)


# ---- the option ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["split", np.str_("split")])
def test_text_of_other_origin(value: str, fused: bool | None) -> None:
    """Text that is no constant of a program: numpy's, or read from a file."""
    params = make_params(dtype=BF16)
    optimizer = AdamW(params, master_weights="".join(value), fused=fused)  # type: ignore[arg-type]
    assert type(optimizer.param_groups[0]["master_weights"]) is str
    optimizer.param_groups[0]["master_weights"] = value
    run(optimizer, params, [1])
    optimizer.param_groups[0]["master_weights"] = "".join(list(value))
    run(optimizer, params, [2])
    assert stored_dtypes(optimizer) == {torch.int16}


def test_the_option_is_not_loaded() -> None:
    params = make_params(dtype=BF16)
    optimizer = AdamW(params, master_weights="split")
    run(optimizer, params, [1])
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["master_weights"] == "split"
    for value in (True, False):
        other = AdamW(params, master_weights=value)
        other.load_state_dict(copy.deepcopy(saved))
        assert other.param_groups[0]["master_weights"] is value
        if not value:
            assert all("master_param" not in state for state in other.state.values())


@pytest.mark.parametrize("flag", [1, np.True_, np.False_], ids=repr)
def test_flags_of_earlier_versions(flag: Any) -> None:
    params = make_params(dtype=BF16)
    optimizer = AdamW(params)
    optimizer.param_groups[0]["master_weights"] = flag
    again = copy.deepcopy(optimizer)
    others = again.param_groups[0]["params"]
    run(again, others, [1])
    found = ["master_param" in state for state in again.state.values()]
    assert found == [bool(flag)] * len(params)


@pytest.mark.parametrize("end", ["no masters", "float32"])
def test_remainders_that_are_no_longer_used(end: str, fused: bool | None) -> None:
    """A step of a parameter without a master ignores a remainder that its state has."""
    params = make_params(dtype=BF16)
    optimizer = AdamW(params, lr=0.5, master_weights="split", fused=fused)
    run(optimizer, params, [1])
    if end == "float32":
        for param in params:
            param.data = param.data.float()
    else:
        optimizer.param_groups[0]["master_weights"] = False
    before = contents(optimizer)
    optimizer.state[params[0]]["exp_avg"] = optimizer.state[params[0]]["exp_avg"].t().clone().t()
    run(optimizer, params, [2])
    for param, old in zip(params, before[:: len(before) // len(params)], strict=True):
        assert not torch.equal(param, old)
    assert stored_dtypes(optimizer) == {torch.int16}


# ---- masters that are stored in the other way ----------------------------------------------------


@every_optimizer
@pytest.mark.parametrize("value", [True, "split"])
@pytest.mark.parametrize("when", ["model first", "model last", "between steps"])
def test_masters_are_converted(setup: Setup, value: Any, when: str, fused: bool | None) -> None:
    """Training continues with the masters of an optimizer that stores them in the other way."""
    options = {"lr": 0.01, "weight_decay": 0.1, "state_dtype": F32, "fused": fused}
    old, new = ("split", True) if value is True else (True, "split")
    params, others = make_params(dtype=BF16), make_params(dtype=BF16)
    optimizer = setup.make(params, master_weights=old, **options)
    other = setup.make(others, master_weights=new, **options)
    run(optimizer, params, [1, 2, 3])
    run(other, others, [1, 2, 3])
    wanted = masters(optimizer, params)
    if when == "between steps":
        optimizer.param_groups[0]["master_weights"] = new
    else:
        saved = copy.deepcopy(optimizer.state_dict())
        trained = [param.detach().clone() for param in params]
        params = make_params(dtype=BF16)
        optimizer = setup.make(params, master_weights=new, **options)
        before = [param.detach().clone() for param in params]
        if when == "model first":
            before = trained
            _copy(params, trained)
        optimizer.load_state_dict(copy.deepcopy(saved))
        assert_same([param.detach() for param in params], before)
        # Nothing is converted yet, and it can be saved again.
        assert_same(
            [state["master_param"] for state in optimizer.state_dict()["state"].values()],
            [state["master_param"] for state in saved["state"].values()],
        )
        _copy(params, trained)
    assert_same(masters(optimizer, params), wanted)
    run(optimizer, params, [4, 5])
    run(other, others, [4, 5])
    assert stored_dtypes(optimizer) == {F32 if new is True else torch.int16}
    assert_same(masters(optimizer, params), masters(other, others))
    assert_same([param.detach() for param in params], [param.detach() for param in others])


def _copy(params: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for param, value in zip(params, values, strict=True):
            param.copy_(value)


def test_masters_between_two_parameters_are_split(fused: bool | None) -> None:
    """Their parameters are rounded to even; a remainder is of one rounded away from zero."""
    params, others = tied_params(), tied_params()
    optimizer, other = (_sgd(p, master_weights=True, fused=fused) for p in (params, others))
    for each, (param,) in ((optimizer, params), (other, others)):
        param.grad = -param.detach().sign()
        each.step()
    saved = optimizer.state_dict()
    kept = [master.clone() for master in masters(optimizer, params)]
    split = _sgd(params, master_weights="split", fused=fused)
    split.load_state_dict(saved)
    for each, (param,) in ((split, params), (other, others)):
        param.grad = torch.zeros_like(param)
        each.step()
        param.grad = torch.ones_like(param)
        each.step()
    assert_same(masters(split, params), masters(other, others))
    assert_same(masters(optimizer, params), kept, "the state dict's")


@pytest.mark.parametrize("value", [True, "split"])
def test_norms_of_converted_masters(value: Any, fused: bool | None) -> None:
    options: dict[str, Any] = {"lr": 0.1, "frob_normalize": True, "fused": fused}
    params, others = make_params(dtype=BF16), make_params(dtype=BF16)
    optimizer = LaProp(params, master_weights="split" if value is True else True, **options)
    other = LaProp(others, master_weights=value, **options)
    run(optimizer, params, [1])
    run(other, others, [1])
    optimizer.param_groups[0]["master_weights"] = value
    run(optimizer, params, [2])
    run(other, others, [2])
    assert stored_dtypes(optimizer) == {F32 if value is True else torch.int16}
    assert_same(masters(optimizer, params), masters(other, others))


@pytest.mark.real
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("is_flat", [False, True])
def test_cast_remainders_are_refused(is_flat: bool, tmp_path: Path) -> None:
    """What `torch.distributed.checkpoint` makes of remainders, if it loads them as masters."""
    options = StateDictOptions(flatten_optimizer_state_dict=is_flat)
    models = [torch.nn.Linear(40, 3, dtype=BF16) for _ in range(3)]
    saved, *others = (
        AdamW(model.parameters(), lr=0.01, master_weights=value)
        for model, value in zip(models, ("split", True, "split"), strict=True)
    )
    run(saved, list(models[0].parameters()), [1, 2, 3])
    saved.zero_grad()
    checkpoint.save(_state_of(models[0], saved, options), checkpoint_id=tmp_path)
    for other, model in zip(others, models[1:], strict=True):
        loaded = _state_of(model, other, options)
        checkpoint.load(loaded, checkpoint_id=tmp_path)
        model.load_state_dict(models[0].state_dict())
        if other.param_groups[0]["master_weights"] is True:
            with pytest.raises(ValueError, match=r"remainders that were cast to torch\.float32"):
                set_optimizer_state_dict(model, other, loaded, options=options)
            continue
        set_optimizer_state_dict(model, other, loaded, options=options)
        # As the error says.
        other.param_groups[0]["master_weights"] = True
        params, same = (list(each.parameters()) for each in (models[0], model))
        run(saved, params, [4])
        run(other, same, [4])
        assert stored_dtypes(other) == {F32}
        assert_same(masters(other, same), masters(saved, params))


def _state_of(model: torch.nn.Module, optimizer: Any, options: StateDictOptions) -> dict[str, Any]:
    return get_optimizer_state_dict(model, optimizer, options=options)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_masters_merged_by_hand(value: float) -> None:
    """Without the option, masters may be loaded that were merged, whatever their values are."""
    params = [Parameter(torch.full((3, 4), value, dtype=BF16))]
    optimizer = AdamW(params, master_weights="split", weight_decay=0.0)
    run(optimizer, params, [1])
    optimizer.state[params[0]]["master_param"].zero_()
    saved = optimizer.state_dict()
    saved["state"][0]["master_param"] = params[0].detach().float()
    other = AdamW(params, master_weights=True)
    other.load_state_dict(saved)
    assert stored_dtypes(other) == {F32}


def test_a_float16_parameter_has_no_remainder(fused: bool | None) -> None:
    params = make_params(dtype=F16)
    optimizer = AdamW(params, master_weights="split", fused=fused)
    run(optimizer, params, [1])
    message = r"'master_param' has dtype torch\.int16; expected torch\.float32$"
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1]["master_param"] = torch.zeros(5, 2, dtype=torch.int16)
    with pytest.raises(TypeError, match=message):
        optimizer.load_state_dict(saved)
    optimizer.state[params[1]]["master_param"] = torch.zeros(5, 2, dtype=torch.int16)
    with pytest.raises(TypeError, match=message):
        run(optimizer, params, [2])


def test_a_capture_converts_no_masters(monkeypatch: pytest.MonkeyPatch) -> None:
    params = make_params(dtype=BF16)
    optimizer = AdamW(params, master_weights=True, fused=False)
    run(optimizer, params, [1])
    optimizer.param_groups[0].update(master_weights="split", capturable=True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    before = contents(optimizer)
    with pytest.raises(RuntimeError, match=r"converts a master_param to master_weights='split': t"):
        run(optimizer, params, [2])
    assert_same(contents(optimizer), before)
