"""Calibration error against torchmetrics and by hand; temperatures that are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_metrics import sample
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torchmetrics.functional.classification import (
    binary_calibration_error,
    multiclass_calibration_error,
)

from wara.errors import WaraError
from wara.evaluation.calibration import ece, fit_temperature, reliability_bins, to_probs


def nll(logits, labels, *, temperature=1.0):
    """Mean negative log-likelihood in nats, by torch."""
    z, y = torch.as_tensor(logits, dtype=torch.float64) / temperature, torch.as_tensor(labels)
    if y.ndim == 2:
        return float(binary_cross_entropy_with_logits(z, y.double()))
    return float(cross_entropy(z, y))


def test_multiclass_ece_is_that_of_torchmetrics():
    labels, probs = sample("multiclass", n=500)
    other = multiclass_calibration_error(
        torch.tensor(probs), torch.tensor(labels), num_classes=4, n_bins=15, norm="l1"
    )
    assert ece(labels, probs) == pytest.approx(float(other), abs=1e-6)


def test_multilabel_ece_is_the_mean_of_binary_ones():
    labels, probs = sample("multilabel", n=500)
    # torchmetrics turns a label's probability p < 0.5 into 1 - p; compare where it does not.
    probs = 0.5 + probs / 2
    other = [
        float(binary_calibration_error(torch.tensor(p), torch.tensor(y), n_bins=15, norm="l1"))
        for p, y in zip(probs.T, labels.T, strict=True)
    ]
    assert ece(labels, probs) == pytest.approx(np.mean(other), abs=1e-6)


def test_bins_by_hand():
    table = reliability_bins([0.0, 0.05, 0.1, 0.95, 1.0], [0, 1, 0, 1, 0], bins=10)
    assert table.count.tolist() == [3, 0, 0, 0, 0, 0, 0, 0, 0, 2]
    assert table.confidence[0] == pytest.approx(0.05) and table.frequency[0] == pytest.approx(1 / 3)
    assert np.isnan(table.confidence[1]) and table.frequency[9] == 0.5
    assert ece([[0], [1], [0], [1], [0]], [[0.0], [0.05], [0.1], [0.95], [1.0]], bins=10) == (
        pytest.approx(0.6 * (1 / 3 - 0.05) + 0.4 * (0.975 - 0.5))
    )


def test_probabilities_from_logits_do_not_overflow():
    assert to_probs([[1000.0, 0.0]], task="binary").tolist() == [[1.0, 0.0]]
    assert to_probs([[1000.0, -1000.0]], task="multilabel").tolist() == [[1.0, 0.0]]
    assert to_probs([[2.0, 0.0]], task="binary", temperature=2.0)[0, 0] == pytest.approx(
        1 / (1 + np.exp(-1))
    )


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("true", [0.4, 1.0, 3.0])
def test_a_known_temperature_is_found(true, many):
    rng = np.random.default_rng(1)
    honest = rng.normal(size=(20000, 3)) * 1.5
    if many:
        labels = (rng.random(honest.shape) < 1 / (1 + np.exp(-honest))).astype(int)
    else:
        labels = (honest + rng.gumbel(size=honest.shape)).argmax(axis=1)
    got = fit_temperature(honest * true, labels)
    assert got == pytest.approx(true, rel=0.05)
    best = nll(honest * true, labels, temperature=got)
    for factor in (0.97, 1.03):
        assert nll(honest * true, labels, temperature=got * factor) > best


@pytest.mark.parametrize(
    ("logits", "labels", "kind", "words"),
    [
        ([[2.0, 0.0], [0.0, 2.0]], [0, 1], "data", "classified right"),
        ([[2.0, 0.0], [0.0, 2.0]], [1, 0], "data", "no information"),
        ([[1.0, 1.0], [1.0, 1.0]], [1, 0], "data", "equal"),
        ([[np.nan, 1.0]], [0], "nonfinite", "logit"),
        ([[0.0, 1.0]], [0, 1], "usage", "do not go with"),
        (np.zeros((0, 2)), [], "usage", "do not go with"),
    ],
)
def test_no_temperature_is_made_up(logits, labels, kind, words):
    with pytest.raises(WaraError, match=words) as caught:
        fit_temperature(logits, labels)
    assert caught.value.kind == kind


def test_refusals():
    with pytest.raises(WaraError, match="above 0"):
        to_probs([[1.0, 2.0]], task="binary", temperature=0.0)
    with pytest.raises(WaraError, match="no probability"):
        reliability_bins([1.2], [1])
    with pytest.raises(WaraError, match="outcomes"):
        reliability_bins([0.2], [1, 0])
    with pytest.raises(WaraError, match="no images"):
        ece([], np.zeros((0, 2)))
