"""Files that a reader finds whole or not at all, their hashes, and those that come with wara."""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import io
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from wara.errors import WaraError, storage_error

TEMP_SUFFIX = ".wara-tmp"


def shipped(kind: Literal["configs", "datasets"]) -> Path:
    """Return the folder of shipped configs or cards, in a checkout or in the installed package.

    Raises:
        WaraError: kind "storage" when the installation lacks the folder.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "_share" / kind, package.parent / kind):
        if folder.is_dir():
            return folder
    raise WaraError(
        "storage", f"the shipped {kind} are missing", str(package), "install wara again"
    )


def temp_name(path: Path) -> Path:
    """Name of the temporary entry beside `path`; same folder, so the rename is atomic."""
    return path.with_name(f".{path.name}.{os.getpid()}{TEMP_SUFFIX}")


def is_temp(name: str) -> bool:
    """Whether a file name is one that `temp_name` makes."""
    return name.startswith(".") and name.endswith(TEMP_SUFFIX)


def remove_temps(folder: Path) -> None:
    """Delete temporary entries that a killed process left in `folder` and below."""
    for path in list(folder.rglob(f".*{TEMP_SUFFIX}")):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


class NotRegular(OSError):
    """What was to be read is a pipe, a socket or a device."""


def open_regular(path: str | Path) -> io.BufferedReader:
    """Open a file to read it. A pipe is never waited for, a device never read.

    Raises:
        NotRegular: for a pipe, a socket or a device.
        OSError: as `open` does, also for a folder.
    """
    # Asked before it is opened, for opening a device may do something; asked again of what was
    # opened, for another file may have come in its place. Opening a pipe without O_NONBLOCK would
    # wait for somebody to write into it.
    _check_regular(os.stat(path), path)
    flags = os.O_RDONLY
    for name in ("O_CLOEXEC", "O_NONBLOCK", "O_NOCTTY", "O_BINARY"):
        flags |= getattr(os, name, 0)  # no system has all of them
    handle = os.open(path, flags)
    try:
        _check_regular(os.fstat(handle), path)
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def _check_regular(status: os.stat_result, path: str | Path) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise NotRegular(errno.EINVAL, "not a regular file", str(path))


def read_regular(path: str | Path) -> bytes:
    """Return the content of a file; raises as `open_regular`."""
    with open_regular(path) as stream:
        return stream.read()


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_tree(folder: Path) -> None:
    """Make what a folder holds durable, so that its name is never that of empty files."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            with open(Path(place, name), "rb") as handle:
                os.fsync(handle.fileno())
        sync_folder(Path(place))


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


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder; on success it takes the place of `path`, in one step where it can.

    Entries of the old folder that the new one lacks are kept, and so are its mode and a link that
    leads to it. A kill leaves the old folder or the new one under the name. A folder that cannot
    be moved (one that is mounted, that the process works in, whose parent may not be written)
    stays, and gets the new files one by one, JSON with its checksums last; so it does where the
    system cannot exchange two names (not Linux). A kill in between leaves a folder that is refused.

    Raises:
        WaraError: kind "storage", when the file system refuses.
    """
    target = Path(os.path.realpath(path))
    temp: Path | None = None
    try:
        fixed = target.is_dir() and _is_fixed(target)
        temp = temp_name(target / "new" if fixed else target)
        _remove(temp)
        temp.mkdir(parents=True)
        if target.exists():
            shutil.copymode(target, temp)
        yield temp
        files = sorted(temp.iterdir(), key=lambda file: (file.suffix == ".json", file.name))
        _sync_tree(temp)
        if not target.exists():
            os.rename(temp, target)
        elif fixed or not _exchanged(temp, target):
            for file in files:
                os.replace(file, target / file.name)
        sync_folder(target if fixed else target.parent)
    except OSError as error:
        raise storage_error(error, path) from error
    finally:
        if temp is not None:
            with contextlib.suppress(OSError):
                _remove(temp)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder; on success it gets the name `path`, on any failure it is removed.

    Raises:
        WaraError: kind "usage" when there is something of that name already, kind "storage" when
            the file system refuses.
    """
    if path.exists():
        what, remedy = "there is something already", "choose another --out, or remove it"
        raise WaraError("usage", what, str(path), remedy)
    temp = temp_name(path)
    try:
        _remove(temp)
        temp.mkdir(parents=True)
    except OSError as error:
        raise storage_error(error, path) from error
    try:
        yield temp
        try:
            _sync_tree(temp)
            temp.rename(path)
            sync_folder(path.parent)
        except OSError as error:
            raise storage_error(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            _remove(temp)


def _is_fixed(folder: Path) -> bool:
    """Whether a folder cannot give its name to another one, or should not."""
    here = Path.cwd()
    inside = folder == here or folder in here.parents
    return inside or os.path.ismount(folder) or not os.access(folder.parent, os.W_OK)


def _exchanged(fresh: Path, old: Path) -> bool:
    """Give each of two folders the other's name, after what only the old one has went over."""
    import ctypes

    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    names = {entry.name for entry in fresh.iterdir()}
    for entry in old.iterdir():
        if entry.name in names:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, fresh / entry.name, symlinks=True, copy_function=link_or_copy)
        else:
            link_or_copy(entry, fresh / entry.name)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(here, os.fsencode(fresh), here, os.fsencode(old), exchange) == 0


def link_or_copy(source: str | Path, copy: str | Path) -> None:
    """Give a file a second name, or copy it where the file system has but one for each."""
    try:
        os.link(source, copy, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, copy, follow_symlinks=False)


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


def parse_json(data: bytes) -> dict[str, Any]:
    """Read a JSON object from bytes that may be damaged or hostile.

    Raises:
        ValueError: when they are no UTF-8 JSON object, name a key twice, nest too deep, or hold
            NaN or Infinity.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key stands twice")
        return found

    def no_number(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    try:
        content = json.loads(data.decode(), object_pairs_hook=once, parse_constant=no_number)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if not isinstance(content, dict):
        raise ValueError("no JSON object")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; `ValueError` when it is none, see `parse_json`."""
    return parse_json(read_regular(path))


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write a table to `path` atomically; `None` becomes an empty cell."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(["" if cell is None else cell for cell in row] for row in rows)
    write_bytes(path, buffer.getvalue().encode())


def read_csv(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Read a table that `write_csv` wrote: its columns, and a dict per row.

    Raises:
        WaraError: kind "artefact" when it is missing or not such a table.
    """
    remedy = "bring back the file as it was written"
    try:
        with io.TextIOWrapper(open_regular(path), encoding="utf-8", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            columns, rows = list(reader.fieldnames or []), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        if isinstance(error, UnicodeDecodeError):
            reason = "not UTF-8 text"
        what = f"cannot read the table: {reason}"
        raise WaraError("artefact", what, str(path), remedy) from error
    if len(set(columns)) < len(columns):
        raise WaraError("artefact", "a column stands twice", str(path), remedy)
    if any(None in row or None in row.values() for row in rows):
        raise WaraError("artefact", "rows of different length", str(path), remedy)
    return columns, rows


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with open_regular(path) as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def canonical_sha256(content: Any) -> str:
    """Return the SHA-256 of plain values, whatever the order of keys and the spacing of a file."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def code_sha256(sources: Iterable[Path], libraries: Iterable[str]) -> str:
    """Return the SHA-256 of code: source files by name, and libraries by installed version."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    for library in libraries:
        digest.update(f"{library} {version(library)}".encode())
    return digest.hexdigest()
