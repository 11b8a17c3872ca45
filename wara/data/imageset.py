"""A data set in hand: one record per image, and one way to read an image."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from wara.cards import Card
from wara.errors import WaraError
from wara.images import read_bytes, read_image, resize

# Resized images are kept in memory below this many bytes: about 13,000 images of 224 x 224.
MEMORY_LIMIT = 2_000_000_000


@dataclass(frozen=True, slots=True)
class Record:
    """One image of a data set.

    Args:
        file: path relative to the data set, or a name for images without a file.
        label: class index, or one 0/1 per class for multilabel tasks.
        patient: who the image shows; None when not known.
        split: "train", "val" or "test" when the source says so, else None.
    """

    file: str
    label: int | tuple[int, ...]
    patient: str | None = None
    split: str | None = None


class Reader(Protocol):
    """Where pixels come from."""

    # Whether images are arrays already, so that reading one cannot fail.
    decoded: bool

    def read(self, index: int) -> np.ndarray:
        """Return image `index` as uint8 `[H, W, 3]`."""

    def read_and_hash(self, index: int) -> tuple[np.ndarray, str]:
        """Return image `index` and the SHA-256 of its content, touching the disk once."""

    def sha256(self, index: int) -> str:
        """Return the SHA-256 of the content of image `index`."""


class FileReader:
    """Images in files, one each."""

    decoded = False

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)

    def read(self, index: int) -> np.ndarray:
        """Return image `index` as uint8 `[H, W, 3]`."""
        return read_image(self.paths[index])

    def read_and_hash(self, index: int) -> tuple[np.ndarray, str]:
        """Return image `index` and the SHA-256 of its file."""
        path = self.paths[index]
        data = read_bytes(path)
        try:
            return read_image(data), hashlib.sha256(data).hexdigest()
        except WaraError as error:
            raise WaraError(error.kind, error.what, str(path), error.remedy) from error

    def sha256(self, index: int) -> str:
        """Return the SHA-256 of the file of image `index`."""
        return hashlib.sha256(read_bytes(self.paths[index])).hexdigest()


class ArrayReader:
    """Images in arrays: uint8 `[n, h, w]` or `[n, h, w, 3]`, one after the other."""

    decoded = True

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self.arrays = list(arrays)
        self.ends = np.cumsum([len(array) for array in self.arrays])

    def _stored(self, index: int) -> np.ndarray:
        part = int(np.searchsorted(self.ends, index, side="right"))
        return self.arrays[part][index - int(self.ends[part])]

    def read(self, index: int) -> np.ndarray:
        """Return image `index` as uint8 `[H, W, 3]`."""
        stored = self._stored(index)
        return stored if stored.ndim == 3 else np.repeat(stored[:, :, None], 3, axis=2)

    def read_and_hash(self, index: int) -> tuple[np.ndarray, str]:
        """Return image `index` and the SHA-256 of its shape and pixels."""
        return self.read(index), self.sha256(index)

    def sha256(self, index: int) -> str:
        """Return the SHA-256 of shape and pixels of image `index`."""
        stored = np.ascontiguousarray(self._stored(index))
        digest = hashlib.sha256(repr(stored.shape).encode())
        digest.update(stored.tobytes())
        return digest.hexdigest()


class ImageSet:
    """Images, labels and what is known about them.

    Args:
        card: what the data set is.
        records: one per image.
        reader: reads an image by its index in `records`.
        synthetic: whether the images were drawn, not taken.
        origin: where the images came from, for the plan and the provenance.
        substituted_for: name of the data set that phantoms stand in for, else None.
        notes: remarks for the plan.
        faults: what is wrong with entries that could not become records; `gate.check` reports
            them with everything else.
    """

    def __init__(
        self,
        card: Card,
        records: Sequence[Record],
        reader: Reader,
        *,
        synthetic: bool = False,
        origin: str = "",
        substituted_for: str | None = None,
        notes: Sequence[str] = (),
        faults: Sequence[WaraError] = (),
    ) -> None:
        self.card = card
        self.records = tuple(records)
        self.reader = reader
        self.synthetic = synthetic
        self.origin = origin
        self.substituted_for = substituted_for
        self.notes = tuple(notes)
        self.faults = tuple(faults)
        self._hashes: dict[int, str] = {}
        self._kept: np.ndarray | None = None
        self._filled = np.zeros(len(self.records), bool)
        self._kept_as: tuple[tuple[int, int], str] | None = None

    def __len__(self) -> int:
        return len(self.records)

    @property
    def labels(self) -> np.ndarray:
        """Labels of all records: int64 `[n]`, or 0/1 int64 `[n, c]` for multilabel tasks."""
        if self.card.task == "multilabel":
            shape = (len(self.records), len(self.card.classes))
            return np.array([record.label for record in self.records], np.int64).reshape(shape)
        return np.array([record.label for record in self.records], np.int64)

    def read(self, index: int) -> np.ndarray:
        """Return image `index` as uint8 `[H, W, 3]`, at its own size.

        Raises:
            WaraError: kind "data" when it cannot be read.
        """
        return self.reader.read(index)

    def sha256(self, index: int) -> str:
        """Return the SHA-256 of the content of image `index`, computed once.

        Raises:
            WaraError: kind "data" when it cannot be read.
        """
        if index not in self._hashes:
            self._hashes[index] = self.reader.sha256(index)
        return self._hashes[index]

    def keep(self, size: tuple[int, int], interpolation: str) -> bool:
        """Keep images in memory, once resized, if all of them fit into `MEMORY_LIMIT`.

        Args:
            size: `(h, w)` in pixels.
            interpolation: as in `wara.images.resize`.

        Returns:
            Whether images of that size are kept.
        """
        if self._kept_as == (size, interpolation):
            return self._kept is not None
        shape = (len(self.records), *size, 3)
        fits = int(np.prod(shape, dtype=np.int64)) <= MEMORY_LIMIT
        # Memory is only taken when a row is first written.
        self._kept = np.empty(shape, np.uint8) if fits else None
        self._filled[:] = False
        self._kept_as = (size, interpolation)
        return fits

    def resized(self, index: int, size: tuple[int, int], interpolation: str) -> np.ndarray:
        """Return image `index` as uint8 `[h, w, 3]`, from memory where `keep` allows it.

        The array may be shared: copy it before writing.

        Raises:
            WaraError: kind "data" when it cannot be read.
        """
        return self._resized(index, size, interpolation, self.reader.read)

    def verify(self, index: int, size: tuple[int, int] | None, interpolation: str) -> None:
        """Decode image `index` and hash it; keep it resized if `size` is given and `keep` allows.

        Raises:
            WaraError: kind "data" when it cannot be read.
        """

        def read(index: int) -> np.ndarray:
            array, self._hashes[index] = self.reader.read_and_hash(index)
            return array

        if size is None:
            read(index)
        else:
            self._resized(index, size, interpolation, read)

    def _resized(
        self,
        index: int,
        size: tuple[int, int],
        interpolation: str,
        read: Callable[[int], np.ndarray],
    ) -> np.ndarray:
        kept = self._kept if self._kept_as == (size, interpolation) else None
        if kept is not None and self._filled[index]:
            return kept[index]
        array = resize(read(index), size, interpolation)
        if kept is not None:
            kept[index] = array
            self._filled[index] = True
        return array

    def fill(self, size: tuple[int, int], interpolation: str) -> None:
        """Read whatever `keep` has not yet in memory, in threads.

        Raises:
            WaraError: kind "data" when an image cannot be read.
        """
        if not self.keep(size, interpolation):
            return
        missing = np.flatnonzero(~self._filled).tolist()
        in_threads(lambda index: self.resized(index, size, interpolation), missing)


def in_threads(work: Callable[[int], object], indices: Sequence[int]) -> list[object]:
    """Return `work(index)` for each index, in order; reading and decoding release the GIL."""
    if len(indices) < 2:
        return [work(index) for index in indices]
    with ThreadPoolExecutor(min(16, processors())) as pool:
        return list(pool.map(work, indices))


def processors() -> int:
    """Number of processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
