"""Invalid hyperparameters are rejected wherever they come from, before anything is changed."""

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from optimizers import MEGATRON, SETUPS, assert_same, contents, make_params, run, set_grads
from torch import Tensor
from torch.optim.lr_scheduler import LinearLR

from emerging_optimizers import (
    Adam,
    AdamW,
    Lion,
    RMSprop,
    ScalarOptimizer,
    _fallback_step,
    megatron,
)
from emerging_optimizers._checkpoint import KEPT_ON_LOAD
from emerging_optimizers._hyperparameters import Beta
from emerging_optimizers._rule import Rule

CLASSES = [*(setup.cls for setup in SETUPS), *MEGATRON.values()]
NAN = math.nan
NO_OPTIONS = ("bias_correction", "foreach", "state_dtype")  # of the classes in `megatron`
TEXT = "; convert it with float()"
YAML = "; YAML reads 1e-4 as text: write 1.0e-4, or convert it with float()"


# By key: invalid values, each with its error and the message up to the group's name.
Rows = Mapping[str, list[tuple[Any, type[Exception], str]]]


def flag_rows(key: str, expected: str = "a bool") -> list[tuple[Any, type[Exception], str]]:
    return [
        ("yes", TypeError, f"{key} must be {expected}, not str ('yes')"),
        ("False", TypeError, f"{key} must be {expected}, not str ('False')"),
        (1, TypeError, f"{key} must be {expected}, not int (1)"),
        (0, TypeError, f"{key} must be {expected}, not int (0)"),
        (None, TypeError, f"{key} must be {expected}, not NoneType"),
        (torch.ones(2), TypeError, f"{key} must be {expected}, not Tensor"),
        (torch.tensor(True, device="meta"), TypeError, f"{key} must be {expected}, not Tensor"),
        (np.ones(2), TypeError, f"{key} must be {expected}, not ndarray"),
    ]


def beta_rows(key: str, title: str) -> list[tuple[Any, type[Exception], str]]:
    return [
        (1.0, ValueError, f"Invalid {title}: 1.0"),
        (-1, ValueError, f"Invalid {title}: -1"),
        (NAN, ValueError, f"Invalid {title}: nan"),
        ("0.9", TypeError, f"{key} must be a number, not str ('0.9'){TEXT}"),
    ]


def warmup_rows(key: str) -> list[tuple[Any, type[Exception], str]]:
    expected = f"{key} must be a whole number or None"
    return [
        ("3", TypeError, f"{expected}, not str ('3'){TEXT}"),
        (2.5, TypeError, f"{key} is 2.5; expected a whole number"),
        (torch.tensor(2.5), TypeError, f"{key} is 2.5; expected a whole number"),
        (np.array([1, 2]), TypeError, f"{expected}, not ndarray"),
        (torch.tensor([1.0, 2.0]), TypeError, f"{expected}, not Tensor"),
        (torch.tensor(3, device="meta"), TypeError, f"{expected}, not Tensor"),
        (10**400, ValueError, f"{key} is beyond the range of int64"),
        (-(2.0**64), ValueError, f"{key} is beyond the range of int64"),
        (-1, ValueError, f"Invalid {key}: -1"),
        ([3], TypeError, f"{expected}, not list"),
    ]


ROWS: Rows = {
    "lr": [
        ("1e-4", TypeError, "lr must be a number, not str ('1e-4')" + YAML),
        ("fast", TypeError, "lr must be a number, not str ('fast')"),
        (None, TypeError, "lr must be a number, not NoneType"),
        ([0.1], TypeError, "lr must be a number, not list"),
        (-1, ValueError, "Invalid learning rate: -1"),
        (NAN, ValueError, "Invalid learning rate: nan"),
        (-math.inf, ValueError, "Invalid learning rate: -inf"),
        (torch.tensor(-0.5), ValueError, "Invalid learning rate: -0.5"),
        (torch.tensor(NAN), ValueError, "Invalid learning rate: nan"),
        (torch.ones(2), ValueError, "Tensor lr must be 1-element"),
        (torch.tensor(0.5 + 1j), TypeError, "lr must be a number, not Tensor"),
        (np.bytes_(b"1"), TypeError, "lr must be a number, not bytes_"),
    ],
    "weight_decay": [
        (torch.tensor(0.1, device="meta"), TypeError, "weight_decay must be a number, not Tensor"),
        ("0.1", TypeError, "weight_decay must be a number, not str ('0.1')" + TEXT),
        (None, TypeError, "weight_decay must be a number, not NoneType"),
        (-0.5, ValueError, "Invalid weight_decay value: -0.5"),
        (NAN, ValueError, "Invalid weight_decay value: nan"),
    ],
    "weight_decay_method": [
        ("l1", ValueError, "Invalid weight_decay_method: 'l1'; expected one of 'decoupled', "),
        (["l2"], TypeError, "weight_decay_method must be a str, not list"),
        (None, TypeError, "weight_decay_method must be a str, not NoneType"),
        (np.array(["l2", "l1"]), TypeError, "weight_decay_method must be a str, not ndarray"),
    ],
    "state_dtype": [
        (torch.float64, ValueError, "Invalid state_dtype: torch.float64; expected torch.float32"),
        (
            "bfloat16",
            TypeError,
            'state_dtype must be a dtype, "8bit", a dict of them or None, not str',
        ),
        (
            np.array([1, 2]),
            TypeError,
            'state_dtype must be a dtype, "8bit", a dict of them or None, not',
        ),
    ],
    "eps": [
        (torch.tensor(0.1, device="meta"), TypeError, "eps must be a number, not Tensor"),
        ("1e-4", TypeError, "eps must be a number, not str ('1e-4')" + YAML),
        (-1e-8, ValueError, "Invalid epsilon value: -1e-08"),
        (NAN, ValueError, "Invalid epsilon value: nan"),
    ],
    "momentum": beta_rows("momentum", "momentum"),
    "momentum_beta": beta_rows("momentum_beta", "momentum_beta"),
    "scale": [
        (-1.0, ValueError, "Invalid scale: -1.0"),
        ("2", TypeError, f"scale must be a number, not str ('2'){TEXT}"),
    ],
    "min_beta_fast": beta_rows("min_beta_fast", "min_beta_fast"),
    "alpha": [
        (NAN, ValueError, "Invalid alpha: nan"),
        ("2", TypeError, f"alpha must be a number, not str ('2'){TEXT}"),
    ],
    **{
        key: warmup_rows(key)
        for key in (
            "num_alpha_warmup_steps",
            "num_beta_slow_warmup_steps",
            "num_beta_fast_warmup_steps",
        )
    },
    **{
        key: flag_rows(key)
        for key in (
            "maximize",
            "capturable",
            "stochastic_rounding",
            "differentiable",
            "correct_bias",
            "bias_correction",
            "nesterov",
            "use_nesterov",
            "use_shape_scaling",
            "frob_normalize",
            "amsgrad",
            "centered",
            "use_decoupled_grad",
            "store_param_remainders",
        )
    },
    "master_weights": [
        *flag_rows("master_weights", "a bool or 'split'"),
        ("Split", TypeError, "master_weights must be a bool or 'split', not str ('Split')"),
        (b"split", TypeError, "master_weights must be a bool or 'split', not bytes"),
    ],
    **{
        key: [("no", TypeError, f"{key} must be a bool or None, not str ('no')")]
        for key in ("fused", "foreach")
    },
}

# Its momentum may be 1 or more; its alpha may not.
RMSPROP_ROWS: Rows = {
    "alpha": beta_rows("alpha", "alpha"),
    "momentum": [
        ("0.9", TypeError, "momentum must be a number, not str ('0.9')" + TEXT),
        (-0.5, ValueError, "Invalid momentum: -0.5"),
        (NAN, ValueError, "Invalid momentum: nan"),
        (None, TypeError, "momentum must be a number, not NoneType"),
    ],
}


def rows_of(optimizer: ScalarOptimizer) -> list[tuple[str, Any, type[Exception], str]]:
    group = optimizer.param_groups[0]
    ignored = () if optimizer._state_names else ("state_dtype",)
    rows = {**ROWS, **RMSPROP_ROWS} if isinstance(optimizer, RMSprop) else ROWS
    keys = [key for key in rows if key in group and key not in ignored]
    found = [(key, *row) for key in keys for row in rows[key]]
    for first in optimizer._state_names[:1]:
        dtype = 'state_dtype must be a dtype, "8bit", a dict of them or None, not int (16)'
        found += [
            ("state_dtype", {first: torch.int8}, ValueError, "Invalid state_dtype: torch.int8; "),
            ("state_dtype", {first: 16}, TypeError, dtype),
            ("state_dtype", {"no": torch.float32}, ValueError, "Invalid state_dtype: "),
        ]
    if "betas" in group:
        title = "beta parameter" if isinstance(optimizer, Adam) else "beta"
        last = len(group["betas"]) - 1
        for wrong, error, message in beta_rows(f"betas[{last}]", f"{title} at index {last}"):
            found.append(("betas", (*group["betas"][:-1], wrong), error, message))
        found += [
            ("betas", 0.9, TypeError, "betas must be a sequence of numbers, not float (0.9)"),
            ("betas", (0.9,), ValueError, f"betas has 1 values; expected {last + 1}"),
            ("betas", np.float32(0.9), TypeError, "betas must be a sequence of numbers, not float"),
            ("betas", torch.tensor(0.9), TypeError, "betas must be a sequence of numbers, not T"),
        ]
    return found


def refused(
    expected: type[Exception], message: str, where: str, call: Callable[[], object]
) -> None:
    with pytest.raises(expected) as caught:
        call()
    assert type(caught.value) is expected
    assert str(caught.value).startswith(message)
    assert str(caught.value).endswith(where)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


every_class = pytest.mark.parametrize(
    "cls",
    CLASSES,
    ids=lambda cls: f"{cls.__module__.removeprefix('emerging_optimizers.')}.{cls.__name__}",
)


def make(cls: Any, fused: bool | None = None) -> tuple[ScalarOptimizer, list[Any]]:
    """An optimizer with two groups, after one step."""
    params = make_params([(3, 4), (5, 2)])
    optimizer = cls([{"params": params[:1], "fused": fused}, {"params": params[1:]}])
    for group in optimizer.param_groups:
        group["fused"] = fused
    run(optimizer, params, [1])
    set_grads(params, 2)
    return optimizer, params


@every_class
def test_in_the_constructor_and_in_an_added_group(cls: Any) -> None:
    optimizer, params = make(cls)
    names = inspect.signature(cls).parameters
    takes_all = "options" in names
    groups = copy.deepcopy([{**g, "params": []} for g in optimizer.param_groups])
    for key, value, error, message in rows_of(optimizer):
        if key in names or (takes_all and key not in NO_OPTIONS):
            refused(error, message, "", lambda k=key, v=value: cls(make_params(), **{k: v}))
        added = {"params": make_params([(2,)]), key: value}
        where = f" (param_groups[2][{key!r}])"
        refused(error, message, where, lambda added=added: optimizer.add_param_group(added))
    assert [{**g, "params": []} for g in optimizer.param_groups] == groups
    run(optimizer, params, [2])


@every_class
@pytest.mark.parametrize("fused", [False, None], ids=["fallback", "native where possible"])
def test_set_later(cls: Any, fused: bool | None) -> None:
    optimizer, _ = make(cls, fused)
    before, rng = contents(optimizer), torch.get_rng_state()
    group = optimizer.param_groups[1]
    for key, value, error, message in rows_of(optimizer):
        right, group[key] = group[key], value
        refused(error, message, f" (param_groups[1][{key!r}])", optimizer.step)
        group[key] = right
    assert_same(contents(optimizer), before)
    assert torch.equal(torch.get_rng_state(), rng)
    optimizer.step()
    assert not torch.equal(contents(optimizer)[-2], before[-2])


@every_class
def test_in_a_loaded_state_dict(cls: Any) -> None:
    optimizer, _ = make(cls)
    before, saved = contents(optimizer), optimizer.state_dict()
    groups = copy.deepcopy([{**g, "params": []} for g in optimizer.param_groups])
    for key, value, error, message in rows_of(optimizer):
        state_dict = copy.deepcopy(saved)
        state_dict["param_groups"][1][key] = value
        state_dict["param_groups"][0]["weight_decay"] = 0.25
        if key in KEPT_ON_LOAD or (type(value) is int and value in (0, 1)):
            continue
        where = f" (the loaded param_groups[1][{key!r}])"
        refused(error, message, where, lambda s=state_dict: optimizer.load_state_dict(s))
    assert [{**g, "params": []} for g in optimizer.param_groups] == groups
    assert_same(contents(optimizer), before)


@pytest.mark.parametrize("fused", [False, None], ids=["fallback", "native where possible"])
def test_conflicts_set_later(fused: bool | None) -> None:
    optimizer, _ = make(AdamW, fused)
    before = contents(optimizer)
    group = optimizer.param_groups[1]
    for changes, error, message in (
        ({"differentiable": True}, ValueError, "AdamW does not support differentiable=True: "),
        *(
            (
                {"master_weights": masters, "stochastic_rounding": True},
                ValueError,
                "master_weights and stochastic_rounding cannot be combined: ",
            )
            for masters in (True, "split")
        ),
        (
            {"fused": True, "foreach": True},
            RuntimeError,
            "`fused` and `foreach` cannot be `True` together.",
        ),
    ):
        right = dict(group)
        group.update(changes)  # type: ignore[arg-type]
        refused(error, message, " (param_groups[1])", optimizer.step)
        group.update(right)
    assert_same(contents(optimizer), before)


@pytest.mark.parametrize("fused", [False, None], ids=["fallback", "native where possible"])
@pytest.mark.parametrize("begun", [False, True])
def test_invalid_multiplier(begun: bool, fused: bool | None) -> None:
    params = make_params()
    optimizer = AdamW(params, fused=fused)
    run(optimizer, params, [1] if begun else [])
    set_grads(params, 2)
    before = contents(optimizer)
    wrong: list[Any] = ["0.5", b"1", np.bytes_(b"1"), [0.5], {}, 1j]
    for value in wrong:
        with pytest.raises(TypeError, match=r"^grad_multiplier must be a number, not "):
            optimizer.step(grad_multiplier=value)
        assert_same(contents(optimizer), before)


def test_lr_that_requires_grad() -> None:
    params, others = make_params(), make_params()
    optimizer = AdamW(params, lr=torch.tensor(0.25, requires_grad=True))
    run(optimizer, params, [1])
    run(AdamW(others, lr=0.25), others, [1])
    assert_same(params, others)


@pytest.mark.parametrize("value", ["no", 1, "True"])
def test_flags_of_constructors(value: Any) -> None:
    def message(name: str, expected: str = "a bool") -> str:
        return f"^{name} must be {expected}, not {type(value).__name__} \\({value!r}\\)"

    for cls in (Adam, AdamW, megatron.FusedAdam):
        with pytest.raises(TypeError, match=message("amsgrad")):
            cls(make_params(), amsgrad=value)
    with pytest.raises(TypeError, match=message("decoupled_weight_decay")):
        Adam(make_params(), decoupled_weight_decay=value)
    with pytest.raises(TypeError, match=message("adam_w_mode")):
        megatron.FusedAdam(make_params(), adam_w_mode=value)
    with pytest.raises(TypeError, match=message("set_grad_none", "a bool or None")):
        megatron.Lion(make_params(), set_grad_none=value)


# ---- what is accepted ----------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, None], ids=["fallback", "native where possible"])
def test_numbers_of_other_types(fused: bool | None) -> None:
    wanted = make_params()
    run(AdamW(wanted, 0.125, (0.5, 0.75), 0.25, 0.5, fused=fused), wanted, [1, 2])
    for lr, betas, eps, decay in (
        (np.float32(0.125), np.array([0.5, 0.75]), np.float64(0.25), np.float16(0.5)),
        (Decimal("0.125"), [Decimal("0.5"), Fraction(3, 4)], Fraction(1, 4), Decimal("0.5")),
        (torch.tensor(0.125), torch.tensor([0.5, 0.75]), torch.tensor(0.25), torch.tensor([0.5])),
        (torch.tensor([[0.125]]), (0.5, 0.75), 0.25, 0.5),
    ):
        given: Any = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": decay}
        params, later = make_params(), make_params()
        run(AdamW(params, **given, fused=fused), params, [1, 2])
        optimizer = AdamW(later, fused=fused)
        optimizer.param_groups[0].update(given)
        run(optimizer, later, [1, 2])
        assert_same([p.detach() for p in params], [p.detach() for p in wanted], str(given))
        assert_same([p.detach() for p in later], [p.detach() for p in wanted], str(given))


def test_bools_are_numbers_as_for_torch() -> None:
    params, others = make_params(), make_params()
    given: Any = {"lr": True, "weight_decay": False}
    run(AdamW(params, **given), params, [1])
    run(AdamW(others, lr=1.0, weight_decay=0.0), others, [1])
    assert_same([p.detach() for p in params], [p.detach() for p in others])


def test_flags_of_numpy_become_bools() -> None:
    """State dicts must not contain NumPy's."""
    flags: Any = {"maximize": np.True_, "nesterov": np.bool_(True), "fused": np.False_}
    params, others = make_params(), make_params()
    optimizer = Adam(params, **flags)
    group = optimizer.param_groups[0]
    assert [group[key] for key in flags] == [True, True, False]
    assert all(type(group[key]) is bool for key in flags)
    run(optimizer, params, [1, 2])
    run(Adam(others, maximize=True, nesterov=True, fused=False), others, [1, 2])
    assert_same([p.detach() for p in params], [p.detach() for p in others])
    group["maximize"], group["nesterov"] = np.True_, np.True_
    run(optimizer, params, [3])


@pytest.mark.parametrize("cls", [AdamW, megatron.FusedAdam, RMSprop])
@pytest.mark.parametrize("is_set", [False, True])
def test_rules_that_numpys_flags_choose(cls: Any, is_set: bool) -> None:
    params = make_params()
    optimizer = cls(params)
    flag, state = ("centered", "grad_avg") if cls is RMSprop else ("amsgrad", "max_exp_avg_sq")
    optimizer.param_groups[0][flag] = np.bool_(is_set)
    run(optimizer, params, [1])
    assert (state in optimizer.state[params[0]]) is is_set


@pytest.mark.parametrize("cls", [AdamW, Lion, megatron.FusedAdam])
def test_numpy_false_selects_the_fallback(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[Any] = []
    monkeypatch.setattr(_fallback_step, "_update", lambda *_: steps.append(None))
    params = make_params()
    optimizer = cls(params)
    optimizer.param_groups[0]["fused"] = np.False_
    run(optimizer, params, [1])
    assert len(steps) == len(params)


@pytest.mark.parametrize("how", ["load_state_dict", "__setstate__"])
def test_flags_saved_as_numbers(how: str) -> None:
    """torch.optim and earlier versions accept and save 1 for True."""
    params, others = make_params(), make_params()
    optimizer, other = Adam(params, maximize=True), Adam(others)
    run(optimizer, params, [1])
    run(other, others, [1])
    if how == "load_state_dict":
        state_dict = copy.deepcopy(optimizer.state_dict())
        state_dict["param_groups"][0].update(maximize=1, amsgrad=0, nesterov=0, correct_bias=1)
        other.load_state_dict(state_dict)
    else:
        other.param_groups[0].update(maximize=1, nesterov=0, correct_bias=1)
        other = copy.deepcopy(other)
        others = other.param_groups[0]["params"]
    group = other.param_groups[0]
    found = [group[key] for key in ("maximize", "nesterov", "correct_bias")]
    assert found == [True, False, True]
    assert all(type(value) is bool for value in found)
    with torch.no_grad():
        for param, same in zip(params, others, strict=True):
            same.copy_(param)
            for name, value in optimizer.state[param].items():
                other.state[same][name].copy_(value)
    run(optimizer, params, [2])
    run(other, others, [2])
    assert_same(contents(other), contents(optimizer))


@pytest.mark.parametrize("fused", [False, None], ids=["fallback", "native where possible"])
def test_a_schedule_down_to_zero(fused: bool | None) -> None:
    """It ends a rounding error below 0; a checkpoint of that step loads, too."""
    params = make_params()
    optimizer = AdamW(params, lr=1e-3, fused=fused)
    schedule = LinearLR(optimizer, start_factor=0.4, end_factor=0.0, total_iters=7)
    for step in range(1, 9):
        run(optimizer, params, [step])
        schedule.step()
    assert -1e-18 < optimizer.param_groups[0]["lr"] < 0
    before = [p.detach().clone() for p in params]
    run(optimizer, params, [9])
    assert_same([p.detach() for p in params], before)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.param_groups[0]["lr"] < 0


# ---- other rules ---------------------------------------------------------------------------------


def _heavy_ball(grad: Tensor, exp_avg: Tensor, momentum: float, alpha: Beta) -> Tensor:
    return exp_avg.mul_(momentum).add_(grad).mul(1 - alpha)


class HeavyBall(ScalarOptimizer):
    """Accepts any momentum, unlike Signum, and only an alpha below 1, unlike AdEMAMix."""

    _rule = Rule("heavy_ball", _heavy_ball)

    def __init__(self, params: Any, momentum: float = 2.0, alpha: float = 0.5, **o: Any) -> None:
        given = {"lr": 0.5, "weight_decay": 0.0, "weight_decay_method": "l2"}
        super().__init__(params, {**given, "momentum": momentum, "alpha": alpha}, o)  # type: ignore[arg-type]


class Renamed(Lion):
    """Names Lion's betas as other rules name other hyperparameters."""

    _renamed: ClassVar = {"momentum_beta": "alpha", "momentum_beta2": "eps"}

    def __init__(self, params: Any, **given: Any) -> None:
        shared = {"lr": 0.5, "weight_decay": 0.0, "weight_decay_method": "l2"}
        ScalarOptimizer.__init__(self, params, {**shared, "alpha": 0.9, "eps": 0.5, **given}, {})


def test_domains_of_other_rules() -> None:
    param = torch.nn.Parameter(torch.zeros(2))
    optimizer = HeavyBall([param], momentum=2.0)
    for _ in range(2):
        param.grad = torch.tensor([1.0, -2.0])
        optimizer.step()
    # Momenta of 1 and then 2 * 1 + 1 times the gradient, times alpha = lr = 1 / 2.
    assert param.tolist() == [-1.0, 2.0]
    optimizer.param_groups[0]["momentum"] = NAN
    refused(ValueError, "Invalid momentum: nan", " (param_groups[0]['momentum'])", optimizer.step)
    refused(ValueError, "Invalid alpha: 1.0", "", lambda: HeavyBall([param], alpha=1.0))
    Renamed([param], alpha=0.0)
    refused(ValueError, "Invalid alpha: 5.0", "", lambda: Renamed([param], alpha=5.0))
    refused(ValueError, "Invalid epsilon value: 1.0", "", lambda: Renamed([param], eps=1.0))


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("is_added", [False, True])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("ours", [Adam, AdamW])
def test_decoupled_weight_decay_in_a_group(
    ours: Any, decoupled: bool, is_added: bool, fused: bool | None
) -> None:
    """A group may have the key, as in torch.optim."""
    found: list[Any] = []
    for cls in (ours, getattr(torch.optim, ours.__name__)):
        params = make_params()
        group = {"params": params[1:], "decoupled_weight_decay": decoupled}
        options = {"lr": 0.1, "weight_decay": 0.5, "fused": fused}
        if is_added:
            optimizer = cls(params[:1], **options)
            optimizer.add_param_group(group)
        else:
            optimizer = cls([{"params": params[:1]}, group], **options)
        run(optimizer, params, [1, 2, 3])
        found.append([p.detach() for p in params])
    torch.testing.assert_close(*found)


def test_unsupported_options_in_a_group() -> None:
    optimizer = Adam(make_params())
    for options, error, message in (
        ({"amsgrad": "no"}, TypeError, "amsgrad must be a bool"),
        ({"decoupled_weight_decay": "no"}, TypeError, "decoupled_weight_decay must be a bool"),
        (
            {"decoupled_weight_decay": True, "weight_decay_method": "palm"},
            ValueError,
            "decoupled_weight_decay=True cannot be combined with weight_decay_method='palm'",
        ),
    ):
        with pytest.raises(error, match=message):
            optimizer.add_param_group({"params": make_params(), **options})
        with pytest.raises(error, match=message):
            Adam([{"params": make_params(), **options}])
    assert len(optimizer.param_groups) == 1
    method = {"decoupled_weight_decay": False, "weight_decay_method": "palm"}
    optimizer.add_param_group({"params": make_params(), "amsgrad": False, **method})
    assert optimizer.param_groups[1]["weight_decay_method"] == "palm"
