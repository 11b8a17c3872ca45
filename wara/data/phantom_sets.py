"""Collections of phantoms: drawn by several processes, kept in the cache, split by their card."""

from __future__ import annotations

import contextlib
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from wara.cards import Card, PhantomSource
from wara.data.imageset import ArrayReader, ImageSet, Record
from wara.data.splits import SPLITS, connected_groups, stratify
from wara.data.workers import worker_options
from wara.errors import WaraError
from wara.images import processors
from wara.storage import code_sha256, replacing

_FEW = 200  # below this, starting processes takes longer than they save


def open_phantoms(
    card: Card, source: PhantomSource, *, seed: int, images: int | None, size: int, cache: Path
) -> ImageSet:
    """Draw the images of a phantom card, or take them from the cache where they lie already.

    Args:
        card: a phantom card.
        source: its source.
        seed: of the collection; the same images for the same seed.
        images: how many in total; None for what the card says.
        size: side in pixels.
        cache: folder of fetched data.

    Raises:
        WaraError: kind "config" when the card's classes are not the ones that are drawn.
    """
    from wara import phantoms  # OpenCV, which real data does not need

    if card.modality is None:
        raise WaraError("config", "a phantom card without modality", card.name, "name the modality")
    drawn = list(phantoms.classes(card.modality))
    if drawn != card.class_names:
        raise WaraError(
            "config",
            f"classes of {card.modality} phantoms are {', '.join(drawn)}",
            card.name,
            "give the card these classes, in this order",
        )
    total = source.images if images is None else images
    stack, labels, patients = _collection(card.modality, total, seed, size, cache / "phantoms")
    shares = (
        1 - source.val_fraction - source.test_fraction,
        source.val_fraction,
        source.test_fraction,
    )
    parts = stratify(labels, connected_groups(patients), shares, seed)
    records = [
        Record(f"{card.name}_s{seed}_{index:06d}", int(label), patient, SPLITS[part])
        for index, (label, patient, part) in enumerate(zip(labels, patients, parts, strict=True))
    ]
    return ImageSet(
        card,
        records,
        ArrayReader([stack]),
        synthetic=True,
        origin=f"{total} images drawn by wara.phantoms, seed {seed}, {size} px",
    )


class _Drawings(Dataset):
    def __init__(self, modality: str, total: int, seed: int, size: int) -> None:
        self.modality, self.total, self.seed, self.size = modality, total, seed, size

    def __getitem__(self, index: int) -> tuple[np.ndarray, int, str]:
        from wara import phantoms

        phantom = phantoms.draw(self.modality, self.seed, index, self.size)
        return phantom.image, phantom.label, phantom.patient

    def __len__(self) -> int:
        return self.total


def _as_is(item: Any) -> Any:
    return item


def _collection(
    modality: str, total: int, seed: int, size: int, folder: Path
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    path = folder / f"{modality}_s{seed}_{size}px_{total}_{_fingerprint()}.npz"
    try:
        with np.load(path, allow_pickle=False) as kept:
            return kept["images"], kept["labels"], kept["patients"].tolist()
    except (OSError, ValueError, EOFError, KeyError, zlib.error, zipfile.BadZipFile):
        pass  # not there or damaged: drawn, and written anew, below

    loader = DataLoader(
        _Drawings(modality, total, seed, size),
        batch_size=None,
        collate_fn=_as_is,
        generator=torch.Generator().manual_seed(0),  # leaves the global one alone
        **worker_options(0 if total < _FEW else min(8, processors())),
    )
    images, labels, patients = zip(*loader, strict=True)
    stack, numbers = np.stack(images), np.array(labels, np.int64)
    _keep(path, images=stack, labels=numbers, patients=np.array(patients))
    return stack, numbers, list(patients)


def _keep(path: Path, **arrays: np.ndarray) -> None:
    # A cache that cannot be written costs seconds, not results.
    with contextlib.suppress(WaraError), replacing(path) as partial, partial.open("wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]


def _fingerprint() -> str:
    """Hash of everything that decides a pixel: the code that draws, and what it draws with."""
    from wara import phantoms

    sources = sorted(Path(phantoms.__file__).parent.glob("*.py"))
    return code_sha256(sources, ("numpy", "opencv-python-headless"))[:12]
