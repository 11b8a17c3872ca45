"""What a folder or table without a card says about itself."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from wara.cards import Card, ClassInfo, CsvSource, FolderSource, Modality
from wara.data.words import means_nothing, plain, quoted
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


def split_of(word: str) -> str | None:
    """Return the split that a word of a table or the name of a folder means, None for no word."""
    return SPLIT_WORDS.get(plain(word).lower())


def split_note(words: Iterable[str], what: str) -> list[str]:
    """Return the note on words that mean a split and are not its own; none when there are none.

    Args:
        words: of all rows or folders.
        what: what is counted, such as `rows`.
    """
    counts = Counter(word for word in words if word and split_of(word) not in (None, word))
    read = (f"{quoted(word)[0]} is {split_of(word)}" for word in counts)
    listed = ", ".join(f"{one} ({n} {what})" for one, n in zip(read, counts.values(), strict=True))
    return [f"words for splits: {listed}"] if listed else []


def sorted_classes(names: Iterable[str]) -> list[str]:
    """Sort class names: by number when all are whole numbers, else as text."""
    names = sorted(set(names))
    return sorted(names, key=int) if all(re.fullmatch(r"\d+", name) for name in names) else names


def check_names(path: Path, names: Sequence[str], remedy: str) -> None:
    """Refuse classes that nobody has named, where no card says that they are classes.

    Args:
        path: the folder or the table.
        names: of the classes.
        remedy: what to do about one.

    Raises:
        WaraError: kind "data".
    """
    for name in names:
        if means_nothing(name):
            raise WaraError(
                "data", f"class '{name}' means that nothing is known", str(path), remedy
            )
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(plain(name).casefold(), name)
        if other != name:
            raise WaraError(
                "data",
                f"classes {' and '.join(quoted(other, name))} differ in capitals or spaces only",
                str(path),
                "write them alike, or say in a card what they are",
            )


def inferred_card(
    path: Path,
    classes: list[str],
    *,
    kind: Literal["folder", "csv"],
    multilabel: bool = False,
    modality: Modality | None = None,
) -> Card:
    """Make a card for data that has none.

    Where the modality is not known, nothing is mirrored or recoloured in training; grades are
    taken as unordered classes; a card of the user's own says better.

    Args:
        path: the folder or the table.
        classes: class names in index order.
        kind: what `path` is.
        multilabel: whether an image may have several labels.
        modality: what the images show, as the config says; it decides the augmentation.

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
            modality=modality,
            augment=modality or "general",
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


def inferred_note(modality: Modality | None, order: str = "in sorted order") -> str:
    """Return what a plan says of data without a card.

    Args:
        modality: as the config says.
        order: of the classes.
    """
    if modality is not None:
        return f"no card: classes {order}; a card file says better"
    return (
        f"no card: classes {order}, modality not known, so training images are neither mirrored "
        "nor recoloured; a card file says better"
    )
