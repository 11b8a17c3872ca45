"""The trunk cache: what the lower blocks give for each image and view, computed once for all."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.utils.data import DataLoader

import wara
from wara.data.imageset import ImageSet
from wara.data.loader import Images, Key, load_batches
from wara.errors import WaraError, storage_error
from wara.evaluation.parts import Parts
from wara.images import DECODING, ImageSpec
from wara.storage import canonical_sha256, code_sha256, write_json
from wara.training.augment import CountedAugment
from wara.training.rows import RowFile
from wara.training.trunk import Trunk

# What decides a token, beside the facts that `TrunkCache.facts` lists.
_SOURCES = (
    *DECODING, "images.py", "data/imageset.py", "data/loader.py",
    "training/augment.py", "training/trunk.py", "training/rows.py", "training/cache.py",
)  # fmt: skip
_LIBRARIES = (
    "torch", "timm", "numpy", "albumentations", "opencv-python-headless", "Pillow", "pydicom",
)  # fmt: skip
_PLAIN = "off"  # the preset that leaves images as they are

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class TrunkCache:
    """Tokens of the images of a run, in a folder that other runs share.

    The folder is named after all that decides a token but the augmentation, see `facts`; in it is
    a file per augmentation and view. Labels, splits, seeds, rates and methods enter nowhere.

    Args:
        parent: folder of all trunk caches.
        images: the data set.
        spec: what the network expects.
        splits: "train", "val" or "test" per record; tokens of test images are not kept.
        preset: augmentation of the training images.
        views: augmented views per training image.
        epochs: of the run, which takes one view in each.
        depth: number of blocks of the trunk, from 1.
        shape: of the tokens of an image.
        base_hash: fingerprint of the frozen base.
        precision: Lightning's name of the arithmetic.
    """

    parent: Path
    images: ImageSet
    spec: ImageSpec
    splits: Sequence[str]
    preset: str
    views: int
    epochs: int
    depth: int
    shape: tuple[int, ...]
    base_hash: str
    precision: str

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """All that decides a token but the augmentation; plain values, as JSON has them."""
        facts = {
            "images_sha256": canonical_sha256(list(map(self.images.sha256, range(len(self))))),
            "pixels": dataclasses.asdict(self.images.spec(self.spec)),
            "base_sha256": self.base_hash,
            "depth": self.depth,
            "shape": list(self.shape),
            "precision": self.precision,
            "code_sha256": code_sha256(
                (Path(wara.__file__).parent / name for name in _SOURCES), _LIBRARIES
            ),
        }
        return json.loads(json.dumps(facts, allow_nan=False))

    def __len__(self) -> int:
        return len(self.images)

    @functools.cached_property
    def folder(self) -> Path:
        """The folder, named after the facts."""
        return self.parent / canonical_sha256(self.facts)[:24]

    @property
    def seen(self) -> range:
        """The views of a training image that the run comes to look at."""
        return range(1 if self.preset == _PLAIN else min(self.views, self.epochs))

    @functools.cached_property
    def _files(self) -> dict[tuple[str, int], RowFile]:
        names = [(_PLAIN, 0), *((self.preset, view) for view in self.seen)]
        return {
            (preset, view): RowFile(self.folder / f"{preset}-{view}.rows", len(self), self.shape)
            for preset, view in names
        }

    def _wanted(self) -> dict[tuple[str, int], list[int]]:
        """Return the records that the run looks at, by augmentation and view."""
        wanted: dict[tuple[str, int], list[int]] = {key: [] for key in self._files}
        for index, split in enumerate(self.splits):
            if split == "val":
                wanted[_PLAIN, 0].append(index)
            elif split == "train":
                for view in self.seen:
                    wanted[self.preset, view].append(index)
        return wanted

    @property
    def rows(self) -> int:
        """How many outputs of the trunk the run needs."""
        return sum(map(len, self._wanted().values()))

    @property
    def size(self) -> int:
        """Bytes that they take."""
        return self.rows * self._files[_PLAIN, 0].row_bytes

    def check_limit(self, limit: float) -> None:
        """Refuse a cache that is larger than allowed.

        Args:
            limit: in GB (10⁹ bytes).

        Raises:
            WaraError: kind "storage".
        """
        if self.size > limit * 1e9:
            what = f"the trunk cache would take {gigabytes(self.size)}, above {limit:g} GB"
            remedy = "raise it, lower data.views or backbone.img_size, or set data.trunk=off"
            raise WaraError("storage", what, "data.cache_limit", remedy)

    def fill(
        self, model: nn.Module, *, accelerator: str, batch_size: int, workers: int, say: Say
    ) -> None:
        """Compute what is missing or damaged; what another process computes is waited for.

        Args:
            model: the adapted model; it is left in evaluation mode, on the device.
            accelerator: `cpu | gpu`.
            batch_size: images per pass.
            workers: processes that load images.
            say: prints a line.

        Raises:
            WaraError: kind "storage" when the disk is full or refuses, "nonfinite" when a token
                does not fit into float16.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / ".lock"):
                self._fill(model, accelerator, batch_size, workers, say)
        except OSError as error:
            raise storage_error(error, self.folder) from error

    def _fill(
        self, model: nn.Module, accelerator: str, batch_size: int, workers: int, say: Say
    ) -> None:
        write_json(self.folder / "about.json", self.facts)
        missing = {}
        for key, indices in self._wanted().items():
            self._files[key].make()
            missing[key] = self._files[key].missing(indices)
        count = sum(map(len, missing.values()))
        say(f"trunk cache: {self.rows - count:,} of {self.rows:,} outputs are there: {self.folder}")
        if not count:
            return
        self._check_room(count)
        start = time.perf_counter()
        device = "cuda" if accelerator == "gpu" else "cpu"
        trunk = Parts(Trunk(model.to(device).eval(), self.depth))
        for preset in dict.fromkeys(preset for preset, _ in missing):
            order = [(v, i) for (own, v), all_ in missing.items() if own == preset for i in all_]
            batches = load_batches(
                self.images, order, self.spec,
                indices=sorted({index for _, index in order}), batch_size=batch_size,
                workers=workers, augment=CountedAugment(preset, views=self.views),
            )  # fmt: skip
            self._compute(trunk, preset, order, batches, device)
        say(f"trunk cache: {count:,} outputs computed in {time.perf_counter() - start:.1f} s")

    @torch.no_grad()
    def _compute(
        self,
        trunk: Parts,
        preset: str,
        order: Sequence[Key],
        batches: Iterable[Mapping[str, Any]],
        device: str,
    ) -> None:
        done = 0
        for batch in batches:
            # The arithmetic of a training step, so that only float16 comes between.
            with torch.autocast(device, torch.bfloat16, enabled=self.precision == "bf16-mixed"):
                tokens = trunk(batch["image"].to(device))
            half = tokens.half().cpu()
            if not bool(half.isfinite().all()):
                what = "outputs of the trunk do not fit into float16"
                raise WaraError("nonfinite", what, f"block {self.depth}", "set data.trunk=off")
            places = order[done : done + len(half)]
            rows = list(zip(places, half.numpy(), strict=True))
            for view in {view for view, _ in places}:
                self._files[preset, view].write([(i, row) for (v, i), row in rows if v == view])
            done += len(half)

    def _check_room(self, count: int) -> None:
        needed = count * self._files[_PLAIN, 0].row_bytes
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            what = f"the trunk cache needs {gigabytes(needed)} more, {gigabytes(free)} are free"
            remedy = "free some space, set data.cache to another disk, or data.trunk=off"
            raise WaraError("storage", what, str(self.folder), remedy)

    def batches(
        self, order: Iterable[Key], batch_size: int, *, augmented: bool
    ) -> DataLoader[dict[str, Any]]:
        """Return a loader like that of `load_batches`, with tokens in the place of images.

        Args:
            order: (epoch, record number) of each image, in order; a sampler.
            batch_size: images per batch.
            augmented: whether to hand out the view of the epoch, or images as they are.
        """
        return DataLoader(
            _Tokens(self, augmented),
            batch_size=batch_size,
            sampler=order,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # as in `load_batches`
        )

    def row(self, index: int, view: int | None) -> np.ndarray:
        """Return the tokens of an image, float16, in a view or as it is."""
        key = (_PLAIN, 0) if view is None else (self.preset, view)
        return self._files[key].read(index)


class _Tokens(Images):
    """Maps (epoch, record number) to one item of a batch, with tokens in the place of an image."""

    def __init__(self, cache: TrunkCache, augmented: bool) -> None:
        super().__init__(cache.images, cache.spec, None)
        self.cache, self.augmented = cache, augmented

    def input(self, epoch: int, index: int) -> Tensor:
        """Return the tokens of the epoch's view of an image, float16."""
        view = epoch % len(self.cache.seen) if self.augmented else None
        return torch.from_numpy(self.cache.row(index, view))


def gigabytes(size: int) -> str:
    """Return a number of bytes for people, in GB or MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
