"""`metrics.json`, the result table and `report.md`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Metrics = Mapping[str, Mapping[str, Any]]

HEADLINE = ("auc_macro", "accuracy", "balanced_accuracy", "f1_macro", "qwk", "ece", "brier")
FIGURES = {
    "learning_curves": "Learning curves",
    "roc": "ROC",
    "pr": "Precision and recall",
    "confusion": "Confusion",
    "reliability": "Reliability",
    "subband_energy": "Energy of the update per subband and layer (WaRA paper, Fig. 2)",
    "singular_values": "Singular values of the update (WaRA paper, Fig. 2)",
}
"""What a figure shows, by the name of its file, in the order of the report."""
USAGE = """\
import wara

run = wara.load_run(".")
model = run.model()  # in evaluation mode; run.spec is what its images must be"""
"""Python lines that load the model of a run, from its folder."""


@dataclass(frozen=True)
class ClassTable:
    """Images of each class in an evaluated split.

    Args:
        split: `validation` or `test`.
        images: `[c]`; for a multilabel task those that show the finding.
        predicted: `[c]`, images that the model gave the class.
    """

    split: str
    images: Sequence[int]
    predicted: Sequence[int]

    def never(self, classes: Sequence[str]) -> str:
        """Say which classes were never predicted, with their images; empty where none."""
        found = [
            f"{name} ({n} image{'s' * (n != 1)})"
            for name, n, called in zip(classes, self.images, self.predicted, strict=True)
            if not called and any(self.images)
        ]
        return f"never predicted on the {self.split} images: {', '.join(found)}" if found else ""


def cell(metric: Mapping[str, Any] | None, note: Callable[[str], str] = lambda reason: "") -> str:
    """One metric as `0.912 [0.871, 0.946]`, or why it is missing.

    Args:
        metric: as `metrics.json` has it.
        note: returns what to write where an interval is missing, for the reason.
    """
    if metric is None:
        return "-"
    if metric["value"] is None:
        return f"undefined: {metric['reason']}"
    text = f"{metric['value']:.3f}"
    if metric["low"] is None or metric["high"] is None:
        return f"{text} {note(metric['reason'])}".rstrip()
    return f"{text} [{metric['low']:.3f}, {metric['high']:.3f}]"


def result_table(val: Metrics, test: Metrics) -> list[str]:
    """The headline metrics with 95 % intervals, as lines of text."""
    rows = [("", "validation", "test")]
    rows += [
        (name, cell(val.get(name)), cell(test.get(name)))
        for name in HEADLINE
        if name in val or name in test
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def markdown(
    *,
    title: str,
    banners: Sequence[str],
    plan: Sequence[str],
    outcome: Sequence[str],
    classes: Sequence[str],
    tables: Sequence[ClassTable],
    val: Metrics,
    test: Metrics,
    plots: Path,
    shown: str,
    resampled: str,
) -> str:
    """Return `report.md`.

    Args:
        title: heading.
        banners: what a reader must not miss.
        plan: lines of the plan.
        outcome: sentences on how training went.
        classes: `c` names.
        tables: images per class of the evaluated splits.
        val: metrics of the validation images.
        test: metrics of the test images.
        plots: folder whose figures are shown, beside the report.
        shown: split that the figures show.
        resampled: what the intervals were made from.
    """
    parts = [f"# {_plain(title)}", ""]
    for banner in banners:
        parts += [f"> **{_plain(banner)}**", ""]
    parts += ["## Plan", "", "```text", *plan, "```", "", "## Training", ""]
    parts += [*(f"* {_plain(line)}" for line in outcome), "", "## Results", ""]
    parts += [resampled, "", *_metric_table(val, test), "", *_class_table(classes, tables)]
    figures = [(name, text) for name, text in FIGURES.items() if (plots / f"{name}.png").is_file()]
    if figures:
        parts += ["", f"## Figures ({shown} images)", ""]
    for name, text in figures:
        parts += [f"### {text}", "", f"![{text}]({plots.name}/{name}.png)", ""]
    parts += ["", "## Use the model", "", "In this folder:", "", "```python", USAGE, "```"]
    return "\n".join(parts)


def _metric_table(val: Metrics, test: Metrics) -> list[str]:
    """Return the table of all metrics, and below it why intervals are missing."""
    notes: dict[str, str] = {}

    def mark(reason: str) -> str:
        return notes.setdefault(reason, f"({len(notes) + 1})")

    names = [n for n in HEADLINE if n in test] + [n for n in test if n not in HEADLINE]
    lines = ["| metric | validation | n | test | n |", "|---|---|---|---|---|"]
    for name in names:
        cells = [
            part
            for metric in (val.get(name), test.get(name))
            for part in (table_cell(cell(metric, mark)), str(metric["n"] if metric else "-"))
        ]
        lines.append(f"| `{table_cell(name)}` | {' | '.join(cells)} |")
    return [*lines, "", *(f"{sign} {_plain(reason)}  " for reason, sign in notes.items())]


def _class_table(classes: Sequence[str], tables: Sequence[ClassTable]) -> list[str]:
    heads = [f"{kind} {t.split}" for t in tables for kind in ("images,", "predicted,")]
    lines = [f"| class | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for i, name in enumerate(classes):
        numbers = [str(n) for t in tables for n in (t.images[i], t.predicted[i])]
        lines.append(f"| {table_cell(name)} | {' | '.join(numbers)} |")
    return lines


def _plain(text: str) -> str:
    return text.replace("\n", " ")


def table_cell(text: str) -> str:
    """Return words as they stand in a cell of a Markdown table."""
    return _plain(text).replace("|", "\\|")
