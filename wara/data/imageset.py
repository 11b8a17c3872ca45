"""A data set in hand: one record per image, and one way to read an image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from wara.cards import Card
from wara.data.facts import FactCache, ImageFacts, array_facts, file_facts, pairs_key, stamp_of
from wara.data.likeness import Pair, Signature, near_pairs
from wara.errors import WaraError
from wara.images import (
    Depth,
    ImageSpec,
    Opened,
    processors,
    read_bytes,
    read_image,
    resize,
)

# Resized images are kept in memory below this many bytes: about 13,000 images of 224 x 224.
MEMORY_LIMIT = 2_000_000_000

DEPTHS = (8, 10, 12, 14, 16)
"""Bits that the greys of a detector may have."""


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


@dataclass(frozen=True, slots=True)
class Loaded:
    """What one reading of an image gives.

    Args:
        array: resized, uint8 `[h, w, 3]`; None where that was not asked for, or not decided yet.
        facts: what else it tells.
        where: its path; empty for images without a file.
    """

    array: np.ndarray | None
    facts: ImageFacts
    where: str = ""


class Reader(Protocol):
    """Where pixels come from."""

    def read(self, index: int, bits: int | None, greys: str) -> np.ndarray:
        """Return image `index` as uint8 `[H, W, 3]`."""

    def load(
        self, index: int, spec: ImageSpec | None, bits: int | None = None, greys: str = "window",
        known: ImageFacts | None = None,
    ) -> Loaded:  # fmt: skip
        """Return image `index` as `spec` wants it; the disk is touched once.

        Without `spec` the image is only checked, as `bits` and `greys` show it; without bits
        16-bit files are not shown. Facts that are `known` are not looked for again where the
        content is the same.
        """


class FileReader:
    """Images in files, one each."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)

    def read(self, index: int, bits: int | None, greys: str) -> np.ndarray:
        """Return image `index` as uint8 `[H, W, 3]`."""
        return read_image(self.paths[index], bits, greys)

    def load(
        self, index: int, spec: ImageSpec | None, bits: int | None = None, greys: str = "window",
        known: ImageFacts | None = None,
    ) -> Loaded:  # fmt: skip
        """Return image `index` as `spec` wants it, and the facts of its file."""
        path = self.paths[index]
        data = read_bytes(path)
        opened = Opened(data, str(path))
        if spec is not None:
            bits, greys = spec.bits, spec.greys
        decided = opened.depth is None or bits is not None
        shown = opened.rgb(bits, greys) if decided else None
        array = None
        if spec is not None and shown is not None:
            array = resize(shown, spec.size, spec.interpolation)
        return Loaded(array, file_facts(data, opened, shown, known), str(path))


class ArrayReader:
    """Images in arrays: uint8 `[n, h, w]` or `[n, h, w, 3]`, one after the other."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self.arrays = list(arrays)
        self.ends = np.cumsum([len(array) for array in self.arrays])

    def _stored(self, index: int) -> np.ndarray:
        part = int(np.searchsorted(self.ends, index, side="right"))
        return self.arrays[part][index - int(self.ends[part])]

    def read(self, index: int, bits: int | None = None, greys: str = "") -> np.ndarray:
        """Return image `index` as uint8 `[H, W, 3]`."""
        stored = self._stored(index)
        return stored if stored.ndim == 3 else np.repeat(stored[:, :, None], 3, axis=2)

    def load(
        self, index: int, spec: ImageSpec | None, bits: int | None = None, greys: str = "window",
        known: ImageFacts | None = None,
    ) -> Loaded:  # fmt: skip
        """Return image `index` resized, and its facts."""
        array = None
        if spec is not None:
            array = resize(self.read(index), spec.size, spec.interpolation)
        return Loaded(array, array_facts(self._stored(index), known))


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
        columns: what a table says of each record beyond that: its cells, by the name of a column.
        folders: that hold the images, below which nothing else is to be written.
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
        columns: Mapping[str, Sequence[str]] | None = None,
        folders: Iterable[Path] = (),
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
        self.columns, self.folders = dict(columns or {}), tuple(folders)
        self.unreadable: tuple[WaraError, ...] | None = None
        self.bits: int | None = card.bits
        self.greys: str = card.greys
        self.windows: Counter[bool] = Counter()
        self.facts: dict[int, ImageFacts] = {}
        self._cache: FactCache | None = None
        self._near: list[Pair] | None = None
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
        if self.bits is None and self.unreadable is None and self._load(index, None).facts.depth:
            self.survey()  # how many bits the greys have is seen over the whole set
        return self.reader.read(index, self.bits, self.greys)

    def declare(self, bits: int | None, greys: str | None) -> None:
        """Say how pixels are read, in place of the card; None leaves it to the card."""
        self.bits, self.greys = bits or self.bits, greys or self.greys

    def spec(self, spec: ImageSpec) -> ImageSpec:
        """Return what a network expects, with what was decided for the pixels of this set."""
        return replace(spec, bits=self.bits, greys=self.greys)

    def fact_cache(self, folder: Path) -> FactCache | None:
        """Return the cache of what is found of the files; None where the images are no files.

        Args:
            folder: where caches lie.
        """
        if not isinstance(self.reader, FileReader):
            return None
        return FactCache(folder, self.origin, self.reader.paths, self.greys)

    def survey(
        self,
        spec: ImageSpec | None = None,
        *,
        cache: FactCache | None = None,
        known: bool = False,
    ) -> tuple[WaraError, ...]:
        """Read every image once: what cannot be read, all facts, and the images themselves.

        What the greys of 16-bit files have in common is found here, where the card does not say.

        Args:
            spec: when given, images are kept in memory as it wants them, if they all fit, so that
                they are decoded once for the check and for training.
            cache: keeps what is found, for the next check.
            known: take from there what is known of files that have not changed, and read the
                others only. Not for training, which must know the bytes that it learns from.

        Returns:
            One refusal per image that cannot be read; kept in `unreadable`.
        """
        if self.unreadable is None:
            keep = spec is not None and self.keep(spec)

            def attempt(index: int) -> WaraError | None:
                if cache is not None and known and self._recall(index, cache):
                    return None
                stamp = stamp_of(cache.names[index]) if cache is not None else None
                try:
                    facts = self._load(index, spec if keep else None).facts
                except WaraError as error:
                    if error.kind != "data":  # of the machine: no word on the image
                        raise
                    return error
                if cache is not None:
                    cache.add(index, stamp, facts)
                return None

            found = in_threads(attempt, range(len(self)))
            self.unreadable = tuple(fault for fault in found if isinstance(fault, WaraError))
            if cache is not None:
                cache.save()
            self._cache = cache
            facts = [self.facts[index] for index, fault in enumerate(found) if fault is None]
            self.windows = Counter(one.windowed for one in facts if one.windowed is not None)
            self._notes_on_pixels([one.depth for one in facts if one.depth is not None])
        return self.unreadable

    def _recall(self, index: int, cache: FactCache) -> bool:
        facts = cache.known(index)
        if facts is None:
            return False
        if facts.depth and self.bits and facts.depth.brightest >= 1 << self.bits:
            return False  # refused for the bits that are declared now, by whoever reads it
        self.facts[index] = facts
        return True

    def _notes_on_pixels(self, depths: Sequence[Depth]) -> None:
        notes = []
        if depths:
            how = "as declared"
            if self.bits is None:
                self.bits, how = common_bits(depths), "found over the whole set; `bits` declares it"
                usual = common_bits(sorted(depths, key=_brightest)[: -(-9 * len(depths) // 10)])
                if usual != self.bits:
                    how += f"; 9 in 10 of them would fit into {usual}"
            notes.append(f"{len(depths)} files of 16 bits: greys have {self.bits} bits ({how})")
        if self.windows:
            own, without = self.windows[True], self.windows[False]
            if self.greys != "window":
                how = f"{self.greys} range"
            elif not own:
                how = "stored range, for no file has a window"
            else:
                rest = f", {without} have none and show their stored range" if without else ""
                how = f"file's own window: {own} have one{rest}"
            notes.append(f"DICOM greys of {own + without} files by the {how}")
        self.notes = (*self.notes, *notes)

    def sha256(self, index: int) -> str | None:
        """Return the SHA-256 of the content of image `index`; None when it cannot be read."""
        if self.unreadable is None:
            self.survey()
        facts = self.facts.get(index)
        return facts.sha256 if facts is not None else None

    def signature(self, index: int) -> Signature | None:
        """Return what image `index` is known by again; None when it cannot be read or was drawn."""
        if self.unreadable is None:
            self.survey()
        facts = self.facts.get(index)
        return None if facts is None or self.synthetic else facts.signature

    def near_pairs(self) -> list[Pair]:
        """Return the near-duplicates of the set, see `likeness.near_pairs`; looked for once.

        Images that were drawn are not compared: what they have in common is their code.
        """
        if self._near is None:
            signatures = [self.signature(index) for index in range(len(self))]
            key = pairs_key(signatures)
            self._near = self._cache.pairs(key) if self._cache is not None else None
            if self._near is None:
                self._near = near_pairs(signatures)
                if self._cache is not None:
                    self._cache.keep_pairs(key, self._near)
        return self._near

    def keep(self, spec: ImageSpec) -> bool:
        """Keep images in memory, once resized, if all of them fit into `MEMORY_LIMIT`.

        Returns:
            Whether images are kept as `spec` wants them.
        """
        wanted = (spec.size, spec.interpolation)
        if self._kept_as == wanted:
            return self._kept is not None
        shape = (len(self.records), *spec.size, 3)
        fits = int(np.prod(shape, dtype=np.int64)) <= MEMORY_LIMIT
        # Memory is only taken when a row is first written.
        self._kept = np.empty(shape, np.uint8) if fits else None
        self._filled[:] = False
        self._kept_as = wanted
        return fits

    def array(self, index: int, spec: ImageSpec) -> np.ndarray:
        """Return image `index` as uint8 `[h, w, 3]`, from memory where `keep` allows it.

        The array may be shared: copy it before writing.

        Raises:
            WaraError: kind "data" when it cannot be read.
        """
        kept = self._kept_as == (spec.size, spec.interpolation) and self._filled[index]
        if kept and self._kept is not None:
            return self._kept[index]
        array = self._load(index, spec).array
        if array is None:  # how many bits the greys have is seen over the whole set
            self.survey()
            array = self._load(index, spec).array
        assert array is not None
        return array

    def _load(self, index: int, spec: ImageSpec | None) -> Loaded:
        if spec is not None:
            spec = replace(spec, bits=self.bits or spec.bits, greys=self.greys)
        known = self.facts.get(index)
        loaded = self.reader.load(index, spec, self.bits, self.greys, known)
        known = self.facts.setdefault(index, loaded.facts)
        if known.sha256 != loaded.facts.sha256:
            # Splits, duplicates and the hash of the data were found for what it was.
            raise WaraError(
                "data",
                "the image is not what it was when the data were checked",
                loaded.where or self.records[index].file,
                "let nothing write to the data while a run reads them, and start again",
            )
        keeps = spec is not None and self._kept_as == (spec.size, spec.interpolation)
        if loaded.array is not None and keeps and self._kept is not None:
            self._kept[index] = loaded.array
            self._filled[index] = True
        return loaded

    def fill(self, spec: ImageSpec, indices: Sequence[int]) -> None:
        """Read whatever of some images `keep` has not yet in memory, in threads.

        Raises:
            WaraError: kind "data" when an image cannot be read.
        """
        if self.keep(spec):
            missing = [index for index in indices if not self._filled[index]]
            in_threads(lambda index: self.array(index, spec), missing)


def common_bits(depths: Iterable[Depth]) -> int | None:
    """Return the bits of a data set: what its 16-bit files state, else what holds them all.

    Args:
        depths: of all 16-bit PNG and TIFF files of the set.

    Returns:
        What files state, or one of `DEPTHS`; none when there are no such files.
    """
    found = list(depths)
    if not found:
        return None
    brightest = max(depth.brightest for depth in found)
    stated = max(depth.declared or 0 for depth in found)
    if brightest < 1 << stated:
        return stated
    return next(bits for bits in DEPTHS if brightest < 1 << bits)


def _brightest(depth: Depth) -> int:
    return depth.brightest


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
