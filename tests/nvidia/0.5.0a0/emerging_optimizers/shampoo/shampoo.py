from emerging_optimizers import registry
from emerging_optimizers.scalar_optimizers.base import TwoMomentsOptimizer
from emerging_optimizers.scalar_optimizers.update_functions import calculate_adam_update
from emerging_optimizers.soap import SOAP
from emerging_optimizers.weight_update_hooks import WeightUpdateHook

assert callable(calculate_adam_update)
assert isinstance(TwoMomentsOptimizer, type)


@registry.register_optimizer("shampoo")
class Shampoo(SOAP):
    hook: WeightUpdateHook | None = None
