"""Figures of a run: numbers in, one PNG out, and its path returned; see `canvas`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import (
    average_precision_score,
    precision_recall_curve,
    roc_auc_score,
    roc_curve,
)

from wara.errors import WaraError
from wara.evaluation.calibration import confidence_and_hits, ece, reliability_bins
from wara.evaluation.canvas import PALETTE, line_of, new_figure, save, say, text_of

_HEADLINE = ("auc_macro", "qwk", "balanced_accuracy", "accuracy", "f1_macro", "ece")


def learning_curves(
    rows: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    monitor: str = "",
    best_epoch: int = 0,
    synthetic: bool = False,
) -> Path:
    """Draw losses, validation metrics and learning rates over epochs.

    Args:
        rows: one mapping per epoch, as read from `metrics.csv` (strings or numbers). Columns:
            `epoch`, losses (`train_loss`, `val_loss`), metrics (`val_auc_macro`, ...; without
            prefix counts as validation), rates (names with `lr`). Empty and non-finite cells leave
            a gap; other columns are ignored.
        path: the PNG to write.
        monitor: metric that picked the best epoch; drawn wide, on top of the others.
        best_epoch: marked by a line in each panel; 0 marks none.
        synthetic: stamp the figure.
    """
    series = {str(key): _column(rows, key) for row in rows[:1] for key in row}
    epochs = series.pop("epoch", np.arange(len(rows), dtype=float))
    panels = _panels(series)
    fig = new_figure(4.6 * max(len(panels), 1), 4.3)
    if not panels:
        say(fig.subplots(), "no finite number was logged")
    for ax, (title, columns) in zip(
        fig.subplots(1, max(len(panels), 1), squeeze=False)[0] if panels else (),
        panels,
        strict=True,
    ):
        for i, (name, label) in enumerate(columns.items()):
            look = line_of(i)
            if label == monitor:
                look |= {"linewidth": 3, "zorder": 3}
            ax.plot(epochs, series[name], label=text_of(label), marker="o", markersize=2.5, **look)
        if best_epoch:
            words = f"best epoch {best_epoch}"
            ax.axvline(best_epoch, color="0.35", linewidth=1, linestyle="--", label=words, zorder=1)
        ax.set(title=title, xlabel="epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        if title == "learning rate" and all((series[n][1:] > 0).any() for n in columns):
            ax.set_yscale("log")
        ax.grid(alpha=0.25)
        # Below the panel: inside, it would lie on a curve sooner or later.
        ax.legend(
            fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2
        )
    return save(fig, path, synthetic)


def _panels(series: Mapping[str, NDArray[Any]]) -> list[tuple[str, dict[str, str]]]:
    """Return the titles of the panels, each with its columns and what they are called."""

    def is_rate(name: str) -> bool:
        return "lr" in name.replace("/", "_").replace("-", "_").split("_")

    metric_columns = {
        name: label
        for name in series
        for label in _HEADLINE
        if name in (label, f"val_{label}", f"val/{label}")
    }
    panels = [
        ("loss", {name: name for name in series if "loss" in name and not is_rate(name)}),
        ("validation", dict(sorted(metric_columns.items(), key=lambda i: _HEADLINE.index(i[1])))),
        ("learning rate", {name: name for name in series if is_rate(name)}),
    ]
    panels = [
        (title, {n: label for n, label in columns.items() if np.isfinite(series[n]).any()})
        for title, columns in panels
    ]
    return [(title, columns) for title, columns in panels if columns]


def roc_curves(
    labels: ArrayLike,
    probs: ArrayLike,
    classes: Sequence[str],
    path: str | Path,
    *,
    synthetic: bool = False,
) -> Path:
    """Draw one ROC curve per class (one against the rest; two classes: the second one).

    Args:
        labels: class indices [n], or 0/1 [n, c] for multilabel.
        probs: [n, c].
        classes: c names. One without positives or without negatives is named, not drawn.
        path: the PNG to write.
        synthetic: stamp the figure.
    """
    curves, skipped = one_against_rest(labels, probs, classes, need_negatives=True)
    fig, ax = _curve_axes(len(curves) + len(skipped))
    for i, (name, truth, score) in enumerate(curves):
        false_positive, true_positive, _ = roc_curve(truth, score)
        label = f"{text_of(name)}  {roc_auc_score(truth, score):.3f} (n={truth.sum()})"
        ax.plot(false_positive, true_positive, label=label, **line_of(i))
    ax.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, label="chance  0.500")
    ax.set(title="ROC", xlabel="1 - specificity", ylabel="sensitivity")
    _curve_legend(ax, f"AUROC (n of {len(np.asarray(probs))} images)", skipped, bool(curves))
    return save(fig, path, synthetic)


def pr_curves(
    labels: ArrayLike,
    probs: ArrayLike,
    classes: Sequence[str],
    path: str | Path,
    *,
    synthetic: bool = False,
) -> Path:
    """Draw one precision-recall curve per class, with average precision and prevalence.

    Arguments as `roc_curves`; a class without positives is named, not drawn.
    """
    curves, skipped = one_against_rest(labels, probs, classes, need_negatives=False)
    fig, ax = _curve_axes(len(curves) + len(skipped))
    for i, (name, truth, score) in enumerate(curves):
        precision, recall, _ = precision_recall_curve(truth, score)
        average = average_precision_score(truth, score)
        label = f"{text_of(name)}  {average:.3f} ({truth.mean():.2f}, n={truth.sum()})"
        ax.plot(recall, precision, drawstyle="steps-post", label=label, **line_of(i))
    ax.set(title="Precision and recall", xlabel="recall (sensitivity)", ylabel="precision (PPV)")
    _curve_legend(ax, "average precision (prevalence, n)", skipped, bool(curves))
    return save(fig, path, synthetic)


def confusion(
    labels: ArrayLike,
    preds: ArrayLike,
    classes: Sequence[str],
    path: str | Path,
    *,
    synthetic: bool = False,
) -> Path:
    """Draw the confusion matrix, counts and row shares side by side.

    Args:
        labels: class indices [n]: a c x c matrix. 0/1 [n, c] (multilabel): one row per label with
            found, missed, false alarm, rightly absent; shares are of the images with, and without.
        preds: same shape as `labels`.
        classes: c names.
        path: the PNG to write.
        synthetic: stamp the figure.
    """
    y, called, c = np.asarray(labels), np.asarray(preds), len(classes)
    if y.shape != called.shape or (y.ndim == 2 and y.shape[1] != c):
        raise WaraError("usage", f"labels {y.shape} and predictions {called.shape} do not fit")
    columns = [text_of(name) for name in classes]
    tally = y.sum(axis=0) if y.ndim == 2 else np.bincount(y.astype(np.int64), minlength=c)
    rows = [f"{name} (n={n:.0f})" for name, n in zip(columns, tally, strict=True)]
    if y.ndim == 2:
        y, called = y.astype(bool), called.astype(bool)
        cells = [y & called, y & ~called, ~y & called, ~y & ~called]
        counts = np.stack([cell.sum(axis=0) for cell in cells], axis=1)
        whole = np.repeat(np.stack([y.sum(axis=0), (~y).sum(axis=0)], axis=1), 2, axis=1)
        columns = ["found", "missed", "false alarm", "rightly absent"]
        titles, across = ("images", "share of images with / without the label"), ""
    else:
        counts = np.zeros((c, c), dtype=np.int64)
        np.add.at(counts, (y.astype(np.int64), called.astype(np.int64)), 1)
        whole = counts.sum(axis=1, keepdims=True).repeat(c, axis=1)
        titles, across = ("images", "share of the true class"), "predicted"
    shares = np.divide(counts, whole, out=np.full(counts.shape, np.nan), where=whole > 0)

    longest = max(len(name) for name in rows)
    cell = 0.5 if c > 8 else 0.62
    width = max(2.6, len(columns) * (cell if across else 0.9)) + 0.075 * longest + 0.5
    fig = new_figure(2 * width, max(2.4, c * cell) + (0.06 * longest if across else 0.5) + 0.9)
    axes = fig.subplots(1, 2)
    for ax, title, values, form in zip(axes, titles, (counts, shares), ("d", ".2f"), strict=True):
        ax.imshow(np.nan_to_num(shares), cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for i, j in np.ndindex(*counts.shape):
            undefined = form != "d" and np.isnan(shares[i, j])
            ink = "white" if shares[i, j] > 0.55 else "black"
            number = "-" if undefined else format(values[i, j], form)
            ax.text(j, i, number, ha="center", va="center", color=ink, fontsize=8 if c < 9 else 7)
        turn = 90 if across and (longest > 6 or c > 8) else 0 if across else 25
        align = "right" if turn == 25 else "center"
        ax.set_xticks(range(len(columns)), columns, rotation=turn, ha=align, fontsize=8)
        ax.set_yticks(range(c), rows, fontsize=8)
        ax.set(title=title, xlabel=across, ylabel="true class" if across else "label")
        ax.title.set_fontsize(10)
    return save(fig, path, synthetic)


def reliability(
    labels: ArrayLike, probs: ArrayLike, path: str | Path, *, synthetic: bool = False
) -> Path:
    """Draw the reliability diagram: predicted probability against what came true, 15 bins.

    Class indices [n]: the top class's probability against the share right. Multilabel [n, c]: all
    labels' probabilities pooled, while the ECE in the title is the mean over labels.
    Below it, how many predictions each bin holds (logarithmic).
    """
    confidence, hits = confidence_and_hits(labels, probs)
    table = reliability_bins(confidence, hits)
    pooled = confidence.shape[1] > 1
    fig = new_figure(4.6, 5.4)
    top, bottom = fig.subplots(2, 1, sharex=True, height_ratios=[3.2, 1])
    filled = table.count > 0
    middles = (table.edges[:-1] + table.edges[1:]) / 2
    low = np.minimum(table.confidence, table.frequency)[filled]
    gap = np.abs(table.confidence - table.frequency)[filled]
    top.plot([0, 1], [0, 1], color="0.5", linewidth=1, linestyle="--", label="perfect")
    top.bar(
        table.confidence[filled],
        gap,
        bottom=low,
        width=0.03,
        color=PALETTE[1],
        alpha=0.35,
        label="gap",
    )
    top.plot(
        table.confidence[filled],
        table.frequency[filled],
        color=PALETTE[0],
        marker="o",
        markersize=4,
        label="observed",
    )
    top.set(
        ylabel="share that came true" if pooled else "accuracy", xlim=(0, 1), ylim=(-0.02, 1.02)
    )
    top.set_title(f"Reliability, ECE {ece(labels, probs):.3f}" + (" (mean of labels)" * pooled))
    top.legend(loc="upper left", fontsize=8)
    top.grid(alpha=0.25)
    bottom.bar(middles, table.count, width=1 / len(middles), color=PALETTE[0], edgecolor="white")
    bottom.set_yscale("log")
    # From below 1, so that a power of ten is in sight; labels between them would overlap.
    bottom.set_ylim(bottom=0.7)
    bottom.yaxis.set_minor_formatter(NullFormatter())
    bottom.set(xlabel="predicted probability" + ("" if pooled else " of the top class"))
    bottom.set_ylabel("predictions" if pooled else "images")
    return save(fig, path, synthetic)


def subband_energy(
    energy: Mapping[str, Mapping[str, float]], path: str | Path, *, synthetic: bool = False
) -> Path:
    """Draw the update's energy per layer and subband, logarithmic (WaRA, arXiv 2506.24092, Fig. 2).

    Args:
        energy: layer -> subband -> energy, layers in depth order. A cell without a positive finite
            number is hatched; a layer may lack a subband.
        path: the PNG to write.
        synthetic: stamp the figure.

    Raises:
        WaraError: `usage` without layers (a method that has no subbands has no such figure).
    """
    layers, bands = list(energy), _in_order(energy)
    if not bands:
        raise WaraError("usage", "no subband energies to draw")
    values = np.array([[float(energy[n].get(b, np.nan)) for b in bands] for n in layers])
    shown = np.ma.masked_where(~(np.isfinite(values) & (values > 0)), values)
    fig = new_figure(
        2.4 + 0.075 * max(map(len, layers)) + 0.55 * len(bands), 1.3 + 0.2 * len(layers)
    )
    ax = fig.subplots()
    ax.patch.set(hatch="////", edgecolor="0.6", facecolor="white")
    ax.set_xticks(range(len(bands)), [text_of(band) for band in bands], fontsize=8)
    ax.set_yticks(range(len(layers)), [text_of(name, 48) for name in layers], fontsize=7)
    ax.set(title="Energy of the update", xlabel="subband, coarse to fine", ylabel="layer")
    low, high = (1.0, 10.0) if shown.count() == 0 else (float(shown.min()), float(shown.max()))
    image = ax.imshow(
        shown, cmap="viridis", aspect="auto", norm=LogNorm(low, high if high > low else low * 10)
    )
    fig.colorbar(image, ax=ax, label="energy", pad=0.02)
    if shown.count() < shown.size:
        ax.set_xlabel("subband, coarse to fine (hatched: none)")
    return save(fig, path, synthetic)


def singular_values(
    values: Mapping[str, Mapping[str, Sequence[float] | ArrayLike]],
    path: str | Path,
    *,
    synthetic: bool = False,
) -> Path:
    """Draw the singular values of the update: a panel per subband, a line per layer.

    Args:
        values: layer -> subband -> singular values in any order, layers in depth order. Zeros are
            left out (the axis is logarithmic).
        path: the PNG to write.
        synthetic: stamp the figure.

    Raises:
        WaraError: `usage` without layers.
    """
    layers, bands = list(values), _in_order(values)
    if not bands:
        raise WaraError("usage", "no singular values to draw")
    across = min(len(bands), 4)
    down = math.ceil(len(bands) / across)
    few = len(layers) <= len(PALETTE)
    fig = new_figure(max(2.3 * across, 4.0) + 1.6, 2.2 * down + 0.7)
    axes = fig.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    panels = list(zip(axes.flat[: len(bands)], bands, strict=True))
    shade = colormaps["viridis"]
    for i, name in enumerate(layers):
        look = line_of(i) if few else {"color": shade(i / (len(layers) - 1)), "linewidth": 0.9}
        for ax, band in panels:
            found = np.sort(np.asarray(values[name].get(band, ()), dtype=np.float64))[::-1]
            found = np.where(found > 0, found, np.nan)
            ax.plot(
                np.arange(1, len(found) + 1),
                found,
                marker="o",
                markersize=2,
                label=text_of(name),
                **look,
            )
    for ax, band in panels:
        ax.set_title(text_of(band), fontsize=9)
        ax.grid(alpha=0.25)
        ax.set_yscale("log")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    for ax in axes.flat[len(bands) :]:
        ax.set_axis_off()
    fig.suptitle("Singular values of the update")
    # On the axes: a label of the whole figure would lie under the stamp.
    for ax in axes[-1]:
        ax.set_xlabel("index", fontsize=9)
    fig.supylabel("singular value", fontsize=9)
    if few:
        handles = axes.flat[0].get_lines()
        fig.legend(handles=handles, loc="outside right upper", fontsize=7)
    else:
        from matplotlib.cm import ScalarMappable

        scale = ScalarMappable(Normalize(0, len(layers) - 1), shade)
        bar = fig.colorbar(scale, ax=axes, pad=0.02, aspect=30)
        picks = np.unique(np.linspace(0, len(layers) - 1, 6).round().astype(int))
        bar.set_ticks(picks.tolist(), labels=[text_of(layers[i]) for i in picks], fontsize=7)
    return save(fig, path, synthetic)


def _column(rows: Sequence[Mapping[str, Any]], key: str) -> NDArray[np.float64]:
    def number(cell: Any) -> float:
        try:
            value = float(cell)
        except (TypeError, ValueError):  # an empty cell, or a column of words
            return math.nan
        return value if math.isfinite(value) else math.nan

    return np.array([number(row.get(key)) for row in rows])


def one_against_rest(
    labels: ArrayLike, probs: ArrayLike, classes: Sequence[str], *, need_negatives: bool
) -> tuple[list[tuple[str, NDArray[Any], NDArray[Any]]], list[str]]:
    """Return (name, 0/1 truth [n], score [n]) of the classes with a curve, and words on the others.

    Args:
        labels: class indices [n], or 0/1 [n, c] for multilabel.
        probs: [n, c].
        classes: c names; of two that exclude each other, the second has the curve.
        need_negatives: whether a curve needs images without the class too.

    Raises:
        WaraError: `usage` when the shapes do not fit, `nonfinite` for a probability that is none.
    """
    y, p = np.asarray(labels), np.asarray(probs, dtype=np.float64)
    if p.ndim != 2 or p.shape[1] != len(classes) or y.shape not in (p.shape, p.shape[:1]):
        raise WaraError("usage", f"labels {y.shape}, probabilities {p.shape}, {len(classes)} names")
    if not np.isfinite(p).all():
        raise WaraError("nonfinite", "a probability is NaN or infinite")
    curves, skipped = [], []
    for k, name in enumerate(classes):
        if y.ndim == 1 and len(classes) == 2 and k == 0:
            continue  # the mirror image of the other one
        truth = (y[:, k] if y.ndim == 2 else y == k).astype(np.int64)
        if not truth.any():
            skipped.append(f"{text_of(name)}  no positives")
        elif need_negatives and truth.all():
            skipped.append(f"{text_of(name)}  no negatives")
        else:
            curves.append((name, truth, p[:, k]))
    return curves, skipped


def _curve_axes(entries: int) -> tuple[Figure, Axes]:
    fig = new_figure(7.4, max(4.6, 1.2 + 0.22 * entries))
    ax = fig.subplots()
    ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal", anchor="W")
    ax.grid(alpha=0.25)
    return fig, ax


def _curve_legend(ax: Axes, title: str, skipped: Sequence[str], drawn: bool) -> None:
    for words in skipped:
        ax.plot([], [], color="none", label=words)
    if not drawn:
        say(ax, "no class has both positives and negatives" if skipped else "no class")
    ax.legend(
        title=title,
        loc="upper left",
        bbox_to_anchor=(1.02, 1.0),
        borderaxespad=0,
        fontsize=8,
        title_fontsize=8,
        frameon=False,
    )


def _in_order(table: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return all subbands in order of first appearance."""
    return list(dict.fromkeys(band for row in table.values() for band in row))
