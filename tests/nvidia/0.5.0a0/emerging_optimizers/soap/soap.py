from emerging_optimizers import legacy_soap, registry


@registry.register_optimizer("soap")
class SOAP(legacy_soap.SOAP):
    pass
