"""Batches whose order and augmentation are counted, not carried.

The order of an epoch follows from (seed, epoch), the augmentation of an image from (seed, epoch,
index). Workers, processes and an interrupted run change nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from wara.data.augment import Augment, build_augment, one_thread
from wara.data.balance import class_counts
from wara.data.imageset import ImageSet
from wara.data.splits import SPLITS
from wara.images import ImageSpec, to_tensor

# Told apart so that the order of an epoch and its augmentations share no random numbers.
_ORDER, _AUGMENT = 1, 2


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of an epoch: a permutation of `range(count)` from (seed, epoch)."""
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch, _ORDER]))
    return np.random.Generator(bits).permutation(count)


def augment_seed(seed: int, epoch: int, index: int) -> int:
    """Return the seed of one image's augmentation in one epoch, from (seed, epoch, index)."""
    sequence = np.random.SeedSequence([seed, epoch, index, _AUGMENT])
    return int(sequence.generate_state(1)[0])


class CountedSampler(DistributedSampler):
    """Hands `(epoch, index)` to a dataset; each process takes every `world`-th.

    With several processes the list is filled up to a multiple of their number by starting again
    from its front, so that all of them make the same number of steps. Item `k` of process `r` is
    item `k * world + r` of the list, so that batches of size b on `world` processes hold together
    what one process with batches of `b * world` would see.

    It is a `DistributedSampler` so that Lightning leaves it in place and tells it the epoch.

    Args:
        indices: record numbers.
        seed: seed of the order.
        shuffle: whether each epoch has its own order.
        rank: number of this process.
        world: how many processes there are.
    """

    def __init__(
        self, indices: Sequence[int], *, seed: int, shuffle: bool, rank: int = 0, world: int = 1
    ) -> None:
        self.indices = np.asarray(indices, np.int64)
        super().__init__(
            self.indices,  # type: ignore[arg-type]
            num_replicas=world,
            rank=rank,
            shuffle=shuffle,
            seed=seed,
        )

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield (epoch, record number)."""
        count = len(self.indices)
        order = epoch_order(count, self.seed, self.epoch) if self.shuffle else np.arange(count)
        padded = np.resize(order, self.total_size)
        for position in padded[self.rank :: self.num_replicas]:
            yield self.epoch, int(self.indices[position])

    def __len__(self) -> int:
        return self.num_samples


class _Images(Dataset):
    """Maps (epoch, record number) to one item of a batch."""

    def __init__(
        self, image_set: ImageSet, spec: ImageSpec, augment: Augment | None, seed: int
    ) -> None:
        self.image_set, self.spec, self.augment, self.seed = image_set, spec, augment, seed
        self.multilabel = image_set.card.task == "multilabel"

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        array = self.image_set.resized(index, self.spec.size, self.spec.interpolation)
        if self.augment is not None:
            array = self.augment(array, augment_seed(self.seed, epoch, index))
        label = self.image_set.records[index].label
        return {
            "image": to_tensor(array, self.spec.mean, self.spec.std),
            "label": torch.tensor(label, dtype=torch.float32 if self.multilabel else torch.int64),
            "index": index,
        }

    def __len__(self) -> int:
        return len(self.image_set)


def _init_worker(_: int) -> None:
    one_thread()


class ImageDataModule(pl.LightningDataModule):
    """Loaders of the three splits.

    A batch is `{"image": float32 [b, 3, h, w], "label": int64 [b] (float32 [b, c] for multilabel
    tasks), "index": int64 [b]}`; `index` is the number of the record in `image_set.records`.

    Only training images are shuffled and augmented. With several processes a validation or test
    loader may repeat images of its front at its end; a repeated image has the same `index`, so
    that gathered results are made unique by it.

    Args:
        image_set: the data.
        splits: "train", "val" or "test" per record.
        spec: what the network expects.
        batch_size: images per batch and process.
        workers: processes that load images; 0 loads in this one. Results do not depend on it.
        augment: a key of `wara.data.augment.PRESETS`, or "auto" for the card's.
        seed: seed of order and augmentation.
    """

    def __init__(
        self,
        image_set: ImageSet,
        splits: Sequence[str],
        *,
        spec: ImageSpec,
        batch_size: int,
        workers: int = 0,
        augment: str = "auto",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.image_set = image_set
        self.spec, self.batch_size, self.workers, self.seed = spec, batch_size, workers, seed
        self.preset = image_set.card.augment if augment == "auto" else augment
        self.augment = build_augment(self.preset)
        self.indices = {split: np.flatnonzero([own == split for own in splits]) for split in SPLITS}
        self._epoch = 0
        self._sampler: CountedSampler | None = None

    def class_counts(self, split: str) -> np.ndarray:
        """Images per class in a split, int64 `[c]`."""
        labels = self.image_set.labels[self.indices[split]]
        return class_counts(labels, len(self.image_set.card.classes))

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass over the training images that of `epoch`.

        Under a Lightning trainer its `current_epoch` is used without this call.
        """
        self._epoch = epoch
        if self._sampler is not None:
            self._sampler.set_epoch(epoch)

    def train_dataloader(self) -> DataLoader:
        """Return shuffled and augmented batches; the last one may be smaller."""
        if self.trainer is not None:
            self._epoch = self.trainer.current_epoch
        self._sampler = self._sampler_of("train", shuffle=True)
        self._sampler.set_epoch(self._epoch)
        return self._loader(self._sampler, self.augment)

    def val_dataloader(self) -> DataLoader:
        """Return the validation images in order."""
        return self.eval_dataloader("val")

    def test_dataloader(self) -> DataLoader:
        """Return the test images in order."""
        return self.eval_dataloader("test")

    def eval_dataloader(self, split: str) -> DataLoader:
        """Return the images of any split in order, without augmentation."""
        return self._loader(self._sampler_of(split, shuffle=False), None)

    def _sampler_of(self, split: str, *, shuffle: bool) -> CountedSampler:
        rank, world = 0, 1
        if self.trainer is not None:
            rank, world = self.trainer.global_rank, self.trainer.world_size
        return CountedSampler(
            self.indices[split].tolist(), seed=self.seed, shuffle=shuffle, rank=rank, world=world
        )

    def _loader(self, sampler: CountedSampler, augment: Augment | None) -> DataLoader:
        if self.workers:
            # Before the workers exist, so that they share what is kept instead of each reading it.
            self.image_set.fill(self.spec.size, self.spec.interpolation)
        else:
            self.image_set.keep(self.spec.size, self.spec.interpolation)
        return DataLoader(
            _Images(self.image_set, self.spec, augment, self.seed),
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_init_worker if self.workers else None,
            # A loader draws a number for its workers; not from the generator of dropout.
            generator=torch.Generator().manual_seed(self.seed),
        )
