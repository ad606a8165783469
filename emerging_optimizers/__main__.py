"""``python -m emerging_optimizers`` prints what this installation is made of."""

from . import show_config

show_config()
