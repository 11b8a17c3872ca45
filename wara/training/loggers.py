"""The loggers of a run, W&B and TensorBoard: numbers only, unless images were asked for."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from wara.cards import LOCAL, public_name
from wara.errors import WaraError
from wara.runs.progress import Progress, Row
from wara.training.tracking import Tracking, key_of
from wara.training.wandb_run import WandbRun


def public_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config without what may name people or places: these are reduced to `local`."""
    kept = {key: value for key, value in config.items() if key not in ("out", "wandb")}
    kept["dataset"] = public_name(str(kept.get("dataset")))
    kept["data"] = {k: v for k, v in kept.get("data", {}).items() if k != "cache"}
    backbone = dict(kept.get("backbone", {}))
    if backbone.get("weights"):
        backbone["weights"] = LOCAL
    return {**kept, "backbone": backbone}


class TensorBoardSink:
    """Learning curves as TensorBoard files, replacing those of an earlier attempt.

    Args:
        folder: where `tensorboard/` goes.

    Raises:
        WaraError: kind "config", when tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise WaraError(
                "config", "tensorboard is not installed", "tensorboard: true",
                "pip install 'wara[tensorboard]', or set tensorboard=false",
            ) from error  # fmt: skip
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        self._writer = SummaryWriter(log_dir=str(folder / "tensorboard"))

    def epoch(self, number: int, row: Row) -> None:
        """Log one row of the learning curves."""
        for name, value in row.items():
            if value is not None and name != "epoch":
                self._writer.add_scalar(name, value, number)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class Sinks:
    """The loggers that a run has, if any. Trouble with wandb is told and never ends a run.

    Args:
        say: prints a line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.wandb: WandbRun | None = None
        self.tensorboard: TensorBoardSink | None = None

    def start(
        self,
        folder: Path,
        *,
        tracking: Tracking,
        run_id: str,
        name: str,
        config: dict[str, Any],
        tensorboard: bool,
        kind: str | None = None,
    ) -> None:
        """Start what was asked for.

        Args:
            folder: the run folder.
            tracking: where W&B shows the run.
            run_id: what W&B knows it by, the same whenever it is resumed.
            name: what W&B calls it.
            config: what W&B shows as the config, see `public_config`.
            tensorboard: whether to write TensorBoard files.
            kind: what sort of run W&B calls it; None for a training.

        Raises:
            WaraError: kind "config", when something asked for is not installed or not logged in.
        """
        if tensorboard:
            self.tensorboard = TensorBoardSink(folder)
        if tracking.mode != "disabled":
            with self._forgiving():
                self.wandb = WandbRun(
                    tracking, run_id=run_id, name=name, folder=folder, config=config, kind=kind
                )
                if self.wandb.note:
                    self.say(f"note: {self.wandb.note}")

    def epoch(self, row: Row, best: Row) -> None:
        """Log one row of the learning curves, and that of the best epoch so far."""
        if self.tensorboard is not None:
            self.tensorboard.epoch(int(row["epoch"] or 0), row)
        if self.wandb is not None:
            with self._forgiving():
                self.wandb.epoch(row, best)

    def again(self, progress: Progress) -> None:
        """Log the epochs before this process; TensorBoard begins anew, W&B takes what it lacks."""
        for row in progress.history:
            self.epoch(row, progress.best)

    def results(
        self, *, metrics: dict[str, Any], images: Sequence[tuple[Any, str]], **shown: Any
    ) -> None:
        """Send final numbers, charts and adapter to W&B.

        Args:
            metrics: content of `metrics.json`.
            images: pictures with captions; empty unless asked for.
            **shown: the other arguments of `WandbRun.results`.
        """
        if self.wandb is None:
            return
        summary = {key: value for key, value in metrics.items() if not isinstance(value, dict)}
        for split in ("val", "test"):
            for name, entry in metrics[split].items():
                summary[key_of(f"{split}_{name}")] = entry["value"]
        with self._forgiving():
            self.wandb.results(summary=summary, **shown)
            if images:
                self.wandb.images(images)

    def table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Send a table to W&B."""
        if self.wandb is not None:
            with self._forgiving():
                self.wandb.table(key, columns, rows)

    def close(self, exit_code: int) -> None:
        """End all of them."""
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            with self._forgiving():
                self.wandb.close(exit_code)
        self.wandb = self.tensorboard = None

    @contextlib.contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except WaraError:
            raise
        except Exception as error:
            self.wandb = None
            self.say(f"note: wandb failed ({type(error).__name__}: {error}); going on without it")
