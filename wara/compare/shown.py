"""The table of a comparison in Weights & Biases: one more run in the group of its cells."""

from __future__ import annotations

import re
import secrets
from dataclasses import replace
from pathlib import Path

from wara.cards import public_name
from wara.compare.grid import Request
from wara.compare.results import Line, Results
from wara.compare.tables import csv_rows
from wara.training.loggers import Sinks
from wara.training.tracking import settle

_PRIVATE = "reason"  # of a failed cell: it may name files


def show(request: Request, results: Results) -> None:
    """Send the table to W&B where the configs do not disable it.

    Data sets of one's own go without their names, and are numbered where there are several. The
    run keeps its id, so that a comparison which goes on or grows stays one table.
    """
    tracking = settle(request.configs[0].wandb)
    if tracking.mode == "disabled":
        return
    group = tracking.group or request.out.resolve().name
    names = _public(results.lines)
    columns, rows = csv_rows(request, results)
    table = [
        [names.get(value, value) if column == "dataset" else value
         for column, value in zip(columns, row, strict=True) if column != _PRIVATE]
        for row in rows
    ]  # fmt: skip
    sinks = Sinks(lambda line: print(line, flush=True))
    sinks.start(
        request.out, tracking=replace(tracking, group=group), run_id=_run_id(request.out),
        name=f"{group} table", kind="comparison", tensorboard=False,
        config={"metric": request.metric, "reference": request.reference, "rope": request.rope,
                "seeds": list(request.seeds), "splits": request.splits},
    )  # fmt: skip
    sinks.table("comparison", [c for c in columns if c != _PRIVATE], table)
    sinks.close(0)


def _public(lines: list[Line]) -> dict[str, str]:
    """Return what each data set is called where others can read it."""
    known = {line.dataset: public_name(line.sized.row.dataset, line.dataset) for line in lines}
    twice = [name for name, called in known.items() if list(known.values()).count(called) > 1]
    return known | {name: f"{known[name]} {number}" for number, name in enumerate(twice, start=1)}


def _run_id(out: Path) -> str:
    """Return W&B's id of the table: that of an earlier call, as its files have it, or a new one."""
    for folder in sorted(out.glob("wandb/*run-*")):
        found = re.search(r"run-\d+_\d+-([0-9a-f]{12})$", folder.name)
        if found:
            return found[1]
    return secrets.token_hex(6)
