"""Two optimizers: one with a rule in Python, one with a rule in C++."""

from .heavy_ball import HeavyBall, heavy_ball
from .smooth_lion import SmoothLion, smooth_lion

__all__ = ["HeavyBall", "SmoothLion", "heavy_ball", "smooth_lion"]
