"""A finished run, read back from its folder: config, model, predictions, metrics."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from wara.adapters import AdapterFile, load_adapter, read_adapter
from wara.adapters.files import CONFIG_FILE
from wara.backbones import rebuild
from wara.config import RunConfig, load_config
from wara.errors import WaraError
from wara.images import ImageSpec
from wara.runs.folder import RunFolder
from wara.runs.records import (
    MetricsFile,
    ProvenanceFile,
    other_writer,
    read_record,
    writer_of,
)
from wara.runs.sealed import check_sealed
from wara.runs.tables import (
    AS_WRITTEN,
    PredictionTable,
    SplitRow,
    read_curves,
    read_predictions,
    read_splits,
)
from wara.storage import file_sha256
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
        given = weights if weights is not None else self._weights()
        remedy = f"name the file with SHA-256 {wanted.weights_sha256}: model(weights=PATH)"
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
        path = self.folder.predictions(split)
        found = read_predictions(path, classes=self.classes, task=self.task)
        self._check(path)
        return found

    def splits(self) -> list[SplitRow]:
        """Return what each image is, and which split it is in."""
        found = read_splits(self.folder.splits, classes=self.classes, task=self.task)
        self._check(self.folder.splits)
        return found

    def curves(self) -> list[dict[str, float | None]]:
        """Return the metrics of each epoch."""
        found = read_curves(self.folder.curves)
        self._check(self.folder.curves)
        return found

    def _check(self, *paths: Path) -> None:
        """Refuse files that were changed since; called once they are known to be readable."""
        if self.folder.sealed.exists() or not other_writer(self.provenance):
            check_sealed(self.folder, paths)  # earlier versions did not seal

    def _weights(self) -> str | None:
        """Return where the run found the backbone's weights, when the user had named a file."""
        named = self.config.backbone.weights
        if named is None or Path(named).expanduser().is_file():
            return named
        # The config has the path as it was given, which counts from another folder.
        return str(self.provenance["backbone"].get("weights", named))


def load_run(folder: str | Path) -> Run:
    """Read the folder of a finished run.

    Raises:
        WaraError: kind `artefact` when the folder is not a finished run's, a file is damaged, or
            another version of wara wrote it in another form.
    """
    run = RunFolder(folder)
    if not run.is_run:
        remedy = "give the folder of a finished run"
        raise WaraError("artefact", "not the folder of a run", str(run.path), remedy)
    provenance = read_record(run.provenance, ProvenanceFile)
    if run.status != "finished":
        remedy = f"finish it: wara train --cfg {run.config} --out {run.path} --resume"
        raise WaraError(
            "artefact", f"the run is not finished ({run.status})", str(run.path), remedy
        )
    try:
        return _read(run, provenance)
    except WaraError as error:
        other = other_writer(provenance)
        if not other:
            raise
        remedy = f"read it with wara {writer_of(provenance)}, or train again"
        what = f"{other}, which does not read it: {error.what}"
        raise WaraError("artefact", what, error.where, remedy) from error


def _read(run: RunFolder, provenance: dict[str, Any]) -> Run:
    try:
        config = load_config(run.config)
    except WaraError as error:
        raise WaraError("artefact", error.what, error.where, error.remedy or AS_WRITTEN) from error
    metrics = read_record(run.metrics, MetricsFile)
    adapter = read_adapter(run.adapter)
    if adapter.backbone is None or not adapter.classes or adapter.task is None:
        what = "the adapter does not say what it was trained for"
        raise WaraError("artefact", what, str(run.adapter), AS_WRITTEN)
    found = Run(run, config, adapter, metrics, provenance)
    found._check(run.config, run.provenance, run.metrics, run.adapter / CONFIG_FILE)
    return found
