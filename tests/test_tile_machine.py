"""The tile machine gives the compiled rules' bits, for all rules and on every instruction set."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreting import compiled, interpreted, needs_compiler
from rule_references import GALLERY_RULES
from support import assert_equal_bits, needs_native
from test_rule_bits import SETTINGS as BITS
from test_rule_bits import gradients
from torch import Tensor

import emerging_optimizers as eo
from emerging_optimizers._native import native

pytestmark = [needs_native, pytest.mark.usefixtures("_no_other_device")]

SETTINGS: dict[str, tuple[Any, dict[str, Any]]] = {
    f"{rule}-{case}": (rule.rule, values)
    for rule in GALLERY_RULES.values()
    for case, values in rule.cases.items()
} | {f"{rule.name}-{i % 2}": (rule, values) for i, (rule, values) in enumerate(BITS)}
every_setting = pytest.mark.parametrize(("rule", "values"), SETTINGS.values(), ids=list(SETTINGS))
# Around the lengths of vectors, tiles, the driver's tiles and its pieces.
SIZES = (0, 1, 7, 16, 127, 128, 129, 255, 256, 257, 513, 4097)
STEPS = (1, 2, 3, 6, 40)


def arguments(rule: Any, values: dict[str, Any], step: int) -> dict[str, Any]:
    return values | ({"step": step} if rule.signature.has_step else {})


def make_scalars(rule: Any) -> dict[str, Tensor]:
    return {name: torch.tensor(first) for name, first in rule.scalar_states.items()}


# ---- calls ---------------------------------------------------------------------------------------

DTYPES = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
]


@needs_compiler
@every_setting
@pytest.mark.parametrize(("grad_dtype", "state_dtype"), DTYPES, ids=str)
def test_calls(
    rule: Any, values: dict[str, Any], grad_dtype: torch.dtype, state_dtype: torch.dtype
) -> None:
    rules = (compiled(rule), interpreted(rule))
    lists = [
        [[torch.zeros(n, dtype=state_dtype) for n in SIZES] for _ in rule.states] for _ in rules
    ]
    scalars = [make_scalars(rule) for _ in rules]
    for step in STEPS:
        grads = [gradients(step + i, n, grad_dtype) for i, n in enumerate(SIZES)]
        wanted, got = (
            each(grads, *states, **arguments(rule, values, step), **own)
            for each, states, own in zip(rules, lists, scalars, strict=True)
        )
        assert scalars[0] == scalars[1]
        for name, one, other in zip(
            ("update", *rule.states), (wanted, *lists[0]), (got, *lists[1]), strict=True
        ):
            for i in range(len(SIZES)):
                assert_equal_bits(other[i], one[i], f"step {step}: {name}[{i}]")


@needs_compiler
@every_setting
def test_an_update_in_the_gradients_place(rule: Any, values: dict[str, Any]) -> None:
    grads = [gradients(1, 600, torch.float32) for _ in range(2)]
    states = [[torch.ones(600) for _ in rule.states] for _ in range(2)]
    for each, grad, own in zip((compiled(rule), interpreted(rule)), grads, states, strict=True):
        each(grad, *own, **arguments(rule, values, 2), **make_scalars(rule), out=grad)
    for i, (one, other) in enumerate(zip(states[0], states[1], strict=True)):
        assert_equal_bits(other, one, rule.states[i])
    assert_equal_bits(grads[1], grads[0], "update")


# ---- optimizers ----------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "l2, maximize": {"weight_decay_method": "l2", "maximize": True},
    "masters": {"master_weights": True},
    "stochastic rounding": {"stochastic_rounding": True},
}


def make_optimizer(rule: Any, params: list[Tensor], options: dict[str, Any]) -> Any:
    class Optimizer(eo.ScalarOptimizer, rule=rule, lr=0.02):
        """An optimizer of a rule."""

    return Optimizer(params, weight_decay=0.1, **options)


@needs_compiler
@every_setting
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_steps(rule: Any, values: dict[str, Any], options: dict[str, Any]) -> None:
    is_bfloat16 = "master_weights" in options or "stochastic_rounding" in options
    dtype = torch.bfloat16 if is_bfloat16 else torch.float32
    sizes = SIZES[1:]
    lists = [
        [torch.nn.Parameter(gradients(50 + i, n, dtype)) for i, n in enumerate(sizes)]
        for _ in range(2)
    ]
    optimizers = [
        make_optimizer(each, params, values | options)
        for each, params in zip((compiled(rule), interpreted(rule)), lists, strict=True)
    ]
    for step in range(1, 5):
        grads = [gradients(step + i, n, dtype) for i, n in enumerate(sizes)]
        for params, optimizer in zip(lists, optimizers, strict=True):
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
            torch.manual_seed(step)  # of the stochastic rounding
            optimizer.step()
        for i, (one, other) in enumerate(zip(*lists, strict=True)):
            assert_equal_bits(other.detach(), one.detach(), f"step {step}: params[{i}]")
            states = [o.state[p] for o, p in zip(optimizers, (one, other), strict=True)]
            for name, value in states[0].items():
                assert_equal_bits(states[1][name], value, f"step {step}: {name} of params[{i}]")


# ---- instruction sets ----------------------------------------------------------------------------

_WORKER = """
import hashlib, sys
import torch
import test_tile_machine as tests
mode, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
for name, (rule, values) in tests.SETTINGS.items():
    rule = getattr(tests, mode)(rule)
    digest = hashlib.sha256()
    for dtype in (torch.float32, torch.float64):
        grads = [tests.gradients(i, n, dtype) for i, n in enumerate((*tests.SIZES, 70_001))]
        states = [[torch.zeros_like(g) for g in grads] for _ in rule.states]
        params = [torch.nn.Parameter(g.clone()) for g in grads]
        scalars = tests.make_scalars(rule)
        optimizer = tests.make_optimizer(rule, params, values)
        for step in (1, 2, 6):
            updates = rule(grads, *states, **tests.arguments(rule, values, step), **scalars)
            for param, grad in zip(params, grads):
                param.grad = grad
            optimizer.step()
        results = (t.detach() for tensors in (updates, *states, params) for t in tensors)
        for tensor in results:
            tensor = torch.where(tensor.isnan(), torch.full_like(tensor, float("nan")), tensor)
            digest.update(tensor.view(torch.uint8).numpy().tobytes())
    print(name, digest.hexdigest())
"""


def _digests(mode: str, isa: str, threads: int) -> list[str]:
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"EMERGING_OPTIMIZERS_ISA": isa, "PYTHONPATH": path}
    if mode == "interpreted":
        environment["EMERGING_OPTIMIZERS_JIT"] = "0"
    command = [sys.executable, "-c", _WORKER, mode, str(threads)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@needs_compiler
@pytest.mark.once
def test_instruction_sets() -> None:
    assert native is not None
    wanted = _digests("compiled", native.active_isa(), 1)
    assert len(wanted) == len(SETTINGS)
    for isa in native.supported_isas():
        assert _digests("interpreted", isa, 1) == wanted, isa
    assert _digests("interpreted", native.active_isa(), 2) == wanted


# ---- large rules ---------------------------------------------------------------------------------


def _rule_of_many(name: str, count: int) -> Any:
    """Return a rule with many values that are needed at the same time."""
    lines = [f"    x{i} = grad * {i + 1}.5 + state" for i in range(count)]
    ordered = " - ".join(f"x{i} * x{count - 1 - i}" for i in range(count))
    text = f"@eo.rule\ndef {name}(grad, state):\n" + "\n".join(lines)
    namespace: dict[str, Any] = {"eo": eo}
    exec(f"{text}\n    return {ordered}, state + grad\n", namespace)
    return namespace[name]


@pytest.mark.parametrize("count", [20, 40, 70, 150])
def test_many_values_at_a_time(count: int) -> None:
    rule = interpreted(_rule_of_many(f"tiles_many_{count}", count))
    for dtype in (torch.float32, torch.float64):
        grad, state = (gradients(seed, 1000, dtype) for seed in (1, 2))
        wanted = rule.formula(grad, state)
        update = rule(grad, state)
        for name, got, want in zip(("update", "state"), (update, state), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True, msg=name)


def test_too_many_values() -> None:
    with pytest.raises(eo.RuleError, match="tiles_too_many: its formula has too many values"):
        _rule_of_many("tiles_too_many", 300)


def test_many_conditions() -> None:
    """The registers of one branch are used again in the other."""
    conditions = "\n".join(
        f"    if step % {n + 2} == 0:\n        h = h * {n + 2} + step ** 0.5" for n in range(8)
    )
    head = "@eo.rule\ndef tiles_conditions(grad, *, h=0.5, step):\n"
    text = f"{head}{conditions}\n    return grad * h\n"
    namespace: dict[str, Any] = {"eo": eo}
    exec(text, namespace)
    rule = interpreted(namespace["tiles_conditions"])
    grad = torch.ones(3, dtype=torch.float64)
    for step in (1, 2, 6, 7, 60, 2520):
        torch.testing.assert_close(rule(grad, step=step), rule.formula(grad, h=0.5, step=step))


def test_the_sign_of_a_nan_is_not_copied() -> None:
    @eo.rule
    def tiles_nan_sign(grad, state):
        update = torch.copysign(grad, grad - state)
        state.mul_(0.5)
        return update

    nan, inf = float("nan"), float("inf")
    update = interpreted(tiles_nan_sign)(
        torch.tensor([-1.0, 2.0, -inf, 4.0]), torch.tensor([nan, 3.0, -inf, -nan])
    )
    assert update.tolist() == [1.0, -2.0, inf, 4.0]


# ---- the constructor of the C++ text -------------------------------------------------------------


@needs_compiler
@pytest.mark.usefixtures("_quick_builds")
@pytest.mark.parametrize("name", ["adopt", "radam", "adabound", "rprop", "bits_all"])
def test_constants_of_the_text(name: str) -> None:
    """Compiled loops get the interpreter's constants; CUDA kernels call the constructor."""
    rule, _ = next(each for each in SETTINGS.values() if each[0].name == name)
    text = re.sub(r"EMOPT_RULE\(.*\)", "", rule.source)
    loaded = eo.load_rule(text.replace(f'kName = "{name}"', f'kName = "{name}_text"'))
    for each, values in SETTINGS.values():
        if each is not rule:
            continue
        states = [[torch.ones(300) for _ in rule.states] for _ in range(2)]
        values = {**rule.signature.defaults, **values}
        for step in (1, 2, 5, 6, 7, 50, 999, 123_456):
            grad = gradients(step, 300, torch.float32)
            updates = [
                called(grad, *own, **arguments(rule, values, step))
                for called, own in zip((interpreted(rule), loaded), states, strict=True)
            ]
            for one, other in zip((updates[0], *states[0]), (updates[1], *states[1]), strict=True):
                assert_equal_bits(other, one, f"{values}, step {step}")
