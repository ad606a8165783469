"""Equivalents of torch's tests of its optimizers, with entries for these."""

import copy
import importlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from optimizers import Setup, assert_same, contents, every_optimizer, make_params, run
from torch import Tensor
from torch.nn import Parameter
from torch.optim.lr_scheduler import ExponentialLR, LinearLR, ReduceLROnPlateau, StepLR

from emerging_optimizers import Adam, AdEMAMix

pytestmark = pytest.mark.on_devices("tests-optimizers")

SCHEDULERS: list[list[Callable[[Any], Any]]] = [
    [lambda opt: StepLR(opt, gamma=0.9, step_size=10)],
    [lambda opt: ExponentialLR(opt, gamma=0.99), lambda opt: ReduceLROnPlateau(opt)],
    [lambda opt: LinearLR(opt, start_factor=0.4, total_iters=4)],
]


def kwargs_of(setup: Setup, fused: bool | None) -> Iterator[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {},
        {"lr": 0.01},
        {"lr": torch.tensor(0.001)},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "maximize": True},
        {"capturable": True},
        {"weight_decay": 0.1, "weight_decay_method": "l2"},
    ]
    for name in ("nesterov", "frob_normalize"):
        if name in setup.cls.__init__.__annotations__:
            found.append({name: True})
    if "correct_bias" in setup.case:
        found.append({"correct_bias": False})
    for kwargs in found:
        yield {**kwargs, "fused": fused}


@pytest.mark.once
@every_optimizer
def test_errors(setup: Setup) -> None:
    """The errors in torch's table, which takes seconds to import, and two more."""
    if not os.environ.get("CI"):
        pytest.importorskip("expecttest", reason="torch's test utilities need it")
    torchs = importlib.import_module("torch.testing._internal.common_optimizers")
    bad = [({"weight_decay": -1}, "Invalid weight_decay value: -1")]
    if "betas" in setup.cls.__init__.__annotations__:
        betas = [1.0] + [0.0] * (2 if issubclass(setup.cls, AdEMAMix) else 1)
        name = "beta parameter" if issubclass(setup.cls, Adam) else "beta"
        bad.append(({"betas": betas}, f"Invalid {name} at index 0: 1.0"))
    for kwargs, message in bad:
        with pytest.raises(ValueError, match=message):
            setup.cls(make_params(), **kwargs)
    for entry in torchs.get_error_inputs_for_all_optims("cpu", torch.float32):
        assert entry.error_on is torchs.OptimizerErrorEnum.CONSTRUCTION_ERROR
        given = entry.optimizer_error_input
        if entry.error_type is UserWarning:
            with pytest.warns(UserWarning, match=entry.error_regex):
                setup.cls(given.params, **given.kwargs)
        else:
            with pytest.raises(entry.error_type, match=entry.error_regex):
                setup.cls(given.params, **given.kwargs)


@pytest.mark.real
@every_optimizer
@pytest.mark.parametrize("with_scheduler", [False, True])
def test_goes_in_the_right_direction(
    setup: Setup, with_scheduler: bool, fused: bool | None
) -> None:
    for i, kwargs in enumerate(kwargs_of(setup, fused)):
        # All schedulers with each kind of learning rate, and one with each other argument.
        some = SCHEDULERS if "lr" in kwargs else SCHEDULERS[i % len(SCHEDULERS) :][:1]
        for schedulers in some if with_scheduler else [[]]:
            weight, bias = (Parameter(p.detach()) for p in make_params([(10, 5), (10,)]))
            optimizer = setup.cls([weight, bias], **copy.deepcopy(kwargs))
            losses = _train(optimizer, weight, bias, [make(optimizer) for make in schedulers])
            went_up = losses[-1] > losses[0]
            assert went_up == kwargs.get("maximize", False), kwargs


def _train(optimizer: Any, weight: Tensor, bias: Tensor, schedulers: list[Any]) -> list[float]:
    target = make_params([(5,)])[0].detach()

    def closure() -> float:
        optimizer.zero_grad()
        loss = (weight.mv(target) + bias).square().sum()
        loss.backward()
        return loss.item()

    losses = []
    for _ in range(20):
        losses.append(optimizer.step(closure))
        for scheduler in schedulers:
            scheduler.step(*losses[-1:] if isinstance(scheduler, ReduceLROnPlateau) else ())
    return losses


@pytest.mark.real
@every_optimizer
def test_complex_is_two_reals(setup: Setup, fused: bool | None) -> None:
    for kwargs in kwargs_of(setup, fused):
        params = make_params(dtype=torch.complex64)
        reals = [Parameter(torch.view_as_real(p.detach()).clone()) for p in params]
        optimizer = setup.cls(params, **copy.deepcopy(kwargs))
        other = setup.cls(reals, **kwargs)
        for _ in range(3):
            for tensors, one in ((params, optimizer), (reals, other)):
                one.zero_grad()
                loss = torch.stack([_real(t).square().sum() for t in tensors]).sum()
                loss.backward()
                one.step()
        if kwargs.get("frob_normalize"):
            continue  # the norms are summed in a different order
        assert_same(contents(optimizer), contents(other), str(kwargs))


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


@pytest.mark.real
@every_optimizer
def test_implementations_match(setup: Setup) -> None:
    """Seven steps, one of them without gradients, and a frozen layer."""
    for kwargs in kwargs_of(setup, None):
        results = []
        for fused in (False, None):
            torch.manual_seed(1)
            model = torch.nn.Sequential(
                torch.nn.Linear(4, 3), torch.nn.Sigmoid(), torch.nn.Linear(3, 1), torch.nn.Sigmoid()
            )
            model[2].requires_grad_(False)
            x = make_params([(5, 4)])[0].detach()
            options = copy.deepcopy(kwargs) | {"fused": fused}
            optimizer = setup.cls(model.parameters(), **options)
            for i in range(7):
                optimizer.zero_grad()
                loss = model(x).sum()
                if i != 3:
                    loss.backward()
                optimizer.step()
            results.append(contents(optimizer))
        torch.testing.assert_close(results[1], results[0], msg=str(kwargs))


@every_optimizer
def test_param_group_options(setup: Setup, fused: bool | None) -> None:
    # A key in a group has the same effect as in the constructor.
    for kwargs in kwargs_of(setup, fused):
        params, others = make_params(), make_params()
        options = {k: v for k, v in kwargs.items() if k != "fused"}
        optimizer = setup.cls([{"params": params, **copy.deepcopy(options)}], fused=fused)
        other = setup.cls(others, **kwargs)
        run(optimizer, params, [1, 2])
        run(other, others, [1, 2])
        assert_same(contents(optimizer), contents(other), str(kwargs))


@every_optimizer
def test_tensor_lr(setup: Setup, fused: bool | None) -> None:
    for kwargs in kwargs_of(setup, fused):
        results = []
        for lr in (0.01, torch.tensor(0.01), torch.tensor([0.01])):
            params = make_params()
            optimizer = setup.cls(params, **{**copy.deepcopy(kwargs), "lr": lr})
            scheduler = ExponentialLR(optimizer, 0.5)
            for step in (1, 2):
                run(optimizer, params, [step])
                scheduler.step()
            assert type(optimizer.param_groups[0]["lr"]) is type(lr)
            results.append([p.detach() for p in params])
        for result in results[1:]:
            torch.testing.assert_close(result, results[0], msg=str(kwargs))


@every_optimizer
def test_no_op_without_grads(setup: Setup, fused: bool | None) -> None:
    for kwargs in kwargs_of(setup, fused):
        params = make_params()
        optimizer = setup.cls(params, **kwargs)
        before = contents(optimizer)
        optimizer.step()
        assert_same(contents(optimizer), before, str(kwargs))


@every_optimizer
def test_grads_are_never_modified(setup: Setup, fused: bool | None) -> None:
    for kwargs in kwargs_of(setup, fused):
        params = make_params()
        optimizer = setup.cls(params, **kwargs)
        grads: list[Tensor] = []

        def keep(step: int, params: Any = params, grads: list[Tensor] = grads) -> None:
            grads[:] = [p.grad.clone() for p in params]

        for step in (1, 2):
            run(optimizer, params, [step], before_step=keep)
            assert_same([p.grad for p in params if p.grad is not None], grads, str(kwargs))


@every_optimizer
def test_hooks(setup: Setup, fused: bool | None) -> None:
    params = make_params()
    optimizer = setup.cls(params, fused=fused)
    data = [2]
    handles = [
        optimizer.register_step_pre_hook(lambda opt, args, kwargs: data.append(1)),
        optimizer.register_step_post_hook(lambda opt, args, kwargs: data.append(3)),
        optimizer.register_state_dict_pre_hook(lambda opt: data.append(4)),
        optimizer.register_state_dict_post_hook(lambda opt, state: data.append(5)),
        optimizer.register_load_state_dict_pre_hook(lambda opt, state: data.append(6)),
        optimizer.register_load_state_dict_post_hook(lambda opt: data.append(7)),
    ]
    run(optimizer, params, [1])
    optimizer.load_state_dict(optimizer.state_dict())
    assert data == [2, 1, 3, 4, 5, 6, 7]
    for handle in handles:
        handle.remove()
    run(optimizer, params, [2])
    optimizer.load_state_dict(optimizer.state_dict())
    assert len(data) == 7
    # A hook may replace the loaded state dict.
    other = setup.cls(make_params(), fused=fused)
    changed = copy.deepcopy(optimizer.state_dict())
    changed["param_groups"][0]["lr"] = 0.125
    other.register_load_state_dict_pre_hook(lambda opt, state: changed)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == 0.125


@every_optimizer
def test_deepcopy(setup: Setup, fused: bool | None) -> None:
    for kwargs in kwargs_of(setup, fused):
        params = make_params()
        optimizer = setup.cls(params, **kwargs)
        run(optimizer, params, [1])
        copied = copy.deepcopy(optimizer)
        assert_same(contents(copied), contents(optimizer), str(kwargs))
        run(copied, copied.param_groups[0]["params"], [2])
        assert copied.state_dict()["state"][0]["step"].item() == 2
        assert optimizer.state_dict()["state"][0]["step"].item() == 1


@every_optimizer
def test_state_dicts_are_deterministic(setup: Setup, fused: bool | None) -> None:
    for kwargs in kwargs_of(setup, fused):
        params = make_params()
        optimizer = setup.cls(params, **kwargs)
        run(optimizer, params, [1, 2])
        others = [Parameter(p.detach().clone()) for p in params]
        other = setup.cls(others, **copy.deepcopy(kwargs))
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        first, second = optimizer.state_dict(), other.state_dict()
        assert first["param_groups"] == second["param_groups"]
        assert list(first["state"]) == list(second["state"])
        run(optimizer, params, [3, 4])
        run(other, others, [3, 4])
        assert_same(contents(other), contents(optimizer), str(kwargs))


@every_optimizer
def test_older_state_dicts(setup: Setup, fused: bool | None) -> None:
    new_flags = ("maximize", "capturable", "fused", "differentiable", "foreach")
    for kwargs in kwargs_of(setup, fused):
        params = make_params()
        optimizer = setup.cls(params, **kwargs)
        run(optimizer, params, [1])
        older = copy.deepcopy(optimizer.state_dict())
        for group in older["param_groups"]:
            for flag in new_flags:
                group.pop(flag, None)
        optimizer.load_state_dict(older)
        run(optimizer, params, [2])
        assert all(flag in optimizer.param_groups[0] for flag in new_flags[:4])


@every_optimizer
@pytest.mark.parametrize("found_inf", [False, True])
def test_grad_scaling(setup: Setup, found_inf: bool, fused: bool | None) -> None:
    for kwargs in kwargs_of(setup, fused):
        params, others = make_params(), make_params()
        optimizer = setup.cls(params, **kwargs)
        other = setup.cls(others, **copy.deepcopy(kwargs))
        run(optimizer, params, [1])
        run(other, others, [1])
        optimizer.grad_scale = torch.tensor(4.0)
        optimizer.found_inf = torch.tensor(float(found_inf))

        def scale(step: int, params: Any = params) -> None:
            for p in params:
                p.grad.mul_(4)

        run(optimizer, params, [2], before_step=scale)
        if not found_inf:
            run(other, others, [2])
        assert_same([p.detach() for p in params], [p.detach() for p in others], str(kwargs))
        assert optimizer.state[params[0]]["step"].item() == (1 if found_inf else 2)
