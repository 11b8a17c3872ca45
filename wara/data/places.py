"""Which column of a table names the images, and which file each of its cells means."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from wara.data.litter import made_by
from wara.data.root import Root, find_folder
from wara.data.sheets import OWN_COLUMNS, Sheet
from wara.data.walk import is_image, says_image
from wara.data.words import nfc
from wara.errors import WaraError, suggest


@dataclass(frozen=True)
class Places:
    """Where the image of each row lies.

    Args:
        column: column that names the images.
        files: path relative to the table, as records and predictions have it.
        paths: the file; also where it is missing, so that the gate names it.
        real: where it leads in the end, the same for all names of one file.
        problems: row -> (what, remedy) where several files would fit, or one that must not be read.
        notes: what was found out.
    """

    column: str
    files: list[str]
    paths: list[Path]
    real: list[str]
    problems: dict[int, tuple[str, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class _Shelf:
    """Files below some folders, each folder listed once."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = folders
        self._listed: dict[Path, dict[str, list[Path]]] = {}
        self._places: dict[Path, Path] = {}
        self._found: dict[str, tuple[list[Path], str]] = {}

    def find(self, cell: str) -> tuple[list[Path], str]:
        """Return the files that a cell may mean, and how: "", "ending" or "slash"."""
        if cell not in self._found:
            self._found[cell] = self._look_for(cell)
        return self._found[cell]

    def _look_for(self, cell: str) -> tuple[list[Path], str]:
        for how, name in (("", cell), ("slash", cell.replace("\\", "/"))):
            if not name or (how and name == cell):
                continue
            last = Path(name).name
            within = [find_folder(folder, name, self._places) for folder in self.folders]
            found = [path for folder in within for path in self._named(folder, last)]
            if found:
                return found, how
            if says_image(name):
                continue  # it names one file, and that one is missing
            found = [
                other
                for folder in within
                for other in self._files(folder).get(f"{nfc(last)}.*", [])
                if _may_be_meant(other)
            ]
            if found:
                return found, how or "ending"
        return [], ""

    def _named(self, folder: Path, name: str) -> list[Path]:
        """Return the file of that name; else those whose name is the same text in another form."""
        files = self._files(folder).get(nfc(name), [])
        return [path for path in files if path.name == name] or files

    def _files(self, folder: Path) -> dict[str, list[Path]]:
        """Return the files of a folder by name in NFC, and by name without ending as `name.*`."""
        if folder not in self._listed:
            listed: dict[str, list[Path]] = {}
            try:
                with os.scandir(folder) as entries:
                    names = sorted(entry.name for entry in entries if entry.is_file())
            except OSError:
                names = []  # no such folder: no file in it, which the gate tells of every row
            for name in names:
                listed.setdefault(nfc(name), []).append(folder / name)
            for name in names:
                stem = name.rpartition(".")[0]
                if stem:
                    listed.setdefault(f"{nfc(stem)}.*", []).append(folder / name)
            self._listed[folder] = listed
        return self._listed[folder]


def _may_be_meant(path: Path) -> bool:
    """Whether a file is an image that a name without ending may mean."""
    if made_by(path.name, folder=False) is not None:
        return False
    try:
        return says_image(path.name) or is_image(path)
    except OSError:
        return True  # nobody can say that it is not


def find_images(
    sheet: Sheet,
    *,
    declared: str | None,
    folder: str | None,
    others: Sequence[str],
    within: str | Path | None = None,
) -> Places:
    """Find the column that names the images, and their files.

    The column is the declared one, else `file`, else the only one whose cells all name files. A
    name without ending means the one image of that name, where there is just one.

    Args:
        sheet: the table.
        declared: column that the card names, if it does.
        folder: where the images lie, relative to the table; `*` stands for any name.
        others: columns that are known to be something else.
        within: folder that images may lie in besides that of the table and the declared one.

    Raises:
        WaraError: kind "data" when there is no such column or folder, "config" when `within` is
            no folder.
    """
    root = Root([sheet.path.parent, *([_fixed(sheet.path, folder)] if folder else [])], within)
    folders = _folders(sheet.path, folder)
    shelf = _Shelf(folders)
    column, notes = declared or ("file" if "file" in sheet.header else None), []
    if column is None:
        column = _only_column(sheet, shelf, [n for n in sheet.header if n not in others])
        notes.append(f"column '{column}' names the images")
    elif column not in sheet.header:
        raise WaraError(
            "data", f"no column '{column}'", str(sheet.path), suggest(column, sheet.header)
        )
    files: list[str] = []
    paths: list[Path] = []
    real: list[str] = []
    problems: dict[int, tuple[str, str]] = {}
    ways: Counter[str] = Counter()
    for index, row in enumerate(sheet.rows):
        cell = row[column]
        found, how = shelf.find(cell)
        path = found[0] if found else folders[0] / cell
        leaves = root.problem(path, cell)
        if leaves is not None:
            problems[index] = leaves
        elif len(found) > 1:
            listed = ", ".join(_shown(path, sheet.path.parent) for path in found[:3])
            problems[index] = (f"'{cell}' may be {listed}", "write the name with its ending")
        elif not found and len(folders) > 1:
            problems[index] = (f"no image '{cell}' in {folder}", "correct the name or the folder")
        elif not found and cell and os.path.lexists(path):
            # A pipe, a device, a folder, or a link to nothing.
            problems[index] = (f"'{cell}' is no file", "name the file of the image")
        ways[how] += 1
        literal = not found or (not how and folder is None)
        files.append(cell if literal else _shown(path, sheet.path.parent))
        paths.append(path)
        real.append(root.real(path))
    notes += root.notes()
    if ways["ending"]:
        notes.append(
            f"names without ending in {ways['ending']} rows: each is the one image of that name"
        )
    if ways["slash"]:
        notes.append(f"'\\' is read as '/' in the names of {ways['slash']} rows")
    return Places(column, files, paths, real, problems, notes)


def _shown(path: Path, base: Path) -> str:
    # Not resolved: where links lead to is the machine's business.
    return os.path.relpath(path, base).replace(os.sep, "/")


def _fixed(table: Path, folder: str) -> Path:
    """Return the declared folder, of one with wildcards the part before them."""
    place = table.parent
    for part in Path(folder).expanduser().parts:
        if any(mark in part for mark in "*?["):
            break
        place /= part
    return place


def _folders(table: Path, folder: str | None) -> list[Path]:
    if folder is None:
        return [table.parent]
    base = Path(folder).expanduser()
    if any(mark in folder for mark in "*?["):
        root = Path(base.anchor) if base.is_absolute() else table.parent
        pattern = str(base.relative_to(base.anchor)) if base.is_absolute() else folder
        found = sorted(path for path in root.glob(pattern) if path.is_dir())
    else:
        found = [path for path in [table.parent / base] if path.is_dir()]
    if not found:
        raise WaraError(
            "data", f"no folder '{folder}' beside the table", str(table), "correct source.folder"
        )
    return found


def _only_column(sheet: Sheet, shelf: _Shelf, candidates: Sequence[str]) -> str:
    """Return the column whose every cell names a file; several must name the same files."""
    hits: dict[str, list[Path]] = {}
    for name in candidates:
        if all(shelf.find(row[name])[0] for row in sheet.rows):  # ends at the first that does not
            hits[name] = [shelf.find(row[name])[0][0] for row in sheet.rows]
    headless = any(shelf.find(name)[0] for name in hits) and not {*OWN_COLUMNS} & {*sheet.header}
    if headless or (not hits and any(shelf.find(name)[0] for name in sheet.header)):
        raise WaraError(
            "data",
            "no column 'file': the first line is a row and names no columns",
            str(sheet.path),
            "put the line file,label on top, or name the columns as source.columns in a card",
        )
    if len({tuple(paths) for paths in hits.values()}) == 1:
        return next(iter(hits))
    if hits:
        raise WaraError(
            "data",
            f"no column 'file', and columns {' and '.join(hits)} both name files",
            str(sheet.path),
            "rename the column of the images to file, or name it as source.file_column in a card",
        )
    missing = {
        name: [index for index, row in enumerate(sheet.rows) if not shelf.find(row[name])[0]]
        for name in candidates
    }
    name = min(missing, key=lambda name: len(missing[name]), default="")
    if name and len(missing[name]) < len(sheet.rows):
        count, row = len(missing[name]), missing[name][0]
        raise WaraError(
            "data",
            f"no column 'file', and column '{name}' names no file in {count} rows, first "
            f"'{sheet.rows[row][name]}'",
            sheet.row_name(row),
            "correct the names, or name column and folder as source.file_column and source.folder "
            "in a card",
        )
    raise WaraError(
        "data",
        f"no column 'file' among: {', '.join(sheet.header)}; nor one that names files here",
        str(sheet.path),
        "call the column of the images file, with paths from the table's folder, or name column "
        "and folder as source.file_column and source.folder in a card",
    )
