"""Batches whose order and augmentation are counted, not carried.

The order of an epoch follows from (seed, epoch), the augmentation of an image from (seed, epoch,
index). Workers, processes and an interrupted run change nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytorch_lightning as pl
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from wara.data.imageset import ImageSet
from wara.data.loader import load_batches
from wara.data.splits import SPLITS
from wara.images import ImageSpec
from wara.training.augment import CountedAugment
from wara.training.cache import TrunkCache

# Told apart from that of `augment`, so that the two share no random numbers.
_ORDER = 1


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of an epoch: a permutation of `range(count)` from (seed, epoch)."""
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch, _ORDER]))
    return np.random.Generator(bits).permutation(count)


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


class ImageDataModule(pl.LightningDataModule):
    """Loaders of the three splits; a batch is one of `wara.data.loader.Images`.

    Only training images are shuffled and augmented. With several processes a validation loader may
    repeat images of its front at its end; a repeated image has the same `index`, so that gathered
    results are made unique by it.

    Args:
        image_set: the data.
        splits: "train", "val" or "test" per record.
        spec: what the network expects.
        batch_size: images per batch and process.
        workers: processes that load images; 0 loads in this one. Results do not depend on it.
        augment: a key of `wara.training.augment.PRESETS`.
        views: augmented views per training image; None draws new ones in every epoch.
        seed: seed of the order, and of augmentation where views are not counted.
        trunk: where the tokens of the images lie, to hand out in the place of the images.
    """

    def __init__(
        self,
        image_set: ImageSet,
        splits: Sequence[str],
        *,
        spec: ImageSpec,
        batch_size: int,
        workers: int = 0,
        augment: str = "off",
        views: int | None = None,
        seed: int = 0,
        trunk: TrunkCache | None = None,
    ) -> None:
        super().__init__()
        self.image_set, self.spec, self.seed = image_set, spec, seed
        self.batch_size, self.workers = batch_size, workers
        self.augment = CountedAugment(augment, seed, views)
        self.trunk = trunk
        self.indices = {split: np.flatnonzero([own == split for own in splits]) for split in SPLITS}

    def train_dataloader(self) -> DataLoader:
        """Return shuffled and augmented batches; the last one may be smaller."""
        sampler = self._sampler_of("train", shuffle=True)
        if self.trainer is not None:  # it tells later epochs, but not where a resumed run begins
            sampler.set_epoch(self.trainer.current_epoch)
        return self._loader(sampler, self.augment)

    def val_dataloader(self) -> DataLoader:
        """Return the validation images in order, without augmentation."""
        return self._loader(self._sampler_of("val", shuffle=False), None)

    def _sampler_of(self, split: str, *, shuffle: bool) -> CountedSampler:
        rank, world = 0, 1
        if self.trainer is not None:
            rank, world = self.trainer.global_rank, self.trainer.world_size
        return CountedSampler(
            self.indices[split].tolist(), seed=self.seed, shuffle=shuffle, rank=rank, world=world
        )

    def _loader(self, sampler: CountedSampler, augment: CountedAugment | None) -> DataLoader:
        if self.trunk is not None:
            return self.trunk.batches(sampler, self.batch_size, augmented=augment is not None)
        return load_batches(
            self.image_set,
            sampler,
            self.spec,
            indices=sampler.indices.tolist(),
            batch_size=self.batch_size,
            workers=self.workers,
            augment=augment,
        )
