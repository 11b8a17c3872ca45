"""Writing files so that a reader sees the old one or the new one, never half of one."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from wara.errors import WaraError

TEMP_SUFFIX = ".wara-tmp"
_FULL = {errno.ENOSPC, errno.EDQUOT}


def storage_error(error: OSError, path: Path) -> WaraError:
    """Translate an operating-system error on writing into a refusal (exit 5)."""
    if error.errno in _FULL:
        return WaraError(
            "storage", "no space left to write", str(path), "free some space, then use --resume"
        )
    reason = error.strerror or type(error).__name__
    return WaraError(
        "storage", f"cannot write: {reason}", str(path), "check the disk and the permissions"
    )


def temp_name(path: Path) -> Path:
    """Name of the temporary file beside `path`; same folder, so the rename is atomic."""
    return path.with_name(f".{path.name}.{os.getpid()}{TEMP_SUFFIX}")


def is_temp(name: str) -> bool:
    """Whether a file name is one that `temp_name` makes."""
    return name.startswith(".") and name.endswith(TEMP_SUFFIX)


def remove_temps(folder: Path) -> None:
    """Delete temporary files that a killed run left in `folder` and below."""
    for path in folder.rglob(f".*{TEMP_SUFFIX}"):
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path; on success it replaces `path`, on any failure it is removed.

    Raises:
        WaraError: kind "storage", when the file system refuses.
    """
    temp = temp_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temp
        with open(temp, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temp, path)
        sync_folder(path.parent)
    except OSError as error:
        raise storage_error(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            temp.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    with replacing(path) as temp:
        temp.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8 with a final newline."""
    write_bytes(path, (text.rstrip("\n") + "\n").encode())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` to `path` atomically; NaN and infinity are refused, they are not JSON."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; `ValueError` when it is none."""
    content = json.loads(path.read_text())
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write a table to `path` atomically; `None` becomes an empty cell."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(["" if cell is None else cell for cell in row] for row in rows)
    write_bytes(path, buffer.getvalue().encode())
