"""An optimizer's errors name the parameter, and come before anything is changed."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizers import MEGATRON, SETUPS, assert_same, contents, make_params, set_grads
from torch import Tensor

from emerging_optimizers import AdamW, LaProp, ScalarOptimizer, Signum, megatron
from emerging_optimizers._native import native

CLASSES: list[Any] = [*(setup.cls for setup in SETUPS), *MEGATRON.values()]
every_class = pytest.mark.parametrize(
    "cls",
    CLASSES,
    ids=lambda cls: f"{cls.__module__.removeprefix('emerging_optimizers.')}.{cls.__name__}",
)
every_path = pytest.mark.parametrize(
    "fused",
    [
        False,
        None,
        pytest.param(True, marks=pytest.mark.skipif(native is None, reason="no native kernels")),
    ],
    ids=["fallback", "native where possible", "native"],
)
named_or_not = pytest.mark.parametrize("named", [False, True], ids=["", "named"])


def make(cls: Any, fused: bool | None, named: bool = False, **options: Any) -> ScalarOptimizer:
    """An optimizer after one step, with an added group of two parameters."""
    params = make_params([(3, 4)] * 3)
    first, *others = (
        zip(["first", "second", "encoder.weight"], params, strict=True) if named else params
    )
    optimizer: ScalarOptimizer = cls([first], **options)
    optimizer.param_groups[0]["fused"] = fused
    optimizer.add_param_group({"params": others, "fused": fused})
    set_grads(params, 1)
    optimizer.step()
    set_grads(params, 2)
    return optimizer


def refused(
    optimizer: ScalarOptimizer, expected: type[Exception], message: str, named: bool = False
) -> None:
    """Assert that a step's error names the group's last parameter, and that no other changes."""
    label = "param_groups[1]['params'][1]" + (" ('encoder.weight')" if named else "")
    others = [p for group in optimizer.param_groups for p in group["params"]][:2]
    before = contents_of(optimizer, others)
    with pytest.raises(expected, match=f"^{re.escape(f'{label}: {message}')}") as caught:
        optimizer.step()
    assert type(caught.value) is expected
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert_same(contents_of(optimizer, others), before)


def contents_of(optimizer: ScalarOptimizer, params: list[Tensor]) -> list[Tensor]:
    found = [t for p in params for t in (p, *optimizer.state[p].values())]
    return [tensor.detach().clone() for tensor in found]


def set_state(change: Callable[[Tensor], Any], name: str = "") -> Callable[..., None]:
    def apply(optimizer: ScalarOptimizer, param: Any) -> None:
        key = name or optimizer._state_names[-1]
        optimizer.state[param][key] = change(optimizer.state[param][key])

    return apply


def set_param(value: Tensor) -> Callable[..., None]:
    def apply(optimizer: ScalarOptimizer, param: Any) -> None:
        value.grad = value.detach().clone()
        optimizer.param_groups[1]["params"][1] = value

    return apply


def set_grad(change: Callable[[Tensor], Tensor]) -> Callable[..., None]:
    return lambda optimizer, param: setattr(param, "grad", change(param.grad))


def set_data(value: Tensor) -> Callable[..., None]:
    return lambda optimizer, param: setattr(param, "data", value)


def free(what: str) -> Callable[..., None]:
    def apply(optimizer: ScalarOptimizer, param: Any) -> None:
        tensor = param.grad if what == "grad" else param
        tensor.untyped_storage().resize_(0)

    return apply


def inference(optimizer: ScalarOptimizer, param: Any) -> None:
    with torch.inference_mode():
        set_state(torch.clone)(optimizer, param)


# {cls} is the class's name, {state} the rule's last state.
ROWS: dict[str, tuple[Callable[..., None], type[Exception], str]] = {
    "sparse gradient": (
        set_grad(Tensor.to_sparse), RuntimeError,
        "{cls} does not support sparse gradients, and its gradient has layout torch.sparse_coo;"
        " make it dense (.to_dense()), or use torch.optim.SparseAdam"),
    "sparse parameter": (
        set_param(torch.eye(3).to_sparse()), TypeError,
        "the parameter has layout torch.sparse_coo; expected a strided (dense) tensor"),
    "other shape": (
        set_data(torch.zeros(5)), RuntimeError,
        "the parameter has shape (5,) but its gradient has shape (3, 4)"),
    "integers": (
        set_param(torch.ones(3, dtype=torch.int64)), TypeError,
        "the parameter has dtype torch.int64, which cannot be optimized"),
    "freed gradient": (
        free("grad"), ValueError, "its gradient has no memory: its storage was resized to 0"),
    "freed parameter": (
        free("param"), ValueError, "the parameter has no memory: its storage was resized to 0"),
    "state's shape": (
        set_state(lambda t: torch.zeros(4)), ValueError,
        "state '{state}' has shape (4,) but the parameter has shape (3, 4)"),
    "no tensor for a state": (
        set_state(lambda t: 0), TypeError, "state '{state}' must be a Tensor, not int"),
    "complex state": (
        set_state(lambda t: t.to(torch.complex64)), TypeError,
        "the parameter has dtype torch.float32 but state '{state}' has dtype torch.complex64"),
    "integers for a state": (
        set_state(Tensor.int), TypeError,
        "the parameter has dtype torch.float32 but state '{state}' has dtype torch.int32"),
    "meta state": (
        set_state(lambda t: t.to("meta")), ValueError,
        "the parameter is on cpu but state '{state}' is on meta"),
    "sparse state": (
        set_state(Tensor.to_sparse), TypeError,
        "state '{state}' has layout torch.sparse_coo; expected a strided (dense) tensor"),
    "inference state": (
        inference, RuntimeError,
        "state '{state}' is an inference tensor, which cannot be modified outside of inference"),
    "steps": (
        set_state(lambda t: -t, "step"), ValueError,
        "state 'step' is -1; expected a number of steps"),
}  # fmt: skip


def culprit(cls: Any, fused: bool | None, what: str, named: bool) -> None:
    change, error, message = ROWS[what]
    optimizer = make(cls, fused, named)
    change(optimizer, optimizer.param_groups[1]["params"][1])
    message = message.format(cls=cls.__name__, state=next(reversed(optimizer._state_names), None))
    refused(optimizer, error, message, named)


@every_path
@named_or_not
@pytest.mark.parametrize("what", ROWS)
def test_the_parameter_is_named(fused: bool | None, what: str, named: bool) -> None:
    culprit(AdamW, fused, what, named)


@every_class
@pytest.mark.parametrize("what", ["sparse gradient", "other shape", "state's shape"])
def test_every_class_names_the_parameter(cls: Any, what: str) -> None:
    if what == "state's shape" and not cls._state_names:
        pytest.skip("the rule has no states")
    for fused in (False, None):
        culprit(cls, fused, what, named=True)


def jagged(tensor: Tensor) -> Tensor:
    return torch.nested.nested_tensor(list(tensor), layout=torch.jagged)


DECOUPLED: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "CSR": (
        Tensor.to_sparse_csr, RuntimeError,
        "{cls} does not support sparse gradients, and its gradient has layout torch.sparse_csr;"),
    "jagged": (jagged, TypeError, "its gradient is a nested tensor; expected a strided (dense)"),
    "nested": (
        lambda t: torch.nested.nested_tensor(list(t)), TypeError,
        "its gradient is a nested tensor; expected a strided (dense)"),
    "mkldnn": (
        Tensor.to_mkldnn, TypeError,
        "its gradient has layout torch._mkldnn; expected a strided (dense) tensor"),
    "quantized": (
        lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.quint8), TypeError,
        "the parameter has dtype torch.float32 but its gradient has dtype torch.quint8"),
    "complex": (
        lambda t: t.to(torch.complex64), TypeError,
        "the parameter has dtype torch.float32 but its gradient has dtype torch.complex64"),
    "meta": (
        lambda t: t.to("meta"), ValueError, "the parameter is on cpu but its gradient is on meta"),
    "number": (lambda t: 1.0, TypeError, "its gradient must be a Tensor, not float"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["FusedAdam", "LaProp"])
@every_path
@pytest.mark.parametrize("what", DECOUPLED)
def test_gradients_of_every_kind(name: str, fused: bool | None, what: str) -> None:
    """Nothing checks `decoupled_grad` when it is set, so that a step must."""
    change, error, message = DECOUPLED[what]
    optimizer = make(getattr(megatron, name), fused, named=True)
    for group in optimizer.param_groups:
        group["use_decoupled_grad"] = True
        for param in group["params"]:
            param.decoupled_grad = param.grad
    param.decoupled_grad = change(param.grad)
    refused(optimizer, error, message.format(cls=name), named=True)


@pytest.mark.parametrize("cls", [AdamW, LaProp, megatron.FusedAdam])
@every_path
@named_or_not
def test_gradients_that_are_no_tensors(cls: Any, fused: bool | None, named: bool) -> None:
    optimizer = make(cls, fused, named)
    before = contents(optimizer)
    params = optimizer.param_groups[1]["params"]
    param, params[1] = params[1], "weight"
    label = r"param_groups\[1\]\['params'\]\[1\]" + (r" \('encoder\.weight'\)" if named else "")
    with pytest.raises(TypeError, match=f"^{label} must be a Tensor, not str$"):
        optimizer.step()
    params[1] = param
    assert_same(contents(optimizer), before)


@pytest.mark.parametrize("cls", [Signum, megatron.Signum])
@every_path
@named_or_not
def test_shape_scaling(cls: Any, fused: bool | None, named: bool) -> None:
    optimizer = make(cls, fused, named, use_shape_scaling=True)
    set_param(torch.nn.Parameter(torch.ones(5)))(optimizer, None)
    message = "use_shape_scaling needs 2-D parameters; this one has shape (5,)"
    refused(optimizer, ValueError, message, named)


@every_class
@pytest.mark.skipif(native is None, reason="no native kernels")
@named_or_not
def test_no_native_step(cls: Any, named: bool) -> None:
    optimizer = make(cls, True, named)
    before = contents(optimizer)
    set_param(torch.ones(3, 8)[:, ::2])(optimizer, None)
    label = "param_groups[1]['params'][1]" + (" ('encoder.weight')" if named else "")
    message = f"fused=True, but {cls.__name__} has no native step for {label}; fused=None uses"
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}"):
        optimizer.step()
    assert_same(contents(optimizer)[: len(before) // 3 * 2], before[: len(before) // 3 * 2])


@pytest.mark.parametrize("frob_normalize", [False, True])
@every_path
def test_masters(frob_normalize: bool, fused: bool | None) -> None:
    params = make_params([(3, 4)] * 2, dtype=torch.bfloat16)
    optimizer = LaProp(params, master_weights=True, frob_normalize=frob_normalize, fused=fused)
    set_grads(params, 1)
    optimizer.step()
    before = contents(optimizer)[: len(contents(optimizer)) // 2]
    optimizer.state[params[1]]["master_param"] = torch.zeros(3)
    message = "param_groups[0]['params'][1]: state 'master_param' has shape (3,) but the parameter"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        optimizer.step()
    assert_same(contents(optimizer)[: len(before)], before)


def test_megatrons_states_are_named() -> None:
    optimizer: Any = make(megatron.FusedAdam, None, named=True)
    param = optimizer.param_groups[1]["params"][1]
    label = re.escape("param_groups[1]['params'][1] ('encoder.weight'): ")
    with pytest.raises(KeyError, match=f"{label}the parameter has no state 'momentum'; it has"):
        optimizer.get_unscaled_state(param, "momentum")
    with pytest.raises(ValueError, match=rf"^{label}'exp_avg' has shape \(1,\); expected \(3, 4\)"):
        optimizer.set_scaled_state(param, "exp_avg", torch.zeros(1))
    with pytest.raises(TypeError, match=f"^{label}'exp_avg' is set from numbers"):
        optimizer.set_scaled_state(param, "exp_avg", torch.zeros(3, 4, dtype=torch.int16))
    with pytest.raises(ValueError, match=f"^{label}store_param_remainders=True, but"):
        optimizer.initialize_state(param, store_param_remainders=True)
    with pytest.raises(KeyError, match="none of the optimizer's groups: the parameter has no"):
        optimizer.get_unscaled_state(torch.zeros(3), "exp_avg")
