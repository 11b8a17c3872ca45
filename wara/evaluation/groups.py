"""Metrics of groups of images, and how far groups lie apart.

All groups are resampled together, patient by patient, so that a patient with images in two groups
is in both or in neither, and differences between groups get intervals of their own.

Two comparisons are made. The *difference* of a group is its value minus that of all other known
groups together; its interval is meant for reading. The *gap* is the largest value minus the
smallest. It is above 0 by chance alone, and resampling adds to that, so its interval is shifted
to lie around the gap itself and cut at 0, as that of the calibration error is.

The calibration error is no metric of groups: the fewer images, the larger it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wara.evaluation import intervals
from wara.evaluation.decisions import MEASURES, decision_measures, replicate_measures
from wara.evaluation.metrics import decide, evaluate

SMALLEST = 20  # images; a group of fewer has no metrics
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Entry = dict[str, Any]


@dataclass(frozen=True)
class Judged:
    """Images with what is true of them and what was said.

    Args:
        labels: class indices [n], or 0/1 [n, c] for multilabel.
        probs: [n, c].
        task: see `wara.evaluation.metrics`.
        classes: c names.
        decisions: what is true and what was decided at the operating point, [n] each.
        patients: one id per image, where known.
        bootstrap: number of replicates behind intervals; 0 gives none.
        seed: of the resampling.
    """

    labels: NDArray[np.int64]
    probs: Floats
    task: str
    classes: Sequence[str]
    decisions: tuple[Bools, Bools] | None
    patients: Sequence[str | None] | None
    bootstrap: int = 1000
    seed: int = 0

    @property
    def group_metrics(self) -> list[str]:
        """Names of the metrics that groups have."""
        names = ["auc_macro", "balanced_accuracy", "accuracy"]
        names += (["qwk"] if self.task == "ordinal" else []) + ["brier"]
        return names + (list(MEASURES) if self.decisions is not None else [])

    def metrics(self, mask: Bools) -> dict[str, Entry]:
        """Return every metric of the images of a mask [n], with intervals."""
        known = self.patients
        people = None if known is None else [known[int(i)] for i in np.flatnonzero(mask)]
        options: Any = {"patients": people, "bootstrap": self.bootstrap, "seed": self.seed}
        labels, probs = self.labels[mask], self.probs[mask]
        found = evaluate(labels, probs, task=self.task, classes=self.classes, **options)
        if self.decisions is not None:
            truth, called = self.decisions
            found |= decision_measures(truth[mask], called[mask], **options)
        return found

    def replicates(self, masks: Mapping[str, Bools]) -> dict[str, dict[str, Floats]]:
        """Return mask -> metric -> its value in each resample of all images."""
        cluster = intervals.clusters(len(self.probs), self.patients)
        drawn = intervals.draw_counts(cluster, self.bootstrap, self.seed)
        parts = [{key: self._weighted(mask, counts) for key, mask in masks.items()}
                 for counts in drawn]  # fmt: skip
        return {
            key: {name: np.concatenate([p[key][name] for p in parts]) for name in parts[0][key]}
            for key in masks
        }

    def _weighted(self, mask: Bools, counts: Floats) -> dict[str, Floats]:
        labels, probs, some = self.labels[mask], self.probs[mask], counts[mask]
        decided = decide(probs, task=self.task)
        picked = decided if decided.ndim == 2 else np.eye(len(self.classes))[decided]
        with np.errstate(invalid="ignore", divide="ignore"):  # a resample may hold none of them
            found = intervals.replicate_metrics(
                labels, probs, picked.astype(bool), some, task=self.task, classes=self.classes
            )
        if self.decisions is not None:
            truth, called = self.decisions
            found |= replicate_measures(truth[mask], called[mask], some)
        return found


def compare_groups(
    images: Judged, groups: Mapping[str, Bools], *, unknown: str | None = None
) -> dict[str, Any]:
    """Return the metrics of each group, its difference to the rest, and the gap of all groups.

    Args:
        images: all of them.
        groups: name -> [n], which images are of the group.
        unknown: name of the group of images of which nothing is known; it is compared with no
            other.

    Returns:
        `groups`: name -> `n`, `patients`, `metrics` and `difference`, both metric -> `{"value",
        "low", "high", "n", "reason"}`; `gap`: metric -> the same with `highest` and `lowest`.
    """
    names = images.group_metrics
    large = {g: mask for g, mask in groups.items() if mask.sum() >= SMALLEST}
    compared = {g: mask for g, mask in large.items() if g != unknown}
    every = np.any(list(compared.values()), axis=0) if compared else np.zeros(0, bool)
    rest = {g: every & ~mask for g, mask in compared.items()} if len(compared) > 1 else {}
    own = {g: images.metrics(mask) for g, mask in large.items()}
    others = {g: images.metrics(mask) for g, mask in rest.items()}
    draws = images.replicates(compared) if images.bootstrap else {}
    rest_draws = images.replicates(rest) if images.bootstrap else {}

    table = {}
    for g, mask in groups.items():
        n = int(mask.sum())
        few = intervals.missing(f"fewer than {SMALLEST} images", n)
        alone = intervals.missing("no other group to compare with", n) if g in large else few
        table[g] = {
            "n": n,
            "patients": _count(images.patients, mask),
            "metrics": {name: own[g][name] if g in large else few for name in names},
            "difference": {
                name: _difference(
                    own[g][name],
                    others[g][name],
                    draws[g][name] - rest_draws[g][name] if draws else None,
                )
                if g in rest
                else alone
                for name in names
            },
        }
    gaps = {
        name: _gap(
            {g: own[g][name] for g in compared}, {g: found[name] for g, found in draws.items()}
        )
        for name in names
    }
    return {"groups": table, "gap": gaps}


def _count(patients: Sequence[str | None] | None, mask: Bools) -> int | None:
    """Return how many patients a mask shows; None where patients are not known."""
    if patients is None:
        return None
    return len(np.unique(intervals.clusters(len(mask), patients)[mask]))


def _difference(own: Entry, rest: Entry, draws: Floats | None) -> Entry:
    n = int(own["n"])
    for entry, whose in ((own, "this group"), (rest, "the other groups")):
        if entry["value"] is None:
            return intervals.missing(f"{whose}: {entry['reason']}", n)
    value = own["value"] - rest["value"]
    return _without_fault(intervals.with_interval(value, n, draws), (own, rest))


def _gap(entries: Mapping[str, Entry], draws: Mapping[str, Floats]) -> Entry:
    values = {g: entry["value"] for g, entry in entries.items() if entry["value"] is not None}
    n = sum(int(entries[g]["n"]) for g in values)
    if len(values) < 2:
        why = "fewer than two groups have a value"
        return intervals.missing(why, n) | {"highest": None, "lowest": None}
    highest, lowest = max(values, key=values.__getitem__), min(values, key=values.__getitem__)
    spread = None
    if draws:
        each = np.stack([draws[g] for g in values])
        spread = each.max(axis=0) - each.min(axis=0)
    gap = values[highest] - values[lowest]
    found = intervals.with_interval(gap, n, spread, recentre=True)
    found = _without_fault(found, [entries[g] for g in values])
    return found | {"highest": highest, "lowest": lowest}


def _without_fault(entry: Entry, parts: Sequence[Entry]) -> Entry:
    """Take the interval away where that of a part would mean nothing: one patient decides it."""
    fault = next((p["reason"] for p in parts if "only one" in (p["reason"] or "")), None)
    return entry | {"low": None, "high": None, "reason": fault} if fault else entry
