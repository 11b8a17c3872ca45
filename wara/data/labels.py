"""What the cells of a table say about its classes: one label, several, or one column per class."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from wara.cards import Card, CsvSource, Modality
from wara.data.infer import check_names, inferred_card, inferred_note, sorted_classes
from wara.data.sheets import Row, Sheet
from wara.data.words import NO, ONES, YES, ZEROS, means_nothing, nfc, whole
from wara.errors import WaraError, suggest

Label = int | tuple[int, ...]

_DECIMAL = re.compile(r"[+-]?\d*\.\d+(e[+-]?\d+)?", re.IGNORECASE)


class Answer(NamedTuple):
    """The label of a row, or (what, remedy) where it has none that counts."""

    label: Label | None
    problem: tuple[str, str] | None = None


def labels_of(
    sheet: Sheet,
    card: Card | None,
    form: CsvSource,
    *,
    label: str | None,
    others: Sequence[str],
    modality: Modality | None,
) -> tuple[Card, list[Answer], list[str]]:
    """Read the label of each row.

    Args:
        sheet: the table.
        card: what the data is; None to infer classes from the table.
        form: what the card says of the table.
        label: column of the labels; None for one column per class.
        others: columns that are no classes.
        modality: what the images show where there is no card.

    Returns:
        The card, an answer per row, and notes.

    Raises:
        WaraError: kind "data" when the table says nothing of classes.
    """
    notes: list[str] = []
    if label is not None:
        words = [_words(row[label], form.label_separator) for row in sheet.rows]
        lists = sum(_listed(row[label]) is not None for row in sheet.rows)
        if lists:
            notes.append(f"lists in column {label} are read as labels, in {lists} rows")
        if card is None:
            card = _card_of_words(sheet, label, words, modality, notes)
        return card, [_of_words(card, form, found) for found in words], notes
    columns = _columns_of(sheet, card, others)
    if card is None:
        card = _card_of_columns(sheet, columns, modality, notes)
    counted: Counter[str] = Counter()
    answers = [_of_columns(card, form, columns, row, counted) for row in sheet.rows]
    notes += [f"{count} cells {what}" for what, count in sorted(counted.items())]
    return card, answers, notes


# --- a column of labels -----------------------------------------------------------------------


def _words(cell: str, separator: str) -> list[str]:
    """Return the labels in a cell."""
    if (found := _listed(cell)) is not None:
        return found
    return [word.strip() for word in cell.split(separator)] if cell else []


def _listed(cell: str) -> list[str] | None:
    """Return the labels in a list of Python, as pandas writes it; None for any other cell."""
    if not (cell.startswith("[") and cell.endswith("]")):
        return None
    try:
        found = ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None  # a text in brackets
    if not isinstance(found, list) or not all(isinstance(word, str | int) for word in found):
        return None
    return [str(word).strip() for word in found]


def _card_of_words(
    sheet: Sheet,
    column: str,
    words: Sequence[Sequence[str]],
    modality: Modality | None,
    notes: list[str],
) -> Card:
    several = any(len(found) > 1 for found in words)
    # Rows whose label means nothing are refused one by one.
    names = {word for found in words for word in found if not means_nothing(word)}
    numbers = {whole(name) for name in names}
    if numbers != names and all(re.fullmatch(r"[+-]?\d+", number) for number in numbers):
        notes.append(f"numbers such as {min(names - numbers)} in column {column} are whole ones")
        names = numbers
    formulas = sorted(name for name in names if name.startswith("="))
    if formulas:
        raise WaraError(
            "data",
            f"label '{formulas[0]}' is a formula",
            str(sheet.path),
            "save the table with values in the place of formulas",
        )
    measured = sorted(name for name in names if _DECIMAL.fullmatch(name))
    if measured and all(_DECIMAL.fullmatch(name) or name.isdecimal() for name in names):
        raise WaraError(
            "data",
            f"labels such as {measured[0]} are measured values, not classes",
            str(sheet.path),
            "write a class into the column of the labels, or name the values as classes in a card",
        )
    for name in sorted(names):
        parts = {part.strip() for part in re.split("[;,/]", name)}
        if len(parts) > 1 and parts <= names:
            raise WaraError(
                "data",
                f"label '{name}' seems to be several labels",
                str(sheet.path),
                "write them as a|b, or name the separator as source.label_separator in a card",
            )
    check_names(sheet.path, sorted(names), "name it as a class in a card")
    notes.insert(0, inferred_note(modality))
    return inferred_card(
        sheet.path, sorted_classes(names), kind="csv", multilabel=several, modality=modality
    )


def _of_words(card: Card, form: CsvSource, words: Sequence[str]) -> Answer:
    indices: list[int] = []
    none: list[str] = []
    for word in words:
        index = _class_of(card, word)
        if index is not None:
            indices.append(index)
        elif word in form.none:
            none.append(word)
        elif means_nothing(word):
            remedy = "write a class, or remove the row; a card may name it as a class"
            if card.task == "multilabel":
                remedy += " or under source.none"
            return Answer(None, (f"label '{word}' means that nothing is known", remedy))
        else:
            return Answer(
                None,
                (f"label '{word}' is not in the card {card.name}", suggest(word, card.class_index)),
            )
    if not words and form.none:
        return Answer(None, ("no label", f"write {form.none[0]} where nothing was found"))
    if none and indices:
        what = f"'{none[0]}' beside {card.class_names[indices[0]]}"
        return Answer(None, (what, "write the one or the other"))
    if card.task == "multilabel":
        return Answer(tuple(int(index in indices) for index in range(len(card.classes))))
    if len(indices) != 1:
        what = f"{len(indices)} labels, one is expected" if indices else "no label"
        return Answer(None, (what, "write one class name"))
    return Answer(indices[0])


def _class_of(card: Card, word: str) -> int | None:
    for known in (word, whole(word)):
        if known in card.class_index:
            return card.class_index[known]
    if not word.isascii():
        return {nfc(name): index for name, index in card.class_index.items()}.get(nfc(word))
    number = whole(word)
    if number.isdecimal() and not any(name.isdecimal() for name in card.class_index):
        # A number where no class is called by one: the index, in the card's order.
        return int(number) if int(number) < len(card.classes) else None
    return None


# --- one column per class ---------------------------------------------------------------------


def _columns_of(sheet: Sheet, card: Card | None, others: Sequence[str]) -> list[str]:
    """Return the column of each class, in index order."""
    if card is None:
        left_over = [name for name in sheet.header if name not in (*others, *sheet.unnamed)]
        return [name for name in left_over if any(row[name] for row in sheet.rows)]
    columns, missing = [], []
    for info in card.classes:
        found = [name for name in (info.name, *info.aliases) if name in sheet.header]
        if len(found) > 1:
            raise WaraError(
                "data",
                f"columns {' and '.join(found)} both are the class {info.name}",
                str(sheet.path),
                "take one of the aliases out of the card",
            )
        columns += found
        missing += [info.name] if not found else []
    if missing:
        most = "none of the classes has a column"
        some = f"no class column for: {', '.join(missing)}"
        raise WaraError(
            "data",
            f"no column 'label', and {some if columns else most}",
            str(sheet.path),
            f"name one of these as source.label_column in the card: {', '.join(sheet.header)}",
        )
    return columns


def _card_of_columns(
    sheet: Sheet, columns: Sequence[str], modality: Modality | None, notes: list[str]
) -> Card:
    rename = (
        "call the column of the labels label, or name it as source.label_column in a card; a card "
        "may name the columns of classes, too"
    )
    for name in columns:
        for index, row in enumerate(sheet.rows):
            if _bit(row[name], ONES, ZEROS) is None:
                what = f"no column 'label', and column '{name}' holds '{row[name]}', not 0 or 1"
                raise WaraError("data", what, sheet.row_name(index), rename)
    if len(columns) < 2:
        what = f"only '{columns[0]}' could be a class" if columns else "nothing says the class"
        raise WaraError("data", f"no column 'label', and {what}", str(sheet.path), rename)
    sums = [sum(_bit(row[name], ONES, ZEROS) or 0 for name in columns) for row in sheet.rows]
    listed = ", ".join(columns) if len(columns) < 9 else f"{columns[0]} to {columns[-1]}"
    if set(sums) == {1}:
        task = "one label per image: exactly one of them is 1 in every row"
    elif max(sums) > 1:
        task = f"a multilabel task: several of them are 1 in {sum(n > 1 for n in sums)} rows"
    else:
        task = f"a multilabel task: none of them is 1 in {sum(n == 0 for n in sums)} rows"
    notes.append(inferred_note(modality, "in the order of the columns"))
    notes.append(f"columns {listed} are {task}; a card with another task settles it otherwise")
    check_names(sheet.path, columns, "rename the column")
    return inferred_card(
        sheet.path, list(columns), kind="csv", multilabel=set(sums) != {1}, modality=modality
    )


def _bit(cell: str, ones: frozenset[str], zeros: frozenset[str]) -> int | None:
    word = whole(cell).casefold()
    return 1 if word in ones else 0 if word in zeros else None


def _of_columns(
    card: Card, form: CsvSource, columns: Sequence[str], row: Row, counted: Counter[str]
) -> Answer:
    bits: list[int] = []
    for name in columns:
        cell = row[name]
        bit = _bit(cell, YES, NO)
        if bit is None and whole(cell) == "-1" and form.uncertain is not None:
            bit = int(form.uncertain == "one")
            counted[f"of -1 count as {bit}, as the card says"] += 1
        elif bit is None and not cell and form.blank is not None:
            bit = 0
            counted["are empty and count as 0, as the card says"] += 1
        if bit is None:
            return Answer(None, (f"column {name} holds '{cell}'", _bit_remedy(cell)))
        bits.append(bit)
    if card.task == "multilabel":
        return Answer(tuple(bits))
    if sum(bits) != 1:
        ones = [name for name, bit in zip(columns, bits, strict=True) if bit]
        what = f"{len(ones)} classes hold 1: {', '.join(ones)}" if ones else "no class holds 1"
        return Answer(None, (what, "write 1 in one class column, or task: multilabel in the card"))
    return Answer(bits.index(1))


def _bit_remedy(cell: str) -> str:
    if not cell:
        return "write 0 or 1, or blank: zero under source in a card where empty means 0"
    if whole(cell) == "-1":
        return "write 0 or 1, or uncertain: zero or one under source in a card"
    return "write 0 or 1"
