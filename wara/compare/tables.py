"""The table of a comparison as CSV, Markdown, LaTeX and text.

These hold what follows from the runs, so that a comparison that was stopped and continued writes
the same bytes; what a clock and a machine measured is in `costs.csv` and in the report.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wara.compare.grid import Request
from wara.compare.results import Line, Results
from wara.deploy.document import Table, as_markdown_table
from wara.storage import write_csv, write_text

COLUMNS = (
    "dataset", "row", "method", "budget", "train_images", "adapter_params", "head_params",
    "adapter_file_bytes", "lr", "weight_decay", "runs", "runs_wanted", "metric", "mean", "low",
    "high", "difference", "difference_low", "difference_high", "p", "p_holm", "verdict", "reason",
)  # fmt: skip


def write_tables(request: Request, results: Results, out: Path) -> None:
    """Write `table.csv`, `table.md`, `table.tex`, `costs.csv` and `cells.jsonl`."""
    write_csv(out / "table.csv", *csv_rows(request, results))
    head, *rows = cells_of_table(request, results.lines)
    write_text(out / "table.md", as_markdown_table(Table(head, rows)))
    write_text(out / "table.tex", _latex(head, rows))
    costs = [
        (line.dataset, line.label, line.median("seconds_per_epoch"), line.median("peak_memory_mb"))
        for line in results.lines
    ]
    write_csv(out / "costs.csv", ("dataset", "row", "seconds_per_epoch", "peak_memory_mb"), costs)
    text = "\n".join(json.dumps(record, allow_nan=False) for record in results.records)
    write_text(out / "cells.jsonl", text)


def csv_rows(request: Request, results: Results) -> tuple[Sequence[str], list[list[Any]]]:
    """Return the columns of `table.csv` and its lines."""
    return COLUMNS, [_csv_row(request, line) for line in results.lines]


def _csv_row(request: Request, line: Line) -> list[Any]:
    row, own, other = line.sized.row, line.summary, line.difference
    numbers = [getattr(own, name, None) for name in ("value", "low", "high")]
    numbers += [getattr(other, name, None) for name in ("value", "low", "high")]
    return [
        line.dataset, line.label, row.method, row.budget, row.train, line.sized.adapter_params,
        line.sized.head_params,
        *(_exact(line, key) for key in ("file_bytes", "lr", "weight_decay")),
        len(line.finished), line.wanted, request.metric,
        *(None if number is None else f"{number:.6f}" for number in numbers),
        # Six digits behind the point would make a small one 0.
        *(None if p is None else f"{p:.6g}"
          for p in (getattr(other, "p", None), getattr(other, "p_holm", None))),
        getattr(other, "verdict", None), reason_of(line) or None,
    ]  # fmt: skip


def _exact(line: Line, key: str) -> str:
    """Return the different values of a setting, which differ where each split was tuned."""
    return " ".join(f"{value:g}" for value in line.distinct(key))


def reason_of(line: Line) -> str:
    """Return why a line lacks its score, an interval or its test; empty where it lacks nothing."""
    if line.summary is None:
        failures = [record["reason"] for record in line.records if record["status"] == "failed"]
        return failures[0] if failures else "no cell was run"
    untested = line.untested or getattr(line.difference, "reason", None)
    return "; ".join(dict.fromkeys(filter(None, (line.summary.reason, untested))))


def cells_of_table(request: Request, lines: Sequence[Line]) -> list[list[str]]:
    """Return the table for people: head line and one line per row."""
    several = len({line.dataset for line in lines}) > 1
    head = ["data set"] * several + ["method", "adapter parameters", "file kB", "lr", "runs"]
    head += [f"test {request.metric}", f"minus {request.reference}", "p (Holm)", "verdict"]
    if request.reference is None:
        head = head[:-3]
    table = [head]
    for line in lines:
        size = line.median("file_bytes")
        cells = [line.dataset] * several + [
            line.label, f"{line.sized.adapter_params:,}",
            "-" if size is None else f"{size / 1000:,.1f}", _exact(line, "lr") or "-",
            f"{len(line.finished)}/{line.wanted}", score_words(line),
        ]  # fmt: skip
        if request.reference is not None:
            cells += _difference_cells(request, line)
        table.append(cells)
    return table


def score_words(line: Line) -> str:
    """Return the mean with its interval, or why there is none."""
    if line.summary is None or line.summary.value is None:
        return f"none: {reason_of(line)}"
    return with_interval(line.summary.value, line.summary.low, line.summary.high)


def with_interval(value: float, low: float | None, high: float | None, sign: str = "") -> str:
    """Return `0.912 [0.871, 0.946]`; without interval the value alone."""
    text = f"{value:{sign}.3f}"
    return text if low is None or high is None else f"{text} [{low:{sign}.3f}, {high:{sign}.3f}]"


def p_words(p: float) -> str:
    """Return a p-value to three digits, which is never 0."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _difference_cells(request: Request, line: Line) -> list[str]:
    other = line.difference
    if line.sized.row.method == request.reference:
        return ["reference", "", ""]
    if other is None or other.value is None:
        return ["-", "-", line.untested or (other.words if other else "not tested")]
    p = "-" if other.p_holm is None else p_words(other.p_holm)
    return [with_interval(other.value, other.low, other.high, "+"), p, other.words]


def _latex(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"\\begin{{tabular}}{{{'l' * len(head)}}}", "\\hline"]
    for number, row in enumerate([head, *rows]):
        lines.append(" & ".join(map(_escaped, row)) + r" \\")
        if number == 0:
            lines.append("\\hline")
    return "\n".join([*lines, "\\hline", "\\end{tabular}"])


def _escaped(text: str) -> str:
    return re.sub(
        r"[\\&%$#_{}~^]",
        lambda found: _LATEX.get(found[0], f"\\{found[0]}"),
        text,
    )


_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"
}  # fmt: skip


def text_lines(request: Request, results: Results) -> list[str]:
    """Return the table for a terminal."""
    table = cells_of_table(request, results.lines)
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
