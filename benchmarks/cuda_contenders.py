"""Ways of computing an update that ``bench_cuda.py`` alone measures, and checks of their bits."""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

import torch
from contenders import Contender, Package, Step
from cuda_device import Device
from harness import WrongResultError
from problems import Problem
from torch import Tensor

# ---- contenders on this device alone -------------------------------------------------------------


class Formula(Contender):
    """The formula on widened operands; the package is checked against it, nobody times it."""

    name = "formula"
    title = "formula"

    def prepare(self, problem: Problem) -> Step:
        """Return a loop over the tensors."""
        rule = problem.rule

        def step() -> list[Tensor]:
            updates = []
            for grad, *states in problem.positions():
                wide = [state.float() for state in states]
                update = rule.formula(grad.float(), *wide, *rule.values)
                updates.append(update.to(grad.dtype))
                for state, value in zip(states, wide, strict=True):
                    if value is not state:
                        state.copy_(value)
            return updates

        return step


class DeviceStep(Package):
    """This package, with a step that only the device knows."""

    name = "device-step"
    title = "this package, step on the device"

    def prepare(self, problem: Problem) -> Step:
        """Return one call on all tensors."""
        step = torch.tensor(problem.rule.options["step"], device=problem.grads[0].device)
        problem = copy.copy(problem)
        options = problem.rule.options | {"step": step}
        problem.rule = dataclasses.replace(problem.rule, options=options)
        return super().prepare(problem)


class FusedAdam(Contender):
    """PyTorch's own fused Adam, which applies the update to the parameters as well."""

    name = "torch-adam"
    title = "torch.optim.Adam, fused (applies the update, too)"
    optimizer: ClassVar[Callable[..., torch.optim.Optimizer]] = torch.optim.Adam

    def prepare(self, problem: Problem) -> Step:
        """Return the optimizer's step from parameters that are 0: it makes them the update's -1."""
        parameters = [torch.zeros_like(grad) for grad in problem.grads]
        options = {key: problem.rule.options[key] for key in ("betas", "eps")}
        optimizer = type(self).optimizer(
            parameters, lr=1.0, weight_decay=0.0, fused=True, **options
        )
        before = torch.tensor(float(problem.rule.options["step"] - 1))
        for parameter, grad, *averages in zip(
            parameters, problem.grads, *problem.states, strict=True
        ):
            parameter.grad = grad
            optimizer.state[parameter] = {
                "step": before.to(grad.device, copy=True),
                "exp_avg": averages[0],
                "exp_avg_sq": averages[1],
            }

        def step() -> list[Tensor]:
            optimizer.step()
            return parameters

        return step

    def expect(self, problem: Problem) -> None:
        """Put what the first step makes of the parameters in the update's place."""
        super().expect(problem)
        torch._foreach_neg_(problem.updates)


class FusedAdamW(FusedAdam):
    """The same with decoupled weight decay, of 0."""

    name = "torch-adamw"
    title = "torch.optim.AdamW, fused (applies the update, too)"
    optimizer = torch.optim.AdamW


class Copy:
    """The roof: one large tensor copied to another.

    Attributes:
        nbytes: Read and written.
    """

    def __init__(self, device: Device, size: int) -> None:
        source = torch.rand(size // 4, device=device.type)
        target = torch.zeros_like(source)
        self.nbytes = source.nbytes + target.nbytes
        self.step = lambda: target.copy_(source)
        self.step()
        if not torch.equal(source, target):
            raise WrongResultError("the copy is not equal to its source")


# Compared with the CPU's bits, at each end of each tensor.
_END = 1 << 18


def check_bits(problem: Problem) -> None:
    """Raise unless this package gives the bits of its CPU kernel."""
    rule = problem.rule
    grads, *states, updates = map(ends, (problem.grads, *problem.states, problem.updates))
    rule.function(grads, *states, *rule.values, out=updates)
    Package().prepare(problem)()
    got = map(ends, (problem.updates, *problem.states))
    where = f"{rule.name} at {problem.shape.name}"
    compare_bits(where, ("update", *rule.states), got, (updates, *states))


def compare_bits(
    where: str,
    names: Sequence[str],
    got: Iterable[Sequence[Tensor]],
    wanted: Iterable[Sequence[Tensor]],
) -> None:
    """Raise unless lists of tensors, all on the CPU, have the same bits."""
    for name, tensors, others in zip(names, got, wanted, strict=True):
        pairs = zip(map(_bits, tensors), map(_bits, others), strict=True)
        differing = sum(int((a != b).sum()) for a, b in pairs)
        if differing:
            raise WrongResultError(
                f"{where}: {differing} elements of {name} differ in their bits from the CPU's"
            )


def ends(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return copies on the CPU of the first and the last elements of each tensor."""
    parts = []
    for flat in (tensor.reshape(-1) for tensor in tensors):
        parts += [flat] if flat.numel() <= 2 * _END else [flat[:_END], flat[-_END:]]
    return [part.to("cpu", copy=True) for part in parts]


def beginnings(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return copies on the CPU of the first elements of each tensor."""
    return [tensor.reshape(-1)[:_END].to("cpu", copy=True) for tensor in tensors]


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)
