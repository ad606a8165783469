from emerging_optimizers.package_info import __package_name__, __shortversion__, __version__

__all__ = ["__package_name__", "__shortversion__", "__version__"]
