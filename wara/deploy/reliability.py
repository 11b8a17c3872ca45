"""How far a model is to be believed: temperature, conformal sets, distance to what it was shown."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wara.deploy.predictor import Distance, conformal_set
from wara.errors import WaraError
from wara.evaluation.calibration import ece, fit_temperature, to_probs

COVERAGE = 0.9
OOD_QUANTILE = 0.99
Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Scored:
    """Images of one split, as the served graph sees them.

    Args:
        labels: class indices `[n]`, or 0/1 `[n, c]`.
        logits: `[n, c]`.
        features: `[n, d]`.
        patients: who they show.
    """

    labels: NDArray[np.int64]
    logits: Floats
    features: Floats
    patients: Sequence[str | None]


def temperature_of(scored: Scored) -> tuple[float, str | None]:
    """Return the temperature, or 1 with the reason why none could be fitted."""
    try:
        return fit_temperature(scored.logits, scored.labels), None
    except WaraError as error:
        return 1.0, f"temperature 1: {error.what}"


def conformal_threshold(
    probs: Floats, labels: NDArray[np.int64], coverage: float
) -> tuple[float | None, str | None]:
    """Return the quantile of split conformal prediction, or the reason why there is none.

    The score of an image is `1 - p` of its true class; the quantile is the
    `⌈(n + 1) coverage⌉`-th smallest (Sadinle et al. 2019; Angelopoulos & Bates 2021, section 1).

    Args:
        probs: `[n, c]`, of images that the model did not learn from.
        labels: class indices `[n]`; other forms have no conformal set.
        coverage: wanted share of sets that hold the true class.
    """
    if labels.ndim == 2:
        return None, "labels are not exclusive: a set of classes would mean nothing"
    n = len(labels)
    place = math.ceil((n + 1) * coverage)
    if place > n:
        return None, f"{n} images are too few for a coverage of {coverage:g}"
    scores = np.sort(1 - probs[np.arange(n), labels])
    return float(scores[place - 1]), None


def feature_statistics(scored: Scored) -> bytes:
    """Return class means and whitening of training features, as an `.npz` without pickles.

    The covariance within classes is shrunk as Ledoit and Wolf do (2004), which keeps it invertible
    where there are fewer images than features. Classes without images have no mean; multilabel
    tasks have one mean for all.
    """
    from sklearn.covariance import LedoitWolf

    features = scored.features.astype(np.float64)
    if scored.labels.ndim == 2:
        index = np.zeros(len(features), np.int64)
    else:
        index = scored.labels
    kinds = np.unique(index)
    means = np.stack([features[index == kind].mean(0) for kind in kinds])
    centred = features - means[np.searchsorted(kinds, index)]
    found = LedoitWolf(assume_centered=True).fit(centred)
    # Of the precision P a factor W with WᵀW = P, so that a distance is that of white features.
    whitening = np.linalg.cholesky(found.precision_).T
    stream = io.BytesIO()
    np.savez(stream, means=means.astype(np.float32), whitening=whitening.astype(np.float32))
    return stream.getvalue()


def reliability(
    parts: Mapping[str, Scored], statistics: bytes, temperature: float, task: str
) -> dict[str, Any]:
    """Return the content of `reliability.json`.

    Args:
        parts: images that the model did not learn from, by the name of the part: thresholds are
            chosen on the first one, rates are measured on all.
        statistics: of the training features.
        temperature: of the probabilities.
        task: see `to_probs`.
    """
    first, chosen_on = next(iter(parts.items()))
    probs = to_probs(chosen_on.logits, task=task, temperature=temperature)
    threshold, reason = conformal_threshold(probs, chosen_on.labels, COVERAGE)
    distance = Distance(statistics)
    scores = {name: distances(distance, part.features) for name, part in parts.items()}
    own = np.sort(scores[first])
    limit = float(np.quantile(own, OOD_QUANTILE)) if len(own) else None
    rates = {}
    for name, scored in parts.items():
        rates[name] = {
            "n": len(scored.labels),
            "ood": _share(scores[name] > limit) if limit is not None else None,
            **_conformal_rates(scored, threshold, temperature, task),
            "ece_before": _ece(scored, 1.0, task),
            "ece_after": _ece(scored, temperature, task),
        }
    return {
        "temperature": temperature,
        "chosen_on": first,
        "conformal": {"coverage": COVERAGE, "threshold": threshold, "reason": reason},
        "ood": {
            "file": "reliability.npz",
            "quantile": OOD_QUANTILE,
            "threshold": limit,
            "reason": None if limit is not None else f"no {first} images",
            "validation_scores": [round(float(s), 4) for s in np.quantile(
                own, np.linspace(0, 1, min(len(own), 1001)))] if len(own) else [],
        },
        "rates": rates,
    }  # fmt: skip


def distances(distance: Distance, features: Floats) -> Floats:
    """Return the distance to the training images of features `[n, d]`, `[n]`."""
    return np.array([distance(row) for row in features])


def _share(hits: NDArray[np.bool_]) -> float | None:
    return round(float(hits.mean()), 4) if len(hits) else None


def _conformal_rates(
    scored: Scored, threshold: float | None, temperature: float, task: str
) -> dict[str, float | None]:
    if threshold is None or not len(scored.labels):
        return {"coverage": None, "set_size": None, "ambiguous": None}
    probs = to_probs(scored.logits, task=task, temperature=temperature)
    sets = [conformal_set(row, threshold) or [] for row in probs]
    return {
        "coverage": _share(np.array([y in s for y, s in zip(scored.labels, sets, strict=True)])),
        "set_size": round(float(np.mean([len(s) for s in sets])), 4),
        "ambiguous": _share(np.array([len(s) != 1 for s in sets])),
    }


def _ece(scored: Scored, temperature: float, task: str) -> float | None:
    if not len(scored.labels):
        return None
    probs = to_probs(scored.logits, task=task, temperature=temperature)
    return round(ece(scored.labels, probs), 6)
