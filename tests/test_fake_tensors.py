"""Fake and meta tensors: steps and updates do with them all but compute values."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from optimizers import MEGATRON, SETUPS, VARIANTS, assert_same, contents, make_params, run
from oracle import Rule
from support import (
    MIXES,
    Mix,
    Operands,
    call,
    calls_in_python,
    every_rule,
    make_operands,
    needs_native,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from emerging_optimizers import AdamW, LaProp, _rule, _step, megatron

BF16 = torch.bfloat16
Make = Callable[..., torch.optim.Optimizer]
# Each class, and each option that changes how a class steps.
MAKES: dict[str, Make] = {str(setup): setup.make for setup in [*SETUPS, *VARIANTS]}
MAKES["LaProp frob"] = lambda p, **options: LaProp(p, frob_normalize=True, **options)
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "fused": {"fused": True},
    "fallback": {"fused": False},
    "capturable": {"capturable": True},
    "masters": {"master_weights": True, "state_dtype": torch.float32},
    "split masters": {"master_weights": "split", "state_dtype": torch.float32},
    "stochastic": {"stochastic_rounding": True},
}
every_make = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
devices = pytest.mark.parametrize("device", ["cpu", "cuda"])


@pytest.fixture(autouse=True)
def _on_cpu(_default_device: None) -> Iterator[None]:
    with torch.device("cpu"):
        yield


def fill_grads(params: Any) -> None:
    for p in params:
        p.grad = torch.ones_like(p)


def described(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The states of each parameter, without devices and values."""
    return [
        {
            key: (value.dtype, value.shape, value.stride())
            for key, value in optimizer.state[p].items()
            if isinstance(value, Tensor)
        }
        for group in optimizer.param_groups
        for p in group["params"]
    ]


def simulate(make: Make, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """Take two steps with fake parameters."""
    with FakeTensorMode():
        params = [nn.Parameter(torch.empty(s, dtype=dtype, device=device)) for s in SHAPES]
        optimizer = make(params)
        for _ in range(2):
            fill_grads(params)
            optimizer.step()
    assert all(isinstance(p, FakeTensor) for p in params)
    assert all(p.device.type == device and p.dtype == dtype for p in params)
    return optimizer


SHAPES = [(3, 4), (5, 2)]


# ---- steps ---------------------------------------------------------------------------------------


@devices
@every_make
@pytest.mark.parametrize("name", ["default", "fused", "fallback"])
def test_states_of_each_rule(make: Make, name: str, device: str) -> None:
    check_states(make, name, device)


@devices
@pytest.mark.parametrize("make", [AdamW, MAKES["LaProp frob"]], ids=["AdamW", "LaProp frob"])
@pytest.mark.parametrize("name", ["capturable", "masters", "split masters", "stochastic"])
def test_states_of_each_option(make: Make, name: str, device: str) -> None:
    check_states(make, name, device)


def check_states(make: Make, name: str, device: str) -> None:
    """Compare the states with those of a real step."""
    if name == "fused" and _rule.native is None:
        pytest.skip("there are no native kernels")
    options = OPTIONS[name]
    dtype = BF16 if name in ("masters", "split masters", "stochastic") else torch.float32
    seed = torch.get_rng_state()
    fake = simulate(lambda p: make(p, **options), device, dtype)
    assert torch.equal(torch.get_rng_state(), seed)
    params = make_params(SHAPES, dtype)
    real = make(params, **(options | {"fused": None}))
    run(real, params, [1, 2])
    assert described(fake) == described(real)
    for state in fake.state.values():
        on_host = {"step"} if not options.get("capturable") else set()
        assert all(v.device.type == device for k, v in state.items() if k not in on_host)
        assert all(isinstance(v, FakeTensor) for v in state.values())


@devices
@pytest.mark.parametrize("name", MEGATRON)
@pytest.mark.parametrize("remainders", [False, True])
def test_megatron(name: str, device: str, remainders: bool) -> None:
    def make(params: Any) -> torch.optim.Optimizer:
        options: dict[str, Any] = {"master_weights": True, "store_param_remainders": remainders}
        return MEGATRON[name](params, lr=0.1, **options)

    fake = simulate(make, device, BF16)
    params = make_params(SHAPES, BF16)
    real = make(params)
    run(real, params, [1, 2])
    assert described(fake) == described(real)
    for key in (*MEGATRON[name]._state_names[:1], "master_param"):
        found = {state[key].dtype for state in fake.state.values()}
        assert found == {torch.int16 if remainders and key == "master_param" else torch.float32}


@devices
@every_make
@pytest.mark.parametrize("fused", [None, False])
def test_numbers_without_values(make: Make, fused: bool | None, device: str) -> None:
    with FakeTensorMode():
        (param,) = params = [nn.Parameter(torch.empty(3, 4, device=device))]
        lr = torch.full((), 0.1, device=device)
        optimizer: Any = make(params, lr=lr, fused=fused)
        optimizer.grad_scale = torch.full((), 8.0, device=device)
        optimizer.found_inf = torch.full((), 1.0, device=device)
        for _ in range(2):
            fill_grads(params)
            optimizer.step(grad_multiplier=torch.full((1,), 0.5, device=device))
    # Whether the step is skipped is unknown, so it must be taken.
    state = dict(optimizer.state[param])
    assert state.pop("step").numel() == 1
    assert [tuple(value.shape) for value in state.values()] == [(3, 4)] * len(state)
    assert optimizer.param_groups[0]["lr"] is lr


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_a_known_constant(found: float) -> None:
    """In the mode, ``torch.tensor`` makes a tensor with a known value, which can skip a step."""
    with FakeTensorMode():
        params = [nn.Parameter(torch.empty(3))]
        optimizer: Any = AdamW(params, lr=torch.tensor(0.25))
        fill_grads(params)
        optimizer.found_inf = torch.tensor(found)
        optimizer.step()
        assert len(optimizer.state) == (0 if found else 1)
        with pytest.raises(ValueError, match="Invalid learning rate"):
            AdamW(params, lr=torch.tensor(-0.25))


@every_make
@pytest.mark.parametrize("fused", [None, False])
def test_made_inside_and_stepped_outside(make: Make, fused: bool | None) -> None:
    optimizer = simulate(lambda p: make(p, fused=fused))
    fill_grads(optimizer.param_groups[0]["params"])
    before = described(optimizer)
    optimizer.step()
    assert described(optimizer) == before


@every_make
@pytest.mark.parametrize("fused", [None, False])
def test_fake_copies_of_a_real_optimizers_parameters(make: Make, fused: bool | None) -> None:
    params = make_params()
    optimizer = make(params, fused=fused)
    run(optimizer, params, [1])
    before = contents(optimizer)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(p) for p in params]
        optimizer.param_groups[0]["params"] = fakes
        fill_grads(fakes)
        optimizer.step()
    assert described(optimizer) == [dict(sorted_like(optimizer.state[p])) for p in params]
    optimizer.param_groups[0]["params"] = params
    assert_same(contents(optimizer), before)


def sorted_like(state: dict[str, Any]) -> Any:
    return ((k, (v.dtype, v.shape, v.stride())) for k, v in state.items())


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("fused", [None, False])
def test_real_parameters_in_the_mode(fused: bool | None, begun: bool) -> None:
    """torch raises an error, and nothing changes."""
    params = make_params()
    optimizer = AdamW(params, fused=fused)
    run(optimizer, params, [1] if begun else [])
    fill_grads(params)
    before = contents(optimizer)
    with FakeTensorMode(), pytest.raises(AssertionError, match="convert all Tensors"):
        optimizer.step()
    assert_same(contents(optimizer), before)


@every_make
@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("capturable", [False, True])
def test_meta_parameters(make: Make, fused: bool | None, capturable: bool) -> None:
    with torch.device("meta"):
        params = [nn.Parameter(torch.empty(3, 4))]
        optimizer = make(params, lr=torch.empty(()), fused=fused, capturable=capturable)
        for _ in range(2):
            fill_grads(params)
            optimizer.step(grad_multiplier=torch.empty(()))
    (state,) = optimizer.state.values()
    counter = state.pop("step")
    assert counter.is_meta if capturable else counter.item() == 2
    (group,) = optimizer.param_groups
    assert state.keys() == set(optimizer._rule_of(group).state_names)
    assert all(value.is_meta and value.shape == (3, 4) for value in state.values())


@pytest.mark.parametrize("make", [AdamW, MAKES["LaProp frob"]], ids=["AdamW", "LaProp frob"])
@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("name", ["lr", "grad_multiplier", "grad_scale", "found_inf"])
def test_real_parameters_beside_a_number_without_a_value(
    name: str, begun: bool, fused: bool | None, make: Make
) -> None:
    """A real parameter is not updated with a placeholder for such a number."""
    params = make_params()
    optimizer = make(params, lr=0.1, fused=fused)
    run(optimizer, params, [1] if begun else [])
    fill_grads(params)
    for number in (torch.tensor(0.5, device="meta"), fake_number()):
        old = optimizer.param_groups[0]["lr"]
        arguments = {}
        if name == "lr":
            optimizer.param_groups[0]["lr"] = number
        elif name == "grad_multiplier":
            arguments = {name: number}
        else:
            setattr(optimizer, name, number)
        before = contents(optimizer)
        with pytest.raises(ValueError, match=f"{name} is a tensor without a value") as caught:
            optimizer.step(**arguments)
        assert "param_groups[0]['params'][0]" in str(caught.value)
        assert_same(contents(optimizer), before)
        optimizer.param_groups[0]["lr"] = old


@pytest.mark.parametrize("cls", [AdamW, megatron.FusedAdam])
@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("key", ["weight_decay", "eps", "betas"])
def test_real_parameters_beside_a_hyperparameter_without_a_value(
    key: str, fused: bool | None, cls: Any
) -> None:
    params = make_params()
    optimizer = cls([{"params": params, "fused": fused}])
    run(optimizer, params, [1])
    number = fake_number()
    optimizer.param_groups[0][key] = (0.9, number) if key == "betas" else number
    fill_grads(params)
    before = contents(optimizer)
    name = "betas.1." if key == "betas" else key
    message = f"{name} (is a tensor without a value|must be a number, not FakeTensor)"
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.step()
    assert_same(contents(optimizer), before)


@pytest.mark.parametrize("cls", [AdamW, megatron.FusedAdam])
@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("what", ["its gradient", "'exp_avg'", "'step'", "the group's step"])
def test_real_parameters_beside_tensors_without_values(
    what: str, fused: bool | None, cls: Any
) -> None:
    """Counters are not advanced with a placeholder either."""
    params = make_params()
    optimizer = cls([{"params": params, "fused": fused}])
    run(optimizer, params, [1, 2])
    fill_grads(params)
    state = optimizer.state[params[1]]
    with FakeTensorMode():
        fake = torch.zeros(params[1].shape) + 1
    if what == "its gradient":
        params[1].grad = fake
    elif what == "'exp_avg'":
        state["exp_avg"] = fake
    elif what == "'step'":
        state["step"] = fake_number()
    else:
        optimizer.param_groups[0]["step"] = fake_number()
        del optimizer.state[params[0]]["step"]
    before = real_contents(optimizer)
    with pytest.raises(ValueError, match="is a tensor without a value"):
        optimizer.step()
    assert_same(real_contents(optimizer), before)


def real_contents(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    values = (v for state in optimizer.state.values() for v in state.values())
    tensors = [*optimizer.param_groups[0]["params"], *values]
    return [t.detach().clone() for t in tensors if not isinstance(t, FakeTensor)]


@pytest.mark.parametrize("cls", [AdamW, megatron.FusedAdam])
def test_loaded_states_without_values(cls: Any) -> None:
    params = make_params()
    optimizer = cls(params)
    run(optimizer, params, [1, 2])
    before = contents(optimizer)
    for key in ("exp_avg", "step"):
        saved = copy.deepcopy(optimizer.state_dict())
        with FakeTensorMode():
            saved["state"][1][key] = torch.zeros(saved["state"][1][key].shape) + 1
        saved["param_groups"][0].pop("step", None)
        if key == "step" and cls is megatron.FusedAdam:
            saved["param_groups"][0]["step"] = None
            saved["state"][0]["step"] = fake_number()
        with pytest.raises(ValueError, match=f"the loaded state of .* (no )?'{key}'"):
            optimizer.load_state_dict(saved)
        assert_same(contents(optimizer), before)


def fake_number() -> torch.Tensor:
    with FakeTensorMode():
        return torch.ones(3).mean()


@pytest.mark.parametrize("fused", [None, False])
def test_without_a_compiled_module(fused: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_step, "native", None)
    optimizer = simulate(lambda p: AdamW(p, fused=fused))
    assert [set(d) for d in described(optimizer)] == [{"step", "exp_avg", "exp_avg_sq"}] * 2


@pytest.mark.parametrize("name", MEGATRON)
@pytest.mark.parametrize("capturable", [False, True])
def test_megatron_with_decoupled_gradients(name: str, capturable: bool) -> None:
    with FakeTensorMode():
        param: Any = nn.Parameter(torch.empty(3, 4, dtype=BF16))
        optimizer: Any = MEGATRON[name](
            [{"params": [param]}, {"params": []}],
            lr=torch.full((), 0.1),
            master_weights=True,
            use_decoupled_grad=True,
            capturable=capturable,
        )
        optimizer.found_inf = torch.zeros(())
        for _ in range(2):
            param.decoupled_grad = torch.ones(3, 4)
            optimizer.step()
        optimizer.initialize_state(param)
        master = optimizer.get_unscaled_state(param, "master_param")
        optimizer.set_scaled_state(param, "master_param", master)
    assert master.dtype == torch.float32
    assert master.shape == (3, 4)


# ---- saving and loading --------------------------------------------------------------------------


@devices
@pytest.mark.parametrize("make", [*MAKES.values(), *MEGATRON.values()])
def test_state_dicts(make: Make, device: str) -> None:
    with FakeTensorMode():
        params, others = (
            [nn.Parameter(torch.empty(3, 4, device=device, dtype=BF16))] for _ in range(2)
        )
        optimizer, other = make(params, lr=0.1), make(others, lr=0.2)
        for _ in range(2):
            fill_grads(params)
            optimizer.step()
        saved = optimizer.state_dict()
        other.load_state_dict(saved)
        fill_grads(others)
        other.step()
    assert described(other) == described(optimizer)
    assert other.param_groups[0]["lr"] == 0.1


# ---- memory --------------------------------------------------------------------------------------


class TwoLayers(nn.Module):
    """Uninitialised parameters: PyTorch cannot initialise fake CUDA tensors."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.empty(128, 64, device=device))
        self.second = nn.Parameter(torch.empty(16, 128, device=device))


@pytest.mark.parametrize("device", ["cpu", "cuda", "no mode"])
@pytest.mark.parametrize("fused", [None, False, True])
def test_estimated_memory(fused: bool | None, device: str) -> None:
    if fused and _rule.native is None:
        pytest.skip("there are no native kernels")

    def estimate(make: Make) -> tuple[int, int]:
        """Return the bytes of the states, and the peak of all bytes."""
        mode: Any = contextlib.nullcontext() if device == "no mode" else FakeTensorMode()
        where = "cpu" if device == "no mode" else device
        with mode, MemTracker() as tracker:
            model = TwoLayers(where)
            optimizer = make(model.parameters())
            tracker.track_external(model, optimizer)
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
            now = tracker.get_tracker_snapshot("current")[model.first.device]
            peak = tracker.get_tracker_snapshot("peak")[model.first.device]
        (states,) = (size for kind, size in now.items() if "OPT" in str(kind))
        return states, max(peak.values())

    states, peak = estimate(lambda p: AdamW(p, fused=fused))
    wanted_states, wanted_peak = estimate(lambda p: torch.optim.AdamW(p, fused=fused))
    assert abs(states - wanted_states) <= 1024  # the counters, if they are on the device
    num_elements = 128 * 64 + 16 * 128
    assert states - 2 * 4 * num_elements in range(0, 4096)
    assert peak <= 1.5 * wanted_peak


# ---- update functions ----------------------------------------------------------------------------


def _fake(mode: FakeTensorMode, operands: Operands) -> Operands:
    return Operands(
        mode.from_tensor(operands.grad), [mode.from_tensor(state) for state in operands.states]
    )


def _without_native(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule.implementation, "_operator", None)
    monkeypatch.setattr(*calls_in_python(rule))


@every_rule
@pytest.mark.parametrize("is_native", [pytest.param(True, marks=needs_native), False])
@pytest.mark.parametrize("mix", [MIXES["float32"], Mix(BF16, (torch.float32,) * 3)], ids=str)
@pytest.mark.parametrize("is_inside", [True, False])
def test_updates(
    rule: Rule, mix: Mix, is_native: bool, is_inside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_native:
        _without_native(rule, monkeypatch)
    cases = [rule.usual]
    operands = make_operands(rule, (3, 5), mix)
    before = operands.clone()
    mode = FakeTensorMode()
    fake = _fake(mode, operands)
    if "step" in rule.usual:
        with mode:
            cases.append({**rule.usual, "step": torch.full((), 2.0)})
    wanted = call(rule, rule.usual, operands.clone())
    for case in cases:
        with mode if is_inside else torch.no_grad():
            out = torch.empty_like(fake.grad)
            single = call(rule, case, fake)
            listed = call(rule, case, [fake, _fake(mode, operands)])
            assert call(rule, case, fake, out=out) is out
            assert call(rule, case, fake, out=fake.grad) is fake.grad
        for update in (single, *listed):
            assert isinstance(update, FakeTensor)
            assert update.dtype == wanted.dtype
            assert update.shape == wanted.shape
            assert update.stride() == wanted.stride()
    for a, b in zip(operands, before, strict=True):
        assert torch.equal(a, b)
