"""Batches: right pixels, counted order, nothing that depends on workers or processes."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from wara.cards import Card
from wara.data import ImageSet, Record, eval_batches
from wara.data.balance import SplitTable
from wara.data.imageset import ArrayReader
from wara.images import ImageSpec, load_tensor, resize
from wara.training.augment import augment_seed, build_augment
from wara.training.batches import CountedSampler, ImageDataModule, epoch_order

SPEC = ImageSpec((16, 20), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), "bilinear")


def image_set(n: int = 23, task: str = "binary") -> ImageSet:
    rng = np.random.default_rng(0)
    stack = rng.integers(0, 256, (n, 24, 28, 3), dtype=np.uint8)
    card = Card.model_validate(
        {
            "name": "set",
            "title": "Set",
            "task": task,
            "classes": [{"name": f"c{i}", "meaning": ""} for i in range(2)],
            "source": {"kind": "folder"},
            "augment": "fundus",
        }
    )
    labels = [(i % 2, i % 3 == 0) if task == "multilabel" else i % 2 for i in range(n)]
    records = [Record(f"{i}.png", label) for i, label in enumerate(labels)]
    return ImageSet(card, records, ArrayReader([stack]))


def module(n: int = 23, *, world: int = 1, rank: int = 0, task="binary", **options):
    splits = ["train"] * (n - 8) + ["val"] * 5 + ["test"] * 3
    given = {"batch_size": 4, "workers": 0, "augment": "fundus", "seed": 7} | options
    data = ImageDataModule(image_set(n, task), splits, spec=SPEC, **given)
    if world > 1:
        data.trainer = SimpleNamespace(global_rank=rank, world_size=world, current_epoch=0)
    return data


def indices(loader) -> list[int]:
    return [i for batch in loader for i in batch["index"].tolist()]


def stack(loader) -> torch.Tensor:
    return torch.cat([batch["image"] for batch in loader])


def test_batches_have_the_agreed_form():
    data = module()
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"image", "label", "index"}
    assert batch["image"].shape == (4, 3, 16, 20) and batch["image"].dtype == torch.float32
    assert batch["label"].dtype == torch.int64 and batch["index"].dtype == torch.int64
    assert batch["label"].tolist() == [i % 2 for i in batch["index"].tolist()]
    batch = next(iter(module(task="multilabel").train_dataloader()))
    assert batch["label"].dtype == torch.float32 and batch["label"].shape == (4, 2)


def test_evaluation_images_are_the_one_image_path():
    data = module()
    test = eval_batches(data.image_set, range(20, 23), SPEC, batch_size=4)
    for loader, first in ((data.val_dataloader(), 15), (test, 20)):
        for batch in loader:
            for image, index in zip(batch["image"], batch["index"].tolist(), strict=True):
                array = resize(data.image_set.read(index), (16, 20), "bilinear")
                expected = (array / 255 - np.array(SPEC.mean)) / np.array(SPEC.std)
                np.testing.assert_allclose(image, expected.transpose(2, 0, 1), atol=1e-5)
        assert indices(loader)[0] == first
    assert indices(data.val_dataloader()) == list(range(15, 20))
    assert indices(test) == list(range(20, 23))


def test_a_file_goes_one_way_into_training_and_prediction(tmp_path):
    from wara.data.imageset import FileReader

    pixels = np.random.default_rng(3).integers(0, 256, (2, 40, 30, 3), dtype=np.uint8)
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for path, array in zip(paths, pixels, strict=True):
        Image.fromarray(array).save(path)
    images = ImageSet(image_set().card, [Record("0.png", 0), Record("1.png", 1)], FileReader(paths))
    for surveyed in (False, True):
        if surveyed:
            images.survey(SPEC)
        for batch in eval_batches(images, [0, 1], SPEC, batch_size=1):
            path = paths[int(batch["index"])]
            assert torch.equal(batch["image"][0], load_tensor(path, SPEC))


def test_an_epoch_is_a_permutation_from_seed_and_epoch():
    data = module()
    loader = data.train_dataloader()
    first = indices(loader)
    assert sorted(first) == list(range(15)) and first == epoch_order(15, 7, 0).tolist()
    assert [len(b["index"]) for b in loader] == [4, 4, 4, 3]  # the rest is not dropped
    loader.sampler.set_epoch(1)
    second = indices(loader)
    assert sorted(second) == list(range(15)) and second != first
    # Straight to epoch 1, as after an interruption.
    again = module()
    again.trainer = SimpleNamespace(global_rank=0, world_size=1, current_epoch=1)
    assert indices(again.train_dataloader()) == second
    assert indices(module(seed=8).train_dataloader()) != first


def test_augmentation_follows_from_seed_epoch_and_index():
    data = module()
    loader = data.train_dataloader()
    pixels = {}
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            for image, index in zip(batch["image"], batch["index"].tolist(), strict=True):
                array = resize(data.image_set.read(index), (16, 20), "bilinear")
                array = build_augment("fundus")(array, augment_seed(7, epoch, index))
                expected = (array / 255 - np.array(SPEC.mean)) / np.array(SPEC.std)
                np.testing.assert_allclose(image, expected.transpose(2, 0, 1), atol=1e-5)
                pixels[epoch, index] = image
    assert all(not torch.equal(pixels[0, i], pixels[1, i]) for i in range(15))
    seeds = {augment_seed(s, e, i) for s in range(5) for e in range(5) for i in range(5)}
    assert len(seeds) == 125


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers):
    alone, helped = module(), module(workers=workers)
    one, many = alone.train_dataloader(), helped.train_dataloader()
    for epoch in (0, 1, 2):
        one.sampler.set_epoch(epoch)
        many.sampler.set_epoch(epoch)
        for left, right in zip(one, many, strict=True):
            assert torch.equal(left["index"], right["index"])
            assert torch.equal(left["image"], right["image"])
    assert torch.equal(stack(alone.val_dataloader()), stack(helped.val_dataloader()))


def test_the_global_generator_is_left_alone():
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    for loader in (module().train_dataloader(), module().val_dataloader()):
        list(loader)
    assert torch.equal(torch.rand(1), wanted)


def test_memory_is_not_written_by_augmentation():
    data = module()
    before = stack(eval_batches(data.image_set, range(15), SPEC, batch_size=4))
    list(data.train_dataloader())
    after = stack(eval_batches(data.image_set, range(15), SPEC, batch_size=4))
    assert torch.equal(after, before)


@pytest.mark.parametrize("n", [22, 23, 24])
def test_processes_share_the_batches_of_one(n):
    world = 2
    whole = [b["index"].tolist() for b in module(n, batch_size=8).train_dataloader()]
    parts = [
        [b["index"].tolist() for b in module(n, batch_size=4, world=2, rank=r).train_dataloader()]
        for r in range(world)
    ]
    assert len(parts[0]) == len(parts[1])  # nobody waits for a step that never comes
    for step, batch in enumerate(whole):
        together = parts[0][step] + parts[1][step]
        repeats = len(together) - len(batch)
        assert set(together) >= set(batch) and repeats <= (step == len(whole) - 1)


def test_repeated_evaluation_images_are_known_by_their_index():
    found = [indices(module(world=2, rank=r).val_dataloader()) for r in range(2)]
    assert len(found[0]) == len(found[1]) == 3
    assert sorted(set(found[0] + found[1])) == list(range(15, 20))
    assert sorted(found[0] + found[1]) == [15, 15, 16, 17, 18, 19]  # the first one twice


def test_more_processes_than_images():
    samplers = [CountedSampler([4, 5], seed=0, shuffle=False, rank=r, world=5) for r in range(5)]
    assert [[i for _, i in s] for s in samplers] == [[4], [5], [4], [5], [4]]


def test_lightning_keeps_the_sampler_and_drives_the_epoch():
    import pytorch_lightning as pl

    seen: list[list[int]] = []

    class Task(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def on_train_epoch_start(self):
            seen.append([])

        def training_step(self, batch, _):
            seen[-1] += batch["index"].tolist()
            return self.layer(batch["image"].mean().view(1, 1)).sum()

        def validation_step(self, batch, _):
            return None

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = pl.Trainer(
        max_epochs=3, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Task(), datamodule=module())
    assert seen == [epoch_order(15, 7, epoch).tolist() for epoch in range(3)]


@pytest.mark.parametrize(("task", "train", "val"), [("binary", (8, 7), (2, 3)),
                                                    ("multilabel", (7, 5), (3, 2))])  # fmt: skip
def test_split_table_counts(task, train, val):
    images = image_set(task=task)
    splits = ["train"] * 15 + ["val"] * 5 + ["test"] * 3
    labels = [record.label for record in images.records]
    table = SplitTable.of(labels, [None] * 23, splits, images.card.class_names)
    assert (table.counts["train"], table.counts["val"]) == (train, val)
