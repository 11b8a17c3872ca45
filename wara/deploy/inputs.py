"""From what a person names to the list of images: files, folders, patterns, lists."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from wara.data.walk import Walk
from wara.errors import WaraError


@dataclass
class Sources:
    """Images to predict.

    Args:
        paths: in the order in which they were named, folders sorted, none twice.
        notes: what was left out of folders.
        named: folders and lists that named them.
    """

    paths: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    named: list[Path] = field(default_factory=list)


def expand(words: Sequence[str]) -> Sources:
    """Return the images that words name.

    Args:
        words: files, folders (searched at any depth, the content decides what is an image),
            patterns such as `study/*.dcm`, or `@list.txt` with one path a line.

    Raises:
        WaraError: kind "usage" when nothing is named, when a word or a line of a list names no
            image, or a list cannot be read.
    """
    if not words:
        raise WaraError("usage", "no image was named", "", "give files, folders, or @list.txt")
    sources = Sources()
    found: dict[str, Path] = {}
    for word in words:
        for path in _listed(word, sources) if word.startswith("@") else _named(word, sources):
            found.setdefault(os.path.abspath(path), path)
    sources.paths = list(found.values())
    return sources


def _named(word: str, sources: Sources) -> list[Path]:
    """Return the images that a file, a folder or a pattern names, at least one."""
    if not word.strip():
        raise _nothing("an empty path", repr(word))
    if os.path.exists(word) or not glob.has_magic(word):
        return _images(Path(word), sources)
    matches = sorted(glob.glob(word, recursive=True))
    if not matches:
        raise _nothing("nothing matches the pattern", word)
    found = [path for match in matches for path in _images(Path(match), sources, least=0)]
    if not found:
        raise _nothing("no image in what the pattern matches", word)
    return found


def _images(path: Path, sources: Sources, least: int = 1) -> list[Path]:
    if not os.path.isdir(path):
        return [path]
    sources.named.append(path)
    walk = Walk()
    # What cannot be followed becomes a row with its error, as a file would.
    found = [*walk.images(path), *(Path(fault.where) for fault in walk.faults)]
    if len(found) < least:
        raise _nothing("no image in the folder", str(path), walk.sentence())
    if walk.left_out:
        sources.notes.append(f"{path}: {walk.sentence()}")
    return found


def _nothing(what: str, where: str, why: str = "") -> WaraError:
    what = f"{what} ({why})" if why else what
    return WaraError("usage", what, where, "correct it or leave it out")


def _listed(word: str, sources: Sources) -> list[Path]:
    """Return the images that a list names, each line at least one."""
    path = Path(word[1:])
    sources.named.append(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        what = f"cannot read the list: {error.strerror}"
        raise WaraError("usage", what, str(path), "check it") from None
    if b"\0" in data:
        what = "the list is no text of paths"
        raise WaraError("usage", what, str(path), "write one path a line, in UTF-8")
    # Names of files are bytes: those of an old share may be no UTF-8.
    text = os.fsdecode(data.removeprefix(b"\xef\xbb\xbf"))
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not lines:
        raise _nothing("no path in the list", str(path))
    for line in lines:
        if line.startswith("@"):
            raise WaraError("usage", "a list within a list", f"{path}: {line}", "name it apart")
    return [image for line in lines for image in _named(line, sources)]
