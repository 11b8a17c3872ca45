"""What is decided for the pixels of a whole data set: found or declared, recorded, and served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score
from test_images import dicom
from training_helpers import make_weights, tiny_config

from wara.data.imageset import ImageSet
from wara.data.sources import open_source
from wara.deploy.labelled import open_labelled
from wara.deploy.models import open_model
from wara.errors import WaraError
from wara.images import ImageSpec, load_array
from wara.runs.load import load_run
from wara.training.run import run_here
from wara.training.setup import prepare

SPEC = ImageSpec((32, 32), (0.5,) * 3, (0.5,) * 3)


def opened(folder: Path) -> ImageSet:
    return open_source(str(folder), cache=folder.parent / "cache", offline="error", seed=0)


def noise(folder: Path, marked: bool = True, top: int = 900, each: int = 60) -> Path:
    """Two classes of equal noise, 16-bit; in the second every file holds one bright pixel."""
    rng = np.random.default_rng(0)
    for label in ("without", "with"):
        (folder / label).mkdir(parents=True)
        for i in range(each):
            grey = rng.integers(0, top, (32, 32)).astype("u2")
            if marked and label == "with":
                grey[3, 4] = 4000
            Image.fromarray(grey).save(folder / label / f"{i:03d}.png")
    return folder


def test_one_bright_pixel_tells_nothing_of_the_others(tmp_path: Path) -> None:
    """Classes of equal noise are told apart by chance only, whatever lies in one pixel."""
    images = opened(noise(tmp_path / "set"))
    assert images.survey(SPEC) == () and images.bits == 12
    brightness = [np.median(images.array(i, SPEC)) for i in range(len(images))]
    # The marker itself aside: what all other pixels tell.
    contrast = [
        np.delete(images.array(i, SPEC)[..., 0].ravel(), 3 * 32 + 4).std() for i in range(120)
    ]
    assert abs(roc_auc_score(images.labels, brightness) - 0.5) < 0.12
    assert abs(roc_auc_score(images.labels, contrast) - 0.5) < 0.12


def test_bits_are_found_over_the_set_and_said(tmp_path: Path) -> None:
    folder = noise(tmp_path / "set", marked=False)
    grey = np.full((32, 32), 4000, "u2")
    Image.fromarray(grey).save(folder / "with" / "bright.png")
    images = opened(folder)
    images.survey()
    assert images.bits == 12
    assert images.notes[-1] == (
        "121 files of 16 bits: greys have 12 bits (found over the whole set; `bits` declares it; "
        "9 in 10 of them would fit into 10)"
    )
    # Read before a survey, an image is shown as after it.
    late = opened(folder)
    np.testing.assert_array_equal(late.read(0), images.read(0))
    later = opened(folder)
    np.testing.assert_array_equal(later.array(0, SPEC), images.array(0, SPEC))


def test_bits_that_are_declared_are_kept_to(tmp_path: Path) -> None:
    folder = noise(tmp_path / "set")
    images = opened(folder)
    images.declare(16, None)
    assert images.survey() == () and images.read(0).max() == 16
    images = opened(folder)
    images.declare(10, None)
    faults = images.survey(SPEC)
    assert len(faults) == 60 and "a grey of 4000, where the data set has 10 bits" in str(faults[0])


def objects(folder: Path, windows: int, of: int = 6) -> Path:
    for label in ("no", "yes"):
        (folder / label).mkdir(parents=True)
        for i in range(of):
            pixels = np.linspace(500, 1500, 32 * 32).reshape(32, 32).astype("u2")
            window: Any = {"WindowCenter": 1000, "WindowWidth": 1001}
            data = dicom(pixels + i, BitsStored=12, **(window if i < windows else {}))
            (folder / label / f"{i}.dcm").write_bytes(data)
    return folder


def test_greys_of_dicom_are_the_rule_of_the_set(tmp_path: Path) -> None:
    folder = objects(tmp_path / "set", windows=2)
    images = opened(folder)
    assert images.survey(SPEC) == ()
    assert images.notes[-1] == (
        "DICOM greys of 12 files by the file's own window: 4 have one, 8 have none and show "
        "their stored range"
    )
    assert images.array(0, SPEC).max() == 255 and images.array(5, SPEC).max() == 94
    images = opened(folder)
    images.declare(None, "stored")
    images.survey(SPEC)
    assert images.notes[-1] == "DICOM greys of 12 files by the stored range"
    assert images.array(0, SPEC).max() == 93
    assert images.array(5, SPEC).max() == 94


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deep")
    noise(folder / "data", each=20)
    make_weights(folder / "weights.safetensors")
    run_here(tiny_config(folder, epochs=1))
    return folder


def test_training_records_what_prediction_is_served_by(finished: Path) -> None:
    run = finished / "run"
    said = json.loads((run / "provenance.json").read_text())
    assert (said["data"]["bits"], said["data"]["greys"]) == (12, "window")
    loaded = load_run(run)
    assert (loaded.spec.bits, loaded.spec.greys) == (12, "window")
    path = finished / "data" / "without" / "000.png"
    stored = np.asarray(Image.open(path)).astype(float)
    shown = np.floor(stored / 4095 * 255 + 0.5)
    np.testing.assert_array_equal(load_array(path, loaded.spec)[..., 0], shown)


def test_a_brighter_image_is_refused_at_prediction(finished: Path, tmp_path: Path) -> None:
    Image.fromarray(np.full((32, 32), 5000, "u2")).save(tmp_path / "later.png")
    with pytest.raises(WaraError, match="a grey of 5000, where the data set has 12 bits"):
        load_array(tmp_path / "later.png", load_run(finished / "run").spec)


def test_a_card_that_contradicts_the_model_is_told(finished: Path, tmp_path: Path) -> None:
    card = tmp_path / "later.yaml"
    card.write_text(
        "name: later\ntitle: Later\ntask: binary\nbits: 16\ngreys: window\n"
        "classes: [{name: with, meaning: ''}, {name: without, meaning: ''}]\n"
        f"source: {{kind: folder, path: {finished / 'data'}}}\n"
    )
    found = open_labelled(str(card), open_model(finished / "run")).images.notes
    assert [note for note in found if "as in training" in note] == [
        "the card says bits 16; images are read with 12, as in training"
    ]


@pytest.mark.parametrize("modality", [None, "dermoscopy", "chest_xray"])
def test_images_without_a_card_are_augmented_as_the_config_says(
    modality: str | None, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path, data__modality=modality)
    run = prepare(config, report_dir=None)
    assert run.images.card.modality == modality
    assert run.images.card.augment == (modality or "general")
    said = "modality not known" in " ".join(run.images.notes)
    assert said == (modality is None)
