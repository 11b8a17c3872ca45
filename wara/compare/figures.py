"""Figures of a comparison."""

from __future__ import annotations

from pathlib import Path

from wara.compare.across import Ranking
from wara.evaluation.canvas import PALETTE, new_figure, save, text_of


def critical_difference(
    ranking: Ranking, path: str | Path, *, title: str = "", synthetic: bool = False
) -> Path:
    """Draw mean ranks on a line, best left; a bar joins methods that are not told apart.

    Args:
        ranking: of at least one method, see `wara.compare.across.rank_methods`. Without a critical
            difference, ranks are drawn without bars, and the reason is written.
        path: the PNG to write.
        title: what was ranked.
        synthetic: stamp the figure.
    """
    names, k = list(ranking.ranks), len(ranking.ranks)
    left = (k + 1) // 2
    lowest = -0.6 - 0.18 * len(ranking.alike)
    fig = new_figure(7.4, 1.7 + 0.24 * left + 0.16 * len(ranking.alike))
    ax = fig.subplots()
    span = max(k - 1, 1)
    ax.plot([1, max(k, 2)], [0, 0], color="0.2", linewidth=1)
    for rank in range(1, k + 1):
        ax.plot([rank, rank], [0, 0.12], color="0.2", linewidth=1)
        ax.text(rank, 0.18, str(rank), ha="center", va="bottom", fontsize=9)
    for i, name in enumerate(names):
        at = ranking.ranks[name]
        best = i < left
        row = lowest - 0.42 * (i if best else k - 1 - i)
        end = 1 - 0.06 * span if best else max(k, 2) + 0.06 * span
        ax.plot([at, at, end], [0, row, row], color=PALETTE[0] if best else "0.35", linewidth=1)
        label = f"{text_of(name, 64)}  {at:.2f}"
        ax.text(end, row, f"{label} " if best else f" {label}", fontsize=9, va="center",
                ha="right" if best else "left")  # fmt: skip
    for i, group in enumerate(ranking.alike):
        first, last = ranking.ranks[group[0]], ranking.ranks[group[-1]]
        ax.plot([first - 0.02 * span, last + 0.02 * span], [-0.3 - 0.18 * i] * 2, color=PALETTE[1],
                linewidth=4, solid_capstyle="butt")  # fmt: skip
    if ranking.critical is not None:
        ax.plot([1, 1 + ranking.critical], [0.9, 0.9], color=PALETTE[1], linewidth=2, marker="|")
        words = f"critical difference {ranking.critical:.2f} (Nemenyi, 0.05)"
        ax.text(1, 1.0, words, fontsize=8, va="bottom", color=PALETTE[1])
    else:
        ax.text(1, 0.9, ranking.reason or "", fontsize=8, va="bottom", color="0.3")
    rows = lowest - 0.42 * (left - 1)
    ax.set(xlim=(1 - 0.5 * span, max(k, 2) + 0.5 * span), ylim=(rows - 0.3, 1.5))
    ax.set_title(text_of(title, 80) or "Mean ranks", fontsize=10)
    ax.set_xlabel(f"mean rank over {ranking.datasets} data sets (1 is best)", fontsize=9)
    ax.set_yticks([])
    ax.set_xticks([])
    for side in ax.spines.values():
        side.set_visible(False)
    return save(fig, path, synthetic)
