"""The gate between files and training: the split, and everything that would falsify a number."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from wara import storage
from wara.data.balance import class_counts
from wara.data.imageset import ImageSet, left_out_line
from wara.data.splits import SPLITS, UNUSED, connected_groups, stratify
from wara.data.twins import TwinRule, check_twins, listed, named, twin_keys
from wara.errors import WaraError, WaraErrors

SHOWN = 20
FAULT_FILE = "data_faults.txt"


def assign_splits(
    image_set: ImageSet,
    *,
    val_fraction: float,
    test_fraction: float,
    seed: int,
    near: str = "group",
) -> list[str]:
    """Give every record a split: the source's own, or a stratified and grouped one.

    Images of one patient, of the same pixels and near-duplicates stay together. Where the source
    tells training and test images apart but names no validation images (or no test images), they
    are taken out of its training images; the fraction is then one of those. One name for all is no
    split: the records lose it. Notes of `image_set` tell of both.

    Args:
        image_set: the data.
        val_fraction: share of the validation split.
        test_fraction: share of the test split.
        seed: decides among equally good splits.
        near: `group` keeps near-duplicates together, `ignore` does not.

    Returns:
        "train", "val" or "test" per record.
    """
    given = [record.split for record in image_set.records]
    present = set(given) - {None}
    if present in ({"train"}, {"val"}):
        # One folder only: a name, not a split. Nor may it be one for what is checked later.
        what = f"no image is called anything but {present.pop()}, so the images are split"
        image_set.records = tuple(replace(record, split=None) for record in image_set.records)
        image_set.notes = (*image_set.notes, what)
        given = [None] * len(given)
    if set(SPLITS) <= present or ("train" not in present and present):
        return [split or "train" for split in given]

    wanted = {"val": val_fraction, "test": test_fraction}
    missing = [split for split in ("val", "test") if split not in present]
    for name in (split for split in missing if present and wanted[split] > 0):
        what = f"the source names no {name} images: they are taken out of its training images"
        image_set.notes = tuple(dict.fromkeys([*image_set.notes, what]))
    pool = [index for index, split in enumerate(given) if split in (None, "train")]
    names = ["train", *missing]
    fractions = [1 - sum(wanted[split] for split in missing), *(wanted[s] for s in missing)]
    if pool:
        parts = stratify(image_set.labels[pool], _groups(image_set, pool, near), fractions, seed)
        for index, part in zip(pool, parts, strict=True):
            given[index] = names[part]
    return [split or "train" for split in given]


def thin(
    image_set: ImageSet, splits: Sequence[str], count: int, seed: int, near: str = "group"
) -> list[str]:
    """Take training images out until about `count` are left, each class by the same share.

    Images of one patient stay together, so that the number is met as nearly as they allow.

    Args:
        image_set: the data.
        splits: "train", "val" or "test" per record.
        count: training images to keep.
        seed: decides which.
        near: see `assign_splits`.

    Returns:
        The splits, with "unused" for what was taken out.

    Raises:
        WaraError: kind "config" when there are not so many.
    """
    pool = [index for index, split in enumerate(splits) if split == "train"]
    if count > len(pool):
        what = f"{count} training images wanted, {len(pool)} there"
        raise WaraError("config", what, "data.train_images", "lower it, or leave it out for all")
    share = count / len(pool)
    groups = _groups(image_set, pool, near)
    parts = stratify(image_set.labels[pool], groups, (share, 1 - share), seed)
    thinned = list(splits)
    for index, part in zip(pool, parts, strict=True):
        thinned[index] = UNUSED if part else "train"
    return thinned


def _groups(image_set: ImageSet, pool: Sequence[int], near: str) -> np.ndarray:
    """Number the groups of records that show one patient or are one picture: int64 `[n]`."""
    patients = [image_set.records[index].patient for index in pool]
    return connected_groups(patients, *twin_keys(image_set, pool, near))


@dataclass(frozen=True)
class Findings:
    """What the gate found.

    Args:
        faults: what it refuses, by what it is about.
        notes: what a plan should mention.
    """

    faults: Mapping[str, Sequence[WaraError]]
    notes: Sequence[str]

    @property
    def refused(self) -> list[WaraError]:
        """All faults, in the order in which they are told."""
        return [fault for faults in self.faults.values() for fault in faults]


def examine(
    image_set: ImageSet, splits: Sequence[str], rule: TwinRule | None = None
) -> Findings:
    """Look for everything that would make a number a lie; nothing is raised.

    Images are read if they have not been yet.

    Args:
        image_set: the data.
        splits: "train", "val" or "test" per record.
        rule: of pictures that are there twice; None for the usual one.
    """
    faults = {
        "rows, files and folders that are no images of the set": list(image_set.faults),
        "images that cannot be read": list(image_set.survey()),
    }
    notes = list(image_set.notes)
    faults["classes and splits"] = _class_faults(image_set, splits, notes)
    faults["patients in several splits"] = _patient_faults(image_set, splits, notes)
    twins = check_twins(image_set, splits, rule or TwinRule(), notes)
    faults["pictures that are there more than once"] = twins
    return Findings({about: found for about, found in faults.items() if found}, notes)


def check(
    image_set: ImageSet,
    splits: Sequence[str],
    *,
    report_dir: str | Path | None,
    rule: TwinRule | None = None,
) -> list[str]:
    """Refuse data that cannot give a right number; return what the plan should mention.

    Refused: images that are missing or not readable (each one is decoded), rows and labels outside
    the card, classes without images at all or in training, a patient in two splits, an empty
    training or validation split, a validation split of one class, the same pixels in two splits
    unless the card of a published split tells of leaks or `rule` allows it, and near-duplicates
    that would tie a large part of the set into one group.

    Args:
        image_set: the data.
        splits: "train", "val" or "test" per record.
        report_dir: folder for the list of all offenders, made and written only when there are
            more than the message shows; None to write nothing.
        rule: of pictures that are there twice; None for the usual one.

    Returns:
        Notes, a line each.

    Raises:
        WaraErrors: kind "data"; the first 20 offenders, then where the rest is listed.
        WaraError: kind "storage" when that list is needed and cannot be written.
    """
    found = examine(image_set, splits, rule)
    if found.faults:
        rest = "correct the first ones and run again"
        if report_dir is not None and len(found.refused) > SHOWN:
            rest = f"all are listed in {_listing(found.refused, Path(report_dir))}"
        raise refusal(found.refused, rest, left_out_line(image_set.left_out, image_set.origin))
    return list(found.notes)


def refusal(faults: Sequence[WaraError], rest: str, left_out: WaraError | None) -> WaraErrors:
    """Return the refusal of a data set.

    Args:
        faults: at least one.
        rest: what to do about those that are not shown, where they are more than `SHOWN`.
        left_out: what was left out, where anything was.
    """
    shown = list(faults[:SHOWN])
    if len(faults) > SHOWN:
        shown.append(WaraError("data", f"{len(faults) - SHOWN} more offenders", "", rest))
    if left_out is not None:
        # Notes are not shown with a refusal, and what is missing is often among what was left out.
        shown.append(left_out)
    return WaraErrors(shown)


def _listing(faults: Sequence[WaraError], folder: Path) -> Path:
    path = folder / FAULT_FILE
    try:
        storage.write_text(path, "\n".join(map(str, faults)))
    except WaraError as error:
        remedy = f"{error.remedy}; the first fault is: {faults[0].what}"
        raise WaraError("storage", error.what, error.where, remedy) from error
    return path


def _class_faults(image_set: ImageSet, splits: Sequence[str], notes: list[str]) -> list[WaraError]:
    card, labels = image_set.card, image_set.labels
    names, classes = card.class_names, len(card.classes)
    if not len(image_set):
        return [WaraError("data", "no usable image", image_set.origin, "add images")]
    of_split = {
        split: np.array([own == split for own in splits], bool).reshape(len(image_set))
        for split in SPLITS
    }
    faults: list[WaraError] = []
    counts = {split: class_counts(labels[mask], classes) for split, mask in of_split.items()}
    total = class_counts(labels, classes)
    for index, name in enumerate(names):
        if total[index] == 0:
            faults.append(
                WaraError(
                    "data",
                    f"class '{name}' has no image",
                    image_set.origin,
                    "add images, or take the class out of the card",
                )
            )
        elif counts["train"][index] == 0:
            faults.append(
                WaraError(
                    "data",
                    f"class '{name}' has no training image",
                    image_set.origin,
                    "add images, or split otherwise",
                )
            )
    for split, remedy in (("train", "add training images"), ("val", "raise data.val_fraction")):
        if not of_split[split].any():
            faults.append(
                WaraError("data", f"the {split} split is empty", image_set.origin, remedy)
            )
    if of_split["val"].any() and _one_class(labels[of_split["val"]], card.task == "multilabel"):
        faults.append(
            WaraError(
                "data",
                "the validation split holds one class only, so that no metric can choose a model",
                named((image_set.records[i].file for i in np.flatnonzero(of_split["val"])), SHOWN),
                "raise data.val_fraction, or split otherwise",
            )
        )
    if not of_split["test"].any():
        notes.append("no test images: test metrics will be null")
    for split in ("val", "test"):
        absent = [name for name, n in zip(names, counts[split], strict=True) if n == 0]
        if absent and of_split[split].any():
            notes.append(
                f"{split} holds no {', '.join(absent)}: metrics of that class are null there"
            )
    return faults


def _one_class(labels: np.ndarray, multilabel: bool) -> bool:
    if not multilabel:
        return len(np.unique(labels)) < 2
    return bool((labels.min(0) == labels.max(0)).all())


def _patient_faults(
    image_set: ImageSet, splits: Sequence[str], notes: list[str]
) -> list[WaraError]:
    held: dict[str, Counter[str]] = defaultdict(Counter)
    for record, split in zip(image_set.records, splits, strict=True):
        if record.patient is not None:
            held[record.patient][split] += 1
    if not held and len(image_set) and not image_set.synthetic:
        whole = all(record.split is not None for record in image_set.records)
        notes.append(
            "no patient column: "
            + (
                "nobody can check that no patient is in two splits"
                if whole
                else "images are split one by one"
            )
            + ", and intervals take images as independent"
        )
    return [
        WaraError(
            "data",
            f"patient '{patient}' is in {listed(counts)}",
            image_set.origin,
            "move all images of a patient into one split",
        )
        for patient, counts in held.items()
        if len(counts) > 1
    ]
