"""What `check.json` and `images.csv` hold: the facts of an inspection as plain values."""

from __future__ import annotations

import datetime
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from wara import __version__
from wara.check.inspection import Inspection
from wara.data.appearance import SUSPICIOUS
from wara.data.facts import ImageFacts
from wara.data.imageset import ImageSet
from wara.data.splits import SPLITS, UNUSED
from wara.data.twins import apart, exact_groups
from wara.runs.tables import SplitRow, label_names

COLUMNS = (
    "file", "label", "patient", "split", "sha256", "width", "height", "container", "mode", "bits",
    "mean", "std", "synthetic",
)  # fmt: skip
Content = dict[str, Any]


def content_of(found: Inspection) -> Content:
    """Return all that is said of a data set, as JSON has it."""
    images = found.images
    content: Content = {
        "wara": __version__,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "dataset": found.dataset,
        "accepted": not found.findings.faults,
        "synthetic": images is not None and images.synthetic,
        "faults": [
            {"about": about, "kind": kind_of(fault.what), "what": printable(fault.what),
             "where": printable(fault.where), "remedy": printable(fault.remedy)}
            for about, faults in found.findings.faults.items()
            for fault in faults
        ],
        "notes": [printable(note) for note in found.findings.notes],
        "warnings": [printable(warning) for warning in found.warnings],
    }  # fmt: skip
    return content if images is None else content | _of_images(found, images)


def _of_images(found: Inspection, images: ImageSet) -> Content:
    table, card = found.table, images.card
    assert table is not None
    patients = {record.patient for record in images.records} - {None}
    facts = [images.facts[index] for index in sorted(images.facts)]
    return {
        "name": card.name,
        "title": card.title,
        "task": card.task,
        "modality": card.modality,
        "origin": printable(images.origin),
        "substituted_for": images.substituted_for,
        "images": len(images),
        "unreadable": len(images.unreadable or ()),
        "patients": len(patients) if patients else None,
        "splits": {
            split: {
                "images": table.images[split],
                "patients": table.patients[split],
                "classes": dict(zip(table.classes, table.counts[split], strict=True)),
            }
            for split in SPLITS
        },
        "unused": list(found.splits).count(UNUSED),
        "files": _files(facts),
        "files_of_class": {
            name: _files([images.facts[i] for i in _of_class(images, number) if i in images.facts])
            for number, name in enumerate(card.class_names)
        },
        "looks": {
            one.name: {
                "images": one.images,
                "brightness": one.mean,
                "contrast": one.std,
                "auroc": one.auroc,
                "lower": list(one.lower),
            }
            for one in found.looks
        },
        "suspicious_above": SUSPICIOUS,
        "copies": [
            [_named(images, index, found.splits[index]) for index in same]
            for same in exact_groups(images)
        ],
        "near_duplicates": _near(found, images),
    }


def _near(found: Inspection, images: ImageSet) -> Content:
    pairs = images.near_pairs()
    labels = [record.label for record in images.records]
    splits = found.splits
    return {
        "compared": not images.synthetic,
        "images": len({index for pair in pairs for index in (pair.first, pair.second)}),
        "across_splits": sum(apart(splits[pair.first], splits[pair.second]) for pair in pairs),
        "other_labels": sum(labels[pair.first] != labels[pair.second] for pair in pairs),
        "pairs": [
            {
                "files": [_named(images, i, splits[i]) for i in (pair.first, pair.second)],
                "distance": pair.distance,
                "correlation": pair.correlation,
                "mirrored": pair.mirrored,
            }
            for pair in pairs
        ],
    }


def _files(facts: Sequence[ImageFacts]) -> Content:
    counted: Content = {
        name: dict(Counter(str(getattr(one, name)) for one in facts).most_common())
        for name in ("container", "mode", "bits")
    }
    sides = np.array([(one.width, one.height) for one in facts]).reshape(-1, 2)
    for name, values in zip(("width", "height"), sides.T, strict=True):
        counted[name] = None
        if len(values):
            low, middle, high = (float(x) for x in np.quantile(values, (0, 0.5, 1)))
            counted[name] = {"least": low, "median": middle, "most": high}
    counted["sizes"] = len({(one.width, one.height) for one in facts})
    return counted


def _of_class(images: ImageSet, number: int) -> Iterable[int]:
    labels = images.labels
    own = labels[:, number] == 1 if labels.ndim == 2 else labels == number
    return (int(index) for index in np.flatnonzero(own))


def _named(images: ImageSet, index: int, split: str) -> Content:
    record = images.records[index]
    label = label_names(record.label, images.card.class_names)
    return {"file": printable(record.file), "label": label, "split": split}


def split_rows(found: Inspection, images: ImageSet) -> list[SplitRow]:
    """Return the rows that a run would have in `splits.csv`."""
    return [
        SplitRow(printable(one.file), one.label, one.patient, split, images.sha256(i) or "")
        for i, (one, split) in enumerate(zip(images.records, found.splits, strict=True))
    ]


def rows_of(found: Inspection) -> list[list[object]]:
    """Return the rows of `images.csv`, one per record; what could not be read has empty cells."""
    images = found.images
    if images is None:
        return []
    rows: list[list[object]] = []
    for index, (record, split) in enumerate(zip(images.records, found.splits, strict=True)):
        label = label_names(record.label, images.card.class_names)
        row: list[object] = [printable(record.file), label, record.patient, split]
        facts = images.facts.get(index)
        if facts is None:
            row += [None] * 8
        else:
            greys = facts.greys(images.bits) or (None, None)
            row += [facts.sha256, facts.width, facts.height, facts.container, facts.mode]
            row += [facts.bits, *("" if x is None else f"{x:.3f}" for x in greys)]
        rows.append([*row, str(images.synthetic).lower()])
    return rows


def kind_of(what: str) -> str:
    """Return the words of a fault without what is different in each: names and numbers."""
    return printable(re.sub(r"'[^']*'|\d[\d.,]*", "…", what))


def printable(text: str) -> str:
    """Return text that UTF-8 can hold; the name of a file may be of other bytes."""
    return text.encode(errors="backslashreplace").decode()
