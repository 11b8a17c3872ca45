"""Weights & Biases and TensorBoard: numbers only, unless images were asked for."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wara.cards import LOCAL, public_name
from wara.errors import WaraError
from wara.net import reachable
from wara.runs.progress import Row


def public_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config without what may name people or places: these are reduced to `local`."""
    kept = {key: value for key, value in config.items() if key != "out"}
    kept["dataset"] = public_name(str(kept.get("dataset")))
    kept["data"] = {k: v for k, v in kept.get("data", {}).items() if k != "cache"}
    backbone = dict(kept.get("backbone", {}))
    if backbone.get("weights"):
        backbone["weights"] = LOCAL
    return {**kept, "backbone": backbone}


class WandbSink:
    """One wandb run.

    Offline it writes under the run folder and never opens a connection; `wandb sync` sends it
    later. Arguments of the command line, code, git state, host and user names stay out.

    Args:
        mode: `offline` or `online`.
        project: wandb project.
        name: name of the run.
        folder: where `wandb/` goes.
        config: what to show as the run's config, see `public_config`.

    Raises:
        WaraError: kind "config", when `online` is asked for without a login.
    """

    def __init__(
        self, *, mode: str, project: str, name: str, folder: Path, config: dict[str, Any]
    ) -> None:
        import wandb

        self.note = ""
        if mode == "online":
            if not wandb.api.api_key:
                raise WaraError(
                    "config", "wandb is not logged in", "wandb: online",
                    "run `wandb login`, or set wandb=offline",
                )  # fmt: skip
            if not reachable(os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url):
                mode = "offline"
                self.note = f"wandb is not reachable; writing offline to {folder / 'wandb'}"
        settings = wandb.Settings(
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
        # Artifacts are staged and logs kept beside the run, not in the home folder, so that the run
        # folder can be moved to a machine with a network and sent from there.
        self._places = {
            "WANDB_DATA_DIR": folder / "wandb",
            "WANDB_CACHE_DIR": folder / "wandb/cache",
        }
        self._places = {key: p for key, p in self._places.items() if key not in os.environ}
        os.environ.update({key: str(path) for key, path in self._places.items()})
        self._wandb = wandb
        self._run = wandb.init(
            project=project, name=name, dir=str(folder), config=config, settings=settings
        )

    def epoch(self, number: int, row: Row) -> None:
        """Log one row of the learning curves."""
        self._run.log({k: v for k, v in row.items() if v is not None}, step=number)

    def results(
        self,
        *,
        summary: dict[str, Any],
        labels: NDArray[np.int64],
        probs: NDArray[np.float64],
        predicted: NDArray[np.int64],
        classes: Sequence[str],
        adapter: Path,
    ) -> None:
        """Log final numbers, the test set's confusion and ROC charts, and the adapter files."""
        self._run.summary.update(summary)
        if labels.ndim == 1:
            self._run.log(
                {
                    "confusion": self._wandb.plot.confusion_matrix(
                        y_true=labels.tolist(), preds=predicted.tolist(),
                        class_names=list(classes), title="Test confusion",
                    ),
                    "roc": self._wandb.plot.roc_curve(
                        labels.tolist(), probs.tolist(), labels=list(classes), title="Test ROC"
                    ),
                }
            )  # fmt: skip
        else:
            # The native charts are for one label per image; one chart per finding instead.
            charts: dict[str, Any] = {}
            for k, name in enumerate(classes):
                truth = labels[:, k]
                two = np.stack([1 - probs[:, k], probs[:, k]], axis=1)
                absent_present = [f"no {name}", name]
                charts[f"confusion_{name}"] = self._wandb.plot.confusion_matrix(
                    y_true=truth.tolist(), preds=predicted[:, k].tolist(),
                    class_names=absent_present, title=f"Test confusion, {name}",
                )  # fmt: skip
                charts[f"roc_{name}"] = self._wandb.plot.roc_curve(
                    truth.tolist(), two.tolist(), labels=absent_present, title=f"Test ROC, {name}"
                )
            self._run.log(charts)
        artifact = self._wandb.Artifact(f"adapter-{self._run.id}", type="adapter")
        for path in sorted(adapter.iterdir()):
            artifact.add_file(str(path))
        self._run.log_artifact(artifact)

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
        self.wandb: WandbSink | None = None
        self.tensorboard: TensorBoardSink | None = None

    def start(
        self,
        folder: Path,
        *,
        wandb: str,
        project: str,
        name: str,
        config: dict[str, Any],
        tensorboard: bool,
    ) -> None:
        """Start what was asked for.

        Args:
            folder: the run folder.
            wandb: `offline | online | off`.
            project: wandb project.
            name: name of the wandb run.
            config: what wandb shows as the config, see `public_config`.
            tensorboard: whether to write TensorBoard files.

        Raises:
            WaraError: kind "config", when something asked for is not installed or not logged in.
        """
        if tensorboard:
            self.tensorboard = TensorBoardSink(folder)
        if wandb != "off":
            with self._forgiving():
                self.wandb = WandbSink(
                    mode=wandb, project=project, name=name, folder=folder, config=config
                )
                if self.wandb.note:
                    self.say(f"note: {self.wandb.note}")

    def epoch(self, number: int, row: Row) -> None:
        """Log one row of the learning curves."""
        if self.tensorboard is not None:
            self.tensorboard.epoch(number, row)
        if self.wandb is not None:
            with self._forgiving():
                self.wandb.epoch(number, row)

    def results(
        self, *, metrics: dict[str, Any], images: Sequence[tuple[Any, str]], **shown: Any
    ) -> None:
        """Send final numbers, charts and adapter to wandb.

        Args:
            metrics: content of `metrics.json`.
            images: pictures with captions; empty unless asked for.
            **shown: the other arguments of `WandbSink.results`.
        """
        if self.wandb is None:
            return
        summary = {key: value for key, value in metrics.items() if not isinstance(value, dict)}
        for split in ("val", "test"):
            for name, entry in metrics[split].items():
                summary[re.sub(r"\W+", "_", f"{split}_{name}").strip("_")] = entry["value"]
        with self._forgiving():
            self.wandb.results(summary=summary, **shown)
            if images:
                self.wandb.images(images)

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
