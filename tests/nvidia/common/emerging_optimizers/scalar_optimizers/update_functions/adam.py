from torch import Tensor


def calculate_adam_update(
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    correct_bias: bool,
    nesterov: bool,
    step: int,
) -> Tensor:
    assert correct_bias
    assert not nesterov
    exp_avg.lerp_(grad, 1 - betas[0])
    exp_avg_sq.lerp_(grad.square(), 1 - betas[1])
    exp_avg_hat, exp_avg_sq_hat = (
        exp_avg / (1 - betas[0] ** step),
        exp_avg_sq / (1 - betas[1] ** step),
    )
    return exp_avg_hat / (exp_avg_sq_hat.sqrt() + eps)
