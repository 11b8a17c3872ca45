"""95 % bootstrap intervals, clustered by patient.

A replicate draws as many patients as there are, with replacement, and takes all their images.
It is never materialised: it is a column of multiplicities, and every metric is written for
multiplicities (matrix products, and one sort per class for AUROC), so a thousand replicates of
twenty metrics take seconds. The tests hold each form against scikit-learn on real resamples.

A replicate in which a metric is undefined (no image of a class was drawn) is left out for that
metric. An interval is given only when it means something; `interval_faults` lists when not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wara.evaluation.calibration import BINS, bin_index, confidence_and_hits

MIN_DEFINED = 0.5  # share of replicates on which a metric must be defined
_CELLS = 1 << 20  # images x replicates held at once: 8 MB, stays near the cache

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def clusters(n: int, patients: Sequence[str | None] | None) -> Ints:
    """Return the cluster index of each of `n` images.

    Images of one patient share a cluster; an image without a patient is a cluster of its own.
    """
    if patients is None:
        return np.arange(n)
    # The flag keeps an image without patient apart from a patient with such a name.
    keys = [(p is not None, str(i) if p is None else str(p)) for i, p in enumerate(patients)]
    index = {key: at for at, key in enumerate(sorted(set(keys)))}
    return np.array([index[key] for key in keys], dtype=np.int64)


def draw_counts(cluster: Ints, replicates: int, seed: int) -> Iterator[Floats]:
    """Yield multiplicities of images, [n, some replicates] at a time, `replicates` in all.

    The draws depend on the seed and the number of clusters alone: two methods evaluated on the
    same images see the same resamples.
    """
    groups = int(cluster.max()) + 1
    rng = np.random.default_rng(seed)
    step = max(1, _CELLS // max(len(cluster), 1))
    for start in range(0, replicates, step):
        size = min(step, replicates - start)
        drawn = rng.integers(groups, size=(size, groups)) * size + np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=groups * size).reshape(groups, size)
        yield counts.astype(np.float64)[cluster]


def weighted_auc(scores: Floats, positive: NDArray[np.bool_], counts: Floats) -> Floats:
    """Return the AUROC of each replicate (Mann-Whitney form, ties count one half).

    Args:
        scores: [n].
        positive: [n].
        counts: [n, replicates], multiplicity of each image.

    Returns:
        [replicates]; NaN where positives or negatives are missing.
    """
    order = np.argsort(scores, kind="stable")
    is_pos, w = positive[order], counts[order]
    first = np.flatnonzero(np.concatenate([[True], np.diff(scores[order]) != 0]))
    pos, neg = w * is_pos[:, None], w * ~is_pos[:, None]
    if len(first) < len(w):
        pos, neg = np.add.reduceat(pos, first, axis=0), np.add.reduceat(neg, first, axis=0)
    below = np.cumsum(neg, axis=0)
    total = pos.sum(axis=0) * below[-1]
    below -= neg / 2
    wins = np.einsum("gr,gr->r", pos, below)
    return np.divide(wins, total, out=np.full(len(total), np.nan), where=total > 0)


def replicate_auc(
    positive: NDArray[np.bool_], probs: Floats, counts: Floats, *, task: str
) -> Floats:
    """Return the one-vs-rest AUROC of every class in each replicate.

    Args:
        positive: [n, c], one-hot labels, or the labels of a multilabel task.
        probs: [n, c].
        counts: [n, replicates], multiplicity of each image.
        task: `binary`, `multiclass`, `ordinal` or `multilabel`.

    Returns:
        [c, replicates]; NaN where a class has no image, or all of them.
    """
    # With two classes both one-vs-rest AUCs are one number; one score keeps rounding out of it.
    score = np.stack([-probs[:, 1], probs[:, 1]], axis=1) if task == "binary" else probs
    columns = zip(score.T, positive.T, strict=True)
    return np.stack([weighted_auc(one, among, counts) for one, among in columns])


def replicate_metrics(
    labels: Ints,
    probs: Floats,
    predicted: NDArray[np.bool_],
    counts: Floats,
    *,
    task: str,
    classes: Sequence[str],
) -> dict[str, Floats]:
    """Return every metric of each replicate, by the definitions of `wara.evaluation.metrics`.

    Args:
        labels: class indices [n], or 0/1 [n, c] for multilabel.
        probs: [n, c].
        predicted: [n, c], one-hot top class, or the labels at or above the threshold.
        counts: [n, replicates], multiplicity of each image.
        task: `binary`, `multiclass`, `ordinal` or `multilabel`.
        classes: c names.

    Returns:
        Metric name -> [replicates], NaN where undefined.
    """
    many = task == "multilabel"
    c = len(classes)
    positive = labels.astype(bool) if many else np.eye(c, dtype=bool)[labels]
    total = counts.sum(axis=0)

    def weigh(columns: NDArray[Any]) -> Floats:  # [n, k] -> [k, replicates]
        return np.asarray(columns.T.astype(np.float64) @ counts)

    pos, called, hit = weigh(positive), weigh(predicted), weigh(positive & predicted)
    neg = total - pos
    correct_no = neg - (called - hit)
    with np.errstate(divide="ignore", invalid="ignore"):
        sensitivity, specificity = hit / pos, correct_no / neg
        f1 = np.where(pos > 0, 2 * hit / (pos + called), np.nan)
    auc = replicate_auc(positive, probs, counts, task=task)

    confidence, hits = confidence_and_hits(labels, probs)
    gaps = np.zeros_like(total)
    for conf, came in zip(confidence.T, hits.T, strict=True):
        in_bin = np.eye(BINS)[bin_index(conf)] * (came - conf)[:, None]
        gaps += np.abs(weigh(in_bin)).sum(axis=0)
    squares = ((probs - positive) ** 2).sum(axis=1, keepdims=True)

    values = {
        "auc_macro": auc.mean(axis=0),
        "accuracy": ((hit + correct_no).mean(axis=0) if many else hit.sum(axis=0)) / total,
        "balanced_accuracy": ((sensitivity + specificity) / 2 if many else sensitivity).mean(
            axis=0
        ),
        "f1_macro": f1.mean(axis=0),
    }
    if task == "ordinal":
        values["qwk"] = _kappa(labels, predicted.argmax(axis=1), pos, weigh)
    values["ece"] = gaps / (total * confidence.shape[1])
    # scikit-learn's convention: the sum over classes, halved for two; labels are averaged.
    values["brier"] = weigh(squares)[0] / total / {"multilabel": c, "binary": 2}.get(task, 1)
    for k, name in enumerate(classes):
        values[f"auc_{name}"] = auc[k]
        values[f"sensitivity_{name}"] = sensitivity[k]
        values[f"specificity_{name}"] = specificity[k]
    return values


def _kappa(
    labels: Ints, grades: Ints, pos: Floats, weigh: Callable[[NDArray[Any]], Floats]
) -> Floats:
    """Return quadratic kappa, `1 - E(y - g)^2 / E(y - g')^2` with y and g' independent."""
    y, g = labels.astype(np.float64), grades.astype(np.float64)
    total = pos.sum(axis=0)
    moments = weigh(np.stack([y, g, y * y, g * g, (y - g) ** 2], axis=1)) / total
    chance = moments[2] + moments[3] - 2 * moments[0] * moments[1]
    several = (pos > 0).sum(axis=0) > 1
    return 1 - np.divide(
        moments[4], chance, out=np.full(len(total), np.nan), where=several & (chance > 0)
    )


def interval_faults(
    labels: Ints, cluster: Ints, *, task: str, classes: Sequence[str], by_patient: bool
) -> dict[str, str]:
    """Name the metrics whose bootstrap interval would mean nothing, with the reason.

    That is every metric when there is one patient, and the metrics that need a class (or its
    complement) which one patient alone has: all resamples then repeat that patient.
    """
    many, c = task == "multilabel", len(classes)
    unit = "patient" if by_patient else "image"
    positive = labels.astype(bool) if many else np.eye(c, dtype=bool)[labels]
    with_class = [len(np.unique(cluster[positive[:, k]])) for k in range(c)]
    without = [len(np.unique(cluster[~positive[:, k]])) for k in range(c)]

    few = {
        name: f"no interval: only one {unit} for class {name}" if with_class[k] < 2 else ""
        for k, name in enumerate(classes)
    }
    few_others = {
        name: f"no interval: only one {unit} without class {name}" if without[k] < 2 else ""
        for k, name in enumerate(classes)
    }
    either = {name: few[name] or few_others[name] for name in classes}

    def first(faults: dict[str, str]) -> str:
        return next(filter(None, faults.values()), "")

    faults = {
        "auc_macro": first(either),
        "balanced_accuracy": first(either if many else few),
        "f1_macro": first(few),
    }
    for name in classes:
        faults[f"auc_{name}"] = either[name]
        faults[f"sensitivity_{name}"] = few[name]
        faults[f"specificity_{name}"] = few_others[name]
    if cluster.max(initial=0) == 0:
        general = ["accuracy", "qwk", "ece", "brier", *faults]
        return dict.fromkeys(general, f"no interval: only one {unit}")
    return {name: why for name, why in faults.items() if why}


def percentile_interval(
    replicates: Floats, value: float, *, recentre: bool = False
) -> tuple[float | None, float | None, str | None]:
    """Return `(low, high, None)`, the 2.5 and 97.5 percentiles, or `(None, None, reason)`.

    Args:
        replicates: the metric of each replicate, NaN where undefined (left out).
        value: the metric of the data itself.
        recentre: shift the replicates so that their mean is `value`, floor 0. For ECE: resampling
            adds noise, noise adds calibration error, and the plain percentiles may lie wholly
            above the value they belong to.
    """
    defined = replicates[~np.isnan(replicates)]
    if len(defined) < max(2, MIN_DEFINED * len(replicates)):
        share = f"{len(defined)} of {len(replicates)}"
        return None, None, f"no interval: defined in {share} bootstrap replicates"
    if recentre:
        defined = np.maximum(defined - (defined.mean() - value), 0.0)
    low, high = (float(edge) for edge in np.percentile(defined, [2.5, 97.5]))
    if high - low < 1e-12:
        # 5 of 5 right is no proof of [1, 1]: resampling cannot show an error it never saw.
        return None, None, "no interval: every bootstrap replicate gives the same value"
    return low, high, None


def missing(reason: str, n: int) -> dict[str, Any]:
    """Return the entry of a measure that is not defined, with the reason."""
    return {"value": None, "low": None, "high": None, "n": n, "reason": reason}


def with_interval(
    value: float, n: int, replicates: Floats | None, *, recentre: bool = False
) -> dict[str, Any]:
    """Return the entry of a measure, `{"value", "low", "high", "n", "reason"}`.

    Args:
        value: of the data itself.
        n: number of images it is computed on.
        replicates: its value in each resample; None without resamples.
        recentre: see `percentile_interval`.
    """
    entry = missing("no interval: bootstrap is 0", n) | {"value": value}
    if replicates is None:
        return entry
    low, high, reason = percentile_interval(replicates, value, recentre=recentre)
    return entry | {"low": low, "high": high, "reason": reason}


def mean_interval(
    values: NDArray[Any],
    patients: Sequence[str | None] | None,
    *,
    bootstrap: int,
    seed: int = 0,
) -> dict[str, Any]:
    """Return the mean of a number per image with its 95 % interval over patients.

    Args:
        values: [n]; 0 and 1 for a share.
        patients: one id per image; None where not known.
        bootstrap: number of replicates; 0 gives no interval.
        seed: of the resampling.

    Returns:
        See `with_interval`; null with a reason without images.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if not len(numbers):
        return missing("no image to compute it on", 0)
    cluster, draws = clusters(len(numbers), patients), None
    if bootstrap:
        counted = draw_counts(cluster, bootstrap, seed)
        draws = np.concatenate([numbers @ counts / counts.sum(axis=0) for counts in counted])
    return with_interval(float(numbers.mean()), len(numbers), draws)
