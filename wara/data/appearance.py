"""What the looks of images give away before any anatomy: brightness, contrast and size by class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from wara.data.imageset import ImageSet

SUSPICIOUS = 0.8
"""AUROC of one plain number from which on it is said."""
LEAST = 10
"""Images in a class, and beside it, below which an AUROC is left to chance."""

MEASURES = {
    "brightness": "mean of the greys",
    "contrast": "standard deviation of the greys",
    "size": "number of pixels",
}


@dataclass(frozen=True)
class Looks:
    """How the images of a class look.

    Args:
        name: of the class.
        images: that could be read and whose greys are known.
        mean: brightness (mean and deviation over the images), 0..255; None without images.
        std: contrast, likewise.
        auroc: for each of `MEASURES`, how well it alone tells the class from all others, 0.5 to 1;
            None where there are none of one kind.
        lower: the measures that are lower in the class.
    """

    name: str
    images: int
    mean: tuple[float, float] | None
    std: tuple[float, float] | None
    auroc: dict[str, float | None]
    lower: tuple[str, ...]


def looks(image_set: ImageSet) -> list[Looks]:
    """Return how the images of each class look.

    The AUROC is scikit-learn's, of the class against the rest. It is taken the way round in which
    it is above 0.5, for a class may be the dark one as well as the bright one.

    Args:
        image_set: whose images have been read.
    """
    from sklearn.metrics import roc_auc_score  # a second of import

    kept, rows = [], []
    for index, facts in sorted(image_set.facts.items()):
        greys = facts.greys(image_set.bits)
        if greys is not None:
            kept.append(index)
            rows.append((*greys, float(facts.height * facts.width)))
    table = np.array(rows, np.float64).reshape(-1, len(MEASURES))
    labels = image_set.labels[kept]
    found = []
    for number, name in enumerate(image_set.card.class_names):
        own = labels[:, number] == 1 if labels.ndim == 2 else labels == number
        auroc: dict[str, float | None] = dict.fromkeys(MEASURES)
        lower = []
        for column, measure in enumerate(MEASURES):
            if own.any() and not own.all():
                value = float(roc_auc_score(own, table[:, column]))
                auroc[measure] = max(value, 1 - value)
                lower += [measure] if value < 0.5 else []
        found.append(
            Looks(name, int(own.sum()), _spread(table[own, 0]), _spread(table[own, 1]), auroc,
                  tuple(lower))
        )  # fmt: skip
    return found


def _spread(values: np.ndarray) -> tuple[float, float] | None:
    return (float(values.mean()), float(values.std())) if len(values) else None


def warnings(image_set: ImageSet, found: Sequence[Looks] | None = None) -> list[str]:
    """Say which classes one plain number gives away; a model may learn that and nothing else.

    Args:
        image_set: whose images have been read.
        found: its `looks`, where they are at hand.
    """
    said = []
    words = {"brightness": ("darker", "brighter"), "contrast": ("flatter", "richer in contrast"),
             "size": ("smaller", "larger")}  # fmt: skip
    found = looks(image_set) if found is None else found
    total = sum(facts.greys(image_set.bits) is not None for facts in image_set.facts.values())
    for one in found:
        for measure, value in one.auroc.items():
            enough = min(one.images, total - one.images) >= LEAST
            if value is not None and value > SUSPICIOUS and enough:
                how = words[measure][measure not in one.lower]
                said.append(
                    f"{measure} alone tells '{one.name}' from the rest with AUROC {value:.3f} "
                    f"({how}): a model may learn that and no finding"
                )
        if len(found) == 2 and len(image_set.labels.shape) == 1:
            break  # of two classes the second says the same
    return said
