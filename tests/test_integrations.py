"""The optimizers with torch.compile, schedulers, gradient scalers and trainers.

Each test trains a tiny model on the CPU, and compares with a reference: a loop written by hand, an
optimizer of torch, or float64.
"""

import dataclasses
import gc
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from optimizers import (
    Setup,
    Trajectory,
    assert_same,
    contents,
    every_optimizer,
    every_optimizer_with_states,
    has_momentum,
    make_grads,
    make_params,
    one_cycle,
    set_grads,
)
from support import assert_equal_bits, to_numpy
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim import lr_scheduler

from emerging_optimizers import AdamW, Lion

# Raised by other packages.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

Batch = tuple[Tensor, Tensor]
mse = nn.functional.mse_loss


@pytest.fixture(autouse=True)
def _one_thread_of_the_cpu(_default_device: None) -> Iterator[None]:
    """Use one thread of the CPU: on a busy machine, threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.device("cpu"):
        yield
    torch.set_num_threads(threads)


def import_or_skip(name: str) -> Any:
    """Import a package of the test extra, or skip; in CI, a missing one is an error."""
    return importlib.import_module(name) if os.environ.get("CI") else pytest.importorskip(name)


def make_model(seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def make_batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return [(normal(8, 4), normal(8, 2)) for _ in range(count)]


# ---- torch.compile -------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [AdamW, Lion])
# Dynamo reads the gradients of non-leaf tensors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_step_with_a_schedule(cls: Any) -> None:
    """Changes between steps, such as the learning rate, cause no recompilation."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    counts = []

    def train(compiled: bool) -> list[Tensor]:
        model = make_model()
        optimizer = cls(model.parameters(), lr=0.01)
        scheduler = lr_scheduler.LambdaLR(optimizer, lambda i: 1 / (1 + i))

        def step(x: Tensor, y: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = mse(model(x), y)
            loss.backward()
            clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step(grad_multiplier=0.5)
            return loss.detach()

        function = torch.compile(step, backend=counter) if compiled else step
        for x, y in make_batches(6):
            function(x, y)
            scheduler.step()
            counts.append(counter.frame_count)
        return contents(optimizer)

    assert_same(train(True), train(False))
    assert counts[0] > 0
    assert counts[2] == counts[5]


# ---- schedulers ----------------------------------------------------------------------------------


def _warm_up_and_decay(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    parts: list[lr_scheduler.LRScheduler] = [
        lr_scheduler.LinearLR(optimizer, 0.25, total_iters=3),
        lr_scheduler.CosineAnnealingLR(optimizer, 4),
    ]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[3])


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda i: 1 / (1 + i)),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4, eta_min=1e-3),
    "OneCycleLR": lambda o: one_cycle(o, 0.05, total_steps=8),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "SequentialLR": _warm_up_and_decay,
}


def _scheduled(setup: Setup, group: dict[str, Any]) -> Setup:
    """The setup with the current hyperparameters of a group."""
    now = {}
    for name in setup.case:
        key = setup.cls._renamed.get(name, name)
        now[name] = group[key] if isinstance(key, str) else group[key[0]][key[1]]
    return dataclasses.replace(setup, case=now)


@every_optimizer
@pytest.mark.parametrize("scheduler_name", SCHEDULERS)
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float lr", "tensor lr"])
def test_values_set_by_schedulers_are_used(
    setup: Setup, scheduler_name: str, tensor_lr: bool, fused: bool | None
) -> None:
    params = make_params()
    lr = torch.tensor(0.05) if tensor_lr else 0.05
    optimizer = setup.make(params, lr=lr, weight_decay=0.1, fused=fused)
    group = optimizer.param_groups[0]
    scheduler = SCHEDULERS[scheduler_name](optimizer)
    method = group["weight_decay_method"]
    wanted = [Trajectory(setup, to_numpy(p), weight_decay=0.1, method=method) for p in params]
    seen = []
    for step in range(1, 8):
        now = _scheduled(setup, group)
        seen.append((float(group["lr"]), str(now.case)))
        set_grads(params, step)
        for trajectory, grad in zip(wanted, make_grads(params, step), strict=True):
            trajectory.setup, trajectory.lr = now, float(group["lr"])
            trajectory.step(to_numpy(grad))
        optimizer.step()
        scheduler.step(*[1.0] if scheduler_name == "ReduceLROnPlateau" else [])
    for param, trajectory in zip(params, wanted, strict=True):
        torch.testing.assert_close(
            param.detach().double(), torch.tensor(trajectory.param), rtol=5e-6, atol=5e-6
        )
    rates, cases = (set(values) for values in zip(*seen, strict=True))
    assert len(rates) > 2
    assert (len(cases) > 2) == (scheduler_name == "OneCycleLR" and has_momentum(optimizer))
    assert not tensor_lr or group["lr"] is lr


# ---- torch.amp -----------------------------------------------------------------------------------

OVERFLOW = 3
SCALE = 2.0**12
MAX_NORM = {"max_norm": 0.1}


def _forward(model: nn.Module, i: int, batch: Batch) -> Tensor:
    """The loss with float16 activations; its gradients overflow in one step."""
    x, y = batch
    with torch.autocast("cpu", dtype=torch.float16):
        output = model(x)
    return mse(output.float(), y * (1e4 if i == OVERFLOW else 1.0))


def _train_with_scaler(
    make: Callable[..., torch.optim.Optimizer], clip: str | None
) -> tuple[torch.optim.Optimizer, list[float]]:
    model = make_model()
    optimizer = make(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=4)
    scales = []
    for i, batch in enumerate(make_batches(8)):
        optimizer.zero_grad()
        scaler.scale(_forward(model, i, batch)).backward()
        before = contents(optimizer)
        options: dict[str, Any] = {}
        if clip is not None:
            scaler.unscale_(optimizer)
        if clip == "in place":
            clip_grad_norm_(model.parameters(), 0.5)
        elif clip == "multiplier":
            options["grad_multiplier"] = _clip_coefficient(model, 0.5)
        scaler.step(optimizer, **options)
        scaler.update()
        scales.append(scaler.get_scale())
        if i == OVERFLOW:
            assert_same(contents(optimizer), before, "overflow")
    return optimizer, scales


def _clip_coefficient(model: nn.Module, max_norm: float) -> Tensor:
    norm = get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


@every_optimizer
@pytest.mark.parametrize("fused", [False, None, True])
@pytest.mark.parametrize("clip", [None, "in place", "multiplier"])
def test_grad_scaler_over_autocast(setup: Setup, clip: str | None, fused: bool | None) -> None:
    def make(params: Any) -> torch.optim.Optimizer:
        return setup.make(params, lr=0.01, weight_decay=0.1, fused=fused)

    optimizer, scales = _train_with_scaler(make, clip)
    # Halved by the overflow, and doubled after four steps without one.
    assert scales == [SCALE] * 3 + [SCALE / 2] * 4 + [SCALE]
    assert {state["step"].item() for state in optimizer.state.values()} == {7}

    # By hand. A scale that is a power of 2 does not change the bits, unless something underflows.
    model = make_model()
    other = make(model.parameters())
    for i, batch in enumerate(make_batches(8)):
        scale = scales[i - 1] if i else SCALE
        other.zero_grad()
        (_forward(model, i, batch) * scale).backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        is_finite = all(bool(grad.isfinite().all()) for grad in grads)
        assert is_finite == (i != OVERFLOW)
        if is_finite:
            torch._foreach_div_(grads, scale)
            if clip is not None:
                clip_grad_norm_(model.parameters(), 0.5)
            other.step()
    torch.testing.assert_close(contents(optimizer), contents(other), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("clip", [None, "in place"])
@pytest.mark.parametrize("fused", [False, None, True])
@pytest.mark.parametrize("fused_reference", [False, True])
def test_grad_scaler_beside_torch(
    clip: str | None, fused_reference: bool, fused: bool | None
) -> None:
    options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}
    optimizer, scales = _train_with_scaler(lambda p: AdamW(p, fused=fused, **options), clip)
    reference, wanted = _train_with_scaler(
        lambda p: torch.optim.AdamW(p, fused=fused_reference, **options), clip
    )
    assert scales == wanted
    got, wanted_params = (o.param_groups[0]["params"] for o in (optimizer, reference))
    # A last bit may decide how a float16 activation is rounded.
    torch.testing.assert_close(got, wanted_params, rtol=0, atol=1e-4)


@every_optimizer
def test_grad_scaler_over_float16_params(setup: Setup) -> None:
    """The step unscales float16 gradients, in the float32 arithmetic of the masters."""
    model = make_model().half()
    copies = [nn.Parameter(p.detach().float()) for p in model.parameters()]
    # Without fused=True, torch's GradScaler would reject float16 gradients.
    options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "fused": True}
    optimizer = setup.make(
        model.parameters(), master_weights=True, state_dtype=torch.float32, **options
    )
    other = setup.make(copies, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    for i, (x, y) in enumerate(make_batches(8)):
        optimizer.zero_grad()
        loss = mse(model(x.half()).float(), y * (1e4 if i == OVERFLOW else 1.0))
        scaler.scale(loss).backward()
        scale = scaler.get_scale()
        before = contents(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if i == OVERFLOW:
            assert_same(contents(optimizer), before, "overflow")
            assert scaler.get_scale() == scale / 2
            continue
        for param, wide in zip(model.parameters(), copies, strict=True):
            assert param.grad is not None
            wide.grad = param.grad.float() / scale
        other.step()
    for param, wide in zip(model.parameters(), copies, strict=True):
        master = optimizer.state[param]["master_param"]
        torch.testing.assert_close(master, wide.detach(), rtol=1e-5, atol=1e-7)
        assert_equal_bits(param.detach(), master.half(), "parameter")


# ---- clipping ------------------------------------------------------------------------------------


@every_optimizer
@pytest.mark.parametrize("method", ["decoupled", "l2"])
@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_clipping(setup: Setup, method: str, norm_type: float, fused: bool | None) -> None:
    """Clipping in place, and with a multiplier that leaves the gradients unchanged."""
    params, others = make_params(), make_params()
    options = {"lr": 0.01, "weight_decay": 0.1, "weight_decay_method": method, "fused": fused}
    optimizer, other = setup.make(params, **options), setup.make(others, **options)
    coefficients = []
    for step in range(1, 8):
        # Some are clipped, some are not.
        grads = [grad * 10.0 ** (step % 3 - 1) for grad in make_grads(params, step)]
        for p, q, grad in zip(params, others, grads, strict=True):
            p.grad, q.grad = grad.clone(), grad.clone()

        clip_grad_norm_(params, 2.5, norm_type)
        optimizer.step()
        norm = get_total_norm([q.grad for q in others if q.grad is not None], norm_type)
        coefficient = (2.5 / (norm + 1e-6)).clamp(max=1.0)
        other.step(grad_multiplier=coefficient)
        coefficients.append(coefficient.item())
        assert_same([q.grad for q in others if q.grad is not None], grads)
    torch.testing.assert_close(contents(optimizer), contents(other), rtol=1e-5, atol=1e-7)
    assert min(coefficients) < 0.2
    assert max(coefficients) == 1.0


# ---- accelerate ----------------------------------------------------------------------------------


@pytest.fixture
def accelerate() -> Iterator[Any]:
    # accelerate and transformers leave settings in the environment, such as the precision.
    with mock.patch.dict(os.environ, HF_HUB_OFFLINE="1"):
        module = import_or_skip("accelerate")
        # They call gc.collect, which is slow with the many objects of torch.
        gc.freeze()
        yield module
        gc.unfreeze()
    # The settings of an Accelerator are global.
    module.state.AcceleratorState._reset_state(True)
    module.state.GradientState._reset_state()


class _Accelerated:
    """A prepared model, optimizer and scheduler."""

    def __init__(self, accelerator: Any, setup: Setup, model: nn.Module, **options: Any) -> None:
        optimizer = setup.make(model.parameters(), lr=0.01, weight_decay=0.1, **options)
        scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 8)
        batches: Any = make_batches(8)
        loader: Any = torch.utils.data.DataLoader(batches, batch_size=None)
        self.accelerator = accelerator
        self.model, self.optimizer, self.loader, self.scheduler = accelerator.prepare(
            model, optimizer, loader, scheduler
        )

    def train(self, batches: Sequence[Batch] | None = None) -> list[Tensor]:
        dtype = next(self.model.parameters()).dtype
        for x, y in self.loader if batches is None else batches:
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(mse(self.model(x.to(dtype)).float(), y))
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
        return contents(self.optimizer)


@every_optimizer_with_states
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_accelerate(accelerate: Any, setup: Setup, precision: str, accumulated: int) -> None:
    accelerator = accelerate.Accelerator(
        cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulated
    )
    got = _Accelerated(accelerator, setup, make_model(), state_dtype=torch.bfloat16).train()

    model = make_model()
    optimizer = setup.make(
        model.parameters(), lr=0.01, weight_decay=0.1, state_dtype=torch.bfloat16
    )
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 8)
    for i, (x, y) in enumerate(make_batches(8), 1):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            output = model(x)
        (mse(output.float(), y) / accumulated).backward()
        if i % accumulated == 0:
            clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    assert_same(got, contents(optimizer))
    dtypes = {optimizer.state[p][name].dtype for p in model.parameters() for name in setup.states}
    assert dtypes == {torch.bfloat16}


@every_optimizer_with_states
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16 with masters"])
def test_accelerate_continues_from_a_saved_state(
    accelerate: Any, setup: Setup, half: bool, tmp_path: Path
) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    batches = make_batches(8)

    def start(seed: int) -> _Accelerated:
        model = make_model(seed)
        if not half:
            return _Accelerated(accelerator, setup, model)
        options = {"master_weights": True, "state_dtype": {setup.states[0]: torch.float32}}
        return _Accelerated(accelerator, setup, model.bfloat16(), **options)

    first = start(1)
    first.train(batches[:3])
    accelerator.save_state(str(tmp_path))
    wanted = first.train(batches[3:])
    accelerator.free_memory()
    second = start(2)
    other = second.train(batches[:1])
    assert not torch.equal(other[0], wanted[0])
    accelerator.load_state(str(tmp_path))
    assert_same(second.train(batches[3:]), wanted)
    assert second.scheduler.get_last_lr() == first.scheduler.get_last_lr()


@pytest.mark.parametrize("clip", [None, "in place", "by a hook"])
def test_accelerate_sees_a_skipped_step(
    accelerate: Any, clip: str | None, fused: bool | None
) -> None:
    """The scheduler does not advance with a skipped step."""

    def train(cls: type[torch.optim.Optimizer], **options: Any) -> tuple[list[Any], list[Tensor]]:
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision="fp16")
        # Accelerator creates a scaler only for GPUs.
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        accelerator.native_amp = True
        model = make_model()
        optimizer = cls(model.parameters(), lr=0.01, weight_decay=0.1, **options)
        in_step = clip == "by a hook" and cls is AdamW
        if in_step:
            optimizer.register_step_pre_hook(lambda _, args, kwargs: (args, kwargs | MAX_NORM))
        scheduler = lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
        seen: list[Any] = []
        for step, (x, y) in enumerate(make_batches(5)):
            loss = mse(model(x).float(), y * (1e9 if step == 2 else 1.0))
            accelerator.backward(loss)
            if clip and not in_step:
                accelerator.clip_grad_norm_(model.parameters(), **MAX_NORM)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            seen.append((accelerator.optimizer_step_was_skipped, scheduler.get_last_lr()))
        return seen, [p.detach() for p in model.parameters()]

    seen, params = train(AdamW, fused=fused)
    wanted, wanted_params = train(torch.optim.AdamW)
    assert [skipped for skipped, _ in seen] == [False, False, True, False, False]
    assert seen == wanted
    assert seen[1][1] == seen[2][1]
    # A last bit may decide how a float16 activation is rounded.
    torch.testing.assert_close(params, wanted_params, rtol=0, atol=1e-4)


# ---- transformers --------------------------------------------------------------------------------


@pytest.fixture
def transformers(accelerate: Any) -> Any:
    module = import_or_skip("transformers")
    gc.freeze()
    return module


def _make_trainer(
    transformers: Any,
    folder: Path,
    how: tuple[type, dict[str, Any]] | Callable[[Any], torch.optim.Optimizer],
    seed: int = 1,
    dtype: torch.dtype = torch.float32,
    **arguments: Any,
) -> Any:
    """A Trainer for a language model with one small layer, and 16 lines of data.

    It constructs the optimizer from a class and arguments, or is given one.
    """
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
    )
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(config).to(dtype)
    lines = torch.randint(16, (16, 8), generator=torch.Generator().manual_seed(3))
    settings: dict[str, Any] = {
        "max_steps": 12,
        "per_device_train_batch_size": 8,
        "max_grad_norm": 0.25,
        "warmup_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **arguments,
    }
    optimizer: dict[str, Any] = (
        {"optimizer_cls_and_kwargs": how}
        if isinstance(how, tuple)
        else {"optimizers": (how(model.parameters()), None)}
    )
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(output_dir=str(folder), **settings),
        train_dataset=[{"input_ids": line, "labels": line} for line in lines],
        **optimizer,
    )


def _logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_trainer_resumes_from_a_checkpoint(
    transformers: Any, setup: Setup, dtype: torch.dtype, tmp_path: Path
) -> None:
    def make(params: Any) -> torch.optim.Optimizer:
        return setup.make(
            params, lr=0.02, weight_decay=0.1, master_weights=True, state_dtype=torch.float32
        )

    trainer = _make_trainer(
        transformers, tmp_path, make, dtype=dtype, save_strategy="steps", save_steps=7
    )
    trainer.train()
    losses, norms = _logged(trainer, "loss"), _logged(trainer, "grad_norm")
    assert len(losses) == 12
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])
    assert min(norms) > 0.25  # so each was clipped

    resumed = _make_trainer(transformers, tmp_path / "resumed", make, seed=2, dtype=dtype)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert _logged(resumed, "loss") == losses
    assert_same(contents(resumed.optimizer), contents(trainer.optimizer))


@pytest.mark.parametrize(
    "arguments", [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}], ids=str
)
def test_trainer_beside_an_optimizer_of_torch(
    transformers: Any, arguments: dict[str, Any], tmp_path: Path
) -> None:
    # A large eps, so that rounding does not decide the direction of the smallest gradients.
    options: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "eps": 1e-4}
    ours = _make_trainer(transformers, tmp_path, lambda p: AdamW(p, **options), **arguments)
    theirs = _make_trainer(
        transformers, tmp_path, lambda p: torch.optim.AdamW(p, **options), **arguments
    )
    ours.train()
    theirs.train()
    # A last bit may decide how a bfloat16 activation is rounded.
    tolerance = 1e-3 if "bf16" in arguments else 1e-5
    assert _logged(ours, "loss") == pytest.approx(_logged(theirs, "loss"), rel=tolerance)
    assert _logged(ours, "learning_rate") == _logged(theirs, "learning_rate")
    assert min(_logged(ours, "grad_norm")) > 0.25
    torch.testing.assert_close(
        list(ours.model.parameters()), list(theirs.model.parameters()), rtol=0, atol=tolerance
    )


@every_optimizer
def test_trainer_makes_the_optimizer(transformers: Any, setup: Setup, tmp_path: Path) -> None:
    """One of its groups has weight decay; the other one, with the vectors, has none."""

    def make(params: Any) -> torch.optim.Optimizer:
        params = list(params)
        matrices = {"params": [p for p in params if p.dim() > 1], "weight_decay": 0.1}
        vectors = {"params": [p for p in params if p.dim() == 1], "weight_decay": 0.0}
        return setup.make([matrices, vectors], lr=0.02)

    theirs = _make_trainer(
        transformers, tmp_path, (setup.cls, {"lr": 0.02}), max_steps=4, weight_decay=0.1
    )
    ours = _make_trainer(transformers, tmp_path, make, max_steps=4)
    theirs.train()
    ours.train()
    assert type(theirs.optimizer.optimizer) is setup.cls
    assert_same(contents(theirs.optimizer), contents(ours.optimizer))
