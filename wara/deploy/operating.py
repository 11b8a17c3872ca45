"""The operating point of a bundle: what is positive, from which score on, and what it is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from wara.deploy.predictor import positive_score
from wara.deploy.reliability import Scored
from wara.errors import WaraError, suggest
from wara.evaluation.calibration import to_probs
from wara.evaluation.decisions import choose_threshold, decision_measures, is_positive

PARTS = ("validation", "test", "local")  # names of images that an operating point is measured on


def point_classes(
    classes: Sequence[str],
    task: str,
    *,
    positive: Sequence[str],
    finding: Sequence[str] = (),
    sensitivity: float | None,
    specificity: float | None,
) -> list[str]:
    """Return the classes that count as positive, none when no operating point was asked for.

    Args:
        classes: names of the outputs.
        task: see `to_probs`.
        positive: classes that the user names.
        finding: those of the card, where the user names none.
        sensitivity: asked for.
        specificity: asked for.

    Raises:
        WaraError: kind "config" for an unknown class, or when what is asked for is no point.
    """
    if sensitivity is None and specificity is None:
        if positive:
            remedy = "give --sensitivity or --specificity too"
            raise WaraError("config", "--positive alone sets no threshold", "", remedy)
        return []
    if sensitivity is not None and specificity is not None:
        raise WaraError("config", "sensitivity and specificity", "", "ask for one of the two")
    asked = sensitivity if specificity is None else specificity
    if not 0 < float(asked or 0) <= 1:
        raise WaraError("config", f"{asked} is no share", "", "give a number above 0, at most 1")
    return positive_classes(positive or finding, classes, task)


def operating_point(
    parts: Mapping[str, Scored],
    classes: Sequence[str],
    task: str,
    temperature: float,
    *,
    positive: Sequence[str],
    sensitivity: float | None,
    specificity: float | None,
    bootstrap: int,
) -> dict[str, Any] | None:
    """Choose a threshold on the first part of the images, and measure it on every part.

    Args:
        parts: images that the model did not learn from, by the name of the part, such as
            `validation` and `test`.
        classes: names of the outputs.
        task: see `to_probs`.
        temperature: of the probabilities.
        positive: classes that count as positive.
        sensitivity: asked for.
        specificity: asked for; without either there is no operating point.
        bootstrap: resamples of the intervals.

    Returns:
        What was asked, the threshold of the score, and the measures; None when none was asked for.

    Raises:
        WaraError: as `point_classes`, and when no threshold reaches what was asked.
    """
    chosen = point_classes(
        classes, task, positive=positive, sensitivity=sensitivity, specificity=specificity
    )
    if not chosen:
        return None
    index = [classes.index(name) for name in chosen]
    scored = {
        name: (
            positive_score(to_probs(part.logits, task=task, temperature=temperature), index, task),
            is_positive(part.labels, index),
        )
        for name, part in parts.items()
    }
    first = next(iter(parts))
    threshold = choose_threshold(
        *scored[first], sensitivity=sensitivity, specificity=specificity, images=first
    )
    measures = {
        name: decision_measures(
            truth,
            scores >= threshold,
            patients=parts[name].patients,
            bootstrap=bootstrap,
            seed=0,
        )
        for name, (scores, truth) in scored.items()
        if len(truth)
    }
    return {
        "positive": chosen,
        "asked": {"sensitivity": sensitivity, "specificity": specificity},
        "threshold": threshold,
        **measures,
    }


def positive_classes(asked: Sequence[str], classes: Sequence[str], task: str) -> list[str]:
    """Return the classes that count as positive.

    Args:
        asked: names; which class is the finding, no order of classes tells.
        classes: names of the outputs.
        task: see `to_probs`.

    Raises:
        WaraError: kind "config" for an unknown class, none or all of them.
    """
    chosen = list(dict.fromkeys(asked))
    if not chosen:
        what = "which classes are positive?"
        raise WaraError("config", what, "--positive", f"name some of: {', '.join(classes)}")
    for name in chosen:
        if name not in classes:
            remedy = suggest(name, classes)
            raise WaraError("config", f"no class '{name}'", "--positive", remedy)
    if set(chosen) == set(classes) and task != "multilabel":
        raise WaraError("config", "every class is positive", "--positive", "leave one out")
    return chosen
