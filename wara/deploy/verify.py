"""Whether a bundle, a run or a trace is what was written, and speaks here as it spoke there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from wara.deploy.bundle import MANIFEST
from wara.deploy.parity import LARGEST
from wara.deploy.predictor import Predictor
from wara.deploy.trace import is_closed, verify_trace
from wara.errors import WaraError
from wara.images import load_array, normalise
from wara.runs.load import load_run


def verify(path: str | Path) -> Iterator[str]:
    """Check a bundle, a run folder or a trace; yields what was found right.

    Raises:
        WaraError: kind "artefact", naming what is not as it was written.
    """
    path = Path(path)
    if path.is_file():
        last = verify_trace(path)
        yield f"trace: every line is as it was written; the last is {last}"
        yield "closed" if is_closed(path) else "not closed: the last call did not come to its end"
    elif (path / MANIFEST).is_file():
        yield from _bundle(path)
    elif path.is_dir():
        yield from _run(path)
    else:
        remedy = "give a bundle, a run folder or a trace"
        raise WaraError("artefact", "there is nothing to verify", str(path), remedy)


def _bundle(path: Path) -> Iterator[str]:
    predictor = Predictor(path)
    manifest = predictor.bundle.manifest
    yield f"bundle: {len(manifest['files'])} files are as they were exported"
    reference = json.loads(predictor.bundle.read("reference/reference.json"))
    pixels = np.stack([
        normalise(load_array(path / "reference" / name, predictor.spec), predictor.spec)
        for name in reference["images"]
    ])  # fmt: skip
    logits, _ = predictor.run(pixels)
    difference = float(np.abs(logits - np.array(reference["logits"])).max())
    # The arithmetic of int8 differs between processors, by whole steps of the quantisation.
    limit = LARGEST if manifest["model"]["precision"] == "float32" else 0.1
    if difference > limit:
        what = f"reference logits differ by {difference:.2g} here, more than {limit:g}"
        remedy = "install the versions of the bundle's requirements.txt"
        raise WaraError("artefact", what, str(path), remedy)
    yield f"reference: {len(pixels)} images, largest difference of a logit {difference:.2g}"
    if manifest["synthetic"]:
        yield "SYNTHETIC: trained on drawn images, not on patients"


def _run(path: Path) -> Iterator[str]:
    run = load_run(path)
    yield f"run: {run.metrics['method']} on {run.metrics['dataset']}, finished"
    for split in ("val", "test"):
        yield f"predictions: {len(run.predictions(split).files)} {split} images"
    yield f"splits: {len(run.splits())} images; curves: {len(run.curves())} epochs"
    run.model()
    yield "adapter: every tensor is as it was written, and fits the backbone"
