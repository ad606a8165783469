"""Rules in C++ with scalar states: the bits of the same rule in Python."""

import pickle
from typing import Any

import pytest
import torch
from cpp_texts import SCHEDULED
from interpreting import interpreted
from support import assert_equal_bits, needs_native
from test_cuda_scalar_states import scheduled_adam
from torch import Tensor
from torch.nn import Parameter

import emerging_optimizers as eo
from emerging_optimizers._user_rules import CppRule

pytestmark = [
    needs_native,
    pytest.mark.once,
    pytest.mark.usefixtures("_cache_of_module", "_no_other_rules"),
    pytest.mark.skipif("sys.platform == 'win32'", reason="rules are not compiled there"),
]
SIZES = (3, 0, 130, 5000)
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


@pytest.fixture
def loaded() -> CppRule:
    return eo.load_rule(SCHEDULED, defaults={"betas": (0.9, 0.999)})


def make(dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, dtype=F64, generator=generator).to(dtype) for n in SIZES]


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
def test_calls(loaded: CppRule, dtype: torch.dtype) -> None:
    results = []
    for rule in (loaded, interpreted(scheduled_adam)):
        states = [[torch.zeros(n, dtype=dtype) for n in SIZES] for _ in rule.states]
        product = torch.ones(())
        updates: list[Tensor] = []
        for step in range(1, 6):
            updates += rule(make(dtype, step), *states, step=step, mu_product=product)
        results.append([*updates, *states[0], *states[1], product])
    for got, wanted in zip(*results, strict=True):
        assert_equal_bits(got, wanted, "result")
    assert 0.0 < results[0][-1].item() < 0.1


def test_a_single_tensor(loaded: CppRule) -> None:
    assert loaded.scalar_states == {"mu_product": 1.0}
    assert repr(loaded) == (
        "<rule cpp_scheduled_adam(grad, exp_avg, exp_avg_sq, *, betas=(0.9, 0.999), step,"
        " mu_product, out=None)>"
    )
    tensors = [torch.ones(2) for _ in range(3)]
    product = torch.ones(())
    loaded(*tensors, step=1, mu_product=product)
    assert product.item() == torch.tensor(0.9 * (1 - 0.5 / 1.004)).item()
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'mu_product'"):
        loaded(*tensors, step=1)
    with pytest.raises(TypeError, match="mu_product must be a 0-dim tensor of dtype float32, not"):
        loaded(*tensors, step=1, mu_product=1.0)
    with pytest.raises(ValueError, match="the first beta is the larger"):
        loaded(*tensors, betas=(0.9, 0.5), step=1, mu_product=product)
    with pytest.raises(TypeError, match="defaults has 'mu_product', which rule ScheduledAdam does"):
        eo.load_rule(SCHEDULED, defaults={"mu_product": 1.0})
    again = pickle.loads(pickle.dumps(loaded))
    assert again.signature == loaded.signature


@pytest.mark.parametrize(
    ("dtype", "options"),
    [(F32, {}), (F64, {}), (BF16, {"master_weights": True}), (BF16, {"stochastic_rounding": True})],
    ids=["float32", "float64", "masters", "stochastic"],
)
def test_optimizer(loaded: CppRule, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Also with a parameter that joins late, a skipped step, and a checkpoint between."""

    class InCpp(eo.ScalarOptimizer, rule=loaded, lr=0.01):
        pass

    class InPython(eo.ScalarOptimizer, rule=interpreted(scheduled_adam), lr=0.01):  # type: ignore[call-arg]
        pass

    results = []
    for cls in (InCpp, InPython):
        torch.manual_seed(0)
        params = [Parameter(value) for value in make(dtype, 0)]
        optimizer: Any = cls(params, weight_decay=0.1, **options)
        for step in range(1, 7):
            for param, grad in zip(params, make(dtype, step), strict=True):
                param.grad = grad
            if step < 3:
                params[2].grad = None
            optimizer.found_inf = torch.tensor(float(step == 4))
            optimizer.step()
            del optimizer.found_inf
            if step == 3:
                saved = pickle.loads(pickle.dumps(optimizer.state_dict()))
                optimizer = cls(params)
                optimizer.load_state_dict(saved)
        states = [optimizer.state[param] for param in params]
        assert [int(state["step"]) for state in states] == [5, 5, 3, 5]
        assert states[2]["mu_product"] > states[0]["mu_product"]
        tensors = [tensor for state in states for _, tensor in sorted(state.items())]
        results.append([*(param.detach() for param in params), *tensors])
    for got, wanted in zip(*results, strict=True):
        assert_equal_bits(got, wanted, "result")


def test_compile(loaded: CppRule) -> None:
    tensors = [torch.zeros(2) for _ in range(2)]
    product = torch.ones(())

    def run(grad: Tensor) -> Any:
        return loaded(grad * 0.5, *tensors, step=1, mu_product=product)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    got = compiled(torch.tensor([2.0, -4.0]))
    others, other = [torch.zeros(2) for _ in range(2)], torch.ones(())
    wanted = loaded(torch.tensor([1.0, -2.0]), *others, step=1, mu_product=other)
    assert_equal_bits(got, wanted, "update")
    assert_equal_bits(product, other, "mu_product")
