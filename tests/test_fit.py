"""Training apart from judging: who fits looks at no test image, who evaluates at one split only."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from training_helpers import tiny_config

import wara
from wara.cards import Card
from wara.data import ImageSet, Record
from wara.data.imageset import ArrayReader, Loaded
from wara.images import ImageSpec
from wara.training.augment import Augment, build_augment
from wara.training.fit import fit
from wara.training.recipe import Recipe
from wara.training.run import evaluate
from wara.training.setup import prepare

SPEC = ImageSpec((16, 16), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "bilinear")
SPLITS = ["train"] * 12 + ["val"] * 6 + ["test"] * 6
RECIPE = Recipe(
    rates={"adapter": 1e-2, "head": 1e-2}, loss="ce", epochs=3, batch_size=5, weight_decay=0.0
)


class Guarded(ArrayReader):
    """Images that are counted, and of which some must not be read."""

    def __init__(self, stack: np.ndarray, barred: set[int]) -> None:
        super().__init__([stack])
        self.barred, self.seen = barred, set[int]()

    def read(self, index: int, bits: int | None = None, greys: str = "") -> np.ndarray:
        assert index not in self.barred, f"image {index} was read"
        self.seen.add(index)
        return super().read(index, bits, greys)

    def load(self, index: int, spec: ImageSpec | None, *more: Any) -> Loaded:
        assert index not in self.barred, f"image {index} was loaded"
        self.seen.add(index)
        return super().load(index, spec, *more)


def guarded(barred: set[int]) -> tuple[ImageSet, Guarded]:
    rng = np.random.default_rng(0)
    labels = [i % 2 for i in range(len(SPLITS))]
    stack = rng.integers(0, 256, (len(SPLITS), 16, 16, 3), dtype=np.uint8)
    stack[1::2, :8] //= 3  # dark above: class 1
    card = Card.model_validate(
        {
            "name": "set", "title": "Set", "task": "binary", "source": {"kind": "folder"},
            "classes": [{"name": name, "meaning": ""} for name in ("light", "dark")],
        }
    )  # fmt: skip
    reader = Guarded(stack, barred)
    return ImageSet(card, [Record(f"{i}", label) for i, label in enumerate(labels)], reader), reader


def adapted() -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=2
    )
    wara.adapt(model, wara.LoRA(rank=2))
    return model


@pytest.mark.parametrize("workers", [0, 1])
def test_a_fit_reads_no_test_image_and_needs_no_folder(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    images, reader = guarded({i for i, split in enumerate(SPLITS) if split == "test"})
    model, start = adapted(), wara.adapters.adapter_state_dict(adapted())
    progress = fit(model, dataclasses.replace(RECIPE, workers=workers), images, SPLITS, SPEC)
    assert not list(tmp_path.iterdir())
    # With workers, images are read before these exist, so that reading can be counted here.
    assert reader.seen == set(range(18))
    assert progress.epoch == len(progress.history) == 3
    losses = [row["train_loss"] for row in progress.history]
    assert losses[-1] < losses[0]  # type: ignore[operator]
    assert all(row["val_auc_macro"] is not None for row in progress.history)
    state = wara.adapters.adapter_state_dict(model)
    assert any(not torch.equal(state[name], start[name]) for name in start)
    assert not torch.are_deterministic_algorithms_enabled()  # settings of the process stay


def test_test_images_are_guarded_at_all() -> None:
    images, _ = guarded({3})
    with pytest.raises(AssertionError, match="image 3 was loaded"):
        fit(adapted(), RECIPE, images, SPLITS, SPEC)


def test_a_split_is_evaluated_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepare(tiny_config(tmp_path, epochs=1), report_dir=None)
    fit(run.model, run.recipe(), run.images, run.splits, run.backbone.spec)
    seen: set[int] = set()
    array = ImageSet.array

    def counted(self: ImageSet, index: int, spec: ImageSpec) -> np.ndarray:
        seen.add(index)
        return array(self, index, spec)

    monkeypatch.setattr(ImageSet, "array", counted)
    found = evaluate(run, ["val"])
    assert list(found) == ["val"] and seen == set(run.indices("val"))
    assert found["val"].scores["auc_macro"]["value"] is not None
    assert evaluate(run).keys() == {"val", "test"}
    assert seen == {*run.indices("val"), *run.indices("test")}


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        ({"modality": "ultrasound"}, "ultrasound"),
        ({}, "general"),
        ({"modality": "ultrasound", "augment": "off"}, "off"),
        ({"augment": "fundus"}, "fundus"),
    ],
)
def test_what_augments_is_the_cards_choice_unless_the_config_makes_one(
    data: dict[str, str], wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []

    def build(preset: str) -> Augment:
        built.append(preset)
        return build_augment(preset)

    monkeypatch.setattr("wara.training.augment.build_augment", build)
    run = prepare(tiny_config(tmp_path, epochs=1, data=data), report_dir=None)
    assert run.recipe().augment == wanted
    fit(run.model, run.recipe(), run.images, run.splits, run.backbone.spec)
    assert built == [wanted]


def test_order_and_augmentation_follow_the_recipes_seed() -> None:
    def trained(seed: int, augment: str) -> torch.Tensor:
        images, _ = guarded(set())
        model = adapted()
        recipe = dataclasses.replace(RECIPE, epochs=1, seed=seed, augment=augment)
        fit(model, recipe, images, SPLITS, SPEC)
        return wara.adapters.adapter_state_dict(model)["head.weight"].clone()

    first = trained(3, "fundus")
    assert torch.equal(first, trained(3, "fundus"))
    for seed, augment in ((4, "fundus"), (3, "off")):
        assert not torch.equal(first, trained(seed, augment))
    # Without augmentation or dropout the seed decides the order of images, and nothing else.
    assert not torch.equal(trained(3, "off"), trained(4, "off"))
