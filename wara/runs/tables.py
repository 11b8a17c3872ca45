"""The tables of a run folder, written and read; their columns are a public contract.

`synthetic` comes last in each of them, so that the contract's columns keep their places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from wara.errors import WaraError
from wara.evaluation.predict import Predictions
from wara.storage import read_csv, write_csv

Label = int | tuple[int, ...]
_REMEDY = "give the folder of a finished run, as it was written"


class SplitRow(NamedTuple):
    """One row of `splits.csv`."""

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


def write_splits(path: Path, rows: Sequence[SplitRow], *, synthetic: bool) -> None:
    """Write `splits.csv`."""
    _write(path, SplitRow._fields, split_cells(rows), synthetic)


def split_cells(rows: Sequence[SplitRow]) -> list[tuple[str | None, ...]]:
    """Return the rows as they stand in `splits.csv`."""
    return [(r.file, label_text(r.label), r.patient, r.split, r.sha256) for r in rows]


def read_splits(path: Path) -> list[SplitRow]:
    """Read `splits.csv`.

    Raises:
        WaraError: kind "artefact" when it is not such a table.
    """
    return [
        SplitRow(r["file"], parse_label(r["label"]), r["patient"] or None, r["split"], r["sha256"])
        for r in _read(path, SplitRow._fields)[1]
    ]


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
    return [
        {key: float(cell) if cell else None for key, cell in row.items() if key != "synthetic"}
        for row in _read(path, ["epoch"])[1]
    ]


def write_predictions(
    path: Path,
    found: Predictions,
    *,
    files: Sequence[str],
    patients: Sequence[str | None],
    classes: Sequence[str],
    synthetic: bool,
) -> None:
    """Write `predictions_<split>.csv`: file, patient, label, pred, prob_*, logit_*.

    Multilabel labels and predictions are written as 0/1 digits joined by spaces, in class order.
    Numbers are written so that they read back as the same float.
    """
    columns = ["file", "patient", "label", "pred"]
    columns += [f"prob_{name}" for name in classes] + [f"logit_{name}" for name in classes]
    rows = [
        [file, patient, label_text(label), label_text(pred)]
        + [repr(float(value)) for value in (*prob, *logit)]
        for file, patient, label, pred, prob, logit in zip(
            files, patients, found.labels, found.predicted, found.probs, found.logits, strict=True
        )
    ]
    _write(path, columns, rows, synthetic)


def read_predictions(path: Path) -> PredictionTable:
    """Read `predictions_<split>.csv`.

    Raises:
        WaraError: kind "artefact" when it is not such a table.
    """
    columns, rows = _read(path, ["file", "patient", "label", "pred"])
    classes = [name.removeprefix("prob_") for name in columns if name.startswith("prob_")]

    def numbers(kind: str) -> np.ndarray[Any, Any]:
        table = [[float(row[f"{kind}_{name}"]) for name in classes] for row in rows]
        return np.array(table, np.float64).reshape(len(rows), len(classes))

    try:
        found = Predictions(
            index=np.arange(len(rows)),
            labels=np.array([parse_label(row["label"]) for row in rows], np.int64),
            logits=numbers("logit").astype(np.float32),
            probs=numbers("prob"),
            predicted=np.array([parse_label(row["pred"]) for row in rows], np.int64),
        )
    except (KeyError, ValueError) as error:
        what = f"not a table of predictions: {error}"
        raise WaraError("artefact", what, str(path), _REMEDY) from error
    patients = [row["patient"] or None for row in rows]
    return PredictionTable([row["file"] for row in rows], patients, classes, found)


def label_text(label: Any) -> str:
    """A label as it stands in a table: its number, or its 0/1 digits joined by spaces."""
    values = np.asarray(label)
    return " ".join(str(int(v)) for v in values) if values.ndim else str(int(values))


def parse_label(text: str) -> Label:
    """Read what `label_text` wrote; a multilabel task has several digits."""
    digits = tuple(int(part) for part in text.split(" "))
    return digits if len(digits) > 1 else digits[0]


def _write(
    path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]], synthetic: bool
) -> None:
    stamp = "true" if synthetic else "false"
    write_csv(path, [*columns, "synthetic"], [[*row, stamp] for row in rows])


def _read(path: Path, wanted: Sequence[str]) -> tuple[list[str], list[dict[str, str]]]:
    columns, rows = read_csv(path)
    lacking = [name for name in wanted if name not in columns]
    if lacking:
        raise WaraError("artefact", f"no column {', '.join(lacking)}", str(path), _REMEDY)
    return columns, rows
