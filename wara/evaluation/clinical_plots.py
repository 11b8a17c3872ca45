"""Figures for those who decide about the use of a model: decision curves, groups side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wara.evaluation.canvas import PALETTE, line_of, new_figure, save, text_of


def decision_curve(
    curve: Mapping[str, Sequence[float]],
    positive: str,
    path: str | Path,
    *,
    threshold: float | None = None,
    synthetic: bool = False,
) -> Path:
    """Draw net benefit over threshold probabilities, beside treating all and treating none.

    Args:
        curve: `threshold`, `model`, `all` and `none`, `[k]` each, see `decisions.net_benefit`.
        positive: what counts as positive, in words.
        path: the PNG to write.
        threshold: of the operating point, drawn as a mark.
        synthetic: stamp the figure.
    """
    fig = new_figure(7.4, 4.2)
    ax = fig.subplots()
    at = np.asarray(curve["threshold"])
    words = {"model": "decide by the model", "all": "treat all", "none": "treat none"}
    for i, (name, label) in enumerate(words.items()):
        look = line_of(i) if name == "model" else {"color": "0.35", "linewidth": 1.2,
                                                "linestyle": "--" if name == "all" else "-"}
        ax.plot(at, curve[name], label=label, **look)  # fmt: skip
    highest = max(max(curve["model"]), max(curve["all"]), 0.01)
    if threshold is not None:
        ax.axvline(threshold, color=PALETTE[1], linewidth=1, linestyle=":", label="operating point")
    # Treating all falls without end; below the model's range it says nothing.
    ax.set(xlim=(0, 1), ylim=(-0.25 * highest, 1.1 * highest))
    ax.set(xlabel="threshold probability", ylabel="net benefit (per image)")
    ax.set_title(f"Decision curve: positive is {text_of(positive, 60)}", fontsize=10)
    ax.grid(alpha=0.25)
    ax.legend(fontsize=8, loc="upper right")
    return save(fig, path, synthetic)


def groups(
    table: Mapping[str, Mapping[str, Any]],
    overall: Mapping[str, Any],
    metric: str,
    title: str,
    path: str | Path,
    *,
    synthetic: bool = False,
) -> Path:
    """Draw one metric of each group with its interval, and the value of all images as a line.

    Args:
        table: group -> `n` and `metrics`, see `wara.evaluation.groups.compare_groups`.
        overall: the metric of all images.
        metric: its name.
        title: what the axis shows.
        path: the PNG to write.
        synthetic: stamp the figure.
    """
    fig = new_figure(7.4, 1.3 + 0.34 * len(table))
    ax = fig.subplots()
    names = list(table)
    for row, name in enumerate(names):
        entry = table[name]["metrics"][metric]
        if entry["value"] is None:
            ax.text(0.02, row, text_of(f"not computed: {entry['reason']}", 70), va="center",
                    fontsize=8, color="0.4", transform=ax.get_yaxis_transform())  # fmt: skip
            continue
        if entry["low"] is not None:
            ax.plot([entry["low"], entry["high"]], [row, row], color=PALETTE[0], linewidth=2)
        ax.plot(entry["value"], row, marker="s", markersize=6, color=PALETTE[0])
    if overall["value"] is not None:
        ax.axvline(overall["value"], color="0.5", linewidth=1, linestyle="--", label="all images")
        ax.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1.0), frameon=False)
    labels = [f"{text_of(name)}  (n {table[name]['n']})" for name in names]
    ax.set_yticks(range(len(names)), labels, fontsize=8)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlabel(text_of(title, 60))
    ax.grid(alpha=0.25, axis="x")
    return save(fig, path, synthetic)
