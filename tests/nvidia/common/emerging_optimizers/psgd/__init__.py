from emerging_optimizers.psgd.psgd import PSGDPro

__all__ = ["PSGDPro"]
