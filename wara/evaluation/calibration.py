"""Calibration: reliability bins, expected calibration error, temperature scaling.

Guo et al., "On calibration of modern neural networks" (2017), is the reference for all three.
Everything is NumPy in float64; probabilities and logits keep the shapes of the model's output,
`[n, c]`, n images and c classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, softmax

from wara.errors import WaraError

BINS = 15
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ReliabilityBins:
    """Equal-width bins of predicted probability, each against what came true.

    `edges` [bins + 1]; `count`, `confidence` (mean prediction), `frequency` (share that came
    true) [bins]. The two means are NaN in a bin without predictions.
    """

    edges: Floats
    count: NDArray[np.int64]
    confidence: Floats
    frequency: Floats


def to_probs(logits: ArrayLike, *, task: str, temperature: float = 1.0) -> Floats:
    """Turn logits into probabilities: softmax, or a sigmoid per label for `multilabel`.

    Args:
        logits: [n, c], any real numbers.
        task: `binary`, `multiclass`, `ordinal` or `multilabel`.
        temperature: logits are divided by it first; above 1 makes the model less sure.

    Raises:
        WaraError: `nonfinite` for a NaN or infinite logit, `usage` for a temperature not above 0.
    """
    z = _finite_logits(logits)
    if not (np.isfinite(temperature) and temperature > 0):
        raise WaraError("usage", f"temperature is {temperature}, must be above 0")
    z = z / temperature
    probs = expit(z) if task == "multilabel" else softmax(z, axis=-1)
    return np.asarray(probs, dtype=np.float64)


def confidence_and_hits(labels: ArrayLike, probs: ArrayLike) -> tuple[Floats, Floats]:
    """Return the pairs that calibration compares, `(confidence, hit)`.

    With class indices as labels [n] that is the top class's probability and whether it was right,
    both [n, 1]. With 0/1 labels [n, c] (multilabel) it is every label's own probability and whether
    the label is there, both [n, c].
    """
    y, p = np.asarray(labels), np.asarray(probs, dtype=np.float64)
    if y.ndim == 2:
        return p, y.astype(np.float64)
    return p.max(axis=1, keepdims=True), (p.argmax(axis=1) == y).astype(np.float64)[:, None]


def bin_index(confidence: ArrayLike, bins: int = BINS) -> NDArray[np.int64]:
    """Return the bin of each probability; bins are (low, high], the first one holds 0 too."""
    inner = np.linspace(0.0, 1.0, bins + 1)[1:-1]
    return np.searchsorted(inner, np.asarray(confidence, dtype=np.float64), side="left")


def reliability_bins(
    confidence: ArrayLike, hits: ArrayLike, *, bins: int = BINS
) -> ReliabilityBins:
    """Sort predictions into equal-width bins.

    Args:
        confidence: predicted probabilities in [0, 1], any shape (flattened).
        hits: 1 where the prediction came true, 0 elsewhere, same shape.
        bins: number of bins between 0 and 1.

    Raises:
        WaraError: `usage` when the shapes differ or a value is outside [0, 1], `nonfinite` for NaN.
    """
    conf = np.asarray(confidence, dtype=np.float64).ravel()
    hit = np.asarray(hits, dtype=np.float64).ravel()
    if conf.shape != hit.shape:
        raise WaraError("usage", f"{conf.size} probabilities but {hit.size} outcomes")
    if not np.isfinite(conf).all():
        raise WaraError("nonfinite", "a probability is NaN or infinite")
    if conf.size and (conf.min() < 0 or conf.max() > 1):
        raise WaraError("usage", "a value outside [0, 1] is no probability")
    index = bin_index(conf, bins)
    count = np.bincount(index, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean_conf = np.bincount(index, weights=conf, minlength=bins) / count
        mean_hit = np.bincount(index, weights=hit, minlength=bins) / count
    return ReliabilityBins(np.linspace(0.0, 1.0, bins + 1), count, mean_conf, mean_hit)


def ece(labels: ArrayLike, probs: ArrayLike, *, bins: int = BINS) -> float:
    """Return the expected calibration error, in [0, 1] (Guo et al. 2017, equation 3).

    Class indices [n]: top-label form, `sum_b (n_b / n) |frequency_b - confidence_b|`. Multilabel
    [n, c]: the same sum per label on that label's probability, then the mean over labels.

    Raises:
        WaraError: as `reliability_bins`, and `data` without images.
    """
    confidence, hits = confidence_and_hits(labels, probs)
    if not confidence.size:
        raise WaraError("data", "no images to compute the calibration error on")
    errors = []
    for conf, hit in zip(confidence.T, hits.T, strict=True):
        table = reliability_bins(conf, hit, bins=bins)
        gap = np.nan_to_num(np.abs(table.frequency - table.confidence))  # empty bins weigh nothing
        errors.append(float(table.count @ gap) / conf.size)
    return float(np.mean(errors))


def fit_temperature(logits: ArrayLike, labels: ArrayLike) -> float:
    """Fit the temperature that minimises the negative log-likelihood, on validation images.

    The loss is convex in `1 / T`, so its slope has one zero, found by bracketing. Ranks, hence
    AUROC and the predicted classes, do not change.

    Args:
        logits: [n, c].
        labels: class indices [n], or 0/1 [n, c] for multilabel (one temperature for all labels).

    Raises:
        WaraError: `nonfinite` for NaN or infinite logits; `usage` when shapes differ; `data` when
            no finite temperature is best (all images right with room to spare, or scores
            that carry no information about the labels).
    """
    from scipy.optimize import brentq

    z, y = _finite_logits(logits), np.asarray(labels)
    if z.ndim != 2 or y.shape not in ((len(z),), z.shape) or not len(z):
        raise WaraError("usage", f"logits {z.shape} do not go with labels {y.shape}")
    scale = float(np.abs(z - (0.0 if y.ndim == 2 else z.mean(axis=1, keepdims=True))).mean())
    if scale == 0.0:
        raise WaraError("data", "all logits are equal: no temperature can be fitted")
    z = z / scale
    truth = y.astype(np.float64) if y.ndim == 2 else np.eye(z.shape[1])[y]

    def slope(log_beta: float) -> float:
        scaled = np.exp(log_beta) * z
        probs = expit(scaled) if y.ndim == 2 else softmax(scaled, axis=1)
        return float(np.sum((probs - truth) * z) / len(z))

    low, high = np.log(1e-3), np.log(1e3)
    at_low, at_high = slope(low), slope(high)
    if at_low >= 0 or at_high <= 0:
        why = (
            "the scores carry no information about the labels"
            if at_low >= 0
            else "every image is classified right, so sharper is always better"
        )
        remedy = "keep temperature 1, or fit on more images"
        raise WaraError("data", f"no finite temperature fits: {why}", remedy=remedy)
    return float(scale / np.exp(brentq(slope, low, high, xtol=1e-10)))


def _finite_logits(logits: ArrayLike) -> Floats:
    z = np.asarray(logits, dtype=np.float64)
    if not np.isfinite(z).all():
        raise WaraError("nonfinite", "a logit is NaN or infinite")
    return z
