__shortversion__ = "0.3.0"
__version__ = "0.3.0"
__package_name__ = "emerging_optimizers"
