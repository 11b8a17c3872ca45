"""Groups of images by what a table says of them: `site`, `sex`, `age:40,60`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from wara.data.words import known_patient, whole
from wara.errors import WaraError, suggest

UNKNOWN = "not known"
FEW_NUMBERS = 10  # different numbers up to which they are taken as they are
MOST_GROUPS = 20


@dataclass(frozen=True)
class By:
    """A column that makes groups.

    Args:
        column: its name.
        cuts: rising numbers at which bands begin; none where each value is a group.
    """

    column: str
    cuts: tuple[float, ...] = ()


def parse_by(word: str, columns: Sequence[str]) -> By:
    """Read `COLUMN` or `COLUMN:40,60`.

    Raises:
        WaraError: kind "usage" for an unknown column, or cuts that are no rising numbers.
    """
    if word in columns:
        return By(word)
    name, colon, text = word.rpartition(":")
    if not colon:
        name, text = word, ""
    if not columns:
        remedy = "name a table as --data; folders say nothing but the class"
        raise WaraError("usage", f"the data have no column '{name}'", "--by", remedy)
    if name not in columns:
        remedy = suggest(name, columns)
        raise WaraError("usage", f"the data have no column '{name}'", "--by", remedy)
    cuts = [_number(part) for part in text.split(",")]
    numbers = tuple(cut for cut in cuts if cut is not None)
    if len(numbers) < len(cuts) or any(a >= b for a, b in pairwise(numbers)):
        remedy = f"write rising numbers, such as {name}:40,60"
        raise WaraError("usage", f"'{text}' are no bands", f"--by {word}", remedy)
    return By(name, numbers)


def groups_of(by: By, cells: Sequence[str]) -> dict[str, NDArray[np.bool_]]:
    """Return group -> [n], which images are in it; those without a value are `UNKNOWN`.

    A value of words is a group. Numbers need bands, unless there are few of them.

    Args:
        by: the column.
        cells: what it holds for each image.

    Raises:
        WaraError: kind "usage" when the column makes no groups, with what would.
    """
    known = [known_patient(cell) for cell in cells]
    numbers = [_number(cell) if told else None for cell, told in zip(cells, known, strict=True)]
    values = {cell for cell, told in zip(cells, known, strict=True) if told}
    if not values:
        raise WaraError("usage", "the column is empty", f"--by {by.column}", "name another one")
    numeric = all(n is not None for n, told in zip(numbers, known, strict=True) if told)
    if by.cuts:
        if not numeric:
            odd = next(c for c, n, t in zip(cells, numbers, known, strict=True) if t and n is None)
            what = f"bands of a column that holds '{odd}'"
            raise WaraError("usage", what, f"--by {by.column}", "leave the bands out")
        names = [None if n is None else _band(n, by.cuts) for n in numbers]
        order = [_band(edge, by.cuts) for edge in (-math.inf, *by.cuts)]
    else:
        _check_values(by.column, values, [n for n in numbers if n is not None], numeric)
        names = [whole(cell) if told else None for cell, told in zip(cells, known, strict=True)]
        order = sorted({name for name in names if name is not None}, key=_rank)
    words = np.array([UNKNOWN if name is None else name for name in names])
    masks = {name: words == name for name in (*order, UNKNOWN)}
    return {name: mask for name, mask in masks.items() if mask.any()}


def _check_values(column: str, values: set[str], numbers: Sequence[float], numeric: bool) -> None:
    different = len(set(numbers)) if numeric else len(values)
    if numeric and different > FEW_NUMBERS:
        low, high = (_plain(float(cut)) for cut in np.quantile(numbers, [1 / 3, 2 / 3]).round())
        what = f"a column of {different} different numbers, and no bands"
        example = f"{column}:{low},{high}" if low != high else f"{column}:{low}"
        raise WaraError("usage", what, f"--by {column}", f"name them, such as --by {example}")
    if different > MOST_GROUPS:
        what = f"a column of {different} different values; {MOST_GROUPS} groups are the most"
        raise WaraError("usage", what, f"--by {column}", "put values together in the table")


def _rank(name: str) -> tuple[float, str]:
    number = _number(name)
    return (0.0 if number is None else number, name.casefold())


def _band(number: float, cuts: Sequence[float]) -> str:
    place = sum(number >= cut for cut in cuts)
    if place == 0:
        return f"below {_plain(cuts[0])}"
    if place == len(cuts):
        return f"{_plain(cuts[-1])} and above"
    return f"{_plain(cuts[place - 1])} to below {_plain(cuts[place])}"


def _plain(number: float) -> str:
    return f"{number:g}"


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def names_of(groups: Mapping[str, NDArray[np.bool_]], n: int) -> list[str]:
    """Return the group of each of `n` images."""
    found = [""] * n
    for name, mask in groups.items():
        for i in np.flatnonzero(mask):
            found[int(i)] = name
    return found
