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
from wara.images import ImageSpec, load_array, read_bytes, read_image, resize

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

    def read(self, index: int) -> np.ndarray:
        """Return image `index` as uint8 `[H, W, 3]`."""

    def load(self, index: int, spec: ImageSpec | None) -> tuple[np.ndarray | None, str]:
        """Return image `index` resized, uint8 `[h, w, 3]`, and the SHA-256 of its content.

        The disk is touched once. Without `spec` the image is only checked.
        """


class FileReader:
    """Images in files, one each."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)

    def read(self, index: int) -> np.ndarray:
        """Return image `index` as uint8 `[H, W, 3]`."""
        return read_image(self.paths[index])

    def load(self, index: int, spec: ImageSpec | None) -> tuple[np.ndarray | None, str]:
        """Return image `index` resized, and the SHA-256 of its file."""
        path = self.paths[index]
        data = read_bytes(path)
        digest = hashlib.sha256(data).hexdigest()
        try:
            return (read_image(data) if spec is None else load_array(data, spec)), digest
        except WaraError as error:
            raise WaraError(error.kind, error.what, str(path), error.remedy) from error


class ArrayReader:
    """Images in arrays: uint8 `[n, h, w]` or `[n, h, w, 3]`, one after the other."""

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

    def load(self, index: int, spec: ImageSpec | None) -> tuple[np.ndarray | None, str]:
        """Return image `index` resized, and the SHA-256 of its shape and pixels."""
        stored = np.ascontiguousarray(self._stored(index))
        digest = hashlib.sha256(repr(stored.shape).encode())
        digest.update(stored.tobytes())
        array = None
        if spec is not None:
            array = resize(self.read(index), spec.size, spec.interpolation)
        return array, digest.hexdigest()


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
        left_out: what lies there and was not taken, one sentence; a note, and the last line of
            what the gate refuses.
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
        left_out: str = "",
    ) -> None:
        self.card = card
        self.records = tuple(records)
        self.reader = reader
        self.synthetic = synthetic
        self.origin = origin
        self.substituted_for = substituted_for
        self.notes = (*notes, left_out) if left_out else tuple(notes)
        self.left_out = left_out
        self.faults = tuple(faults)
        self.unreadable: tuple[WaraError, ...] | None = None
        self._hashes: dict[int, str] = {}
        self._kept: np.ndarray | None = None
        self._filled = np.zeros(len(self.records), bool)
        self._kept_as: ImageSpec | None = None

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

    def survey(self, spec: ImageSpec | None = None) -> tuple[WaraError, ...]:
        """Read every image once: what cannot be read, all hashes, and the images themselves.

        Args:
            spec: when given, images are kept in memory as it wants them, if they all fit, so that
                they are decoded once for the check and for training.

        Returns:
            One refusal per image that cannot be read; kept in `unreadable`.
        """
        if self.unreadable is None:
            keep = spec is not None and self.keep(spec)

            def attempt(index: int) -> WaraError | None:
                try:
                    self._load(index, spec if keep else None)
                except WaraError as error:
                    return error
                return None

            found = in_threads(attempt, range(len(self)))
            self.unreadable = tuple(fault for fault in found if isinstance(fault, WaraError))
        return self.unreadable

    def sha256(self, index: int) -> str | None:
        """Return the SHA-256 of the content of image `index`; None when it cannot be read."""
        if self.unreadable is None:
            self.survey()
        return self._hashes.get(index)

    def keep(self, spec: ImageSpec) -> bool:
        """Keep images in memory, once resized, if all of them fit into `MEMORY_LIMIT`.

        Returns:
            Whether images are kept as `spec` wants them.
        """
        if self._kept_as == spec:
            return self._kept is not None
        shape = (len(self.records), *spec.size, 3)
        fits = int(np.prod(shape, dtype=np.int64)) <= MEMORY_LIMIT
        # Memory is only taken when a row is first written.
        self._kept = np.empty(shape, np.uint8) if fits else None
        self._filled[:] = False
        self._kept_as = spec
        return fits

    def array(self, index: int, spec: ImageSpec) -> np.ndarray:
        """Return image `index` as uint8 `[h, w, 3]`, from memory where `keep` allows it.

        The array may be shared: copy it before writing.

        Raises:
            WaraError: kind "data" when it cannot be read.
        """
        if self._kept is not None and self._kept_as == spec and self._filled[index]:
            return self._kept[index]
        array = self._load(index, spec)
        assert array is not None
        return array

    def _load(self, index: int, spec: ImageSpec | None) -> np.ndarray | None:
        array, self._hashes[index] = self.reader.load(index, spec)
        if array is not None and self._kept is not None and self._kept_as == spec:
            self._kept[index] = array
            self._filled[index] = True
        return array

    def fill(self, spec: ImageSpec) -> None:
        """Read whatever `keep` has not yet in memory, in threads.

        Raises:
            WaraError: kind "data" when an image cannot be read.
        """
        if self.keep(spec):
            missing = np.flatnonzero(~self._filled).tolist()
            in_threads(lambda index: self.array(index, spec), missing)


def left_out_line(left_out: str, origin: str) -> WaraError | None:
    """Return what a refusal ends with where files were left out; None where none were.

    Args:
        left_out: the sentence that says so, or nothing.
        origin: where they lie.
    """
    if not left_out:
        return None
    return WaraError("data", left_out, origin, "no fault, unless your images are among them")


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
