"""The story of a comparison: check, plan, tune, run, tell."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from wara.compare import cells, report, shown, tables
from wara.compare.board import Board, span
from wara.compare.checks import Checked, Sized, check
from wara.compare.grid import MAJORITY, Cell, Request, cells_of, rows_of, with_rates
from wara.compare.launch import Launcher
from wara.compare.results import Results, Trial, read_results
from wara.compare.worker import Job, Outcome, Shelf
from wara.config import RunConfig
from wara.errors import WaraError
from wara.runs.folder import RunFolder
from wara.runs.progress import Progress
from wara.runs.report import cell as in_words
from wara.storage import read_json, write_json

_RECORD, _LOCK = "compare.json", ".lock"


@dataclass(frozen=True)
class Wanted:
    """A cell of the grid and the row it belongs to, as the checks found it."""

    sized: Sized
    cell: Cell


def compare(
    request: Request, launcher: Launcher, shelf: Shelf, *, at_once: int = 1, plan: bool = False
) -> Path:
    """Run what is missing of a comparison and write its table and its report.

    Args:
        request: what is compared.
        launcher: runs the cells.
        shelf: keeps the images that the checks read; one that `launcher` shares, where it can.
        at_once: cells that run at the same time, for the time left.
        plan: print the grid and the time, run nothing, write nothing.

    Returns:
        The folder of the comparison.

    Raises:
        WaraError: every refusal, before anything is run; after that, the kind of the first cell
            that failed, once all others are done and the report is written.
        Stopped: after SIGTERM or SIGINT; the same call goes on.
    """
    checked = check(rows_of(request), request, shelf, measure=plan)
    grid = [
        Wanted(sized, cell)
        for sized in checked.rows
        for cell in cells_of(sized.row, request.splits, request.seeds)
    ]
    for line in plan_lines(request, checked, grid, at_once):
        print(line, flush=True)
    if plan:
        return request.out
    with _held(request.out):
        runs = [wanted for wanted in grid if wanted.cell.row.method != MAJORITY]
        record = request.out / _RECORD
        write_json(record, cells.check_grid(record, [wanted.cell for wanted in runs]))
        runs, trials = _tuned(request, checked, runs, launcher, at_once)
        placed = [
            replace(w, cell=cells.placed(w.cell, checked.facts(w.sized, w.cell), request.out))
            for w in runs
        ]
        failed = _run(request, placed, launcher, at_once)
        results = read_results(
            request, checked, [(w.sized, w.cell) for w in placed], failed, trials
        )
        report.write(request, checked, results)
        shown.show(request, results)
    _tell(request, results)
    return request.out


def plan_lines(
    request: Request, checked: Checked, grid: Sequence[Wanted], at_once: int
) -> list[str]:
    """Return the plan of a comparison: banners, data sets, rows, number of runs, time."""
    banners = dict.fromkeys(b for ground in checked.grounds.values() for b in ground.banners)
    lines = [f"!!!!!!!! {text}" for text in banners]
    for (_, train, split), ground in checked.grounds.items():
        counts = ", ".join(f"{n} {name}" for name, n in ground.images.items())
        size = f", about {train} kept" if train else ""
        lines.append(f"data set   {ground.name}, split {split}: {counts}{size}")
    trials = request.tuning.trials if request.tuning else 0
    seconds, known = 0.0, True
    for sized in checked.rows:
        own = sum(w.sized is sized for w in grid)
        if sized.row.method == MAJORITY:
            continue
        rates = ", ".join(f"{name} {rate:g}" for name, rate in sized.row.config.rates.items())
        wanted = "" if sized.wanted_params is None else f" of {sized.wanted_params:,} wanted"
        timed = "" if sized.seconds is None else f", {span(sized.seconds)} each"
        name = checked.grounds[_first_place(sized)].name
        lines.append(
            f"row        {name}: {sized.row.label}, adapter {sized.adapter_params:,}{wanted}, "
            f"head {sized.head_params:,}, lr: {rates}, {own} runs{timed}"
        )
        known &= sized.seconds is not None
        seconds += (sized.seconds or 0.0) * (own + trials * request.splits)
    runs = [w for w in grid if w.cell.row.method != MAJORITY]
    rows = len({id(w.sized) for w in runs})
    tuned = f", after {trials} trials per row and split ({rows * request.splits * trials} in all)"
    lines.append(f"runs       {len(runs)}{tuned if trials else ', no rates tuned'}")
    if known:
        jobs = f", {at_once} at a time" if at_once > 1 else ""
        lines.append(
            f"time       about {span(seconds / at_once)}{jobs}, from one measured step of each "
            "row; starting and evaluating a run come on top"
        )
    return lines


def _first_place(sized: Sized) -> tuple[str, int | None, int]:
    return sized.row.dataset, sized.row.train, sized.row.config.data.split_seed


@contextlib.contextmanager
def _held(out: Path) -> Iterator[None]:
    """Hold the folder of a comparison.

    Raises:
        WaraError: kind "config" when it holds something else, kind "busy" when another comparison
            is going on in it.
    """
    folder = RunFolder(out)
    folder.check_writable()
    remedy = "choose another --out"
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if (out.exists() and not out.is_dir()) or names - {_LOCK} and _RECORD not in names:
        raise WaraError("config", "there is something that is no comparison", str(out), remedy)
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / _LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        what = "another comparison is going on here"
        raise WaraError("busy", what, str(out), f"wait for it, or {remedy}") from None
    try:
        yield
    finally:
        lock.release()


# -- tuning --------------------------------------------------------------------------------------


def _tuned(
    request: Request, checked: Checked, runs: Sequence[Wanted], launcher: Launcher, at_once: int
) -> tuple[list[Wanted], list[Trial]]:
    """Return the cells with the rates that did best on the validation images of their split.

    Split by split: what is a validation image of one may be a test image of another.
    """
    if request.tuning is None:
        return list(runs), []
    firsts = [w for w in runs if w.cell.seed == request.seeds[0]]
    jobs: dict[str, tuple[Wanted, RunConfig, Job]] = {}
    for wanted in firsts:
        for config in request.tuning.variants(wanted.cell.config):
            key = cells.key_of(config, checked.facts(wanted.sized, wanted.cell))
            path = request.out / "trials" / f"{key}.json"
            job = Job(
                "trial", config.model_copy(update={"out": str(path)}).model_dump_json(), key,
                f"{wanted.cell.place} lr {config.lr:g}",
            )  # fmt: skip
            jobs[key] = (wanted, config, job)
    found = {key: read_json(path) for key in jobs
             if (path := request.out / "trials" / f"{key}.json").exists()}  # fmt: skip
    labels = {key: wanted.cell.row.label for key, (wanted, _, _) in jobs.items()}
    with Board("trials", Counter(labels.values()), at_once) as board:
        for key in found:
            board.taken(labels[key])

        def done(job: Job, outcome: Outcome) -> None:
            found[job.key] = outcome
            text = outcome["reason"] or f"{outcome['monitor']} {outcome['value']:.4f}"
            board.note(labels[job.key], job, outcome, text)

        launcher.run([job for key, (_, _, job) in jobs.items() if key not in found], done)
    trials = [Trial(w.cell, config, found[key]) for key, (w, config, _) in jobs.items()]
    return [_with_best(wanted, trials) for wanted in runs], trials


def _with_best(wanted: Wanted, trials: Iterable[Trial]) -> Wanted:
    """Return a cell at the best rates of its row and split; the lower rate wins a tie."""
    best, chosen = Progress(), wanted.cell.config
    for trial in trials:
        same = trial.cell.row is wanted.cell.row and trial.cell.split == wanted.cell.split
        value = trial.found.get("value")
        if same and value is not None:
            best.monitor = trial.found["monitor"]
            if best.better(value):
                best.best_value, chosen = value, trial.config
    return replace(wanted, cell=with_rates(wanted.cell, chosen))


# -- cells ---------------------------------------------------------------------------------------


def _run(
    request: Request, runs: Sequence[Wanted], launcher: Launcher, at_once: int
) -> dict[str, Outcome]:
    """Run the cells that are not there; return why some failed, by key."""
    failed: dict[str, Outcome] = {}
    by_key = {w.cell.key: w.cell for w in runs}
    labels = {key: cell.row.label for key, cell in by_key.items()}
    missing = [cell for cell in by_key.values() if cells.read_seal(cell) is None]
    with Board("cells", Counter(labels.values()), at_once) as board:
        for key in by_key.keys() - {cell.key for cell in missing}:
            board.taken(labels[key])
        if len(missing) < len(by_key):
            board.say(f"{len(by_key) - len(missing)} of {len(by_key)} cells are there already")

        def done(job: Job, outcome: Outcome) -> None:
            if outcome["status"] == "failed":
                failed[job.key] = outcome
            board.note(labels[job.key], job, outcome, _score(request, by_key[job.key], outcome))

        audit = request.metric if request.audit else ""
        launcher.run(
            [
                Job("cell", cell.config.model_dump_json(), cell.key, cell.place, audit)
                for cell in missing
            ],
            done,
        )
    return failed


def _score(request: Request, cell: Cell, outcome: Outcome) -> str:
    if outcome["status"] == "failed":
        return "failed"
    metrics = json.loads((cell.config.folder / "metrics.json").read_text())
    return f"test {request.metric} {in_words(metrics['test'].get(request.metric))}"


def _tell(request: Request, results: Results) -> None:
    for line in tables.text_lines(request, results):
        print(line)
    out = request.out
    print(f"report   {out / 'report.html'}")
    print(f"table    {out / 'table.csv'}")
    failures: list[Any] = [row for row in results.records if row["status"] == "failed"]
    if failures:
        what = f"{len(failures)} of {len(results.records)} cells failed: {failures[0]['reason']}"
        remedy = "the same command tries them again"
        raise WaraError(failures[0]["kind"], what, failures[0]["folder"], remedy)
