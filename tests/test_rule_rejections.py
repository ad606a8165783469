"""What a rule cannot be is refused at its definition, with the rule's name, line and reason."""

import functools
import linecache
import math
import random
import statistics  # noqa: F401
import warnings
from random import random as draw
from typing import Any

import numpy as np
import pytest
import torch

import emerging_optimizers as eo
from emerging_optimizers.megatron import MegatronMixin

GENERATOR = np.random.default_rng(0)
SIGNATURE = "grad, a, *, h=0.3, pair=(0.1, 0.2), n: int = 3, o=None, step"


def define(text: str, name: str = "<refused>", **names: Any) -> Any:
    """Execute a rule's text, whose source Python finds, and return what it defines as `bad`."""
    lines = text.splitlines(keepends=True)
    linecache.cache[name] = (len(text), None, lines, name)
    namespace = {**globals(), **names, "__name__": "refused"}
    exec(compile(text, name, "exec"), namespace)
    return namespace["bad"]


def refusal(body: str, signature: str = SIGNATURE, **names: Any) -> tuple[str, str, int]:
    """Return the error of a rule, and the source and line where its body says "# here"."""
    lines = ["@eo.rule", f"def bad({signature}):", *(f"    {line}" for line in body.split("\n"))]
    with pytest.raises(eo.RuleError) as caught:
        define("\n".join(lines) + "\n", **names)
    marked = [i for i, line in enumerate(lines) if line.endswith("# here")]
    line = marked[0] if marked else 2
    return str(caught.value), lines[line].strip(), line + 1


# The update's expression, and what the error says.
EXPRESSIONS = [
    # decisions on elements
    ("grad if grad > 0 else a", "use torch.where(condition, a, b)"),
    ("grad and a", "`if`, `and`, `or` or `not` on a tensor's values"),
    ("grad or a", "`if`, `and`, `or` or `not` on a tensor's values"),
    ("grad * (not a)", "`if`, `and`, `or` or `not` on a tensor's values"),
    ("grad * (0 < a < 1)", "`if`, `and`, `or` or `not` on a tensor's values"),
    ("max(grad, a)", "max() of tensors: use torch.maximum"),
    ("min(0.0, grad)", "min() of tensors: use torch.minimum"),
    # more or less than one element
    ("grad / grad.norm()", "Tensor.norm: reduces a tensor to one number"),
    ("grad - grad.mean()", "Tensor.mean: reduces a tensor"),
    ("grad * torch.sum(a)", "torch.sum: reduces a tensor"),
    ("grad / grad.max()", "max of one tensor: reduces a tensor"),
    ("grad / torch.linalg.vector_norm(grad)", "vector_norm: reduces a tensor"),
    ("grad * (a > 0).any()", "Tensor.any: reduces a tensor"),
    ("grad @ a", "`@`: reduces a tensor"),
    ("grad.view(-1)", "Tensor.view: changes the shape"),
    ("grad.t()", "Tensor.t: changes the shape"),
    ("grad * grad.shape[0]", "Tensor.shape: changes the shape"),
    ("grad[0]", "indexing a tensor: changes the shape"),
    ("grad[a > 0]", "indexing a tensor: changes the shape"),
    ("grad * len(grad)", "len() of a tensor: changes the shape"),
    ("[x for x in grad][0]", "a tensor cannot be iterated over"),
    ("torch.stack([grad, a]).sum(0)", "torch.stack: changes the shape"),
    ("grad * torch.tensor([2.0])", "a tensor of shape (1,) that is not an argument"),
    # values on the host
    ("grad * grad.item()", "Tensor.item: needs values on the host"),
    ("grad * float(a)", "float() of a tensor: needs values on the host"),
    ("grad * int(a)", "of a tensor: needs values on the host"),
    ("grad.cpu()", "Tensor.cpu: needs values on the host"),
    ("grad * complex(h)", "has no value while the rule is traced"),
    ("grad * [1, 2][step]", "it cannot be an index or the length of a loop"),
    ("grad * sum(h for _ in range(n))", "it cannot be an index or the length of a loop"),
    ("grad * {1: 2}.get(step, 3)", "it cannot be in a set or a key"),
    ("grad * round(h, 2)", "round() of a per-step number to digits: scale it"),
    ("grad * pair[n]", "use `if`, and loop over a constant range that `break` ends"),
    ("grad * (1 if step in {1, 2} else 2)", "in a set or a key; use `if`, or `in` with a tuple"),
    ("grad * np.float64(h)", "in functions of your own, not in other libraries"),
    ("grad * sum(range(int(h)))", "it cannot be an index or the length of a loop"),
    # random numbers
    ("grad + torch.randn_like(grad)", "torch.randn_like: draws random numbers"),
    ("grad * torch.rand(())", "torch.rand: draws random numbers"),
    ("grad.normal_()", "Tensor.normal_: draws random numbers"),
    ("torch.nn.functional.dropout(grad, 0.5)", "dropout: draws random numbers"),
    ("grad * random.random()", "random.random: draws random numbers"),
    ("grad * draw()", "Random.random: draws random numbers"),
    ("grad * np.random.rand()", "numpy.random.rand: draws random numbers"),
    ("grad * GENERATOR.normal()", "Generator.normal: draws random numbers"),
    # other bits on other machines
    ("torch.exp(grad)", "torch.exp: its bits differ between machines"),
    ("grad.log()", "Tensor.log: its bits differ between machines"),
    ("torch.tanh(grad)", "torch.tanh: its bits differ between machines"),
    ("torch.atan2(grad, a)", "torch.atan2: its bits differ between machines"),
    ("math.exp(grad)", "math.exp of a tensor"),
    ("grad**h", "must be a constant multiple of 1/2"),
    ("2**grad", "must be a constant multiple of 1/2"),
    ("grad**0.3", "must be a constant multiple of 1/2"),
    ("grad**17", "at most 16"),
    ("grad // 2", "`//` of a tensor"),
    ("grad % 2", "`%` of a tensor"),
    ("grad.floor()", "Tensor.floor: rounds elements to integers"),
    ("torch.nan_to_num(grad)", "is not available; write it with operators, abs, sign, clamp"),
    ("torch.nn.functional.softshrink(grad, 0.1)", "write it with operators, abs, sign, clamp"),
    ("grad * math.fsum(pair)", "math.fsum is not available in rules: use sum()"),
    ("grad * math.dist(pair, (0, 0))", "use math.hypot of the differences"),
    ("grad * math.remainder(h, 2)", "math.remainder is not available in rules: use `%`"),
    ("grad * math.isclose(h, rel_tol=0.1, b=1)", "compare abs(a - b) with a tolerance"),
    ("grad * np.mean(pair)", "numpy.mean is not available in rules: use operators"),
    ("np.sqrt(grad)", "numpy.sqrt of a tensor: use functions of torch"),
    ("grad * math.sin(step, 2)", "sin() takes exactly one argument (2 given)"),
    ("grad * math.pow(h)", "pow expected 2 arguments, got 1"),
    ("grad * math.exp(h, base=2)", "exp() takes no keyword arguments"),
    ("grad * math.log(h, base=2)", "log() takes no keyword arguments"),
    ("grad * math.log(h, 2, 3)", "TypeError: "),
    ("grad * math.isnan(h, h)", "isnan() takes exactly one argument (2 given)"),
    ("grad * math.acosh(h, h)", "acosh() takes exactly one argument (2 given)"),
    ("grad * np.sqrt(h, h)", "return arrays must be of ArrayType"),
    ("grad * np.power(h)", "power() takes from 2 to 3 pos"),
    ("grad * max(h)", "one number where several are expected"),
    ("torch.exp(-torch.tensor(step)) * grad", "torch.exp of numbers: use operators, min(), max()"),
    ("grad * (step & 1)", "use `%`, as in `step % 2 == 1`"),
    ("grad * (1 | n)", "use `%`, as in `step % 2 == 1`"),
    ("grad * (step in range(1, 100, 2))", "for `step in range(...)`, use comparisons and `%`"),
    # tensors
    ("grad * torch.tensor([0.1, 0.2])[step > 3]", "as in (0.1, 0.2)[step > 3]"),
    ("grad * torch.tensor(pair)[0]", "torch.tensor of a sequence of per-step numbers"),
    ("grad * torch.tensor(grad)", "or of a tensor: use the sequence or the tensor itself"),
    ("grad * (torch.tensor(3.0) % step)", "use a Python number in place of the tensor"),
    ("grad * (step // torch.tensor(3.0)) @ a", "`@`: reduces a tensor"),
    ("grad + grad.new_zeros(())", "makes a tensor; use a number, or zeros_like"),
    ("grad * torch.full((), h)", "makes a tensor; use a number, or zeros_like"),
    ("grad.contiguous()", "Tensor.contiguous: does not change values; remove it"),
    ("grad.requires_grad_(False)", "does not change values; remove it"),
    ("torch.nn.functional.relu(grad, inplace=True)", "relu with inplace=True: use relu_"),
    # dtypes
    ("torch.zeros_like(grad, dtype=torch.float32)", "a tensor with dtype=torch.float32: remove it"),
    ("grad.to(torch.float32)", "Tensor.to(torch.float32): remove it"),
    ("grad.half()", "Tensor.half: changes the dtype"),
    ("grad.to('cpu')", "a rule cannot choose devices"),
    ("grad * (1e-3 if grad.dtype == torch.float64 else 1)", "a dtype in a condition"),
    ("(grad > 0).int() * a", "Tensor.int: changes the dtype; rules compute in float32"),
    ("(grad > 0).double() * a", "for a condition, use mask.float()"),
    ("grad * grad.is_cuda", "Tensor.is_cuda: is not known where a rule is defined; remove it"),
    ("grad * (grad.device.type == 'cpu')", ".type of a device: a rule is the same on all devices"),
    ("grad * (grad.device == torch.device('cpu'))", "a device in a condition: a rule is the same"),
    ("torch.zeros_like(grad, device='cpu')", "a tensor with device=cpu: remove it"),
    ("torch.finfo(grad.dtype).eps * grad", "a rule's tensors and numbers are not accepted there"),
    ("torch.Tensor.mul(grad, 2)", "use operators, methods of tensors, and functions of torch and"),
    # unknown names and arguments
    ("undefined(grad)", "NameError: name 'undefined' is not defined"),
    ("undefined(grad)", "the rule is traced where it is defined; define what it calls above it"),
    ("grad * grad.dtype.itemsize", ".itemsize of a dtype: a rule is the same for all dtypes"),
    ("torch.foo(grad)", "has no attribute 'foo'"),
    ("grad.foo()", "Tensor.foo: it is not an operation on single elements"),
    ("grad.maximum_(a)", "Tensor.maximum_: it is not an operation"),
    ("grad.clone_()", "Tensor.clone_: it is not an operation"),
    ("grad.clamp(0, 1, 2)", "Tensor.clamp with these arguments"),
    ("grad.clamp()", "clamp without min and max"),
    ("grad.add(a, beta=2)", "unexpected keyword argument 'beta'"),
    ("grad.div(a, rounding_mode='floor')", "div with rounding_mode"),
    ("torch.add(grad, a, out=a)", "torch.add with out="),
    ("torch.sqrt(h) * grad", "torch.sqrt of numbers: use operators"),
    ("math.gcd(n, 2) * grad", "math.gcd is not available in rules"),
    ("grad * o", "may be None, test `is None` first"),
    ("grad + 'x'", "not with str"),
    ("grad + 1j", "not with complex"),
    ("grad + np.ones(2)", "not with ndarray"),
    ("grad * isinstance(n, int)", "isinstance that tells an int from a float"),
    ("grad * isinstance(h, float)", "isinstance that tells an int from a float"),
    ("grad * statistics.mean(pair)", ".as_integer_ratio of a hyperparameter or the step"),
    ("grad * (type(h) is float)", "type() of a per-step number"),
    # what PyTorch refuses
    ("torch.maximum(grad, 0.0)", "maximum of a number: PyTorch expects tensors"),
    ("torch.lerp(grad, 1.0, h)", "lerp of a number: PyTorch expects tensors"),
    ("torch.copysign(2.0, grad)", "torch.copysign: PyTorch refuses it"),
    ("torch.gt(1.0, grad) * grad", "torch.gt: PyTorch refuses it"),
    ("grad.clamp(min=a, max=1.0)", "Tensor.clamp: PyTorch refuses it"),
    ("grad.masked_fill(grad > 0, a)", "Tensor.masked_fill: PyTorch refuses it"),
    ("1 - (grad > 0)", "PyTorch refuses it: Subtraction"),
    ("(grad > 0) - (a > 0)", "PyTorch refuses it: Subtraction"),
    ("-(grad > 0)", "PyTorch refuses it: Negation"),
    ("abs(grad > 0)", "PyTorch refuses it"),
    ("grad.lerp(grad > 0, h)", "Tensor.lerp: PyTorch refuses it"),
    ("torch.where(grad > 0, 1, 2) ** -1", "PyTorch refuses it: Integers"),
    ("torch.where(grad > 0, 1, 2).add_(0.5)", "Tensor.add_: PyTorch refuses it"),
    ("torch.where(grad > 0, 1, 2).fill_(0.5)", "a tensor of integers or of conditions"),
    ("torch.full_like(grad > 0, 0.5)", "a tensor of integers or of conditions"),
    # conditions
    ("(grad > 0).sign()", "Tensor.sign of conditions: turn them into numbers first"),
    ("grad & a", "on something that is not a condition"),
    ("(grad > 0) & h", "on something that is not a condition"),
    ("~grad", "on something that is not a condition"),
    ("torch.where(grad, grad, a)", "on something that is not a condition"),
    ("torch.where(step == 1, grad, a)", "use `a if condition else b`"),
    ("grad * ~(step == 1)", "use `not`"),
]


@pytest.mark.parametrize(("expression", "reason"), EXPRESSIONS, ids=[e for e, _ in EXPRESSIONS])
def test_expressions(expression: str, reason: str) -> None:
    body = f"a.add_(grad)\nupdate = {expression}  # here\nreturn update"
    error, source, line = refusal(body)
    assert error.startswith(f"rule bad, <refused>:{line}: `{source}`: ")
    assert reason in error


BODIES = {
    "tensor in an if": ("if grad > 0:  # here\n    grad = a\nreturn grad, a * h", "torch.where"),
    "loop over the step": (
        "i = 0\nwhile i < step:  # here\n    i += 1\nreturn grad * i, a * h",
        "the length of a loop must be known",
    ),
    "item assignment": ("a[:] = grad  # here\nreturn a", "indexing a tensor (use torch.where)"),
    "in-place on a constant": (
        "c = torch.tensor(0.0)\nc.add_(grad)  # here\nreturn c, a * h",
        "modifies a tensor that is not an argument of the rule",
    ),
    "operator on a constant": (
        "c = torch.tensor(2.0)\nc += h  # here\nreturn c * grad, a * h",
        "modifies a tensor that is not an argument of the rule",
    ),
    "integers modified": (
        "x = torch.where(grad > 0, 1, 0)\nx += a  # here\nreturn x, a * h",
        "PyTorch refuses it: result type",
    ),
    "conditions modified": (
        "x = grad > 0\nx *= 2  # here\nreturn x, a * h",
        "PyTorch refuses it: result type",
    ),
    "error that is caught": (
        "try:\n    grad /= grad.norm()  # here\nexcept Exception:\n    pass\nreturn grad, a * h",
        "Tensor.norm: reduces a tensor",
    ),
    "hasattr": (
        "x = grad if hasattr(grad, 'foo') else a  # here\nreturn x, a * h",
        "Tensor.foo",
    ),
    "lambda inside": (
        "f = lambda x: x.sum()  # here\nreturn f(grad), a * h",
        "Tensor.sum: reduces a tensor",
    ),
    "exception of its own": ("raise ValueError('own')  # here", "ValueError: own"),
    "exception on a condition": (
        "if h > 1:\n    raise ValueError(f'{h} is too large')  # here\nreturn grad, a * h",
        "ValueError: a per-step number is too large: native code cannot raise errors; remove the",
    ),
    "assertion": (
        "assert step >= 1  # here\nreturn grad, a * h",
        "AssertionError: native code cannot raise errors; remove the check, or declare the domain",
    ),
    "type in a match": (
        "match n:\n    case int():  # here\n        grad = grad * 2\nreturn grad, a * h",
        "isinstance that tells an int from a float",
    ),
    "loop over a hyperparameter": (
        "for _ in range(n):  # here\n    grad = grad * h\nreturn grad, a * h",
        "use `if`, and loop over a constant range that `break` ends",
    ),
    "a variable of one outcome": (
        "if step**2 < 9:\n    k = 2\nif step**2 > 8:\n    k = 3\nreturn grad * k, a * h  # here",
        "also pairs that cannot occur together; use `else`",
    ),
    "recursion over the step": (
        "def power(k): return 1 if k <= 0 else h * power(k - 1)  # here\n"
        "return grad * power(step), a * h",
        "loop over a constant range, or write a closed form",
    ),
}
# ---- what rules cannot call ----------------------------------------------------------------------


@eo.rule
def rejections_called(grad, exp_avg, *, betas: tuple[eo.Beta, ...] = (0.9, 0.99)):
    return grad, exp_avg * betas[0]


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    scripted = torch.jit.trace(torch.square, torch.ones(2))

CALLS = [
    ("rejections_called([grad], [a])[0]", "grad must be one tensor, an argument of this rule or"),
    ("rejections_called(grad, torch.zeros(()))", "exp_avg must be one tensor, an argument of"),
    ("rejections_called(grad, grad)", "the same tensor twice; pass a clone()"),
    ("rejections_called(grad, a, out=grad)", "rejections_called with out=: assign the result"),
    ("rejections_called(grad, a, betas=(h,))", "betas has 1 values; expected 2"),
    ("rejections_called(grad, a, betas=(0.9, 1.0))", "betas[1] is 1; expected 0 <= betas[1] < 1"),
    ("rejections_called(grad > 0, a)", "a tensor of integers or of conditions"),
    ("rejections_called(grad, a, beta=h)", "got an unexpected keyword argument 'beta'"),
    ("eo.scalar_optimizers.calculate_lion_update(grad, a, 0.9)", "calculate_lion_update is comp"),
    ("scripted(grad)", "is compiled: write its formula in the rule, or call another rule"),
]


@pytest.mark.parametrize(("call", "reason"), CALLS, ids=[call for call, _ in CALLS])
def test_calls(call: str, reason: str) -> None:
    error, source, line = refusal(f"a.add_(grad)\nupdate = {call}  # here\nreturn update")
    assert error.startswith(f"rule bad, <refused>:{line}: `{source}`: ")
    assert reason in error


def test_a_rule_in_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rejections_called, "has_formula", False)
    error, _, _ = refusal("return rejections_called(grad, a)  # here")
    assert "rejections_called in a rule: it is written in C++; write it in Python" in error


@pytest.mark.parametrize("name", BODIES)
def test_bodies(name: str) -> None:
    body, reason = BODIES[name]
    error, source, line = refusal(body)
    assert error.startswith(f"rule bad, <refused>:{line}: `{source}`: ")
    assert reason in error


# Errors of the rule as a whole, which name its first line.
WHOLE = [
    ("return grad", "the state a is never updated"),
    ("return grad, a", "the state a is never updated"),
    ("return grad, a * h, a", "the rule returns the update and 2 states; expected 1: a"),
    ("a.add_(grad)\nreturn (a,)", "the rule returns the update and 0 states; expected 1: a"),
    ("return [grad, a * h]", "the rule returns a list"),
    ("return {'update': grad}", "the rule returns a dict"),
    ("return 'grad'", "the rule returns a str"),
    ("return grad, None", "the rule returns None for the state a"),
    ("return 'grad', a * h", "the rule returns 'grad' for the update"),
    ("a.add_(grad)", "the rule never returns an update"),
    ("return None, a * h", "the rule never returns an update"),
    ("return 1.0, 2.0", "the rule uses neither the gradient nor a state"),
    ("return grad * torch.empty(()).uniform_(), a * h", "the rule draws random numbers"),
    (
        "k = 0\nfor i in range(20):\n    k = k + 1 if step > i else k\nreturn grad * k, a * h",
        "more than 256 combinations of conditions: use them as numbers, as in `x * float(",
    ),
    ("global count\ncount = step\nreturn grad, a * h", "bad assigns count, a variable outside"),
]


@pytest.mark.parametrize(("body", "reason"), WHOLE, ids=[body for body, _ in WHOLE])
def test_results(body: str, reason: str) -> None:
    error, _, _ = refusal(body)
    assert error.startswith("rule bad, <refused>:")
    assert reason in error


SIGNATURES = [
    ("", "a rule needs a positional parameter"),
    ("*, h=1.0", "a rule needs a positional parameter, which is the gradient"),
    ("grad, h=1.0", "h is positional, so it is a tensor: write `*`"),
    ("grad, step", "step is positional"),
    ("grad, *states", "*states: name each state and hyperparameter"),
    ("grad, **options", "*options: name each state and hyperparameter"),
    ("grad, a, b, c, d, e, f", "6 states; at most 5 are supported"),
    ("grad, out", "an argument cannot be named out"),
    ("grad, *, self=1.0", "an argument cannot be named self"),
    ("grad, *, größe=1.0", "an argument is named größe"),
    ("grad, *, _h=1.0", "an argument is named _h"),
    ("grad, *, h='x'", "h must be a number, not str"),
    ("grad, *, h=()", "h has no values"),
    ("grad, *, pair=(0.1, 'x')", "pair[1] must be a number"),
    ("grad, *, betas=(0.9, 1.5)", "betas[1] is 1.5; expected 0 <= betas[1] < 1"),
    ("grad, *, beta=1.0", "expected 0 <= beta < 1"),
    ("grad, *, eps=-1.0", "eps"),
    ("grad, *, h: eo.NonNegative = -1.0", "h is -1; expected"),
    ("grad, *, n: int = 2.5", "n"),
    ("grad, *, f: bool = 1", "f must be a bool, not int (1)"),
    ("grad, *, h: str = 'x'", "expected Beta, NonNegative, float or int"),
    ("grad, *, h: tuple[float, ...]", "h has numbers, and no default that tells how many"),
    ("grad, *, h: tuple[float, ...] = ()", "h has numbers, and no default that tells how many"),
    ("grad, *, h: list[float]", "h has numbers, and no default that tells how many"),
    ("grad, *, h: tuple", "h has numbers, and no default that tells how many"),
    ("grad, *, h: tuple[float, int] = (1.0, 2)", "a tuple such as tuple[Beta, Beta]"),
    ("grad, *, h=((1.0, 2.0), 3.0)", "h[0] must be a number, not tuple: the default must be"),
    ("grad, *, h={'a': 1.0}", "not dict: the default must be a number, a bool, None or a tuple"),
    ("grad, *, h=math.sqrt", "make anything else a variable outside of the rule"),
    ("grad, *, h: 'Missing' = 1.0", "h: Missing: name 'Missing' is not defined"),
    ("grad, *, h=" + repr((1.0,) * 33), "more than 32 numbers"),
]


@pytest.mark.parametrize(("signature", "reason"), SIGNATURES, ids=[s[:40] for s, _ in SIGNATURES])
def test_signatures(signature: str, reason: str) -> None:
    error, _, _ = refusal("return grad * 2", signature)
    assert error.startswith("rule bad, <refused>:")
    assert reason in error


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (lambda grad: grad, "use `def`, not a lambda"),
        (int, "rule must decorate a function, not type"),
        (functools.partial(torch.add), "rule must decorate a function, not partial"),
        (torch.add, "rule must decorate a function, not builtin"),
        (3, "rule must decorate a function, not int"),
    ],
    ids=["lambda", "class", "partial", "builtin", "number"],
)
def test_what_is_no_function(value: Any, reason: str) -> None:
    with pytest.raises(eo.RuleError, match=reason):
        eo.rule(value)


def test_too_many_cases() -> None:
    lines = [f"if step == {i}:\n    return grad * {i} + a, a.square()" for i in range(16)]
    with pytest.raises(eo.RuleError, match=r"rule bad: 17 cases with different formulas"):
        define(
            "@eo.rule\ndef bad(grad, a, *, step):\n    "
            + "\n".join(lines).replace("\n", "\n    ")
            + "\n    return grad, a * 2\n"
        )


def test_too_many_combinations() -> None:
    flags = [f"f{i}" for i in range(9)]
    body = "\n".join(f"if {flag}:\n    grad = grad * {i + 2}" for i, flag in enumerate(flags))
    signature = "grad, *, " + ", ".join(f"{flag}=False" for flag in flags)
    error, _, _ = refusal(body + "\nreturn grad", signature)
    assert "more than 256 combinations of conditions" in error


def test_error_in_a_helper_names_the_helpers_line() -> None:
    def helper(x: Any) -> Any:
        x = x * 2
        return x.mean()

    with pytest.raises(eo.RuleError) as caught:

        @eo.rule
        def bad(grad):
            return grad - helper(grad)

    assert f"{__file__}:{helper.__code__.co_firstlineno + 2}: `return x.mean()`" in str(
        caught.value
    )


def test_no_source_text_is_needed_for_errors() -> None:
    with pytest.raises(eo.RuleError, match=r"^rule bad, <string>:2: Tensor.sum: reduces"):
        exec("@eo.rule\ndef bad(grad): return grad / grad.sum()\n", {"eo": eo})


def test_randomness_of_the_program_is_untouched() -> None:
    python, pytorch = random.getstate(), torch.get_rng_state()
    refusal("a.add_(grad)\nreturn grad * torch.empty(()).uniform_()")
    assert random.getstate() == python
    assert torch.equal(torch.get_rng_state(), pytorch)
    assert math.isfinite(draw())


# ---- class statements ----------------------------------------------------------------------------


@eo.rule
def rejections_plain(grad, *, scale=1.0):
    return grad * scale


@eo.rule
def rejections_lr(grad, *, lr=1.0):
    return grad * lr


@eo.rule
def rejections_beta(grad, *, beta=0.5):
    return grad * beta


CLASSES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown argument": (
        {"rule": rejections_plain, "foo": 1},
        "unknown argument 'foo'; expected lr",
    ),
    "hyperparameter lr": ({"rule": rejections_lr}, "a hyperparameter named lr, which every"),
    "no rule": (
        {"rule": 3},
        "rule= must be a rule made by emerging_optimizers.rule or load_rule, not int",
    ),
    "plain function": ({"rule": rejections_plain.formula}, "rule= must be a rule .*, not function"),
    "argument without a rule": ({"lr": 0.1}, "rule= must be a rule .*, and none is given"),
    "default of a wrong type": ({"rule": rejections_plain, "scale": "x"}, "scale must be a number"),
    "default outside the domain": ({"rule": rejections_beta, "beta": 1.0}, "beta is 1; expected"),
}


@pytest.mark.parametrize("name", CLASSES)
def test_class_statements(name: str) -> None:
    arguments, reason = CLASSES[name]
    with pytest.raises((TypeError, ValueError), match=reason):
        type("Refused", (eo.ScalarOptimizer,), {}, **arguments)


def test_rule_is_not_for_the_mixin() -> None:
    with pytest.raises(TypeError, match="rule"):
        type("Refused", (MegatronMixin, eo.ScalarOptimizer), {}, rule=3)


def test_packages_may_have_rules_of_one_name() -> None:
    texts = {"package_a.rules": "grad * 2", "package_b.rules": "grad * 3"}
    rules = {}
    for module, body in texts.items():
        namespace = {"eo": eo, "__name__": module}
        exec(f"@eo.rule\ndef shared_name(grad):\n    return {body}\n", namespace)
        rules[module] = namespace["shared_name"]
    results = [rule(torch.ones(1)).item() for rule in rules.values()]  # type: ignore[operator]
    assert results == [2, 3]
    with pytest.raises(eo.RuleError, match=r"package_a\.rules\.shared_name has the same name"):
        exec(
            "@eo.rule\ndef shared_name(grad):\n    return grad * 4\n",
            {"eo": eo, "__name__": "package_a.others"},
        )


def test_a_rule_of_no_module() -> None:
    namespace = {"eo": eo}
    exec("@eo.rule\ndef of_no_module(grad):\n    return grad * 2\n", namespace)
    rule: Any = namespace["of_no_module"]
    assert rule(torch.ones(1)).item() == 2
