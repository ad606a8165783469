"""What surrounds a rule: handlers of errors, values from outside, code that is not copied."""

import argparse
import array
import collections
import contextlib
import cProfile
import dataclasses
import enum
import functools
import itertools
import math
import numbers  # noqa: F401
import os  # noqa: F401
import sys
import time  # noqa: F401
import types
import uuid  # noqa: F401
from time import perf_counter  # noqa: F401
from typing import Any

import numpy as np
import pytest
import torch
from test_rule_rejections import refusal as refusal_in

import emerging_optimizers as eo

# ---- handlers ------------------------------------------------------------------------------------


def refusal(body: str) -> str:
    """Return the error of a rule that sees this file's names."""
    return refusal_in(body, **globals())[0]


# Exceptions of Python's arithmetic, which native code does not have.
CAUGHT = {
    "ZeroDivisionError": "try:\n    k = 1 / (step - 1)\nexcept ZeroDivisionError:\n    k = 1.0",
    "ValueError": "try:\n    k = math.log(step - 1)\nexcept ValueError as error:\n    k = 1.0",
    "OverflowError": "try:\n    k = h**9\nexcept (TypeError, OverflowError):\n    k = 1.0",
    "ArithmeticError": "import contextlib\nwith contextlib.suppress(ArithmeticError):\n    k = h",
}


@pytest.mark.parametrize("name", CAUGHT)
def test_errors_that_native_code_never_raises(name: str) -> None:
    error = refusal(f"{CAUGHT[name]}\nreturn grad * k, a * h")
    assert f"bad handles {name}, which native code never raises: test the operand" in error


def divides(x: Any) -> Any:
    return 1 / x


@contextlib.contextmanager
def without_errors() -> Any:
    try:
        yield
    except ValueError:
        return


HANDLERS = [
    ("k = 1\nwith without_errors():\n    k = math.sqrt(h)", "ValueError"),
    ("try:\n    k = 1 / step\nexcept:\n    k = 1.0", "every error"),
    ("try:\n    k = divides(step)\nexcept Exception:\n    k = 1.0", "Exception"),
    ("try:\n    k = n % step\nexcept (KeyError, BaseException) as e:\n    k = 1.0", "KeyError and"),
    ("try:\n    k = n // h\nexcept KeyError:\n    k = 2\nexcept:\n    k = 1.0", "every error"),
    ("try:\n    k = math.sqrt(h)\nexcept (ValueError, TypeError):\n    k = 1.0", "ValueError and"),
    (
        "E = (KeyError, ValueError)\ntry:\n    k = math.log(h)\nexcept E:\n    k = 1.0",
        "KeyError and",
    ),
    ("try:\n    k = h**n\nexcept Exception:\n    k = 1.0", "Exception"),
    (
        "try:\n    try:\n        k = 1 / h\n    finally:\n        k = 2.0\nexcept:\n    pass",
        "every error",
    ),
    (
        "import contextlib\nk = 1\nwith contextlib.suppress(ValueError):\n    k = math.log(h)",
        "ValueE",
    ),
    ("import contextlib\nk = 1\nwith contextlib.suppress(Exception):\n    k = h / step", "Excep"),
]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="code has no tables of handlers")
@pytest.mark.parametrize(("body", "name"), HANDLERS, ids=[body for body, _ in HANDLERS])
def test_handlers_around_arithmetic(body: str, name: str) -> None:
    error = refusal(f"{body}\nreturn grad * k, a * h")
    assert f"handles {name}" in error
    assert "which native code never raises: test the operand first" in error


# ---- values from outside -----------


# What would keep a value from step to step in Python, and be a constant in native code.
class Counter:
    count = 0

    def __init__(self) -> None:
        self.own = 0
        self.items = [0]

    @classmethod
    def of_class(cls) -> int:
        cls.count += 1
        return cls.count

    def attribute(self) -> int:
        self.own += 1
        return self.own

    def item(self) -> int:
        self.items[0] += 1
        return self.items[0]


def tick() -> int:
    tick.count += 1  # type: ignore[attr-defined]
    return tick.count  # type: ignore[attr-defined]


def remembered(seen: list[Any] = []) -> int:  # noqa: B006
    seen.append(1)
    return len(seen)


tick.count = 0  # type: ignore[attr-defined]


@dataclasses.dataclass(frozen=True)
class Frozen:
    count: int = 0


class Slotted:
    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class Rows(list):  # type: ignore[type-arg]
    pass


class Table(collections.defaultdict):  # type: ignore[type-arg]
    pass


class Counting(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: int) -> int:
        self.get_buffer("count").add_(1)
        return x


counter, FROZEN, MODULE = Counter(), Frozen(), Counting()
COMMAND_LINE, INTEGERS, BYTES = argparse.Namespace(count=0), array.array("i", [0]), bytearray(1)
SLOTTED, ROWS, TABLE = Slotted(), Rows(), Table(int)
GENERATOR = torch.Generator()
LIST, DICT, SET = [0], {"count": 0}, {0}
COUNTS: collections.Counter[str] = collections.Counter()
TENSOR, ARRAY = torch.zeros(()), np.zeros(1)
FUNCTIONS: list[Any] = [math.sqrt]
NAMESPACE, DEQUE = types.SimpleNamespace(count=0), collections.deque([0])
NUMBERS_FROM_0 = itertools.count()
KEPT = [
    ("LIST[0] += 1", "the rule modifies a list outside of it: a rule keeps nothing but its states"),
    ("LIST.append(h)", "the rule modifies a list outside of it"),
    ("DICT['count'] += 1", "the rule modifies a dict outside of it"),
    ("FUNCTIONS.append(h)", "the rule modifies a list outside of it"),
    ("DEQUE.append(1)", "the rule modifies a deque outside of it"),
    ("NAMESPACE.count += 1", "the rule modifies a SimpleNamespace outside of it"),
    ("SET.add(len(SET))", "the rule modifies a set outside of it"),
    ("COUNTS['x'] += 1", "the rule modifies a Counter outside of it"),
    ("TENSOR.add_(1)", "the rule modifies a Tensor outside of it"),
    ("ARRAY[0] += 1", "the rule modifies a ndarray outside of it"),
    ("remembered()", "the rule modifies a list outside of it"),
    ("tick()", "the rule modifies tick outside of it"),
    ("Counter.of_class()", "the rule modifies Counter outside of it"),
    ("Counter.count += 1", "the rule modifies Counter outside of it"),
    ("counter.attribute()", "the rule assigns own of an object outside of it: a rule keeps"),
    ("counter.item()", "the rule modifies a list outside of it"),
    ("COMMAND_LINE.count += 1", "the rule modifies a Namespace outside of it"),
    ("INTEGERS[0] += 1", "the rule modifies a array outside of it"),
    ("BYTES[0] += 1", "the rule modifies a bytearray outside of it"),
    ("BYTES.append(1)", "the rule modifies a bytearray outside of it"),
    ("counter.__dict__['own'] += 1", "the rule modifies a Counter outside of it"),
    ("object.__setattr__(FROZEN, 'count', 1)", "the rule modifies a Frozen outside of it"),
    ("vars(FROZEN)['count'] = 1", "the rule modifies a Frozen outside of it"),
    ("object.__setattr__(SLOTTED, 'count', 1)", "the rule modifies a Slotted outside of it"),
    ("ROWS.append(1)", "the rule modifies a Rows outside of it"),
    ("ROWS.count = 1", "the rule assigns count of an object outside of it"),
    ("TABLE['count'] += 1", "the rule modifies a Table outside of it"),
    ("MODULE(0)", "the rule modifies a Tensor outside of it"),
    ("TENSOR.data.add_(1)", "the rule modifies a Tensor outside of it"),
    (
        "torch.empty(()).uniform_(generator=GENERATOR)",
        "the rule modifies a Generator outside of it",
    ),
    ("h *= time.time()", "time: is another value in each process, and a rule is traced once"),
    ("h *= perf_counter()", "perf_counter: is another value in each process"),
    ("h *= uuid.uuid4().int", "uuid4: is another value in each process"),
    ("h *= os.urandom(1)[0]", "urandom: is another value in each process"),
    ("math.count = 1", "the rule assigns math.count: a rule keeps nothing but its states"),
    ("next(NUMBERS_FROM_0)", "the rule reads a count outside of it, which changes: use a tuple"),
    ("def f():\n    global LIST\n    LIST = []\nf()", "assigns LIST, a variable outside of it"),
]


@pytest.mark.parametrize(("statement", "reason"), KEPT, ids=[s for s, _ in KEPT])
def test_values_that_would_be_kept(statement: str, reason: str) -> None:
    error = refusal(f"{statement}\nreturn grad, a * h")
    assert reason in error
    assert (LIST, DICT, SET, counter.items, counter.own) == ([0], {"count": 0}, {0}, [0], 0)
    assert (Counter.count, tick.count) == (0, 0)  # type: ignore[attr-defined]
    assert remembered.__defaults__ == ([],)


# ---- code that is not copied ------


class Mode(enum.Enum):
    LARGE = 1

    def scale(self, x: Any) -> Any:
        return x * 2 if isinstance(x, (float, torch.Tensor)) else x


class Registered:
    def __init_subclass__(cls) -> None:
        pass


class WithMetaclass(metaclass=type("Meta", (type,), {})):
    def scale(self, x: Any) -> Any:
        return x * 2 if isinstance(x, (float, torch.Tensor)) else x


class OfAnother(Registered):
    scale = WithMetaclass.scale


class Factor(float):
    scale = WithMetaclass.scale


class Layer(torch.nn.Module):
    forward = WithMetaclass.scale


WITHOUT_A_COPY = {
    "method of an Enum": "Mode.LARGE.scale(grad)",
    "of a per-step number": "grad * Mode(1).scale(h)",
    "class with a metaclass": "WITH_METACLASS.scale(grad)",
    "class with __init_subclass__": "OF_ANOTHER.scale(x=grad)",
    "class of numbers": "FACTOR.scale(grad)",
    "module in a module of PyTorch": "LAYERS(grad)",
}
WITH_METACLASS, OF_ANOTHER, FACTOR = WithMetaclass(), OfAnother(), Factor(2.0)
LAYERS = torch.nn.Sequential(Layer())


@pytest.mark.parametrize("profiler", [lambda frame, event, argument: None, cProfile.Profile()])
def test_a_profiler_goes_on(profiler: Any) -> None:
    is_native = isinstance(profiler, cProfile.Profile)
    profiler.enable() if is_native else sys.setprofile(profiler)
    before = sys.getprofile()
    try:
        assert ".scale cannot be traced where it is" in refusal("return Mode(1).scale(grad), a * h")
        assert sys.getprofile() is before
    finally:
        profiler.disable() if is_native else sys.setprofile(None)


@pytest.mark.parametrize("name", WITHOUT_A_COPY)
def test_functions_that_are_not_copied(name: str) -> None:
    before = sys.getprofile()
    error = refusal(f"a.add_(grad)\nreturn {WITHOUT_A_COPY[name]}")
    assert ".scale cannot be traced where it is: make it a function of the module, or a" in error
    assert "return x * 2 if isinstance(x" in error or "def scale" in error
    assert sys.getprofile() is before


# ---- types and texts that are not values -------


@functools.singledispatch
def by_class(x: Any) -> Any:
    return x


UNKNOWN = [
    (
        "match h:\n    case numbers.Real():\n        h = 1",
        "the class of a per-step number: use isinst",
    ),
    ("match step:\n    case numbers.Integral():\n        h = 1", "the class of a per-step number"),
    ("h *= by_class(step)", "the class of a per-step number"),
    ("h *= issubclass(h.__class__, float)", "the class of a per-step number: use isinstance"),
    ("h *= str(step) == '3'", "the text of a per-step number, which has no value while the rule"),
    ("h *= {'1': 3.0}.get(f'{step}', 1.0)", "the text of a per-step number"),
    ("h *= len(str(step))", "the text of a per-step number"),
    ("h *= '1' in str(step)", "the text of a per-step number"),
    ("h *= repr(step)[0] == 'a' and str(step)[0] == '1'", "the text of a per-step number"),
]


@pytest.mark.parametrize(("statement", "reason"), UNKNOWN, ids=[s for s, _ in UNKNOWN])
def test_types_and_texts(statement: str, reason: str) -> None:
    assert reason in refusal(f"{statement}\nreturn grad * h, a * h")


def test_a_tensor_is_a_tensor_in_match() -> None:
    @eo.rule
    def surroundings_matched(grad, *, h=2.0):
        match grad:
            case torch.Tensor():
                grad = grad * h
        return grad * issubclass(grad.__class__, torch.Tensor)

    assert surroundings_matched(torch.tensor([1.0])).item() == 2.0
