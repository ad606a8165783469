"""Clipping on CUDA devices: as on the CPU, and the host does not wait.

Without a GPU, most of it runs on emulated devices: ``pytest --device emulated``.
"""

import pytest
import torch
from optimizers import Setup, assert_same, contents, every_optimizer, make_params
from test_clipping import ORDERS, SHAPES, assert_near, with_grads
from test_cuda_optimizers import NUMBERS, no_synchronisation
from torch import Tensor, nn

from emerging_optimizers import AdamW, clip_coefficient

pytestmark = [
    pytest.mark.builtin_rules("test_cuda_user_rules.py has those of users' rules"),
    pytest.mark.on_devices("tests-cuda"),
    pytest.mark.cuda,
]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@every_optimizer
def test_no_synchronisation(setup: Setup) -> None:
    """A step on a device clips as on the CPU, and the host waits for nothing."""
    there = {name: torch.tensor(number, device="cuda") for name, number in NUMBERS.items()}
    scaled = {name: there[name] for name in ("grad_scale", "found_inf")}
    for numbers, multipliers in (
        ({}, (None, 0.5, there["grad_multiplier"])),
        (scaled, (None, 0.5, there["grad_multiplier"], there["grad_multiplier"].view(1))),
    ):
        for multiplier in multipliers:
            optimizers = []
            for device in ("cuda", "cpu"):
                with torch.device(device):
                    optimizer = setup.make(with_grads(make_params()), lr=0.1, capturable=True)
                optimizer.step(max_norm=1.0)  # creates the states
                vars(optimizer).update({k: v.to(device) for k, v in numbers.items()})
                optimizers.append(optimizer)
            optimizer, other = optimizers
            params = optimizer.param_groups[0]["params"]
            with no_synchronisation():
                optimizer.step(grad_multiplier=multiplier, max_norm=0.25)
                norm, coefficient = clip_coefficient(params, 0.25)
            if isinstance(multiplier, Tensor):
                multiplier = multiplier.cpu()
            other.step(grad_multiplier=multiplier, max_norm=0.25)
            assert norm.is_cuda
            assert coefficient.is_cuda
            assert optimizer.grad_norm is not None
            assert optimizer.grad_norm.is_cuda
            torch.testing.assert_close(optimizer.grad_norm.cpu(), other.grad_norm)
            got = [tensor.cpu() for tensor in contents(optimizer)]
            torch.testing.assert_close(got, contents(other))


@pytest.mark.parametrize("order", ORDERS)
def test_several_devices(order: float) -> None:
    wanted = clip_coefficient(with_grads(make_params(SHAPES)), 1.0, order)
    params = with_grads(make_params(SHAPES))
    for i, param in enumerate(params):
        if i % 2 == 0:
            assert param.grad is not None
            params[i] = nn.Parameter(param.detach().cuda())
            params[i].grad = param.grad.cuda()
    for tensors, device in ((params, "cuda"), (params[1:] + params[:1], "cpu")):
        found = clip_coefficient(tensors, 1.0, order)
        for got, expected in zip(found, wanted, strict=True):
            assert got.device.type == device
            assert_near(got.cpu(), expected.item())


@pytest.mark.real
def test_capture() -> None:
    """A captured step clips the gradients of each replay."""
    with torch.device("cuda"):
        params, others = (with_grads(make_params()) for _ in range(2))
    optimizer, other = (AdamW(p, lr=0.1, capturable=True) for p in (params, others))
    for _ in range(2):
        other.step(max_norm=0.5)
    optimizer.step(max_norm=0.5)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step(max_norm=0.5)
    for factor in (1.0, 4.0, 0.01):
        for tensors in (params, others):
            torch._foreach_mul_([p.grad for p in tensors], factor)
        graph.replay()
        if factor != 1.0:
            other.step(max_norm=0.5)
        assert_same([optimizer.grad_norm], [other.grad_norm])
        assert_same(contents(optimizer), contents(other))
