"""The progress bar on a terminal."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from wara.training.console import Console


class ProgressBar(pl.Callback):
    """One bar for the batches of the current epoch; lines of the console go above it.

    Args:
        console: prints above the bar while it is shown.
        epochs: planned number of epochs.
    """

    def __init__(self, console: Console, epochs: int) -> None:
        self.console, self.epochs = console, epochs
        self._bars: Bars | None = None
        self._task: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the bar."""
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            transient=True,
        )
        self._bars.start()
        self._task = self._bars.add_task("", total=None)
        self.console.live = self._bars

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the bar anew."""
        if self._bars is not None:
            self._bars.reset(
                self._task,
                total=int(trainer.num_training_batches),
                description=f"epoch {trainer.current_epoch + 1}/{self.epochs}",
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object
    ) -> None:
        """Move on by one batch."""
        if self._bars is not None:
            self._bars.advance(self._task)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say that validation runs."""
        if self._bars is not None:
            self._bars.update(self._task, description="validating")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the bar away."""
        self._close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Take the bar away, so that the terminal is whole again."""
        self._close()

    def _close(self) -> None:
        if self._bars is not None:
            self._bars.stop()
        self._bars = None
        self.console.live = None
