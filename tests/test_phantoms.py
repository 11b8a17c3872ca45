"""Phantoms: counted randomness, patients, and a label that colour does not give away."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from wara.errors import WaraError
from wara.phantoms import MODALITIES, classes, draw

each = pytest.mark.parametrize("modality", MODALITIES)


@each
def test_an_image_depends_on_seed_and_index_alone(modality: str) -> None:
    forward = [draw(modality, 3, i, 64) for i in range(5)]
    backward = [draw(modality, 3, i, 64) for i in reversed(range(5))][::-1]
    for one, two in zip(forward, backward, strict=True):
        assert np.array_equal(one.image, two.image)
        assert (one.label, one.patient) == (two.label, two.patient)
    assert not np.array_equal(forward[0].image, draw(modality, 4, 0, 64).image)


@each
@pytest.mark.parametrize("size", [32, 75, 112])
def test_images_have_the_size_asked_for(modality: str, size: int) -> None:
    image = draw(modality, 0, 1, size).image
    assert image.shape == (size, size, 3) and image.dtype == np.uint8
    assert image.std() > 10


@each
def test_patients_have_one_to_three_images_in_a_row(modality: str) -> None:
    drawn = [draw(modality, 0, i, 32) for i in range(240)]
    runs = [(p, len(list(group))) for p, group in itertools.groupby(d.patient for d in drawn)]
    assert len({p for p, _ in runs}) == len(runs), "a patient comes back later"
    assert {n for _, n in runs} == {1, 2, 3}
    counts = np.bincount([d.label for d in drawn], minlength=len(classes(modality)))
    assert counts.min() > 0 and counts.max() < 3 * counts.min()


@each
def test_colour_and_contrast_do_not_give_the_label_away(modality: str) -> None:
    drawn = [draw(modality, 1, i, 64) for i in range(300)]
    labels = np.array([d.label for d in drawn])
    pixels = np.stack([d.image for d in drawn]).reshape(len(drawn), -1, 3) / 255
    shares = [np.mean((pixels >= i / 8) & (pixels < (i + 1) / 8), axis=1) for i in range(8)]
    features = np.concatenate([pixels.mean(1), pixels.std(1), *shares], axis=1)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
    groups = [d.patient for d in drawn]
    found = cross_val_predict(
        model, features, labels, cv=GroupKFold(5), groups=groups, method="predict_proba"
    )
    auc = roc_auc_score(labels, found, multi_class="ovr", average="macro")
    assert auc < 0.70, f"{modality}: AUROC {auc:.2f} from the histogram alone"


def test_unknown_modalities_and_tiny_sizes_are_refused() -> None:
    with pytest.raises(WaraError, match="did you mean 'fundus'"):
        draw("fundos", 0, 0)
    with pytest.raises(WaraError, match="32 px or more"):
        draw("fundus", 0, 0, 16)


def test_the_contact_sheet_has_a_row_per_class(tmp_path: Path) -> None:
    out = tmp_path / "sheet.png"
    command = [sys.executable, "-m", "wara.phantoms", "--modality", "ultrasound", "--out", out]
    subprocess.run([*map(str, command), "--columns", "2", "--size", "48"], check=True)
    assert Image.open(out).size == (2 * 48, 3 * 48)
