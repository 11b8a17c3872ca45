"""What the cells of a comparison gave, read back from their folders and handed to statistics."""

from __future__ import annotations

import statistics as plain
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from wara.compare.cells import read_seal
from wara.compare.checks import Checked, Ground, Sized
from wara.compare.grid import MAJORITY, Cell, Request, cells_of
from wara.compare.worker import Outcome, audit_path
from wara.config import RunConfig
from wara.runs.load import load_run
from wara.storage import read_json

if TYPE_CHECKING:
    from wara.compare.scores import Cell as Scored
    from wara.compare.statistics import Difference, Summary

Record = dict[str, Any]
"""A line of `cells.jsonl`."""


@dataclass(frozen=True)
class Trial:
    """A training that was judged on the validation images.

    Args:
        cell: that it stands for, with the rates of the config.
        config: with the rates that were tried.
        found: `value` of `monitor`, or why there is none (`reason`).
    """

    cell: Cell
    config: RunConfig
    found: Mapping[str, Any]


@dataclass
class Line:
    """A line of the table: what the cells of a row gave together.

    Args:
        dataset: name of the card.
        sized: the row, with numbers of parameters.
        wanted: cells that the row should have.
        records: of the row.
        summary: mean and interval; None without a finished cell.
        difference: to the reference; None for the reference and where it was not tested.
        untested: why it was not tested.
    """

    dataset: str
    sized: Sized
    wanted: int
    records: list[Record] = field(default_factory=list)
    summary: Summary | None = None
    difference: Difference | None = None
    untested: str = ""

    @property
    def label(self) -> str:
        """What tells the row from others of its data set."""
        return self.sized.row.label

    @property
    def finished(self) -> list[Record]:
        """Records of cells with a score."""
        return [record for record in self.records if record["status"] == "finished"]

    @property
    def train_images(self) -> float:
        """Training images, as they were after patients were kept together."""
        return self.median("train_seen") or 0

    def distinct(self, key: str) -> list[float]:
        """Return the different values of a measure, from low to high."""
        return sorted({r[key] for r in self.finished if r[key] is not None})

    def median(self, key: str) -> float | None:
        """Return the median of a measure over the cells that have it."""
        values = [r[key] for r in self.finished if r[key] is not None]
        return plain.median(values) if values else None


@dataclass
class Results:
    """All that a comparison found.

    Args:
        lines: of the table, data set by data set.
        records: of the cells.
        trials: of the tuning.
    """

    lines: list[Line]
    records: list[Record]
    trials: list[Trial]

    def of(self, dataset: str) -> list[Line]:
        """Return the lines of a data set."""
        return [line for line in self.lines if line.dataset == dataset]

    @property
    def datasets(self) -> list[str]:
        """Names of the data sets, in order."""
        return list(dict.fromkeys(line.dataset for line in self.lines))


def read_results(
    request: Request,
    checked: Checked,
    runs: Iterable[tuple[Sized, Cell]],
    failed: Mapping[str, Outcome],
    trials: Sequence[Trial],
) -> Results:
    """Read the finished cells and compute the table.

    Args:
        request: the comparison.
        checked: its rows and data sets.
        runs: cells with their keys and folders.
        failed: outcomes of cells that failed, by key.
        trials: of the tuning.
    """
    lines: dict[int, Line] = {}
    scored: dict[str, list[Scored]] = {}
    for sized in checked.rows:
        cells = cells_of(sized.row, request.splits, request.seeds)
        name = checked.ground(cells[0]).name
        lines[id(sized)] = line = Line(name, sized, len(cells))
        if sized.row.method == MAJORITY:
            for cell in cells:
                record, one = _majority(request, cell, checked.ground(cell))
                line.records.append(record)
                scored.setdefault(name, []).append(one)
    for sized, cell in runs:
        line = lines[id(sized)]
        record, read = _read(request, sized, cell, line.dataset, failed.get(cell.key))
        line.records.append(record)
        if read is not None:
            scored.setdefault(line.dataset, []).append(read)
    found = list(lines.values())
    for dataset, cells_ in scored.items():
        judge(request, [line for line in found if line.dataset == dataset], cells_)
    return Results(found, [record for line in found for record in line.records], list(trials))


def _record(request: Request, cell: Cell, dataset: str) -> Record:
    row = cell.row
    return {
        "dataset": dataset, "row": row.label, "method": row.method, "budget": row.budget,
        "train_images": row.train, "train_seen": None, "split": cell.split, "seed": cell.seed,
        "metric": request.metric, "test": None, "val": None, "key": cell.key, "folder": None,
        "status": "failed", "reason": None, "kind": None, "lr": None, "weight_decay": None,
        "adapter_params": None, "head_params": None, "file_bytes": None, "epochs": None,
        "best_epoch": None, "seconds_per_epoch": None, "peak_memory_mb": None, "audit_gain": None,
    }  # fmt: skip


def _read(
    request: Request, sized: Sized, cell: Cell, dataset: str, outcome: Outcome | None
) -> tuple[Record, Scored | None]:
    from wara.compare.scores import Cell as Scored

    folder = cell.config.folder
    record = _record(request, cell, dataset) | {
        "folder": folder.relative_to(request.out).as_posix(),
        "lr": next(iter(cell.config.rates.values())),
        "weight_decay": cell.config.weight_decay,
        "adapter_params": sized.adapter_params, "head_params": sized.head_params,
    }  # fmt: skip
    seal = None if outcome else read_seal(cell)
    if seal is None:
        why = outcome or {"reason": "its files were altered after the run", "kind": "artefact"}
        return record | {"reason": why["reason"], "kind": why["kind"]}, None
    run = load_run(folder)
    table = run.predictions("test")
    record |= {
        "status": "finished",
        "test": run.metrics["test"][request.metric]["value"],
        "val": run.metrics["val"][request.metric]["value"],
        "train_seen": sum(row.split == "train" for row in run.splits()),
        "file_bytes": (run.folder.adapter / "adapter_model.safetensors").stat().st_size,
        "epochs": run.metrics["epochs"], "best_epoch": run.metrics["best_epoch"],
        "seconds_per_epoch": seal["seconds_per_epoch"], "peak_memory_mb": seal["peak_memory_mb"],
        "audit_gain": _gain(request, cell, run.metrics["best_epoch"]),
    }  # fmt: skip
    return record, Scored(
        method=cell.row.label, split=cell.split, seed=cell.seed, task=run.task,
        labels=table.predictions.labels, probs=table.predictions.probs,
        patients=table.patients, files=table.files, classes=tuple(run.classes),
    )  # fmt: skip


def _gain(request: Request, cell: Cell, best_epoch: int) -> float | None:
    """Return what choosing the epoch on the test images would have added to their score."""
    path = audit_path(cell.config.folder)
    if not request.audit or not path.exists():
        return None
    values = {int(epoch): value for epoch, value in read_json(path).items() if value is not None}
    return max(values.values()) - values[best_epoch] if best_epoch in values else None


def _majority(request: Request, cell: Cell, ground: Ground) -> tuple[Record, Scored]:
    from wara.compare.scores import Cell as Scored
    from wara.evaluation.metrics import point_metrics

    scores = point_metrics(ground.labels, ground.majority, task=ground.task, classes=ground.classes)
    record = _record(request, cell, ground.name) | {
        "status": "finished", "test": scores[request.metric],
        "adapter_params": 0, "head_params": 0,
    }  # fmt: skip
    return record, Scored(
        method=cell.row.label, split=cell.split, seed=cell.seed, task=ground.task,
        labels=ground.labels, probs=ground.majority, patients=ground.patients,
        files=ground.files, classes=ground.classes,
    )  # fmt: skip


def judge(request: Request, lines: Sequence[Line], cells: Sequence[Scored]) -> None:
    """Put means, intervals and tests of a data set into its lines.

    Rows with a budget are held against the reference of the same budget, rows on fewer images
    against the reference on as many.
    """
    from wara.compare.statistics import compare, summarise

    by_label = {line.label: line for line in lines}
    for label, summary in summarise(cells, request.metric).items():
        by_label[label].summary = summary
    if request.reference is None:
        return
    for train in request.train:
        for budget in reversed(request.budgets):  # the first one decides for rows without
            own = [line for line in lines if _in_group(line, budget, train)]
            reference = next(line for line in own if line.sized.row.method == request.reference)
            testable = [line for line in own if _tested(line, reference)]
            chosen = {line.label for line in testable} | {reference.label}
            if not testable:
                continue
            found = compare(
                [cell for cell in cells if cell.method in chosen], reference.label,
                request.metric, rope=request.rope,
            )  # fmt: skip
            for line in testable:
                line.difference, line.untested = found[line.label], ""


def _in_group(line: Line, budget: str | None, train: int | None) -> bool:
    row = line.sized.row
    return row.train == train and row.budget in (budget, None)


def _tested(line: Line, reference: Line) -> bool:
    """Whether a line can be held against the reference; notes why not."""
    if line is reference:
        return False
    if line.sized.row.method == MAJORITY:
        line.untested = "has no seeds"
        return False
    for one in (line, reference):
        seeds: dict[int, int] = {}
        for record in one.finished:
            seeds[record["split"]] = seeds.get(record["split"], 0) + 1
        if max(seeds.values(), default=0) < 2:
            line.untested = f"{one.label} has fewer than two finished seeds"
            return False
    if not {r["split"] for r in line.finished} & {r["split"] for r in reference.finished}:
        line.untested = "no split in common with the reference"
        return False
    return True
