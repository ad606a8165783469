"""The table of optimizers that their tests are crossed with, and their steps in float64."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from oracle import ALL_RULES, CLASSES, IS_USER, Array, Rule
from support import assert_equal_bits
from torch import Tensor

from emerging_optimizers import ScalarOptimizer, megatron

METHODS = ("decoupled", "independent", "l2", "palm")


@dataclass(frozen=True)
class Setup:
    """An optimizer with arguments, and the hyperparameters that its rule's oracle then takes."""

    name: str
    cls: type[ScalarOptimizer]
    rule: Rule
    case: Mapping[str, Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def make(self, params: Any, **arguments: Any) -> ScalarOptimizer:
        return self.cls(params, **{**self.arguments, **arguments})

    @property
    def states(self) -> tuple[str, ...]:
        """The keys of a parameter's states."""
        return tuple(self.cls._state_keys.get(name, name) for name in self.rule.states)

    def __str__(self) -> str:
        return self.name


_ALL = [
    Setup(
        f"{row.cls} {row.label}".strip(),
        getattr(CLASSES, row.cls),
        rule,
        row.case,
        row.arguments,
    )
    for rule in ALL_RULES.values()
    for row in rule.optimizers
]
# One of each class, with its defaults; and others.
SETUPS = [setup for setup in _ALL if not setup.arguments]
VARIANTS = [setup for setup in _ALL if setup.arguments]
# The classes for Megatron-Core, by name.
MEGATRON: dict[str, type[megatron.MegatronMixin]] = {
    name: cls
    for name, cls in vars(CLASSES if IS_USER else megatron).items()
    if isinstance(cls, type)
    and issubclass(cls, megatron.MegatronMixin)
    and cls is not megatron.MegatronMixin
}
every_optimizer = pytest.mark.parametrize("setup", SETUPS, ids=str)
every_optimizer_with_states = pytest.mark.parametrize(
    "setup", [setup for setup in SETUPS if setup.states], ids=str
)
every_variant = pytest.mark.parametrize("setup", SETUPS + VARIANTS, ids=str)


@dataclass
class Trajectory:
    """A parameter and its states in float64, which `step` moves as the setup's optimizer should."""

    setup: Setup
    param: Array
    lr: float = 1e-3
    weight_decay: float = 0.0
    method: str = "decoupled"
    count: int = 0

    def __post_init__(self) -> None:
        self.param = self.param.copy()
        self.states = [np.zeros_like(self.param) for _ in self.setup.states]

    def step(self, grad: Array) -> None:
        self.count += 1
        step = {"step": self.count} if self.setup.rule.has_step else {}
        if self.method == "l2":
            grad = grad + self.weight_decay * self.param
        expected = self.setup.rule.oracle(grad, *self.states, **self.setup.case, **step)
        self.states = [state.value for state in expected.states]
        lost = {
            "decoupled": self.lr * self.weight_decay,
            "independent": self.weight_decay,
            "palm": self.lr**2 * self.weight_decay,
            "l2": 0.0,
        }[self.method]
        self.param = self.param - lost * self.param - self.lr * expected.update.value


def make_params(
    shapes: Sequence[tuple[int, ...]] = ((3, 4), (5, 2)), dtype: torch.dtype = torch.float32
) -> list[torch.nn.Parameter]:
    """Parameters, on the default device, of the same values each time."""
    return [torch.nn.Parameter(value) for value in _numbers(shapes, seed=1000, dtype=dtype)]


def make_grads(params: Sequence[Tensor], step: int) -> list[Tensor]:
    return _numbers([tuple(p.shape) for p in params], seed=step, dtype=params[0].dtype)


def _numbers(shapes: Sequence[tuple[int, ...]], seed: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator("cpu").manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    device = torch.get_default_device()
    return [
        torch.randn(shape, generator=generator, dtype=wide, device="cpu").to(device, dtype)
        for shape in shapes
    ]


def set_grads(params: Sequence[Tensor], step: int) -> None:
    for param, grad in zip(params, make_grads(params, step), strict=True):
        param.grad = grad


def run(
    optimizer: torch.optim.Optimizer,
    params: Sequence[Tensor],
    steps: Sequence[int],
    before_step: Callable[[int], None] | None = None,
) -> None:
    """Step with the gradients of these step numbers."""
    for step in steps:
        set_grads(params, step)
        if before_step is not None:
            before_step(step)
        optimizer.step()


def contents(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Copies of all parameters and states, in order."""
    found = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            values = optimizer.state.get(param, {}).values()
            tensors = [param, *(v for v in values if isinstance(v, Tensor))]
            found += [tensor.detach().clone() for tensor in tensors]
    return found


def assert_same(got: Sequence[Tensor], wanted: Sequence[Tensor], label: str = "") -> None:
    assert len(got) == len(wanted)
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert_equal_bits(_real(a), _real(b), f"{label} tensor {i}")


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def has_momentum(optimizer: torch.optim.Optimizer) -> bool:
    """Whether PyTorch's schedulers can cycle the momentum."""
    return "betas" in optimizer.defaults or optimizer.defaults.get("momentum", 0.0) != 0.0


def one_cycle(
    optimizer: torch.optim.Optimizer, max_lr: float, total_steps: int
) -> torch.optim.lr_scheduler.OneCycleLR:
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr, total_steps, cycle_momentum=has_momentum(optimizer)
    )
