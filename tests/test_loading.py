"""Rejected state dicts change nothing; missing entries are completed, or an error."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizers import (
    MEGATRON,
    Setup,
    assert_same,
    contents,
    every_optimizer,
    every_optimizer_with_states,
    make_params,
    run,
    set_grads,
)
from torch import Tensor, nn

from emerging_optimizers import AdamW, Lion, megatron

pytestmark = pytest.mark.on_devices("tests-states")

BF16, F32 = torch.bfloat16, torch.float32
ways = pytest.mark.parametrize("fused", [None, False], ids=["native", "fallback"])
MASTERS = {"master_weights": True}
REMAINDERS = {"master_weights": True, "store_param_remainders": True}


def snapshot(optimizer: Any) -> tuple[Any, ...]:
    """Everything that a load could change: keys, values and the identity of tensors."""
    groups = [
        {k: copy.deepcopy(v) for k, v in g.items() if k != "params"} for g in groups_of(optimizer)
    ]
    params = [[id(p) for p in g["params"]] for g in groups_of(optimizer)]
    states = {id(p): {k: id(v) for k, v in s.items()} for p, s in optimizer.state.items()}
    return groups, params, states, copy.deepcopy(optimizer.defaults)


def groups_of(optimizer: Any) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = optimizer.param_groups
    return groups


def assert_rejected(make: Callable[[Any], Any], dtype: torch.dtype, load: Any, error: Any) -> None:
    """Compare with an optimizer that has not tried to load."""
    params, others = make_params(dtype=dtype), make_params(dtype=dtype)
    optimizer, other = make(params), make(others)
    run(optimizer, params, [1, 2])
    run(other, others, [1, 2])
    before = snapshot(optimizer)
    with pytest.raises(error[0], match=error[1]):
        load(optimizer)
    assert snapshot(optimizer) == before
    run(optimizer, params, [3, 4])
    run(other, others, [3, 4])
    assert_bits(optimizer, other)


def assert_bits(optimizer: Any, other: Any) -> None:
    got, wanted = contents(optimizer), contents(other)
    assert_same([_bits(t) for t in got], [_bits(t) for t in wanted])


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(BF16) if tensor.dtype == torch.int16 else tensor


# ---- rejected loads ------------------------------------------------------------------------------

FIRST = r"param_groups\[0\]\['params'\]\[0\]"
PARAM = r"param_groups\[0\]\['params'\]\[1\]"


def _state(name: str, value: Any) -> Callable[[dict[str, Any], Any], None]:
    def change(saved: dict[str, Any], optimizer: Any) -> None:
        key = optimizer._state_names[-1] if name == "last" else name
        saved["state"][1][key] = value

    return change


def _group(name: str, value: Any) -> Callable[[dict[str, Any], Any], None]:
    def change(saved: dict[str, Any], optimizer: Any) -> None:
        saved["param_groups"][0][name] = value

    return change


def _replace_state(saved: dict[str, Any], optimizer: Any) -> None:
    saved["state"][1] = torch.zeros(3)


def _remove_last(saved: dict[str, Any], optimizer: Any) -> None:
    del saved["state"][1][optimizer._state_names[-1]]


def _add_group(saved: dict[str, Any], optimizer: Any) -> None:
    saved["param_groups"].append({**saved["param_groups"][0], "params": []})


def _drop_param(saved: dict[str, Any], optimizer: Any) -> None:
    saved["param_groups"][0]["params"].pop()


def _share_states(saved: dict[str, Any], optimizer: Any) -> None:
    names = optimizer._state_names
    saved["state"][1][names[-1]] = saved["state"][0][names[0]].view(-1)[:10].view(5, 2)


def _share_param(saved: dict[str, Any], optimizer: Any) -> None:
    param = optimizer.param_groups[0]["params"][0].detach()
    saved["state"][1][optimizer._state_names[0]] = param.view(-1)[:10].view(5, 2)


def _take_param(saved: dict[str, Any], optimizer: Any) -> None:
    saved["state"][1][optimizer._state_names[0]] = optimizer.param_groups[0]["params"][1]


BREAKAGES: dict[str, tuple[Any, Any]] = {
    "missing": (_remove_last, (ValueError, rf"the loaded state of {PARAM} has no 'exp_avg")),
    "None": (_state("last", None), (ValueError, rf"{PARAM} has no 'exp_avg")),
    "shape": (_state("last", torch.zeros(3)), (ValueError, rf"{PARAM}: state 'exp.* has shape")),
    "dtype": (
        _state("last", torch.zeros(5, 2, dtype=torch.int64)),
        (TypeError, rf"{PARAM}.*has dtype torch\.int64"),
    ),
    "no tensor": (_state("last", 1.0), (TypeError, rf"{PARAM}.*must be a Tensor, not float")),
    "meta": (_state("last", torch.zeros(5, 2, device="meta")), (ValueError, rf"{PARAM}.*on meta")),
    "no memory": (_state("last", torch.zeros(5, 2)), (ValueError, rf"{PARAM}.*has no memory")),
    "step -1": (_state("step", -1), (ValueError, rf"{PARAM}: state 'step' is -1")),
    "step text": (_state("step", "3"), (TypeError, rf"{PARAM}: state 'step' must be a number")),
    "step nan": (_state("step", torch.tensor(torch.nan)), (ValueError, "'step' is nan")),
    "steps": (_state("step", torch.ones(2)), (ValueError, "'step' has 2 elements")),
    "no dict": (_replace_state, (TypeError, rf"{PARAM} must be a dict, not Tensor")),
    "lr": (_group("lr", -1.0), (ValueError, "-1")),
    "weight decay": (_group("weight_decay", torch.nan), (ValueError, "nan")),
    "method": (_group("weight_decay_method", "no"), (ValueError, "Invalid weight_decay_method")),
    "differentiable": (_group("differentiable", True), (ValueError, "differentiable=True")),
    "step beyond": (_state("step", 10**400), (ValueError, rf"{PARAM}: state 'step' is inf")),
    "complex step": (
        _state("step", torch.tensor(3j)),
        (TypeError, rf"{PARAM}: state 'step' must be a number of steps, not a tensor of dtype"),
    ),
    "sparse step": (
        _state("step", torch.ones(1).to_sparse()),
        (TypeError, rf"{PARAM}: state 'step'.*layout torch.sparse_coo"),
    ),
    "parameter as step": (
        _state("step", nn.Parameter(torch.tensor(-3.0))),
        (ValueError, rf"{PARAM}: state 'step' is -3"),
    ),
    "group's step": (_group("step", -2), (ValueError, r"param_groups\[0\]\['step'\] is -2")),
    "shared states": (
        _share_states,
        (ValueError, rf"state 'exp_avg.*' of {PARAM} shares memory with state 'exp_.*' of {FIRST}"),
    ),
    "a parameter as state": (
        _share_param,
        (ValueError, rf"state 'exp_avg.*' of {PARAM} shares memory with {FIRST}, and a state is"),
    ),
    "its parameter as state": (
        _take_param,
        (ValueError, rf"state 'exp_avg.*' of {PARAM} shares memory with {PARAM}, and a state is"),
    ),
    "groups": (_add_group, (ValueError, "different number of parameter groups")),
    "parameters": (_drop_param, (ValueError, "doesn't match the size")),
}


@pytest.mark.once
@pytest.mark.parametrize("breakage", BREAKAGES)
@pytest.mark.parametrize("cls", [AdamW, Lion, megatron.FusedAdam, megatron.AdEMAMix])
def test_a_rejected_load_changes_nothing(cls: Any, breakage: str) -> None:
    change, error = BREAKAGES[breakage]

    def load(optimizer: Any) -> None:
        params = make_params()
        source = cls(params, lr=0.5)
        run(source, params, [5, 6, 7])
        saved = copy.deepcopy(source.state_dict())
        change(saved, optimizer)
        if breakage == "no memory":
            saved["state"][1][optimizer._state_names[-1]].untyped_storage().resize_(0)
        optimizer.load_state_dict(saved)

    assert_rejected(lambda params: cls(params, lr=0.01, weight_decay=0.1), F32, load, error)


@ways
def test_a_load_that_copies_ends_sharing(fused: bool | None) -> None:
    params = make_params()
    source = AdamW(params)
    run(source, params, [1])
    saved = source.state_dict()
    for state in saved["state"].values():
        state["exp_avg"] = state["exp_avg_sq"]
    optimizer = AdamW(params, fused=fused, state_dtype=BF16)
    optimizer.load_state_dict(saved)
    run(optimizer, params, [2])
    for state in optimizer.state.values():
        assert not torch.equal(state["exp_avg"], state["exp_avg_sq"])


@ways
@pytest.mark.parametrize("cls", [AdamW, megatron.Lion])
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_duplicate_parameters(cls: Any, fused: bool | None) -> None:
    found = []
    for loads in (False, True):
        params = make_params()
        optimizer = cls([*params, params[0]], fused=fused)
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
        optimizer.param_groups[1]["params"].append(params[1])
        run(optimizer, params, [1])
        if loads:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        run(optimizer, params, [2])
        found.append(contents(optimizer))
    assert_same(found[1], found[0])


@ways
@pytest.mark.parametrize("stores", [False, True], ids=["masters", "remainders"])
def test_masters_of_megatron_are_converted(stores: bool, fused: bool | None) -> None:
    def make(params: Any, stores: bool) -> Any:
        groups = [{"params": params, "fused": fused}]
        return megatron.FusedAdam(groups, **(REMAINDERS if stores else MASTERS))

    params, others = make_params(dtype=BF16), make_params(dtype=BF16)
    source, other = make(params, not stores), make(others, stores)
    run(source, params, [5])
    run(other, others, [5])
    optimizer = make(params, stores)
    optimizer.load_state_dict(source.state_dict())
    run(optimizer, params, [6])
    run(other, others, [6])
    assert_bits(optimizer, other)


def test_other_errors_change_nothing() -> None:
    """Errors of a subclass, of torch and of ``__setstate__``."""

    def both(optimizer: Any) -> None:
        saved = copy.deepcopy(optimizer.state_dict())
        saved["param_groups"][0].update(decoupled_weight_decay="no", lr=7)
        optimizer.load_state_dict(saved)

    def uncopyable(optimizer: Any) -> None:
        saved = copy.deepcopy(optimizer.state_dict())
        saved["param_groups"][0]["extra"] = 2 * torch.tensor(0.5, requires_grad=True)
        optimizer.load_state_dict(saved)

    def set_state(optimizer: Any) -> None:
        group = {**optimizer.param_groups[0], "lr": 7}
        states = {param: {"step": "text"} for param in group["params"]}
        optimizer.__setstate__({"state": states, "param_groups": [group]})

    for load, error in (
        (both, (TypeError, "decoupled_weight_decay must be a bool")),
        (uncopyable, (RuntimeError, "deepcopy")),
        (set_state, (ValueError, "could not convert")),
    ):
        assert_rejected(AdamW, F32, load, error)
        if load is not set_state:
            assert_rejected(megatron.FusedAdam, F32, load, error)


def test_errors_contain_the_parameter_name() -> None:
    optimizer = AdamW([("a", make_params()[0]), ("b", make_params()[1])])
    run(optimizer, optimizer.param_groups[0]["params"], [1])
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][1]["exp_avg"]
    with pytest.raises(ValueError, match=rf"{PARAM} \('b'\) has no 'exp_avg'; it has 'step'"):
        optimizer.load_state_dict(saved)


# ---- missing steps -------------------------------------------------------------------------------


@pytest.mark.once
@ways
@every_optimizer_with_states
@pytest.mark.parametrize("absent", [None, torch.tensor(9.0, device="meta")], ids=["None", "meta"])
@pytest.mark.parametrize("step", [2, 2.0, torch.tensor(2), torch.tensor([2.0])], ids=repr)
def test_step_of_a_group(setup: Setup, step: Any, absent: Any, fused: bool | None) -> None:
    """apex and TransformerEngine save the step in the group."""
    params = make_params()
    optimizer = setup.make(params, fused=fused)
    run(optimizer, params, [1, 2])
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["step"] = step
    del saved["state"][0]["step"]
    saved["state"][1]["step"] = absent
    others = [nn.Parameter(p.detach().clone()) for p in params]
    other = setup.make(others, fused=fused)
    other.load_state_dict(saved)
    assert "step" not in other.param_groups[0]  # it would become stale
    run(optimizer, params, [3, 4])
    run(other, others, [3, 4])
    assert_bits(other, optimizer)
    assert "step" not in other.state_dict()["param_groups"][0]


@ways
@every_optimizer
@pytest.mark.parametrize("how", ["loaded", "by hand"])
def test_no_step(setup: Setup, how: str, fused: bool | None) -> None:
    params = make_params()
    optimizer = setup.make(params, fused=fused)
    run(optimizer, params, [1, 2])
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["step"] = None
    for state in saved["state"].values():
        del state["step"]
    others = [nn.Parameter(p.detach().clone()) for p in params]
    other = setup.make(others, fused=fused)

    def go_on() -> None:
        if how == "loaded":
            other.load_state_dict(saved)
        for param, state in zip(others, saved["state"].values(), strict=True):
            other.state[param] = dict(state)
        run(other, others, [3])

    if not setup.rule.has_step:
        run(optimizer, params, [3])
        go_on()
        assert_same(others, params)
        assert other.state[others[0]]["step"].item() == 1
        return
    before = [p.detach().clone() for p in others]
    what = "the loaded state" if how == "loaded" else "the state"
    pattern = rf"{what} of param_groups\[0\]\['params'\]\[0\] has no 'step', and neither"
    with pytest.raises(ValueError, match=pattern):
        go_on()
    assert_same(others, before)
    if how == "by hand":
        other.param_groups[0]["step"] = 2
        run(other, others, [3])
        run(optimizer, params, [3])
        assert_bits(other, optimizer)
        assert "step" not in other.param_groups[0]


@ways
@every_optimizer
def test_missing_state_at_a_step(setup: Setup, fused: bool | None) -> None:
    params = make_params()
    optimizer = setup.make([{"params": [p]} for p in params], fused=fused)
    run(optimizer, params, [1])
    for name in setup.states:
        state = optimizer.state[params[1]]
        kept = state.pop(name)
        before = contents(optimizer)
        pattern = rf"the state of param_groups\[1\]\['params'\]\[0\] has no '{name}'; it has 'step'"
        with pytest.raises(ValueError, match=pattern):
            run(optimizer, params, [2])
        assert_same(contents(optimizer), before)
        state[name] = kept


@ways
@every_optimizer
def test_parameter_without_states(setup: Setup, fused: bool | None) -> None:
    """As in torch, a parameter that was frozen so far starts from new states."""
    params, others = make_params(), make_params()
    optimizer = setup.make(params, fused=fused)
    run(optimizer, params, [1, 2])
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1] = {}
    saved["param_groups"][0]["step"] = 2
    optimizer.load_state_dict(saved)
    with torch.no_grad():
        params[1].copy_(others[1])
    other = setup.make(others, fused=fused)
    run(optimizer, params, [3])
    run(other, others, [3])
    assert_same([params[1].detach()], [others[1].detach()])
    assert [optimizer.state[p]["step"].item() for p in params] == [3, 1]


@pytest.mark.parametrize("absent", [None, torch.tensor(9, device="meta")], ids=["None", "meta"])
@pytest.mark.parametrize("cls", MEGATRON.values())
def test_absent_step_of_a_megatron_group(cls: Any, absent: Any) -> None:
    params = make_params()
    optimizer = cls(params)
    run(optimizer, params, [1, 2])
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["step"] = absent
    others = [nn.Parameter(p.detach().clone()) for p in params]
    other = cls(others)
    other.load_state_dict(copy.deepcopy(saved))
    assert other.param_groups[0]["step"] == 2
    run(optimizer, params, [3])
    run(other, others, [3])
    assert_same(others, params)
    for state in saved["state"].values():
        state["step"] = None
    if "step" not in cls._rule.hyperparameter_names:
        other.load_state_dict(saved)
        return
    with pytest.raises(ValueError, match="has no 'step', and neither has its group"):
        other.load_state_dict(saved)
    assert other.param_groups[0]["step"] == 3


# ---- masters -------------------------------------------------------------------------------------


def _sharing(param: Tensor) -> Tensor:
    """A float32 tensor of the parameter's shape that shares its memory."""
    buffer = torch.zeros(2 * param.numel(), dtype=BF16)
    buffer[: param.numel()] = param.detach().flatten()
    param.data = buffer[: param.numel()].view(param.shape)
    return buffer.view(F32).view(param.shape)


WRONG: dict[str, tuple[Any, str]] = {
    "bfloat16": (lambda p: p.detach().clone(), r"dtype torch\.bfloat16"),
    "the parameter": (lambda p: p, r"dtype torch\.bfloat16"),
    "float64": (lambda p: p.detach().double(), r"dtype torch\.float64"),
    "int32": (lambda p: p.detach().int(), r"dtype torch\.int32"),
    "shape": (lambda p: torch.zeros(p.numel()), "has shape"),
    "sparse": (lambda p: p.detach().float().to_sparse(), "layout"),
    "expanded": (lambda p: torch.zeros(()).expand(p.shape), "overlaps itself"),
    "number": (lambda p: 1.0, "must be a Tensor"),
}


@ways
@pytest.mark.parametrize("absent", [None, {}], ids=repr)
@pytest.mark.parametrize("how", ["loaded", "by hand", "loaded, remainder", "by hand, remainder"])
def test_missing_master_is_created(how: str, absent: Any, fused: bool | None) -> None:
    def make(params: Any) -> Any:
        if "remainder" in how:
            return megatron.FusedAdam([{"params": params, "fused": fused}], lr=1e-3, **REMAINDERS)
        return AdamW(params, lr=1e-3, fused=fused, **MASTERS)

    params, others = make_params(dtype=BF16), make_params(dtype=BF16)
    optimizer, other = make(params), make(others)
    for each, tensors in ((optimizer, params), (other, others)):
        run(each, tensors, [1])
    if how.startswith("loaded"):
        saved = copy.deepcopy(optimizer.state_dict())
        for state in saved["state"].values():
            state["master_param"] = absent
        optimizer.load_state_dict(saved)
    else:
        for state in optimizer.state.values():
            state["master_param"] = absent
    for param, state in other.state.items():
        if "remainder" in how:
            state["master_param"].zero_()
        else:
            state["master_param"].copy_(param)
    for _ in range(15):
        for param, same in zip(params, others, strict=True):
            param.grad, same.grad = torch.ones_like(param), torch.ones_like(param)
        optimizer.step()
        other.step()
    assert_bits(optimizer, other)
    assert not torch.equal(params[0], make_params(dtype=BF16)[0])


@pytest.mark.once
@ways
@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(wrong, marks=pytest.mark.real) if wrong in ("sparse", "no memory") else wrong
        for wrong in (*WRONG, "sharing", "meta", "no memory")
    ],
)
@pytest.mark.parametrize("how", ["loaded", "by hand"])
def test_invalid_masters_are_rejected(how: str, wrong: str, fused: bool | None) -> None:
    if wrong == "sharing" and how == "by hand":
        pytest.skip("found with all other memory that is shared, in test_overlap.py")
    params = make_params(dtype=BF16)
    optimizer = AdamW(params, fused=fused, **MASTERS)
    run(optimizer, params, [1])
    if wrong == "sharing":
        master, pattern = _sharing(params[1]), rf"'master_param' of {PARAM} shares memory with"
    elif wrong == "meta":
        master, pattern = torch.zeros(5, 2, device="meta"), "on meta"
    elif wrong == "no memory":
        master, pattern = torch.zeros(5, 2), "has no memory"
        master.untyped_storage().resize_(0)
    else:
        make, pattern = WRONG[wrong]
        master = make(params[1])
    before = [p.detach().clone() for p in params]
    saved = optimizer.state_dict()
    saved["state"][1] = {**saved["state"][1], "master_param": master}
    if how == "by hand":
        optimizer.state[params[1]]["master_param"] = master
        set_grads(params, 2)
    go_on = optimizer.step if how == "by hand" else lambda: optimizer.load_state_dict(saved)
    with pytest.raises((TypeError, ValueError), match=pattern):
        go_on()
    assert_same([p.detach() for p in params], before)


@ways
def test_wrong_masters_with_remainders(fused: bool | None) -> None:
    params = make_params(dtype=BF16)
    optimizer = megatron.FusedAdam([{"params": params, "fused": fused}], **REMAINDERS)
    run(optimizer, params, [1])
    optimizer.state[params[1]]["master_param"] = torch.zeros(3, dtype=torch.int16)
    with pytest.raises(ValueError, match="'master_param' has shape"):
        run(optimizer, params, [2])
    optimizer.state[params[1]]["master_param"] = torch.zeros(5, 2, dtype=BF16)
    with pytest.raises(TypeError, match=r"dtype torch.bfloat16; expected torch.float32 or torch.i"):
        run(optimizer, params, [2])
