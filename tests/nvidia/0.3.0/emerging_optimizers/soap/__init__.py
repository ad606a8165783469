from emerging_optimizers.soap.soap import SOAP

__all__ = ["SOAP"]
