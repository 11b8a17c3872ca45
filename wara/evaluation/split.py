"""One split, predicted and scored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from wara.evaluation.metrics import evaluate, metric_names
from wara.evaluation.predict import Predictions, predict

Scores = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Split:
    """One evaluated split.

    Args:
        found: predictions.
        files: name of each image.
        patients: who each image shows; None where not known.
        scores: metrics with intervals.
    """

    found: Predictions
    files: list[str]
    patients: list[str | None]
    scores: Scores


def evaluate_split(
    model: nn.Module,
    batches: Iterable[dict[str, Any]],
    records: Sequence[Any],
    *,
    task: str,
    classes: Sequence[str],
    name: str,
    bootstrap: int,
    seed: int,
    pause: Callable[[], None] = lambda: None,
) -> Split:
    """Predict the images of a split and score them.

    Args:
        model: in the state to judge.
        batches: of the split, see `wara.data.eval_batches`.
        records: all of the data set, with `file` and `patient`.
        task: `binary | multiclass | multilabel | ordinal`.
        classes: names of the outputs, in order.
        name: `val` or `test`.
        bootstrap: resamples behind the intervals.
        seed: of the bootstrap.
        pause: called before each batch; may raise, to stop.
    """
    found = predict(model, batches, task=task, classes=len(classes), pause=pause)
    files = [records[i].file for i in found.index]
    patients = [records[i].patient for i in found.index]
    if not files:
        reason = f"there are no {name} images"
        nothing = {"value": None, "low": None, "high": None, "n": 0, "reason": reason}
        scores = {metric: dict(nothing) for metric in metric_names(task, classes)}
        return Split(found, files, patients, scores)
    scores = evaluate(
        found.labels,
        found.probs,
        task=task,
        classes=classes,
        patients=None if set(patients) == {None} else patients,
        bootstrap=bootstrap,
        seed=seed,
    )
    return Split(found, files, patients, scores)
