"""Pictures that a data set holds twice: which, what may be done with them, and how to see them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from wara.data.imageset import ImageSet
from wara.data.likeness import Pair
from wara.data.splits import SPLITS, UNUSED, connected_groups
from wara.errors import WaraError

SHEET = 40
"""Pairs on a contact sheet."""
LARGEST = 0.25
"""Share of a data set that near-duplicates may tie together before that is not believed."""
_FEW = 10  # images of a group that is believed however small the set is
_SIDE, _LINE, _COLUMNS = 160, 14, 4
_NAME = 52  # letters of a name that fit below a pair


@dataclass(frozen=True)
class TwinRule:
    """What is done with pictures that are there twice.

    Args:
        near: `group`, near-duplicates go into one split of those made here; or `ignore`.
        allow: whether the same pixels may lie in two splits that the data set brings.
    """

    near: str = "group"
    allow: bool = False


def twin_keys(image_set: ImageSet, pool: Sequence[int], near: str) -> list[Sequence[object | None]]:
    """Return what ties records together, as `connected_groups` takes it.

    Args:
        image_set: the data.
        pool: record numbers.
        near: `group` or `ignore`.
    """
    keys: list[Sequence[object | None]] = [
        [image_set.sha256(index) for index in pool],
        [own.pixels if (own := image_set.signature(index)) else None for index in pool],
    ]
    if near == "group":
        inside = set(pool)
        ties = [p for p in image_set.near_pairs() if p.first in inside and p.second in inside]
        if ties:
            ends = [pair.first for pair in ties] + [pair.second for pair in ties]
            chains = connected_groups(ends, [*range(len(ties))] * 2).tolist()
            chain = dict(zip(ends, chains, strict=True))
            keys.append([chain.get(index) for index in pool])
    return keys


def exact_groups(image_set: ImageSet) -> list[list[int]]:
    """Return the records that have the same pixels, or are the same file; two or more each."""
    n = len(image_set)
    if not n:
        return []
    same: dict[int, list[int]] = defaultdict(list)
    for index, number in enumerate(connected_groups(*twin_keys(image_set, range(n), "ignore"))):
        same[int(number)].append(index)
    return [indices for indices in same.values() if len(indices) > 1]


def all_pairs(image_set: ImageSet) -> list[Pair]:
    """Return every pair of a set: the same file, the same pixels, near-duplicates."""
    found = list(image_set.near_pairs())
    for first, *others in exact_groups(image_set):
        for other in others:
            same = image_set.sha256(first) == image_set.sha256(other)
            found.append(Pair(first, other, "bytes" if same else "pixels"))
    return sorted(found, key=lambda pair: (pair.first, pair.second))


def check_twins(
    image_set: ImageSet, splits: Sequence[str], rule: TwinRule, notes: list[str]
) -> list[WaraError]:
    """Refuse the same pixels in two splits, and near-duplicates that cannot be true.

    Args:
        image_set: the data, read.
        splits: of each record.
        rule: what is allowed.
        notes: what the plan should mention is added to it.
    """
    faults = _exact_faults(image_set, splits, rule, notes)
    pairs = image_set.near_pairs()
    if not pairs:
        return faults
    records = image_set.records
    free = [i for i, record in enumerate(records) if record.split is None]
    if rule.near == "group" and free:
        faults += _chain_faults(image_set, pairs, free)
    images = len({index for pair in pairs for index in (pair.first, pair.second)})
    text = f"near-duplicates: {len(pairs)} pairs among {images} images"
    across = sum(apart(splits[pair.first], splits[pair.second]) for pair in pairs)
    if across:
        chosen = rule.near == "ignore" and free
        why = "data.near_duplicates: ignore" if chosen else "as the source has them"
        text += f", {across} across splits ({why}): scores are optimistic"
    else:
        text += ", none across splits"
    notes.append(f"{text}; near_duplicates.csv of a run or a report lists them")
    unlike = [pair for pair in pairs if records[pair.first].label != records[pair.second].label]
    if unlike:
        example = named(records[index].file for index in (unlike[0].first, unlike[0].second))
        notes.append(
            f"near-duplicates with different labels: {len(unlike)} pairs, first {example}"
        )
    return faults


def apart(one: str, other: str) -> bool:
    """Whether two pictures lie in two splits that are both used."""
    return one != other and UNUSED not in (one, other)


def _exact_faults(
    image_set: ImageSet, splits: Sequence[str], rule: TwinRule, notes: list[str]
) -> list[WaraError]:
    records, twins = image_set.records, exact_groups(image_set)
    faults: list[WaraError] = []
    # The card of a published split says what leaks there, and others compare with that split.
    published = image_set.card.base is None and bool(image_set.card.known_leakage)
    kept = 0
    for indices in twins:
        if len({splits[index] for index in indices}) == 1:
            continue
        given = all(records[index].split is not None for index in indices)
        if given and (published or rule.allow):
            kept += 1
            continue
        one_file = len({image_set.sha256(index) for index in indices}) == 1
        faults.append(
            WaraError(
                "data",
                f"identical {'images' if one_file else 'pixels'} in "
                f"{listed(Counter(splits[index] for index in indices))}",
                named(records[index].file for index in indices),
                "keep one of them" + (", or set data.allow_duplicates=true" if given else ""),
            )
        )
    if twins:
        copies = sum(len(indices) - 1 for indices in twins)
        notes.append(
            f"exact copies of other images: {copies}"
            + (
                f", {kept} across splits, as the source has them: scores are optimistic"
                if kept
                else ", kept in one split"
            )
        )
    unlike = [indices for indices in twins if len({records[i].label for i in indices}) > 1]
    if unlike:
        example = named(records[index].file for index in unlike[0])
        notes.append(
            f"identical images with different labels: {len(unlike)} times, first {example}"
        )
    return faults


def _chain_faults(
    image_set: ImageSet, pairs: Sequence[Pair], free: Sequence[int]
) -> list[WaraError]:
    """Refuse pairs that tie so much together that a split would not be one any more."""
    numbers = connected_groups(*twin_keys(image_set, free, "group"))
    counts = np.bincount(numbers)
    largest = int(counts.max())
    if largest <= max(_FEW, LARGEST * len(free)):
        return []
    members = {free[int(at)] for at in np.flatnonzero(numbers == counts.argmax())}
    example = next(pair for pair in pairs if pair.first in members)
    return [
        WaraError(
            "data",
            f"near-duplicates would tie {largest} of {len(free)} images into one group",
            named(image_set.records[i].file for i in (example.first, example.second)),
            "look at these two: if they are the same picture, remove copies; if different "
            "pictures only look alike, set data.near_duplicates=ignore",
        )
    ]


def listed(counts: Counter[str]) -> str:
    """Return counts per split as text."""
    order = (*SPLITS, UNUSED)
    return " and ".join(f"{split} ({counts[split]})" for split in order if counts[split])


def named(files: Iterable[str], most: int = 3) -> str:
    """Return the first of several names, and how many more there are."""
    names = list(files)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def contact_sheet(image_set: ImageSet, pairs: Sequence[Pair]) -> Image.Image:
    """Return the first pairs of a set side by side, each with its names: to judge by eye."""
    shown = pairs[:SHEET]
    width, height = 2 * _SIDE + 8, _SIDE + 3 * _LINE + 4
    rows = -(-len(shown) // _COLUMNS)
    sheet = Image.new("RGB", (min(len(shown), _COLUMNS) * width, rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    for number, pair in enumerate(shown):
        left, top = number % _COLUMNS * width, number // _COLUMNS * height
        for side, index in enumerate((pair.first, pair.second)):
            picture = Image.fromarray(image_set.read(index))
            picture.thumbnail((_SIDE, _SIDE))
            sheet.paste(picture, (left + side * (_SIDE + 2), top))
            # The end of a long path tells files apart, not its beginning.
            name = image_set.records[index].file[-_NAME:]
            draw.text((left, top + _SIDE + side * _LINE), name, "black")
        how = f"{pair.kind} {pair.correlation:.3f} {pair.mirrored}".rstrip()
        draw.text((left, top + _SIDE + 2 * _LINE), how, "black")
    return sheet
