"""Figures: what they show is what was given, and synthetic data is stamped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import average_precision_score, confusion_matrix, roc_auc_score

from wara.errors import WaraError
from wara.evaluation import plots

CLASSES = ["benign", "malignant", "normal $x_1$"]


@pytest.fixture
def figure(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures as they were saved."""
    kept: list[Figure] = []
    save = plots.save

    def keep(fig: Figure, path: Any, synthetic: bool) -> Path:
        kept.append(fig)
        return save(fig, path, synthetic)

    monkeypatch.setattr(plots, "save", keep)
    return kept


@pytest.fixture
def scores() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 90)
    logits = rng.normal(size=(90, 3)) + 1.5 * np.eye(3)[labels]
    return labels, np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def legend(fig: Figure) -> str:
    texts = [t.get_text() for ax in fig.axes if ax.get_legend() for t in ax.get_legend().texts]
    return "\n".join(texts + [t.get_text() for box in fig.legends for t in box.texts])


def test_roc_and_pr_name_the_areas_of_scikit_learn(
    figure: list[Figure], scores: Any, tmp_path: Path
) -> None:
    labels, probs = scores
    plots.roc_curves(labels, probs, CLASSES, tmp_path / "roc.png")
    plots.pr_curves(labels, probs, CLASSES, tmp_path / "pr.png")
    for i, name in enumerate(CLASSES[:2]):
        truth = labels == i
        assert f"{name}  {roc_auc_score(truth, probs[:, i]):.3f} (n={truth.sum()})" in legend(
            figure[0]
        )
        average = average_precision_score(truth, probs[:, i])
        assert f"{name}  {average:.3f} ({truth.mean():.2f}, n={truth.sum()})" in legend(figure[1])


def test_a_class_without_images_is_named_and_not_drawn(
    figure: list[Figure], scores: Any, tmp_path: Path
) -> None:
    labels, probs = scores
    labels = np.where(labels == 2, 0, labels)
    plots.roc_curves(labels, probs, CLASSES, tmp_path / "roc.png")
    lines = [line for line in figure[0].axes[0].get_lines() if len(line.get_xdata()) > 2]
    assert len(lines) == 2
    everything = legend(figure[0]) + " ".join(t.get_text() for t in figure[0].findobj(match=_text))
    assert "normal" in everything


def _text(artist: Any) -> bool:
    return hasattr(artist, "get_text")


def test_confusion_shows_the_counts_of_scikit_learn(
    figure: list[Figure], scores: Any, tmp_path: Path
) -> None:
    labels, probs = scores
    called = probs.argmax(1)
    plots.confusion(labels, called, CLASSES, tmp_path / "c.png")
    shown = np.array([int(t.get_text()) for t in figure[0].axes[0].texts]).reshape(3, 3)
    assert np.array_equal(shown, confusion_matrix(labels, called))
    rows = [t.get_text() for t in figure[0].axes[0].get_yticklabels()]
    assert rows[0] == f"benign (n={(labels == 0).sum()})"
    shares = np.array([float(t.get_text()) for t in figure[0].axes[1].texts]).reshape(3, 3)
    expected = confusion_matrix(labels, called, normalize="true")
    np.testing.assert_allclose(shares, expected, atol=0.006)
    with pytest.raises(WaraError, match="do not fit"):
        plots.confusion(labels, called[:-1], CLASSES, tmp_path / "c.png")


def test_multilabel_confusion_counts_per_label(figure: list[Figure], tmp_path: Path) -> None:
    labels = np.array([[1, 0], [1, 1], [0, 0], [0, 1]])
    called = np.array([[1, 0], [0, 1], [1, 0], [0, 1]])
    plots.confusion(labels, called, ["a", "b"], tmp_path / "c.png")
    assert [t.get_text() for t in figure[0].axes[0].texts] == [
        "1",
        "1",
        "1",
        "1",
        "2",
        "0",
        "0",
        "2",
    ]


def test_learning_curves_draw_what_was_logged(figure: list[Figure], tmp_path: Path) -> None:
    rows = [
        {"epoch": e, "train_loss": 1 / e, "val_loss": 2 / e, "val_auc_macro": auc, "lr": 0.1 / e}
        for e, auc in ((1, 0.6), (2, None), (3, 0.8))
    ]
    plots.learning_curves(rows, tmp_path / "curves.png", monitor="auc_macro", best_epoch=3)
    panels = {ax.get_title(): ax for ax in figure[0].axes}
    assert list(panels) == ["loss", "validation", "learning rate"]
    auc, best = panels["validation"].get_lines()
    np.testing.assert_allclose(auc.get_ydata(), [0.6, np.nan, 0.8])
    assert set(best.get_xdata()) == {3} and "best epoch 3" in legend(figure[0])
    assert auc.get_linewidth() > panels["loss"].get_lines()[0].get_linewidth()
    for ax in panels.values():
        # No curve runs beneath a legend, wherever it goes.
        assert not ax.get_legend().get_window_extent().overlaps(ax.bbox)


def test_energy_and_spectra_are_drawn_for_every_layer_and_subband(
    figure: list[Figure], tmp_path: Path
) -> None:
    bands = ["LL_1", "LH_1", "HL_1", "HH_1"]
    layers = [f"blocks.{i}.attn.qkv[q]" for i in range(12)]
    energy = {n: {b: 10.0**-j for j, b in enumerate(bands)} for n in layers}
    energy[layers[0]]["HH_1"] = 0.0
    plots.subband_energy(energy, tmp_path / "energy.png", synthetic=True)
    image = figure[0].axes[0].images[0].get_array()
    assert image.shape == (12, 4) and image.mask.sum() == 1 and image[1, 0] == 1.0
    spectra = {n: {b: [0.1, 3.0, 0.5] for b in bands} for n in layers}
    plots.singular_values(spectra, tmp_path / "sv.png", synthetic=True)
    panels = [ax for ax in figure[1].axes if ax.get_title() in bands]
    assert len(panels) == 4
    np.testing.assert_allclose(panels[0].get_lines()[0].get_ydata(), [3.0, 0.5, 0.1])
    with pytest.raises(WaraError, match="no subband energies"):
        plots.subband_energy({}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_synthetic_data_is_stamped_and_files_are_reproducible(scores: Any, tmp_path: Path) -> None:
    labels, probs = scores
    contents = []
    for i, synthetic in enumerate((False, True, True)):
        path = plots.reliability(labels, probs, tmp_path / f"{i}.png", synthetic=synthetic)
        assert max(Image.open(path).size) < 2500
        contents.append(path.read_bytes())
    assert contents[0] != contents[1] and contents[1] == contents[2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.png", "1.png", "2.png"]
