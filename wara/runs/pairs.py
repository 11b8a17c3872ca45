"""The pictures that a data set holds twice, as a table and a sheet: of a run, and of a check."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from wara.data.imageset import ImageSet
from wara.data.twins import all_pairs, contact_sheet
from wara.runs.tables import SplitRow, write_twins
from wara.storage import replacing

TABLE, SHEET = "near_duplicates.csv", "near_duplicates.png"


def write_pairs(folder: Path, images: ImageSet, rows: Sequence[SplitRow]) -> None:
    """Write every pair to `near_duplicates.csv`, and show the first of them beside it.

    Images that were drawn have no sheet: they are equal only where the same one was drawn twice.

    Args:
        folder: where both go.
        images: the set, read.
        rows: of its records, in their order.

    Raises:
        WaraError: kind "storage" when they cannot be written, kind "data" when an image is gone.
    """
    pairs = all_pairs(images)
    classes, synthetic = images.card.class_names, images.synthetic
    write_twins(folder / TABLE, pairs, rows, classes=classes, synthetic=synthetic)
    if pairs and not synthetic:
        with replacing(folder / SHEET) as partial:
            contact_sheet(images, pairs).save(partial, "PNG")
