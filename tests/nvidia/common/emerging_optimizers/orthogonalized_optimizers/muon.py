from torch import Tensor
from torch.optim.optimizer import ParamsT

from emerging_optimizers import registry, triton_kernels
from emerging_optimizers.mixin import WeightDecayT
from emerging_optimizers.orthogonalized_optimizers import muon_utils
from emerging_optimizers.orthogonalized_optimizers.muon_utils import NSCoeffT
from emerging_optimizers.orthogonalized_optimizers.orthogonalized_optimizer import (
    OrthogonalizedOptimizer,
)

assert not triton_kernels.HAS_TRITON_340


@registry.register_optimizer("muon")
class Muon(OrthogonalizedOptimizer):
    def __init__(
        self,
        params: ParamsT,
        lr: float = 3e-4,
        momentum_beta: float = 0.95,
        weight_decay: float = 0.01,
        *,
        use_nesterov: bool = False,
        weight_decay_method: WeightDecayT = "decoupled",
        coefficient_type: NSCoeffT = "quintic",
        num_ns_steps: int = 5,
        scale_mode: str = "spectral",
    ) -> None:
        def orthogonalize(grad: Tensor) -> Tensor:
            scale = get_muon_scale_factor(grad.size(-2), grad.size(-1), mode=scale_mode)
            return scale * muon_utils.newton_schulz(grad, num_ns_steps, coefficient_type)

        super().__init__(
            params,
            lr,
            momentum_beta,
            weight_decay,
            use_nesterov=use_nesterov,
            weight_decay_method=weight_decay_method,
            fp32_matmul_prec="medium",
            scaled_orthogonalize_fn=orthogonalize,
        )


def get_muon_scale_factor(size_out: int, size_in: int, mode: str = "spectral") -> float:
    scale = {"spectral": max(size_out, size_in), "unit_rms_norm": size_out / size_in}
    return float(scale[mode] ** 0.5)
