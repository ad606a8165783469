"""In `megatron`, a group's ``step`` is the counter, and a step creates all states."""

import copy
from typing import Any

import pytest
import torch
from optimizers import assert_same, contents, make_grads
from support import assert_equal_bits
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from emerging_optimizers import AdamW, megatron

pytestmark = [
    pytest.mark.on_devices("tests-states"),
    pytest.mark.usefixtures("_no_other_device"),
]

BF16, F32 = torch.bfloat16, torch.float32
CLASSES: list[Any] = [
    megatron.FusedAdam,
    megatron.AdEMAMix,
    megatron.LaProp,
    megatron.Lion,
    megatron.Signum,
    megatron.SimplifiedAdEMAMix,
]
every_class = pytest.mark.parametrize("cls", CLASSES)
ways = pytest.mark.parametrize("fused", [None, False], ids=["native", "fallback"])
devices = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda, id="cuda")]
)
MASTERS: dict[str, Any] = {"master_weights": True}
STORED: dict[str, Any] = {**MASTERS, "store_param_remainders": True}


def make_params(device: str = "cpu", dtype: torch.dtype = F32) -> list[Tensor]:
    generator = torch.Generator("cpu").manual_seed(7)
    return [torch.randn(n, generator=generator).to(device, dtype) for n in (37, 1, 20)]


def set_grads(params: Any, step: int, missing: Any = ()) -> None:
    grads = make_grads([p.detach().float().cpu() for p in params], step)
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        grad = grad.to(param.device)
        param.decoupled_grad = None if i in missing else grad


def run(optimizer: Any, steps: Any, missing: Any = ()) -> None:
    for step in steps:
        for group in optimizer.param_groups:
            set_grads(group["params"], step, missing)
        optimizer.step()


def make(cls: Any, params: Any, fused: bool | None = None, **options: Any) -> Any:
    groups = [{"params": params, "fused": fused}]
    return cls(groups, use_decoupled_grad=True, lr=0.05, weight_decay=0.1, **options)


def steps_of(optimizer: Any) -> list[int]:
    return [int(state["step"]) for state in optimizer.state.values()]


def names_of(optimizer: Any, **options: Any) -> set[str]:
    return {"step", *optimizer._state_names, *(["master_param"] if options else [])}


# ---- the group's step ----------------------------------------------------------------------------


@ways
@devices
@every_class
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("number", [100, 100.0, "tensor", "device tensor"], ids=str)
def test_a_step_can_be_set(
    cls: Any, number: Any, capturable: bool, device: str, fused: bool | None
) -> None:
    if number == "device tensor" and device == "cpu":
        return  # equal to "tensor"
    params, others = make_params(device), make_params(device)
    options = {"capturable": capturable}
    optimizer, other = (make(cls, ps, fused, **options) for ps in (params, others))
    run(optimizer, [1, 2, 3])
    run(other, [1, 2, 3])
    if isinstance(number, str):
        number = torch.tensor(100, device=device if number.startswith("device") else "cpu")
    optimizer.param_groups[0]["step"] = number
    saved = copy.deepcopy(other.state_dict())
    saved["param_groups"][0]["step"] = 100
    other.load_state_dict(saved)
    run(optimizer, [4, 5])
    run(other, [4, 5])
    assert_same(contents(optimizer), contents(other))
    assert int(optimizer.param_groups[0]["step"]) == 102
    assert steps_of(optimizer) == [102] * 3


@ways
def test_bias_correction_uses_it(fused: bool | None) -> None:
    params = [torch.zeros(3)]
    optimizer = megatron.FusedAdam([{"params": params, "fused": fused}], lr=1.0, eps=0.0)
    optimizer.param_groups[0]["step"] = 100
    params[0].grad = torch.ones(3)
    optimizer.step()
    wanted = (0.1 / (1 - 0.9**101)) / (0.001 / (1 - 0.999**101)) ** 0.5
    torch.testing.assert_close(params[0], torch.full((3,), -wanted), rtol=1e-6, atol=0)
    assert optimizer.param_groups[0]["step"] == 101


@ways
@devices
@every_class
@pytest.mark.parametrize("capturable", [False, True])
def test_parameters_without_a_gradient_follow(
    cls: Any, capturable: bool, device: str, fused: bool | None
) -> None:
    params, others = make_params(device), make_params(device)
    options = {"capturable": capturable}
    optimizer, other = make(cls, params, fused, **options), make(cls, others, fused, **options)
    run(optimizer, [1])
    run(optimizer, [2, 3], missing=[1])
    assert steps_of(optimizer) == [3] * 3
    run(optimizer, [4], missing=range(3))
    assert steps_of(optimizer) == [4] * 3
    assert int(optimizer.param_groups[0]["step"]) == 4
    # As if its unchanged state had been set just before this gradient.
    run(other, [1])
    saved = copy.deepcopy(other.state_dict())
    saved["param_groups"][0]["step"] = 4
    other.load_state_dict(saved)
    run(optimizer, [5])
    run(other, [5])
    assert_same([params[1]], [others[1]])


@ways
@devices
@pytest.mark.parametrize("capturable", [False, True])
def test_skipped_steps_are_not_counted(capturable: bool, device: str, fused: bool | None) -> None:
    params, others = make_params(device), make_params(device)
    optimizer = make(megatron.FusedAdam, params, fused, capturable=capturable)
    other = make(megatron.FusedAdam, others, fused)
    for step, is_found in ((1, False), (2, True), (2, False), (3, True)):
        set_grads(params, step, [1] if step == 2 else [])
        optimizer.found_inf = torch.tensor(float(is_found), device=device)
        optimizer.step()
        del optimizer.found_inf
    run(other, [1])
    run(other, [2], [1])
    assert int(optimizer.param_groups[0]["step"]) == 2
    assert steps_of(optimizer) == [2] * 3
    run(optimizer, [3])
    run(other, [3])
    assert_same(params, others)
    assert int(optimizer.param_groups[0]["step"]) == 3


@ways
@every_class
def test_step_of_none(cls: Any, fused: bool | None) -> None:
    """A step of None is absent: the largest counter of the parameters is used."""
    params, others = make_params(), make_params()
    optimizer, other = make(cls, params, fused), make(cls, others, fused)
    run(optimizer, [1, 2, 3])
    run(other, [1, 2, 3])
    optimizer.state[params[1]]["step"].fill_(1)
    optimizer.param_groups[0]["step"] = None
    assert optimizer.state_dict()["param_groups"][0]["step"] == 3
    run(optimizer, [4])
    run(other, [4])
    assert_same(contents(optimizer), contents(other))
    assert optimizer.param_groups[0]["step"] == 4


@ways
@pytest.mark.parametrize(
    ("step", "error"),
    [
        (-1, ValueError),
        (torch.nan, ValueError),
        ("3", TypeError),
        (torch.ones(2), ValueError),
        (10**400, ValueError),
        (torch.tensor(3j), TypeError),
        (nn.Parameter(torch.tensor(-3.0)), ValueError),
        (nn.Parameter(torch.tensor(torch.nan)), ValueError),
        (torch.tensor(3, device="meta"), ValueError),
    ],
    ids=lambda value: str(value)[:40],
)
def test_invalid_steps(step: Any, error: Any, fused: bool | None) -> None:
    params = make_params()
    optimizer = make(megatron.FusedAdam, params, fused)
    run(optimizer, [1])
    before = contents(optimizer)
    optimizer.param_groups[0]["step"] = step
    with pytest.raises(error, match=r"param_groups\[0\]\['step'\]"):
        run(optimizer, [2])
    assert optimizer.param_groups[0]["step"] is step
    assert_same(contents(optimizer), before)
    set_grads(params, 2)
    optimizer.param_groups[0]["step"] = 1
    params[1].decoupled_grad = torch.ones(5)  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="shape"):
        optimizer.step()
    assert optimizer.param_groups[0]["step"] == 1
    assert_same(contents(optimizer), before)


@ways
@pytest.mark.parametrize("counter", ["3", torch.tensor(-1.0), torch.tensor(3.0, device="meta")])
def test_invalid_counters(counter: Any, fused: bool | None) -> None:
    params = make_params()
    optimizer = make(megatron.FusedAdam, params, fused)
    run(optimizer, [1])
    optimizer.param_groups[0]["step"] = None
    optimizer.state[params[1]]["step"] = counter
    before = [p.detach().clone() for p in params]
    with pytest.raises(
        (TypeError, ValueError), match=r"^param_groups\[0\]\['params'\]\[1\]: state 's"
    ):
        run(optimizer, [2])
    assert_same([p.detach() for p in params], before)


@every_class
def test_a_state_dict_has_a_step_in_each_state_and_group(cls: Any) -> None:
    params = make_params()
    optimizer = make(cls, params)
    run(optimizer, [1, 2])
    optimizer.param_groups[0]["step"] = 7
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["step"] == 7
    assert [s["step"].item() for s in saved["state"].values()] == [7] * 3
    assert {s["step"].dtype for s in saved["state"].values()} == {F32}
    assert steps_of(optimizer) == [2] * 3


def test_a_top_level_optimizer_continues() -> None:
    params, others = make_params(), make_params()
    optimizer = make(megatron.FusedAdam, params)
    run(optimizer, [1, 2])
    with torch.no_grad():
        torch._foreach_copy_(others, params)
    other = AdamW(others)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert "step" not in other.param_groups[0]
    run(optimizer, [3])
    set_grads(others, 3)
    for param in others:
        param.grad = param.decoupled_grad  # type: ignore[attr-defined]
    other.step()
    assert_same(others, params)


# ---- the states ----------------------------------------------------------------------------------


@ways
@every_class
@pytest.mark.parametrize("options", [{}, MASTERS, STORED], ids=["", "masters", "remainders"])
def test_a_step_creates_all_states(cls: Any, options: Any, fused: bool | None) -> None:
    """Like TransformerEngine's, a step creates states before it checks for gradients."""
    params, others = make_params(dtype=BF16), make_params(dtype=BF16)
    optimizer = make(cls, params, fused, **options)
    run(optimizer, [1], missing=[0, 2])
    assert len(optimizer.state) == 3
    assert all(state.keys() == names_of(optimizer, **options) for state in optimizer.state.values())
    for i in (0, 2):
        state = optimizer.state[params[i]]
        assert not any(state[name].any() for name in optimizer._state_names)
        assert_equal_bits(params[i], others[i], "parameter")
        if options == MASTERS:
            assert_equal_bits(state["master_param"], others[i].float(), "master")
    # Masters are then copied at the first step; later writes to the parameter do not reach them.
    params[0].zero_()
    run(optimizer, [2])
    other = make(cls, others, fused, **options)
    run(other, [1], missing=[0, 2])
    run(other, [2])
    assert torch.equal(params[0], others[0]) == (options == MASTERS)
    assert_same(params[1:], others[1:])


@ways
@every_class
def test_dummy_steps_create_states(cls: Any, fused: bool | None) -> None:
    """Those of Megatron-Core, and those of torch, which set ``.grad``, not `decoupled_grad`."""
    params = [nn.Parameter(p) for p in make_params()]
    optimizer = make(cls, params, fused)
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert len(optimizer.state) == 3
    assert steps_of(optimizer) == [1] * 3


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = map(nn.Parameter, make_params())


@ways
@every_class
@pytest.mark.parametrize("flat", [False, True])
def test_torchs_tools_find_all_states(cls: Any, flat: bool, fused: bool | None) -> None:
    settings = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, other_model = Model(), Model()
    optimizer = make(cls, model.parameters(), fused)
    found = get_optimizer_state_dict(model, optimizer, options=settings)
    wanted = {"first", "second", "third"}
    if flat:
        assert {key.split(".")[1] for key in found if key.startswith("state.")} == wanted
    else:
        assert found["state"].keys() == wanted
        assert all(s.keys() == names_of(optimizer) for s in found["state"].values())  # type: ignore[union-attr]
    run(optimizer, [1, 2])
    found = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=settings))
    other = make(cls, other_model.parameters(), fused)
    other_model.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other_model, other, found, options=settings)
    run(optimizer, [3])
    run(other, [3])
    assert_same(contents(other), contents(optimizer))
    assert other.param_groups[0]["step"] == optimizer.param_groups[0]["step"]


@ways
def test_top_level_optimizers_create_states_for_gradients(fused: bool | None) -> None:
    """As in torch.optim, without a gradient there are no states."""
    params = make_params()
    optimizer = AdamW(params, fused=fused)
    params[1].grad = torch.ones(1)
    optimizer.step()
    assert list(optimizer.state) == [params[1]]
