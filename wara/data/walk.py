"""What lies in a folder of images: its images by content, and what is left out, counted by kind."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from wara.data.litter import is_viewer, made_by
from wara.dicom import is_dicom
from wara.errors import WaraError
from wara.images import EXTENSIONS
from wara.storage import open_regular

# Pictures and volumes that wara does not read. They are images of the set nevertheless: left out,
# they would be missing from it; so the gate refuses them, and says to convert them.
OTHER_IMAGES = (
    ".bmp", ".dib", ".gif", ".webp", ".jp2", ".j2k", ".jpx", ".jfif", ".jpe", ".heic", ".heif",
    ".avif", ".pgm", ".ppm", ".pnm", ".nii", ".nii.gz", ".nrrd", ".mha", ".mhd",
)  # fmt: skip
_ENDINGS = (*EXTENSIONS, *OTHER_IMAGES)
_SIGNATURES = (
    b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+",
    b"GIF87a", b"GIF89a", b"\0\0\0\x0cjP  \r\n\x87\n",
)  # fmt: skip
_DIRECTORY_CLASS = b"1.2.840.10008.1.3.10\0"
BESIDE = "images beside the class folders"


def says_image(name: str) -> bool:
    """Whether a file says by its ending that it is an image."""
    return name.lower().endswith(_ENDINGS)


def is_image(path: Path) -> bool:
    """Whether a file is an image by its first bytes, whatever it is called.

    Raises:
        OSError: when it cannot be read.
    """
    head = _head(path)
    # The directory of a disc is DICOM without pixels.
    return head.startswith(_SIGNATURES) or (is_dicom(head) and _DIRECTORY_CLASS not in head)


def _head(path: Path) -> bytes:
    with open_regular(path) as stream:
        return stream.read(512)


Leaves = Callable[[Path, str], tuple[str, str] | None]


class Walk:
    """A look through folders of images that counts what it leaves out.

    Links to folders, links to nothing, pipes and devices below a class are neither followed nor
    passed over: they are in `faults`. So are links that lead out of the data set, where it has an
    end.

    Args:
        leaves: what is wrong (what, remedy) with a path, called by a name, that leads out of the
            data set; None where a link may lead anywhere.
    """

    def __init__(self, leaves: Leaves | None = None) -> None:
        self._leaves = leaves
        self.left_out: Counter[str] = Counter()
        self.faults: list[WaraError] = []
        self.tables: list[Path] = []

    def folders(self, folder: Path) -> list[Path]:
        """Return the folders right below one, sorted; the files beside them are left out.

        A class or a split may be a link to a folder, unless it leads out of the data set, back to
        a folder that it lies in, or to one that was found already.
        """
        found = []
        for entry in self._entries(folder):
            path = Path(entry.path)
            if _leads_to(entry, folder=True):
                if self._may_follow(entry):
                    found.append(path)
            elif self._is_file(entry):
                if says_image(entry.name) or self._is_image(path):
                    self.left_out[BESIDE] += 1
                else:
                    self._leave(entry.name)
                    self.tables += [path] if _is_table(entry.name) else []
        return sorted(found)

    def images(self, folder: Path) -> list[Path]:
        """Return the images at any depth below a folder, sorted."""
        return sorted(self._below(folder, viewer=False))

    def _below(self, folder: Path, *, viewer: bool) -> Iterator[Path]:
        for entry in self._entries(folder):
            path = Path(entry.path)
            if entry.is_dir(follow_symlinks=False):
                yield from self._below(path, viewer=viewer or is_viewer(entry.name))
            elif _leads_to(entry, folder=True):
                self._fault(path, "a link to a folder", "put the folder itself there, or remove it")
            elif not self._is_file(entry) or (entry.is_symlink() and self._is_outside(path)):
                continue
            elif viewer and not self._holds_dicom(path):
                self.left_out["of the viewer of a PACS export"] += 1
            elif says_image(entry.name) or self._is_image(path):
                yield path
            else:
                self._leave(entry.name)

    def _entries(self, folder: Path) -> list[os.DirEntry[str]]:
        """Return what a folder holds but for what machines left there, which is counted."""
        try:
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            self._fault(folder, f"cannot look into the folder: {error.strerror}", "check it")
            return []
        kept = []
        for entry in entries:
            is_folder = entry.is_dir(follow_symlinks=False)
            if entry.name.startswith(".") and entry.name.endswith(".icloud"):
                what = "a file that iCloud keeps elsewhere"
                self._fault(Path(entry.path), what, "download it, or remove it")
                continue
            maker = made_by(entry.name, folder=is_folder)
            if maker is None:
                kept.append(entry)
            else:
                count = sum(len(files) for *_, files in os.walk(entry.path)) if is_folder else 1
                self.left_out[maker] += count
        return kept

    def _may_follow(self, entry: os.DirEntry[str]) -> bool:
        path = Path(entry.path)
        if not entry.is_symlink():
            return True
        if self._is_outside(path):
            return False
        above = os.path.realpath(path.parent)
        if Path(above).is_relative_to(os.path.realpath(path)):
            self._fault(path, "a link to a folder that it lies in", "remove it")
            return False
        return True

    def _is_outside(self, path: Path) -> bool:
        problem = self._leaves(path, path.name) if self._leaves else None
        if problem is not None:
            self._fault(path, *problem)
        return problem is not None

    def _is_file(self, entry: os.DirEntry[str]) -> bool:
        if _leads_to(entry, folder=False):
            return True
        link = entry.is_symlink() and not os.path.exists(entry.path)
        what = "a link to nothing" if link else "neither a file nor a folder"
        self._fault(Path(entry.path), what, "mend it or remove it")
        return False

    def _is_image(self, path: Path) -> bool:
        try:
            return is_image(path)
        except OSError as error:
            # What it is nobody can say, so it is not left out.
            self._fault(path, f"cannot read: {error.strerror}", "check the file")
            return False

    def _holds_dicom(self, path: Path) -> bool:
        return self._is_image(path) and is_dicom(_head(path))

    def _leave(self, name: str) -> None:
        ending = Path(name).suffix.lower()
        # The last number of a UID is no ending.
        self.left_out["without ending" if ending[1:].isdecimal() or not ending else ending] += 1

    def _fault(self, path: Path, what: str, remedy: str) -> None:
        self.faults.append(WaraError("data", what, str(path), remedy))

    def sentence(self) -> str:
        """Return what was left out, as `left out: 20 of Synology (@eaDir), 1 .txt`; else nothing.

        What holds images comes first.
        """
        order = sorted(self.left_out.items(), key=lambda item: (item[0].startswith("."), item))
        listed = ", ".join(f"{count} {kind}" for kind, count in order if count)
        return f"left out: {listed}" if listed else ""


def _leads_to(entry: os.DirEntry[str], *, folder: bool) -> bool:
    try:
        return entry.is_dir() if folder else entry.is_file()
    except OSError:  # a link that leads back to itself
        return False


def _is_table(name: str) -> bool:
    return name.lower().endswith((".csv", ".tsv", ".xlsx", ".xls", ".parquet"))
