"""One experiment as one run of Weights & Biases, however often it is resumed."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wara.errors import WaraError
from wara.runs.progress import Row
from wara.training.tracking import (
    Tracking,
    epochs_in,
    files_of,
    is_sent,
    unknown_sender,
    unreachable,
)


class WandbRun:
    """A run of W&B, begun or gone on with.

    Offline it writes under the run folder and never opens a connection; `wandb sync` sends it
    later. Arguments of the command line, code, git state, host and user names stay out.

    Args:
        tracking: where it is shown; its mode is `offline` or `online`.
        run_id: what W&B knows it by; a process that goes on with a run gives the same.
        name: name of the run.
        folder: where `wandb/` goes.
        config: what to show as the run's config.
        kind: what sort of run it is, W&B's `job_type`; None for a training.

    Raises:
        WaraError: kind "config", when `online` is asked for and W&B does not know who sends.
        OSError: when W&B's files of an earlier process are not read.
    """

    def __init__(
        self,
        tracking: Tracking,
        *,
        run_id: str,
        name: str,
        folder: Path,
        config: dict[str, Any],
        kind: str | None = None,
    ) -> None:
        import wandb

        files = files_of(folder, run_id)
        mode, self.note = _mode(tracking.mode, folder, [f for f in files if not is_sent(f)])
        # Artifacts are staged and logs kept beside the run, not in the home folder, so that the run
        # folder can be moved to a machine with a network and sent from there.
        self._places = {
            "WANDB_DATA_DIR": folder / "wandb",
            "WANDB_CACHE_DIR": folder / "wandb/cache",
        }
        self._places = {key: p for key, p in self._places.items() if key not in os.environ}
        os.environ.update({key: str(path) for key, path in self._places.items()})
        if files:  # W&B names its files by the second, and would write over those of this one
            time.sleep(1 - time.time() % 1)
        self._wandb = wandb
        self._run = wandb.init(
            id=run_id, resume="allow", project=tracking.project, entity=tracking.entity,
            group=tracking.group, tags=tracking.tags, notes=tracking.notes, name=name,
            job_type=kind, dir=str(folder), config=config, settings=_settings(mode),
        )  # fmt: skip
        self._defined: set[str] = set()
        if mode == "online":
            # What the server has: files of a process that was killed may hold more than it sent.
            self._logged = set(range(1, int(self._run.summary.get("epoch") or 0) + 1))
        else:
            self._logged = {epoch for path in files for epoch in epochs_in(path)}

    def epoch(self, row: Row, best: Row) -> None:
        """Log one row of the learning curves, once.

        The summary holds the row of the best epoch. W&B's own best would forget those before a
        resumption, and would take each metric from another epoch.

        Args:
            row: of the epoch.
            best: that of the best epoch so far.
        """
        for name in [name for name, value in row.items() if value is not None]:
            if name not in self._defined:
                self._defined.add(name)
                if name == "epoch":
                    self._run.define_metric(name)
                else:
                    self._run.define_metric(name, step_metric="epoch", summary="none")
        if row["epoch"] not in self._logged:
            self._run.log({k: v for k, v in row.items() if v is not None})
        shown = {name: value for name, value in best.items() if name != "epoch"}
        self._run.summary.update({**shown, "best_epoch": best.get("epoch")})

    def results(
        self,
        *,
        summary: dict[str, Any],
        labels: NDArray[np.int64],
        probs: NDArray[np.float64],
        predicted: NDArray[np.int64],
        classes: Sequence[str],
        split: str,
        energy: Mapping[str, Mapping[str, float]],
        spectra: Mapping[str, Mapping[str, Sequence[float]]],
        plots: Path,
        adapter: Path,
    ) -> None:
        """Log final numbers, charts, what the adapter learnt, and its files.

        Args:
            summary: numbers by name.
            labels: see `charts`, as `probs`, `predicted` and `classes`.
            probs: of the images.
            predicted: for them.
            classes: names.
            split: of the images, `test` or `val`.
            energy: see `update_tables`, as `spectra` and `plots`.
            spectra: of the update.
            plots: folder of figures.
            adapter: folder of the adapter.
        """
        from wara.training.wandb_charts import charts, update_tables  # and scikit-learn

        self._run.summary.update(summary)
        title = {"val": "Validation"}.get(split, split.capitalize())
        shown = charts(labels, probs, predicted, classes, title)
        self._run.log(shown | update_tables(energy, spectra, plots))
        artifact = self._wandb.Artifact(f"adapter-{self._run.id}", type="adapter")
        for path in sorted(adapter.iterdir()):
            artifact.add_file(str(path))
        self._run.log_artifact(artifact)

    def table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table, all rows of it."""
        data = [list(row) for row in rows]
        self._run.log({key: self._wandb.Table(columns=list(columns), data=data,
                                              allow_mixed_types=True)})  # fmt: skip

    def images(self, pictures: Sequence[tuple[NDArray[np.uint8], str]]) -> None:
        """Log test images with captions; only called when the config asks for it."""
        self._run.log({"test_images": [self._wandb.Image(p, caption=c) for p, c in pictures]})

    def close(self, exit_code: int) -> None:
        """End the run."""
        try:
            self._run.finish(exit_code=exit_code)
        finally:
            for key in self._places:
                os.environ.pop(key, None)


def _mode(wanted: str, folder: Path, unsent: Sequence[Path]) -> tuple[str, str]:
    """Return the mode that a run can have now, and a remark where it is not the wanted one."""
    if wanted != "online":
        return wanted, ""
    if unreachable():
        return "offline", f"wandb is not reachable; writing offline to {folder / 'wandb'}"
    stranger = unknown_sender()
    if stranger:
        raise WaraError(
            "config", stranger, "W&B mode online",
            "run `wandb login`, or set wandb.mode=offline",
        )  # fmt: skip
    if unsent:
        # Epochs that come before those of now; the server takes them in the order they arrive.
        return "offline", (
            f"earlier epochs of this run are not sent yet; writing offline, too; "
            f"send all with: wandb sync {folder / 'wandb'}"
        )
    return "online", ""


def _settings(mode: str) -> Any:
    import wandb

    return wandb.Settings(
        mode=mode,
        silent=True,
        console="off",
        save_code=False,
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
        program="train.py",
        program_relpath="train.py",
        host="",
        email="",
        username="",
        init_timeout=10.0,
    )
