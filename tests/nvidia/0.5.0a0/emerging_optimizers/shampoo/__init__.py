from emerging_optimizers.shampoo.shampoo import Shampoo

__all__ = ["Shampoo"]
