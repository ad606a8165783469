"""Optimizers' steps on parameters of 16 bits and of float32, which ``bench_cuda.py`` measures.

States are float32 throughout, as training has them; what differs is how a parameter is stored, and
whether there is a master of it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from cuda_contenders import beginnings, compare_bits, ends
from harness import check_close
from loops import LOOPS
from problems import OptimizerProblem, Rule, Shape
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from emerging_optimizers import megatron

# The rules whose optimizers are measured, and Megatron-Core's optimizers for them.
STEPPED = ("adam", "lion")
_OF_MEGATRON: Mapping[str, Callable[..., Optimizer]] = {
    "adam": megatron.FusedAdam,
    "lion": megatron.Lion,
}
_CHECKED_STEPS = 3


# ---- how parameters are stored -------------------------------------------------------------------


@dataclass(frozen=True)
class Storage:
    """How parameters are stored, with float32 states.

    Attributes:
        title: What a reader calls it.
        dtype: Of parameters and gradients.
        master: Of the masters, if there are any: int16 are remainders.
        options: What this package's optimizers are constructed with for it.
    """

    title: str
    dtype: torch.dtype
    master: torch.dtype | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_stochastic(self) -> bool:
        """Whether parameters are rounded at random."""
        return bool(self.options.get("stochastic_rounding"))


_FLOAT32_STATES = {"state_dtype": torch.float32}
STORAGES = {
    "float32": Storage("float32", torch.float32),
    "bfloat16": Storage(
        "bfloat16 parameters, float32 states", torch.bfloat16, options=_FLOAT32_STATES
    ),
    "float16": Storage(
        "float16 parameters, float32 states", torch.float16, options=_FLOAT32_STATES
    ),
    "masters": Storage(
        "bfloat16 parameters, float32 masters and states",
        torch.bfloat16,
        torch.float32,
        {**_FLOAT32_STATES, "master_weights": True},
    ),
    "remainders": Storage(
        "bfloat16 parameters, masters as remainders, float32 states",
        torch.bfloat16,
        torch.int16,
        {"master_weights": True, "store_param_remainders": True},
    ),
    "stochastic": Storage(
        "bfloat16 parameters rounded stochastically, float32 states",
        torch.bfloat16,
        options={**_FLOAT32_STATES, "stochastic_rounding": True},
    ),
}


class StoredProblem(OptimizerProblem):
    """An optimizer's problem with parameters that are stored in one of these ways.

    Attributes:
        storage: The way.
        masters: One per parameter, or none at all.
    """

    def __init__(self, rule: Rule, shape: Shape, storage: Storage, device: str) -> None:
        """Make the tensors."""
        super().__init__(rule, shape, device)
        self.storage = storage
        if storage.dtype == torch.float32:
            return
        weights = [param.detach() for param in self.params]
        params = [weight.to(storage.dtype) for weight in weights]
        others = list(self.states)
        if storage.master == torch.float32:
            others.append(weights)
        elif storage.master == torch.int16:
            remainders = [torch.empty_like(param, dtype=torch.int16) for param in params]
            for weight, param, remainder in zip(weights, params, remainders, strict=True):
                megatron.split_master(weight, param, remainder)
            others.append(remainders)
        self._take([grad.to(storage.dtype) for grad in self.grads], params, *others)

    def _take(self, grads: list[Tensor], params: list[Tensor], *others: list[Tensor]) -> None:
        count = len(self.rule.states)
        super()._take(grads, params, *others[:count])
        (self.masters,) = others[count:] or ([],)

    @property
    def modified(self) -> list[list[Tensor]]:
        """What a step modifies: parameters, each of the states, and masters if there are any."""
        return [*super().modified, *([self.masters] if self.masters else [])]

    @property
    def nbytes(self) -> int:
        """Bytes that a step must move. A parameter with a float32 master is only written."""
        only_written = self.params if self.storage.master == torch.float32 else []
        return super().nbytes - sum(param.nbytes for param in only_written)

    @property
    def names(self) -> tuple[str, ...]:
        """What messages call the columns of `modified`."""
        return ("param", *self.rule.states, "master")[: len(self.modified)]

    def weights(self) -> list[Tensor]:
        """Return what parameters would be if they were stored as float32."""
        if self.storage.master == torch.int16:
            pairs = zip(self.params, self.masters, strict=True)
            return [megatron.merge_master(param.detach(), master) for param, master in pairs]
        return self.masters or [param.detach() for param in self.params]

    def values(self) -> list[list[Tensor]]:
        """Return the columns of `modified`, but masters as numbers."""
        columns = self.modified
        return [*columns[:-1], self.weights()] if self.masters else columns

    def expected(self) -> list[list[Tensor]]:
        """Return what the checked steps must make of `values`: performed in float64."""
        columns: list[list[Tensor]] = [[] for _ in self.modified]
        for weight, grad, *states in zip(self.weights(), self.grads, *self.states, strict=True):
            precise = nn.Parameter(weight.double())
            precise.grad = grad.double()
            optimizer = LOOPS[self.rule.name]([precise], **self.arguments)
            state = dict(zip(self.rule.states, (state.double() for state in states), strict=True))
            count = torch.tensor(float(self.steps_done))
            optimizer.state[precise] = {
                **state,
                "step": count if isinstance(optimizer, AdamW) else self.steps_done,
            }
            for _ in range(_CHECKED_STEPS):
                optimizer.step()
            moved = precise.detach().float()
            for column, tensor in zip(columns, (moved, *state.values(), moved), strict=False):
                column.append(tensor.float())
        return columns


# ---- ways of performing a step -------------------------------------------------------------------


class Stepper(ABC):
    """One way of performing a step.

    Attributes:
        name: What the report calls it.
        title: What a reader calls it.
    """

    def __init__(self, name: str, title: str, **options: Any) -> None:
        self.name = name
        self.title = title
        self._options = options

    @abstractmethod
    def has(self, problem: StoredProblem) -> bool:
        """Return whether it can perform the problem's step, or what comes next to it."""

    @abstractmethod
    def prepare(self, problem: StoredProblem) -> Callable[[], object]:
        """Return a call that performs a step on the problem's tensors."""

    def modifies(self, problem: StoredProblem, name: str) -> bool:
        """Return whether it steps that column of the problem, not tensors of its own instead."""
        return True


class PackageStep(Stepper):
    """This package's."""

    def has(self, problem: StoredProblem) -> bool:
        """Return whether there is an optimizer: always."""
        return True

    def prepare(self, problem: StoredProblem) -> Callable[[], object]:
        """Return the optimizer's method."""
        rule, storage = problem.rule, problem.storage
        make: Callable[..., Optimizer] = rule.optimizer
        if storage.master == torch.int16:
            make = _OF_MEGATRON[rule.name]
        optimizer = make(problem.params, **problem.arguments, **storage.options, **self._options)
        keys = (*rule.states, "master_param")
        for param, *others in zip(problem.params, *problem.modified[1:], strict=True):
            optimizer.state[param] = {
                "step": _count_on(param.device if optimizer.defaults["capturable"] else "cpu"),
                **dict(zip(keys, others, strict=False)),
            }
        return optimizer.step


def _count_on(device: torch.device | str) -> Tensor:
    return torch.tensor(float(OptimizerProblem.steps_done), device=device)


class TorchStep(Stepper):
    """PyTorch's AdamW, on the problem's parameters, all of one dtype with their states."""

    def __init__(self, name: str, title: str, is_short: bool = False, **options: Any) -> None:
        super().__init__(name, title, **options)
        self._is_short = is_short

    def has(self, problem: StoredProblem) -> bool:
        """Return whether the parameters are of that size, and have no masters."""
        is_short = problem.storage.dtype != torch.float32
        return problem.rule.name == "adam" and is_short == self._is_short and not problem.masters

    def prepare(self, problem: StoredProblem) -> Callable[[], object]:
        """Return the optimizer's method; 16-bit parameters have states of their dtype."""
        states = problem.states
        if self._is_short:
            states = [[s.to(problem.storage.dtype) for s in column] for column in states]
        return _adamw(problem, problem.params, states, self._options).step

    def modifies(self, problem: StoredProblem, name: str) -> bool:
        """Return whether the column is the parameters', where states have another dtype."""
        return name == "param" or not self._is_short


class TorchMasterStep(Stepper):
    """PyTorch's AdamW on float32 masters, and the copies between them and 16-bit tensors."""

    def has(self, problem: StoredProblem) -> bool:
        """Return whether there are masters; also where they are remainders, for want of others."""
        return problem.rule.name == "adam" and bool(problem.masters)

    def prepare(self, problem: StoredProblem) -> Callable[[], object]:
        """Return the gradients' widening, the optimizer's method and the parameters' rounding."""
        masters = [nn.Parameter(weight) for weight in problem.weights()]
        params = [param.detach() for param in problem.params]
        grads = [torch.empty_like(master) for master in masters]
        for master, grad in zip(masters, grads, strict=True):
            master.grad = grad
        optimizer = _adamw(problem, masters, problem.states, self._options)

        def step() -> None:
            torch._foreach_copy_(grads, problem.grads)
            optimizer.step()
            torch._foreach_copy_(params, masters)

        return step

    def modifies(self, problem: StoredProblem, name: str) -> bool:
        """Return whether the column is not of remainders, which it leaves alone."""
        return name != "master" or problem.storage.master == torch.float32


def _adamw(
    problem: StoredProblem,
    params: Sequence[nn.Parameter],
    states: Sequence[Sequence[Tensor]],
    options: Mapping[str, Any],
) -> AdamW:
    optimizer = AdamW(params, **problem.arguments, **options)
    is_counted_there = options.get("fused") or options.get("capturable")
    for param, exp_avg, exp_avg_sq in zip(params, *states, strict=True):
        optimizer.state[param] = {
            "step": _count_on(param.device if is_counted_there else "cpu"),
            "exp_avg": exp_avg,
            "exp_avg_sq": exp_avg_sq,
        }
    return optimizer


OURS = (
    PackageStep("package", "this package"),
    PackageStep("capturable", "this package, capturable", capturable=True),
)
# Each is comparable only where it does the same work; else its title says what it does instead.
OTHERS = (
    TorchStep("adamw-foreach", "torch.optim.AdamW, foreach", foreach=True),
    TorchStep(
        "adamw-foreach-capturable",
        "torch.optim.AdamW, foreach, capturable",
        foreach=True,
        capturable=True,
    ),
    TorchStep("adamw-fused", "torch.optim.AdamW, fused", fused=True),
    TorchStep(
        "adamw-foreach-short",
        "torch.optim.AdamW, foreach, 16-bit states (moves less, rounds more)",
        is_short=True,
        foreach=True,
    ),
    TorchStep(
        "adamw-fused-short",
        "torch.optim.AdamW, fused, 16-bit states (moves less)",
        is_short=True,
        fused=True,
    ),
    TorchMasterStep(
        "adamw-foreach-masters",
        "torch.optim.AdamW, foreach, on float32 masters, and copies",
        foreach=True,
    ),
    TorchMasterStep(
        "adamw-fused-masters",
        "torch.optim.AdamW, fused, on float32 masters, and copies",
        fused=True,
    ),
)
# Those that do this package's work, without and with float32 masters.
SAME_WORK = ("adamw-fused", "adamw-fused-masters")


# ---- correctness ---------------------------------------------------------------------------------


def check_bits_of_step(problem: StoredProblem) -> None:
    """Raise unless this package's optimizers give the bits of their step on the CPU."""
    initial = _copies(problem.modified)
    # Random bits depend on an element's index in its parameter: so the last ones are left out.
    cut = beginnings if problem.storage.is_stochastic else ends
    on_cpu = problem.mapped(cut)
    try:
        for stepper in OURS:
            for one in (problem, on_cpu):
                step = stepper.prepare(one)
                torch.default_generator.manual_seed(0)  # what stochastic rounding draws from
                step()
            where = f"{stepper.name}, {problem.rule.name} at {problem.shape.name}"
            compare_bits(where, problem.names, map(cut, problem.modified), on_cpu.modified)
    finally:
        _set(problem.modified, initial)


class StepCheck:
    """Whether steps bring what they modify to where they must."""

    def __init__(self, problem: StoredProblem) -> None:
        self._problem = problem
        self._initial = _copies(problem.modified)
        self._expected = problem.expected()

    def __call__(self, stepper: Stepper, step: Callable[[], object]) -> None:
        """Raise unless a few steps do; leave the problem as it was."""
        problem = self._problem
        try:
            for _ in range(_CHECKED_STEPS):
                step()
            columns = zip(problem.names, problem.values(), self._expected, strict=True)
            for name, actual, wanted in columns:
                if stepper.modifies(problem, name):
                    what = f"{stepper.name}, {problem.rule.name} at {problem.shape.name}: {name}"
                    is_sign = problem.rule.is_sign and name in ("param", "master")
                    check_close(what, actual, wanted, is_sign=is_sign)
        finally:
            _set(problem.modified, self._initial)


def _copies(columns: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    return [[tensor.clone() for tensor in column] for column in columns]


def _set(columns: Sequence[Sequence[Tensor]], values: Sequence[Sequence[Tensor]]) -> None:
    for column, new in zip(columns, values, strict=True):
        torch._foreach_copy_(list(column), list(new))
