"""What is evaluated: a bundle, or a run by its own model. Both are asked in one way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from wara.deploy.bundle import MANIFEST
from wara.deploy.graph import Served
from wara.deploy.predictor import Distance, Predictor
from wara.deploy.reliability import COVERAGE, Scored, conformal_threshold, temperature_of
from wara.errors import WaraError
from wara.evaluation.calibration import to_probs
from wara.images import ImageSpec
from wara.runs.load import Run, load_run
from wara.storage import file_sha256

Floats = NDArray[np.floating[Any]]
_EXPORT = "export the run, and evaluate the bundle"


@dataclass(frozen=True)
class Limit:
    """A threshold, or the reason why there is none."""

    value: float | None
    reason: str | None = None


@dataclass(frozen=True)
class Model:
    """A model with all that is decided about its outputs.

    Args:
        kind: `bundle` or `run`.
        name: what it is called.
        sha256: of a bundle its manifest, of a run its adapter.
        classes: names of the outputs, in order.
        meanings: of the classes, null where not given.
        task: `binary | multiclass | multilabel | ordinal`.
        synthetic: whether it learnt from drawn images.
        spec: what it expects of its images.
        temperature: of its probabilities.
        coverage: that conformal sets were made for.
        conformal: threshold of conformal sets.
        ood: threshold of the distance to the training images.
        distance: to the training images; None where it is not known.
        point: the operating point, as in a manifest; None without one.
        reference: metrics of its own test images.
        trained_on: SHA-256 of the images that it learnt from; None where it does not say.
        run: float32 pixels `[b, 3, h, w]` -> logits `[b, c]`, features `[b, d]`.
    """

    kind: str
    name: str
    sha256: str
    classes: list[str]
    meanings: list[str | None]
    task: str
    synthetic: bool
    spec: ImageSpec
    temperature: float
    coverage: float
    conformal: Limit
    ood: Limit
    distance: Distance | None
    point: dict[str, Any] | None
    reference: dict[str, Any]
    trained_on: frozenset[str] | None
    run: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]

    def probabilities(self, logits: Floats) -> NDArray[np.float64]:
        """Return calibrated probabilities of logits, `[n, c]`."""
        return to_probs(logits, task=self.task, temperature=self.temperature)


def open_model(path: str | Path) -> Model:
    """Open a bundle or the folder of a finished run.

    Raises:
        WaraError: kind "artefact" when it is neither, or not as it was written.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return of_bundle(Predictor(path, abstain_on=()))
    if not path.is_dir():
        remedy = "give a bundle, or the folder of a finished run"
        raise WaraError("artefact", "no such folder", str(path), remedy)
    return _of_run(load_run(path))


def of_bundle(predictor: Predictor) -> Model:
    """Return the model of a bundle."""
    manifest, trusted = predictor.bundle.manifest, predictor.reliability
    return Model(
        kind="bundle",
        name=manifest["name"],
        sha256=predictor.bundle.model_hash,
        classes=predictor.classes,
        meanings=[item["meaning"] for item in manifest["classes"]],
        task=predictor.task,
        synthetic=manifest["synthetic"],
        spec=predictor.spec,
        temperature=float(manifest["temperature"]),
        coverage=trusted["conformal"]["coverage"],
        conformal=Limit(trusted["conformal"]["threshold"], trusted["conformal"]["reason"]),
        ood=Limit(trusted["ood"]["threshold"], trusted["ood"]["reason"]),
        distance=predictor.distance,
        point=manifest["operating_point"],
        reference=manifest["metrics"]["test"],
        trained_on=None,
        run=predictor.run,
    )


def _of_run(run: Run) -> Model:
    """Return the model of a run, calibrated on its validation images as its bundle would be."""
    served = Served(run.model()).eval()

    @torch.no_grad()
    def ask(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits, features = (out.numpy() for out in served(torch.from_numpy(pixels)))
        if not np.isfinite(logits).all():
            raise WaraError("nonfinite", "a logit is not finite", str(run.folder.path),
                            "check the run with `wara verify`")  # fmt: skip
        return logits, features

    found = run.predictions("val").predictions
    val = Scored(found.labels, found.logits, np.zeros((len(found.labels), 0)), [])
    temperature, _ = temperature_of(val)
    probs = to_probs(val.logits, task=run.task, temperature=temperature)
    return Model(
        kind="run",
        name=f"{run.metrics['dataset']}_{run.metrics['method']}",
        sha256=file_sha256(run.folder.adapter / "adapter_model.safetensors"),
        classes=run.classes,
        meanings=[None] * len(run.classes),
        task=run.task,
        synthetic=run.synthetic,
        spec=run.spec,
        temperature=temperature,
        coverage=COVERAGE,
        conformal=Limit(*conformal_threshold(probs, val.labels, COVERAGE)),
        ood=Limit(None, f"a run holds no statistics of features: {_EXPORT}"),
        distance=None,
        point=None,
        reference=run.metrics["test"],
        trained_on=frozenset(row.sha256 for row in run.splits() if row.split == "train"),
        run=ask,
    )
