"""What happens after each epoch: checkpoint, curves, one line, early stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import pytorch_lightning as pl
import torch

from wara.adapters import adapter_state_dict
from wara.runs.folder import RunFolder
from wara.runs.progress import Progress, Row
from wara.runs.tables import write_curves
from wara.signals import StopSignals
from wara.training.checkpoint import write_best, write_last
from wara.training.console import Console
from wara.training.task import FineTuning


class Journal(pl.Callback):
    """Writes checkpoints and curves at the end of each epoch and stops the run when asked to.

    The order of the two checkpoints matters for a kill between them: `last` is written first, and
    when it says that its own epoch is the best, `best` is rebuilt from it on resume.

    Args:
        folder: where to write; only the first process writes, and without a folder none does.
        console: where to print, if anywhere.
        stop: the signals, if any are heeded.
        progress: the state to go on from; by default the start.
        identity: plain values that a resumed run must agree with.
        facts: of `wara.runs.exact`, which it must agree with too, unless told otherwise.
        noted: called when what provenance tells of `progress` has changed.
        synthetic: whether the images were drawn.
        sinks: called with (epoch, row), such as wandb.
    """

    def __init__(
        self,
        *,
        folder: RunFolder | None = None,
        console: Console | None = None,
        stop: StopSignals | None = None,
        progress: Progress | None = None,
        identity: dict[str, Any] | None = None,
        facts: dict[str, Any] | None = None,
        noted: Callable[[], None] = lambda: None,
        synthetic: bool = False,
        sinks: Sequence[Callable[[int, Row], None]] = (),
    ) -> None:
        self.folder, self.sinks = folder, sinks
        self.console = console or Console(enabled=False)
        self.stop = stop or StopSignals()
        self.progress = progress or Progress()
        self.identity, self.synthetic = identity or {}, synthetic
        self.facts, self.noted = facts or {}, noted
        self._began = time.perf_counter()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here on, a stop waits for the end of the step."""
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
            self.stop.leave(pl_module.agreed_stop)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write, print, and decide whether to go on."""
        assert isinstance(pl_module, FineTuning)
        progress, recipe = self.progress, pl_module.recipe
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
        wanted = pl_module.val_metrics.get(recipe.monitor)
        if not progress.monitor:
            progress.monitor = "val_loss" if wanted is None else recipe.monitor
            if wanted is None:
                self.console.say(
                    f"note: {recipe.monitor} is undefined on the validation images; the best "
                    "epoch is the one with the lowest validation loss"
                )
        value = val_loss if progress.monitor == "val_loss" else wanted
        assert value is not None
        improved = progress.note(row, value)
        if trainer.is_global_zero:
            self._write(trainer, pl_module, improved)
            shown = "" if progress.monitor == "val_loss" else f"  {progress.monitor} {value:.4f}"
            width = len(str(recipe.epochs))
            self.console.say(
                f"epoch {progress.epoch:>{width}}/{recipe.epochs}  train loss {train_loss:.4f}  "
                f"val loss {val_loss:.4f}{shown}  {spent:.1f} s{'  best' if improved else ''}"
            )
            for sink in self.sinks:
                sink(progress.epoch, row)
        if exhausted(progress, recipe.patience) and progress.epoch < recipe.epochs:
            trainer.should_stop = True
            self.console.say(
                f"stopping early: no better {progress.monitor} for {progress.stale} epochs"
            )
        flag = torch.tensor(float(self.stop.requested), device=pl_module.device)
        if trainer.world_size > 1:
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        if flag.item() and progress.epoch < recipe.epochs:
            self.stop.leave(int(flag.item()))

    def shrunk(self, batch: int, images: int) -> None:
        """Note that memory ran out, and how many images at a time are computed from now on.

        It is written at once: a run that is killed before its next checkpoint then goes on in
        the same parts, also where more memory is free by then.

        Args:
            batch: number of the training batch, counted over the whole run.
            images: at a time.
        """
        self.progress.micro.append([batch, images])
        self.console.say(
            f"out of memory: batch {batch + 1} is done over, {images} image(s) at a time; "
            "the batch of each step stays as it was"
        )
        self.noted()

    def _write(self, trainer: pl.Trainer, module: FineTuning, improved: bool) -> None:
        folder, progress = self.folder, self.progress
        if folder is None:
            return
        state = {n: t.detach().cpu() for n, t in adapter_state_dict(module.model).items()}
        method = module.method.training_state(module.model)
        optimiser = trainer.optimizers[0].state_dict()
        write_last(folder, progress, self.identity, self.facts, state, optimiser, method)
        if improved:
            write_best(folder, progress.best_epoch, self.identity, state)
        write_curves(folder.curves, progress.history, synthetic=self.synthetic)


def exhausted(progress: Progress, patience: int | None) -> bool:
    """Whether patience has run out."""
    return patience is not None and progress.stale >= patience
