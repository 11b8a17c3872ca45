"""The tables of a run folder, written and read; their columns are a public contract.

Classes stand in them by name, as a reader of a spreadsheet wants them, with their numbers beside;
the numbers are what is read back. `synthetic` comes last in each table, so that the contract's
columns keep their places.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from wara.data.likeness import Pair
from wara.data.splits import SPLITS, UNUSED
from wara.errors import WaraError
from wara.evaluation.predict import Predictions
from wara.storage import read_csv, write_csv

Label = int | tuple[int, ...]
AS_WRITTEN = "bring back the file as the run wrote it, or train again"
"""What helps when a file of a run folder is damaged."""
_SEVERAL = "|"


class SplitRow(NamedTuple):
    """One row of `splits.csv`; the label as a number, or 0/1 per class."""

    file: str
    label: Label
    patient: str | None
    split: str
    sha256: str


@dataclass(frozen=True)
class PredictionTable:
    """What `predictions_<split>.csv` holds.

    Args:
        files: `[n]`.
        patients: `[n]`, None where not known.
        classes: names of the outputs.
        predictions: labels, logits, probabilities and decisions; `index` counts rows.
    """

    files: list[str]
    patients: list[str | None]
    classes: list[str]
    predictions: Predictions


def write_splits(
    path: Path, rows: Sequence[SplitRow], *, classes: Sequence[str], synthetic: bool
) -> None:
    """Write `splits.csv`: file, label, label_index, patient, split, sha256."""
    columns = ["file", "label", "label_index", "patient", "split", "sha256"]
    cells = [
        (r.file, label_names(r.label, classes), _index(r.label), r.patient, r.split, r.sha256)
        for r in rows
    ]
    _write(path, columns, cells, synthetic)


def write_twins(
    path: Path,
    pairs: Sequence[Pair],
    rows: Sequence[SplitRow],
    *,
    classes: Sequence[str],
    synthetic: bool,
) -> None:
    """Write `near_duplicates.csv`: the pictures that are there twice, a pair per row.

    Args:
        path: of the table.
        pairs: by the numbers of `rows`.
        rows: of `splits.csv`.
        classes: names of the outputs.
        synthetic: whether the images were drawn.
    """
    columns = (
        "file_a file_b kind distance correlation mirrored split_a split_b label_a label_b"
    ).split()
    cells = []
    for pair in pairs:
        a, b = rows[pair.first], rows[pair.second]
        cells.append(
            (a.file, b.file, pair.kind, pair.distance, pair.correlation, pair.mirrored, a.split,
             b.split, label_names(a.label, classes), label_names(b.label, classes))
        )  # fmt: skip
    _write(path, columns, cells, synthetic)


def hashed_cells(rows: Sequence[SplitRow]) -> list[tuple[str | None, ...]]:
    """Return what the data of a run are known by, see `provenance.data_sha256`."""
    return [(r.file, _index(r.label), r.patient, r.split, r.sha256) for r in rows]


def read_splits(path: Path, *, classes: Sequence[str], task: str) -> list[SplitRow]:
    """Read `splits.csv`.

    Args:
        path: of the table.
        classes: names of the outputs.
        task: `binary | multiclass | multilabel | ordinal`.

    Raises:
        WaraError: kind "artefact" when it is not such a table.
    """
    found = []
    wanted = ["file", "label", "label_index", "patient", "split", "sha256"]
    for row in _read(path, wanted)[1]:
        if row["split"] not in (*SPLITS, UNUSED):
            raise row.fault("split", f"one of {', '.join((*SPLITS, UNUSED))}")
        label = row.label("label", classes, task)
        found.append(
            SplitRow(row["file"], label, row["patient"] or None, row["split"], row["sha256"])
        )
    return found


def write_curves(
    path: Path, history: Sequence[Mapping[str, float | None]], *, synthetic: bool
) -> None:
    """Write `metrics.csv`, one row per epoch."""
    columns = list(history[0]) if history else ["epoch"]
    _write(path, columns, [[row.get(name) for name in columns] for row in history], synthetic)


def read_curves(path: Path) -> list[dict[str, float | None]]:
    """Read `metrics.csv`; None where a metric was undefined.

    Raises:
        WaraError: kind "artefact" when it is not such a table.
    """
    columns, rows = _read(path, ["epoch"])
    names = [name for name in columns if name != "synthetic"]
    return [{name: row.number(name) if row[name] else None for name in names} for row in rows]


def write_predictions(
    path: Path,
    found: Predictions,
    *,
    files: Sequence[str],
    patients: Sequence[str | None],
    classes: Sequence[str],
    synthetic: bool,
) -> None:
    """Write `predictions_<split>.csv`.

    Columns: file, patient, label, label_index, pred, pred_index, prob_*, logit_*. Several labels
    of one image are joined by `|`; where it has none, the cell is empty. Numbers are written so
    that they read back as the same float.
    """
    columns = ["file", "patient", "label", "label_index", "pred", "pred_index"]
    columns += [f"prob_{name}" for name in classes] + [f"logit_{name}" for name in classes]
    rows = [
        [
            file, patient,
            label_names(label, classes), _index(label), label_names(pred, classes), _index(pred),
            *(repr(float(value)) for value in (*prob, *logit)),
        ]
        for file, patient, label, pred, prob, logit in zip(
            files, patients, found.labels, found.predicted, found.probs, found.logits, strict=True
        )
    ]  # fmt: skip
    _write(path, columns, rows, synthetic)


def read_predictions(path: Path, *, classes: Sequence[str], task: str) -> PredictionTable:
    """Read `predictions_<split>.csv`; arguments and errors as `read_splits`."""
    wanted = ["file", "patient", "label", "label_index", "pred", "pred_index"]
    wanted += [f"{kind}_{name}" for kind in ("prob", "logit") for name in classes]
    rows = _read(path, wanted)[1]

    def numbers(kind: str) -> np.ndarray[Any, Any]:
        table = [[row.number(f"{kind}_{name}") for name in classes] for row in rows]
        return np.array(table, np.float64).reshape(len(rows), len(classes))

    def labels(column: str) -> np.ndarray[Any, Any]:
        shape = (len(rows), len(classes)) if task == "multilabel" else len(rows)
        found = [row.label(column, classes, task) for row in rows]
        return np.array(found, np.int64).reshape(shape)

    found = Predictions(
        index=np.arange(len(rows)),
        labels=labels("label"),
        logits=numbers("logit").astype(np.float32),
        probs=numbers("prob"),
        predicted=labels("pred"),
    )
    patients = [row["patient"] or None for row in rows]
    return PredictionTable([row["file"] for row in rows], patients, list(classes), found)


def label_names(label: Any, classes: Sequence[str]) -> str:
    """Return a label as it stands in a table: the name of its class, or of each, joined by `|`."""
    return _SEVERAL.join(classes[i] for i in _numbers(label))


def _index(label: Any) -> str:
    return _SEVERAL.join(map(str, _numbers(label)))


def _numbers(label: Any) -> list[int]:
    values = np.asarray(label)
    return [int(i) for i in np.flatnonzero(values)] if values.ndim else [int(values)]


class _Row(dict[str, str]):
    """A row that knows where it stands, for what is said of a damaged cell."""

    place = ""

    def fault(self, column: str, wanted: str) -> WaraError:
        what = f"{column} is '{self[column][:40]}', which is not {wanted}"
        return WaraError("artefact", what, self.place, AS_WRITTEN)

    def number(self, column: str) -> float:
        try:
            value = float(self[column])
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise self.fault(column, "a finite number")
        return value

    def label(self, column: str, classes: Sequence[str], task: str) -> Label:
        index = f"{column}_index"
        several = task == "multilabel"
        parts = self[index].split(_SEVERAL) if self[index] or not several else []
        known = {str(i): i for i in range(len(classes))}
        if not set(parts) <= known.keys() or len(parts) != (len(set(parts)) if several else 1):
            raise self.fault(index, "the number of a class" + " or several" * several)
        chosen = [known[part] for part in parts]
        label = tuple(int(i in chosen) for i in range(len(classes))) if several else chosen[0]
        if self[column] != label_names(label, classes):
            raise self.fault(column, f"the class of its number {self[index]}")
        return label


def _write(
    path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]], synthetic: bool
) -> None:
    stamp = "true" if synthetic else "false"
    write_csv(path, [*columns, "synthetic"], [[*row, stamp] for row in rows])


def _read(path: Path, wanted: Sequence[str]) -> tuple[list[str], list[_Row]]:
    columns, rows = read_csv(path)
    lacking = [name for name in wanted if name not in columns]
    if lacking:
        raise WaraError("artefact", f"no column {', '.join(lacking)}", str(path), AS_WRITTEN)
    return columns, list(_placed(path, rows))


def _placed(path: Path, rows: Sequence[Mapping[str, str]]) -> Iterator[_Row]:
    for number, cells in enumerate(rows, start=1):
        row = _Row(cells)
        row.place = f"{path} row {number}"
        yield row
