"""Rows on disk: whole or not there, and continued where they stopped."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from wara.errors import WaraError, storage_error
from wara.storage import write_bytes

FORMATS = ("csv", "jsonl", "json", "mercure")


class Output:
    """The rows of one call, kept beside the file that they become, one line of JSON each.

    Args:
        path: the file.
        form: one of `FORMATS`.
        columns: of a row.
        key: what the rows depend on: the model, the images, the settings.
        resume: whether to go on with the rows of an earlier call.

    Raises:
        WaraError: kind "usage" when there is nothing to go on with, or it was another call; kind
            "storage" when the file cannot be written.
    """

    def __init__(
        self, path: Path, form: str, columns: Sequence[str], key: dict[str, Any], *, resume: bool
    ) -> None:
        self.path, self.form, self.columns = path, form, list(columns)
        self.part = path.with_name(f".{path.name}.part")
        self.rows: list[dict[str, Any]] = []
        if not path.parent.is_dir():
            what = f"no folder {path.parent}"
            raise WaraError("storage", what, str(path), "make it, or choose another --out")
        if resume:
            self._read(key)
        try:
            self._stream = self.part.open("w", encoding="utf-8")
            self._line(key)
            for row in self.rows:
                self._line(row)
        except OSError as error:
            raise storage_error(error, self.part) from error

    def _read(self, key: dict[str, Any]) -> None:
        if not self.part.is_file():
            remedy = "call it without --resume"
            raise WaraError("usage", "nothing to resume", str(self.path), remedy)
        lines = self.part.read_text(encoding="utf-8").split("\n")[:-1]  # the last may be cut short
        if not lines or json.loads(lines[0]) != key:
            what = "the rows so far are of another bundle, other images or other settings"
            raise WaraError("usage", what, str(self.part), "call it without --resume")
        self.rows = [json.loads(line) for line in lines[1:]]

    def add(self, row: dict[str, Any]) -> None:
        """Add a row, and keep it at once."""
        self.rows.append(row)
        try:
            self._line(row)
        except OSError as error:
            raise storage_error(error, self.part) from error

    def _line(self, content: dict[str, Any]) -> None:
        self._stream.write(json.dumps(content, ensure_ascii=False) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Keep the rows so far for `resume`."""
        self._stream.close()

    def finish(self) -> None:
        """Write the file in one step, and forget what led to it."""
        self.close()
        write_bytes(self.path, as_bytes(self.rows, self.columns, self.form))
        os.unlink(self.part)


def as_bytes(rows: Sequence[dict[str, Any]], columns: Sequence[str], form: str) -> bytes:
    """Return rows as a file of one of `FORMATS`.

    mercure keeps the result of a module as a JSON object, and mails what stands in it as text.
    """
    if form == "mercure":
        stamp = "SYNTHETIC model. " if any(row["synthetic"] for row in rows) else ""
        text = stamp + "; ".join(finished(rows))
        content = {"images": list(rows), "__mercure_notification": {"text": text}}
        return (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode()
    if form == "json":
        return (json.dumps(list(rows), ensure_ascii=False, indent=1) + "\n").encode()
    if form == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(row[column]) for column in columns] for row in rows)
    return stream.getvalue().encode()


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else value


def finished(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield what a person should know of rows that were written: errors and abstentions."""
    errors = sum(row["error"] is not None for row in rows)
    abstained = sum(bool(row["abstain"]) for row in rows)
    yield f"{len(rows)} images: {errors} could not be read, {abstained} abstained"
    decided = [row["decision"] for row in rows if row["decision"] is not None]
    if decided:
        yield f"{decided.count('positive')} of {len(decided)} positive at the operating point"
