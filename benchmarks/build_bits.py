"""The cases in which `compare_builds.py --bits` compares two builds, and digests of their results.

Rules, their hyperparameters and the optimizers' options are read from the package, by its public
names alone. What is new there is tried as soon as `HYPERPARAMETERS` or `OPTIONS` has values for it;
until then it is an error.
"""

import ctypes
import hashlib
import inspect
import itertools
import logging
import math
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from emerging_optimizers import megatron, scalar_optimizers

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
F32, F64, BF16, F16 = DTYPES
_COMPLEX = (torch.complex64, torch.complex128)
# What a gradient and up to three states are stored as; rules with fewer take the last ones.
MIXES = (
    *((dtype,) * 4 for dtype in DTYPES),
    (BF16, F32, F32, F32),
    (F32, BF16, BF16, BF16),
    (F16, BF16, F16, F32),
    (F64, F16, F16, BF16),
    (F32, F32, F32, F64),
)
# Two chunks of a thread, and a bit.
LARGE = 2 * 16384 + 77
SPECIALS = (float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, -1e-40, 3e38, 65504.0)

# A case: its name, and what returns the values to compare.
Case = tuple[str, Callable[[], Iterable[Any]]]


# ---- digests -------------------------------------------------------------------------------------


def digest(run: Callable[[], Iterable[Any]]) -> str:
    """Return a digest of a case's values: where the package raised, the error's type and message.

    All NaNs are the same, since their signs and payloads are not promised.
    """
    found = hashlib.sha256()
    try:
        for value in run():
            found.update(_as_bytes(value))
    except (RuntimeError, TypeError, ValueError) as error:
        return " ".join(f"{type(error).__name__}: {error}".split())
    return found.hexdigest()


def _as_bytes(value: Any) -> bytes:
    """Return a tensor's layout and memory, gaps included, or what a number is printed as."""
    if not isinstance(value, Tensor):
        return repr(value).encode()
    value = value.detach()
    place = (value.dtype, tuple(value.shape), value.stride(), value.storage_offset())
    memory = value.untyped_storage()
    if value.dtype in (*DTYPES, *_COMPLEX):
        dtype = value.real.dtype
        numbers = torch.empty(0, dtype=dtype).set_(memory)
        is_nan = numbers.isnan()
        if is_nan.any():
            memory = numbers.masked_fill(is_nan, torch.nan).untyped_storage()
    return repr(place).encode() + ctypes.string_at(memory.data_ptr(), memory.nbytes())


# ---- layouts -------------------------------------------------------------------------------------


def _offset(values: Tensor) -> Tensor:
    buffer = torch.full((values.numel() + 9,), 7.0, dtype=values.dtype)
    return buffer[1 : 1 + values.numel()].view(values.shape).copy_(values)


def _transposed(values: Tensor) -> Tensor:
    return values.transpose(0, -1).contiguous().transpose(0, -1) if values.dim() else values


def _permuted(values: Tensor) -> Tensor:
    if values.dim() != 4:
        return _transposed(values)
    return values.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2)


def _channels_last(values: Tensor) -> Tensor:
    return values.contiguous(memory_format=torch.channels_last) if values.dim() == 4 else values


def _with_gaps(values: Tensor) -> Tensor:
    if not values.dim():
        return values
    buffer = torch.full((*values.shape[:-1], 2 * values.shape[-1]), 7.0, dtype=values.dtype)
    return buffer[..., ::2].copy_(values)


def _expanded(values: Tensor) -> Tensor:
    return values[:1].clone().expand(values.shape) if values.dim() else values


def _unchanged(values: Tensor) -> Tensor:
    return values


_Layout = Callable[[Tensor], Tensor]
# The layouts of the gradient, of the states and of `out`. Each list goes on with its last one.
LAYOUTS: dict[str, Sequence[_Layout]] = {
    "contiguous": [_unchanged],
    "offset": [_offset],
    "transposed": [_transposed],
    "permuted": [_permuted],
    "channels last": [_channels_last],
    "with gaps": [_with_gaps],
    "expanded grad": [_expanded, _unchanged],
    "transposed grad": [_transposed, _unchanged],
    "offset grad": [_offset, _unchanged],
    "channels-last state": [_unchanged, _channels_last, _unchanged],
    "state with gaps": [_unchanged, _with_gaps, _unchanged],
    "offset states": [_unchanged, _offset],
    "all different": [_with_gaps, _transposed, _offset, _permuted, _channels_last],
}


def _lay_out(values: Tensor, layout: str, index: int) -> Tensor:
    layouts = LAYOUTS[layout]
    return layouts[min(index, len(layouts) - 1)](values)


@cache
def _pool(has_specials: bool) -> Tensor:
    """Return numbers of both signs and of several decades, some zeros, and perhaps NaNs and so."""
    generator = torch.Generator().manual_seed(int(has_specials))
    shape = (1 << 17,)
    numbers = torch.randn(shape, dtype=F64, generator=generator)
    numbers *= 10 ** (torch.rand(shape, dtype=F64, generator=generator) * 6 - 4)
    choice = torch.rand(shape, generator=generator)
    numbers = torch.where(choice < 0.05, 0.0, numbers)
    if has_specials:
        index = torch.randint(len(SPECIALS), shape, generator=generator)
        numbers = torch.where(choice > 0.85, torch.tensor(SPECIALS, dtype=F64)[index], numbers)
    return numbers


def _numbers(
    shape: Sequence[int], dtype: torch.dtype, chance: random.Random, has_specials: bool
) -> Tensor:
    """Return a tensor of numbers, which are somewhere in the pool."""
    pool, count = _pool(has_specials), math.prod(shape)
    first, second = (chance.randrange(len(pool) - count) for _ in range(2))
    values = pool[first : first + count].view(tuple(shape))
    if dtype.is_complex:
        return torch.complex(values, pool[second : second + count].view(tuple(shape))).to(dtype)
    return values.to(dtype, copy=True)


# ---- the update functions ------------------------------------------------------------------------

# Values of each hyperparameter: the usual one first. Flags have both.
HYPERPARAMETERS: dict[str, Sequence[Any]] = {
    "momentum_beta": (0.9, 0.0, 0.99),
    "momentum_beta2": (None, 0.99, 0.0),
    "step": (3, 1, 2.0, 1000, 10**7, torch.tensor(5), torch.tensor(6.0)),
    "eps": (1e-8, 1e-3, 0.0),
    "alpha": (5.0, 0.0, 2.0),
    "rmsprop alpha": (0.99, 0.0, 0.5),
    "scale_log2": (0, 2, -10, 252),
    "num_beta_slow_warmup_steps": (None, 2, 10),
    "num_alpha_warmup_steps": (None, 2, 10),
    "num_beta_fast_warmup_steps": (None, 2, 10),
    "min_beta_fast": (0.9, 0.5, 0.25),
}
SIZES = (0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 127, 255, 1023, 1025, 4097)


def _betas(count: int) -> list[tuple[float, ...]]:
    return [(0.95, 0.999, 0.9999)[:count], (0.0,) * count, (0.9, 0.98, 0.5)[:count]]


def _values(owner: str, key: str) -> Sequence[Any]:
    is_own = key == "alpha" and "rmsprop" in owner.lower()
    return HYPERPARAMETERS[f"rmsprop {key}" if is_own else key]


class Function:
    """An update function, described by its signature."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._call = getattr(scalar_optimizers, name)
        signature = inspect.signature(self._call).parameters.values()
        tensors = next(iter(signature)).annotation
        self.num_states = sum(p.annotation == tensors for p in signature) - 1
        self._choices: dict[str, Sequence[Any]] = {}
        for parameter in signature:
            key = parameter.name
            if parameter.annotation == tensors or key == "out":
                continue
            if parameter.annotation is bool:
                self._choices[key] = (False, True)
            elif key == "betas":
                self._choices[key] = _betas(self.num_states)
            else:
                self._choices[key] = _values(name, key)

    def settings(self, num_random: int = 0) -> list[dict[str, Any]]:
        """Return the usual hyperparameters, all that differ from them in one, and random ones."""
        usual = {key: values[0] for key, values in self._choices.items()}
        found = [usual]
        for key, values in self._choices.items():
            found += [{**usual, key: value} for value in values[1:]]
        chance = random.Random(self.name)
        for _ in range(num_random):
            found.append({key: chance.choice(values) for key, values in self._choices.items()})
        return found

    def run(
        self,
        name: str,
        shapes: Sequence[Sequence[int]],
        dtypes: Sequence[torch.dtype],
        setting: dict[str, Any],
        layout: str = "contiguous",
        out: str | torch.dtype = "none",
        has_specials: bool = False,
        is_single: bool = False,
    ) -> list[Any]:
        """Call the function and return all its operands and its result.

        Args:
            name: The case's; the numbers depend on it.
            shapes: One for each position; a single tensor has the first one.
            dtypes: The gradient's and the states'.
            setting: Hyperparameters.
            layout: A key of `LAYOUTS`.
            out: "none", "grad", or the dtype of what is passed.
            has_specials: Whether there are NaNs, infinities and subnormal numbers.
            is_single: Whether it is called on tensors instead of lists.
        """
        chance = random.Random(name)
        if setting.get("use_shape_scaling"):  # of matrices alone
            shapes = [(shape[0], math.prod(shape[1:])) if shape else (1, 1) for shape in shapes]
        if is_single:
            shapes = shapes[:1]
        lists: list[list[Tensor]] = []
        for index in range(1 + self.num_states):
            dtype = dtypes[index - self.num_states - 1] if index else dtypes[0]
            values = [_numbers(shape, dtype, chance, has_specials) for shape in shapes]
            if index == self.num_states > 1:  # the average of squares
                values = [value.abs() for value in values]
            lists.append([_lay_out(value, layout, index) for value in values])
        given: list[Tensor] | None = None
        if out == "grad":
            given = lists[0]
        elif isinstance(out, torch.dtype):
            empty = [torch.full(tuple(shape), 3.0, dtype=out) for shape in shapes]
            given = [_lay_out(tensor, layout, len(lists)) for tensor in empty]
        setting = {k: v.clone() if isinstance(v, Tensor) else v for k, v in setting.items()}
        if is_single:
            result = self._call(
                *(tensors[0] for tensors in lists), **setting, out=given and given[0]
            )
            results = [result]
        else:
            results = list(self._call(*lists, **setting, out=given))
        return [*itertools.chain(*lists), *results, *setting.values()]


def _function_cases(function: Function) -> Iterator[Case]:
    """Yield cases of one rule."""
    settings = function.settings(num_random=16)
    usual = settings[0]
    matrix = {"use_shape_scaling": True} if "use_shape_scaling" in usual else {}
    small = [(1,), (8,), (17,), (3, 11), (130,)]
    various = [(3, 4, 5, 6), (), (2, 3, 4, 5), (0, 3), (37, 5), (67,)]

    def case(*words: Any, **arguments: Any) -> Case:
        name = " ".join((function.name, *(str(word).replace("torch.", "") for word in words)))
        return name, partial(function.run, name, **arguments)

    states = itertools.product(DTYPES, repeat=1 + function.num_states)
    for i, dtypes in enumerate(states):
        for has_specials in (False, True):
            out = ("none", "grad", *DTYPES)[(i + has_specials) % 6]
            setting = {**usual, "correct_bias": True} if "correct_bias" in usual else usual
            yield case(
                *("dtypes", *dtypes, "out", out, has_specials),
                shapes=small,
                dtypes=dtypes,
                setting=setting,
                out=out,
                has_specials=has_specials,
            )
    for (i, setting), mix in itertools.product(enumerate(settings), MIXES):
        for has_specials, is_single in itertools.product((False, True), repeat=2):
            yield case(
                *("setting", i, setting, *mix, has_specials, is_single),
                shapes=[(37, 5), *small],
                dtypes=mix,
                setting=setting,
                has_specials=has_specials,
                is_single=is_single,
            )
    for layout, mix, is_single in itertools.product(LAYOUTS, MIXES, (False, True)):
        for out in ("none", "grad", mix[0], F32):
            if out == "grad" and layout == "expanded grad":
                continue
            for setting in (usual, {**usual, **matrix}) if matrix else (usual,):
                yield case(
                    *("layout", layout, *mix, "out", out, is_single, setting is usual),
                    shapes=various,
                    dtypes=mix,
                    setting=setting,
                    layout=layout,
                    out=out,
                    has_specials=out == F32,
                    is_single=is_single,
                )
    for dtype, layout in itertools.product(DTYPES, ("contiguous", "offset", "with gaps")):
        for size in SIZES:
            yield case(
                *("size", size, dtype, layout),
                shapes=[(size,)],
                dtypes=(dtype,) * 4,
                setting=usual,
                layout=layout,
                is_single=True,
            )
    large = [(LARGE,), (5,), (3 * 16384 + 1,), (131, 257), (41, 3, 7, 61)]
    for mix, layout in itertools.product(MIXES, LAYOUTS):
        # Both among other tensors, some of them large, and alone.
        for setting, is_single in ((usual, True), (settings[-1], False)):
            yield case(
                *("large", layout, *mix, is_single),
                shapes=large[3:] if is_single else large,
                dtypes=mix,
                setting=setting,
                layout=layout,
                has_specials=not is_single,
                is_single=is_single,
            )
    for mix in MIXES:
        yield case("many", *mix, shapes=[(67,), (9, 7)] * 600, dtypes=mix, setting=usual)
        yield case("none", *mix, shapes=[], dtypes=mix, setting=usual)


# ---- the optimizers ------------------------------------------------------------------------------

# Values of each key of an optimizer's defaults. Flags have both; others that are missing here have
# the values of `HYPERPARAMETERS`.
OPTIONS: dict[str, Sequence[Any]] = {
    "lr": (1e-2, 0.3, 0.0, torch.tensor(0.02), torch.tensor([0.03], dtype=F64)),
    "weight_decay": (0.1, 0.0, 0.01),
    "weight_decay_method": ("decoupled", "independent", "l2", "palm"),
    "momentum": (0.9, 0.0),
    "fused": (None, True, False),
    "state_dtype": (None, F32, BF16, F16),
    "foreach": (None,),
    "set_grad_none": (None,),
    "differentiable": (False,),
    "amsgrad": (False, True),
}
# What is crossed with the options: of the parameters, and of what a step is given. The usual first.
SURROUNDINGS: dict[str, Sequence[Any]] = {
    "dtypes": ("float32", "float64", "bfloat16", "float16", "complex64", "all", "all but complex"),
    "is_large": (False, True),
    "has_specials": (False, True),
    "has_scaler": (False, True),
    "found_inf": (None, 0, 1, 2),  # the step that it skips
    "grad_multiplier": (None, 0.5, torch.tensor(0.25), torch.tensor(3.0, dtype=F64)),
    "misses_grads": (False, True),
    "changes_lr": (False, True),
    "grad_dtype": (None, F32, BF16, F16, F64),
}
ABSTRACT = (
    "ScalarOptimizer",
    "SingleMomentumOptimizer",
    "TwoMomentsOptimizer",
    "MegatronMixin",
)
NUM_STEPS = 3


class OptimizerCases:
    """An optimizer, and the options that its defaults show."""

    def __init__(self, module: Any, name: str) -> None:
        self.name = f"{module.__name__.rpartition('.')[2]}.{name}"
        self._cls = getattr(module, name)
        defaults = self._make([torch.nn.Parameter(torch.zeros(1))]).defaults
        if "amsgrad" in inspect.signature(self._cls).parameters:
            defaults["amsgrad"] = False  # the key is left out if it is not set
        self._choices: dict[str, Sequence[Any]] = {}
        for key, value in sorted(defaults.items()):
            if key in OPTIONS:
                self._choices[key] = OPTIONS[key]
            elif isinstance(value, bool):
                self._choices[key] = (value, not value)
            elif key == "betas":
                self._choices[key] = _betas(len(value))
            else:
                self._choices[key] = _values(name, key)

    def _make(self, params: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = self._cls(params)
        return optimizer

    def cases(self, num_random: int = 120) -> Iterator[Case]:
        """Yield what differs from the usual in one thing, with each dtype, and random cases."""
        usual = {key: values[0] for key, values in self._choices.items()}
        around = {key: values[0] for key, values in SURROUNDINGS.items()}

        def case(*words: Any, groups: list[dict[str, Any]], around: dict[str, Any]) -> Case:
            name = " ".join((self.name, *map(str, words)))
            return name, partial(self._run, name, groups, **around)

        for dtypes in SURROUNDINGS["dtypes"]:
            here = {**around, "dtypes": dtypes}
            yield case(dtypes, "usual", groups=[usual], around=here)
            for key, values in self._choices.items():
                for value in values[1:]:
                    groups = [_agreeing({**usual, key: value})]
                    yield case(dtypes, key, value, groups=groups, around=here)
            for key, values in SURROUNDINGS.items():
                for value in values[1:] if key != "dtypes" else ():
                    groups = [usual, {**usual, "lr": 0.5}]
                    yield case(dtypes, key, value, groups=groups, around={**here, key: value})
        chance = random.Random(self.name)
        for i in range(num_random):
            here = {key: self._choose(chance, key, values) for key, values in SURROUNDINGS.items()}
            groups = []
            for _ in range(chance.choice((1, 1, 2, 3))):
                options = {key: self._choose(chance, key, v) for key, v in self._choices.items()}
                groups.append(_agreeing(options))
            yield case("random", i, groups, here, groups=groups, around=here)

    @staticmethod
    def _choose(chance: random.Random, key: str, values: Sequence[Any]) -> Any:
        """Choose at random, but what takes long less often."""
        rare = {"fused": False, "is_large": True}
        chosen = chance.choice(values)
        return chance.choice(values) if key in rare and chosen == rare[key] else chosen

    def _run(
        self,
        name: str,
        groups: list[dict[str, Any]],
        *,
        dtypes: str,
        is_large: bool,
        has_specials: bool,
        has_scaler: bool,
        found_inf: int | None,
        grad_multiplier: float | Tensor | None,
        misses_grads: bool,
        changes_lr: bool,
        grad_dtype: torch.dtype | None,
    ) -> Iterator[Any]:
        """Make an optimizer, step it and yield all its tensors and numbers."""
        chance = random.Random(name)
        torch.manual_seed(0)
        given = []
        for options in groups:
            options = {k: v.clone() if isinstance(v, Tensor) else v for k, v in options.items()}
            params = []
            for dtype in _param_dtypes(dtypes):
                is_native = options["fused"] is True
                if is_native and dtype.is_complex:
                    continue  # an error
                shapes = _param_shapes(is_large, options.get("use_shape_scaling", False))
                for i, shape in enumerate(shapes):
                    values = _numbers(shape, dtype, chance, False)
                    layout = _param_layout(i)
                    if is_native and layout is _with_gaps:  # likewise
                        layout = _offset
                    params.append(torch.nn.Parameter(layout(values)))
            given.append({"params": params, **options})
        optimizer: Any = self._make(given)
        for step in range(NUM_STEPS):
            for group in optimizer.param_groups:
                for i, param in enumerate(group["params"]):
                    if misses_grads and i % 3 == step:
                        param.grad = param.decoupled_grad = None
                        continue
                    dtype = param.dtype
                    if grad_dtype is not None and not dtype.is_complex:
                        dtype = grad_dtype
                        param.grad_dtype = None
                    grad = _param_layout(i + step)(
                        _numbers(param.shape, dtype, chance, has_specials)
                    )
                    if i % 5 == 4:
                        grad = _expanded(grad)
                    if group.get("use_decoupled_grad"):
                        param.decoupled_grad = grad
                    else:
                        param.grad = grad
                if changes_lr and step and not isinstance(group["lr"], Tensor):
                    group["lr"] = (0.0, 0.25)[step - 1]
            optimizer.grad_scale = torch.tensor(64.0) if has_scaler else None
            optimizer.found_inf = (
                None if found_inf is None else torch.tensor(float(found_inf == step + 1))
            )
            optimizer.step(grad_multiplier=grad_multiplier)
        for group in optimizer.param_groups:
            yield from (group["lr"], group.get("step"))
            for param in group["params"]:
                yield from (param, param.grad, getattr(param, "decoupled_grad", None))
                state = optimizer.state.get(param, {})
                for key in sorted(state):
                    yield from (key, state[key])


def _agreeing(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options without those that cannot be combined."""
    if options["master_weights"]:
        options["stochastic_rounding"] = False
    if options.get("frob_normalize") and options["fused"]:
        options["fused"] = None
    return options


def _param_dtypes(dtypes: str) -> Sequence[torch.dtype]:
    if dtypes.startswith("all"):
        return DTYPES if "complex" in dtypes else (*DTYPES, *_COMPLEX)
    return [getattr(torch, dtypes)]


def _param_shapes(is_large: bool, are_matrices: bool) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = [(3, 5), (8, 1), (7, 9), (0, 4), (131, 257)]
    if are_matrices:
        return shapes[: 5 if is_large else 4]
    shapes = [(8,), (3, 5), (4, 3, 5, 2), (7, 9), (6, 10), (), (0, 4), (33,), (5, 6)]
    return [*shapes, (LARGE,), (131, 257)] if is_large else shapes


def _param_layout(index: int) -> _Layout:
    kinds = (_unchanged, _offset, _channels_last, _transposed, _with_gaps, _unchanged, _permuted)
    return kinds[index % len(kinds)]


# ---- all -----------------------------------------------------------------------------------------


def all_cases() -> Iterator[Case]:
    """Yield every case, in the same order in each process."""
    for name in sorted(scalar_optimizers.__all__):
        if inspect.isfunction(getattr(scalar_optimizers, name)):
            yield from _function_cases(Function(name))
    for module in (scalar_optimizers, megatron):
        for name in sorted(module.__all__):
            if inspect.isclass(getattr(module, name)) and name not in ABSTRACT:
                yield from OptimizerCases(module, name).cases()


def write_digests() -> None:
    """Print a line for each case: its name, a tab and its digest."""
    warnings.simplefilter("ignore")
    logging.disable()
    torch.set_num_threads(2)
    for name, run in all_cases():
        print(name, digest(run), sep="\t", flush=True)
