"""Class folders: `train|val|test/<class>/…`, or `<class>/…` to be split."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container
from pathlib import Path

from wara.cards import Card
from wara.data.imageset import FileReader, ImageSet, Record
from wara.data.infer import INFERRED_NOTE, SPLIT_WORDS, inferred_card, sorted_classes
from wara.errors import WaraError, suggest
from wara.images import EXTENSIONS


def open_tree(root: Path, card: Card | None = None, patient_pattern: str | None = None) -> ImageSet:
    """Open a tree of class folders.

    Images are files ending in one of `wara.images.EXTENSIONS`, at any depth below their class;
    other files are left out and counted in a note. Names that start with a dot are ignored.

    Args:
        root: the folder.
        card: what the data is; None to infer classes from the folders.
        patient_pattern: regular expression on the path below `root`; its first group names the
            patient.

    Raises:
        WaraError: kind "data" when the folders are not a tree of classes.
    """
    parts = _split_folders(root, card.class_index if card else ())
    found = [(split, folder) for split, part in parts.items() for folder in _folders(part)]
    names = sorted_classes(folder.name for _, folder in found)
    if not names:
        raise WaraError(
            "data",
            "neither labels.csv nor class folders",
            str(root),
            "arrange it as <class>/<image> or train|val|test/<class>/<image>",
        )
    notes: list[str] = []
    if card is None:
        card = inferred_card(root, names, kind="folder")
        notes.append(INFERRED_NOTE)
    elif card.task == "multilabel":
        raise WaraError(
            "data",
            "class folders cannot hold several labels per image",
            str(root),
            "write labels.csv",
        )
    pattern = re.compile(patient_pattern) if patient_pattern else None

    records: list[Record] = []
    paths: list[Path] = []
    faults: list[WaraError] = []
    other: Counter[str] = Counter()
    for split, folder in found:
        index = card.class_index.get(folder.name)
        if index is None:
            faults.append(
                WaraError(
                    "data",
                    f"class folder '{folder.name}' is not in the card {card.name}",
                    str(folder),
                    suggest(folder.name, card.class_index),
                )
            )
            continue
        for path in _files(folder):
            if path.suffix.lower() not in EXTENSIONS:
                other[path.suffix.lower() or "none"] += 1
                continue
            file = path.relative_to(root).as_posix()
            match = pattern.search(file) if pattern else None
            records.append(Record(file, index, match.group(1) if match else None, split))
            paths.append(path)
    if other:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(other.items()))
        notes.append(f"left out, not images by their ending: {kinds}")
    if pattern:
        unnamed = sum(record.patient is None for record in records)
        if unnamed:
            notes.append(
                f"{unnamed} of {len(records)} file names show no patient ({patient_pattern}); "
                "these are split image by image"
            )
    return ImageSet(
        card,
        records,
        FileReader(paths),
        origin=f"class folders in {root}",
        notes=notes,
        faults=faults,
    )


def _split_folders(root: Path, classes: Container[str]) -> dict[str | None, Path]:
    """Return split -> folder when the tree is split already, else {None: root}.

    A folder named like a split is one, unless a card has a class of that very name.
    """
    named = [
        folder
        for folder in _folders(root)
        if folder.name.lower() in SPLIT_WORDS and folder.name not in classes
    ]
    if not named:
        return {None: root}
    if not any(SPLIT_WORDS[folder.name.lower()] == "train" for folder in named):
        # Taken as classes, they would give a model that tells test images from others.
        raise WaraError(
            "data",
            f"{' and '.join(folder.name for folder in named)} without a folder train",
            str(root),
            "put the training images into train/<class>/; if it is a class, rename the folder",
        )
    result: dict[str | None, Path] = {}
    for folder in named:
        split = SPLIT_WORDS[folder.name.lower()]
        if split in result:
            raise WaraError(
                "data",
                f"two folders for {split}: {result[split].name} and {folder.name}",
                str(root),
                "keep one",
            )
        result[split] = folder
    stray = [folder.name for folder in _folders(root) if folder not in named]
    if stray:
        raise WaraError(
            "data",
            f"folders beside the splits: {', '.join(stray)}",
            str(root),
            "keep train, val and test only",
        )
    return result


def _folders(root: Path) -> list[Path]:
    return sorted(
        path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")
    )


def _files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
