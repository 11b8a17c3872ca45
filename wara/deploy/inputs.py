"""From what a person names to the list of images: files, folders, patterns, lists."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from wara.data.walk import Walk
from wara.errors import WaraError


@dataclass(frozen=True)
class Sources:
    """Images to predict.

    Args:
        paths: in the order in which they were named, folders sorted, none twice.
        notes: what was left out of folders.
    """

    paths: list[Path]
    notes: list[str]


def expand(words: Sequence[str]) -> Sources:
    """Return the images that words name.

    Args:
        words: files, folders (searched at any depth, the content decides what is an image),
            patterns such as `study/*.dcm`, or `@list.txt` with one path a line.

    Raises:
        WaraError: kind "usage" when nothing is named or found, or a list cannot be read.
    """
    found: dict[Path, None] = {}
    notes: list[str] = []
    for path in _named(words):
        if path.is_dir():
            walk = Walk()
            found |= dict.fromkeys(walk.images(path))
            # What cannot be followed becomes a row with its error, as a file would.
            found |= dict.fromkeys(Path(fault.where) for fault in walk.faults)
            if walk.left_out:
                notes.append(f"{path}: {walk.sentence()}")
        else:
            found[path] = None
    if not found:
        what = "no images to predict" if words else "no image was named"
        raise WaraError("usage", what, " ".join(words), "give files, folders, or @list.txt")
    return Sources(list(found), notes)


def _named(words: Sequence[str]) -> Iterator[Path]:
    for word in words:
        if word.startswith("@"):
            yield from _named(_listed(Path(word[1:])))
        elif glob.has_magic(word) and not Path(word).exists():
            yield from map(Path, sorted(glob.glob(word, recursive=True)))
        else:
            yield Path(word)


def _listed(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise WaraError("usage", f"cannot read the list: {reason}", str(path), "check it") from None
    return [line.strip() for line in lines if line.strip() and not line.startswith("@")]
