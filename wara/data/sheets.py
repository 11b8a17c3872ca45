"""Text tables as programs write them: encoding, separator, header, rows with their line numbers."""

from __future__ import annotations

import codecs
import csv
import io
import os
import re
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from wara.data.words import plain
from wara.errors import WaraError
from wara.storage import open_regular

Row = dict[str, str]

OWN_COLUMNS = ("file", "label", "patient", "split")
MOST_COLUMNS = 16_384
"""Columns of a table; spreadsheets have no more."""
MOST_BYTES = 1 << 29
"""Bytes of a table."""

ENDINGS = (".csv", ".tsv", ".tab", ".txt")
"""Endings of tables that are read."""

_SEPARATORS = {",": "','", ";": "';'", "\t": "tabs"}
_CSV = "save it as CSV in UTF-8 (spreadsheets call it 'CSV UTF-8') and give that file"
_PANDAS = "read it with pandas and write it by to_csv(..., index=False), and give that file"
_OTHER_ENDINGS = {
    ".npz": ("a NumPy archive", "name it as source.file of a card whose source.kind is medmnist"),
    ".zip": ("a zip archive", "unpack it, and give the folder or the table that it held"),
}
# What a file is by its first bytes, though it may be called labels.csv.
_OTHER_FORMATS = (
    (b"PK\x03\x04", "an Excel workbook or a zip archive", f"in the spreadsheet, {_CSV}"),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook (.xls)", f"in the spreadsheet, {_CSV}"),
    (b"PAR1", "a Parquet file", _PANDAS),
    (b"\x1f\x8b", "a gzip archive", "unpack it with gunzip, and give the file that it held"),
    (b"\x93NUMPY", "a NumPy file", "write file names and labels as CSV"),
    (b"\x89HDF", "an HDF5 file", _PANDAS),
    (b"\x80\x04", "a Python pickle", _PANDAS),
    (b"<!doctype", "a web page", "fetch it again; the page may ask for a login first"),
    (b"<html", "a web page", f"fetch it again; if it is a spreadsheet's, {_CSV}"),
    (b"{", "JSON", _PANDAS),
    (b"[{", "JSON", _PANDAS),
)
# pandas calls a column without a name so when it reads one; a spreadsheet leaves it empty.
_UNNAMED = re.compile(r"(Unnamed: \d+(_level_\d+)?(\.\d+)*)?")


@dataclass(frozen=True)
class Sheet:
    """A table in hand.

    Args:
        path: where it lies.
        header: names of its columns; a column without a name that holds something is called
            `column 3`.
        rows: a cell per column, stripped of spaces.
        lines: number of the line that each row begins on.
        unnamed: those of `header` that have no name.
        notes: what had to be found out about its form.
    """

    path: Path
    header: list[str]
    rows: list[Row]
    lines: list[int]
    unnamed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def row_name(self, index: int) -> str:
        """Return where row `index` stands, as `labels.csv:7`."""
        return f"{self.path}:{self.lines[index]}"


def read_sheet(
    path: Path, columns: Sequence[str] | None = None, names: Container[str] = ()
) -> Sheet:
    """Read a table: columns set apart by commas, semicolons or tabs, in UTF-8 or marked UTF-16.

    Args:
        path: the table.
        columns: names of its columns, where it has no header line.
        names: columns that a card calls by exactly that name; `file`, `label`, `patient` and
            `split` are read in any case otherwise.

    Raises:
        WaraError: kind "data" when it is no such table.
    """
    notes: list[str] = []
    text, before = _text(path, notes), 0
    told = re.match(r'"?sep=(.)"?\r?\n', text)  # spreadsheets write and hide this line
    if told:
        text, before = text[told.end() :], 1
    first = next(iter(io.StringIO(text, newline="")), "")
    separator = told.group(1) if told else _separator(text, first, path, names)
    if separator != ",":
        notes.append(f"columns are set apart by {_SEPARATORS.get(separator, repr(separator))}")
    try:
        numbered = list(_lines(text, separator))
    except csv.Error as error:
        what = f"not a readable table: {error}"
        raise WaraError("data", what, str(path), "save it as CSV in UTF-8") from error
    if columns is None:
        head = [cell.strip() for cell in numbered.pop(0)[1]] if numbered else []
    else:
        head = list(columns)
    if len(head) > MOST_COLUMNS:
        what = f"{len(head):,} columns, where {MOST_COLUMNS:,} are the most that is read"
        raise WaraError("data", what, str(path), "keep the columns of files, labels and patients")
    if not any(head):
        raise WaraError(
            "data",
            "no column 'file' among: nothing",
            str(path),
            "the first line names the columns: file,label[,patient][,split]",
        )
    numbered = [(line + before, cells) for line, cells in numbered]
    return _sheet(path, head, numbered, names, notes)


def _sheet(
    path: Path,
    head: list[str],
    numbered: list[tuple[int, list[str]]],
    names: Container[str],
    notes: list[str],
) -> Sheet:
    # Spreadsheets write cells beyond the table when something once stood there.
    lines = [
        (number, _without_tail([cell.strip() for cell in cells], len(head)))
        for number, cells in numbered
        if any(cell.strip() for cell in cells)
    ]
    if not lines:
        raise WaraError("data", "no rows", str(path), "one row per image is needed")
    uneven = [(number, cells) for number, cells in lines if len(cells) != len(head)]
    if uneven:
        one_more = all(len(cells) == len(head) + 1 for _, cells in lines)
        raise WaraError(
            "data",
            f"row {uneven[0][0]} has another number of columns than the header"
            + (f" ({len(uneven)} rows in all)" if len(uneven) > 1 else ""),
            str(path),
            "write it without row names, or with a name for their column"
            if one_more
            else "quote cells that hold the separator",
        )
    header, unnamed = [], []
    for place, name in enumerate(head):
        if name not in names and _UNNAMED.fullmatch(name):
            name = f"column {place + 1}"
            unnamed.append(name)
        elif name not in names and plain(name).lower() in OWN_COLUMNS:
            name = plain(name).lower()
        header.append(name)
    twice = sorted(name for name, count in Counter(header).items() if count > 1)
    if twice:
        raise WaraError("data", f"column named twice: {', '.join(twice)}", str(path), "rename one")
    rows = [dict(zip(header, cells, strict=True)) for _, cells in lines]
    blank = {name for name in unnamed if not any(row[name] for row in rows)}
    return Sheet(
        path,
        [name for name in header if name not in blank],
        rows,
        [number for number, _ in lines],
        [name for name in unnamed if name not in blank],
        notes,
    )


def _without_tail(cells: list[str], columns: int) -> list[str]:
    return cells if any(cells[columns:]) else cells[:columns]


def _text(path: Path, notes: list[str]) -> str:
    try:
        with open_regular(path) as stream:
            if os.fstat(stream.fileno()).st_size > MOST_BYTES:
                what = f"a table of more than {MOST_BYTES >> 20} MiB"
                raise WaraError("data", what, str(path), "keep the columns that are needed")
            data = stream.read()
    except OSError as error:
        what = f"not a readable table: {error.strerror}"
        raise WaraError("data", what, str(path), "check the file") from error
    suffix = path.suffix.lower()
    if suffix in _OTHER_ENDINGS:
        what, remedy = _OTHER_ENDINGS[suffix]
        raise WaraError("data", f"{what}, not a CSV table", str(path), remedy)
    for signature, what, remedy in _OTHER_FORMATS:
        if data[:16].lstrip(b"\xef\xbb\xbf \r\n").lower().startswith(signature.lower()):
            raise WaraError("data", f"{what}, not a CSV table", str(path), remedy)
    if suffix not in ENDINGS:
        what = f"not a table that is read: {suffix or 'a file without ending'}"
        raise WaraError("data", what, str(path), f"give a table {' or '.join(ENDINGS[:2])}")
    encoding = "utf-8-sig"  # spreadsheets put a mark in front of the first column's name
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
        notes.append("the table is in UTF-16")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        what = f"not a table in UTF-8: line {line} holds letters of another encoding"
        raise WaraError("data", what, str(path), f"in the program that wrote it, {_CSV}") from error
    if "\0" in text:
        what = "not a table in UTF-8: it holds zero bytes, as UTF-16 without its mark does"
        raise WaraError("data", what, str(path), f"in the program that wrote it, {_CSV}")
    return text


def _lines(text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Yield each record with the number of the line that it begins on."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    begun = 1
    for cells in reader:
        yield begun, cells
        begun = reader.line_num + 1


def _separator(text: str, first: str, path: Path, names: Container[str]) -> str:
    """Return the one separator by which every row has as many columns as the first line."""
    present = [mark for mark in _SEPARATORS if mark in first]
    if len(present) < 2:
        return present[0] if present else ","
    fits = {}
    for mark in present:
        try:
            rows = [cells for _, cells in _lines(text, mark) if any(c.strip() for c in cells)]
        except csv.Error:
            continue
        if len(rows[0]) > 1 and len({len(row) for row in rows}) == 1:
            fits[mark] = [cell.strip() for cell in rows[0]]
    known = [
        mark
        for mark, header in fits.items()
        if any(cell in names or cell.lower() in OWN_COLUMNS for cell in header)
    ]
    for found in (list(fits), known):
        if len(found) == 1:
            return found[0]
    if fits:
        raise WaraError(
            "data",
            "columns may be set apart by " + " or by ".join(_SEPARATORS[mark] for mark in fits),
            str(path),
            "save it with one separator, and with quotes round cells that hold the other",
        )
    return max(present, key=first.count)
