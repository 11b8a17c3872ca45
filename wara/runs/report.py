"""`metrics.json`, the result table and `report.md`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wara.vit import BackboneInfo

Metrics = Mapping[str, Mapping[str, Any]]

HEADLINE = ("auc_macro", "accuracy", "balanced_accuracy", "f1_macro", "qwk", "ece", "brier")
_FIGURES = (
    ("learning_curves", "Learning curves"),
    ("roc", "ROC"),
    ("pr", "Precision and recall"),
    ("confusion", "Confusion"),
    ("reliability", "Reliability"),
    ("subband_energy", "Energy of the update per subband and layer (WaRA paper, Fig. 2)"),
    ("singular_values", "Singular values of the update (WaRA paper, Fig. 2)"),
)


def cell(metric: Mapping[str, Any] | None) -> str:
    """One metric as `0.912 [0.871, 0.946]`, or why it is missing."""
    if metric is None:
        return "-"
    if metric["value"] is None:
        return f"undefined: {metric['reason']}"
    text = f"{metric['value']:.3f}"
    if metric["low"] is None or metric["high"] is None:
        return text
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
    val: Metrics,
    test: Metrics,
    plots: Path,
    shown: str,
    resampled: str,
    usage: str,
) -> str:
    """Return `report.md`.

    Args:
        title: heading.
        banners: what a reader must not miss.
        plan: lines of the plan.
        outcome: sentences on how training went.
        val: metrics of the validation images.
        test: metrics of the test images.
        plots: folder whose figures are shown, beside the report.
        shown: split that the figures show.
        resampled: what the intervals were made from.
        usage: Python lines that load the adapter.
    """
    parts = [f"# {_plain(title)}", ""]
    for banner in banners:
        parts += [f"> **{_plain(banner)}**", ""]
    parts += ["## Plan", "", "```text", *plan, "```", "", "## Training", ""]
    parts += [*(f"* {_plain(line)}" for line in outcome), "", "## Results", ""]
    parts += [resampled, "", "| metric | validation | test |", "|---|---|---|"]
    names = [n for n in HEADLINE if n in test] + [n for n in test if n not in HEADLINE]
    for name in names:
        row = (f"`{name}`", cell(val.get(name)), cell(test.get(name)))
        parts.append(f"| {' | '.join(map(table_cell, row))} |")
    figures = [(name, text) for name, text in _FIGURES if (plots / f"{name}.png").is_file()]
    if figures:
        parts += ["", f"## Figures ({shown} images)", ""]
    for name, text in figures:
        parts += [f"### {text}", "", f"![{text}]({plots.name}/{name}.png)", ""]
    parts += ["", "## Use the adapter", "", "```python", usage, "```"]
    return "\n".join(parts)


def usage(backbone: BackboneInfo, classes: int, weights: str | None) -> str:
    """Return Python lines that load the adapter of a run and are ready to predict.

    Args:
        backbone: what was adapted.
        classes: number of outputs.
        weights: path of the backbone's weights, where the user gave one.
    """
    given = f", weights={weights!r}" if weights else ""
    return (
        "import wara\n\n"
        f"model, info = wara.build_backbone({backbone.name!r}, num_classes={classes}, "
        f"img_size={backbone.img_size}{given})\n"
        'wara.load_adapter(model, "adapter").eval()'
    )


def _plain(text: str) -> str:
    return text.replace("\n", " ")


def table_cell(text: str) -> str:
    """Return words as they stand in a cell of a Markdown table."""
    return _plain(text).replace("|", "\\|")
