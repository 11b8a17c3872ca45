"""Batches of a data set, for any loop: a torch data set and its loader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from wara.data.imageset import ImageSet
from wara.data.workers import worker_options
from wara.images import ImageSpec, to_tensor

Key = tuple[int, int]
Augment = Callable[[np.ndarray, int, int], np.ndarray]
"""Changes a uint8 array `[h, w, 3]`, given epoch and record number."""


class Images(Dataset):
    """Maps (epoch, record number) to one item of a batch.

    An item is `{"image": float32 [3, h, w], "label": int64 (float32 [c] for multilabel tasks),
    "index": int}`; `index` is the number of the record in `image_set.records`.
    """

    def __init__(self, image_set: ImageSet, spec: ImageSpec, augment: Augment | None) -> None:
        self.image_set, self.spec, self.augment = image_set, spec, augment
        self.label_type = torch.float32 if image_set.card.task == "multilabel" else torch.int64

    def input(self, epoch: int, index: int) -> Tensor:
        """Return what the network takes: an image of an epoch, float32 `[3, h, w]`."""
        array = self.image_set.array(index, self.spec)
        if self.augment is not None:
            array = self.augment(array, epoch, index)
        return to_tensor(array, self.spec)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index = key
        label = self.image_set.records[index].label
        return {
            "image": self.input(epoch, index),
            "label": torch.tensor(label, dtype=self.label_type),
            "index": index,
        }

    def __len__(self) -> int:
        return len(self.image_set)


def load_batches(
    image_set: ImageSet,
    order: Iterable[Key],
    spec: ImageSpec,
    *,
    indices: Sequence[int],
    batch_size: int,
    workers: int = 0,
    augment: Augment | None = None,
) -> DataLoader:
    """Return a loader of the images named by `order`.

    Args:
        image_set: the data.
        order: (epoch, record number) of each image, in order; a sampler.
        indices: all record numbers that `order` names in any epoch; no other image is read.
        spec: what the network expects.
        batch_size: images per batch.
        workers: processes that load images; 0 loads in this one. Results do not depend on it.
        augment: what to change in an image, if anything.
    """
    if workers:
        # Before the workers exist, so that they share what is kept instead of each reading it.
        image_set.fill(spec, indices)
    else:
        image_set.keep(spec)
    return DataLoader(
        Images(image_set, spec, augment),
        batch_size=batch_size,
        sampler=order,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        # What torch draws for workers decides nothing; dropout's own generator must not give it.
        generator=torch.Generator(),
        **worker_options(workers),
    )


def eval_batches(
    image_set: ImageSet,
    indices: Sequence[int],
    spec: ImageSpec,
    *,
    batch_size: int,
    workers: int = 0,
) -> DataLoader:
    """Return a loader of some records in order, as they are; see `load_batches`."""
    order = [(0, int(index)) for index in indices]
    return load_batches(
        image_set, order, spec, indices=indices, batch_size=batch_size, workers=workers
    )
