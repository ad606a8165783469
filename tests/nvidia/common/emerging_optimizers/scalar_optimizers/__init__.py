from emerging_optimizers.scalar_optimizers.lion import Lion

__all__ = ["Lion"]
