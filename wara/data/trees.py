"""Class folders: `train|val|test/<class>/…`, or `<class>/…` to be split."""

from __future__ import annotations

import os
import re
from collections.abc import Container, Sequence
from pathlib import Path

from wara.cards import Card, Modality
from wara.data.imageset import FileReader, ImageSet, Record, left_out_line
from wara.data.infer import (
    check_names,
    inferred_card,
    inferred_note,
    sorted_classes,
    split_note,
    split_of,
)
from wara.data.root import Root
from wara.data.walk import Walk
from wara.data.words import known_patient, nfc, nobody_note, other_spellings, quoted
from wara.errors import WaraError, WaraErrors, suggest


def open_tree(
    root: Path,
    card: Card | None = None,
    patient_pattern: str | None = None,
    modality: Modality | None = None,
    within: str | Path | None = None,
) -> ImageSet:
    """Open a tree of class folders.

    Images are what is one by content, or says so by its ending, at any depth below its class. What
    machines leave in folders (thumbnails, indexes, trash) and other files are left out and
    counted in a note. Links to nothing, and pipes, are faults; so are links to folders below a
    class, and links that lead out of the folder.

    Args:
        root: the folder.
        card: what the data is; None to infer classes from the folders.
        patient_pattern: regular expression on the path below `root`; its first group names the
            patient.
        modality: what the images show where there is no card; None when not known.
        within: folder below which images may lie as well, when links lead there.

    Raises:
        WaraError: kind "data" when the folders are not a tree of classes, "config" when `within` is
            no folder.
    """
    fence = Root([root], within)
    walk = Walk(fence.problem)
    try:
        images = _open(walk, root, card, patient_pattern, modality)
    except WaraError as error:
        line = left_out_line(walk.sentence(), str(root))
        if line is None and not walk.faults:
            raise
        raise WaraErrors([error, *walk.faults, *([line] if line else [])]) from error
    images.notes = (*images.notes, *fence.notes())
    return images


def _open(
    walk: Walk,
    root: Path,
    card: Card | None,
    patient_pattern: str | None,
    modality: Modality | None,
) -> ImageSet:
    notes: list[str] = []
    parts = _split_folders(walk, root, card.class_index if card else (), notes)
    found = [(split, folder) for split, folders in parts for folder in folders]
    names = sorted_classes(folder.name for _, folder in found)
    if len(names) < 2 and walk.tables and card is None:
        table = min(walk.tables)
        raise WaraError(
            "data",
            "neither labels.csv nor folders of two classes",
            str(root),
            f"if {table.name} holds the labels, give it as the data set: {table}",
        )
    if not names:
        raise WaraError(
            "data",
            "neither labels.csv nor class folders",
            str(root),
            "arrange it as <class>/<image> or train|val|test/<class>/<image>",
        )
    if card is None:
        check_names(root, names, "rename the folder, or name it as a class in a card")
        card = inferred_card(root, names, kind="folder", modality=modality)
        notes.append(inferred_note(modality))
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
    nobodies: list[str] = []
    classes = {nfc(name): index for name, index in card.class_index.items()}
    faults += _one_folder(root, [folder for _, folder in found])
    for split, folder in found:
        index = classes.get(nfc(folder.name))
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
        for path in walk.images(folder):
            file = path.relative_to(root).as_posix()
            match = pattern.search(file) if pattern else None
            patient = match.group(1) if match else None
            if patient is not None and not known_patient(patient):
                nobodies.append(patient)
                patient = None
            records.append(Record(file, index, patient, split))
            paths.append(path)
    if pattern:
        unnamed = sum(record.patient is None for record in records) - len(nobodies)
        if unnamed:
            notes.append(
                f"{unnamed} of {len(records)} file names show no patient ({patient_pattern}); "
                "these are split image by image"
            )
        notes += nobody_note(nobodies, "file names")
    twice = other_spellings([record.patient for record in records])
    for place, before in twice.items():
        this, other = (records[index].patient or "" for index in (place, before))
        this, other = quoted(this, other)
        what = f"patient {this} is {other} of {records[before].file} in another spelling"
        remedy = "name the files alike, or give two patients names that differ in more"
        faults.append(WaraError("data", what, str(paths[place]), remedy))
    kept = [place for place in range(len(records)) if place not in twice]
    records, paths = [records[place] for place in kept], [paths[place] for place in kept]
    return ImageSet(
        card,
        records,
        FileReader(paths),
        origin=f"class folders in {root}",
        notes=notes,
        faults=[*faults, *walk.faults],
        left_out=walk.sentence(),
        folders=[root],
    )


def _one_folder(root: Path, folders: Sequence[Path]) -> list[WaraError]:
    """Return a fault for each class folder that is, holds or lies in another one, by a link."""
    home = Path(os.path.realpath(root))
    real = {folder: Path(os.path.realpath(folder)) for folder in folders}
    # Those that lie where they seem to come first, so that the link is what is refused.
    linked = {folder: real[folder] != home / folder.relative_to(root) for folder in folders}
    owners: dict[Path, Path] = {}
    above: dict[Path, Path] = {}
    faults = []
    for folder in sorted(folders, key=lambda folder: (linked[folder], folder)):
        place = real[folder]
        inside = (owners[parent] for parent in (place, *place.parents) if parent in owners)
        other = next(inside, above.get(place))
        if other is not None:
            what = f"a link to images of {other}, a class folder already"
            faults.append(WaraError("data", what, str(folder), "remove it"))
        owners.setdefault(place, folder)
        for parent in place.parents:
            above.setdefault(parent, folder)
    return faults


def _split_folders(
    walk: Walk, root: Path, classes: Container[str], notes: list[str]
) -> list[tuple[str | None, list[Path]]]:
    """Return (split, class folders) when the tree is split already, else those of None.

    A folder named like a split is one, unless a card has a class of that very name.
    """
    folders = walk.folders(root)
    named = [folder for folder in folders if split_of(folder.name) and folder.name not in classes]
    if not named:
        return [(None, folders)]
    if not any(split_of(folder.name) == "train" for folder in named):
        # Taken as classes, they would give a model that tells test images from others.
        raise WaraError(
            "data",
            f"{' and '.join(folder.name for folder in named)} without a folder train",
            str(root),
            "put the training images into train/<class>/; if it is a class, rename the folder",
        )
    notes += split_note((folder.name for folder in named), "folders")
    result: dict[str | None, Path] = {}
    for folder in named:
        split = split_of(folder.name)
        if split in result:
            raise WaraError(
                "data",
                f"two folders for {split}: {result[split].name} and {folder.name}",
                str(root),
                "keep one",
            )
        result[split] = folder
    stray = [folder.name for folder in folders if folder not in named]
    if stray:
        raise WaraError(
            "data",
            f"folders beside the splits: {', '.join(stray)}",
            str(root),
            "keep train, val and test only",
        )
    return [(split, walk.folders(folder)) for split, folder in result.items()]
