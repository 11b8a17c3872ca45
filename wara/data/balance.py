"""How uneven the classes are, and the weights that answer it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from wara.data.splits import SPLITS


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
