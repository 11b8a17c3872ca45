"""Whether a bundle, a run or a trace is what was written, and speaks here as it spoke there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from wara.deploy.bundle import MANIFEST, readable
from wara.deploy.contents import check_reference
from wara.deploy.parity import LARGEST
from wara.deploy.predictor import Predictor
from wara.deploy.trace import unclosed, verify_trace
from wara.errors import WaraError
from wara.evaluation.metrics import point_metrics
from wara.evaluation.predict import Predictions
from wara.images import load_array, normalise
from wara.runs.load import Run, load_run
from wara.runs.sealed import check_all


def verify(path: str | Path) -> Iterator[str]:
    """Check a bundle, a run folder or a trace; yields what was found right.

    Raises:
        WaraError: kind "artefact", naming what is not as it was written, "storage" for what may
            not be read.
    """
    path = Path(path)
    with readable(path):
        file, bundle = path.is_file(), (path / MANIFEST).is_file()
    if file:
        yield from _trace(path)
    elif bundle:
        yield from _bundle(path)
    elif path.is_dir():
        yield from _run(path)
    else:
        remedy = "give a bundle, a run folder or a trace"
        raise WaraError("artefact", "there is nothing to verify", str(path), remedy)


def _trace(path: Path) -> Iterator[str]:
    if not path.stat().st_size:
        remedy = "give the file that --trace wrote"
        raise WaraError("artefact", "the trace is empty", str(path), remedy)
    last = verify_trace(path)
    yield f"trace: every line is as it was written; the last is {last}"
    yield "compare that hash with one noted elsewhere: lines cut off at the end leave no other sign"
    for number in unclosed(path):
        yield f"not closed: the call of line {number} did not come to its end, or its end is gone"


def _bundle(path: Path) -> Iterator[str]:
    predictor = Predictor(path, abstain_on=())
    manifest = predictor.bundle.manifest
    yield f"bundle: {len(manifest['files'])} files are as they were exported"
    name = "reference/reference.json"
    reference = predictor.bundle.read_json(name)
    check_reference(reference, manifest["files"], len(predictor.classes), str(path / name))
    pixels = np.stack([
        normalise(load_array(path / "reference" / name, predictor.spec), predictor.spec)
        for name in reference["images"]
    ])  # fmt: skip
    logits, _ = predictor.run(pixels)
    difference = float(np.abs(logits - np.array(reference["logits"])).max())
    # The arithmetic of int8 differs between processors, by whole steps of the quantisation.
    limit = LARGEST if manifest["model"]["precision"] == "float32" else 0.1
    if not difference <= limit:
        what = f"reference logits differ by {difference:.2g} here, more than {limit:g}"
        remedy = "install the versions of the bundle's requirements.txt"
        raise WaraError("artefact", what, str(path), remedy)
    yield f"reference: {len(pixels)} images, largest difference of a logit {difference:.2g}"
    if manifest["synthetic"]:
        yield "SYNTHETIC: trained on drawn images, not on patients"


def _run(path: Path) -> Iterator[str]:
    run = load_run(path)
    yield f"run: {run.metrics['method']} on {run.metrics['dataset']}, finished"
    yield f"files: {check_all(run.folder)} are as they were when the run ended"
    splits = run.splits()
    for split in ("val", "test"):
        table = run.predictions(split)
        if sorted(table.files) != sorted(row.file for row in splits if row.split == split):
            what = f"the predictions are not of the {split} images of splits.csv"
            raise _changed(what, run.folder.predictions(split))
        if table.files:
            _check_metrics(run, split, table.predictions)
        yield f"predictions: {len(table.files)} {split} images; metrics.json follows from them"
    yield f"splits: {len(splits)} images; curves: {len(run.curves())} epochs"
    run.model()
    yield "adapter: every tensor is as it was written, and fits the backbone"


def _check_metrics(run: Run, split: str, found: Predictions) -> None:
    """Compute the metrics of a split again, and compare them with what the run says."""
    values = point_metrics(found.labels, found.probs, task=run.task, classes=run.classes)
    for name, value in values.items():
        said = run.metrics[split].get(name, {}).get("value")
        same = said is None if value is None else said is not None and abs(said - value) < 1e-9
        if not same:
            what = f"{split} {name} is {said}, and {value} by the predictions"
            raise _changed(what, run.folder.metrics)


def _changed(what: str, path: Path) -> WaraError:
    return WaraError("artefact", what, str(path), "bring back the folder as the run wrote it")
