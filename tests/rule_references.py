"""The rules of the gallery (examples/rules) in float64, from their papers, and a table of them.

Each function is written from the source that the rule's file cites, on NumPy arrays, and shares
nothing with the rule. It returns the update and the new states; the update is None in a step that
leaves the parameter alone. Its keyword arguments have the defaults of the source.
"""

import importlib
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from float64_rules import Array, one_minus_power

GALLERY = Path(__file__).parent.parent / "examples" / "rules"

Result = tuple[Array | None, tuple[Array, ...]]
Betas = tuple[float, float]


def _average(beta: float, old: Array, new: Array) -> Array:
    return beta * old + (1 - beta) * new


# ---- the rules -----------------------------------------------------------------------------------


def acclip(
    g: Array,
    m: Array,
    tau: Array,
    *,
    betas: Betas = (0.9, 0.99),
    eps: float = 1e-5,
    threshold: float | None = None,
) -> Result:
    m = _average(betas[0], m, g)
    tau = _average(betas[1], tau, np.abs(g))
    clip = tau if threshold is None else np.full_like(tau, threshold)
    return np.minimum(clip / (np.abs(m) + eps), 1.0) * m, (m, tau)


def adabelief(
    g: Array,
    m: Array,
    s: Array,
    *,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-16,
    step: int,
) -> Result:
    m = _average(betas[0], m, g)
    s = _average(betas[1], s, (g - m) ** 2) + eps
    m_hat = m / one_minus_power(betas[0], step)
    s_hat = s / one_minus_power(betas[1], step)
    return m_hat / (np.sqrt(s_hat) + eps), (m, s)


def adabound(
    g: Array,
    m: Array,
    v: Array,
    *,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-8,
    final_scale: float = 100.0,
    gamma: float = 1e-3,
    step: int,
) -> Result:
    m = _average(betas[0], m, g)
    v = _average(betas[1], v, g**2)
    low = final_scale * (1 - 1 / (gamma * step + 1))
    high = final_scale * (1 + 1 / (gamma * step))
    corrected = math.sqrt(one_minus_power(betas[1], step)) / one_minus_power(betas[0], step)
    eta = np.clip(corrected / (np.sqrt(v) + eps), low, high)
    return eta * m, (m, v)


def adadelta(
    g: Array, mean_g2: Array, mean_dx2: Array, *, rho: float = 0.9, eps: float = 1e-6
) -> Result:
    mean_g2 = _average(rho, mean_g2, g**2)
    delta = np.sqrt(mean_dx2 + eps) / np.sqrt(mean_g2 + eps) * g
    mean_dx2 = _average(rho, mean_dx2, delta**2)
    return delta, (mean_g2, mean_dx2)


def adagrad(
    g: Array, total: Array, *, lr_decay: float = 0.0, eps: float = 1e-10, step: int
) -> Result:
    total = total + g**2
    return g / (np.sqrt(total) + eps) / (1 + (step - 1) * lr_decay), (total,)


def adamax(
    g: Array,
    m: Array,
    u: Array,
    *,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-8,
    step: int,
) -> Result:
    m = _average(betas[0], m, g)
    u = np.maximum(betas[1] * u, np.abs(g) + eps)
    return m / one_minus_power(betas[0], step) / u, (m, u)


def adan(
    g: Array,
    m: Array,
    v: Array,
    n: Array,
    previous: Array,
    *,
    betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
    eps: float = 1e-8,
    step: int,
) -> Result:
    b1, b2, b3 = betas
    difference = g - previous if step > 1 else np.zeros_like(g)
    m = _average(b1, m, g)
    v = _average(b2, v, difference)
    n = _average(b3, n, (g + b2 * difference) ** 2)
    c1, c2, c3 = (one_minus_power(beta, step) for beta in betas)
    return (m / c1 + b2 * v / c2) / (np.sqrt(n / c3) + eps), (m, v, n, g.copy())


def adopt(
    g: Array,
    m: Array,
    v: Array,
    *,
    betas: Betas = (0.9, 0.9999),
    eps: float = 1e-6,
    step: int,
) -> Result:
    if step == 1:
        return None, (m.copy(), g**2)
    limit = (step - 1) ** (1 / 4)
    m = _average(betas[0], m, np.clip(g / np.maximum(np.sqrt(v), eps), -limit, limit))
    return m, (m, _average(betas[1], v, g**2))


def _adam(g: Array, m: Array, v: Array, betas: Betas, eps: float, step: int) -> Sequence[Array]:
    m = _average(betas[0], m, g)
    v = _average(betas[1], v, g**2)
    m_hat = m / one_minus_power(betas[0], step)
    v_hat = v / one_minus_power(betas[1], step)
    return m_hat / (np.sqrt(v_hat) + eps), m, v


def cautious_adam(
    g: Array,
    m: Array,
    v: Array,
    *,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-8,
    step: int,
) -> Result:
    u, m, v = _adam(g, m, v, betas, eps, step)
    return u * (u * g > 0), (m, v)


def grams(
    g: Array,
    m: Array,
    v: Array,
    *,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-6,
    step: int,
) -> Result:
    u, m, v = _adam(g, m, v, betas, eps, step)
    return np.sign(g) * np.abs(u), (m, v)


def nadam(
    g: Array,
    m: Array,
    v: Array,
    *,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-8,
    momentum_decay: float = 4e-3,
    step: int,
    mu_product: float,
) -> Result:
    mu, next_mu = (betas[0] * (1 - 0.96 ** (t * momentum_decay) / 2) for t in (step, step + 1))
    m = _average(betas[0], m, g)
    v = _average(betas[1], v, g**2)
    product = mu_product * mu
    m_hat = next_mu * m / (1 - product * next_mu) + (1 - mu) * g / (1 - product)
    return m_hat / (np.sqrt(v / one_minus_power(betas[1], step)) + eps), (m, v)


def _next_mu_product(
    mu_product: float,
    *,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-8,
    momentum_decay: float = 4e-3,
    step: int,
) -> float:
    return mu_product * betas[0] * (1 - 0.96 ** (step * momentum_decay) / 2)


def nesterov_sgd(g: Array, b: Array, *, momentum: float = 0.9, nesterov: bool = True) -> Result:
    b = momentum * b + g
    return g + momentum * b if nesterov else b.copy(), (b,)


def radam(
    g: Array,
    m: Array,
    v: Array,
    *,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-8,
    step: int,
) -> Result:
    m = _average(betas[0], m, g)
    v = _average(betas[1], v, g**2)
    m_hat = m / one_minus_power(betas[0], step)
    # Exactly: small differences of large numbers.
    b2 = Fraction(betas[1])
    rho_inf = 2 / (1 - b2) - 1
    rho = rho_inf - 2 * step * b2**step / (1 - b2**step)
    if rho <= 5:
        return m_hat, (m, v)
    r = math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
    return m_hat * r * math.sqrt(1 - b2**step) / (np.sqrt(v) + eps), (m, v)


def rprop(
    g: Array,
    previous: Array,
    delta: Array,
    *,
    etas: tuple[float, float] = (0.5, 1.2),
    limits: tuple[float, float] = (1e-4, 5e3),
    step: int,
) -> Result:
    if step == 1:
        delta = np.ones_like(delta)
    agreement = np.sign(g) * np.sign(previous)
    factor = np.where(agreement > 0, etas[1], np.where(agreement < 0, etas[0], 1.0))
    delta = np.clip(delta * factor, *limits)
    g = np.where(agreement < 0, 0.0, g)
    return np.sign(g) * delta, (g, delta)


def sign_sgd(g: Array) -> Result:
    return np.sign(g), ()


def tiger(g: Array, m: Array, *, beta: float = 0.965) -> Result:
    m = _average(beta, m, g)
    return np.sign(m), (m,)


def yogi(g: Array, m: Array, v: Array, *, betas: Betas = (0.9, 0.999), eps: float = 1e-3) -> Result:
    m = _average(betas[0], m, g)
    v = v - (1 - betas[1]) * np.sign(v - g**2) * g**2
    return m / (np.sqrt(v) + eps), (m, v)


# ---- the table -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class GalleryRule:
    """A rule of the gallery, its class, and what both should compute.

    Args:
        name: The name of the rule, its file and its reference.
        cls: The name of the optimizer class.
        reference: The rule in float64: ``reference(grad, *states, **case)``.
        states: Names of the states, in order.
        cases: Hyperparameters that differ from the defaults. The first case is the defaults.
        tolerance: The relative error in float64, larger where a number of the step cancels.
        scalar_states: By name, a scalar state's first value, and what it becomes in a step:
            ``next(value, **case)``. The reference takes its value before the step.
    """

    name: str
    cls: str
    reference: Callable[..., Result]
    states: tuple[str, ...]
    cases: Mapping[str, dict[str, Any]]
    tolerance: float
    scalar_states: Mapping[str, tuple[float, Callable[..., float]]]

    @property
    def module(self) -> Any:
        if str(GALLERY.parent) not in sys.path:
            sys.path.insert(0, str(GALLERY.parent))
        return importlib.import_module(f"rules.{self.name}")

    @property
    def rule(self) -> Any:
        """What ``eo.rule`` made of the function."""
        return getattr(self.module, self.name)

    @property
    def optimizer(self) -> Any:
        return getattr(self.module, self.cls)

    def arguments(self, case: str, step: int) -> dict[str, Any]:
        """The keyword arguments of a call."""
        has_step = "step" in inspect.signature(self.reference).parameters
        return self.cases[case] | ({"step": step} if has_step else {})

    def first_scalars(self) -> dict[str, float]:
        return {name: first for name, (first, _) in self.scalar_states.items()}

    def next_scalars(
        self, scalars: Mapping[str, float], arguments: Mapping[str, Any]
    ) -> dict[str, float]:
        """The scalar states after a step, in float32."""
        return {
            name: float(np.float32(advance(scalars[name], **arguments)))
            for name, (_, advance) in self.scalar_states.items()
        }

    def __str__(self) -> str:
        return self.name


def _row(
    reference: Callable[..., Result],
    cls: str,
    states: str,
    tolerance: float = 1e-12,
    scalar_states: Mapping[str, tuple[float, Callable[..., float]]] = MappingProxyType({}),
    **cases: dict[str, Any],
) -> GalleryRule:
    name, names = reference.__name__, tuple(states.split())
    cases = {"defaults": {}} | cases
    return GalleryRule(name, cls, reference, names, cases, tolerance, scalar_states)


_OTHER = {"betas": (0.8, 0.95), "eps": 1e-3}

_TABLE = [
    _row(
        acclip,
        "ACClip",
        "exp_avg exp_avg_abs",
        other=_OTHER,
        # Some elements are larger.
        fixed={"threshold": 0.1},
        zero={"threshold": 0.0},
    ),
    _row(adabelief, "AdaBelief", "exp_avg exp_avg_var", other=_OTHER),
    _row(
        adabound,
        "AdaBound",
        "exp_avg exp_avg_sq",
        other=_OTHER,
        # Both bounds are reached.
        narrow={"final_scale": 1.5, "gamma": 0.5},
    ),
    _row(adadelta, "Adadelta", "square_avg acc_delta", other={"rho": 0.5, "eps": 1e-3}),
    _row(adagrad, "Adagrad", "sum_sq", other={"lr_decay": 0.25, "eps": 1e-3}),
    _row(adamax, "Adamax", "exp_avg exp_inf", other=_OTHER),
    _row(
        adan,
        "Adan",
        "exp_avg exp_avg_diff exp_avg_sq previous_grad",
        other={"betas": (0.3, 0.9, 0.95), "eps": 1e-3},
    ),
    _row(adopt, "Adopt", "exp_avg exp_avg_sq", other=_OTHER | {"eps": 0.5}),
    _row(cautious_adam, "CautiousAdam", "exp_avg exp_avg_sq", other=_OTHER),
    _row(grams, "Grams", "exp_avg exp_avg_sq", other=_OTHER),
    _row(
        nadam,
        "NAdam",
        "exp_avg exp_avg_sq",
        scalar_states={"mu_product": (1.0, _next_mu_product)},
        other=_OTHER,
        # The momentum changes a lot in a few steps, and from step 1 on.
        fast={"momentum_decay": 10.0},
        constant={"momentum_decay": 0.0, "betas": (0.5, 0.9)},
    ),
    _row(
        nesterov_sgd,
        "NesterovSGD",
        "buffer",
        other={"momentum": 0.5},
        plain={"nesterov": False},
        none={"momentum": 0.0},
    ),
    _row(
        radam,
        "RAdam",
        "exp_avg exp_avg_sq",
        # `rho` is a difference of numbers that are a thousand times larger.
        1e-9,
        other=_OTHER,
        never={"betas": (0.9, 0.5)},
    ),
    _row(
        rprop,
        "Rprop",
        "previous_grad step_size",
        other={"etas": (0.25, 1.5)},
        # Both are reached.
        narrow={"limits": (0.3, 1.3)},
    ),
    _row(sign_sgd, "SignSGD", ""),
    _row(tiger, "Tiger", "exp_avg", other={"beta": 0.5}),
    _row(yogi, "Yogi", "exp_avg exp_avg_sq", other=_OTHER),
]

GALLERY_RULES: dict[str, GalleryRule] = {row.name: row for row in _TABLE}
