"""Steps update states in place: the same tensors in the same memory."""

import copy
from typing import Any

import pytest
import torch
from optimizers import (
    MEGATRON,
    Setup,
    assert_same,
    contents,
    every_optimizer,
    every_variant,
    make_grads,
    make_params,
    run,
)
from torch import Tensor, multiprocessing, nn

from emerging_optimizers import AdamW, Lion, megatron

pytestmark = pytest.mark.on_devices("tests-states")

BF16, F32 = torch.bfloat16, torch.float32
ways = pytest.mark.parametrize("fused", [None, False], ids=["native", "fallback"])


def strided(dtype: torch.dtype = F32) -> list[nn.Parameter]:
    """Parameters with gaps in memory, and one without gaps."""
    params = make_params(dtype=dtype)
    wide = torch.zeros(3, 8, dtype=dtype)
    wide[:, ::2] = params[0].detach()
    return [nn.Parameter(wide[:, ::2]), params[1]]


def places(optimizer: Any) -> list[Any]:
    return [
        (name, id(value), value.data_ptr())
        for state in optimizer.state.values()
        for name, value in state.items()
    ]


@ways
@every_optimizer
@pytest.mark.parametrize("make", [make_params, strided], ids=["dense", "strided"])
def test_states_stay_where_they_are(setup: Setup, make: Any, fused: bool | None) -> None:
    params = make(dtype=BF16)
    optimizer = setup.make(params, fused=fused, master_weights=True)
    run(optimizer, params, [1])
    before = places(optimizer)
    run(optimizer, params, [2, 3])
    assert places(optimizer) == before
    assert {state["step"].item() for state in optimizer.state.values()} == {3}
    # Also after a load, which does not copy tensors that fit.
    optimizer.load_state_dict(optimizer.state_dict())
    run(optimizer, params, [4])
    assert [memory for *_, memory in places(optimizer)] == [memory for *_, memory in before]
    assert {state["step"].item() for state in optimizer.state.values()} == {4}


@ways
@pytest.mark.parametrize("cls", MEGATRON.values())
@pytest.mark.parametrize("make", [make_params, strided], ids=["dense", "strided"])
def test_states_of_megatron_stay_where_they_are(cls: Any, make: Any, fused: bool | None) -> None:
    params = make(dtype=BF16)
    optimizer = cls([{"params": params, "fused": fused}], master_weights=True)
    run(optimizer, params, [1])
    before = places(optimizer)
    run(optimizer, params, [2, 3])
    assert places(optimizer) == before


@ways
@every_variant
def test_init_group_makes_the_states_of_the_first_step(setup: Setup, fused: bool | None) -> None:
    params = make_params(dtype=BF16)
    optimizer = setup.make(params, fused=fused, master_weights=True)
    params[0].grad = torch.ones_like(params[0])
    optimizer._init_group(optimizer.param_groups[0])
    assert list(optimizer.state) == [params[0]]
    optimizer._init_group(optimizer.param_groups[0], skip_non_grad_params=False)
    before = places(optimizer)
    assert list(optimizer.state) == params
    for param, state in optimizer.state.items():
        assert sorted(state) == sorted(["step", *setup.states, "master_param"])
        assert state["step"] == 0
        assert torch.equal(state["master_param"], param.float())
        assert not any(state[name].any() for name in setup.states)
    run(optimizer, params, [1, 2])
    assert places(optimizer) == before  # existing states stay
    other_params = make_params(dtype=BF16)
    other = setup.make(other_params, fused=fused, master_weights=True)
    run(other, other_params, [1, 2])
    assert_same(contents(optimizer), contents(other))


def _count(optimizer: Any) -> None:
    params = optimizer.param_groups[0]["params"]
    torch.set_num_threads(1)
    run(optimizer, params, [2, 3])


@pytest.mark.parametrize("make", [make_params, strided], ids=["dense", "strided"])
@ways
def test_processes_share_steps(make: Any, fused: bool | None) -> None:
    """Hogwild: processes share parameters, states and counters."""
    if torch.get_default_device().type != "cpu":
        pytest.skip("for tensors on the CPU")
    params = make()
    optimizer, other = AdamW(params, fused=fused), AdamW(make(), fused=fused)
    run(optimizer, params, [1])
    run(other, other.param_groups[0]["params"], [1, 2, 3, 4])
    for param in params:
        param.grad = None
        param.share_memory_()
        for value in optimizer.state[param].values():
            value.share_memory_()
    worker = multiprocessing.get_context("fork").Process(target=_count, args=(optimizer,))
    worker.start()
    worker.join()
    assert worker.exitcode == 0
    assert {state["step"].item() for state in optimizer.state.values()} == {3}
    run(optimizer, params, [4])
    assert_same([p.detach() for p in params], [p.detach() for p in other.param_groups[0]["params"]])


def _tie(optimizer: Any, params: list[Tensor], how: str) -> None:
    """Replace the counter of one parameter by another's, or by a view of it."""
    step = optimizer.state[params[0]]["step"]
    optimizer.state[params[1]]["step"] = step if how == "tensor" else step.view(())


@pytest.mark.parametrize("how", ["tensor", "view"])
@pytest.mark.parametrize(
    "ways",
    [(None, None), (False, False), (None, False), (False, None), (True, True)],
    ids=["native", "fallback", "native and fallback", "fallback and native", "fused"],
)
@pytest.mark.parametrize("are_strided", [False, True], ids=["dense", "strided"])
def test_a_counter_shared_across_groups(ways: Any, how: str, are_strided: bool) -> None:
    if True in ways and are_strided:
        pytest.skip("there is no native step for it")
    params, others = (strided() if are_strided else make_params() for _ in range(2))
    groups = [{"params": [p], "fused": f} for p, f in zip(params, ways, strict=True)]
    try:
        optimizer, other = AdamW(groups), AdamW(others)
        run(optimizer, params, [1])
    except RuntimeError:
        pytest.skip("there are no native kernels")
    run(other, others, [1, 2, 3, 4])
    _tie(optimizer, params, how)
    run(optimizer, params, [2])
    before = places(optimizer)
    run(optimizer, params, [3, 4])
    assert places(optimizer) == before
    assert [optimizer.state[p]["step"].item() for p in params] == [4, 4]
    assert_same([p.detach() for p in params], [p.detach() for p in others])


@ways
def test_a_counter_of_another_dtype_is_replaced(fused: bool | None) -> None:
    params, others = make_params(), make_params()
    optimizer, other = AdamW(params, fused=fused), AdamW(others, fused=fused)
    run(optimizer, params, [1])
    run(other, others, [1, 2])
    for state in optimizer.state.values():
        state["step"] = state["step"].to(torch.int64)
    run(optimizer, params, [2])
    assert_same([p.detach() for p in params], [p.detach() for p in others])
    assert {state["step"].dtype for state in optimizer.state.values()} == {F32}


@ways
@pytest.mark.parametrize("cls", [AdamW, Lion])
@pytest.mark.parametrize(
    ("step", "error", "message"),
    [
        (torch.tensor(2.0, device="meta"), ValueError, "state 'step' is a tensor without a value"),
        ("2", TypeError, "state 'step' must be a number of steps, not str"),
        (10**400, ValueError, "state 'step' is inf; expected a number of steps"),
        (torch.tensor(torch.inf), ValueError, "state 'step' is inf; expected a number of steps"),
        (torch.ones(1).to_sparse(), TypeError, "state 'step' must be a number of steps, not a"),
        (torch.inference_mode()(torch.ones)(()), RuntimeError, "state 'step' is an inference tens"),
    ],
    ids=["meta", "text", "beyond", "infinite", "sparse", "inference"],
)
def test_invalid_counters(
    cls: Any, step: Any, error: Any, message: str, fused: bool | None
) -> None:
    params = make_params()
    optimizer = cls(params, fused=fused)
    run(optimizer, params, [1])
    before = [p.detach().clone() for p in params]
    optimizer.state[params[1]]["step"] = step
    with pytest.raises(error, match=message) as caught:
        run(optimizer, params, [2])
    assert "param_groups[0]['params'][1]" in str(caught.value)
    assert_same([p.detach() for p in params], before)


@ways
@pytest.mark.parametrize("absent", [None, {}], ids=repr)
@pytest.mark.parametrize("cls", [Lion, megatron.FusedAdam])
def test_a_copy_without_a_counter(cls: Any, absent: Any, fused: bool | None) -> None:
    params = make_params()
    optimizer = cls([{"params": params, "fused": fused}])
    run(optimizer, params, [1])
    optimizer.state[params[1]]["step"] = absent
    other, others = copy.deepcopy((optimizer, params))
    run(optimizer, params, [2])
    run(other, others, [2])
    assert_same(contents(other), contents(optimizer))


@ways
@pytest.mark.parametrize("cls", [AdamW, Lion])
def test_a_counter_without_a_gradient(cls: Any, fused: bool | None) -> None:
    """A shared counter advances with the parameter that has a gradient; a separate one does not."""
    params = make_params()
    optimizer = cls(params, fused=fused)
    run(optimizer, params, [1])
    _tie(optimizer, params, "tensor")
    for step in (2, 3):
        params[0].grad, params[1].grad = make_grads(params, step)[0], None
        optimizer.step()
    assert optimizer.state[params[0]]["step"].item() == 3
