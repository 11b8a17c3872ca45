"""What every figure has in common: canvas, colours, stamp, and how it becomes a file."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from wara.storage import write_bytes

STAMP = "synthetic phantoms: drawn by code, no patient was imaged"
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DPI = 130


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches, on its own canvas."""
    fig = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(fig)
    return fig


def save_png(fig: Figure, path: str | Path, synthetic: bool) -> Path:
    """Write a figure as PNG, whole or not at all.

    Args:
        fig: of `new_figure`.
        path: where to.
        synthetic: stamp it.

    Returns:
        The path.

    Raises:
        WaraError: kind "storage" when it cannot be written.
    """
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


def plain_text(name: str, longest: int = 32) -> str:
    """Return a name that matplotlib prints as it is: no mathtext, not hidden, not endless."""
    name = str(name).replace("$", r"\$").replace("\n", " ")
    if len(name) > longest:  # layer names differ at both ends
        name = name[: longest // 2 - 1] + "…" + name[-(longest - longest // 2) :]
    return f" {name}" if name.startswith("_") else name
