"""Places that a call writes to: apart from what it reads, outside of what must not change."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO

from wara.deploy.bundle import FORMAT, MANIFEST
from wara.errors import WaraError, storage_error
from wara.storage import open_regular

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def check_outside(folder: Path, option: str) -> None:
    """Refuse to write into a bundle or a run folder, at any depth.

    Args:
        folder: that gets a new entry; need not exist.
        option: that names it.

    Raises:
        WaraError: kind "usage", naming the bundle or the run.
    """
    real = folder.resolve()
    for place in (real, *real.parents):
        kind = _kept(place)
        if kind is not None:
            what = f"{option} lies inside {kind}, which would change it"
            raise WaraError("usage", what, str(place), "choose a place outside of it")


def _kept(folder: Path) -> str | None:
    if all((folder / name).is_file() for name in ("config.yaml", "provenance.json")):
        return "a run folder"
    try:
        with open_regular(folder / MANIFEST) as stream:
            head = stream.read(256)
    except OSError:
        return None
    return "a bundle" if f'"{FORMAT}"'.encode() in head else None


def check_places(
    files: Mapping[str, Path], folders: Mapping[str, Path], inputs: Iterable[Path]
) -> None:
    """Refuse places that cannot be written, or whose writing would destroy something.

    Args:
        files: that are written, by the option that names each.
        folders: the same.
        inputs: files and folders that are read.

    Raises:
        WaraError: kind "usage" for a file that is a folder or a folder that is a file, a place
            inside a bundle or a run, an input, a folder below one that is read, or a place that
            two options name.
    """
    for option, path in files.items():
        if path.exists() and not path.is_file():
            kind = "a folder" if path.is_dir() else "no regular file"
            raise WaraError("usage", f"{option} is {kind}", str(path), "give the name of a file")
        check_outside(path.resolve().parent, option)
    for option, path in folders.items():
        there = next(place for place in (path, *path.absolute().parents) if place.exists())
        if not there.is_dir():
            remedy = "give the name of a folder"
            raise WaraError("usage", f"{option} is no folder but a file", str(there), remedy)
        check_outside(path, option)
    taken: dict[object, str] = {}
    for option, path in (*files.items(), *folders.items()):
        other = taken.setdefault(_identity(path), option)
        if other != option:
            what = f"{other} and {option} are the same place"
            raise WaraError("usage", what, str(path), "give each its own")
    for path in inputs:
        option = taken.get(_identity(path), "")
        if option:
            what = f"{option} is also read, and would be overwritten"
            raise WaraError("usage", what, str(path), "choose another place")
        for option, folder in folders.items():
            if path.is_dir() and path.resolve() in folder.resolve().parents:
                what = f"{option} lies in a folder that is read, where its files would be read next"
                raise WaraError("usage", what, str(folder), "choose another place")


def _identity(path: Path) -> object:
    """Return what two names of one file or folder have in common."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return os.path.realpath(path)
    return status.st_dev, status.st_ino


def open_locked(path: Path) -> IO[bytes]:
    """Open a file to read and append, for this call alone until it is closed.

    Raises:
        WaraError: kind "busy" when another call has it, "storage" when it cannot be opened.
    """
    try:
        while True:
            stream = path.open("a+b")
            try:
                _lock(stream, path)
                # Whoever had it before may have removed it meanwhile.
                if path.exists() and os.path.samestat(os.fstat(stream.fileno()), path.stat()):
                    return stream
            except BaseException:
                stream.close()
                raise
            stream.close()
    except OSError as error:
        raise storage_error(error, path) from error


def _lock(stream: IO[bytes], path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        remedy = "wait until it has ended, or choose another name"
        raise WaraError("busy", "another call writes this file", str(path), remedy) from None
    except OSError as error:
        # Some network shares have no locks; writing there is no worse than it was.
        if error.errno not in _NO_LOCKS:
            raise
