"""The optimizers inside Lightning's Trainer: precisions, clipping, resuming."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from optimizers import Setup, assert_same, contents, every_optimizer
from test_integrations import Batch, import_or_skip, make_batches, make_model, mse
from torch import Tensor
from torch.optim import lr_scheduler

from emerging_optimizers import AdamW

OVERFLOW = 2  # the step of each epoch whose gradients overflow in float16

Make = Callable[..., torch.optim.Optimizer]


# Lightning warns about deprecations of other packages, numbers of workers and missing loggers.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def lightning() -> Any:
    return import_or_skip("lightning")


@pytest.fixture(autouse=True)
def _on_cpu(_default_device: None) -> Iterator[None]:
    with torch.device("cpu"):
        yield


class Run:
    """A model and its Trainer, with three steps per epoch."""

    def __init__(
        self, lightning: Any, make: Make, precision: str = "32-true", clip: float | None = None
    ) -> None:
        run = self
        self.lightning, self.precision, self.clip = lightning, precision, clip
        self.grads: list[list[Tensor]] = []  # what the hook sees, per step

        class Module(lightning.LightningModule):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.model = make_model()

            def training_step(self, batch: Batch, index: int) -> Tensor:
                x, y = batch
                is_bad = run.precision == "16-mixed" and index == OVERFLOW
                return mse(self.model(x).float(), y * (1e9 if is_bad else 1.0))

            def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
                grads = [p.grad for p in self.model.parameters()]
                run.grads.append([g.clone() for g in grads if g is not None])

            def configure_optimizers(self) -> Any:
                optimizer = make(self.model.parameters(), lr=0.01, weight_decay=0.1)
                scheduler = lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
                return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

        self.module = Module()

    def fit(self, max_epochs: int, **options: Any) -> Any:
        lightning = self.lightning
        if self.precision == "16-mixed":
            # Trainer creates a scaler only for GPUs.
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            plugin = lightning.pytorch.plugins.MixedPrecision("16-mixed", "cpu", scaler)
            how: dict[str, Any] = {"plugins": [plugin]}
        else:
            how = {"precision": self.precision}
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=max_epochs,
            gradient_clip_val=self.clip,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **how,
        )
        loader: Any = torch.utils.data.DataLoader(make_batches(3), batch_size=None)
        trainer.fit(self.module, loader, **options)
        return trainer

    @property
    def params(self) -> list[Tensor]:
        return [p.detach() for p in self.module.model.parameters()]


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_beside_torch(
    lightning: Any, precision: str, clip: float | None, fused: bool | None
) -> None:
    def make(params: Any, **options: Any) -> torch.optim.Optimizer:
        return AdamW(params, fused=fused, **options)

    run = Run(lightning, make, precision, clip)
    other = Run(lightning, torch.optim.AdamW, precision, clip)
    optimizer = run.fit(2).optimizers[0]
    other.fit(2)
    # A last bit may decide how an activation is rounded.
    tolerance = 1e-6 if precision == "32-true" else 1e-4
    torch.testing.assert_close(run.params, other.params, rtol=0, atol=tolerance)
    num_skipped = 2 if precision == "16-mixed" else 0  # one per epoch
    assert {state["step"].item() for state in optimizer.state.values()} == {6 - num_skipped}
    # Unscaled, and not clipped yet.
    first, others_first = run.grads[0], other.grads[0]
    assert_same(first, others_first)
    alone = make_model()
    x, y = make_batches(1)[0]
    mse(alone(x), y).backward()
    wanted = [p.grad for p in alone.parameters()]
    torch.testing.assert_close(first, wanted, rtol=0.05, atol=0.01)


def test_a_fused_step_with_a_scaler(lightning: Any) -> None:
    """As with torch's optimizers, hooks see scaled gradients, and clipping is an error."""
    runs = []
    for cls in (AdamW, torch.optim.AdamW):

        def make(params: Any, cls: Any = cls, **options: Any) -> torch.optim.Optimizer:
            return cls(params, fused=True, **options)

        run = Run(lightning, make, "16-mixed")
        optimizer = run.fit(2).optimizers[0]
        assert {state["step"].item() for state in optimizer.state.values()} == {4}
        runs.append(run)
        with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
            Run(lightning, make, "bf16-mixed", clip=0.1).fit(1)
    run, other = runs
    torch.testing.assert_close(run.params, other.params, rtol=0, atol=1e-4)
    assert_same(run.grads[0], other.grads[0])


@every_optimizer
def test_resuming(lightning: Any, setup: Setup, tmp_path: Path) -> None:
    def make(params: Any, **options: Any) -> torch.optim.Optimizer:
        return setup.make(params, state_dtype=torch.bfloat16, **options)

    through = Run(lightning, make).fit(2).optimizers[0]
    Run(lightning, make).fit(1).save_checkpoint(tmp_path / "1.ckpt")
    resumed = Run(lightning, make).fit(2, ckpt_path=tmp_path / "1.ckpt").optimizers[0]
    assert_same(contents(resumed), contents(through))
    assert resumed.param_groups[0]["lr"] == through.param_groups[0]["lr"]
