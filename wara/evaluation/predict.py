"""Predictions of a model for batches of images, by one arithmetic for all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wara.evaluation.calibration import to_probs
from wara.evaluation.metrics import decide
from wara.evaluation.parts import Parts


@dataclass(frozen=True)
class Predictions:
    """Outputs for the images of a split, in the order of the data set.

    Args:
        index: `[n]`, record numbers.
        labels: `[n]`, or 0/1 `[n, c]` for a multilabel task.
        logits: `[n, c]`, float32.
        probs: `[n, c]`, float64.
        predicted: like `labels`.
    """

    index: NDArray[np.int64]
    labels: NDArray[np.int64]
    logits: NDArray[np.float32]
    probs: NDArray[np.float64]
    predicted: NDArray[np.int64]

    @classmethod
    def of(
        cls,
        index: NDArray[np.int64],
        labels: NDArray[np.int64],
        logits: NDArray[np.float32],
        task: str,
    ) -> Predictions:
        """Complete logits by probabilities and decisions, in the order of `index`."""
        order = np.argsort(index, kind="stable")
        logits = logits[order]
        probs = to_probs(logits, task=task)
        return cls(index[order], labels[order], logits, probs, decide(probs, task=task))


@torch.no_grad()
def predict(
    model: nn.Module,
    batches: Iterable[dict[str, Any]],
    *,
    task: str,
    classes: int,
    pause: Callable[[], None] = lambda: None,
) -> Predictions:
    """Predict in float32, whatever training used: the arithmetic of who loads the adapter.

    Args:
        model: maps images `[b, 3, h, w]` to logits `[b, c]`; set to evaluation mode.
        batches: items `image`, `label` and `index`, see `wara.data.eval_batches`.
        task: `binary | multiclass | multilabel | ordinal`.
        classes: `c`.
        pause: called before each batch; may raise, to stop.

    Raises:
        WaraError: kind `nonfinite` when a logit is not finite, `resources` when memory does not
            suffice for one image; batches that are too large are halved.
    """
    device = next(model.parameters()).device
    model.eval()
    outputs_of = Parts(model)
    logits: list[Tensor] = [torch.zeros(0, classes)]
    labels: list[Tensor] = [torch.zeros((0, classes) if task == "multilabel" else 0).long()]
    index: list[Tensor] = [torch.zeros(0).long()]
    for batch in batches:
        pause()
        logits.append(outputs_of(batch["image"].to(device)).float().cpu())
        labels.append(batch["label"].long())
        index.append(batch["index"])
    order, truth, outputs = (torch.cat(part).numpy() for part in (index, labels, logits))
    return Predictions.of(order, truth, outputs, task)
