"""Rows on disk: whole or not there, and continued where they stopped."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from wara.deploy.places import open_locked
from wara.errors import WaraError, storage_error
from wara.storage import parse_json, write_bytes

FORMATS = ("csv", "jsonl", "json", "mercure")
_FREE_TEXT = ("file", "error")
_ANEW = "call it without --resume"


class Output:
    """The rows of one call, kept beside the file that they become, one line of JSON each.

    Args:
        path: the file.
        form: one of `FORMATS`.
        columns: of a row.
        key: what the rows depend on: the model, the images, the settings.
        files: the images, in order, as rows name them.
        resume: whether to go on with the rows of an earlier call.

    Raises:
        WaraError: kind "usage" when there is nothing to go on with, or it was another call;
            "artefact" when the rows so far are damaged; "busy" when another call writes the same
            file; "storage" when it cannot be written.
    """

    def __init__(
        self, path: Path, form: str, columns: Sequence[str], key: dict[str, Any],
        files: Sequence[str], *, resume: bool,
    ) -> None:  # fmt: skip
        self.path, self.form, self.columns = path, form, list(columns)
        self.part = part_of(path)
        self.rows: list[dict[str, Any]] = []
        self.reports: list[dict[str, Any] | None] = []
        if not path.parent.is_dir():
            what = f"no folder {path.parent}"
            raise WaraError("storage", what, str(path), "make it, or choose another --out")
        if resume and not self.part.is_file():
            raise self._nothing()
        self._stream = open_locked(self.part)
        try:
            if resume:
                self._read(key, files)
            else:
                self._stream.truncate(0)
                self._line(key)
        except OSError as error:
            self.close()
            raise storage_error(error, self.part) from error
        except WaraError:
            self.close()
            raise

    def _nothing(self) -> WaraError:
        return WaraError("usage", "nothing to resume", str(self.path), _ANEW)

    def _read(self, key: dict[str, Any], files: Sequence[str]) -> None:
        self._stream.seek(0)
        data = self._stream.read()
        whole = data[: data.rfind(b"\n") + 1]  # the last line may be cut short
        lines = whole.split(b"\n")[:-1]
        if not lines:
            raise self._nothing()
        if self._parsed(lines[0], 1) != key:
            what = "the rows so far are of another bundle, other images or other settings"
            raise WaraError("usage", what, str(self.part), _ANEW)
        for number, line in enumerate(lines[1:], 2):
            content = self._parsed(line, number)
            row = content.get("row")
            # Row for row the images of this call, or some would be lost.
            if (
                content.keys() != {"row", "report"}
                or not isinstance(row, dict)
                or list(row) != self.columns
                or [row["file"]] != list(files[number - 2 : number - 1])
            ):
                raise self._damaged(number)
            self.rows.append(row)
            self.reports.append(content["report"])
        self._stream.truncate(len(whole))

    def _parsed(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            return parse_json(line)
        except ValueError:
            raise self._damaged(number) from None

    def _damaged(self, number: int) -> WaraError:
        what = f"the rows so far are damaged in line {number}"
        return WaraError("artefact", what, str(self.part), _ANEW)

    def add(self, row: dict[str, Any], report: dict[str, Any] | None = None) -> None:
        """Add a row and what became of its report, and keep both at once."""
        self.rows.append(row)
        self.reports.append(report)
        try:
            self._line({"row": row, "report": report})
        except OSError as error:
            raise storage_error(error, self.part) from error

    def _line(self, content: dict[str, Any]) -> None:
        self._stream.write(_encoded(_json(content) + "\n"))
        self._stream.flush()

    def close(self) -> None:
        """Keep the rows so far for `resume`."""
        self._stream.close()

    def finish(self) -> None:
        """Write the file in one step, and forget what led to it."""
        write_bytes(self.path, as_bytes(self.rows, self.columns, self.form))
        # Before another call can have it.
        os.unlink(self.part)
        self.close()


def part_of(path: Path) -> Path:
    """Return where the rows of a file are kept until they are whole."""
    return path.with_name(f".{path.name}.part")


def as_bytes(rows: Sequence[dict[str, Any]], columns: Sequence[str], form: str) -> bytes:
    """Return rows as a file of one of `FORMATS`.

    mercure keeps the result of a module as a JSON object, and mails what stands in it as text.
    """
    if form == "mercure":
        stamp = "SYNTHETIC model. " if any(row["synthetic"] for row in rows) else ""
        text = stamp + "; ".join(finished(rows))
        content = {"images": list(rows), "__mercure_notification": {"text": text}}
        return _encoded(_json(content, indent=1) + "\n")
    if form == "json":
        return _encoded(_json(list(rows), indent=1) + "\n")
    if form == "jsonl":
        return _encoded("".join(_json(row) + "\n" for row in rows))
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(column, row[column]) for column in columns] for row in rows)
    return _encoded(stream.getvalue())


def _json(content: Any, indent: int | None = None) -> str:
    return json.dumps(content, ensure_ascii=False, indent=indent)


def _encoded(text: str) -> bytes:
    # The name of a file may hold bytes that are no UTF-8. Each is written as \udcXX, which in JSON
    # is what Python holds for it, so that `os.fsencode` gives the very name back.
    return text.encode(errors="backslashreplace")


def _cell(column: str, value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    # A spreadsheet would compute what begins so, and anyone may name a file.
    formula = column in _FREE_TEXT and str(value).startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{value}" if formula else value


def finished(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield what a person should know of rows that were written: errors and abstentions."""
    errors = sum(row["error"] is not None for row in rows)
    abstained = sum(bool(row["abstain"]) for row in rows)
    yield f"{len(rows)} images: {errors} could not be read, {abstained} abstained"
    decided = [row["decision"] for row in rows if row["decision"] is not None]
    if decided:
        yield f"{decided.count('positive')} of {len(decided)} positive at the operating point"
