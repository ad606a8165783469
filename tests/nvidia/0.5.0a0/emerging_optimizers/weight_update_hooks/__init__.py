from .base import WeightUpdateHook

__all__ = ["WeightUpdateHook"]
