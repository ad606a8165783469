"""Rules in Python keep the promise of bits: each operation rounded once, in the order written."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rounded_once import evaluate_all

import emerging_optimizers as eo
from emerging_optimizers._native import native

pytestmark = [
    pytest.mark.skipif(native is None, reason="there are no native kernels"),
    pytest.mark.usefixtures("_no_other_device"),
]


# ---- rules that use every operation --------------------------------------------------------------


@eo.rule
def bits_adopt(grad, exp_avg, exp_avg_sq, *, betas=(0.9, 0.9999), eps=1e-6, step):
    beta1, beta2 = betas
    if step == 1:
        return None, exp_avg, grad * grad
    clip = (step - 1) ** 0.25
    normed = (grad / exp_avg_sq.sqrt().clamp(min=eps)).clamp(-clip, clip)
    exp_avg = exp_avg + (1 - beta1) * (normed - exp_avg)
    return exp_avg, exp_avg, beta2 * exp_avg_sq + (1 - beta2) * grad * grad


@eo.rule
def bits_radam(grad, exp_avg, exp_avg_sq, *, betas=(0.9, 0.999), eps=1e-8, step):
    beta1, beta2 = betas
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    c1, c2 = 1 - beta1**step, 1 - beta2**step
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * step * beta2**step / c2
    m = exp_avg / c1
    if rho > 5:
        top, bottom = (rho - 4) * (rho - 2) * rho_inf, (rho_inf - 4) * (rho_inf - 2) * rho
        return m * (math.sqrt(c2) / (exp_avg_sq.sqrt() + eps)) * math.sqrt(top / bottom)
    return m


@eo.rule
def bits_all(grad, a, b, *, p=0.3, q: float | None = None, n: int = 3, step):
    if q is not None:
        grad = grad * max(q, 1 / step)
    a = torch.where((grad > 0) & ~(a < p) | (b == 0), a + grad, a.lerp(b, p)).abs()
    b = torch.addcdiv(b, grad, a + 1.5, value=p).clamp(-2, 2).maximum(-a) * (grad > b)
    b = b - torch.copysign(a.rsqrt(), grad).minimum(b.square()) * (step % n == 0)
    update = a.sign() * (a**3 - b**1.5) + (a + 0.5) ** -2 + torch.sqrt(a) * math.floor(p * step)
    logical = torch.logical_xor(a > b, b >= grad).to(grad.dtype) - (a != b).float() + (b <= a) * p
    update = -update.masked_fill(torch.isnan(grad), 0.25) / (p + 1) + logical
    return update - (1 - p ** (step + 1)) * torch.reciprocal(a + 1), a, b


@eo.rule
def bits_scalars(
    grad,
    exp_avg,
    *,
    beta: eo.Beta = 0.9,
    limit: float = 0.2,
    product: eo.ScalarState = 1.0,
    total: eo.ScalarState = -0.5,
    step,
):
    weight = step**0.5 if product > limit else math.cos(total)
    total = total + weight
    product = max(product * beta * (1 - 0.5 * 0.9**step), 0.01) if step % 5 else 1.0
    exp_avg.lerp_(grad, weight / total if total > 1 else 1 - beta)
    if total < 0.5:
        return None, exp_avg, product, total
    return exp_avg / (1 - product / 2) * float(product > limit), exp_avg, product, total


SETTINGS: list[tuple[Any, dict[str, Any]]] = [
    (bits_adopt, {"betas": (0.9, 0.9999), "eps": 1e-6}),
    (bits_adopt, {"betas": (0.0, 0.5), "eps": 1e-3}),
    (bits_radam, {"betas": (0.9, 0.999), "eps": 1e-8}),
    (bits_radam, {"betas": (0.3, 0.99), "eps": 0.0}),
    (bits_all, {"p": 0.3, "q": None, "n": 3}),
    (bits_all, {"p": 0.7, "q": 0.4, "n": 2}),
    (bits_scalars, {"beta": 0.9, "limit": 0.2}),
    (bits_scalars, {"beta": 0.3, "limit": 2.0}),
]
IDS = [f"{rule.name}-{i % 2}" for i, (rule, _) in enumerate(SETTINGS)]


def gradients(step: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Gradients of all magnitudes, with zeros of both signs, infinities and NaNs."""
    generator = torch.Generator().manual_seed(step)
    grad = torch.randn(numel, generator=generator, dtype=torch.float64)
    grad *= 10.0 ** torch.randint(-4, 3, (numel,), generator=generator)
    grad[::97] = 0.0
    grad[1::97] = -0.0
    grad[2::389] = math.inf
    grad[3::389] = math.nan
    return grad.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("rule", "values"), SETTINGS, ids=IDS)
def test_each_operation_is_rounded_once(
    rule: Any, values: dict[str, Any], dtype: torch.dtype
) -> None:
    numel = 3001
    states = [torch.zeros(numel, dtype=dtype) for _ in rule.states]
    expected = [state.numpy().copy() for state in states]
    scalars = {name: torch.tensor(first) for name, first in rule.scalar_states.items()}
    for step in range(1, 13):
        grad = gradients(step, numel, dtype)
        before = {name: scalar.item() for name, scalar in scalars.items()}
        update = rule(grad, *states, **values, step=step, **scalars)
        with np.errstate(all="ignore"):
            wanted, expected, after = evaluate_all(
                rule._trace, grad.numpy(), expected, {**values, "step": step, **before}
            )
        assert {name: scalar.item() for name, scalar in scalars.items()} == after
        if wanted is None:
            wanted = np.zeros(numel, update.numpy().dtype)
        for name, got, want in zip(
            ("update", *rule.states), (update, *states), (wanted, *expected), strict=True
        ):
            # NaNs equal each other, and zeros have their signs.
            same = (got.numpy() == want) & (np.signbit(got.numpy()) == np.signbit(want))
            same |= np.isnan(got.numpy()) & np.isnan(want)
            assert same.all(), f"{name} at step {step}: {(~same).sum()} elements differ"
        expected = [np.array(state) for state in expected]


_WORKER = """
import hashlib, sys
import torch
sys.path.insert(0, {tests!r})
import test_rule_bits as bits
torch.set_num_threads(int(sys.argv[1]))
digest = hashlib.sha256()
for dtypes in (torch.float32, torch.float64, torch.bfloat16):
    for rule, values in bits.SETTINGS:
        grads = [bits.gradients(i, n, dtypes) for i, n in enumerate((1, 7, 129, 70_001))]
        states = [[torch.zeros(g.shape, dtype=g.dtype) for g in grads] for _ in rule.states]
        scalars = {{name: torch.tensor(first) for name, first in rule.scalar_states.items()}}
        for step in range(1, 7):
            updates = rule(grads, *states, **values, step=step, **scalars)
        for tensor in (t for tensors in (updates, *states) for t in tensors):
            tensor = torch.where(tensor.isnan(), torch.full_like(tensor, float("nan")), tensor)
            digest.update(tensor.view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def _digest(isa: str, threads: int) -> str:
    tests = str(Path(__file__).parent)
    environment = os.environ | {"EMERGING_OPTIMIZERS_ISA": isa}
    command = [sys.executable, "-c", _WORKER.format(tests=tests), str(threads)]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment
    ).stdout


@pytest.mark.once
def test_instruction_sets_and_threads_give_the_same_bits() -> None:
    assert native is not None
    digests = {(isa, 1): _digest(isa, 1) for isa in native.supported_isas()}
    digests[native.active_isa(), 2] = _digest(native.active_isa(), 2)
    assert len(set(digests.values())) == 1, digests


def test_bias_correction_does_not_cancel() -> None:
    @eo.rule
    def corrected(grad, *, beta=0.9, step):
        return grad / (1 - beta**step)

    beta = 1 - 2.0**-40
    update = corrected(torch.ones(1, dtype=torch.float64), beta=beta, step=1)
    assert update.item() == 2.0**40
