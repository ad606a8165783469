"""Steps with states that are stored as 8-bit codes."""

import copy
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from optimizers import (
    SETUPS,
    VARIANTS,
    Setup,
    assert_same,
    contents,
    make_params,
    run,
    set_grads,
)
from support import assert_equal_bits, needs_native, run_python
from torch import Tensor, nn

from emerging_optimizers import Adam, AdamW, Lion, Signum
from emerging_optimizers._codes import code_noise, decode, encode, scale_key
from emerging_optimizers._native import native
from emerging_optimizers._rounding import rounding_key, state_bits

pytestmark = pytest.mark.on_devices("tests-states")

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
EIGHT_BIT: dict[str, Any] = {"state_dtype": "8bit"}
# The last three keep wide states.
SHAPES = [(128, 32), (64, 96), (4, 32, 32), (50,), (10, 40), (9, 5)]
CODED = [setup for setup in SETUPS + VARIANTS if any(setup.rule.implementation.codes)]
every_coded = pytest.mark.parametrize("setup", CODED, ids=str)

OPTIONS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (F32, {"weight_decay": 0.1}),
    "l2, maximize": (F32, {"weight_decay": 0.1, "weight_decay_method": "l2", "maximize": True}),
    "float64 gradients": (F32, {"weight_decay": 0.1, "weight_decay_method": "palm"}),
    "bfloat16": (BF16, {"weight_decay": 0.6, "weight_decay_method": "independent"}),
    "float16": (F16, {"maximize": True}),
    "stochastic rounding": (BF16, {"stochastic_rounding": True}),
    "float16, stochastic rounding": (F16, {"stochastic_rounding": True, "weight_decay": 0.1}),
    "masters": (BF16, {"master_weights": True, "weight_decay": 0.1}),
    "float16, masters": (F16, {"master_weights": True}),
}
every_option = pytest.mark.parametrize("option", OPTIONS)


def shapes_for(setup: Setup) -> Sequence[tuple[int, ...]]:
    return [s for s in SHAPES if len(s) == 2] if "scaling" in setup.name else SHAPES


def set_varied_grads(params: Sequence[Tensor], step: int, dtype: torch.dtype | None = None) -> None:
    """Gradients of many magnitudes, with zeros."""
    set_grads(params, step)
    for i, param in enumerate(params):
        assert param.grad is not None
        grad = param.grad * 10.0 ** (i - 3)
        grad.view(-1)[::3] *= 1e-4
        grad.view(-1)[1::7] = 0
        if dtype is not None and i % 2 == 0:
            param.grad = None
            param.grad_dtype = None  # type: ignore[attr-defined]
            grad = grad.to(dtype)
        param.grad = grad


def train(optimizer: Any, steps: Sequence[int], dtype: torch.dtype | None = None) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for step in steps:
        set_varied_grads(params, step, dtype)
        optimizer.step()


def codes_of(setup: Setup) -> Mapping[str, Any]:
    """The format of each state that may be stored as codes, by key."""
    pairs = zip(setup.states, setup.rule.implementation.codes, strict=True)
    return {name: code for name, code in pairs if code is not None}


def expected_codes(values: Tensor, code: Any, k: int, position: int, step: int) -> Any:
    """The codes of a rule's k-th state after a step, and their scales."""
    index = torch.arange(values.numel(), device=values.device).view(values.shape)
    bits = state_bits(rounding_key(k // 2, position, step), index)
    return encode(values, code, code_noise(bits, k))


# On emulated devices, the fallback repeats the CPU's operations.
@pytest.mark.parametrize(
    "fused",
    [
        pytest.param(False, marks=pytest.mark.once, id="fallback"),
        pytest.param(None, id="native where possible"),
    ],
)
@every_coded
@every_option
def test_steps(setup: Setup, option: str, fused: bool | None) -> None:
    """A step is one with the decoded states, in float32, which are encoded then."""
    dtype, options = OPTIONS[option]
    grad_dtype = F64 if option == "float64 gradients" else None
    params, others = (make_params(shapes_for(setup), dtype) for _ in range(2))
    optimizer = setup.make(params, lr=0.01, fused=fused, **EIGHT_BIT, **options)
    wide = setup.make(others, lr=0.01, fused=fused, state_dtype=F32, **options)
    codes = codes_of(setup)
    is_coded = [p.numel() >= 4096 and p.dim() >= 2 and p.shape[-1] % 32 == 0 for p in params]
    for step in (1, 2, 3):
        for each in (optimizer, wide):
            torch.manual_seed(step)
            train(each, [step], grad_dtype)
        for i, (param, other) in enumerate(zip(params, others, strict=True)):
            assert_equal_bits(param, other, f"parameter {i}, step {step}")
            state, wanted = optimizer.state[param], wide.state[other]
            for k, name in enumerate(setup.states):
                label = f"{name} of parameter {i}, step {step}"
                if name not in codes or not is_coded[i]:
                    assert scale_key(name) not in state
                    assert_equal_bits(state[name], wanted[name], label)
                    continue
                found = (state[name], state[scale_key(name)])
                for got, expected in zip(
                    found, expected_codes(wanted[name], codes[name], k, i, step), strict=True
                ):
                    assert_equal_bits(got, expected, label)
                wanted[name].copy_(decode(*found, codes[name]))
    assert sum(state.get(scale_key(next(iter(codes)))) is not None
               for state in optimizer.state.values()) == sum(is_coded) > 0  # fmt: skip


@needs_native
@every_coded
def test_native_and_fallback(setup: Setup) -> None:
    """From equal states, codes differ only where rounding errors of the arithmetic decide."""
    params, others = (make_params(shapes_for(setup)) for _ in range(2))
    first = setup.make(params, lr=0.01, fused=True, **EIGHT_BIT)
    second = setup.make(others, lr=0.01, fused=False, **EIGHT_BIT)
    for step in (1, 2, 3, 4):
        train(first, [step])
        train(second, [step])
        for param, other in zip(params, others, strict=True):
            state, wanted = first.state[param], second.state[other]
            for name in codes_of(setup):
                if scale_key(name) not in state:
                    continue
                if setup.cls in (Lion, Signum):  # the formula is computed in the same order
                    assert_equal_bits(state[name], wanted[name], name)
                different = (state[name] != wanted[name]) & (state[name] & 0x7F != 0)
                assert different.float().mean() < 2e-3, (name, step)
                scales = (state[scale_key(name)], wanted[scale_key(name)])
                assert (scales[0] != scales[1]).float().mean() < 0.01
                numbers = (decode(s[name], s[scale_key(name)], codes_of(setup)[name])
                           for s in (state, wanted))  # fmt: skip
                torch.testing.assert_close(*numbers, rtol=0.13, atol=1e-4)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        for other, param in zip(others, params, strict=True):
            other.data.copy_(param)


# ---- bits ----------------------------------------------------------------------------------------


@needs_native
@every_coded
def test_number_of_threads(setup: Setup, num_threads: None) -> None:
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        # Threads share parameters of more than 16384 elements.
        shapes = [*shapes_for(setup), (600, 96)]
        optimizer = setup.make(make_params(shapes), fused=True, **EIGHT_BIT)
        train(optimizer, [1, 2])
        results.append(contents(optimizer))
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


def test_many_parameters(num_threads: None, fused: bool | None) -> None:
    """More than one thread looks for them."""
    results = []
    shapes: list[tuple[int, ...]] = [(128, 32), *[(7,)] * 5] * 50
    for threads in (1, 2):
        torch.set_num_threads(threads)
        optimizer = AdamW(make_params(shapes), fused=fused, **EIGHT_BIT)
        train(optimizer, [1, 2])
        results.append(contents(optimizer))
    assert_same(results[1], results[0])


def digests() -> dict[str, str]:
    """A hash of the parameters and states of each optimizer."""
    found = {}
    for setup in CODED:
        for option in ("float32", "float64 gradients", "stochastic rounding"):
            dtype, options = OPTIONS[option]
            torch.manual_seed(0)
            params = make_params(shapes_for(setup), dtype)
            optimizer = setup.make(params, fused=True, **EIGHT_BIT, **options)
            train(optimizer, [1, 2, 3], F64 if "float64" in option else None)
            digest = hashlib.sha256()
            for tensor in contents(optimizer):
                digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
            found[f"{setup}, {option}"] = digest.hexdigest()
    return found


_PRINT_DIGESTS = """
import json
import torch
import test_coded_states
torch.set_num_threads(1)
from emerging_optimizers._native import native
print(json.dumps({"isa": native.active_isa(), "digests": test_coded_states.digests()}))
"""


@pytest.mark.usefixtures("_no_other_device")
@needs_native
def test_instruction_sets(num_threads: None) -> None:
    assert native is not None
    torch.set_num_threads(1)  # more threads gain nothing with small tensors
    here = digests()
    for isa in native.supported_isas():
        done = run_python(_PRINT_DIGESTS, EMERGING_OPTIMIZERS_ISA=isa)
        assert done.returncode == 0, done.stderr
        there = json.loads(done.stdout)
        assert there["isa"] == isa
        assert there["digests"] == here, isa


def test_positions(fused: bool | None) -> None:
    """Random bits depend on a parameter's position in the optimizer, not on its group."""

    def result(layout: str) -> list[list[Tensor]]:
        params = make_params([(128, 32)] * 3)
        for param in params:
            param.data.copy_(params[0])
        groups: dict[str, list[Any]] = {
            "together": [params],
            "groups": [[{"params": [p]} for p in params]],
            "a few": [[{"params": params[:1]}, {"params": params[1:]}]],
            "optimizers": [[p] for p in params],
        }
        optimizers = [AdamW(g, lr=0.01, fused=fused, **EIGHT_BIT) for g in groups[layout]]
        for step in (1, 2, 3):
            set_varied_grads(params, step)
            for param in params:
                assert param.grad is not None
                param.grad = params[0].grad
            for optimizer in optimizers:
                optimizer.step()
        states = [o.state[p] for p in params for o in optimizers if p in o.state]
        return [[p.detach(), *(v for v in s.values())] for p, s in zip(params, states, strict=True)]

    together = result("together")
    for layout in ("groups", "a few"):
        for got, wanted in zip(result(layout), together, strict=True):
            assert_same(got, wanted, layout)
    alone = result("optimizers")
    for got in alone:
        assert_same(got, together[0])
    # Each position rounds otherwise.
    for i, j in ((0, 1), (1, 2), (0, 2)):
        is_different = together[i][2] != together[j][2]
        assert 0.05 < is_different.float().mean() < 0.95


# ---- where there are codes -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "is_coded"),
    [
        ((128, 32), True),
        ((64, 64), True),
        ((1, 4096), True),
        ((4096, 32), True),
        ((2, 64, 32), True),
        ((32, 4, 1, 32), True),
        ((127, 32), False),
        ((4096,), False),
        ((32, 127), False),
        ((4096, 1), False),
        ((256, 33), False),
        ((0, 32), False),
        ((), False),
    ],
)
def test_shapes(shape: tuple[int, ...], is_coded: bool, fused: bool | None) -> None:
    for dtype in (F32, BF16, F64, torch.complex64):
        params = make_params([shape], dtype)
        optimizer = AdamW(params, fused=fused, **EIGHT_BIT)
        run(optimizer, params, [1, 2])
        state = optimizer.state[params[0]]
        keys = ["step", "exp_avg", "exp_avg_sq"]
        if not is_coded or dtype in (F64, torch.complex64):
            assert list(state) == keys
            wide = dtype if dtype in (F64, torch.complex64) else F32
            assert {state[name].dtype for name in keys[1:]} == {wide}
            continue
        assert list(state) == ["step", "exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale"]
        for name in keys[1:]:
            assert state[name].shape == shape
            assert state[scale_key(name)].shape == (*shape[:-1], shape[-1] // 32)
            for tensor in (state[name], state[scale_key(name)]):
                assert tensor.dtype == torch.uint8
                assert tensor.is_contiguous()
                assert not tensor.requires_grad


@needs_native
@every_coded
def test_steps_are_native(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    params = make_params(shapes_for(setup))
    optimizer = setup.make(params, **EIGHT_BIT)
    run(optimizer, params, [1])

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the fallback is used")

    monkeypatch.setattr("emerging_optimizers._fallback_step.update_group", refuse)
    run(optimizer, params, [2, 3])


def test_by_key(fused: bool | None) -> None:
    for state_dtype, wanted in [
        ({"exp_avg": "8bit"}, (torch.uint8, F32)),
        ({"exp_avg_sq": "8bit"}, (F32, torch.uint8)),
        ({"exp_avg": BF16, "exp_avg_sq": "8bit"}, (BF16, torch.uint8)),
        ({"exp_avg": "8bit", "exp_avg_sq": None}, (torch.uint8, F32)),
        ({}, (F32, F32)),
    ]:
        params, others = (make_params([(128, 32), (9,)]) for _ in range(2))
        optimizer = AdamW(params, fused=fused, state_dtype=state_dtype)
        run(optimizer, params, [1, 2])
        state = optimizer.state[params[0]]
        assert (state["exp_avg"].dtype, state["exp_avg_sq"].dtype) == wanted
        for name, dtype in zip(("exp_avg", "exp_avg_sq"), wanted, strict=True):
            assert (scale_key(name) in state) == (dtype == torch.uint8)
        # A state's codes do not depend on the other states' dtypes.
        if state_dtype == {"exp_avg_sq": "8bit"}:
            both = AdamW(others, fused=fused, **EIGHT_BIT)
            run(both, others, [1, 2])
            assert_equal_bits(state["exp_avg_sq"], both.state[others[0]]["exp_avg_sq"], "v")
        # Wide ones stay float32 if they are too small for codes.
        small = optimizer.state[params[1]]
        assert small["exp_avg_sq"].dtype == F32


def test_by_group(fused: bool | None) -> None:
    params = make_params([(128, 32)] * 4)
    dtypes: list[Any] = ["8bit", F32, {"exp_avg": "8bit", "exp_avg_sq": BF16}, None]
    groups = [{"params": [p], "state_dtype": d} for p, d in zip(params, dtypes, strict=True)]
    optimizer = AdamW(groups, fused=fused)
    run(optimizer, params, [1, 2])
    found = [tuple(optimizer.state[p][n].dtype for n in ("exp_avg", "exp_avg_sq")) for p in params]
    assert found == [(torch.uint8,) * 2, (F32,) * 2, (torch.uint8, BF16), (F32,) * 2]
    # A group that is added later.
    more = make_params([(128, 32)])
    optimizer.add_param_group({"params": more, "state_dtype": "8bit"})
    run(optimizer, params + more, [3])
    assert optimizer.state[more[0]]["exp_avg"].dtype == torch.uint8
    # Existing states stay as they are if the option changes.
    for group in optimizer.param_groups:
        group["state_dtype"] = F32
    run(optimizer, params + more, [4])
    assert optimizer.state[more[0]]["exp_avg"].dtype == torch.uint8
    assert optimizer.state[params[0]]["exp_avg"].dtype == torch.uint8


@pytest.mark.parametrize("cls", [Adam, AdamW])
def test_states_that_may_not_be_codes(cls: Any) -> None:
    """AMSGrad keeps the largest of its averages of squares."""
    params = make_params([(128, 32)])
    optimizer = cls(params, amsgrad=True, **EIGHT_BIT)
    run(optimizer, params, [1, 2])
    dtypes = {name: state.dtype for name, state in optimizer.state[params[0]].items()}
    assert dtypes["exp_avg"] == torch.uint8
    assert dtypes["exp_avg_sq"] == dtypes["max_exp_avg_sq"] == F32
    with pytest.raises(ValueError, match="\"8bit\" is not allowed for state 'max_exp_avg_sq'"):
        cls(params, amsgrad=True, state_dtype={"max_exp_avg_sq": "8bit"})


# ---- the rest of a step --------------------------------------------------------------------------


def pair(fused: bool | None, **options: Any) -> tuple[Any, list[Any]]:
    params = make_params([(128, 32), (64, 64), (5,)])
    return AdamW(params, fused=fused, **{"lr": 0.01, **EIGHT_BIT, **options}), params


def test_lr_0(fused: bool | None) -> None:
    optimizer, params = pair(fused, lr=0.0, weight_decay=0.1)
    other, others = pair(fused, lr=0.01)
    before = [p.detach().clone() for p in params]
    for step in (1, 2):
        run(optimizer, params, [step])
        run(other, others, [step])
        assert_same([p.detach() for p in params], before)
        for param, same in zip(params, others, strict=True):
            wanted = list(other.state[same].values())
            assert_same(list(optimizer.state[param].values()), wanted)


def test_skipped_steps(fused: bool | None) -> None:
    (optimizer, params), (other, others) = pair(fused), pair(fused)
    for step, overflow in enumerate([True, False, True, False], 1):
        optimizer.grad_scale = torch.tensor(1024.0)
        optimizer.found_inf = torch.tensor(float(overflow))
        set_grads(params, step)
        for param in params:
            param.grad.mul_(math.inf if overflow else 1024.0)
        optimizer.step()
        if not overflow:
            run(other, others, [step])
    assert_same(contents(optimizer), contents(other))


@pytest.mark.usefixtures("_no_other_device")
@pytest.mark.parametrize("fused", [None, False, True], ids=str)
def test_grad_scaler(fused: bool | None) -> None:
    optimizer, params = pair(fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=100)
    seen = []
    for step in range(1, 5):
        optimizer.zero_grad()
        scaler.scale(torch.stack([(p * p).sum() for p in params]).sum()).backward()
        if step == 2:
            params[0].grad.view(-1)[1] = math.nan
        scaler.step(optimizer)
        scaler.update()
        seen.append(contents(optimizer))
    assert_same(seen[1], seen[0])
    assert optimizer.state[params[0]]["step"].item() == 3
    assert not torch.equal(seen[3][2], seen[1][2])


def test_capturable(fused: bool | None) -> None:
    (optimizer, params), (other, others) = pair(fused, capturable=True), pair(fused)
    run(optimizer, params, [1, 2, 3])
    run(other, others, [1, 2, 3])
    assert_same(contents(optimizer), contents(other))


def test_params_without_grad(fused: bool | None) -> None:
    (optimizer, params), (other, others) = pair(fused), pair(fused)
    run(optimizer, params, [1])
    run(other, others, [1])
    before = contents(optimizer)
    set_grads(params, 2)
    set_grads(others, 2)
    params[0].grad = None
    optimizer.step()
    other.step()
    size = 1 + len(optimizer.state[params[0]])
    assert_same(contents(optimizer)[:size], before[:size])
    # The positions of the others are as before.
    assert_same(contents(optimizer)[size:], contents(other)[size:])


def test_non_finite_gradients(fused: bool | None) -> None:
    """They stay where they are: the other elements of a group are not affected."""
    (optimizer, params), (other, others) = pair(fused), pair(fused)
    for step in (1, 2):
        set_grads(params, step)
        set_grads(others, step)
        if step == 1:
            params[0].grad[3, 4:7] = torch.tensor([math.nan, math.inf, -math.inf])
        optimizer.step()
        other.step()
    is_lost = torch.zeros(128, 32, dtype=torch.bool)
    is_lost[3, 4:7] = True
    assert torch.equal(params[0].isnan(), is_lost)
    kept = params[0].detach()[~is_lost]
    assert_equal_bits(kept, others[0].detach()[~is_lost], "the others")


@pytest.mark.parametrize("kind", ["transposed", "slice"])
def test_not_contiguous(kind: str) -> None:
    def make() -> nn.Parameter:
        values = make_params([(128, 64)])[0].detach()
        values = values[:, :32] if kind == "slice" else values.t().contiguous().t()
        return nn.Parameter(values)

    params, dense = [make()], [nn.Parameter(make().detach().contiguous())]
    assert not params[0].is_contiguous()
    optimizer, other = AdamW(params, **EIGHT_BIT), AdamW(dense, fused=False, **EIGHT_BIT)
    run(optimizer, params, [1, 2, 3])
    run(other, dense, [1, 2, 3])
    assert_same(contents(optimizer), contents(other))
    refusing = AdamW(params, fused=True, **EIGHT_BIT)
    before = params[0].detach().clone()
    set_grads(params, 1)
    with pytest.raises(RuntimeError, match="fused"):
        refusing.step()
    assert torch.equal(params[0], before)


def test_gradients_laid_out_otherwise(fused: bool | None) -> None:
    (optimizer, params), (other, others) = pair(fused), pair(fused)
    for step in (1, 2):
        set_grads(others, step)
        for param, same in zip(params, others, strict=True):
            grad = same.grad
            param.grad = grad.t().contiguous().t() if grad.dim() == 2 else grad
        optimizer.step()
        other.step()
    assert_same(contents(optimizer), contents(other))


def test_states_replaced_between_steps(fused: bool | None) -> None:
    optimizer, params = pair(fused)
    run(optimizer, params, [1, 2])
    state = optimizer.state[params[0]]
    other, others = pair(fused)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for a, b in zip(others, params, strict=True):
        a.data.copy_(b)
    for name in ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale"):
        state[name] = state[name].clone()
    run(optimizer, params, [3])
    run(other, others, [3])
    assert_same(contents(optimizer), contents(other))
    # The fallback takes codes and scales that are laid out otherwise.
    state["exp_avg"] = state["exp_avg"].t().contiguous().t()
    state["exp_avg_sq_scale"] = torch.stack([state["exp_avg_sq_scale"]] * 2, -1)[..., 0]
    optimizer.param_groups[0]["fused"] = True
    set_grads(params, 4)
    with pytest.raises(RuntimeError, match="has no native step"):
        optimizer.step()
    optimizer.param_groups[0]["fused"] = fused
    other.param_groups[0]["fused"] = False
    for each, of_it in ((optimizer, params), (other, others)):
        each.zero_grad()
        run(each, of_it[:1], [4])
    assert_same(contents(optimizer), contents(other))
    # A float32 state in place of codes is used as it is.
    code = dict(zip(("exp_avg", "exp_avg_sq"), AdamW._rule.codes, strict=True))["exp_avg"]
    state["exp_avg"] = decode(state["exp_avg"], state.pop("exp_avg_scale"), code)
    run(optimizer, params, [5])
    run(other, others, [5])
    assert_equal_bits(params[0], others[0], "the parameter")
    assert optimizer.state[params[0]]["exp_avg"].dtype == F32
