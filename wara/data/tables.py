"""Tables: `file,label[,patient][,split]`, or one 0/1 column per class."""

from __future__ import annotations

import csv
import re
from collections.abc import Container, Sequence
from pathlib import Path

from wara.cards import Card
from wara.data.imageset import FileReader, ImageSet, Record
from wara.data.infer import INFERRED_NOTE, SPLIT_WORDS, inferred_card, sorted_classes
from wara.errors import WaraError, suggest

Row = dict[str, str]

OWN_COLUMNS = ("file", "label", "patient", "split")
# Columns, without case and punctuation, that say which images belong together. Left unread they
# would put images of one person into training and test.
_GROUP_WORDS = re.compile(
    r"(study)?(patient|subject|participant|person|case|lesion|exam|study)s?"
    r"(id|ids|no|nr|num|number|name|code|key|uid)?|pid|ptid|mrn|studyinstanceuid"
)


def open_table(path: Path, card: Card | None = None) -> ImageSet:
    """Open a CSV table in UTF-8 with a header line.

    Columns: `file` (path of the image, relative to the table), then either `label` (a class name
    or alias; `a|b` for several labels, empty for none of them) or, for multilabel tasks, one
    column of 0 and 1 per class. `patient` and `split` (train, val, test) are optional; further
    columns are ignored beside a `label` column. These four names are read in any case. A column
    that seems to name patients in other words (`patient_id`, `subject`, ...) is refused unless
    there is a `patient` column or the card has a `group_column`.

    Args:
        path: the table.
        card: what the data is; None to infer classes from the table.

    Raises:
        WaraError: kind "data" when the table as a whole cannot be used. Faults of single rows go
            to `ImageSet.faults`.
    """
    names = [*card.class_names, card.group_column or "patient"] if card else []
    header, rows = _read(path, names)
    group = (card.group_column if card else None) or "patient"
    if card and card.group_column and card.group_column not in header:
        raise WaraError(
            "data",
            f"no column '{group}', which the card groups by",
            str(path),
            f"columns are: {', '.join(header)}",
        )
    _check_group(path, header, group, names)
    notes: list[str] = []
    if card is None:
        card = _infer(path, header, rows, group)
        notes.append(INFERRED_NOTE)
    columns = None if "label" in header else card.class_names
    if columns is not None:
        _check_columns(path, header, card)

    records: list[Record] = []
    paths: list[Path] = []
    faults: list[WaraError] = []
    seen: dict[str, int] = {}
    with_split = [bool(row.get("split")) for row in rows]
    for number, row in enumerate(rows, start=2):
        where = f"{path}:{number}: {row['file'] or '(no file)'}"
        problem = _row_problem(row, seen, number, any(with_split))
        label: int | tuple[int, ...] | None = None
        if problem is None:
            label, problem = _label(card, row, columns)
        if problem is not None or label is None:
            what, remedy = problem or ("no label", "correct the row")
            faults.append(WaraError("data", what, where, remedy))
            continue
        records.append(
            Record(
                row["file"],
                label,
                row.get(group) or None,
                SPLIT_WORDS[row["split"].lower()] if row.get("split") else None,
            )
        )
        paths.append(path.parent / row["file"])
    grouped = sum(record.patient is not None for record in records)
    if group in header and grouped < len(records):
        notes.append(
            f"{len(records) - grouped} rows name no {group}; each counts as one of its own"
        )
    return ImageSet(
        card, records, FileReader(paths), origin=f"table {path}", notes=notes, faults=faults
    )


def _read(path: Path, names: Container[str]) -> tuple[list[str], list[Row]]:
    """Read header and rows; `names` are columns that the card calls by exactly that name."""
    try:
        # utf-8-sig: spreadsheets put a mark in front of the first column's name.
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            header = [_column(name.strip(), names) for name in next(reader, [])]
            lines = [line for line in reader if any(cell.strip() for cell in line)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise WaraError(
            "data", f"not a readable table: {error}", str(path), "save it as CSV in UTF-8"
        ) from error
    if "file" not in header:
        hint = "separate the columns by commas" if any(";" in name for name in header) else ""
        raise WaraError(
            "data",
            f"no column 'file' among: {', '.join(header) or 'nothing'}",
            str(path),
            hint or "the first line names the columns: file,label[,patient][,split]",
        )
    if len(set(header)) < len(header):
        twice = sorted({name for name in header if header.count(name) > 1})
        raise WaraError("data", f"column named twice: {', '.join(twice)}", str(path), "rename one")
    if not lines:
        raise WaraError("data", "no rows", str(path), "one row per image is needed")
    uneven = [number for number, line in enumerate(lines, start=2) if len(line) != len(header)]
    if uneven:
        raise WaraError(
            "data",
            f"row {uneven[0]} has another number of columns than the header"
            + (f" ({len(uneven)} rows in all)" if len(uneven) > 1 else ""),
            str(path),
            "quote cells that hold commas",
        )
    return header, [
        dict(zip(header, (cell.strip() for cell in line), strict=True)) for line in lines
    ]


def _column(name: str, names: Container[str]) -> str:
    return name.lower() if name.lower() in OWN_COLUMNS and name not in names else name


def _check_group(path: Path, header: Sequence[str], group: str, names: Container[str]) -> None:
    if group in header:
        return
    for name in header:
        if name in OWN_COLUMNS or name in names:
            continue
        if _GROUP_WORDS.fullmatch(re.sub(r"[\W_]+", "", name.lower())):
            raise WaraError(
                "data",
                f"column '{name}' seems to name patients, and there is no column 'patient'",
                str(path),
                "rename it to patient, or name it as group_column in a card, so that images of a "
                "patient stay in one split; take it out if it does not say which images belong "
                "together",
            )


def _infer(path: Path, header: Sequence[str], rows: Sequence[Row], group: str) -> Card:
    if "label" in header:
        labels = [row["label"] for row in rows]
        several = any("|" in label for label in labels)
        names = {part.strip() for label in labels for part in label.split("|")} - {""}
        return inferred_card(path, sorted_classes(names), kind="csv", multilabel=several)
    columns = [name for name in header if name not in ("file", "split", group)]
    if not columns or any(row[name] not in ("0", "1") for row in rows for name in columns):
        raise WaraError(
            "data",
            "no column 'label', and the other columns are not all 0 and 1",
            str(path),
            "add a column label, or one column of 0 and 1 per class",
        )
    return inferred_card(path, columns, kind="csv", multilabel=True)


def _check_columns(path: Path, header: Sequence[str], card: Card) -> None:
    missing = [name for name in card.class_names if name not in header]
    if card.task != "multilabel" or missing:
        raise WaraError(
            "data",
            "no column 'label'"
            + (f", and none for: {', '.join(missing)}" if card.task == "multilabel" else ""),
            str(path),
            f"columns are: {', '.join(header)}",
        )


def _row_problem(
    row: Row, seen: dict[str, int], number: int, splits_given: bool
) -> tuple[str, str] | None:
    if not row["file"]:
        return "no file name", "name the image or remove the row"
    if row["file"] in seen:
        return f"listed in row {seen[row['file']]} already", "keep one row per image"
    seen[row["file"]] = number
    if row.get("split"):
        if row["split"].lower() not in SPLIT_WORDS:
            return f"split '{row['split']}'", "write train, val or test"
    elif splits_given:
        return "no split, while other rows have one", "write train, val or test in every row"
    return None


def _label(
    card: Card, row: Row, columns: Sequence[str] | None
) -> tuple[int | tuple[int, ...] | None, tuple[str, str] | None]:
    """Return (label, None), or (None, (what, remedy))."""
    if columns is not None:
        wrong = [name for name in columns if row[name] not in ("0", "1")]
        if wrong:
            return None, (f"column {wrong[0]} holds '{row[wrong[0]]}'", "write 0 or 1")
        return tuple(int(row[name]) for name in columns), None
    words = [word.strip() for word in row["label"].split("|")] if row["label"] else []
    indices = []
    for word in words:
        index = _class_of(card, word)
        if index is None:
            return None, (
                f"label '{word}' is not in the card {card.name}",
                suggest(word, card.class_index),
            )
        indices.append(index)
    if card.task == "multilabel":
        return tuple(int(index in indices) for index in range(len(card.classes))), None
    if len(indices) != 1:
        return None, (
            f"{len(indices)} labels, one is expected" if indices else "no label",
            "write one class name",
        )
    return indices[0], None


def _class_of(card: Card, word: str) -> int | None:
    index = card.class_index.get(word)
    if index is None and word.isdecimal() and not any(w.isdecimal() for w in card.class_index):
        # A number where no class is called by one: the index, in the card's order.
        index = int(word) if int(word) < len(card.classes) else None
    return index
