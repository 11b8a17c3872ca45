"""A finished run, read back from its folder: config, model, predictions, metrics."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from wara.adapters import AdapterFile, load_adapter, read_adapter
from wara.backbones import rebuild
from wara.config import RunConfig, load_config
from wara.errors import WaraError
from wara.images import ImageSpec
from wara.runs.folder import RunFolder
from wara.runs.tables import PredictionTable, SplitRow, read_curves, read_predictions, read_splits
from wara.storage import file_sha256, read_json
from wara.vit import BackboneInfo


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        folder: where it lies.
        config: all its settings, the method as it was trained.
        adapter: what its adapter is and fits.
        metrics: content of `metrics.json`.
        provenance: content of `provenance.json`.
    """

    folder: RunFolder
    config: RunConfig
    adapter: AdapterFile
    metrics: dict[str, Any]
    provenance: dict[str, Any]

    @property
    def classes(self) -> list[str]:
        """Names of the outputs, in order."""
        return list(self.adapter.classes or [])

    @property
    def task(self) -> str:
        """`binary | multiclass | multilabel | ordinal`."""
        return str(self.adapter.task)

    @property
    def backbone(self) -> BackboneInfo:
        """What was adapted."""
        assert self.adapter.backbone is not None
        return self.adapter.backbone

    @property
    def spec(self) -> ImageSpec:
        """What the model expects of its images."""
        return replace(self.backbone.spec, bits=self.adapter.bits, greys=self.adapter.greys)

    @property
    def synthetic(self) -> bool:
        """Whether the images of the run were drawn."""
        return bool(self.metrics["synthetic"])

    def model(self, weights: str | Path | None = None) -> nn.Module:
        """Return the trained model, in evaluation mode.

        Args:
            weights: where the backbone's weights lie now; null looks where the run found them.

        Raises:
            WaraError: kind `artefact` when the weights cannot be had or are not those of the run.
        """
        wanted = self.backbone
        given = weights if weights is not None else self.config.backbone.weights
        remedy = f"bring back the weights with SHA-256 {wanted.weights_sha256}"
        if given is not None:
            path = Path(given).expanduser()
            if not path.is_file():
                raise WaraError("artefact", "the backbone's weights are gone", str(path), remedy)
            if file_sha256(path) != wanted.weights_sha256:
                what = "the backbone's weights are not those of the run"
                raise WaraError("artefact", what, str(path), remedy)
        try:
            model = rebuild(wanted, num_classes=len(self.classes), weights=given)
        except WaraError as error:
            raise WaraError("artefact", error.what, error.where, remedy) from error
        return load_adapter(model, self.folder.adapter, classes=self.classes)

    def predictions(self, split: str) -> PredictionTable:
        """Return the predictions for `val` or `test`."""
        return read_predictions(self.folder.predictions(split))

    def splits(self) -> list[SplitRow]:
        """Return what each image is, and which split it is in."""
        return read_splits(self.folder.splits)

    def curves(self) -> list[dict[str, float | None]]:
        """Return the metrics of each epoch."""
        return read_curves(self.folder.curves)


def load_run(folder: str | Path) -> Run:
    """Read the folder of a finished run.

    Raises:
        WaraError: kind `artefact` when the folder is not a finished run's, or a file is damaged.
    """
    run = RunFolder(folder)
    remedy = "give the folder of a finished run"
    if not run.is_run:
        raise WaraError("artefact", "not the folder of a run", str(run.path), remedy)
    if run.status != "finished":
        remedy = f"finish it: wara train --cfg {run.config} --out {run.path} --resume"
        raise WaraError(
            "artefact", f"the run is not finished ({run.status})", str(run.path), remedy
        )
    try:
        config = load_config(run.config)
        metrics, provenance = read_json(run.metrics), read_json(run.provenance)
    except (OSError, ValueError) as error:
        raise WaraError("artefact", f"cannot read: {error}", str(run.path), remedy) from error
    except WaraError as error:
        raise WaraError("artefact", error.what, error.where, remedy) from error
    adapter = read_adapter(run.adapter)
    if adapter.backbone is None or not adapter.classes or adapter.task is None:
        what = "the adapter does not say what it was trained for"
        raise WaraError("artefact", what, str(run.adapter), remedy)
    return Run(run, config, adapter, metrics, provenance)
