"""Loss functions, per image, and the rule that chooses one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from wara.data.balance import class_weights, imbalance_ratio, positive_weights
from wara.errors import WaraError, WaraErrors
from wara.evaluation.metrics import metric_names

IMBALANCE = 3.0
HEAVY = 20.0
"""A weight above this lets single images steer the training, which is said."""
LOSSES = ("ce", "weighted_ce", "focal", "bce")


def resolve_loss(loss: str, task: str, counts: Sequence[int]) -> tuple[str, str]:
    """Choose the loss and say why.

    Args:
        loss: `auto` or one of `LOSSES`.
        task: `binary | multiclass | multilabel | ordinal`.
        counts: training images per class.

    Returns:
        The name of the loss, and the reason as printed in the plan.

    Raises:
        WaraError: kind "config", when the loss does not fit the task.
    """
    ratio = imbalance_ratio(np.asarray(counts))
    if loss == "auto":
        if task == "multilabel":
            return "bce", "several labels per image"
        if ratio > IMBALANCE:
            return "weighted_ce", f"classes are {ratio:.1f} : 1, above {IMBALANCE:g} : 1"
        return "ce", f"classes are {ratio:.1f} : 1, not above {IMBALANCE:g} : 1"
    if task == "multilabel" and loss in ("ce", "weighted_ce"):
        raise WaraError(
            "config", f"loss '{loss}' needs exactly one label per image", "loss",
            "use bce, focal or auto for a multilabel data set",
        )  # fmt: skip
    if task != "multilabel" and loss == "bce":
        raise WaraError(
            "config", "loss 'bce' is for several labels per image", "loss",
            f"use ce, weighted_ce, focal or auto, for the task is {task}",
        )  # fmt: skip
    return loss, "chosen in the config"


def check_options(loss: str, task: str, *, smoothing: float, monitor: str) -> None:
    """Refuse options that the loss or the task has no use for.

    Args:
        loss: `auto` or one of `LOSSES`.
        task: `binary | multiclass | multilabel | ordinal`.
        smoothing: label smoothing.
        monitor: metric that picks the best epoch.

    Raises:
        WaraErrors: kind "config".
    """
    faults = []
    used = "bce" if loss == "auto" and task == "multilabel" else loss
    if smoothing and used in ("focal", "bce"):
        faults.append(
            WaraError(
                "config", f"loss '{used}' takes no label smoothing", "label_smoothing",
                "set it to 0, or use ce or weighted_ce for a data set with one label per image",
            )
        )  # fmt: skip
    metrics = [name for name in metric_names(task, ()) if name not in ("ece", "brier")]
    if monitor not in metrics:
        faults.append(
            WaraError(
                "config", f"'{monitor}' is not defined where the task is {task}", "monitor",
                f"use one of {', '.join(metrics)}",
            )
        )  # fmt: skip
    if faults:
        raise WaraErrors(faults)


def loss_weights(
    loss: str,
    task: str,
    counts: Sequence[int],
    images: int,
    *,
    classes: Sequence[str],
    most: float | None,
) -> tuple[Tensor | None, str]:
    """Weights that go with the loss, and how the plan says it.

    `weighted_ce` has class weights. `auto` on a multilabel task weights the positives of each
    label when one of them has more than 3 negatives to a positive; a chosen `bce` is plain.

    Args:
        loss: as in the config, or resolved.
        task: of the data set.
        counts: training images per class (positives per label).
        images: training images.
        classes: `c` names.
        most: largest weight; None leaves them as the counts make them.

    Returns:
        float32 `[c]`, or None for a loss without weights; and the words, empty without weights.
    """
    tally = np.asarray(counts)
    if loss == "weighted_ce":
        return _weights(class_weights(tally), "class weights", classes, most)
    if loss == "auto" and task == "multilabel":
        weights = positive_weights(tally, images)
        if weights.max() > IMBALANCE:
            return _weights(weights, "positives weighted", classes, most)
    return None, ""


def _weights(
    wanted: NDArray[Any], noun: str, classes: Sequence[str], most: float | None
) -> tuple[Tensor, str]:
    """Return the weights that train, and the words: their range, the heavy ones, the cut ones."""
    weights = wanted if most is None else wanted.clip(max=most)
    words = f", {noun} {weights.min():.2g} to {weights.max():.3g}"
    heavy = [
        f"{name} {want:.3g}"
        + (f" cut to {weight:.3g} by max_class_weight" if want > weight else "")
        for name, want, weight in zip(classes, wanted, weights, strict=True)
        if want > HEAVY or want > weight
    ]
    if heavy:
        more = f" and {len(heavy) - 6} more" if len(heavy) > 6 else ""
        words += f", few images weigh much: {', '.join(heavy[:6])}{more}"
    return torch.from_numpy(weights.astype(np.float32)), words


def loss_per_image(
    logits: Tensor,
    labels: Tensor,
    *,
    loss: str,
    weights: Tensor | None = None,
    gamma: float = 2.0,
    smoothing: float = 0.0,
) -> Tensor:
    """Loss of every image, float32 `[b]`.

    The mean over a batch is the plain mean, also for `weighted_ce`: dividing by the sum of the
    weights in the batch, as `torch.nn.CrossEntropyLoss` does, would undo the weights in a batch
    of one class and make the loss depend on how a batch is cut over processes.

    Args:
        logits: `[b, c]`.
        labels: class numbers `[b]`, or 0/1 `[b, c]` for a multilabel task.
        loss: one of `LOSSES`. `focal` is Lin et al. 2017, eq. 4: `(1 - p_t)^gamma` times the cross
            entropy; with labels `[b, c]` it is taken per class over sigmoids and averaged.
        weights: class weights `[c]` for `weighted_ce`; the weight of the true class multiplies.
            For `bce` weights of the positives `[c]`, or None.
        gamma: focusing exponent of `focal`.
        smoothing: label smoothing of `ce` and `weighted_ce`, in [0, 1).
    """
    logits = logits.float()
    if labels.ndim == 2:
        positive = weights.to(logits) if weights is not None and loss == "bce" else None
        bce = F.binary_cross_entropy_with_logits(
            logits, labels.float(), reduction="none", pos_weight=positive
        )
        if loss == "focal":
            bce = (1 - torch.exp(-bce)).pow(gamma) * bce
        return bce.mean(dim=1)
    if loss == "focal":
        ce = F.cross_entropy(logits, labels, reduction="none")
        return (1 - torch.exp(-ce)).clamp_min(0).pow(gamma) * ce
    ce = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    if loss == "weighted_ce":
        if weights is None:
            raise ValueError("weighted_ce needs class weights")
        ce = ce * weights.to(ce)[labels]
    return ce
