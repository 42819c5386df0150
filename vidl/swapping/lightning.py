"""A callback of Lightning's Trainer that swaps the model while it is trained."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from vidl.swapping.swap import swap
from vidl.swapping.trainers import Savings, Swapped


class LightningCallback(Callback):
    """Swap vidl's kernels into a `LightningModule` while `Trainer.fit` runs.

        trainer = lightning.Trainer(callbacks=[LightningCallback()], ...)

    The module is swapped before the strategy wraps it, and restored after the fit; then the saved
    FLOPs and tokens are printed and logged to the trainer's loggers. Models must exist before the
    fit: those that `configure_model` creates are too late.

    Args:
        change: see `vidl.swapping.trainers.Swapped`; called with the `LightningModule`.

    Attributes:
        savings: see `vidl.swapping.trainers.Swapped`; None before the fit.

    Raises:
        ValueError: when the fit begins: `change` cannot swap the module.
    """

    def __init__(self, change: Callable[[nn.Module], Any] = swap) -> None:
        self.change = change
        self.savings: Savings | None = None
        self._swapped: Swapped | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._swapped = Swapped(pl_module, self.change)
        self._swapped.start(children=True)
        self.savings = self._swapped.savings
        self.savings.ranks = trainer.world_size
        if trainer.is_global_zero:
            print(f"vidl: {self._swapped.report}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        savings = self.savings
        assert savings is not None
        totals = {f"vidl/{name}": value for name, value in savings.totals().items()}
        for logger in trainer.loggers if totals else ():
            logger.log_metrics(totals, step=trainer.global_step)
        if trainer.is_global_zero:
            print(f"vidl: {savings}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._swapped is not None:
            self._swapped.stop()
            self._swapped = None
