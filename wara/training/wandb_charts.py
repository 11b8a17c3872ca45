"""W&B's own charts and tables from the numbers of a run; none shows an image or a patient."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_curve, roc_curve

from wara.evaluation.calibration import confidence_and_hits, reliability_bins
from wara.evaluation.plots import one_against_rest
from wara.training.tracking import key_of

MOST_ROWS = 10_000
"""Of a table behind a chart; W&B shows no more."""


def charts(
    labels: NDArray[np.int64],
    probs: NDArray[np.float64],
    predicted: NDArray[np.int64],
    classes: Sequence[str],
    title: str,
) -> dict[str, Any]:
    """Return ROC, precision-recall, confusion and reliability as W&B charts, by key.

    Args:
        labels: class indices `[n]`, or 0/1 `[n, c]` for a multilabel task.
        probs: `[n, c]`.
        predicted: as `labels`.
        classes: c names.
        title: of the split, such as `Test`.
    """
    return {
        "roc": _curves(labels, probs, classes, f"{title} ROC", "fpr", "tpr"),
        "pr": _curves(labels, probs, classes, f"{title} precision and recall", "recall",
                      "precision"),
        "reliability": _reliability(labels, probs, f"{title} reliability"),
        **_confusion(labels, predicted, classes, f"{title} confusion"),
    }  # fmt: skip


def _curves(
    labels: NDArray[np.int64],
    probs: NDArray[np.float64],
    classes: Sequence[str],
    title: str,
    x: str,
    y: str,
) -> Any:
    # Not wandb.plot.roc_curve and pr_curve: where a class has no image, they give the classes
    # behind it the probabilities of another, and they draw the precision higher than it is.
    import wandb

    roc = x == "fpr"
    found, _ = one_against_rest(labels, probs, classes, need_negatives=roc)
    rows: list[list[Any]] = []
    for name, truth, score in found:
        if roc:
            across, up, _ = roc_curve(truth, score)
        else:
            up, across, _ = precision_recall_curve(truth, score)
        kept = _thinned(len(across), MOST_ROWS // len(found))
        rows += [[name, float(across[i]), float(up[i])] for i in kept]
    words = {"fpr": "1 - specificity", "tpr": "sensitivity"}
    return wandb.plot_table(
        vega_spec_name="wandb/area-under-curve/v0",
        data_table=wandb.Table(columns=["class", x, y], data=rows),
        fields={"x": x, "y": y, "class": "class"},
        string_fields={
            "title": title, "x-axis-title": words.get(x, x), "y-axis-title": words.get(y, y)
        },
    )  # fmt: skip


def _thinned(count: int, most: int) -> list[int]:
    """Return at most `most` of `count` places, evenly spread, with both ends."""
    places = np.linspace(0, count - 1, min(count, most))
    return sorted({int(place) for place in places.round()})


def _reliability(labels: NDArray[np.int64], probs: NDArray[np.float64], title: str) -> Any:
    import wandb

    bins = reliability_bins(*confidence_and_hits(labels, probs))
    filled = bins.count > 0
    return wandb.plot.line_series(
        xs=[[0.0, 1.0], bins.confidence[filled].tolist()],
        ys=[[0.0, 1.0], bins.frequency[filled].tolist()],
        keys=["perfect", "observed"],
        title=title,
        xname="predicted probability",
    )


def _confusion(
    labels: NDArray[np.int64], predicted: NDArray[np.int64], classes: Sequence[str], title: str
) -> dict[str, Any]:
    import wandb

    def matrix(truth: Any, called: Any, names: Sequence[str], words: str) -> Any:
        return wandb.plot.confusion_matrix(
            y_true=truth.tolist(), preds=called.tolist(), class_names=list(names), title=words
        )

    if labels.ndim == 1:
        return {"confusion": matrix(labels, predicted, classes, title)}
    # The chart is for one label per image; several labels get one chart each.
    return {
        f"confusion_{key_of(name)}": matrix(
            labels[:, k], predicted[:, k], [f"no {name}", name], f"{title}, {name}"
        )
        for k, name in enumerate(classes)
    }


def update_tables(
    energy: Mapping[str, Mapping[str, float]],
    spectra: Mapping[str, Mapping[str, Sequence[float]]],
    plots: Path,
) -> dict[str, Any]:
    """Return what the adapter learnt as W&B tables and pictures, by key.

    Args:
        energy: layer -> subband -> energy; empty for a method without subbands.
        spectra: layer -> subband -> singular values; empty for a method without low rank.
        plots: folder with the figures of the run.
    """
    import wandb

    numbers: dict[str, tuple[list[str | int], list[list[Any]]]] = {
        "subband_energy": (
            ["layer", "subband", "energy"],
            [[n, b, _finite(e)] for n, bands in energy.items() for b, e in bands.items()],
        ),
        "singular_values": (
            ["layer", "subband", "index", "value"],
            [
                [n, b, i, _finite(v)]
                for n, bands in spectra.items()
                for b, values in bands.items()
                for i, v in enumerate(values, start=1)
            ],
        ),
    }
    found: dict[str, Any] = {}
    for name, (columns, rows) in numbers.items():
        if rows:
            found[f"{name}_table"] = wandb.Table(columns=columns, data=rows)
        picture = plots / f"{name}.png"
        if rows and picture.is_file():
            found[name] = wandb.Image(str(picture))
    return found


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
