"""What one reading of an image tells besides its pixels, and where that is kept between checks."""

from __future__ import annotations

import hashlib
import io
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from pydantic import TypeAdapter, ValidationError

import wara
from wara.data.likeness import Pair, Signature, sign
from wara.dicom import DicomPicture
from wara.errors import WaraError
from wara.images import DECODING, Depth, Opened
from wara.pictures import FORMATS
from wara.storage import code_sha256, write_bytes

Stamp = tuple[int, int, int]
"""Size of a file in bytes, and when its content and its entry changed, in nanoseconds."""

SETTLED = 2.0
"""Seconds since the last change after which a second one shows in the stamp: file systems count
time in steps, FAT and some network shares in steps of two seconds."""


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What is known of one image without keeping it; whatever is added here is cached with it.

    Args:
        sha256: of its content.
        container: `PNG`, `JPEG`, `TIFF` or `DICOM`; `array` where there is no file.
        mode: Pillow's word for how the file holds its pixels, or DICOM's photometric
            interpretation.
        height: of the upright picture, pixels.
        width: likewise.
        bits: that the file has for a number.
        depth: of a 16-bit PNG or TIFF file.
        windowed: whether a grey DICOM object says how it is shown.
        mean: of its greys, 0..255; of a 16-bit file the number as stored, 0..65535.
        std: their standard deviation, likewise.
        signature: what the picture is known by again.
        inverted: whether 0 is white in such a 16-bit file.
    """

    sha256: str
    container: str
    mode: str
    height: int
    width: int
    bits: int
    depth: Depth | None
    windowed: bool | None
    mean: float
    std: float
    signature: Signature
    inverted: bool = False

    def greys(self, bits: int | None) -> tuple[float, float] | None:
        """Return mean and standard deviation of the greys as they are shown, 0..255.

        Args:
            bits: from black to white in the 16-bit files of the set; None where not decided.
        """
        if self.depth is None:
            return self.mean, self.std
        if bits is None:
            return None
        scale = 255 / ((1 << bits) - 1)
        mean = self.mean * scale
        return 255 - mean if self.inverted else mean, self.std * scale


def file_facts(
    data: bytes, opened: Opened, shown: np.ndarray | None, known: ImageFacts | None = None
) -> ImageFacts:
    """Return the facts of a file.

    Args:
        data: the file.
        opened: the same, decoded.
        shown: as a picture, uint8 `[H, W, 3]`; None where its 16 bits are not decided yet.
        known: facts from an earlier reading, which hold where the content is the same.
    """
    sha256 = hashlib.sha256(data).hexdigest()
    if known is not None and known.sha256 == sha256:
        return known
    picture, inverted = opened.picture, False
    if isinstance(picture, DicomPicture):
        container, mode, bits = "DICOM", picture.photometric, picture.bits
    else:
        with Image.open(io.BytesIO(data), formats=FORMATS) as head:  # its header only
            # Photographs of some cameras are a JPEG that another one follows.
            container = "JPEG" if head.format == "MPO" else str(head.format)
            mode = head.mode
        bits = {"1": 1, "F": 32}.get(mode, 8 if picture.depth is None else 16)
        inverted = picture.inverted
    if opened.depth is not None:
        assert not isinstance(picture, DicomPicture)
        # As they are stored: what is kept must not depend on bits that are declared later.
        pixels = picture.pixels
        mean, std = _stored_statistics(pixels)
    else:
        assert shown is not None
        pixels = shown
        mean, std = grey_statistics(shown)
    return ImageFacts(
        sha256=sha256, container=container, mode=mode, height=pixels.shape[0],
        width=pixels.shape[1], bits=bits, depth=opened.depth, windowed=opened.windowed, mean=mean,
        std=std, signature=sign(pixels, inverted=inverted), inverted=inverted,
    )  # fmt: skip


def array_facts(stored: np.ndarray, known: ImageFacts | None = None) -> ImageFacts:
    """Return the facts of an image in an array.

    The hash is that of shape and pixels.

    Args:
        stored: uint8 `[h, w]` or `[h, w, 3]`.
        known: facts from an earlier reading, which hold where the content is the same.
    """
    stored = np.ascontiguousarray(stored)
    digest = hashlib.sha256(repr(stored.shape).encode())
    digest.update(stored.tobytes())
    sha256 = digest.hexdigest()
    if known is not None and known.sha256 == sha256:
        return known
    mean, std = grey_statistics(stored)
    return ImageFacts(
        sha256=sha256, container="array", mode="L" if stored.ndim == 2 else "RGB",
        height=stored.shape[0], width=stored.shape[1], bits=8, depth=None, windowed=None,
        mean=mean, std=std, signature=sign(stored),
    )  # fmt: skip


def grey_statistics(pixels: np.ndarray) -> tuple[float, float]:
    """Return mean and standard deviation of the greys (ITU-R 601 luma) of a picture.

    Args:
        pixels: uint8 `[h, w]` or `[h, w, 3]`.
    """
    grey = Image.fromarray(pixels).convert("L")
    return _of_counts(np.array(grey.histogram(), np.float64))


def _stored_statistics(pixels: np.ndarray) -> tuple[float, float]:
    if pixels.ndim == 3:
        pixels = np.rint(pixels.astype(np.float64) @ (0.299, 0.587, 0.114)).astype(np.int64)
    return _of_counts(np.bincount(pixels.ravel()).astype(np.float64))


def _of_counts(counts: np.ndarray) -> tuple[float, float]:
    values, total = np.arange(len(counts)), counts.sum()
    mean = float(counts @ values / total)
    return mean, float(np.sqrt(counts @ (values - mean) ** 2 / total))


@dataclass(frozen=True)
class _Content:
    code: str
    files: dict[str, tuple[Stamp, ImageFacts]]
    pairs_of: str = ""
    pairs: list[Pair] = field(default_factory=list)


_CONTENT = TypeAdapter(_Content)


class FactCache:
    """What was found of files, for the next check of the same data set.

    Nothing is held to be true of a file that has another size or was changed since, and of
    none that changed within `SETTLED` seconds of being read. A cache that is damaged, or of other
    code, counts as none; one that cannot be written costs time and nothing else.

    Args:
        folder: where caches lie.
        origin: what data set it is.
        paths: its files.
        greys: how DICOM greys are shown.
    """

    def __init__(self, folder: Path, origin: str, paths: Sequence[Path], greys: str) -> None:
        self.names = [os.path.abspath(path) for path in paths]
        base = os.path.commonpath(self.names) if self.names else ""
        key = hashlib.sha256(os.fsencode("\0".join((origin, base, greys)))).hexdigest()
        self.path = folder / f"{key[:24]}.json"
        self._before = self._read()
        self._found: dict[str, tuple[Stamp, ImageFacts]] = {}
        self._pairs = self._before.pairs_of, self._before.pairs
        self._started = time.time()

    def known(self, index: int) -> ImageFacts | None:
        """Return what was found of a file that has not changed since; else None."""
        name = self.names[index]
        kept = self._before.files.get(name)
        if kept is None or kept[0] != stamp_of(name):
            return None
        self._found[name] = kept
        return kept[1]

    def add(self, index: int, before: Stamp | None, facts: ImageFacts) -> None:
        """Keep what was found of a file.

        Args:
            index: of the file.
            before: its stamp before it was read.
            facts: what was found.
        """
        name = self.names[index]
        if before is None or stamp_of(name) != before:
            return
        if max(before[1:]) / 1e9 > time.time() - SETTLED:
            return  # another change within the same step of the clock would not show
        self._found[name] = before, facts

    def pairs(self, key: str) -> list[Pair] | None:
        """Return the near-duplicates among pictures; None where these are not the ones kept.

        Args:
            key: see `pairs_key`.
        """
        return self._pairs[1] if self._pairs[0] == key else None

    def keep_pairs(self, key: str, pairs: list[Pair]) -> None:
        """Keep and write the near-duplicates of a set, in place of those of an earlier state.

        Args:
            key: see `pairs_key`.
            pairs: of it.
        """
        self._pairs = key, pairs
        self.save()

    def save(self) -> None:
        """Write what is known now, of the files of this set only, in one step."""
        content = _Content(_code(), self._found, *self._pairs)
        if content == self._before:
            return
        try:
            body = _CONTENT.dump_json(content)
            write_bytes(self.path, hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
        except (WaraError, ValueError):
            # No place to write, or a name that is no UTF-8: the next check reads the files again.
            return
        self._before = _Content(content.code, dict(content.files), *self._pairs)

    def _read(self) -> _Content:
        none = _Content(_code(), {})
        try:
            digest, _, body = self.path.read_bytes().partition(b"\n")
            if hashlib.sha256(body).hexdigest().encode() != digest:
                return none
            content = _CONTENT.validate_json(body)
        except (OSError, ValidationError):
            return none
        return content if content.code == none.code else none


def pairs_key(signatures: Sequence[Signature | None]) -> str:
    """Return what the near-duplicates of a set are known by: the SHA-256 of all its signatures.

    Args:
        signatures: of all records, in their order; None where a picture could not be read.
    """
    digest = hashlib.sha256()
    for own in signatures:
        digest.update(b"-" if own is None else own.pixels.encode() + own.thumbnail)
        digest.update(b"\n")
    return digest.hexdigest()


def stamp_of(path: str | Path) -> Stamp | None:
    """Return what changes with a file; None when it is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _code() -> str:
    """Hash of the code that finds the facts, and of what decodes for it."""
    package = Path(wara.__file__).parent
    sources = [package / name for name in (*DECODING, "images.py")]
    sources += [Path(__file__), Path(__file__).with_name("likeness.py")]
    return code_sha256(sources, ("numpy", "pillow", "pydicom"))
