"""LaProp: Adam with the gradient normalised before it is averaged."""

import logging
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from .._docstrings import fill_docstring
from .._dtensor import is_dtensor
from .._hyperparameters import Beta, NonNegative, Step
from .._optimizer import (
    ScalarOptimizer,
    SharedOptions,
    StepArguments,
    frobenius_norms,
    restore_norms,
)
from .._rule import GroupRule, Rule
from .._schedules import bias_correction
from .._states import has_master
from .._values import HYPERPARAMETER, read

_logger = logging.getLogger(__name__)


def _laprop(
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    correct_bias: bool,
    betas: tuple[Beta, Beta],
    step: Step,
    eps: NonNegative,
) -> Tensor:
    beta1, beta2 = betas
    c1 = bias_correction(beta1, step, correct_bias)
    c2 = bias_correction(beta2, step, correct_bias)
    exp_avg_sq.mul_(beta2).addcmul_(grad * (1 - beta2), grad)
    normalised = grad / exp_avg_sq.sqrt().div_(c2**0.5).add_(eps)
    exp_avg.mul_(beta1).add_(normalised, alpha=1 - beta1)
    return exp_avg / c1


_RULE = Rule("laprop", _laprop)
_call = _RULE.entry_point()


@fill_docstring
def calculate_laprop_update(
    grad: Tensor | Sequence[Tensor],
    exp_avg: Tensor | Sequence[Tensor],
    exp_avg_sq: Tensor | Sequence[Tensor],
    correct_bias: bool,
    betas: Sequence[float],
    step: int | float | Tensor,
    eps: float,
    *,
    out: Tensor | Sequence[Tensor] | None = None,
) -> Tensor | list[Tensor]:
    r"""Update LaProp's states in place and return the update.

    .. math::
        v &\leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        g' &= g \,/\, \bigl(\sqrt{v / (1 - \beta_2^t)} + \epsilon\bigr) \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) g' \\
        u &= m / (1 - \beta_1^t)

    Without bias correction, both divisors :math:`1 - \beta^t` are 1.

    Args:
        grad: {grad}
        exp_avg: Average of the normalised gradient.
            {state}
        exp_avg_sq: Average of the squared gradient.
            {state}
        correct_bias: {correct_bias}
        betas: Decay rates of the two averages, each in [0, 1).
        step: {step}
        eps: {eps}
        out: {out}

    Returns:
        {returns}

    Raises:
        {raises}

    Example:
        >>> import torch
        >>> from emerging_optimizers.scalar_optimizers import calculate_laprop_update
        >>> grad = torch.tensor([1.0, -2.0, 0.0])
        >>> exp_avg, exp_avg_sq = torch.zeros(3), torch.zeros(3)
        >>> calculate_laprop_update(
        ...     grad, exp_avg, exp_avg_sq, correct_bias=True, betas=(0.9, 0.999), step=1, eps=1e-8
        ... )
        tensor([ 1.0000, -1.0000,  0.0000])

    Reference:
        Ziyin, Wang and Ueda, "LaProp: Separating Momentum and Adaptivity in Adam",
        https://arxiv.org/abs/2002.04839.
    """
    return _call(grad, exp_avg, exp_avg_sq, correct_bias, betas, step, eps, out)


@fill_docstring
class LaProp(ScalarOptimizer):
    r"""LaProp, as a ``torch.optim`` optimizer.

    .. math::
        p \leftarrow p - \gamma u

    with :math:`u` as in :func:`calculate_laprop_update`.

    Args:
        params: {params}
        lr: {lr}
        betas: Decay rates of the averages of the normalised gradient and of the squared gradient,
            each in [0, 1).
        eps: {eps}
        weight_decay: {weight_decay}
        correct_bias: {correct_bias}
        frob_normalize: Scale each parameter back to the Frobenius norm that it had before the step.
            This cancels weight decay: with both, an error is logged.
        weight_decay_method: {weight_decay_method}
        **options: {options}

    Raises:
        {raises}

    Example:
        >>> import torch
        >>> from emerging_optimizers import LaProp
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = LaProp([weight], lr=0.1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([ 0.9000, -1.9000])

    Reference:
        Ziyin, Wang and Ueda, "LaProp: Separating Momentum and Adaptivity in Adam",
        https://arxiv.org/abs/2002.04839.
    """

    _rule = _RULE

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        correct_bias: bool = True,
        frob_normalize: bool = False,
        weight_decay_method: str = "decoupled",
        **options: Unpack[SharedOptions],
    ) -> None:
        hyperparameters = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "weight_decay_method": weight_decay_method,
            "correct_bias": correct_bias,
            "frob_normalize": frob_normalize,
        }
        super().__init__(params, hyperparameters, options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; missing keys take the defaults."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["frob_normalize"] and group["weight_decay"] != 0.0:
            _logger.error(
                "LaProp with frob_normalize=True restores the norm that weight_decay=%g shrinks;"
                " use weight_decay=0",
                group["weight_decay"],
            )

    def _rules_of_one_call(self, groups: Sequence[dict[str, Any]]) -> list[GroupRule] | None:
        for group in groups:
            if group["frob_normalize"] is not False:
                return None
        return super()._rules_of_one_call(groups)

    def _has_native_step(self, group: dict[str, Any]) -> bool:
        if not super()._has_native_step(group):
            return False
        if not group["frob_normalize"]:
            return True
        # Where the parameter is the weight and has 16 bits, rounding it twice would show.
        halves = (torch.bfloat16, torch.float16)
        return all(has_master(group, p) or p.dtype not in halves for p in group["params"])

    @torch.no_grad()
    def _native_step(
        self,
        groups: Sequence[dict[str, Any]],
        positions: Sequence[int],
        arguments: StepArguments,
    ) -> dict[int, Collection[int]]:
        # Where lr is 0, not even a product with 1 is for a parameter's bits.
        # Processes add up their parts of a DTensor's norm: also one that has no gradient for it.
        normalized = [
            (i, j)
            for i, group in enumerate(groups)
            if group["frob_normalize"] and not _is_zero(group["lr"])
            if self._has_native_step(group)
            for j, param in enumerate(group["params"])
            if self._grad(group, param) is not None or is_dtensor(param)
        ]
        params = [(groups[i], groups[i]["params"][j]) for i, j in normalized]
        norms = self._norms(params)
        left = super()._native_step(groups, positions, arguments)
        done = [k for k, (i, j) in enumerate(normalized) if j not in left.get(i, ())]
        if done:
            self._restore_norms([params[k] for k in done], [norms[k] for k in done])
        return left

    def _steps_together(self, group: dict[str, Any]) -> bool:
        is_normalized: bool = group["frob_normalize"]
        return is_normalized and not self._has_native_step(group)

    @torch.no_grad()
    def _plain_step(
        self,
        group: dict[str, Any],
        first_position: int,
        arguments: StepArguments,
        indices: Collection[int],
    ) -> None:
        if not self._steps_together(group):
            super()._plain_step(group, first_position, arguments, indices)
            return
        found_inf = arguments.found_inf is not None and read(arguments.found_inf, 0.0) != 0.0
        is_still = found_inf or read(group["lr"], HYPERPARAMETER) == 0.0
        for i, param in enumerate(group["params"]):
            if i in indices:
                super()._plain_step(group, first_position, arguments, [i])
            elif is_dtensor(param) and not is_still:
                # As in a native step: other processes may have a gradient for it.
                pairs = [(group, param)]
                self._restore_norms(pairs, self._norms(pairs))

    def _norms(self, params: Sequence[tuple[dict[str, Any], Tensor]]) -> list[Tensor]:
        """Return the norms of weights, of parameters each with its group."""
        norms = []
        for part in self._parts(params):
            norms += frobenius_norms([self._read_weight(*p) for p in part], [p for _, p in part])
        return norms

    def _restore_norms(
        self, params: Sequence[tuple[dict[str, Any], Tensor]], norms: Sequence[Tensor]
    ) -> None:
        """Scale weights, of parameters each with its group, to these norms."""
        left = iter(norms)
        for part in self._parts(params):
            weights = [self._read_weight(*pair) for pair in part]
            factors = restore_norms(weights, [p for _, p in part], [next(left) for _ in part])
            for (group, param), weight, factor in zip(part, weights, factors, strict=True):
                # Where a device's lr is 0, say, they did not move.
                self._write_weight(group, param, weight, is_still=factor == 1.0)

    def _parts(
        self, params: Sequence[tuple[dict[str, Any], Tensor]]
    ) -> list[Sequence[tuple[dict[str, Any], Tensor]]]:
        """Cut a list into parts whose weights may be there at a time."""
        return [params] if params else []


def _is_zero(lr: Any) -> bool:
    """Return whether the host knows that a learning rate is 0."""
    return not (isinstance(lr, Tensor) and lr.is_cuda) and read(lr, HYPERPARAMETER) == 0.0
