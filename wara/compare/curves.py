"""Figures of a comparison: means with intervals, and accuracy over parameters or images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from wara.compare.results import Line
from wara.evaluation.canvas import line_of, new_figure, save, text_of


def means(lines: Sequence[Line], path: Path, *, metric: str, synthetic: bool) -> Path | None:
    """Draw the mean of each row with its 95 % interval; None where no row has a mean."""
    shown = [line for line in lines if line.summary and line.summary.value is not None]
    if not shown:
        return None
    fig = new_figure(7.0, 0.9 + 0.3 * len(shown))
    ax = fig.subplots()
    for place, line in enumerate(shown):
        own = line.summary
        assert own is not None and own.value is not None
        if own.low is not None and own.high is not None:
            ax.plot([own.low, own.high], [place, place], **line_of(0))
        ax.plot(own.value, place, "o", color=line_of(0)["color"], markersize=5)
    ax.set_yticks(range(len(shown)), [text_of(line.label) for line in shown])
    ax.invert_yaxis()
    ax.set_xlabel(f"test {metric}, mean over splits and seeds with 95 % interval")
    ax.grid(axis="x", alpha=0.3)
    return save(fig, path, synthetic)


def sweep(
    lines: Sequence[Line], path: Path, *, over: str, metric: str, synthetic: bool
) -> Path | None:
    """Draw the mean of each method over its adapter parameters or its training images.

    Args:
        lines: of one data set.
        path: the PNG to write.
        over: `parameters` or `images`.
        metric: name of it.
        synthetic: stamp the figure.

    Returns:
        The path; None where no method has two points.
    """
    points: dict[str, list[tuple[float, float, float, float]]] = {}
    for line in lines:
        own, row = line.summary, line.sized.row
        place = line.sized.adapter_params if over == "parameters" else line.train_images
        if own is None or own.value is None or (over == "parameters" and row.budget is None):
            continue
        low = own.value if own.low is None else own.low
        high = own.value if own.high is None else own.high
        points.setdefault(row.method, []).append((place, own.value, low, high))
    points = {method: sorted(of) for method, of in points.items() if len({p[0] for p in of}) > 1}
    if not points:
        return None
    fig = new_figure(7.0, 4.2)
    ax = fig.subplots()
    for number, (method, of) in enumerate(points.items()):
        along, value, lows, highs = (list(column) for column in zip(*of, strict=True))
        style = line_of(number)
        ax.plot(along, value, marker="o", markersize=4, label=text_of(method, 64), **style)
        ax.fill_between(along, lows, highs, color=style["color"], alpha=0.12, linewidth=0)
    ax.set_xscale("log")
    ax.set_xlabel("trained adapter parameters" if over == "parameters" else "training images")
    ax.set_ylabel(f"test {metric}")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    return save(fig, path, synthetic)
