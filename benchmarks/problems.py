"""What the suites measure: the table of rules, the table of shapes, and the tensors of both."""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from emerging_optimizers import ScalarOptimizer, scalar_optimizers
from emerging_optimizers.registry import get_optimizer_cls, get_optimizer_names

# ---- rules ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """An update rule and the hyperparameters it is measured with.

    Attributes:
        name: Its stem.
        function: The package's function, which takes hyperparameters by position here.
        formula: The package's formula in PyTorch operations; it takes the same arguments.
        states: The names of its states, as the function has them.
        options: Hyperparameters, in the order in which the function takes them.
        optimizer: The package's optimizer.
        state_keys: Their keys in the optimizer's state.
        arguments: The same hyperparameters, as the optimizer takes them; its defaults apart.
    """

    name: str
    function: Callable[..., Any]
    formula: Callable[..., Tensor]
    states: tuple[str, ...]
    options: dict[str, Any]
    optimizer: type[ScalarOptimizer]
    state_keys: tuple[str, ...]
    arguments: dict[str, Any]

    @property
    def values(self) -> tuple[Any, ...]:
        """The hyperparameters' values, to be passed by position."""
        return tuple(self.options.values())

    @cached_property
    def is_sign(self) -> bool:
        """Whether the update is a sign; the sign of a value within rounding of 0 may differ."""
        grad, *states = (torch.rand(100) for _ in range(1 + len(self.states)))
        return bool((self.formula(grad, *states, **self.options).abs() == 1).all())


# What differs from the optimizers' defaults. torch.optim.AdamW and DeepSpeed's take Adam's.
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "adam": {"betas": (0.9, 0.999), "eps": 1e-8},
    "ademamix": {
        "betas": (0.9, 0.999, 0.9999),
        "eps": 1e-8,
        "alpha": 5.0,
        "num_beta_slow_warmup_steps": 10000,
        "num_alpha_warmup_steps": 10000,
    },
    "laprop": {"betas": (0.9, 0.999), "eps": 1e-8},
    "lion": {"betas": (0.9, 0.99)},
    "signum": {"momentum": 0.95, "nesterov": True},
    "sim_ademamix": {
        "betas": (0.999, 0.999),
        "eps": 1e-8,
        "alpha": 2.0,
        "num_beta_fast_warmup_steps": 10000,
        "min_beta_fast": 0.9,
    },
}


# Rules of classes that have several, and what chooses them.
_CHOSEN: dict[str, dict[str, Any]] = {
    "amsgrad": _ARGUMENTS["adam"] | {"amsgrad": True},
    "rmsprop_centered": {"centered": True},
    "rmsprop_momentum": {"momentum": 0.9},
    "rmsprop_centered_momentum": {"centered": True, "momentum": 0.9},
}


def _rule(cls: type[ScalarOptimizer], name: str) -> Rule:
    arguments = _CHOSEN.get(name, _ARGUMENTS.get(name, {}))
    optimizer = cls([torch.zeros(1)], **arguments)  # type: ignore[call-arg]
    group = optimizer.param_groups[0]
    found = optimizer._rule_of(group)
    rule, state_keys = found.rule, found.state_names
    assert rule.name == name
    places = iter(found.keys)
    options: dict[str, Any] = {}
    for option in rule.hyperparameter_names:
        if option == "step":
            options[option] = 1000
        else:
            key = next(places)
            options[option] = group[key] if isinstance(key, str) else group[key[0]][key[1]]
    function = _by_position(rule)
    return Rule(name, function, rule.formula, rule.states, options, cls, state_keys, arguments)


def _by_position(rule: Any) -> Callable[..., Any]:
    """Return a rule's function, in a form that takes hyperparameters by position."""
    public = getattr(scalar_optimizers, f"calculate_{rule.name}_update", None)
    names = rule.hyperparameter_names
    if public is None:
        enter = rule.entry_point()
        return lambda *arguments, out=None: enter(*arguments, out)
    if inspect.signature(public).parameters[names[0]].kind is not inspect.Parameter.KEYWORD_ONLY:
        return public
    count = 1 + len(rule.states)

    def function(*arguments: Any, out: Any = None) -> Any:
        options = dict(zip(names, arguments[count:], strict=True))
        return public(*arguments[:count], **options, out=out)

    return function


def _rules() -> dict[str, Rule]:
    """Return the package's rules. Of two classes of a rule, the last one is measured: AdamW."""
    rules = [
        _rule(cls, rule.name)
        for cls in map(get_optimizer_cls, get_optimizer_names())
        if issubclass(cls, ScalarOptimizer)
        and cls.__module__.startswith(scalar_optimizers.__name__)
        for rule in (cls._rule, *cls._other_rules)
    ]
    return {rule.name: rule for rule in rules}


RULES = _rules()


# ---- shapes --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """The tensors of one call.

    Attributes:
        name: What the command line calls it.
        title: What a reader calls it.
        sizes: One shape per tensor.
        is_single: Whether the call takes a tensor, not a list of one.
    """

    name: str
    title: str
    sizes: Sequence[tuple[int, ...]] = field(repr=False)
    is_single: bool = False

    @property
    def varies(self) -> bool:
        """Whether the tensors have different shapes."""
        return len(set(self.sizes)) > 1


def _gpt2_sizes(
    width: int = 768, layers: int = 12, vocabulary: int = 50257, context: int = 1024
) -> list[tuple[int, ...]]:
    """Return the shapes of GPT-2's parameters, the small model's by default (124 million)."""
    norm: list[tuple[int, ...]] = [(width,), (width,)]
    layer: list[tuple[int, ...]] = [
        *norm,
        (width, 3 * width),
        (3 * width,),
        (width, width),
        (width,),
        *norm,
        (width, 4 * width),
        (4 * width,),
        (4 * width, width),
        (width,),
    ]
    return [(vocabulary, width), (context, width), *(layer * layers), *norm]


_SHAPES = (
    Shape("large", "one tensor of 48 Mi elements", [(48 * 1024 * 1024,)]),
    Shape("gpt2", "the 148 tensors of GPT-2 small", _gpt2_sizes()),
    Shape("1000x1000", "1000 tensors of 1000 elements", [(1000,)] * 1000),
    Shape("1000x8", "1000 tensors of 8 elements", [(8,)] * 1000),
    Shape("single", "a single tensor of 8 elements", [(8,)], is_single=True),
)
SHAPES = {shape.name: shape for shape in _SHAPES}


# ---- the tensors of a rule at a shape ------------------------------------------------------------


class Problem:
    """A rule at a shape, with the tensors that all contenders work on.

    Attributes:
        rule: The rule.
        shape: The shape.
        grads: One gradient per tensor of the shape.
        states: One such list per state of the rule.
        updates: Where contenders that take an ``out=`` put their update.
    """

    def __init__(
        self,
        rule: Rule,
        shape: Shape,
        dtype: torch.dtype = torch.float32,
        *,
        state_dtype: torch.dtype | None = None,
        device: str = "cpu",
        offsets: Sequence[int] | None = None,
    ) -> None:
        """Make the tensors.

        Args:
            rule: The rule.
            shape: The shape.
            dtype: Of gradients and updates.
            state_dtype: Of states, where that is another one.
            device: Where all tensors are.
            offsets: At which element of a buffer the tensors of each list begin: the gradients,
                each state's, the updates. Each is its buffer's first one without.
        """
        self.rule = rule
        self.shape = shape
        generator = torch.Generator(device).manual_seed(0)
        dtypes = [dtype, *([state_dtype or dtype] * len(rule.states)), dtype]
        fills = _state_fills(rule)
        lists = [
            [
                _at_offset(fill(size, generator=generator, device=device).to(to), offset)
                for size in shape.sizes
            ]
            for fill, to, offset in zip(
                (torch.randn, *fills, _zeros), dtypes, offsets or [0] * len(dtypes), strict=True
            )
        ]
        self.grads, *self.states, self.updates = lists

    @property
    def numel(self) -> int:
        """Elements of all gradients together."""
        return sum(grad.numel() for grad in self.grads)

    @property
    def nbytes(self) -> int:
        """Bytes that a step must move: gradient, states in and out, update.

        A cache line that is read only because it is about to be written is not counted.
        """
        once = sum(tensor.nbytes for tensor in (*self.grads, *self.updates))
        return once + 2 * sum(tensor.nbytes for state in self.states for tensor in state)

    def arguments(self) -> tuple[Any, ...]:
        """Return the gradient(s), then each of the states, as the package's function takes them."""
        return tuple(self.as_given(tensors) for tensors in (self.grads, *self.states))

    def as_given(self, tensors: list[Tensor]) -> Tensor | list[Tensor]:
        """Return the list itself, or its one tensor where the call takes a single tensor."""
        return tensors[0] if self.shape.is_single else tensors

    def positions(self) -> Iterator[tuple[Tensor, ...]]:
        """Return, tensor by tensor, the gradient and its states."""
        return zip(self.grads, *self.states, strict=True)


class OptimizerProblem:
    """A rule at a shape, with the tensors that all optimizers work on, in turn.

    Attributes:
        rule: The rule.
        shape: The shape.
        grads: One gradient per parameter.
        params: The parameters, each with its gradient.
        states: One list per state of the rule.
    """

    # What every optimizer is constructed with, beside the rule's own arguments: so large that an
    # error in either shows after a few steps.
    lr = 1e-2
    weight_decay = 0.1
    # The number of steps that each optimizer believes to have done.
    steps_done = 1000

    def __init__(self, rule: Rule, shape: Shape, device: str = "cpu") -> None:
        """Make the tensors."""
        self.rule = rule
        self.shape = shape
        generator = torch.Generator(device).manual_seed(0)
        self._take(
            *(
                [fill(size, generator=generator, device=device) for size in shape.sizes]
                for fill in (torch.randn, torch.randn, *_state_fills(rule))
            )
        )

    def _take(self, grads: list[Tensor], params: list[Tensor], *states: list[Tensor]) -> None:
        self.grads = grads
        self.params = [nn.Parameter(param) for param in params]
        self.states = list(states)
        for param, grad in zip(self.params, self.grads, strict=True):
            param.grad = grad

    def mapped(self, change: Callable[[list[Tensor]], list[Tensor]]) -> "OptimizerProblem":
        """Return the same problem on what is made of each list of tensors."""
        other = copy.copy(self)
        other._take(*map(change, (self.grads, *self.modified)))
        return other

    @property
    def arguments(self) -> dict[str, Any]:
        """What an optimizer is constructed with, beside the parameters."""
        return {"lr": self.lr, "weight_decay": self.weight_decay, **self.rule.arguments}

    @property
    def modified(self) -> list[list[Tensor]]:
        """What a step modifies: the parameters, then each of the states."""
        return [[param.detach() for param in self.params], *self.states]

    @property
    def nbytes(self) -> int:
        """Bytes that a step must move: gradient, and in and out the parameter and the states."""
        modified = sum(tensor.nbytes for tensors in self.modified for tensor in tensors)
        return sum(grad.nbytes for grad in self.grads) + 2 * modified


def _state_fills(rule: Rule) -> list[Callable[..., Tensor]]:
    # Squares keep away from 0: a quotient by almost 0 would need its own tolerance.
    return [_FILLS.get(name, _positive if "sq" in name else torch.randn) for name in rule.states]


def _positive(size: tuple[int, ...], generator: torch.Generator, device: str) -> Tensor:
    return torch.rand(size, generator=generator, device=device).add_(0.1)


def _small(size: tuple[int, ...], generator: torch.Generator, device: str) -> Tensor:
    return torch.randn(size, generator=generator, device=device).mul_(0.01)


# Small beside the average of squares, whose difference to its square is a variance.
_FILLS = {"grad_avg": _small}


def _zeros(size: tuple[int, ...], generator: torch.Generator, device: str) -> Tensor:
    return torch.zeros(size, device=device)


def _at_offset(tensor: Tensor, offset: int) -> Tensor:
    """Return the tensor, or a copy that begins at this element of a buffer and ends with it."""
    if offset == 0:
        return tensor
    buffer = tensor.new_empty(offset + tensor.numel())
    return buffer[offset:].view(tensor.shape).copy_(tensor)
