"""Whether the exported model says what the run said: logits, ranks and decisions compared."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from wara.errors import WaraError
from wara.evaluation.calibration import to_probs
from wara.evaluation.metrics import decide, point_metrics

LARGEST = 1e-4  # difference of a float32 logit
MOST_FLIPS = 0.02  # share of decisions that int8 may change
Floats = NDArray[np.floating[Any]]


def compare(
    labels: NDArray[np.int64], run: Floats, served: Floats, *, task: str, classes: list[str]
) -> dict[str, Any]:
    """Compare logits of one split.

    Args:
        labels: class indices `[n]`, or 0/1 `[n, c]`.
        run: what the run recorded, `[n, c]`.
        served: what the exported model gives, `[n, c]`.
        task: `binary | multiclass | multilabel | ordinal`.
        classes: names of the outputs.

    Returns:
        Number of images, largest difference of a logit, change of macro AUROC (null where it is
        not defined), number of changed decisions.
    """
    if not len(run):
        return {"n": 0, "largest_difference": None, "auc_change": None, "flipped": 0}
    one, two = (to_probs(logits, task=task) for logits in (run, served))
    aucs = [point_metrics(labels, p, task=task, classes=classes)["auc_macro"] for p in (one, two)]
    differ = decide(one, task=task) != decide(two, task=task)
    flipped = differ.any(axis=1) if differ.ndim == 2 else differ
    before, after = aucs
    return {
        "n": len(run),
        "largest_difference": float(np.abs(run - served).max()),
        "auc_change": None if before is None or after is None else after - before,
        "flipped": int(flipped.sum()),
    }


def certify(splits: dict[str, dict[str, Any]], *, int8: bool) -> dict[str, Any]:
    """Return the certificate of an export, or refuse it.

    Args:
        splits: of each split what `compare` returns.
        int8: whether the model was quantised; then decisions count, not logits.

    Raises:
        WaraError: kind "artefact" when the exported model is another one.
    """
    n = sum(split["n"] for split in splits.values())
    flips = sum(split["flipped"] for split in splits.values())
    largest = max((s["largest_difference"] or 0.0 for s in splits.values()), default=0.0)
    certificate = {
        "limit": {"flipped_share": MOST_FLIPS} if int8 else {"largest_difference": LARGEST},
        "images": n,
        "largest_difference": largest,
        "flipped": flips,
        "flipped_share": flips / n if n else None,
        "splits": splits,
    }
    if int8 and n and flips > MOST_FLIPS * n:
        what = f"int8 changes {flips} of {n} decisions, more than {MOST_FLIPS:.0%}"
        raise WaraError("artefact", what, "--int8", "export without --int8")
    if not int8 and largest > LARGEST:
        what = f"the exported model differs from the run by {largest:.2g} in a logit"
        remedy = "export with the versions and on the machine of the run"
        raise WaraError("artefact", what, f"limit {LARGEST:g}", remedy)
    return certificate
