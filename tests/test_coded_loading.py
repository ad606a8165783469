"""8-bit states: the filter, copies, state dicts and conversions, and what is refused."""

import copy
import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from optimizers import SETUPS, Setup, assert_same, contents, make_params, run, set_grads
from support import assert_equal_bits
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from emerging_optimizers import AdamW, Lion, ScalarOptimizer
from emerging_optimizers._codes import E4M3, UE5M3, decode, scale_key

pytestmark = [
    pytest.mark.usefixtures("_no_other_device"),
    pytest.mark.builtin_rules("their states are codes"),
]

F32, BF16, F16, U8 = torch.float32, torch.bfloat16, torch.float16, torch.uint8
EIGHT_BIT: dict[str, Any] = {"state_dtype": "8bit"}
SHAPES = [(128, 32), (5,), (4, 32, 32)]
KEYS = ("exp_avg", "exp_avg_sq")
CODES = dict(zip(KEYS, (E4M3, UE5M3), strict=True))
WITH_STATES = [setup for setup in SETUPS if setup.states]


def trained(fused: bool | None = None, dtype: torch.dtype = F32, **options: Any) -> Any:
    params = make_params(SHAPES, dtype)
    optimizer = AdamW(params, fused=fused, **{"lr": 0.01, **EIGHT_BIT, **options})
    run(optimizer, params, [1, 2, 3])
    return optimizer, params


def params_of(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def continue_alike(optimizer: torch.optim.Optimizer, other: torch.optim.Optimizer) -> None:
    for each in (optimizer, other):
        torch.manual_seed(7)
        run(each, params_of(each), [4, 5, 6])
    assert_same(contents(other), contents(optimizer))


def saved_and_loaded(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


# ---- the filter ----------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, 32)
        self.layer = nn.Linear(64, 64)
        self.head = nn.Linear(32, 128)


def test_filter(fused: bool | None) -> None:
    model = Model()
    calls: list[Any] = []

    def wants_codes(name: str | None, param: Tensor) -> bool:
        calls.append((name, param))
        return name != "head.weight"

    named = dict(model.named_parameters())
    optimizer = AdamW(
        model.named_parameters(), fused=fused, state_dtype_filter=wants_codes, **EIGHT_BIT
    )
    assert [name for name, _ in calls] == list(named)
    assert all(param is named[name] for name, param in calls)
    for step in (1, 2):
        run(optimizer, list(named.values()), [step])
    optimizer.load_state_dict(optimizer.state_dict())
    run(optimizer, list(named.values()), [3])
    assert len(calls) == len(named)
    coded = [n for n, p in named.items() if optimizer.state[p]["exp_avg"].dtype == U8]
    assert coded == ["embedding.weight", "layer.weight"]
    assert optimizer.state[named["head.weight"]]["exp_avg"].dtype == F32
    # It is not an option of groups.
    assert "state_dtype_filter" not in optimizer.param_groups[0]
    assert "state_dtype_filter" not in optimizer.defaults
    saved = optimizer.state_dict()
    assert saved.keys() == {"state", "param_groups"}
    assert "state_dtype_filter" not in saved["param_groups"][0]
    assert saved["param_groups"][0]["state_dtype"] == "8bit"


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("is_filtered", [False, True])
@pytest.mark.parametrize("is_new", [False, True])
def test_answers_are_kept_in_copies(
    how: str, is_filtered: bool, is_new: bool, fused: bool | None
) -> None:
    params = make_params([(128, 32), (64, 64)])
    options = dict(EIGHT_BIT)
    if is_filtered:
        options["state_dtype_filter"] = lambda name, param: param.shape[0] == 64
    optimizer = AdamW(params, fused=fused, **options)
    if not is_new:
        run(optimizer, params, [1, 2])
    other = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    continue_alike(optimizer, other)
    found = [other.state[param]["exp_avg"].dtype for param in params_of(other)]
    assert found == [F32 if is_filtered else U8, U8]
    # And in copies of copies.
    again = pickle.loads(pickle.dumps(other))
    again.state.clear()
    run(again, params_of(again), [1])
    assert [again.state[param]["exp_avg"].dtype for param in params_of(again)] == found


def test_filter_of_groups(fused: bool | None) -> None:
    names: list[Any] = []

    def wants_codes(name: str | None, param: Tensor) -> bool:
        names.append(name)
        return name is None or "skip" not in name

    params = make_params([(128, 32)] * 4)
    groups: list[dict[str, Any]] = [
        {"params": [("a", params[0]), ("skip", params[1])]},
        {"params": [("b", params[2])], "state_dtype": F32},
    ]
    optimizer = AdamW(groups, fused=fused, state_dtype_filter=wants_codes, **EIGHT_BIT)
    assert names == ["a", "skip", "b"]
    optimizer.add_param_group({"params": [("skip too", params[3])]})
    assert names == ["a", "skip", "b", "skip too"]
    run(optimizer, params, [1])
    found = [optimizer.state[param]["exp_avg"].dtype for param in params]
    assert found == [U8, F32, F32, F32]
    unnamed = AdamW(make_params(), state_dtype_filter=wants_codes)
    assert names[4:] == [None, None]
    assert unnamed.param_groups[0]["state_dtype"] is None


@pytest.mark.parametrize("answer", [1, None, "yes", torch.tensor(True)])
def test_answers_that_are_not_bools(answer: Any) -> None:
    params = make_params([(128, 32), (3,)])
    kind = re.escape(type(answer).__name__)
    for named, name in (
        ([("w", params[0])], "'w'"),
        (params[:1], r"param_groups\[0\]\['params'\]\[0\]"),
    ):
        text = f"^state_dtype_filter returned {kind} for {name}; expected a bool$"
        with pytest.raises(TypeError, match=text):
            AdamW(named, state_dtype_filter=lambda name, param: answer, **EIGHT_BIT)
    # A group that is refused is not added, nor are answers kept.
    optimizer = AdamW(
        params[:1],
        state_dtype_filter=lambda name, param: True if param is params[0] else answer,
        **EIGHT_BIT,
    )
    with pytest.raises(TypeError, match="expected a bool"):
        optimizer.add_param_group({"params": params[1:]})
    assert len(optimizer.param_groups) == 1
    assert list(optimizer._filtered) == params[:1]
    run(optimizer, params[:1], [1])


def test_answers_of_numpy() -> None:
    params = make_params([(128, 32)] * 2)
    optimizer = AdamW(
        params, state_dtype_filter=lambda name, param: np.bool_(param is params[0]), **EIGHT_BIT
    )
    run(optimizer, params, [1])
    assert [optimizer.state[p]["exp_avg"].dtype for p in params] == [U8, F32]


def test_filters_that_are_refused() -> None:
    params = make_params()
    for value in (5, "yes", [lambda name, param: True]):
        text = f"state_dtype_filter must be a function .*, not {type(value).__name__}$"
        with pytest.raises(TypeError, match=text):
            AdamW(params, state_dtype_filter=value, **EIGHT_BIT)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="argument of the optimizer, not of a group"):
        AdamW([{"params": params, "state_dtype_filter": lambda name, param: True}])
    optimizer = AdamW(params[:1])
    with pytest.raises(TypeError, match="argument of the optimizer, not of a group"):
        optimizer.add_param_group({"params": params[1:], "state_dtype_filter": None})
    assert len(optimizer.param_groups) == 1

    def fails(name: str | None, param: Tensor) -> bool:
        raise KeyError(name)

    with pytest.raises(KeyError):
        AdamW(params, state_dtype_filter=fails)


# ---- copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("setup", WITH_STATES, ids=str)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict", "load twice"])
def test_copies_continue(setup: Setup, how: str, fused: bool | None) -> None:
    for dtype, options in ((F32, {}), (BF16, {"master_weights": True})):
        params = make_params(SHAPES, dtype)
        optimizer = setup.make(params, lr=0.01, fused=fused, **EIGHT_BIT, **options)
        run(optimizer, params, [1, 2, 3])
        if how == "deepcopy":
            other: ScalarOptimizer = copy.deepcopy(optimizer)
        elif how == "pickle":
            other = pickle.loads(pickle.dumps(optimizer))
        else:
            clones = [nn.Parameter(p.detach().clone()) for p in params]
            other = setup.make(clones, fused=fused, **EIGHT_BIT, **options)
            if how == "load twice":
                run(other, clones, [1])
                for clone, param in zip(clones, params, strict=True):
                    clone.data.copy_(param)
                other.load_state_dict(saved_and_loaded(optimizer))
            other.load_state_dict(saved_and_loaded(optimizer))
        coded = [k for k, v in optimizer.state[params[0]].items() if v.dtype == U8]
        assert coded
        for a, b in zip(params, params_of(other), strict=True):
            assert list(other.state[b]) == list(optimizer.state[a])
            for key in coded:
                if key in optimizer.state[a]:
                    assert other.state[b][key].dtype == optimizer.state[a][key].dtype
                    pointers = [o.state[p][key].data_ptr() for o, p in
                                ((optimizer, a), (other, b))]  # fmt: skip
                    assert pointers[0] != pointers[1]
        continue_alike(optimizer, other)


# ---- conversions ---------------------------------------------------------------------------------


def converted(
    source: Any, to: Any, fused: bool | None = None, dtype: torch.dtype = F32, **options: Any
) -> tuple[Any, list[Any]]:
    """Load a state dict into an optimizer with another dtype of states."""
    params = [nn.Parameter(p.detach().clone().to(dtype)) for p in params_of(source)]
    other = AdamW(params, lr=0.5, fused=fused, state_dtype=to, **options)
    other.load_state_dict(saved_and_loaded(source))
    return other, params


def numbers(state: dict[str, Any], name: str) -> Tensor:
    if state[name].dtype == U8:
        return decode(state[name], state[scale_key(name)], CODES[name])
    value: Tensor = state[name].float()
    return value


@pytest.mark.parametrize("given", [F32, BF16, F16], ids=str)
def test_to_codes(given: torch.dtype, fused: bool | None) -> None:
    source, sources = trained(fused, state_dtype=given)
    state = source.state[sources[0]]
    # Second moments that are much smaller than their neighbours' stay positive.
    state["exp_avg_sq"][0, :8] *= 1e-4
    state["exp_avg_sq"][1, ::2] = 1e-30 if given != F16 else 1e-7
    state["exp_avg_sq"][2] = 0
    other, params = converted(source, "8bit", fused)
    assert other.param_groups[0]["lr"] == 0.01
    for param, old in zip(params, sources, strict=True):
        new, before = other.state[param], source.state[old]
        for name in KEYS:
            wanted = before[name].float()
            got = numbers(new, name)
            if param.dim() == 1:
                assert new[name].dtype == F32
                assert torch.equal(got, wanted)
                continue
            assert (new[name].dtype, new[scale_key(name)].dtype) == (U8, U8)
            groups = wanted.unflatten(-1, (-1, 32))
            largest = groups.abs().amax(-1, keepdim=True).expand(groups.shape).flatten(-2)
            smallest = largest * {"exp_avg": 2.0**-15, "exp_avg_sq": 2.0**-30}[name]
            error = (got - wanted).abs()
            assert (error <= torch.maximum(wanted.abs() / 16, smallest)).all()
            if name == "exp_avg_sq":
                assert torch.equal(got > 0, wanted > 0)
    run(other, params, [4, 5])
    assert all(param.isfinite().all() for param in params)
    assert other.state[params[0]]["exp_avg"].dtype == U8


@pytest.mark.parametrize("to", [F32, BF16, F16, None], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_from_codes(to: torch.dtype | None, dtype: torch.dtype, fused: bool | None) -> None:
    source, sources = trained(fused, dtype)
    other, params = converted(source, to, fused, dtype)
    for param, old in zip(params, sources, strict=True):
        new, before = other.state[param], source.state[old]
        assert list(new) == ["step", *KEYS]
        for name in KEYS:
            # None keeps the dtype of a state that was loaded, if it is no code.
            as_loaded = dtype if param.dim() > 1 else before[name].dtype
            wanted = to or as_loaded
            assert new[name].dtype == wanted
            assert_equal_bits(new[name], numbers(before, name).to(wanted), name)
    run(other, params, [4, 5])
    assert other.state[params[0]]["exp_avg"].dtype == (to or dtype)


def test_there_and_back(fused: bool | None) -> None:
    """Every code is encoded as itself, so that nothing is lost."""
    source, sources = trained(fused)
    wide, _ = converted(source, F32, fused)
    back, params = converted(wide, "8bit", fused)
    for param, old in zip(params, sources, strict=True):
        assert back.state[param].keys() == source.state[old].keys()
        for name in KEYS:
            assert torch.equal(numbers(back.state[param], name), numbers(source.state[old], name))


def test_by_key_and_filter(fused: bool | None) -> None:
    source, _ = trained(fused)
    other, params = converted(source, {"exp_avg": "8bit", "exp_avg_sq": BF16}, fused)
    state = other.state[params[0]]
    assert list(state) == ["step", "exp_avg", "exp_avg_scale", "exp_avg_sq"]
    assert state["exp_avg_sq"].dtype == BF16
    filtered, params = converted(
        source, "8bit", fused, state_dtype_filter=lambda name, param: param.dim() == 3
    )
    found = [filtered.state[param]["exp_avg"].dtype for param in params]
    assert found == [F32, F32, U8]
    run(filtered, params, [4])
    assert [filtered.state[param]["exp_avg"].dtype for param in params] == found


def test_from_torch(fused: bool | None) -> None:
    theirs = make_params(SHAPES)
    source = torch.optim.AdamW(theirs)
    run(source, theirs, [1, 2])
    other, params = converted(source, "8bit", fused)
    assert other.state[params[0]]["exp_avg_sq"].dtype == U8
    assert (numbers(other.state[params[0]], "exp_avg_sq") > 0).all()
    for each, own in ((source, theirs), (other, params)):
        run(each, own, [3, 4])
    torch.testing.assert_close(params, theirs, rtol=1e-3, atol=1e-3)


# ---- what is refused -----------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], Any]


def _set(key: str, value: Callable[[Tensor], Any]) -> Change:
    def change(state: dict[str, Any]) -> None:
        state[key] = value(state[key])

    return change


REFUSED: dict[str, tuple[Change, type[Exception], str]] = {
    "no scales": (
        lambda state: state.pop("exp_avg_scale"),
        TypeError,
        "state 'exp_avg' has dtype torch.uint8, so 'exp_avg_scale' must be a Tensor of that dtype,"
        " not NoneType",
    ),
    "None as scales": (
        _set("exp_avg_sq_scale", lambda _: None),
        TypeError,
        "state 'exp_avg_sq' has dtype torch.uint8, so 'exp_avg_sq_scale' must be a Tensor of that"
        " dtype, not NoneType",
    ),
    "a number as scales": (
        _set("exp_avg_scale", lambda _: 3),
        TypeError,
        "'exp_avg_scale' must be a Tensor of that dtype, not int",
    ),
    "scales of another dtype": (
        _set("exp_avg_scale", lambda scales: scales.float()),
        TypeError,
        "'exp_avg_scale' must be a Tensor of that dtype, not dtype torch.float32",
    ),
    "too many scales": (
        _set("exp_avg_scale", lambda scales: scales.repeat(1, 2)),
        ValueError,
        "state 'exp_avg_scale' has shape (128, 2); expected (128, 1)",
    ),
    "flat scales": (
        _set("exp_avg_scale", lambda scales: scales.flatten()),
        ValueError,
        "state 'exp_avg_scale' has shape (128,); expected (128, 1)",
    ),
    "meta scales": (
        _set("exp_avg_scale", lambda scales: scales.to("meta")),
        ValueError,
        "the parameter is on cpu but state 'exp_avg_scale' is on meta",
    ),
    "codes of another shape": (
        _set("exp_avg", lambda codes: codes[:64]),
        ValueError,
        "state 'exp_avg' has shape (64, 32) but the parameter has shape (128, 32)",
    ),
    "other integers": (
        _set("exp_avg", lambda codes: codes.to(torch.int8)),
        TypeError,
        "the parameter has dtype torch.float32 but state 'exp_avg' has dtype torch.int8",
    ),
    "expanded scales": (
        _set("exp_avg_scale", lambda scales: scales[:1].expand(128, 1)),
        ValueError,
        "state 'exp_avg_scale' overlaps itself in memory",
    ),
    "sparse scales": (
        _set("exp_avg_scale", lambda scales: scales.to_sparse()),
        TypeError,
        "state 'exp_avg_scale' has layout torch.sparse_coo",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("how", ["load", "load as float32", "set"])
def test_refused_states(kind: str, how: str, fused: bool | None) -> None:
    optimizer, params = trained(fused)
    change, error, text = REFUSED[kind]
    name = "param_groups[0]['params'][0]"
    before = contents(optimizer)
    if how == "set":
        state = optimizer.state[params[0]]
        kept = dict(state)
        change(state)
        set_grads(params, 4)
        with pytest.raises(error, match=re.escape(f"{name}: ") + ".*" + re.escape(text)):
            optimizer.step()
        state.clear()
        state.update(kept)
    else:
        state_dict = copy.deepcopy(optimizer.state_dict())
        change(state_dict["state"][0])
        if how == "load as float32":
            optimizer.param_groups[0]["state_dtype"] = F32
        with pytest.raises(
            error, match=re.escape(f"the loaded state of {name}: ") + ".*" + re.escape(text)
        ):
            optimizer.load_state_dict(state_dict)
    assert_same(contents(optimizer), before)


def test_codes_that_the_rule_does_not_allow() -> None:
    params = make_params([(128, 32)])
    optimizer = AdamW(params, amsgrad=True)
    run(optimizer, params, [1])
    rule = optimizer._rule_of(optimizer.param_groups[0])
    refused = [n for n, c in zip(rule.state_names, rule.rule.codes, strict=True) if c is None]
    before = contents(optimizer)
    for name in refused:
        state_dict = copy.deepcopy(optimizer.state_dict())
        state_dict["state"][0][name] = torch.zeros(128, 32, dtype=U8)
        state_dict["state"][0][scale_key(name)] = torch.zeros(128, 1, dtype=U8)
        with pytest.raises(TypeError, match=f"'{name}' .*does not allow 8-bit codes for it"):
            optimizer.load_state_dict(state_dict)
    assert_same(contents(optimizer), before)


SHARED: dict[str, tuple[str, Callable[[Any, Any], Tensor]]] = {
    "scales of two states": ("exp_avg_scale", lambda mine, other: mine["exp_avg_sq_scale"]),
    "codes of two states": ("exp_avg", lambda mine, other: mine["exp_avg_sq"]),
    "scales of two parameters": ("exp_avg_scale", lambda mine, other: other["exp_avg_scale"]),
    "codes of two parameters": ("exp_avg_sq", lambda mine, other: other["exp_avg_sq"]),
    "scales in codes": (
        "exp_avg_scale",
        lambda mine, other: mine["exp_avg"].view(-1)[128:256].view(128, 1),
    ),
    "scales in another state's codes": (
        "exp_avg_scale",
        lambda mine, other: other["exp_avg_sq"].view(-1)[-128:].view(128, 1),
    ),
}


@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize("how", ["load", "set"])
def test_shared_memory(kind: str, how: str, fused: bool | None) -> None:
    params = make_params([(128, 32)] * 2)
    optimizer = AdamW(params, fused=fused, **EIGHT_BIT)
    run(optimizer, params, [1, 2])
    key, place = SHARED[kind]
    mine, other = (optimizer.state[param] for param in params)
    before = contents(optimizer)
    kept = mine[key]
    text = r"state '\w+' of param_groups.* shares memory with state '\w+' of param_groups"
    if how == "set":
        mine[key] = place(mine, other)
        set_grads(params, 3)
        with pytest.raises(ValueError, match=text):
            optimizer.step()
        mine[key] = kept
    else:
        state_dict = copy.deepcopy(optimizer.state_dict())
        state_dict["state"][0][key] = place(state_dict["state"][0], state_dict["state"][1])
        with pytest.raises(ValueError, match=text):
            optimizer.load_state_dict(state_dict)
    assert_same(contents(optimizer), before)


def test_scales_in_a_parameter(fused: bool | None) -> None:
    params = make_params([(128, 32)] * 2)
    optimizer = Lion(params, fused=fused, **EIGHT_BIT)
    run(optimizer, params, [1, 2])
    bytes_of = params[1].data.view(-1).view(U8)
    optimizer.state[params[0]]["exp_avg_scale"] = bytes_of[:128].view(128, 1)
    set_grads(params, 3)
    before = contents(optimizer)
    with pytest.raises(ValueError, match=r"'exp_avg_scale' of .* shares memory with param_groups"):
        optimizer.step()
    assert_same(contents(optimizer), before)


def test_scales_in_a_gradient(fused: bool | None) -> None:
    params = make_params([(128, 32)])
    optimizer = Lion(params, fused=fused, **EIGHT_BIT)
    run(optimizer, params, [1, 2])
    grad = params[0].grad
    assert grad is not None
    optimizer.state[params[0]]["exp_avg_scale"] = grad.view(-1).view(U8)[:128].view(128, 1)
    before = contents(optimizer)
    with pytest.raises(ValueError, match=r"'exp_avg_scale' of .* shares memory with the gradient"):
        optimizer.step()
    assert_same(contents(optimizer), before)


@pytest.mark.real
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("is_flat", [False, True])
@pytest.mark.parametrize("dtype", [None, BF16])
def test_cast_codes_are_refused(is_flat: bool, dtype: torch.dtype | None, tmp_path: Path) -> None:
    """What `torch.distributed.checkpoint` makes of codes, if it loads them as numbers."""
    options = StateDictOptions(flatten_optimizer_state_dict=is_flat)
    models = [nn.Linear(128, 40) for _ in range(3)]
    saved, wide, coded = (
        AdamW(model.parameters(), lr=0.01, state_dtype=state_dtype)
        for model, state_dtype in zip(models, ("8bit", dtype, "8bit"), strict=True)
    )
    run(saved, list(models[0].parameters()), [1, 2, 3])
    saved.zero_grad()
    checkpoint.save(
        get_optimizer_state_dict(models[0], saved, options=options), checkpoint_id=tmp_path
    )
    for model, other in zip(models[1:], (wide, coded), strict=True):
        model.load_state_dict(models[0].state_dict())
        loaded = get_optimizer_state_dict(model, other, options=options)
        checkpoint.load(loaded, checkpoint_id=tmp_path)
        if other is wide:
            before = copy.deepcopy(other.state_dict())
            with pytest.raises(ValueError, match=r"'exp_avg' has 8-bit codes that were cast to"):
                set_optimizer_state_dict(model, other, loaded, options=options)
            assert_same(list(tensors_in(other.state_dict())), list(tensors_in(before)))
        else:
            set_optimizer_state_dict(model, other, loaded, options=options)
    # As the error says.
    wide.load_state_dict(copy.deepcopy(coded.state_dict()))
    for key in KEYS:
        param, other_param = models[0].weight, models[1].weight
        wanted = decode(saved.state[param][key], saved.state[param][scale_key(key)], CODES[key])
        assert_equal_bits(wide.state[other_param][key], wanted.to(dtype or F32), key)


def tensors_in(saved: dict[str, Any]) -> list[Tensor]:
    return [v for state in saved["state"].values() for v in state.values()]


def test_whole_numbers_are_no_codes() -> None:
    """Float32 states of an optimizer that had 8-bit states before may have any value."""
    optimizer, params = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    for value in (0.0, 1.0, 300.0, 2.5):
        saved["state"][0]["exp_avg"] = torch.full_like(params[0], value)
        other = AdamW(params)
        other.load_state_dict(copy.deepcopy(saved))
        assert (other.state[params[0]]["exp_avg"] == value).all()
