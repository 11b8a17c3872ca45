"""Final metrics of a run, each with a 95 % interval, or null with a reason in words.

Definitions (c classes, n images). Point values come from scikit-learn.

* `auc_<class>`: one-vs-rest AUROC; needs an image with and one without the class.
  `auc_macro`: their unweighted mean (scikit-learn `multi_class="ovr", average="macro"`).
* `accuracy`: share of images whose top class is right. Multilabel: share of right labels, averaged
  over images and labels (1 - Hamming loss, as MedMNIST reports it). High by itself when findings
  are rare; read it with `balanced_accuracy`.
* `balanced_accuracy`: mean sensitivity over classes. Multilabel: mean over labels of
  (sensitivity + specificity) / 2.
* `f1_macro`: unweighted mean of the F1 of each class.
* `qwk`: Cohen's kappa with quadratic weights on the class index; ordinal tasks only.
* `ece`: expected calibration error, 15 equal bins, top label; multilabel: mean over labels.
* `brier`: mean squared error of the probabilities. Binary and multilabel: 0 to 1. Multiclass and
  ordinal: summed over classes, 0 to 2 (scikit-learn's `brier_score_loss`).
* `sensitivity_<class>`, `specificity_<class>`: at the top class, multilabel at probability >= 0.5.

Nothing is averaged over "the classes that happened to be there": a macro metric is null when one
class has no image, and the reason names the class. `n` is the number of images the metric is
computed on: images of the class for sensitivity, the others for specificity, all images elsewhere.

Intervals are percentiles of a bootstrap over patients (`wara.evaluation.intervals`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from wara.errors import WaraError, suggest
from wara.evaluation import intervals
from wara.evaluation.calibration import ece

TASKS = ("binary", "multiclass", "multilabel", "ordinal")
THRESHOLD = 0.5  # multilabel: a label is predicted at or above this probability
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def check_inputs(
    labels: ArrayLike, probs: ArrayLike, *, task: str, classes: Sequence[str]
) -> tuple[Ints, Floats]:
    """Refuse what no metric can be computed on; return labels (int64) and probs (float64).

    Args:
        labels: class indices [n], or 0/1 [n, c] for multilabel.
        probs: [n, c], rows sum to 1 except for multilabel.
        task: one of `TASKS`.
        classes: c names.

    Raises:
        WaraError: `usage` for an unknown task, wrong shapes or values that are no probabilities,
            `data` for no images or labels outside the classes, `nonfinite` for NaN.
    """
    if task not in TASKS:
        raise WaraError("usage", f"unknown task {task!r}", remedy=suggest(task, TASKS))
    c = len(classes)
    if c < (1 if task == "multilabel" else 2) or (task == "binary" and c != 2):
        raise WaraError("usage", f"a {task} task cannot have {c} classes")
    if len(set(classes)) < c or "macro" in classes:
        raise WaraError("usage", "class names must be unique, and none may be 'macro'")
    y, p = np.asarray(labels), np.asarray(probs, dtype=np.float64)
    if p.ndim != 2 or p.shape[1] != c:
        raise WaraError("usage", f"probabilities have shape {p.shape}, expected [n, {c}]")
    if y.shape != (p.shape if task == "multilabel" else p.shape[:1]):
        shape = f"[{len(p)}, {c}]" if task == "multilabel" else f"[{len(p)}]"
        raise WaraError("usage", f"labels have shape {y.shape}, expected {shape}")
    if y.dtype.kind not in "biuf":
        raise WaraError("usage", f"labels are {y.dtype}, expected class indices")
    if not len(p):
        raise WaraError("data", "no images to evaluate")
    for name, array in (("probabilities", p), ("labels", y)):
        bad = np.flatnonzero(~np.isfinite(array).reshape(len(p), -1).all(axis=1))
        if len(bad):
            where = f"first in row {bad[0]}"
            raise WaraError("nonfinite", f"{name} of {len(bad)} images are not finite", where)
    top = 1 if task == "multilabel" else c - 1
    if (y != np.floor(y)).any() or y.min() < 0 or y.max() > top:
        raise WaraError("data", f"labels must be whole numbers from 0 to {top}")
    if p.min() < 0 or p.max() > 1 + 1e-6:
        raise WaraError(
            "usage",
            "values outside [0, 1] are no probabilities",
            remedy="pass softmax or sigmoid outputs, not logits",
        )
    if task != "multilabel" and np.abs(p.sum(axis=1) - 1).max() > 1e-3:
        raise WaraError(
            "usage",
            "rows of probabilities do not sum to 1",
            remedy="pass softmax outputs, or use task multilabel",
        )
    return y.astype(np.int64), np.clip(p, 0.0, 1.0)


def decide(probs: ArrayLike, *, task: str) -> Ints:
    """Return predictions: the top class [n], or 0/1 [n, c] at `THRESHOLD` for multilabel."""
    p = np.asarray(probs)
    if task == "multilabel":
        return (p >= THRESHOLD).astype(np.int64)
    return p.argmax(axis=1).astype(np.int64)


def metric_names(task: str, classes: Sequence[str]) -> list[str]:
    """Return the metric names of a task in the order in which they are reported."""
    names = ["auc_macro", "accuracy", "balanced_accuracy", "f1_macro"]
    names += (["qwk"] if task == "ordinal" else []) + ["ece", "brier"]
    for kind in ("auc", "sensitivity", "specificity"):
        names += [f"{kind}_{name}" for name in classes]
    return names


def point_metrics(
    labels: ArrayLike, probs: ArrayLike, *, task: str, classes: Sequence[str]
) -> dict[str, float | None]:
    """Return every metric without interval, None where undefined: the per-epoch form of `evaluate`.

    Raises:
        WaraError: see `check_inputs`.
    """
    y, p = check_inputs(labels, probs, task=task, classes=classes)
    values, _, _ = _points(y, p, task, classes)
    return values


def evaluate(
    labels: ArrayLike,
    probs: ArrayLike,
    *,
    task: str,
    classes: Sequence[str],
    patients: Sequence[str | None] | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Return every metric of the task with its 95 % interval.

    Args:
        labels: class indices [n], or 0/1 [n, c] for multilabel.
        probs: [n, c]; softmax, or sigmoid per label for multilabel.
        task: `binary` (c = 2), `multiclass`, `ordinal` or `multilabel`.
        classes: c names, used in the metric names.
        patients: one id per image; resampled as a whole. None: every image by itself.
        bootstrap: number of replicates; 0 gives no intervals.
        seed: of the resampling; the same seed and patients give the same resamples.

    Returns:
        Name -> `{"value", "low", "high", "n", "reason"}`, plain numbers ready for JSON. `reason` is
        None when all three numbers are there, else it says why `value`, or only the interval, is
        missing.

    Raises:
        WaraError: see `check_inputs`; `usage` when `patients` has another length.
    """
    y, p = check_inputs(labels, probs, task=task, classes=classes)
    if patients is not None and len(patients) != len(p):
        raise WaraError("usage", f"{len(patients)} patients for {len(p)} images")
    if bootstrap < 0:
        raise WaraError("usage", f"bootstrap is {bootstrap}", remedy="use 0 or more replicates")
    values, reasons, sizes = _points(y, p, task, classes)

    cluster = intervals.clusters(len(p), patients)
    faults = intervals.interval_faults(
        y, cluster, task=task, classes=classes, by_patient=patients is not None
    )
    replicates: dict[str, Floats] = {}
    if bootstrap and cluster.max() > 0:
        picked = as_columns(decide(p, task=task), task, len(classes))
        parts = [
            intervals.replicate_metrics(y, p, picked, counts, task=task, classes=classes)
            for counts in intervals.draw_counts(cluster, bootstrap, seed)
        ]
        replicates = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    report: dict[str, dict[str, Any]] = {}
    for name in metric_names(task, classes):
        value, reason = values[name], reasons.get(name)
        low = high = None
        if value is not None:
            reason = faults.get(name) if bootstrap else "no interval: bootstrap is 0"
            if reason is None:
                low, high, reason = intervals.percentile_interval(
                    replicates[name], value, recentre=name == "ece"
                )
        n = sizes.get(name, len(p))
        report[name] = {"value": value, "low": low, "high": high, "n": n, "reason": reason}
    return report


def as_columns(y: Ints, task: str, c: int) -> NDArray[np.bool_]:
    """Return labels or predictions [n], or [n, c] of a multilabel task, one column a class."""
    return y.astype(bool) if task == "multilabel" else np.eye(c, dtype=bool)[y]


def _points(
    y: Ints, p: Floats, task: str, classes: Sequence[str]
) -> tuple[dict[str, float | None], dict[str, str], dict[str, int]]:
    """Return values, reasons of the undefined ones, and image counts that differ from n."""
    # A second of import that nobody should wait for who only looks at a plan.
    from sklearn.metrics import cohen_kappa_score, f1_score, roc_auc_score

    many, c = task == "multilabel", len(classes)
    positive = as_columns(y, task, c)
    decision = decide(p, task=task)
    picked = as_columns(decision, task, c)
    has = positive.sum(axis=0)
    lacks = len(y) - has
    values: dict[str, float | None] = dict.fromkeys(metric_names(task, classes))
    reasons: dict[str, str] = {}
    sizes: dict[str, int] = {}

    for k, name in enumerate(classes):
        none_has, all_have = f"no image of class {name}", f"every image is of class {name}"
        auc, sens, spec = f"auc_{name}", f"sensitivity_{name}", f"specificity_{name}"
        sizes[sens], sizes[spec] = int(has[k]), int(lacks[k])
        if has[k]:
            values[sens] = float(picked[positive[:, k], k].mean())
        else:
            reasons[sens] = reasons[auc] = none_has
        if lacks[k]:
            values[spec] = float((~picked)[~positive[:, k], k].mean())
        else:
            reasons[spec] = reasons[auc] = all_have
        if has[k] and lacks[k]:
            # Two classes have one AUROC; one score for both keeps rounding out of it.
            score = p[:, k] if task != "binary" else p[:, 1] * (1 if k else -1)
            values[auc] = float(roc_auc_score(positive[:, k], score))

    def macro(parts: list[str], why: str) -> float | None:
        numbers = [values[part] for part in parts]
        missing = [reasons[part] for part in parts if values[part] is None]
        if missing:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            reasons[why] = "; ".join(missing[:5]) + more
            return None
        return float(np.mean([number for number in numbers if number is not None]))

    sensitivities = [f"sensitivity_{name}" for name in classes]
    specificities = [f"specificity_{name}" for name in classes]
    values["auc_macro"] = macro([f"auc_{name}" for name in classes], "auc_macro")
    values["accuracy"] = float((picked == positive).mean() if many else (decision == y).mean())
    values["balanced_accuracy"] = macro(
        sensitivities + (specificities if many else []), "balanced_accuracy"
    )
    if macro(sensitivities, "f1_macro") is not None:
        values["f1_macro"] = float(f1_score(positive, picked, average="macro", zero_division=0))
    if task == "ordinal":
        if len(np.unique(y)) > 1:
            kappa = cohen_kappa_score(y, decision, labels=range(c), weights="quadratic")
            values["qwk"] = float(kappa)
        else:
            reasons["qwk"] = f"every image is of class {classes[y[0]]}"
    values["ece"] = ece(y, p)
    squares = ((p - positive) ** 2).sum(axis=1)
    values["brier"] = float(squares.mean()) / {"multilabel": c, "binary": 2}.get(task, 1)
    return values, reasons, sizes
