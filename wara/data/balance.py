"""How uneven the classes are, and the weights that answer it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from wara.data.splits import SPLITS

FEW = 10
"""Images of a class in a split below which the plan says so."""


def class_counts(labels: np.ndarray, classes: int) -> np.ndarray:
    """Count the images of each class.

    Args:
        labels: int `[n]`, or 0/1 `[n, c]` for multilabel tasks.
        classes: number of classes `c`.

    Returns:
        int64 `[c]`.
    """
    labels = np.asarray(labels)
    if labels.ndim == 2:
        return labels.sum(0).astype(np.int64)
    return np.bincount(labels.astype(np.int64), minlength=classes)


def imbalance_ratio(counts: np.ndarray) -> float:
    """Largest class over smallest; infinite when a class has no image."""
    low, high = int(np.min(counts)), int(np.max(counts))
    return high / low if low else float("inf")


def class_weights(counts: np.ndarray) -> np.ndarray:
    """Weights inverse to the class counts: `n / (c * count)`, so that their mean per image is 1.

    A class without images gets weight 0.

    Returns:
        float64 `[c]`.
    """
    counts = np.asarray(counts, dtype=np.float64)
    present = counts > 0
    weights = np.zeros(len(counts))
    weights[present] = counts.sum() / (present.sum() * counts[present])
    return weights


def positive_weights(counts: np.ndarray, images: int) -> np.ndarray:
    """Weight of the positives of each label, negatives over positives, for multilabel losses.

    A label without positives gets weight 1.

    Args:
        counts: positives per label `[c]`.
        images: number of images `n`.

    Returns:
        float64 `[c]`.
    """
    counts = np.asarray(counts, dtype=np.float64)
    weights = np.ones(len(counts))
    weights[counts > 0] = (images - counts[counts > 0]) / counts[counts > 0]
    return weights


@dataclass(frozen=True)
class SplitTable:
    """Images per split and class.

    Args:
        classes: `c` names.
        counts: `[c]` per split; for a multilabel task the images that show the finding.
        images: per split.
        patients: per split; None where there is no patient column.
    """

    classes: tuple[str, ...]
    counts: Mapping[str, tuple[int, ...]]
    images: Mapping[str, int]
    patients: Mapping[str, int | None]

    @classmethod
    def of(
        cls,
        labels: Sequence[int | tuple[int, ...]],
        patients: Sequence[str | None],
        splits: Sequence[str],
        classes: Sequence[str],
    ) -> SplitTable:
        """Count."""
        counts, images, people = {}, {}, {}
        for split in SPLITS:
            chosen = [i for i, name in enumerate(splits) if name == split]
            values = np.array([labels[i] for i in chosen], dtype=np.int64)
            tally = class_counts(values, len(classes)) if chosen else np.zeros(len(classes))
            counts[split] = tuple(int(n) for n in tally)
            images[split] = len(chosen)
            known = {patients[i] for i in chosen}
            people[split] = None if known <= {None} else len(known - {None})
        return cls(tuple(classes), counts, images, people)

    def rare(self, least: int) -> str:
        """Say which classes have fewer images than `least` in a split; empty where none."""
        found = [
            f"{name} in {split} ({n})"
            for split in SPLITS
            for name, n in zip(self.classes, self.counts[split], strict=True)
            if n < least and self.images[split]
        ]
        more = f" and {len(found) - 12} more" if len(found) > 12 else ""
        return ", ".join(found[:12]) + more


def few(table: SplitTable) -> list[str]:
    """Return what to say where a class has too few images for its numbers to mean much."""
    rare = table.rare(FEW)
    return [f"fewer than {FEW} images of a class, whose numbers say little: {rare}"] if rare else []


def table_lines(table: SplitTable) -> list[str]:
    """Return the images per split and class as text, one line per split."""
    heads = ["", "images", "patients", *table.classes]
    rows = [heads]
    for split in SPLITS:
        people = table.patients[split]
        cells = [table.images[split], "-" if people is None else people, *table.counts[split]]
        rows.append([split, *map(str, cells)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    if sum(widths) + 2 * len(widths) <= 100:
        return [
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
    # Many classes do not fit side by side.
    lines = []
    for row in rows[1:]:
        tally = ", ".join(f"{n} {c}" for n, c in zip(row[3:], table.classes, strict=True))
        lines.append(f"{row[0]:<5}  {row[1]} images, patients {row[2]}: {tally}")
    return lines
