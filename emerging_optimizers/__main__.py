"""``python -m emerging_optimizers`` prints what is installed and in use."""

from ._config import show_config

show_config()
