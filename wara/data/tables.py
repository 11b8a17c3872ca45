"""Tables: `file,label[,patient][,split]`, or one 0/1 column per class, or what a card declares."""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from pathlib import Path

from wara.cards import Card, CsvSource, FolderSource, Modality
from wara.data.imageset import FileReader, ImageSet, Record
from wara.data.infer import split_note, split_of
from wara.data.labels import Answer, labels_of
from wara.data.places import Places, find_images
from wara.data.sheets import OWN_COLUMNS, Row, Sheet, read_sheet
from wara.data.words import known_patient, nobody_note, other_spellings, plain, quoted
from wara.errors import WaraError, suggest

# Columns, without case and punctuation, that say which images belong together. Left unread they
# would put images of one person into training and test.
_GROUP_WORDS = re.compile(
    r"(study)?(patient|subject|participant|person|case|lesion|exam|study|accession)s?"
    r"(id|ids|no|nr|num|number|name|code|key|uid)?|pid|ptid|mrn|(study|series)instanceuid"
)
# Where these repeat, they are people's; where they do not, they number the rows.
_PERHAPS_GROUP_WORDS = re.compile(r"records?(id|no|nr|num|number)?")


def open_table(
    path: Path,
    card: Card | None = None,
    modality: Modality | None = None,
    within: str | Path | None = None,
) -> ImageSet:
    """Open a table with a header line; `docs/tables.md` shows what each kind of table gives.

    Columns: `file` (path of the image, relative to the table), then either `label` (a class name
    or alias; `a|b` for several labels, empty for none of them) or one column of 0 and 1 per class.
    `patient` and `split` (train, val, test) are optional; further columns beside a `label` column
    decide nothing, `ImageSet.columns` keeps them. A card's `source` may name other columns. A
    column that seems to name patients in other words (`patient_id`, `subject`, ...) is refused
    unless there is a `patient` column or the card has a `group_column` or a `patient_pattern`.
    Images lie below the table's folder or the card's `source.folder`, wherever links lead.

    Args:
        path: the table.
        card: what the data is; None to infer classes from the table.
        modality: what the images show where there is no card; None when not known.
        within: folder below which images may lie as well.

    Raises:
        WaraError: kind "data" when the table as a whole cannot be used, "config" when `within` is
            no folder. Faults of single rows go to `ImageSet.faults`.
    """
    form = _form(card)
    group = (card.group_column if card else None) or "patient"
    names: set[str] = set()
    if card:
        named = (form.file_column, form.label_column, form.split_column, card.group_column)
        names = {*card.class_index, group, *(name for name in named if name)}
    sheet = read_sheet(path, form.columns, names)
    split = _column(sheet, form.split_column, "split")
    label = _column(sheet, form.label_column, "label")
    grouped = group in sheet.header
    if card and card.group_column and not grouped:
        raise WaraError(
            "data",
            f"no column '{group}', which the card groups by",
            str(path),
            f"columns are: {', '.join(sheet.header)}",
        )
    known = [name for name in (split, label, *([group] if grouped else [])) if name]
    places = find_images(
        sheet, declared=form.file_column, folder=form.folder, others=known, within=within
    )
    # Declared patterns win over a column that nobody declared.
    pattern = form.patient_pattern if isinstance(card and card.source, CsvSource) else None
    if isinstance(card and card.source, FolderSource) and not grouped:
        pattern = form.patient_pattern
    if pattern is None and not grouped:
        _check_group(sheet, {*names, *known, places.column})
    card, answers, notes = labels_of(
        sheet,
        card,
        form,
        label=label,
        others=[*known, places.column],
        modality=modality,
    )
    ignored = [name for name in sheet.unnamed if name != places.column]
    if ignored:
        notes.append(f"without a name, so ignored: {', '.join(ignored)}")
    people = _people(sheet, places, group if grouped else None, pattern, notes)
    twice = other_spellings(people)

    records: list[Record] = []
    paths: list[Path] = []
    taken: list[Row] = []
    faults: list[WaraError] = []
    seen: dict[str, int] = {}
    splits = [split_of(row[split]) if split else None for row in sheet.rows]
    split_given = split is not None and any(row[split] for row in sheet.rows)
    if split is not None:
        notes += split_note((row[split] for row in sheet.rows), "rows")
    read = [name for name in (label, split, group if grouped else None) if name]
    for index, row in enumerate(sheet.rows):
        answer: Answer = answers[index]
        problem = _row_problem(sheet, places, index, seen)
        problem = problem or _formula(row, read, card)
        if problem is None and split_given and splits[index] is None:
            problem = _split_problem(row[split or ""])
        problem = problem or answer.problem
        if problem is None and index in twice:
            problem = _spelling_problem(sheet, people, index, twice[index])
        if problem is not None or answer.label is None:
            what, remedy = problem or ("no label", "correct the row")
            where = f"{sheet.row_name(index)}: {row[places.column] or '(no file)'}"
            faults.append(WaraError("data", what, where, remedy))
            continue
        records.append(Record(places.files[index], answer.label, people[index], splits[index]))
        paths.append(places.paths[index])
        taken.append(row)
    return ImageSet(
        card,
        records,
        FileReader(paths),
        origin=f"table {path}",
        notes=[*sheet.notes, *places.notes, *notes],
        faults=faults,
        columns={name: [row[name] for row in taken] for name in sheet.header},
        # A run beside the table is no harm: what the table does not name is not read.
        folders={Path(image).parent.resolve() for image in paths} - set(path.resolve().parents),
    )


def _form(card: Card | None) -> CsvSource:
    """Return what a card says of its table; of a table beside class folders it says little."""
    if card and isinstance(card.source, CsvSource):
        return card.source
    pattern = (
        card.source.patient_pattern if card and isinstance(card.source, FolderSource) else None
    )
    return CsvSource(kind="csv", patient_pattern=pattern)


def _column(sheet: Sheet, declared: str | None, usual: str) -> str | None:
    if declared is None:
        return usual if usual in sheet.header else None
    if declared not in sheet.header:
        raise WaraError(
            "data",
            f"no column '{declared}', which the card names as {usual}_column",
            str(sheet.path),
            suggest(declared, sheet.header),
        )
    return declared


def _check_group(sheet: Sheet, used: Container[str]) -> None:
    for name in sheet.header:
        if name in OWN_COLUMNS or name in used:
            continue
        word = re.sub(r"[\W_]+", "", name.lower())
        cells = [row[name] for row in sheet.rows]
        repeated = len(set(cells)) < len(cells)
        if _GROUP_WORDS.fullmatch(word) or (repeated and _PERHAPS_GROUP_WORDS.fullmatch(word)):
            raise WaraError(
                "data",
                f"column '{name}' seems to name patients, and there is no column 'patient'",
                str(sheet.path),
                "rename it to patient, or name it as group_column in a card, so that images of a "
                "patient stay in one split; take it out if it does not say which images belong "
                "together",
            )


def _people(
    sheet: Sheet, places: Places, group: str | None, pattern: str | None, notes: list[str]
) -> list[str | None]:
    """Return who each row shows; None where nobody is named."""
    if pattern is not None:
        matches = [re.search(pattern, file) for file in places.files]
        words = [(match.group(1) or "") if match else "" for match in matches]
        what, column = "file names", "patient"
    elif group is not None:
        words = [row[group] for row in sheet.rows]
        what, column = "rows", group
    else:
        return [None] * len(sheet.rows)
    notes += nobody_note([word for word in words if not known_patient(word)], what, column)
    return [word if known_patient(word) else None for word in words]


def _row_problem(
    sheet: Sheet, places: Places, index: int, seen: dict[str, int]
) -> tuple[str, str] | None:
    if not sheet.rows[index][places.column]:
        return "no file name", "name the image or remove the row"
    if index in places.problems:
        return places.problems[index]
    first = seen.setdefault(places.real[index], index)
    if first != index:
        return f"listed in row {sheet.lines[first]} already", "keep one row per image"
    return None


def _formula(row: Row, columns: Sequence[str], card: Card) -> tuple[str, str] | None:
    """Return what is wrong with a row whose cell a spreadsheet would show as something else."""
    for name in columns:
        cell = row[name]
        if cell.startswith("=") and cell == plain(cell) and cell not in card.class_index:
            what = f"column {name} holds the formula '{cell}'"
            return what, "save the table with values in the place of formulas"
    return None


def _spelling_problem(
    sheet: Sheet, people: Sequence[str | None], index: int, before: int
) -> tuple[str, str]:
    this, other = quoted(people[index] or "", people[before] or "")
    what = f"patient {this} is {other} of row {sheet.lines[before]} in another spelling"
    return what, "write both alike, or give two patients names that differ in more"


def _split_problem(word: str) -> tuple[str, str]:
    if not word:
        return "no split, while other rows have one", "write train, val or test in every row"
    return f"split '{word}'", "write train, val or test"
