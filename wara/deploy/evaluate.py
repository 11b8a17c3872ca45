"""What a model is worth on images of somewhere else: numbers, rows, figures, a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import wara
from wara.data.sources import check_apart
from wara.deploy import evaluation_report
from wara.deploy.columns import UNKNOWN, By, groups_of, names_of, parse_by
from wara.deploy.labelled import Labelled, Outcome, open_labelled, score
from wara.deploy.models import Model, open_model
from wara.deploy.operating import PARTS, positive_classes
from wara.deploy.places import check_outside
from wara.deploy.predictor import conformal_set, positive_score
from wara.deploy.reliability import distances
from wara.errors import WaraError
from wara.evaluation import clinical_plots, plots
from wara.evaluation.decisions import MEASURES, is_positive, net_benefit
from wara.evaluation.groups import Judged, compare_groups
from wara.evaluation.intervals import mean_interval
from wara.evaluation.metrics import decide, metric_names
from wara.runs.provenance import utc_now
from wara.storage import new_folder, write_csv, write_json

BOOTSTRAP = 1000
_THRESHOLDS = np.arange(1, 100) / 100
_NO_POINT = "the model has no operating point; export it with --sensitivity or --specificity"


@dataclass(frozen=True)
class Request:
    """What is asked of an evaluation.

    Args:
        by: columns that make groups, `site` or `age:40,60`.
        split: the part of the set to take, where it has parts of its own.
        positive: classes that count as positive in the decision curve, where the model has no
            operating point; none: those that the card names.
        batch_size: images at a time.
        bootstrap: resamples behind intervals.
        allow_partial: whether images that cannot be used are no failure.
        root: folder below which images may lie besides that of the data.
    """

    by: Sequence[str] = ()
    split: str | None = None
    positive: Sequence[str] = ()
    batch_size: int = 16
    bootstrap: int = BOOTSTRAP
    allow_partial: bool = False
    root: Path | None = None


def evaluate(
    path: str | Path,
    data: str,
    out: str | Path,
    request: Request | None = None,
    *,
    say: Callable[[str], None] = print,
) -> Path:
    """Evaluate a bundle or a run on labelled images.

    Args:
        path: of a bundle or of a finished run.
        data: a card, a table or a folder, see `wara.data.sources.open_source`.
        out: the new folder; it must not exist. It gets `metrics.json`, `predictions.csv`,
            `figures/`, `report.md` and `report.html`.
        request: what is asked of it.
        say: told what is done.

    Returns:
        `out`.

    Raises:
        WaraError: kind "usage" for what cannot be asked, "artefact" for a damaged model, "data"
            for data that do not fit it; also, after everything was written, when some images could
            not be used.
    """
    request, out = request or Request(), Path(out)
    check_outside(out.parent, "--out")
    with new_folder(out) as folder:
        model = open_model(path)
        labelled = open_labelled(data, model, split=request.split, root=request.root)
        columns = labelled.images.columns
        by = [parse_by(word, list(columns)) for word in dict.fromkeys(request.by)]
        # Before the model is asked: a slip in --by should not cost an hour.
        for column in by:
            groups_of(column, [columns[column.column][i] for i in labelled.indices])
        _positive(model, labelled, request.positive)
        check_apart(out, "--out", labelled.images)
        for note in labelled.images.notes:
            say(f"note: {note}")
        say(f"asking the model about {len(labelled.indices)} images")
        outcome = score(model, labelled, batch_size=request.batch_size)
        found = _Findings(model, labelled, outcome, request)
        say("computing intervals")
        content = found.content(by)
        write_json(folder / "metrics.json", content)
        _write_rows(folder / "predictions.csv", found, by)
        _draw(folder / "figures", found, content)
        evaluation_report.write(folder, content)
    faults = len(outcome.faults)
    if faults and not request.allow_partial:
        what = f"{faults} of {faults + len(outcome.indices)} images could not be used"
        remedy = "see the column `error`; --allow-partial makes that no failure"
        raise WaraError("data", what, str(out / "predictions.csv"), remedy)
    return out


def _positive(model: Model, labelled: Labelled, asked: Sequence[str]) -> list[str]:
    """Return the classes that count as positive; none where nobody says so."""
    if model.point is not None:
        own = list(model.point["positive"])
        if asked and list(asked) != own:
            what = f"the operating point of the model is of: {', '.join(own)}"
            raise WaraError("usage", what, "--positive", "leave it out")
        return own
    names = asked or labelled.finding
    return positive_classes(names, model.classes, model.task) if names else []


class _Findings:
    """What is known of each image once the model has been asked."""

    def __init__(
        self, model: Model, labelled: Labelled, outcome: Outcome, request: Request
    ) -> None:
        self.model, self.labelled, self.outcome = model, labelled, outcome
        scored = outcome.scored
        self.labels: NDArray[np.int64] = scored.labels
        self.probs = model.probabilities(scored.logits)
        self.predicted = decide(self.probs, task=model.task)
        self.positive = _positive(model, labelled, request.positive)
        index = [model.classes.index(name) for name in self.positive]
        self.scores = positive_score(self.probs, index, model.task) if index else None
        self.truth = is_positive(self.labels, index) if index else None
        self.decided: NDArray[np.bool_] | None = None
        if model.point is not None and self.scores is not None:
            self.decided = self.scores >= model.point["threshold"]
        self.sets = [conformal_set(row, model.conformal.value) for row in self.probs]
        self.ood: NDArray[Any] | None = None
        self.abstained: NDArray[np.bool_] | None = None
        if model.distance is not None:
            self.ood = distances(model.distance, scored.features)
            if model.ood.value is not None:
                self.abstained = self.ood > model.ood.value
        self.bootstrap = request.bootstrap
        decisions = None
        if self.truth is not None and self.decided is not None:
            decisions = (self.truth, self.decided)
        self.judged = Judged(
            self.labels, self.probs, model.task, model.classes, decisions, outcome.patients,
            self.bootstrap,
        )  # fmt: skip

    @property
    def synthetic(self) -> bool:
        """Whether the images, or those that the model learnt from, were drawn."""
        return self.model.synthetic or self.labelled.images.synthetic

    def content(self, by: Sequence[By]) -> dict[str, Any]:
        """Return the content of `metrics.json`."""
        names = metric_names(self.model.task, self.model.classes)
        everything = self.judged.metrics(np.ones(len(self.probs), bool))
        return {
            "synthetic": self.synthetic,
            "wara": wara.__version__,
            "created": utc_now(),
            "model": self._model(),
            "data": self._data(),
            "bootstrap": self.bootstrap,
            "metrics": {name: everything[name] for name in names},
            "reference": self.model.reference,
            "operating_point": self._point(everything),
            "decision_curve": self._curve(),
            "abstention": self._abstention(),
            "conformal": self._conformal(),
            "by": {word: self._groups(column) for word, column in _named(by).items()},
        }

    def _model(self) -> dict[str, Any]:
        model = self.model
        return {
            "kind": model.kind,
            "name": model.name,
            "sha256": model.sha256,
            "task": model.task,
            "classes": [
                {"name": name, "meaning": meaning}
                for name, meaning in zip(model.classes, model.meanings, strict=True)
            ],
            "synthetic": model.synthetic,
            "temperature": model.temperature,
        }

    def _data(self) -> dict[str, Any]:
        images, outcome = self.labelled.images, self.outcome
        one_hot = self.labels.ndim == 1
        counts = np.bincount(self.labels, minlength=len(self.model.classes)) if one_hot else (
            self.labels.sum(axis=0)
        )  # fmt: skip
        known = outcome.patients
        learnt = self.model.trained_on
        return {
            "name": images.card.name,
            "title": images.card.title,
            "synthetic": images.synthetic,
            "split": self.labelled.split,
            "splits": dict(Counter(r.split for r in images.records if r.split)),
            "images": len(outcome.indices),
            "patients": None if known is None else len({p for p in known if p is not None}),
            "without_patient": sum(p is None for p in outcome.scored.patients),
            "classes": dict(zip(self.model.classes, map(int, counts), strict=True)),
            "copies": len(outcome.hashes) - len(set(outcome.hashes)),
            "learnt_from": None if learnt is None else sum(h in learnt for h in outcome.hashes),
            "unusable": len(outcome.faults),
            "faults": dict(Counter(fault.what for _, fault in outcome.faults).most_common(20)),
            "notes": list(images.notes),
            "sha256": outcome.sha256,
        }

    def _point(self, everything: dict[str, Any]) -> dict[str, Any]:
        point = self.model.point
        if point is None or self.truth is None or self.decided is None:
            return {"positive": self.positive or None, "threshold": None, "reason": _NO_POINT}
        pairs = {"true_positive": (True, True), "false_negative": (True, False),
                 "false_positive": (False, True), "true_negative": (False, False)}  # fmt: skip
        return {
            "positive": self.positive,
            "threshold": point["threshold"],
            "asked": point["asked"],
            "reason": None,
            "counts": {
                name: int(((self.truth == truth) & (self.decided == called)).sum())
                for name, (truth, called) in pairs.items()
            },
            **{name: everything[name] for name in MEASURES},
            "reference": {part: point[part] for part in PARTS if part in point},
        }

    def _curve(self) -> dict[str, Any]:
        if self.scores is None or self.truth is None:
            remedy = "name classes with --positive, or in the card"
            return {"reason": f"nothing says which classes are positive; {remedy}"}
        if self.truth.all() or not self.truth.any():
            which = "every" if self.truth.all() else "no"
            return {"reason": f"{which} image is of a positive class"}
        curve = net_benefit(self.scores, self.truth, _THRESHOLDS)
        return {
            "reason": None,
            "positive": self.positive,
            "threshold": _THRESHOLDS.tolist(),
            **{name: values.tolist() for name, values in curve.items()},
        }

    def _share(self, hits: NDArray[Any]) -> dict[str, Any]:
        return mean_interval(hits, self.outcome.patients, bootstrap=self.bootstrap)

    def _abstention(self) -> dict[str, Any]:
        if self.abstained is None:
            return {"reason": self.model.ood.reason}
        kept = ~self.abstained
        found = self.judged.metrics(kept) if kept.any() else {}
        return {
            "reason": None,
            "on": "ood",
            "threshold": self.model.ood.value,
            "share": self._share(self.abstained),
            "kept": {name: found[name] for name in self.judged.group_metrics if name in found},
        }

    def _conformal(self) -> dict[str, Any]:
        sets = [s for s in self.sets if s is not None]
        if not sets:
            return {"reason": self.model.conformal.reason}
        inside = np.array([y in s for y, s in zip(self.labels, sets, strict=True)])
        sizes = np.array([len(s) for s in sets])
        return {
            "reason": None,
            "wanted": self.model.coverage,
            "coverage": self._share(inside),
            "set_size": self._share(sizes),
            "one_class": self._share(sizes == 1),
            "no_class": self._share(sizes == 0),
        }

    def groups(self, by: By) -> dict[str, NDArray[np.bool_]]:
        """Return group -> which of the images are in it."""
        cells = self.labelled.images.columns[by.column]
        return groups_of(by, [cells[i] for i in self.outcome.indices])

    def _groups(self, by: By) -> dict[str, Any]:
        found = compare_groups(self.judged, self.groups(by), unknown=UNKNOWN)
        return {"column": by.column, "bands": list(by.cuts), **found}


def _named(by: Sequence[By]) -> dict[str, By]:
    """Return columns by name; one that is cut in two ways has both in its names."""
    counts = Counter(column.column for column in by)
    return {
        column.column
        if counts[column.column] == 1
        else f"{column.column} ({', '.join(f'{cut:g}' for cut in column.cuts) or 'values'})": column
        for column in by
    }


def _write_rows(path: Path, found: _Findings, by: Sequence[By]) -> None:
    """Write a row per image, those that could not be used at the end."""
    model, outcome = found.model, found.outcome
    records = found.labelled.images.records
    groups = {
        f"by_{name}": names_of(found.groups(column), len(outcome.indices))
        for name, column in _named(by).items()
    }
    columns = ["file", "patient", "label", "prediction"]
    columns += [f"prob_{name}" for name in model.classes]
    columns += [f"logit_{name}" for name in model.classes]
    columns += ["decision", "conformal_set", "ood_score", "abstain", *groups, "error", "model",
                "synthetic"]  # fmt: skip
    end = [model.sha256, str(found.synthetic).lower()]
    rows: list[list[object]] = []
    for at, index in enumerate(outcome.indices):
        chosen = found.sets[at]
        numbers = (*found.probs[at], *outcome.scored.logits[at])
        rows.append([
            records[index].file, records[index].patient,
            _words(found.labels[at], model), _words(found.predicted[at], model),
            *(repr(float(number)) for number in numbers),
            None if found.decided is None else "positive" if found.decided[at] else "negative",
            None if chosen is None else "|".join(model.classes[k] for k in chosen),
            None if found.ood is None else repr(float(found.ood[at])),
            None if found.abstained is None else str(bool(found.abstained[at])).lower(),
            *(names[at] for names in groups.values()), None, *end,
        ])  # fmt: skip
    between = len(columns) - 4
    for file, fault in outcome.faults:
        error = "; ".join(part for part in (fault.what, fault.remedy) if part)
        rows.append([file, *[None] * between, error, *end])
    write_csv(path, columns, rows)


def _words(label: Any, model: Model) -> str:
    chosen = np.flatnonzero(label) if np.ndim(label) else [int(label)]
    return "|".join(model.classes[int(k)] for k in chosen)


def _draw(folder: Path, found: _Findings, content: dict[str, Any]) -> None:
    labels, probs, classes = found.labels, found.probs, found.model.classes
    stamp: Any = {"synthetic": found.labelled.images.synthetic}
    plots.roc_curves(labels, probs, classes, folder / "roc.png", **stamp)
    plots.pr_curves(labels, probs, classes, folder / "pr.png", **stamp)
    plots.confusion(labels, found.predicted, classes, folder / "confusion.png", **stamp)
    plots.reliability(labels, probs, folder / "reliability.png", **stamp)
    curve = content["decision_curve"]
    if curve["reason"] is None:
        words = " or ".join(curve["positive"])
        threshold = content["operating_point"]["threshold"]
        path = folder / "decision_curve.png"
        clinical_plots.decision_curve(curve, words, path, threshold=threshold, **stamp)
    for number, (name, table) in enumerate(content["by"].items(), 1):
        metric = content["metrics"]["auc_macro"]
        path = folder / f"groups_{number}.png"
        clinical_plots.groups(
            table["groups"], metric, "auc_macro", f"AUROC by {name}", path, **stamp
        )
