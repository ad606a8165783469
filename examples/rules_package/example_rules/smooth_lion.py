"""Lion with a smooth sign: a rule in C++."""

from pathlib import Path

import emerging_optimizers as eo

smooth_lion = eo.load_rule(
    Path(__file__).with_name("smooth_lion.h"), defaults={"betas": (0.9, 0.99)}
)


class SmoothLion(eo.ScalarOptimizer, rule=smooth_lion, lr=1e-4, temperature=1e-3):
    """Lion with a smooth sign."""
