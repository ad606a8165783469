"""Optimizers by name."""

from typing import Any

import pytest
import torch
from optimizers import SETUPS
from oracle import IS_USER

import emerging_optimizers
from emerging_optimizers import megatron, registry
from emerging_optimizers.registry import get_optimizer_cls, register_optimizer

NAMES = {
    "adam": "Adam",
    "adamw": "AdamW",
    "ademamix": "AdEMAMix",
    "laprop": "LaProp",
    "lion": "Lion",
    "madam": "MAdam",
    "rmsprop": "RMSprop",
    "signum": "Signum",
    "sim_ademamix": "SimplifiedAdEMAMix",
}


@pytest.mark.parametrize("name", NAMES)
def test_names(name: str) -> None:
    assert get_optimizer_cls(name) is getattr(emerging_optimizers, NAMES[name])


@pytest.mark.skipif(not IS_USER, reason="the built-in classes are above")
def test_names_of_users_classes() -> None:
    for setup in SETUPS:
        assert get_optimizer_cls(setup.rule.name) is setup.cls


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"no optimizer is named 'soap'; there are adam, adamw, "):
        get_optimizer_cls("soap")


@pytest.fixture
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what a test registers."""
    monkeypatch.setattr(registry, "_CLASSES", dict(registry._CLASSES))


@pytest.mark.usefixtures("_registry")
def test_registration() -> None:
    class Mine(torch.optim.SGD):
        pass

    for name in ("Mine", "mine"):
        assert register_optimizer(name)(Mine) is Mine
    assert get_optimizer_cls("MINE") is Mine
    assert "mine" in registry.get_optimizer_names()
    with pytest.raises(ValueError, match=r"optimizer name 'mine' is taken by .*Mine"):
        register_optimizer("mine")(torch.optim.SGD)


@pytest.mark.usefixtures("_registry")
def test_upper_and_lower_case() -> None:
    assert get_optimizer_cls("AdamW") is emerging_optimizers.AdamW
    with pytest.raises(ValueError, match=r"optimizer name 'ADAMW' is taken by AdamW"):
        register_optimizer("ADAMW")(torch.optim.AdamW)


@pytest.mark.usefixtures("_registry")
def test_lists_of_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron-Core makes every listed optimizer available, beside its own "adam" and "sgd"."""
    monkeypatch.setitem(registry._CLASSES, "sgd", torch.optim.SGD)
    names = registry.get_optimizer_names()
    assert names == sorted(names)
    assert set(NAMES) <= set(names)
    monkeypatch.setattr(registry, "namesake", None)
    assert registry.get_optimizer_name_list() == names
    monkeypatch.setattr(registry, "namesake", "NVIDIA's package")
    assert set(names) - set(registry.get_optimizer_name_list()) == {"adam", "sgd"}


# ---- arguments -----------------------------------------------------------------------------------


class _PassesOptionsOn(emerging_optimizers.Lion):
    def __init__(self, *arguments: Any, extra: int = 0, **options: Any) -> None:
        super().__init__(*arguments, **options)


class _HasOptions(emerging_optimizers.ScalarOptimizer):
    _rule = emerging_optimizers.Lion._rule

    def __init__(self, params: Any, lr: float = 0.1, **options: Any) -> None:
        raise NotImplementedError


class _TakesAnything(torch.optim.Optimizer):
    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, options)


SHARED = ["maximize", "fused", "capturable", "state_dtype", "master_weights"]
SHARED += ["stochastic_rounding", "differentiable"]
LION = ["lr", "betas", "weight_decay", "weight_decay_method"]
MEGATRON = ["use_decoupled_grad", "store_param_remainders", "exp_avg_dtype", "set_grad_none"]
ARGUMENTS = {
    "ours": (emerging_optimizers.Lion, [*LION, *SHARED]),
    "Megatron's": (megatron.Lion, [*LION, *SHARED, *MEGATRON]),
    "TransformerEngine's": (megatron.FusedAdam, ["lr", "adam_w_mode", "amsgrad", *MEGATRON]),
    "passes options on": (_PassesOptionsOn, ["extra", *LION, *SHARED]),
    "has options": (_HasOptions, ["lr", *SHARED]),
    "torch's": (torch.optim.SGD, ["lr", "momentum", "dampening", "nesterov", "foreach"]),
}


@pytest.mark.parametrize(("cls", "names"), ARGUMENTS.values(), ids=list(ARGUMENTS))
def test_arguments(cls: type[torch.optim.Optimizer], names: list[str]) -> None:
    registry.validate_optimizer_args(cls, dict.fromkeys(["params", *names]))
    with pytest.raises(TypeError) as caught:
        registry.validate_optimizer_args(cls, {"lr": 1, "params": [], "fusedd": True, "mode": 1})
    message = str(caught.value)
    start = f"{cls.__name__} has no argument 'fusedd', 'mode'; expected "
    assert message.startswith(start)
    assert set(names) <= set(message.removeprefix(start).split(", "))
    assert "params" not in message


def test_arguments_of_a_users_rule() -> None:
    @emerging_optimizers.rule
    def with_floor(grad: Any, momentum: Any, *, beta: float = 0.9, floor: float = 0.0) -> Any:
        return momentum.mul_(beta).add_(grad)

    class WithFloor(emerging_optimizers.ScalarOptimizer, rule=with_floor, lr=0.1):
        pass

    registry.validate_optimizer_args(WithFloor, {"lr": 1, "beta": 0, "floor": 0, "fused": True})
    with pytest.raises(TypeError, match="WithFloor has no argument 'betas'; expected lr, beta, "):
        registry.validate_optimizer_args(WithFloor, {"betas": (0, 0)})


def test_any_argument() -> None:
    registry.validate_optimizer_args(_TakesAnything, {"anything": 1})


def test_configured_class() -> None:
    make = registry.get_configured_optimizer_cls("Lion", lr=0.5, fused=False)
    optimizer = make([torch.zeros(2)], weight_decay=0.25)
    assert type(optimizer) is emerging_optimizers.Lion
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["fused"]) == (0.5, 0.25, False)
    with pytest.raises(TypeError, match="Lion has no argument 'eps'; expected lr, betas, "):
        registry.get_configured_optimizer_cls("lion", eps=1e-8)
    with pytest.raises(ValueError, match="no optimizer is named 'lyon'"):
        registry.get_configured_optimizer_cls("lyon", eps=1e-8)
