"""Optimizers on `SingleMomentumOptimizer` and `TwoMomentsOptimizer`, as code for NVIDIA's has them.

Each has the rule of one of this package's classes, with which it is compared.
"""

import copy
import pickle
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pytest
import torch
from optimizers import assert_same, contents, make_params, run, set_grads
from support import assert_equal_bits
from torch import Tensor, nn

from emerging_optimizers import scalar_optimizers
from emerging_optimizers._native import native
from emerging_optimizers.scalar_optimizers import (
    SingleMomentumOptimizer,
    TwoMomentsOptimizer,
    base,
    update_functions,
)
from emerging_optimizers.scalar_optimizers.base import _validate_common_hparams

pytestmark = [
    pytest.mark.on_devices("tests-optimizers"),
    pytest.mark.builtin_rules("the bases take the built-in rules' functions"),
]

needs_native = pytest.mark.skipif(native is None, reason="there are no native kernels")
BF16 = torch.bfloat16
BETAS = (0.9, 0.99)


class Lion(SingleMomentumOptimizer):
    def __init__(
        self,
        params: Any,
        lr: Any = 1e-4,
        betas: Any = BETAS,
        weight_decay: float = 0.01,
        *,
        weight_decay_method: str = "decoupled",
        **options: Any,
    ) -> None:
        _validate_common_hparams(lr=lr, betas=betas, weight_decay=weight_decay)
        super().__init__(
            params,
            defaults={"lr": lr, "betas": betas, "weight_decay": weight_decay},
            update_fn=update_functions.calculate_lion_update,
            update_kwarg_names=("betas",),
            weight_decay_method=weight_decay_method,
            **options,
        )


class Signum(SingleMomentumOptimizer):
    """Leaves `use_shape_scaling` to the function's default."""

    def __init__(self, params: Any, lr: Any = 1e-3, nesterov: bool = False, **options: Any) -> None:
        super().__init__(
            params,
            defaults={
                "lr": lr,
                "momentum": 0.9,
                "nesterov": nesterov,
                "correct_bias": True,
                "weight_decay": 0.0,
            },
            update_fn=update_functions.calculate_signum_update,
            update_kwarg_names=("momentum", "correct_bias", "nesterov"),
            **options,
        )


class Adam(TwoMomentsOptimizer):
    update: Callable[..., Any] = staticmethod(update_functions.calculate_adam_update)
    names: ClassVar[dict[str, Any]] = {"correct_bias": True, "nesterov": False}

    def __init__(
        self, params: Any, lr: Any = 1e-3, betas: Any = (0.9, 0.999), **options: Any
    ) -> None:
        super().__init__(
            params,
            defaults={"lr": lr, "betas": betas, "eps": 1e-8, "weight_decay": 0.0, **self.names},
            update_fn=self.update,
            update_kwarg_names=("betas", "eps", *self.names),
            **options,
        )


class DocumentedAdam(Adam):
    update = staticmethod(scalar_optimizers.calculate_adam_update)
    names: ClassVar[dict[str, Any]] = {"correct_bias": True, "use_nesterov": False}


class SimplifiedAdEMAMix(Adam):
    update = staticmethod(update_functions.calculate_sim_ademamix_update)
    names: ClassVar[dict[str, Any]] = {
        "correct_bias": True,
        "num_beta_fast_warmup_steps": 3,
        "min_beta_fast": 0.5,
    }


class AdEMAMix(Adam):
    state_keys = ("exp_avg_fast", "exp_avg_slow", "exp_avg_sq")
    update = staticmethod(update_functions.calculate_ademamix_update)
    names: ClassVar[dict[str, Any]] = {
        "correct_bias": True,
        "num_beta_slow_warmup_steps": 3,
        "num_alpha_warmup_steps": 4,
    }

    def __init__(self, params: Any, betas: Any = (0.9, 0.999, 0.9999), **options: Any) -> None:
        super().__init__(params, betas=betas, **options)


class LaProp(TwoMomentsOptimizer):
    """Keeps the norms of parameters by hooks."""

    def __init__(self, params: Any, lr: Any = 1e-3, frob: bool = True, **options: Any) -> None:
        self.frob_normalize = frob
        self.seen: list[Any] = []
        super().__init__(
            params,
            defaults={"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "correct_bias": True},
            update_fn=update_functions.calculate_laprop_update,
            update_kwarg_names=("betas", "eps", "correct_bias"),
            **options,
        )

    def pre_step_inplace(self, p: Tensor, group: dict[str, Any]) -> Any:
        assert not torch.is_grad_enabled()
        self.seen.append((p, group, self.state[p]["step"].item()))
        return p.norm() if self.frob_normalize else None

    def post_step_inplace(self, p: Tensor, group: dict[str, Any], ctx: Any) -> None:
        if self.frob_normalize:
            p.mul_(ctx / p.norm().clamp_min(group["eps"]))


SIM: dict[str, Any] = {
    "betas": (0.9, 0.999),
    "num_beta_fast_warmup_steps": 3,
    "min_beta_fast": 0.5,
    "alpha": 2,
}
ADEMAMIX: dict[str, Any] = {"num_beta_slow_warmup_steps": 3, "num_alpha_warmup_steps": 4}
# Each subclass with the package's class, and the arguments with which that does the same.
PAIRS: list[tuple[type, type, Mapping[str, Any]]] = [
    (Lion, scalar_optimizers.Lion, {}),
    (Signum, scalar_optimizers.Signum, {}),
    (Adam, scalar_optimizers.Adam, {"weight_decay_method": "decoupled"}),
    (DocumentedAdam, scalar_optimizers.Adam, {"weight_decay_method": "decoupled"}),
    (SimplifiedAdEMAMix, scalar_optimizers.SimplifiedAdEMAMix, SIM),
    (AdEMAMix, scalar_optimizers.AdEMAMix, {**ADEMAMIX, "alpha": 2}),
]
every_pair = pytest.mark.parametrize(
    ("cls", "own", "arguments"), PAIRS, ids=[cls.__name__ for cls, *_ in PAIRS]
)
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "maximize": {"maximize": True},
    "half states": {"state_dtype": BF16},
    "masters": {"master_weights": True},
    "stochastic": {"stochastic_rounding": True},
    "capturable": {"capturable": True},
    "l2": {"weight_decay_method": "l2"},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))


def results(optimizer: Any, steps: int = 3) -> list[Tensor]:
    torch.manual_seed(0)
    params = optimizer.param_groups[0]["params"]
    for step in range(1, steps + 1):
        set_grads(params, step)
        optimizer.step(grad_multiplier=0.5)
    return contents(optimizer)


# ---- native --------------------------------------------------------------------------------------


@every_pair
@every_option
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_same_bits_as_the_class_of_the_rule(
    cls: Any, own: Any, arguments: Any, options: Any, dtype: torch.dtype, fused: bool | None
) -> None:
    got = results(cls(make_params(dtype=dtype), lr=0.1, fused=fused, **options))
    wanted = own(make_params(dtype=dtype), fused=fused, **{"lr": 0.1, **arguments, **options})
    assert_same(got, results(wanted))


@needs_native
@every_pair
def test_one_native_call(
    cls: Any, own: Any, arguments: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, returned = native.step, []

    def recorded(*arguments: Any) -> Any:
        returned.append(step(*arguments))
        return returned[-1]

    params = make_params()
    optimizer = cls([{"params": params[:1]}, {"params": params[1:], "lr": 0.5}])
    monkeypatch.setattr(native, "step", recorded)
    run(optimizer, params, [1, 2])
    assert returned == [None, None]


def test_defaults_of_the_function_apply() -> None:
    optimizer = Signum(make_params())
    assert optimizer.defaults["use_shape_scaling"] is False
    assert AdEMAMix(make_params()).param_groups[0]["alpha"] == 2


def test_a_value_that_is_not_passed_is_not_used() -> None:
    """A group's value is the function's only under a key in `update_kwarg_names`."""
    optimizer = SingleMomentumOptimizer(
        make_params(),
        {**Signum(make_params(), lr=0.1).defaults, "use_shape_scaling": True},
        update_fn=update_functions.calculate_signum_update,
        update_kwarg_names=("momentum", "correct_bias", "nesterov"),
    )
    torch.testing.assert_close(results(optimizer), results(Signum(make_params(), lr=0.1)))


# ---- hooks ---------------------------------------------------------------------------------------


def test_hooks_keep_norms(fused: bool | None) -> None:
    params = make_params()
    norms = [p.detach().norm() for p in params]
    optimizer = LaProp(params, lr=0.1, fused=fused)
    run(optimizer, params, [1, 2])
    torch.testing.assert_close([p.detach().norm() for p in params], norms)
    group = optimizer.param_groups[0]
    # The step counter is that of the update.
    wanted = [(p, step) for step in (1, 2) for p in params]
    assert [(id(p), step) for p, _, step in optimizer.seen] == [(id(p), s) for p, s in wanted]
    assert all(seen is group for _, seen, _ in optimizer.seen)
    # But for the norms, they are the rule's steps.
    got = results(LaProp(make_params(), lr=0.1, frob=False))
    torch.testing.assert_close(got, results(scalar_optimizers.LaProp(make_params(), lr=0.1)))


def test_hooks_with_a_tensor_as_rate_and_without_gradients() -> None:
    params = make_params()
    optimizer = LaProp(params, lr=torch.tensor(0.1))
    optimizer.step()
    assert not optimizer.seen
    params[1].grad = torch.ones_like(params[1])
    optimizer.step()
    ((param, group, _),) = optimizer.seen
    assert param is params[1]
    assert group is optimizer.param_groups[0]


def test_pre_hook_modifies_the_parameter_and_the_gradient(fused: bool | None) -> None:
    class Normalized(Adam):
        def pre_step_inplace(self, p: Tensor, group: dict[str, Any]) -> None:
            p.zero_()
            assert p.grad is not None
            p.grad = p.grad.fill_(2.0) if p is params[0] else torch.full_like(p, 2.0)

    params = make_params()
    optimizer = Normalized(params, lr=0.1, fused=fused)
    run(optimizer, params, [1, 2])
    for param in params:
        torch.testing.assert_close(param.detach(), torch.full_like(param, -0.1))


def test_hook_of_an_optimizer() -> None:
    params = make_params()
    optimizer = Adam(params, lr=0.1)
    optimizer.post_step_inplace = lambda p, group, ctx: p.zero_()  # type: ignore[method-assign]
    run(optimizer, params, [1])
    assert not any(p.any() for p in params)
    del optimizer.post_step_inplace
    run(optimizer, params, [2])
    assert all(p.all() for p in params)
    optimizer.pre_step_inplace = lambda p, group: setattr(p, "grad", None)  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match=r"\[0\]: pre_step_inplace has removed its gradient$"):
        run(optimizer, params, [3])


def test_hooks_and_masters() -> None:
    message = r"^LaProp overrides pre_step_inplace or post_step_inplace, which cannot be combined"
    params = make_params(dtype=BF16)
    with pytest.raises(ValueError, match=message):
        LaProp(params, master_weights=True)
    optimizer = LaProp(params[:1])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": params[1:], "master_weights": True})
    assert len(optimizer.param_groups) == 1
    set_grads(params, 1)
    for value in (True, "split"):
        optimizer.param_groups[0]["master_weights"] = value
        with pytest.raises(ValueError, match=f"{message} with master_weights={value!r}: "):
            optimizer.step()
    assert not optimizer.state


def test_init_group_of_a_subclass(fused: bool | None) -> None:
    class Counting(Adam):
        def _init_group(self, group: dict[str, Any], skip_non_grad_params: bool = True) -> None:
            assert not torch.is_grad_enabled()
            super()._init_group(group, skip_non_grad_params)
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p].setdefault("extra", torch.ones(2))

    params = make_params()
    optimizer = Counting(params, lr=0.1, fused=fused)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert list(optimizer.state) == params[:1]
    assert optimizer.state[params[0]]["extra"].tolist() == [1, 1]
    run(optimizer, params, [1])
    assert all("extra" in state for state in optimizer.state.values())
    loaded = Counting(params, lr=0.1, fused=fused)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert loaded.state[params[1]]["extra"].tolist() == [1, 1]


# ---- functions of others -------------------------------------------------------------------------


def heavy_ball(grad: Tensor, exp_avg: Tensor, *, momentum: float, how: str, step: int) -> Tensor:
    """Returns a state, and checks what it is given."""
    assert how == "checked here"
    assert type(step) is int
    assert grad.dtype == exp_avg.dtype
    assert not exp_avg.any() if step == 1 else exp_avg.any()
    return exp_avg.mul_(momentum).add_(grad)


class HeavyBall(SingleMomentumOptimizer):
    state_keys = ("momentum_buffer",)

    def __init__(self, params: Any, lr: float = 0.1, update: Any = heavy_ball, **options: Any):
        super().__init__(
            params,
            {"lr": lr, "momentum": 0.9, "how": "checked here", "weight_decay": 0.05},
            update_fn=update,
            update_kwarg_names=["momentum", "how"],
            **options,
        )


@pytest.mark.parametrize("options", [{}, {"maximize": True}, {"state_dtype": BF16}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, BF16], ids=str)
def test_foreign_function(options: Any, dtype: torch.dtype) -> None:
    if dtype == BF16:
        options = {**options, "master_weights": True, "state_dtype": torch.float32}
    params = make_params(dtype=dtype)
    optimizer = HeavyBall(params, **options)
    sign = -1.0 if options.get("maximize") else 1.0
    expected = [p.detach().double() for p in params]
    buffers = [torch.zeros_like(p) for p in expected]
    for step in range(1, 4):
        set_grads(params, step)
        optimizer.step()
        for p, param, buffer in zip(expected, params, buffers, strict=True):
            assert param.grad is not None
            buffer.mul_(0.9).add_(param.grad.double(), alpha=sign)
            p.sub_(0.1 * 0.05 * p + 0.1 * buffer)
    tolerance = 1e-2 if BF16 in (dtype, options.get("state_dtype")) else 1e-6
    for p, param in zip(expected, params, strict=True):
        torch.testing.assert_close(param.detach().double(), p, rtol=tolerance, atol=tolerance)
        state = optimizer.state[param]
        assert sorted(k for k in state if k != "master_param") == ["momentum_buffer", "step"]
        assert state["momentum_buffer"].dtype == (options.get("state_dtype") or dtype)
        assert state["step"] == 3


def test_update_is_not_modified() -> None:
    shared = torch.ones(3, 4)
    params = make_params([(3, 4)])
    optimizer = HeavyBall(params, update=lambda grad, m, **_: shared)
    run(optimizer, params, [1, 2])
    assert torch.equal(shared, torch.ones(3, 4))
    optimizer = HeavyBall(params, update=lambda grad, m, **_: grad)
    set_grads(params, 1)
    grad = params[0].grad
    assert grad is not None
    before = grad.clone()
    optimizer.step()
    assert_equal_bits(grad, before, "gradient")


def test_use_shape_scaling_is_passed_on() -> None:
    def update(grad: Tensor, m: Tensor, *, use_shape_scaling: str, step: int) -> Tensor:
        assert use_shape_scaling == "mine"
        return torch.ones_like(grad)

    params = make_params([(3,)])
    defaults = {"lr": 0.5, "use_shape_scaling": "mine"}
    optimizer = SingleMomentumOptimizer(
        params, defaults, update_fn=update, update_kwarg_names=("use_shape_scaling",)
    )
    before = params[0].detach().clone()
    run(optimizer, params, [1])
    torch.testing.assert_close(params[0].detach(), before - 0.5)


@pytest.mark.parametrize(
    ("returned", "kind", "message"),
    [
        (None, TypeError, r"update_fn \(wrong\) returned None; expected the update$"),
        (0.5, TypeError, r"update_fn \(wrong\) returned a float; expected the update$"),
        (torch.ones(2), ValueError, r"returned an update of shape \(2,\); expected \(3, 4\)$"),
        (torch.ones(3, 4, device="meta"), ValueError, r"returned an update on meta; expected"),
    ],
)
def test_wrong_updates(returned: Any, kind: type[Exception], message: str) -> None:
    def wrong(grad: Tensor, exp_avg: Tensor, **_: Any) -> Any:
        return returned

    params = make_params()
    optimizer = HeavyBall([("encoder.weight", params[0])], update=wrong)
    set_grads(params, 1)
    where = r"^param_groups\[0\]\['params'\]\[0\] \('encoder\.weight'\): "
    with pytest.raises(kind, match=f"{where}.*{message}"):
        optimizer.step()


def test_errors_of_the_function_pass_through() -> None:
    def failing(grad: Tensor, exp_avg: Tensor, **_: Any) -> Any:
        raise KeyError("of the function")

    params = make_params()
    set_grads(params, 1)
    with pytest.raises(KeyError, match="of the function"):
        HeavyBall(params, update=failing).step()


@needs_native
@pytest.mark.parametrize("cls", [LaProp, HeavyBall])
def test_fused_needs_a_native_step(cls: Any) -> None:
    params = make_params()
    optimizer = cls(params, fused=True)
    set_grads(params, 1)
    with pytest.raises(RuntimeError, match=rf"^fused=True, but {cls.__name__} has no native step"):
        optimizer.step()


def test_grad_scaler_skips_a_step() -> None:
    params = make_params()
    optimizer = LaProp(params)
    before = [p.detach().clone() for p in params]
    set_grads(params, 1)
    assert params[0].grad is not None
    params[0].grad[0] = float("inf")
    scaler = torch.amp.GradScaler(params[0].device.type)
    scaler.scale(torch.ones(1))
    scaler.step(optimizer)
    assert not optimizer.seen
    assert_same([p.detach() for p in params], before)


# ---- construction --------------------------------------------------------------------------------

LION = update_functions.calculate_lion_update
ADAM = update_functions.calculate_adam_update
_ADAM_NAMES = ("betas", "eps", "correct_bias", "nesterov")
_DEFAULTS = {"lr": 0.1, "betas": BETAS, "eps": 1e-8, "correct_bias": True, "nesterov": False}
WRONG: list[tuple[Any, Any, tuple[str, ...], dict[str, Any], type[Exception], str]] = [
    (SingleMomentumOptimizer, LION, ("betas",), {"lr": 0.1}, ValueError,
     r"^SingleMomentumOptimizer: defaults lacks 'betas', which update_kwarg_names has$"),
    (SingleMomentumOptimizer, LION, ("betas",), {"betas": BETAS}, ValueError,
     r"^SingleMomentumOptimizer: defaults lacks 'lr'$"),
    (SingleMomentumOptimizer, LION, (), _DEFAULTS, TypeError,
     r": calculate_lion_update needs 'betas', which update_kwarg_names lacks$"),
    (SingleMomentumOptimizer, LION, ("betas", "eps"), _DEFAULTS, TypeError,
     r": calculate_lion_update takes no 'eps', which is in update_kwarg_names; it takes 'betas'$"),
    (SingleMomentumOptimizer, ADAM, _ADAM_NAMES, _DEFAULTS, TypeError,
     r"^SingleMomentumOptimizer: calculate_adam_update takes 2 states \('exp_avg', 'exp_avg_sq'\),"
     r" but state_keys has 1 key \('exp_avg'\)$"),
    (TwoMomentsOptimizer, LION, ("betas",), _DEFAULTS, TypeError,
     r"takes 1 state \('exp_avg'\), but state_keys has 2 keys \('exp_avg', 'exp_avg_sq'\)$"),
    (TwoMomentsOptimizer, ADAM, _ADAM_NAMES, _DEFAULTS | {"eps": -1.0}, ValueError,
     r"^Invalid epsilon value: -1\.0$"),
    (SingleMomentumOptimizer, scalar_optimizers.calculate_lion_update, ("momentum_beta",),
     {"lr": 0.1, "momentum_beta": 0.9}, TypeError,
     r"^momentum_beta2 must be a number, not NoneType$"),
    (TwoMomentsOptimizer, None, (), _DEFAULTS, TypeError,
     r"^TwoMomentsOptimizer: update_fn must be callable, not NoneType$"),
    (SingleMomentumOptimizer, print, "lr", _DEFAULTS, TypeError,
     r": update_kwarg_names must be a tuple of names, not the str 'lr'$"),
    (SingleMomentumOptimizer, print, ("step",), _DEFAULTS, ValueError, r"'step', which is always"),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "function", "names", "defaults", "kind", "message"), WRONG)
def test_wrong_arguments(
    cls: Any,
    function: Any,
    names: tuple[str, ...],
    defaults: dict[str, Any],
    kind: type[Exception],
    message: str,
) -> None:
    with pytest.raises(kind, match=message):
        cls(make_params(), defaults, update_fn=function, update_kwarg_names=names)


def test_wrong_options_and_classes() -> None:
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'fuse'"):
        Lion(make_params(), fuse=True)
    with pytest.raises(ValueError, match=r"^Invalid weight_decay_method: 'adamw'"):
        Lion(make_params(), weight_decay_method="adamw")
    with pytest.raises(ValueError, match=r"Lion has no state 'exp_avg_sq'; it has 'exp_avg'"):
        Lion(make_params(), state_dtype={"exp_avg_sq": BF16})
    with pytest.raises(TypeError, match=r"^class Text: state_keys must be a tuple of names"):
        type("Text", (SingleMomentumOptimizer,), {"state_keys": "exp_avg"})
    with pytest.raises(ValueError, match=r"^class Same: state_keys must be different names, and"):
        type("Same", (SingleMomentumOptimizer,), {"state_keys": ("exp_avg", "exp_avg")})


def test_attributes() -> None:
    optimizer = Lion(make_params(), weight_decay_method="palm")
    assert optimizer.update_fn is update_functions.calculate_lion_update
    assert optimizer.update_kwarg_names == ("betas",)
    assert optimizer.weight_decay_method == "palm"
    assert optimizer.param_groups[0]["weight_decay_method"] == "palm"
    assert scalar_optimizers.SingleMomentumOptimizer is base.SingleMomentumOptimizer


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lr": -1}, r"^Invalid learning rate: -1$"),
        ({"lr": 0.1, "betas": (1.0, 0.9)}, r"^Invalid beta at index 0: 1\.0$"),
        ({"betas": (0.9, 0.9, -0.5)}, r"^Invalid beta at index 2: -0\.5$"),
        ({"eps": -1e-8}, r"^Invalid epsilon value: -1e-08$"),
        ({"weight_decay": float("nan")}, r"^Invalid weight_decay value: nan$"),
    ],
)
def test_validate_common_hparams(wrong: dict[str, Any], message: str) -> None:
    _validate_common_hparams()
    _validate_common_hparams(lr=torch.tensor(0.1), betas=(0.0, 0.5), eps=0, weight_decay=0.0)
    with pytest.raises(ValueError, match=message):
        _validate_common_hparams(**wrong)


# ---- copies and state dicts ----------------------------------------------------------------------


def pickled(optimizer: Any) -> Any:
    return pickle.loads(pickle.dumps(optimizer))


@pytest.mark.real
@pytest.mark.parametrize("cls", [Lion, LaProp, HeavyBall])
@pytest.mark.parametrize("copied_by", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_copies_continue(cls: Any, copied_by: Callable[[Any], Any]) -> None:
    params = make_params()
    optimizer = cls(params, lr=0.1)
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    run(optimizer, params, [1, 2])
    other = copied_by(optimizer)
    assert other.update_fn is optimizer.update_fn
    assert other.update_kwarg_names == optimizer.update_kwarg_names
    assert getattr(other, "frob_normalize", None) == getattr(optimizer, "frob_normalize", None)
    copied = other.param_groups[0]["params"]
    run(optimizer, params, [3])
    run(other, copied, [3])
    assert copied[0] is not params[0]
    assert_same(contents(other), contents(optimizer))


@every_pair
def test_state_dicts_both_ways(cls: Any, own: Any, arguments: Any) -> None:
    def make(kind: Any, params: list[nn.Parameter]) -> Any:
        return kind(params, **{"lr": 0.1, **({} if kind is cls else arguments)})

    params = make_params()
    reference = make(own, params)
    run(reference, params, [1, 2])
    for source, target in ((cls, own), (own, cls)):
        first_params, second_params = make_params(), make_params()
        first, second = make(source, first_params), make(target, second_params)
        run(first, first_params, [1])
        saved = copy.deepcopy(first.state_dict())
        if source is cls:
            for state in saved["state"].values():
                state["step"] = 1  # NVIDIA's is an int
        for p, q in zip(first_params, second_params, strict=True):
            q.data.copy_(p.data)
        second.load_state_dict(saved)
        run(second, second_params, [2])
        assert_same(contents(second), contents(reference))
