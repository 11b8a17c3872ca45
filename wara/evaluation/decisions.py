"""Positive or negative: operating points, their measures with intervals, and decision curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wara.errors import WaraError
from wara.evaluation.intervals import clusters, draw_counts, missing, with_interval

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
MEASURES = ("sensitivity", "specificity", "ppv", "npv")


def is_positive(labels: NDArray[np.int64], positive: Sequence[int]) -> Bools:
    """Return for each image whether it is of one of the positive classes, `[n]`.

    Args:
        labels: class indices `[n]`, or 0/1 `[n, c]` for multilabel tasks.
        positive: indices of the classes.
    """
    if labels.ndim == 2:
        return np.asarray(labels[:, list(positive)].any(axis=1))
    return np.isin(labels, list(positive))


def choose_threshold(
    scores: Floats,
    truth: Bools,
    *,
    sensitivity: float | None,
    specificity: float | None,
    images: str = "validation",
) -> float:
    """Return the threshold that reaches one of the two, and gives away least of the other.

    Positive is a score at or above it. It lies half-way between neighbouring scores, so that
    rounding decides nothing.

    Args:
        scores: `[n]`, of images that the model did not learn from.
        truth: `[n]`.
        sensitivity: wanted, 0 to 1.
        specificity: wanted, 0 to 1; one of the two is None.
        images: what a refusal calls the images.

    Raises:
        WaraError: kind "config" when no threshold that tells images apart reaches it, with the
            highest that one does; or when there are no images with or without the class.
    """
    if not len(truth) or truth.all() or not truth.any():
        missing = "without" if truth.any() else "with"
        what = f"no {images} image {missing} the positive class: no operating point"
        raise WaraError("config", what, "--positive", "choose another class, or leave it out")
    values = np.unique(scores)
    cuts = (values[1:] + values[:-1]) / 2  # calling all images alike is no operating point
    reached = {
        "sensitivity": 1 - np.searchsorted(np.sort(scores[truth]), cuts) / truth.sum(),
        "specificity": np.searchsorted(np.sort(scores[~truth]), cuts) / (~truth).sum(),
    }
    name, wanted = ("sensitivity", sensitivity) if specificity is None else (
        "specificity", specificity
    )  # fmt: skip
    other = reached["specificity" if name == "sensitivity" else "sensitivity"]
    enough = np.flatnonzero(reached[name] >= float(wanted or 0) - 1e-12)
    if not len(enough):
        best = f"; the highest is {reached[name].max():.3f}" if len(cuts) else ""
        what = f"no threshold reaches a {name} of {wanted} on {images} images{best}"
        raise WaraError("config", what, f"--{name}", "ask for less, or train further")
    return float(cuts[enough[np.argmax(other[enough])]])


def decision_measures(
    truth: Bools,
    called: Bools,
    *,
    patients: Sequence[str | None] | None,
    bootstrap: int,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Return sensitivity, specificity, PPV and NPV with 95 % intervals over patients.

    Args:
        truth: `[n]`.
        called: `[n]`, what was decided.
        patients: who the images show, where known.
        bootstrap: resamples; 0 gives no intervals.
        seed: of the resamples.

    Returns:
        For each of `MEASURES` value, low, high, n (its denominator) and reason, null where not
        defined.
    """
    parts: list[dict[str, Floats]] = []
    if bootstrap and len(truth):
        resamples = draw_counts(clusters(len(truth), patients), bootstrap, seed)
        parts = [replicate_measures(truth, called, counts) for counts in resamples]
    found = {}
    for name, (hit, base) in _sides(truth, called).items():
        n = int(base.sum())
        if n:
            draws = np.concatenate([part[name] for part in parts]) if parts else None
            found[name] = with_interval(float(hit.sum() / n), n, draws)
        else:
            found[name] = missing("no image to compute it on", 0)
    return found


def replicate_measures(truth: Bools, called: Bools, counts: Floats) -> dict[str, Floats]:
    """Return each of `MEASURES` for resamples, NaN where not defined.

    Args:
        truth: `[n]`.
        called: `[n]`.
        counts: `[n, replicates]`, multiplicity of each image.

    Returns:
        Measure -> `[replicates]`.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            name: (hit @ counts) / (base @ counts)
            for name, (hit, base) in _sides(truth, called).items()
        }


def _sides(truth: Bools, called: Bools) -> dict[str, tuple[Floats, Floats]]:
    """Return for each measure what counts as a hit, and what is counted."""
    pairs = {
        "sensitivity": (truth & called, truth),
        "specificity": (~truth & ~called, ~truth),
        "ppv": (truth & called, called),
        "npv": (~truth & ~called, ~called),
    }
    return {name: (hit.astype(float), base.astype(float)) for name, (hit, base) in pairs.items()}


def net_benefit(scores: Floats, truth: Bools, thresholds: Floats) -> dict[str, Floats]:
    """Return net benefit of the model, of treating all and of treating none.

    Vickers & Elkin, "Decision curve analysis" (2006): `TP/n - FP/n · t / (1 - t)`.

    Args:
        scores: calibrated probabilities of being positive, `[n]`.
        truth: `[n]`.
        thresholds: probabilities `t` at which one would treat, `[k]`, each in (0, 1).

    Returns:
        `model`, `all`, `none`, each `[k]`.
    """
    odds = thresholds / (1 - thresholds)
    called = scores[None, :] >= thresholds[:, None]
    share = truth.mean()
    return {
        "model": (called & truth).mean(1) - (called & ~truth).mean(1) * odds,
        "all": share - (1 - share) * odds,
        "none": np.zeros_like(thresholds),
    }
