"""A bundle made to fit the images of one place: temperature, operating point, thresholds.

The model itself stays byte for byte, and so do the statistics of its training features: a distance
is still one to the training images. What distance counts as "unlike them" becomes the quantile of
the local cases, since those have been looked at, and a scanner that shifts every image a little
would else make the model abstain on all of them. How many local cases the old limit would have
turned away is told.

"After" is told twice. On the very cases that the new numbers were fitted to, which flatters them;
and cross-fitted: cases are cut in five parts by patient, and each part is judged by numbers fitted
to the other four.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import wara
from wara.data.sources import check_apart
from wara.deploy import card
from wara.deploy.bundle import MANIFEST, Bundle, canonical, describe_files, open_bundle, seal
from wara.deploy.labelled import Labelled, Outcome, open_labelled, score
from wara.deploy.models import Model, of_bundle
from wara.deploy.operating import operating_point, positive_classes
from wara.deploy.places import check_outside
from wara.deploy.predictor import Distance, Predictor, positive_score
from wara.deploy.reliability import (
    COVERAGE,
    Scored,
    conformal_threshold,
    distances,
    reliability,
)
from wara.errors import WaraError, WaraErrors
from wara.evaluation.calibration import fit_temperature, to_probs
from wara.evaluation.decisions import decision_measures, is_positive
from wara.evaluation.intervals import clusters, mean_interval, missing
from wara.evaluation.metrics import evaluate
from wara.runs.provenance import utc_now
from wara.storage import new_folder

FEWEST = 50  # cases
FOLDS = 5
PART = "local"
_REWRITTEN = ("reliability.json", "MODEL_CARD.md", MANIFEST)


@dataclass(frozen=True)
class Wanted:
    """The operating point that is asked for; without any of these that of the parent is.

    Args:
        positive: classes that count as positive; none: those of the parent's operating point,
            else those that the card of the cases names.
        sensitivity: that it must reach on the local cases.
        specificity: the same; one of the two.
        bootstrap: resamples behind intervals.
        root: folder below which cases may lie besides that of the data.
    """

    positive: Sequence[str] = ()
    sensitivity: float | None = None
    specificity: float | None = None
    bootstrap: int = 1000
    root: Path | None = None


def calibrate(
    bundle: str | Path,
    data: str,
    out: str | Path,
    wanted: Wanted | None = None,
    *,
    say: Callable[[str], None] = print,
) -> Path:
    """Write a bundle whose temperature and thresholds are fitted to local cases.

    Args:
        bundle: the parent.
        data: at least `FEWEST` labelled images of all classes, see `open_source`.
        out: the new folder; it must not exist.
        wanted: the operating point, if it is to be another one than the parent's.
        say: told what is done.

    Returns:
        `out`.

    Raises:
        WaraError: kind "usage" for too few cases or a class without any, "config" for an operating
            point that cannot be had, "data" when a case cannot be used, "artefact" when the parent
            is damaged. Nothing is left then.
    """
    wanted, out = wanted or Wanted(), Path(out)
    check_outside(out.parent, "--out")
    with new_folder(out) as folder:
        parent = open_bundle(bundle)
        model = of_bundle(Predictor(bundle, abstain_on=()))
        labelled = open_labelled(data, model, root=wanted.root)
        check_apart(out, "--out", labelled.images)
        for note in labelled.images.notes:
            say(f"note: {note}")
        wish = _wish(model, labelled, wanted)
        say(f"asking the model about {len(labelled.indices)} cases")
        outcome = score(model, labelled)
        _check(outcome, model, data)
        say("fitting")
        fit = _Fit(model, outcome, wish, wanted.bootstrap)
        _write(folder, parent, fit, labelled, outcome)
    for line in fit.told():
        say(line)
    return out


def _check(outcome: Outcome, model: Model, data: str) -> None:
    if outcome.faults:
        shown = [WaraError(f.kind, f.what, name, f.remedy) for name, f in outcome.faults[:5]]
        remedy = "mend or remove them: a calibration rests on all of its cases"
        raise WaraErrors([
            WaraError("data", f"{len(outcome.faults)} cases cannot be used", data, remedy), *shown
        ])  # fmt: skip
    labels = outcome.scored.labels
    if len(labels) < FEWEST:
        what = f"{len(labels)} cases; at least {FEWEST} are needed"
        raise WaraError("usage", what, data, "label more of them")
    several = labels.ndim == 2
    with_it = labels.sum(0) if several else np.bincount(labels, minlength=len(model.classes))
    for name, count in zip(model.classes, with_it, strict=True):
        if count == 0 or (several and count == len(labels)):
            counts = ", ".join(
                f"{c} {n}" for c, n in zip(model.classes, map(int, with_it), strict=True)
            )
            what = f"{'every' if count else 'no'} case is of class {name} ({counts})"
            remedy = "add cases, so that each class has some"
            raise WaraError("usage", what, data, remedy)


def _wish(model: Model, labelled: Labelled, wanted: Wanted) -> dict[str, Any]:
    """Return what `operating_point` is asked: what the user wants, else what the parent was."""
    point = model.point
    asked = wanted.sensitivity is not None or wanted.specificity is not None
    own = list(point["positive"]) if point is not None else []
    if asked:
        names = list(wanted.positive) or own or labelled.finding
        return {
            "positive": positive_classes(names, model.classes, model.task),
            "sensitivity": wanted.sensitivity,
            "specificity": wanted.specificity,
        }
    if wanted.positive or point is None:
        return {"positive": list(wanted.positive), "sensitivity": None, "specificity": None}
    return {"positive": own, **point["asked"]}


def _part(scored: Scored, rows: NDArray[Any]) -> Scored:
    patients = [scored.patients[int(i)] for i in np.flatnonzero(rows)]
    return Scored(scored.labels[rows], scored.logits[rows], scored.features[rows], patients)


@dataclass(frozen=True)
class _Numbers:
    """What is fitted: a temperature, a threshold of the operating point, one of sets."""

    temperature: float
    positive: list[str]
    threshold: float | None
    conformal: float | None


class _Fit:
    """The new numbers, and what they are worth on the local cases beside the old ones."""

    def __init__(
        self, model: Model, outcome: Outcome, wish: dict[str, Any], bootstrap: int
    ) -> None:
        self.model, self.scored, self.wish, self.bootstrap = model, outcome.scored, wish, bootstrap
        self.patients = outcome.patients
        self.temperature, self.reason = self._temperature(self.scored)
        self.point = self._point(self.scored, self.temperature, bootstrap)
        before = self._numbers(model.temperature, model.point, model.conformal.value)
        n = len(self.scored.labels)
        self.before = self._worth([(np.ones(n, bool), before)])
        self.cross_fitted = self._worth(list(self._folds()))

    def after(self, trusted: dict[str, Any]) -> dict[str, Any]:
        """Return what the new numbers are worth on the cases that they were fitted to.

        Args:
            trusted: content of the new `reliability.json`.
        """
        numbers = self._numbers(self.temperature, self.point, trusted["conformal"]["threshold"])
        return self._worth([(np.ones(len(self.scored.labels), bool), numbers)])

    def _numbers(
        self, temperature: float, point: dict[str, Any] | None, conformal: float | None
    ) -> _Numbers:
        point = point or {"positive": self.wish["positive"], "threshold": None}
        return _Numbers(temperature, point["positive"], point["threshold"], conformal)

    def _temperature(self, scored: Scored) -> tuple[float, str | None]:
        try:
            return fit_temperature(scored.logits, scored.labels), None
        except WaraError as error:
            return self.model.temperature, f"that of the parent is kept: {error.what}"

    def _point(
        self, scored: Scored, temperature: float, bootstrap: int
    ) -> dict[str, Any] | None:
        return operating_point(
            {PART: scored}, self.model.classes, self.model.task, temperature,
            bootstrap=bootstrap, **self.wish,
        )  # fmt: skip

    def _folds(self) -> Iterator[tuple[NDArray[np.bool_], _Numbers]]:
        """Yield each part of the cases with numbers fitted to the others."""
        cluster = clusters(len(self.scored.labels), self.patients)
        order = np.random.default_rng(0).permutation(int(cluster.max()) + 1)
        fold = order[cluster] % FOLDS
        for k in range(FOLDS):
            held = fold == k
            if not held.any():
                continue
            others = _part(self.scored, ~held)
            temperature, _ = self._temperature(others)
            try:
                point = self._point(others, temperature, 0)
            except WaraError:  # too few of a class are left; told as missing below
                point = None
            probs = to_probs(others.logits, task=self.model.task, temperature=temperature)
            sets, _ = conformal_threshold(probs, others.labels, COVERAGE)
            yield held, self._numbers(temperature, point, sets)

    def _worth(self, parts: Sequence[tuple[NDArray[np.bool_], _Numbers]]) -> dict[str, Any]:
        """Return calibration, decisions and coverage of cases, each judged by its numbers."""
        task, classes, labels = self.model.task, self.model.classes, self.scored.labels
        probs = np.zeros(self.scored.logits.shape)
        called = np.zeros(len(labels), bool)
        inside = np.zeros(len(labels), bool)
        for rows, numbers in parts:
            probs[rows] = to_probs(
                self.scored.logits[rows], task=task, temperature=numbers.temperature
            )
            if numbers.threshold is not None:
                index = [classes.index(name) for name in numbers.positive]
                called[rows] = positive_score(probs[rows], index, task) >= numbers.threshold
            if numbers.conformal is not None and labels.ndim == 1:
                own = probs[rows, labels[rows]]
                inside[rows] = 1 - own <= numbers.conformal
        options: Any = {"patients": self.patients, "bootstrap": self.bootstrap}
        n = len(labels)
        found = {
            "nll": mean_interval(_nll(labels, probs), **options),
            "ece": evaluate(labels, probs, task=task, classes=classes, **options)["ece"],
        }
        positive = parts[0][1].positive
        if positive:
            truth = is_positive(labels, [classes.index(c) for c in positive])
            measures = decision_measures(truth, called, seed=0, **options)
            none = any(numbers.threshold is None for _, numbers in parts)
            for name in ("sensitivity", "specificity"):
                found[name] = missing("no threshold", n) if none else measures[name]
        sets = all(numbers.conformal is not None for _, numbers in parts)
        why = missing("no conformal sets", n)
        found["coverage"] = mean_interval(inside, **options) if sets else why
        return found

    def told(self) -> Iterator[str]:
        """Yield lines that say what was fitted."""
        yield f"temperature {self.model.temperature:.3f} -> {self.temperature:.3f}"
        old = self.model.point["threshold"] if self.model.point else None
        if self.point is not None:
            before = "none" if old is None else f"{old:.4f}"
            yield f"threshold {before} -> {self.point['threshold']:.4f}"
        for name, entry in self.before.items():
            after = self.cross_fitted[name]
            if entry["value"] is not None and after["value"] is not None:
                yield f"{name} {entry['value']:.3f} -> {after['value']:.3f} (cross-fitted)"
        if (warning := self.warning()) is not None:
            yield f"WARNING: {warning}"

    def warning(self) -> str | None:
        """Return what speaks against the new temperature, if anything does."""
        old, new = self.before["nll"]["value"], self.cross_fitted["nll"]["value"]
        if new <= old:
            return None
        return (
            f"the probabilities of the parent fit new cases better (negative log-likelihood "
            f"{old:.3f}, cross-fitted {new:.3f}): use more cases, or keep the parent"
        )


def _nll(labels: NDArray[np.int64], probs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the negative log-likelihood of each image, in nats; of labels apart their mean."""
    tiny = np.finfo(float).tiny
    if labels.ndim == 1:
        return -np.log(np.maximum(probs[np.arange(len(labels)), labels], tiny))
    own = np.where(labels == 1, probs, 1 - probs)
    return -np.log(np.maximum(own, tiny)).mean(axis=1)


def _write(
    folder: Path, parent: Bundle, fit: _Fit, labelled: Labelled, outcome: Outcome
) -> None:
    """Copy the parent, but for what was fitted."""
    for name in parent.manifest["files"]:
        if name not in _REWRITTEN:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(parent.folder / name, folder / name)
    statistics = parent.read("reliability.npz")
    trusted = reliability({PART: fit.scored}, statistics, fit.temperature, fit.model.task)
    (folder / "reliability.json").write_bytes(canonical(trusted))
    old = parent.read_json("reliability.json")["ood"]["threshold"]
    far = distances(Distance(statistics), fit.scored.features)
    images = labelled.images
    manifest = {
        **parent.manifest,
        "created": utc_now(),
        "synthetic": parent.manifest["synthetic"] or images.synthetic,
        "temperature": fit.temperature,
        "temperature_reason": fit.reason,
        "operating_point": fit.point,
        "reliability": {"file": "reliability.json", "rates": trusted["rates"]},
        "parent": {"sha256": parent.model_hash, "created": parent.manifest["created"]},
        "calibration": {
            "wara": wara.__version__,
            "cases": len(outcome.indices),
            "patients": None if outcome.patients is None else len(set(outcome.patients) - {None}),
            "synthetic": images.synthetic,
            "sha256": outcome.sha256,
            "temperature": {"before": fit.model.temperature, "after": fit.temperature},
            "threshold": {
                "before": fit.model.point["threshold"] if fit.model.point else None,
                "after": fit.point["threshold"] if fit.point else None,
            },
            "beyond_old_limit": (
                missing("the parent has no limit", len(far)) if old is None else
                mean_interval(far > old, outcome.patients, bootstrap=fit.bootstrap)
            ),
            "positive": {
                "before": fit.model.point["positive"] if fit.model.point else None,
                "after": fit.point["positive"] if fit.point else None,
            },
            "before": fit.before,
            "after": fit.after(trusted),
            "cross_fitted": fit.cross_fitted,
            "warning": fit.warning(),
        },
    }  # fmt: skip
    del manifest["files"], manifest["sha256"]
    (folder / "MODEL_CARD.md").write_text(card.markdown(manifest), encoding="utf-8")
    manifest["files"] = describe_files(folder)
    (folder / MANIFEST).write_bytes(canonical(seal(manifest)))
    open_bundle(folder)
