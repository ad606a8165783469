"""Descriptions of arguments that several update functions or optimizers share.

Docstrings have ``{step}``, at the end of a line, where the description of that name belongs.
"""

import re
from collections.abc import Callable
from typing import Any, TypeVar

_Documented = TypeVar("_Documented", bound=Callable[..., Any])

_PLACEHOLDER = re.compile(r"^( *)([*\w]+: |)\{(\w+)\}$", re.MULTILINE)

_OF_BOTH = {
    "eps": "Added to the denominator; not negative.",
    "correct_bias": "Apply bias correction: divide each average by ``1 - beta**step``.",
    "num_beta_slow_warmup_steps": """\
Number of steps over which the slow beta rises to its
final value. None: no warm-up.""",
    "num_beta_fast_warmup_steps": """\
Number of steps over which the fast beta rises to its
final value. None: no warm-up.""",
    "num_alpha_warmup_steps": """\
Number of steps over which `alpha` rises from 0. None: no warm-up.""",
    "min_beta_fast": "The fast beta at the start of its warm-up, in [0, 1).",
}

_OF_FUNCTIONS = _OF_BOTH | {
    "grad": """\
Gradient, or a sequence of gradients, of any shape and layout; float32, float64,
bfloat16 or float16. Not modified.""",
    # Follows what the state is.
    "state": """\
One for each `grad`, of its shape; any of the four dtypes. Modified in place.""",
    "step": """\
Step number, counted from 1: an int, an integral float, or a 0-dim tensor of dtype
int64 or float32. The CUDA kernels read a tensor on their device, and do not check it.""",
    "out": """\
Receives the updates and is returned, so that nothing is allocated: a tensor, or a
sequence of tensors. May be `grad` itself.""",
    "returns": """\
The update; a list of updates where `grad` is a sequence. A new one has the shape and layout
of `{first_state}` and the dtype ``torch.promote_types(grad.dtype, {first_state}.dtype)``.
Parameters are not modified.""",
    "raises": """\
ValueError: Lists of different lengths, a list mixed with a single tensor, different shapes
    or devices at one position, a tensor to be modified that overlaps itself or another one,
    or a hyperparameter out of range.
TypeError: A tensor that is not strided or has another dtype, or a hyperparameter of the
    wrong type. Nothing is modified where an error is raised.""",
}

_OF_CLASSES = _OF_BOTH | {
    "params": "Parameters to optimize: tensors, ``(name, tensor)`` pairs or parameter groups.",
    "lr": """\
Learning rate: a float or a one-element tensor. With 0, states are updated and
parameters are unchanged, bit for bit.""",
    "weight_decay": "Strength of the weight decay.",
    "weight_decay_method": """\
"decoupled", "independent", "palm" or "l2"; see
:class:`~emerging_optimizers.scalar_optimizers.ScalarOptimizer`.""",
    "options": """\
`maximize`, `fused`, `capturable`, `state_dtype`, `master_weights` and
`stochastic_rounding`, which all optimizers take; see
:class:`~emerging_optimizers.scalar_optimizers.ScalarOptimizer`.""",
    "raises": """\
ValueError: A hyperparameter out of range, or an option that is not supported.
TypeError: A hyperparameter or an option of the wrong type.""",
}


def fill_docstring(documented: _Documented) -> _Documented:
    """Replace the placeholders in the docstring of an update function or an optimizer."""
    docstring = documented.__doc__
    if docstring is None:  # python -OO
        return documented
    texts = _OF_CLASSES
    if not isinstance(documented, type):
        _, first_state, *_ = documented.__code__.co_varnames
        returns = _OF_FUNCTIONS["returns"].replace("{first_state}", first_state)
        texts = _OF_FUNCTIONS | {"returns": returns}

    def fill(placeholder: re.Match[str]) -> str:
        indent, argument, name = placeholder.groups()
        hanging = indent + (" " * 4 if argument else "")
        return indent + argument + texts[name].replace("\n", "\n" + hanging)

    documented.__doc__ = _PLACEHOLDER.sub(fill, docstring)
    return documented
