"""Why operations that users may expect are missing."""

from collections.abc import Callable
from typing import Any

from .graph import RuleError

_NOT_ELEMENTWISE = "it is not an operation on single elements, or its bits differ between machines"
# Why operations that users may expect are missing; otherwise `_NOT_ELEMENTWISE`.
_REASONS = {
    "reduces a tensor to one number; a rule sees one element at a time": (
        "sum mean norm std var prod all any amax amin argmax argmin median max min dot vdot inner"
        " matmul mm mv bmm cumsum cumprod softmax logsumexp count_nonzero dist cosine_similarity"
        " vector_norm matrix_norm sort topk nonzero"
    ),
    "changes the shape; a rule sees one element at a time": (
        "view reshape flatten unsqueeze squeeze expand expand_as view_as transpose permute t T mT"
        " cat stack split chunk narrow select repeat tile flip roll index_select gather scatter"
        " shape size dim ndim numel stride unbind __getitem__ __setitem__ __len__"
    ),
    "needs values on the host, and a rule is compiled without any": "item tolist numpy cpu cuda",
    "draws random numbers, which a rule cannot": (
        "rand randn randint randperm rand_like randn_like randint_like bernoulli normal uniform"
        " dropout multinomial exponential random poisson manual_seed"
    ),
    "is another value in each process, and a rule is traced once; use a function of `step`": (
        "time urandom"
    ),
    "rounds elements to integers, which a rule cannot; it can round hyperparameters and `step`": (
        "floor ceil round trunc fix frac fmod remainder floor_divide floordiv mod"
    ),
    "its bits differ between machines, so rules cannot use it on elements": (
        "exp log tanh sigmoid erf sin cos tan atan atan2 arctan2 exp2 expm1 log1p log2 log10"
        " softplus expit mish elu celu selu sinh cosh asin acos logaddexp hypot logit gelu silu"
        " erfinv lgamma digamma"
    ),
    "is not available; write it with operators, abs, sign, clamp and torch.where": (
        "hardtanh relu6 hardsigmoid hardswish hardshrink softshrink softsign leaky_relu prelu"
        " threshold heaviside nan_to_num signbit float_power fmax fmin isclose frexp ldexp"
    ),
    "makes a tensor; use a number, or zeros_like, ones_like or full_like": (
        "full zeros ones empty empty_like new_tensor new_zeros new_ones new_full new_empty"
    ),
    "does not change values; remove it": "contiguous requires_grad",
    "is not known where a rule is defined; remove it": (
        "is_cuda is_cpu layout grad grad_fn is_leaf data_ptr storage"
    ),
    "changes the dtype; rules compute in float32, and in float64 where an operand is; for a"
    " condition, use mask.float()": "half bfloat16 double int long short char byte bool type",
}
_REASON_OF = {name: reason for reason, names in _REASONS.items() for name in names.split()}


def refusal(what: str, name: str) -> RuleError:
    """Return the error for an operation that rules do not have.

    Args:
        what: The operation, as the message names it.
        name: The name of torch's function or of the tensor's method.
    """
    plain = name.removeprefix("linalg_").removeprefix("special_").lstrip("_")
    plain = name if name.startswith("__") else plain.rstrip("_")
    return RuleError(f"{what}: {_REASON_OF.get(plain, _NOT_ELEMENTWISE)}")


def _refuse(what: str, reason: str) -> Callable[..., Any]:
    """Return an operator that raises."""

    def operator(*operands: Any) -> Any:
        raise RuleError(f"{what}: {reason}")

    return operator


class _Refusals:
    """Operators that no value has. Python's errors would name this package's classes."""

    __slots__ = ()

    __matmul__ = __rmatmul__ = _refuse("`@`", _REASON_OF["matmul"])
    __lshift__ = __rlshift__ = _refuse("`<<`", "rules have no integers; multiply by a power of 2")
    __rshift__ = __rrshift__ = _refuse("`>>`", "rules have no integers; divide by a power of 2")


class NumberRefusals(_Refusals):
    """What hyperparameters and the step cannot do."""

    __slots__ = ()
    __iter__ = __getitem__ = __len__ = _refuse(
        "one number where several are expected",
        "give the hyperparameter a default or an annotation with several, as in betas=(0.9, 0.999)",
    )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise RuleError(
            f".{name} of a hyperparameter or the step, which are numbers: use operators, min(),"
            " max() or functions of math"
        )


class ElementRefusals(_Refusals):
    """What elements of tensors cannot do."""

    __slots__ = ()
    __floordiv__ = __rfloordiv__ = _refuse("`//` of a tensor", _REASON_OF["floor_divide"])
    __mod__ = __rmod__ = _refuse("`%` of a tensor", _REASON_OF["remainder"])
    __divmod__ = __rdivmod__ = _refuse("divmod() of a tensor", _REASON_OF["remainder"])
    __round__ = _refuse("round() of a tensor", _REASON_OF["round"])
    __floor__ = _refuse("math.floor of a tensor", _REASON_OF["floor"])
    __ceil__ = _refuse("math.ceil of a tensor", _REASON_OF["ceil"])
