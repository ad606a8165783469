"""The optimizers, under the names that Megatron-Core uses."""

from typing import ClassVar

import torch
from torch.optim.optimizer import ParamsT

from .. import scalar_optimizers as rules
from .._docstrings import fill_docstring
from .._hyperparameters import read_flag
from .._optimizer import MasterWeights, StateDtypeFilter
from .._values import HYPERPARAMETER, read
from .mixin import MegatronMixin

__all__ = [
    "AdEMAMix",
    "FusedAdam",
    "LaProp",
    "Lion",
    "MAdam",
    "RMSprop",
    "Signum",
    "SimplifiedAdEMAMix",
]


@fill_docstring
class FusedAdam(MegatronMixin, rules.Adam):
    """Adam with the arguments of TransformerEngine's ``FusedAdam``; on any device.

    Differences from TransformerEngine's: with ``torch.uint8``, states are 8-bit codes of which 32
    share a scale, where TransformerEngine's have one scale a tensor. Float16 averages are stored
    unscaled. Each parameter's state has a counter ``step``, which TransformerEngine's
    ``load_state_dict`` does not accept: remove it from a checkpoint first. TransformerEngine's
    checkpoints load here as they are.

    Args:
        params: {params}
        lr: Learning rate.
        betas: Decay rates of the averages of the gradient and of its square, each in [0, 1).
        eps: {eps}
        weight_decay: {weight_decay}
        amsgrad: Divide by the largest average of squares so far, the state ``max_exp_avg_sq``.
            TransformerEngine's rejects it.
        bias_correction: {correct_bias}
        adam_w_mode: Decoupled weight decay. False: weight decay is added to the gradient.
        capturable: Keep step counters, and learning rates as tensors, on the parameters' devices,
            so that CUDA graphs can capture the step.
        master_weights: Keep master weights; see :class:`MegatronMixin`, also for the following.
        master_weight_dtype: The dtype of masters, float32 or float16.
        exp_avg_dtype: The dtype of ``exp_avg``.
        exp_avg_sq_dtype: The dtype of ``exp_avg_sq``.
        use_decoupled_grad: Read gradients from ``param.decoupled_grad``.
        store_param_remainders: Store only the low 16 bits of each bfloat16 parameter's master.
        set_grad_none: Deprecated.
        state_dtype_filter: Returns whether a parameter's states may be 8-bit codes.

    Raises:
        ValueError: A dtype that is not supported, or a hyperparameter out of range.

    Example:
        >>> import torch
        >>> from emerging_optimizers.megatron import FusedAdam
        >>> weight = torch.tensor([1.0, -2.0], dtype=torch.bfloat16)
        >>> optimizer = FusedAdam([weight], lr=0.1, master_weights=True, use_decoupled_grad=True)
        >>> weight.decoupled_grad = torch.tensor([2.0, -4.0])  # float32
        >>> optimizer.step()
        >>> weight
        tensor([ 0.8984, -1.8984], dtype=torch.bfloat16)
        >>> optimizer.get_unscaled_state(weight, "master_param")
        tensor([ 0.9000, -1.9000])
        >>> optimizer.param_groups[0]["step"]
        1

    Reference:
        Kingma and Ba, "Adam: A Method for Stochastic Optimization",
        https://arxiv.org/abs/1412.6980; Loshchilov and Hutter, "Decoupled Weight Decay
        Regularization", https://arxiv.org/abs/1711.05101.
    """

    _renamed: ClassVar = {**rules.Adam._renamed, "correct_bias": "bias_correction"}
    _option_defaults: ClassVar = {**MegatronMixin._option_defaults, "bias_correction": True}

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        capturable: bool = False,
        master_weights: MasterWeights = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
        set_grad_none: bool | None = None,
        state_dtype_filter: StateDtypeFilter = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            bias_correction=bias_correction,
            weight_decay_method="decoupled" if read_flag("adam_w_mode", adam_w_mode) else "l2",
            capturable=capturable,
            master_weights=master_weights,
            master_weight_dtype=master_weight_dtype,
            exp_avg_dtype=exp_avg_dtype,
            exp_avg_sq_dtype=exp_avg_sq_dtype,
            use_decoupled_grad=use_decoupled_grad,
            store_param_remainders=store_param_remainders,
            set_grad_none=set_grad_none,
            state_dtype_filter=state_dtype_filter,
        )
        # Groups have it as `bias_correction`.
        for group in (self.defaults, *self.param_groups):
            del group["correct_bias"]
        for group in self.param_groups:
            if group["capturable"] and group["params"]:
                device = group["params"][0].device
                group["lr"] = torch.full(
                    (), read(group["lr"], HYPERPARAMETER), dtype=torch.float32, device=device
                )


class AdEMAMix(MegatronMixin, rules.AdEMAMix):
    """:class:`~emerging_optimizers.scalar_optimizers.AdEMAMix` for Megatron-Core.

    The fast average is the state ``exp_avg``, which Megatron-Core expects. For the arguments that
    all classes share, see :class:`MegatronMixin`.

    Example:
        >>> import torch
        >>> from emerging_optimizers.megatron import AdEMAMix
        >>> weight = torch.tensor([1.0, -2.0])
        >>> optimizer = AdEMAMix([weight], lr=0.1, use_decoupled_grad=True)
        >>> weight.decoupled_grad = 2 * weight
        >>> optimizer.step()
        >>> sorted(optimizer.state[weight])
        ['exp_avg', 'exp_avg_slow', 'exp_avg_sq', 'step']
    """

    _state_keys: ClassVar = {"exp_avg_fast": "exp_avg"}


class LaProp(MegatronMixin, rules.LaProp):
    """:class:`~emerging_optimizers.scalar_optimizers.LaProp` with :class:`MegatronMixin`."""


class Lion(MegatronMixin, rules.Lion):
    """:class:`~emerging_optimizers.scalar_optimizers.Lion` with :class:`MegatronMixin`."""


class MAdam(MegatronMixin, rules.MAdam):
    """:class:`~emerging_optimizers.scalar_optimizers.MAdam` for Megatron-Core.

    The average of scaled squares is the state ``exp_avg_sq``, which Megatron-Core expects. For the
    arguments that all classes share, see :class:`MegatronMixin`.
    """

    _state_keys: ClassVar = {"exp_avg_sq_scaled": "exp_avg_sq"}


class RMSprop(MegatronMixin, rules.RMSprop):
    """:class:`~emerging_optimizers.scalar_optimizers.RMSprop` for Megatron-Core.

    The average of squares is the state ``exp_avg_sq``, and the momentum ``exp_avg``, which
    Megatron-Core expects. For the arguments that all classes share, see :class:`MegatronMixin`.
    """

    _state_keys: ClassVar = {"momentum_buffer": "exp_avg"}


class Signum(MegatronMixin, rules.Signum):
    """:class:`~emerging_optimizers.scalar_optimizers.Signum` with :class:`MegatronMixin`."""


class SimplifiedAdEMAMix(MegatronMixin, rules.SimplifiedAdEMAMix):
    """``scalar_optimizers.SimplifiedAdEMAMix`` with :class:`MegatronMixin`."""


def _derive(cls: type[rules.ScalarOptimizer]) -> type:
    """Return the class for Megatron-Core of a rule that needs only the mix-in."""
    text = f":class:`~{rules.__name__}.{cls.__name__}` with :class:`MegatronMixin`."
    return type(cls.__name__, (MegatronMixin, cls), {"__module__": __name__, "__doc__": text})


# Rules without a class above. Those are there for type checkers, or because they differ.
_named = {cls._rule for cls in MegatronMixin.__subclasses__()}
for _name in rules.__all__:
    _cls = getattr(rules, _name)
    if hasattr(_cls, "_rule") and _cls._rule not in _named:
        globals()[_name] = _derive(_cls)
        __all__.append(_name)
