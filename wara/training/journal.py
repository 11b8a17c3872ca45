"""What happens after each epoch: checkpoint, curves, one line, early stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch

from wara.adapters import adapter_state_dict, load_adapter_state
from wara.errors import WaraError
from wara.training.checkpoints import SafeCheckpointIO
from wara.training.console import Console
from wara.training.folder import RunFolder
from wara.training.signals import Stopped, StopSignals
from wara.training.task import FineTuning

Row = dict[str, float | None]


@dataclass
class Progress:
    """How far a run is; plain values, part of every checkpoint."""

    epoch: int = 0
    """Epochs completed."""
    step: int = 0
    """Optimiser steps made."""
    seconds: float = 0.0
    """Time spent training, over all processes that took their turn at the run."""
    monitor: str = ""
    """Metric that picks the best epoch; `val_loss` where the wanted one is undefined."""
    best_epoch: int = 0
    best_value: float | None = None
    stale: int = 0
    """Epochs since the best one."""
    history: list[Row] = field(default_factory=list)

    def better(self, value: float) -> bool:
        """Whether `value` beats the best so far; the earlier epoch wins a tie."""
        if self.best_value is None:
            return True
        return value < self.best_value if self.monitor == "val_loss" else value > self.best_value

    def note(self, row: Row, value: float) -> bool:
        """Count an epoch in; return whether it is the best so far."""
        improved = self.better(value)
        if improved:
            self.best_epoch, self.best_value, self.stale = self.epoch, value, 0
        else:
            self.stale += 1
        self.history.append(row)
        return improved


class Journal(pl.Callback):
    """Writes checkpoints and curves at the end of each epoch and stops the run when asked to.

    The order of the two checkpoints matters for a kill between them: `last` is written first, and
    when it says that its own epoch is the best, `best` is rebuilt from it on resume.

    Args:
        folder: where to write; only the first process writes.
        console: where to print.
        stop: the signals.
        progress: the state to go on from.
        identity: plain values that a resumed run must agree with.
        patience: epochs without a better value before stopping; None never stops.
        epochs: planned number of epochs.
        sinks: called with (epoch, row), such as wandb.
    """

    def __init__(
        self,
        *,
        folder: RunFolder,
        console: Console,
        stop: StopSignals,
        progress: Progress,
        identity: dict[str, Any],
        patience: int | None,
        epochs: int,
        sinks: list[Callable[[int, Row], None]] | None = None,
    ) -> None:
        self.folder, self.console, self.stop = folder, console, stop
        self.progress, self.identity = progress, identity
        self.patience, self.epochs = patience, epochs
        self.sinks = sinks or []
        self.io = SafeCheckpointIO()
        self._began = time.perf_counter()

    @property
    def exhausted(self) -> bool:
        """Whether patience has run out."""
        return self.patience is not None and self.progress.stale >= self.patience

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the signals back from Lightning."""
        self.stop.install()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here on, a stop waits for the end of the step."""
        self.stop.install()
        self.stop.graceful = True

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the epoch's clock."""
        self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object
    ) -> None:
        """Stop when all processes agreed to, in this step's exchange."""
        assert isinstance(pl_module, FineTuning)
        if pl_module.agreed_stop:
            raise Stopped(pl_module.agreed_stop)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write, print, and decide whether to go on."""
        assert isinstance(pl_module, FineTuning)
        progress = self.progress
        train_loss = pl_module.mean_train_loss()
        val_loss = pl_module.val_loss
        assert val_loss is not None
        spent = time.perf_counter() - self._began
        progress.epoch = trainer.current_epoch + 1
        progress.step = pl_module.optimiser_step_count
        progress.seconds += spent
        row: Row = {
            "epoch": progress.epoch,
            "step": progress.step,
            "lr": pl_module.last_lr,
            "train_loss": train_loss,
            "val_loss": val_loss,
            **{f"val_{name}": value for name, value in pl_module.val_metrics.items()},
            "seconds": round(spent, 3),
        }
        wanted = pl_module.val_metrics.get(pl_module.monitor)
        if not progress.monitor:
            progress.monitor = "val_loss" if wanted is None else pl_module.monitor
            if wanted is None:
                self.console.say(
                    f"note: {pl_module.monitor} is undefined on the validation images; the best "
                    "epoch is the one with the lowest validation loss"
                )
        value = val_loss if progress.monitor == "val_loss" else wanted
        assert value is not None
        improved = progress.note(row, value)
        if trainer.is_global_zero:
            self._write(trainer, pl_module, improved)
            shown = "" if progress.monitor == "val_loss" else f"  {progress.monitor} {value:.4f}"
            width = len(str(self.epochs))
            self.console.say(
                f"epoch {progress.epoch:>{width}}/{self.epochs}  train loss {train_loss:.4f}  "
                f"val loss {val_loss:.4f}{shown}  {spent:.1f} s{'  best' if improved else ''}"
            )
            for sink in self.sinks:
                sink(progress.epoch, row)
        if self.exhausted and progress.epoch < self.epochs:
            trainer.should_stop = True
            self.console.say(
                f"stopping early: no better {progress.monitor} for {progress.stale} epochs"
            )
        flag = torch.tensor(float(self.stop.requested), device=pl_module.device)
        if trainer.world_size > 1:
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        if flag.item() and progress.epoch < self.epochs:
            raise Stopped(int(flag.item()))

    def _write(self, trainer: pl.Trainer, module: FineTuning, improved: bool) -> None:
        state = {n: t.detach().cpu() for n, t in adapter_state_dict(module.model).items()}
        self.io.save_checkpoint(
            {
                "progress": vars(self.progress).copy(),
                "identity": self.identity,
                "state": state,
                "optimiser": trainer.optimizers[0].state_dict(),
                "method": module.method.training_state(module.model),
            },
            self.folder.last,
        )
        if improved:
            self.write_best(state)
        self.folder.write_curves(self.progress.history)

    def write_best(self, state: dict[str, torch.Tensor]) -> None:
        """Write the checkpoint of the best epoch."""
        self.io.save_checkpoint(
            {"epoch": self.progress.best_epoch, "identity": self.identity, "state": state},
            self.folder.best,
        )


def check_identity(found: dict[str, Any], wanted: dict[str, Any], where: str) -> None:
    """Refuse a checkpoint of another base, method or data set.

    Raises:
        WaraError: kind "artefact".
    """
    names = {
        "base_sha256": "the backbone's weights are",
        "data_sha256": "the images, labels or splits are",
        "classes": "the classes are",
    }
    for key, text in names.items():
        if found.get(key) != wanted[key]:
            raise WaraError(
                "artefact", f"{text} not those of the checkpoint", where,
                "put back what the run was started with, or start again with --overwrite",
            )  # fmt: skip


def load_best(module: FineTuning, folder: RunFolder, journal: Journal) -> None:
    """Put the state of the best epoch into the model.

    Raises:
        WaraError: kind "artefact", when the file is damaged or not the best epoch's.
    """
    content = journal.io.load_checkpoint(folder.best)
    check_identity(content.get("identity", {}), journal.identity, str(folder.best))
    if content.get("epoch") != journal.progress.best_epoch:
        raise WaraError(
            "artefact", f"holds epoch {content.get('epoch')}, not the best epoch "
            f"{journal.progress.best_epoch}", str(folder.best), "start again with --overwrite",
        )  # fmt: skip
    load_adapter_state(module.model, content["state"])
