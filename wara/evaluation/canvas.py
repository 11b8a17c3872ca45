"""What all figures share: canvas, colours, names as text, and the way into a file.

Every figure is a `Figure` of its own (Agg canvas, no pyplot, so no window, no global state and no
backend to set), written whole or not at all. `synthetic=True` prints a line on it, so that a curve
of phantoms is never taken for one of patients. Colours are Okabe and Ito's, told apart by
colour-blind readers; line styles repeat them.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from wara.storage import write_bytes

STAMP = "synthetic phantoms: drawn by code, no patient was imaged"
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", ":")
_DPI = 130


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of that size, inches."""
    fig = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(fig)
    return fig


def save(fig: Figure, path: str | Path, synthetic: bool) -> Path:
    """Write the PNG, stamped when synthetic; return its path."""
    if synthetic:
        height = fig.get_size_inches()[1]
        share = 0.26 / height
        fig.set_layout_engine("constrained", rect=(0, share, 1, 1 - share))
        fig.text(0.5, 0.05 / height, STAMP, ha="center", va="bottom", fontsize=8, color=PALETTE[1])
    out, buffer = Path(path), io.BytesIO()
    # No version or date in the file: the same numbers give the same bytes.
    fig.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    write_bytes(out, buffer.getvalue())
    return out


def text_of(name: str, longest: int = 32) -> str:
    """Return a name that matplotlib prints as it is: no mathtext, not hidden, not endless."""
    name = str(name).replace("$", r"\$").replace("\n", " ")
    if len(name) > longest:  # layer names differ at both ends
        name = name[: longest // 2 - 1] + "…" + name[-(longest - longest // 2) :]
    return f" {name}" if name.startswith("_") else name


def line_of(i: int) -> dict[str, Any]:
    """Return how the line of series `i` looks, as matplotlib takes it."""
    style = _STYLES[i // len(PALETTE) % len(_STYLES)]
    return {"color": PALETTE[i % len(PALETTE)], "linestyle": style, "linewidth": 1.5}


def say(ax: Axes, words: str) -> None:
    """Write words in the middle of an empty panel."""
    ax.text(0.5, 0.5, words, ha="center", va="center", transform=ax.transAxes, color="0.3")
