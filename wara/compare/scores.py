"""One number per trained model, with its value in every resample of the patients.

A *cell* is one trained model: a method, a split of the data, a seed, and what the model said of the
test images of that split. All cells are resampled together: a patient who is drawn twice counts
twice in every method, seed and split whose test images he is among. That is what makes methods
paired, and what lets splits share patients without being taken for independent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from wara.errors import WaraError, suggest
from wara.evaluation import intervals
from wara.evaluation.metrics import as_columns, check_inputs, decide, evaluate, metric_names

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
LOWER_IS_BETTER = ("ece", "brier")


@dataclass(frozen=True)
class Cell:
    """What one trained model said of the test images of its split.

    Args:
        method: name of the method, as shown.
        split: which split of the data; methods that share it were tested on the same images.
        seed: of the training; seeds of one method and split are repeats of each other.
        task: `binary`, `multiclass`, `ordinal` or `multilabel`.
        labels: class indices [n], or 0/1 [n, c] for multilabel.
        probs: [n, c]; softmax, or sigmoid per label for multilabel.
        patients: one id per image [n], None where not known; the same id in another split is the
            same patient. None: every image is a patient of its own.
        files: one name per image [n]. Needed to know an image without patient again in another
            split; without it, such an image is a new one in every split.
        classes: c names, for metrics of one class; None: "0", "1", ...
    """

    method: str
    split: int
    seed: int
    task: str
    labels: ArrayLike
    probs: ArrayLike
    patients: Sequence[str | None] | None = None
    files: Sequence[str] | None = None
    classes: Sequence[str] | None = None

    @property
    def name(self) -> str:
        """How a refusal names the cell."""
        return f"method {self.method}, split {self.split}, seed {self.seed}"


@dataclass(frozen=True)
class Scores:
    """A metric of every cell, and its values in resamples of the patients.

    Args:
        seeds: method -> split -> its seeds, ascending, S of them.
        patients: number of different patients in all splits.
        values: method -> split -> metric of each seed, [S]; None where it is undefined.
        draws: method -> split -> the same in each resample, [S, resamples]; None where an interval
            would mean nothing.
        reason: why `values`, or only `draws`, are missing; None when both are there.
    """

    seeds: dict[str, dict[int, tuple[int, ...]]]
    patients: int
    values: dict[str, dict[int, Floats]] | None = None
    draws: dict[str, dict[int, Floats]] | None = None
    reason: str | None = None


def score_cells(cells: Iterable[Cell], metric: str, *, resamples: int, seed: int) -> Scores:
    """Return the metric of every cell and its value in each of the shared resamples.

    Resamples in which the metric of any cell is undefined (no image of a class was drawn) are left
    out for all. `reason` says when the metric, or its interval, means nothing on these images.

    Args:
        cells: in any order; the result does not depend on it.
        metric: a name of `wara.evaluation.metrics.metric_names`.
        resamples: of the patients, at least 100.
        seed: of the resampling.

    Raises:
        WaraError: `usage` for no cells, a cell given twice, an unknown metric, too few resamples;
            `data` for cells of one split that were not tested on the same images; see also
            `wara.evaluation.metrics.check_inputs`.
    """
    if resamples < 100:
        raise WaraError("usage", f"resamples is {resamples}", remedy="use 100 or more")
    ordered = sorted(cells, key=lambda cell: (cell.split, cell.method, cell.seed))
    if not ordered:
        raise WaraError("usage", "no cells to compare", remedy="finish at least one run")
    _check_unique(ordered)
    firsts = {cell.split: cell for cell in reversed(ordered)}
    firsts = {split: firsts[split] for split in sorted(firsts)}
    for cell in ordered:
        _checked(cell)
        _check_same_images(cell, firsts[cell.split])
        names = metric_names(cell.task, class_names(cell))
        if metric not in names:
            remedy = suggest(metric, names)
            raise WaraError("usage", f"unknown metric {metric!r}", cell.name, remedy)

    cluster, rows = _patients(firsts)
    known = Scores(_seeds(ordered), int(cluster.max()) + 1)
    once = np.ones((len(cluster), 1))
    points = np.stack([_replicates(cell, metric, once[rows[cell.split]]) for cell in ordered])
    undefined = np.flatnonzero(np.isnan(points[:, 0]))
    if len(undefined):
        return replace(known, reason=_undefined(ordered[undefined[0]], metric))
    known = replace(known, values=_nested(ordered, points[:, 0]))
    fault = _first(_fault(cell, metric, cluster[rows[cell.split]]) for cell in firsts.values())
    if fault:
        return replace(known, reason=fault)
    parts = [
        np.stack([_replicates(cell, metric, counts[rows[cell.split]]) for cell in ordered])
        for counts in intervals.draw_counts(cluster, resamples, seed)
    ]
    draws = np.concatenate(parts, axis=1)
    draws = draws[:, np.isfinite(draws).all(axis=0)]
    if draws.shape[1] < intervals.MIN_DEFINED * resamples:
        share = f"{draws.shape[1]} of {resamples}"
        return replace(known, reason=f"no interval: defined in {share} resamples")
    return replace(known, draws=_nested(ordered, draws))


def class_names(cell: Cell) -> list[str]:
    """Return the names of the classes of a cell, "0", "1", ... where none were given."""
    count = np.asarray(cell.probs).shape[-1]
    return [str(k) for k in range(count)] if cell.classes is None else list(cell.classes)


def _nested(cells: Sequence[Cell], numbers: Floats) -> dict[str, dict[int, Floats]]:
    """Sort rows of numbers, one per cell, into method -> split -> [S, ...]."""
    rows: dict[str, dict[int, list[Floats]]] = {}
    for cell, row in zip(cells, numbers, strict=True):
        rows.setdefault(cell.method, {}).setdefault(cell.split, []).append(row)
    return {m: {k: np.stack(row) for k, row in of.items()} for m, of in rows.items()}


def _seeds(cells: Sequence[Cell]) -> dict[str, dict[int, tuple[int, ...]]]:
    found: dict[str, dict[int, tuple[int, ...]]] = {}
    for cell in cells:
        of = found.setdefault(cell.method, {})
        of[cell.split] = (*of.get(cell.split, ()), cell.seed)
    return found


def _first(reasons: Iterable[str | None]) -> str | None:
    return next(filter(None, reasons), None)


def _check_unique(cells: Sequence[Cell]) -> None:
    seen: set[tuple[str, int, int]] = set()
    for cell in cells:
        key = (cell.method, cell.split, cell.seed)
        if key in seen:
            raise WaraError("usage", "a cell is given twice", cell.name)
        seen.add(key)


def _check_same_images(cell: Cell, first: Cell) -> None:
    """Refuse a cell that was tested on other images than the first one of its split."""
    labels, known = np.asarray(cell.labels), np.asarray(first.labels)
    for what, ids in (("patients", cell.patients), ("files", cell.files)):
        if ids is not None and len(ids) != len(labels):
            raise WaraError("usage", f"{len(ids)} {what} for {len(labels)} images", cell.name)
    faults = {
        f"{len(labels)} test images instead of {len(known)}": len(labels) != len(known),
        f"task {cell.task} instead of {first.task}": cell.task != first.task,
        "other classes": class_names(cell) != class_names(first),
        "other files": _listed(cell.files) != _listed(first.files),
        "other patients": _listed(cell.patients) != _listed(first.patients),
        "other labels": not np.array_equal(labels, known),
    }
    found = next((words for words, wrong in faults.items() if wrong), None)
    if found:
        remedy = f"give every cell of a split the images, in the order, of {first.name}"
        raise WaraError("data", f"not the same test images: {found}", cell.name, remedy)


def _listed(ids: Sequence[str | None] | None) -> list[str | None] | None:
    return None if ids is None else list(ids)


def _patients(firsts: dict[int, Cell]) -> tuple[Ints, dict[int, slice]]:
    """Return the patient of every test image of all splits [N], and the rows of each split."""
    keys: list[str] = []
    rows: dict[int, slice] = {}
    for split, cell in firsts.items():
        start = len(keys)
        for i in range(len(np.asarray(cell.probs))):
            patient = None if cell.patients is None else cell.patients[i]
            alone = f"{split} {i}" if cell.files is None else f"file {cell.files[i]}"
            keys.append(f"image {alone}" if patient is None else f"patient {patient}")
        rows[split] = slice(start, len(keys))
    return intervals.clusters(len(keys), keys), rows


def _undefined(cell: Cell, metric: str) -> str:
    """Return why the metric is undefined on the images of a cell."""
    labels, probs, options = _checked(cell)
    entry = evaluate(labels, probs, bootstrap=0, **options)[metric]
    return f"split {cell.split}: {entry['reason']}"


def _fault(cell: Cell, metric: str, cluster: Ints) -> str | None:
    """Return why an interval of the metric would mean nothing on the images of a cell."""
    labels, _, options = _checked(cell)
    own = np.unique(cluster, return_inverse=True)[1]
    by_patient = cell.patients is not None
    faults = intervals.interval_faults(labels, own, by_patient=by_patient, **options)
    return f"split {cell.split}: {faults[metric]}" if metric in faults else None


def _checked(cell: Cell) -> tuple[Ints, Floats, dict[str, Any]]:
    """Return labels, probabilities and the `task` and `classes` they were checked against."""
    options: dict[str, Any] = {"task": cell.task, "classes": class_names(cell)}
    labels, probs = check_inputs(cell.labels, cell.probs, **options)
    return labels, probs, options


def _replicates(cell: Cell, metric: str, counts: Floats) -> Floats:
    """Return the metric of a cell in each resample, [replicates], NaN where undefined."""
    labels, probs, options = _checked(cell)
    task, names = cell.task, options["classes"]
    if metric.startswith("auc_"):  # ten times faster than all metrics
        positive = as_columns(labels, task, len(names))
        each = intervals.replicate_auc(positive, probs, counts, task=task)
        return each.mean(axis=0) if metric == "auc_macro" else each[names.index(metric[4:])]
    called = as_columns(decide(probs, task=task), task, len(names))
    return intervals.replicate_metrics(labels, probs, called, counts, **options)[metric]
