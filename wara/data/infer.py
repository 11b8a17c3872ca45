"""What a folder or table without a card says about itself."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from wara.cards import Card, ClassInfo, CsvSource, FolderSource
from wara.errors import WaraError

SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


def sorted_classes(names: Iterable[str]) -> list[str]:
    """Sort class names: by number when all are whole numbers, else as text."""
    names = sorted(set(names))
    return sorted(names, key=int) if all(re.fullmatch(r"\d+", name) for name in names) else names


def inferred_card(
    path: Path, classes: list[str], *, kind: Literal["folder", "csv"], multilabel: bool = False
) -> Card:
    """Make a card for data that has none.

    The modality is not known, so nothing is mirrored or recoloured in training, and grades are
    taken as unordered classes; a card of the user's own says better.

    Args:
        path: the folder or the table.
        classes: class names in index order.
        kind: what `path` is.
        multilabel: whether an image may have several labels.

    Raises:
        WaraError: kind "data" when there are fewer than two classes or a name is not usable.
    """
    if len(classes) < 2:
        found = f"only the class '{classes[0]}'" if classes else "no class"
        raise WaraError("data", f"{found} in the data", str(path), "at least two are needed")
    folder = path.parent if kind == "csv" else path
    name = re.sub(r"[^\w.-]+", "_", folder.resolve().name) or "data"
    task: Literal["multilabel", "binary", "multiclass"] = (
        "multilabel" if multilabel else "binary" if len(classes) == 2 else "multiclass"
    )
    source = (
        CsvSource(kind="csv", path=str(path))
        if kind == "csv"
        else FolderSource(kind="folder", path=str(path), patient_pattern=None)
    )
    try:
        return Card(
            name=name,
            title=name,
            modality=None,
            task=task,
            classes=[ClassInfo(name=word, meaning="") for word in classes],
            source=source,
            group_column=None,
            phantom=None,
        )
    except ValidationError as error:
        detail = error.errors()[0]
        reason = str(detail.get("ctx", {}).get("error") or detail["msg"])
        raise WaraError("data", reason, str(path), "rename the class") from error


INFERRED_NOTE = (
    "no card: classes in sorted order, modality not known, so training images are neither mirrored "
    "nor recoloured; a card file says better"
)
