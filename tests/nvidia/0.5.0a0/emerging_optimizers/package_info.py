__shortversion__ = "0.5.0"
__version__ = "0.5.0a0"
__package_name__ = "emerging_optimizers"
