"""Why operations that users may expect are missing."""

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
        " shape size dim ndim numel stride unbind contiguous __getitem__ __setitem__ __len__"
    ),
    "needs values on the host, and a rule is compiled without any": "item tolist numpy cpu cuda",
    "draws random numbers, which a rule cannot": (
        "rand randn randint randperm rand_like randn_like randint_like bernoulli normal uniform"
        " dropout multinomial exponential random poisson manual_seed"
    ),
    "gives other bits on other machines, so no rule has it on elements": (
        "exp log tanh sigmoid erf sin cos tan atan atan2 arctan2 exp2 expm1 log1p log2 log10"
        " softplus sinh cosh asin acos logaddexp hypot logit gelu silu erfinv lgamma digamma"
    ),
    "changes the dtype; rules compute in float32, and in float64 where an operand is": (
        "half bfloat16 double int long"
    ),
}
_REASON_OF = {name: reason for reason, names in _REASONS.items() for name in names.split()}


def refusal(name: str, what: str) -> RuleError:
    """Return the error for an operation that rules do not have."""
    plain = name.removeprefix("linalg_").removeprefix("special_")
    return RuleError(f"{what}: {_REASON_OF.get(plain, _NOT_ELEMENTWISE)}")
