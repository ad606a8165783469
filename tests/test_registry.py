"""Optimizers by name."""

import pytest
import torch
from optimizers import SETUPS
from oracle import IS_USER

import emerging_optimizers
from emerging_optimizers import registry
from emerging_optimizers.registry import get_optimizer_cls, register_optimizer

NAMES = {
    "adam": "Adam",
    "adamw": "AdamW",
    "ademamix": "AdEMAMix",
    "laprop": "LaProp",
    "lion": "Lion",
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


def test_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_CLASSES", dict(registry._CLASSES))

    class Mine(torch.optim.SGD):
        pass

    for _ in range(2):
        assert register_optimizer("mine")(Mine) is Mine
    assert get_optimizer_cls("mine") is Mine
    with pytest.raises(ValueError, match=r"optimizer name 'mine' is taken by .*Mine"):
        register_optimizer("mine")(torch.optim.SGD)
