from .syrk import HAS_TRITON_340, tsyrk_ex

__all__ = ["HAS_TRITON_340", "tsyrk_ex"]
