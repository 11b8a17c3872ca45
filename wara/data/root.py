"""The folder that images of a data set must lie in, and what comes of a link that leaves it.

A table or a link can name any file of the machine. Whoever made it need not be who runs it, so
images are looked for where the data set lies, and elsewhere only if the config says so.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from wara.data.words import nfc
from wara.errors import WaraError

REMEDY = "put it there, or name a folder above both as data.root (--root of a command)"


class Root:
    """Folders whose files a data set may name, all links followed to where they lead.

    Args:
        own: folders of the data set itself: that of the table, and the one that its card names.
        wider: what `data.root` says; None without.

    Raises:
        WaraError: kind "config" when `wider` is no folder.
    """

    def __init__(self, own: Sequence[Path], wider: str | Path | None = None) -> None:
        self._own = [Path(os.path.realpath(folder)) for folder in own]
        self._wider: Path | None = None
        self._parents: dict[Path, str] = {}
        if wider is not None:
            given = Path(wider).expanduser()
            if not given.is_dir():
                raise WaraError("config", "no such folder", f"data.root={given}", "correct it")
            self._wider = Path(os.path.realpath(given))
        self._outside: set[str] = set()

    def real(self, path: Path) -> str:
        """Return where a path leads in the end; the folder of each is looked up once."""
        if path.name in ("", ".."):
            return os.path.realpath(path)
        parent = self._parents.get(path.parent)
        if parent is None:
            parent = self._parents[path.parent] = os.path.realpath(path.parent)
        whole = os.path.join(parent, path.name)
        return os.path.realpath(whole) if os.path.islink(whole) else whole

    def holds(self, path: Path) -> bool:
        """Whether a path leads to a place below one of the folders."""
        real = Path(self.real(path))
        if any(real.is_relative_to(folder) for folder in self._own):
            return True
        if self._wider is None or not real.is_relative_to(self._wider):
            return False
        self._outside.add(str(real))
        return True

    def problem(self, path: Path, name: str) -> tuple[str, str] | None:
        """Return (what, remedy) for a path that leads out; None for one that does not.

        Args:
            path: the image or the folder.
            name: what it is called by.
        """
        if self.holds(path):
            return None
        folder = self._wider or self._own[-1]
        return f"'{name}' leads out of {folder}", REMEDY

    def notes(self) -> list[str]:
        """Return the note on what lies elsewhere; none where nothing does."""
        if not self._outside:
            return []
        what = "names lead out of the data set, to places below"
        return [f"{len(self._outside)} {what} {self._wider} (data.root)"]


def find_folder(base: Path, name: str, known: dict[Path, Path]) -> Path:
    """Return the folder of a named file, whose own folders may be in another form of Unicode.

    Args:
        base: what a relative name starts from.
        name: of the file.
        known: folders that were looked for before; grows.
    """
    whole = (base / name).parent
    if name.isascii() or whole in known:
        return known.get(whole, whole)
    place = base
    for part in Path(name).parts[:-1]:
        further = place / part
        if not part.isascii() and not further.is_dir() and place.is_dir():
            same = [e for e in os.scandir(place) if nfc(e.name) == nfc(part) and e.is_dir()]
            further = Path(same[0].path) if len(same) == 1 else further
        place = further
    known[whole] = place
    return place
