"""What the scripts of this folder share: one linear layer, intervals, result files, figures."""

from __future__ import annotations

import io
import json
import math
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor, nn

import wara
from wara.adapters import Method
from wara.adapters.base import WeightDomainLayer, adapted_layers

RESULTS = Path(__file__).resolve().parent / "results"
ANY = ("*",)
"""Target pattern: every linear layer."""


def zero_layer(
    method: Method, shape: tuple[int, int], dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Return a linear layer `W0 = 0`, `[o, d]`, without bias, adapted by `method`."""
    linear = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)
    nn.init.zeros_(linear.weight)
    return wara.adapt(nn.Sequential(linear), method)


def update_of(model: nn.Module) -> Tensor:
    """Return `ΔW` `[o, d]` of a model of `zero_layer`, detached."""
    (layer,) = adapted_layers(model).values()
    assert isinstance(layer.adapter, WeightDomainLayer)
    return layer.adapter.delta_weight().detach()


def trained(model: nn.Module) -> list[nn.Parameter]:
    """Return what trains."""
    return list(wara.trainable_parameters(model).values())


def interval(values: Sequence[float]) -> dict[str, float | int | None]:
    """Return the mean and its 95 % interval (Student's t) over seeds; no interval for one seed."""
    numbers = np.asarray(values, dtype=np.float64)
    mean, n = float(numbers.mean()), len(numbers)
    if n < 2:
        return {"mean": mean, "low": None, "high": None, "n": n}
    half = float(stats.t.ppf(0.975, n - 1) * numbers.std(ddof=1) / math.sqrt(n))
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def write_result(path: Path, setting: dict[str, Any], result: dict[str, Any]) -> None:
    """Write a result with what it takes to make it again."""
    shown = {k: str(v) if isinstance(v, Path) else v for k, v in setting.items() if k != "out"}
    content = {
        "script": f"benchmarks/papers/{Path(sys.argv[0]).name}",
        "setting": shown,
        "versions": {
            "wara": wara.__version__,
            "torch": str(torch.__version__),
            "scipy": scipy.__version__,
            "python": platform.python_version(),
        },
        "result": rounded(result),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def rounded(value: Any) -> Any:
    """Return the same with floats of six significant digits; infinite ones are refused."""
    if isinstance(value, dict):
        return {str(k): rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"a result is {value}")
        return float(f"{value:.6g}")
    return value


def figure(width: float, height: float) -> Figure:
    """Return an empty figure that needs no window."""
    fig = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(fig)
    return fig


def write_figure(fig: Figure, path: Path) -> None:
    """Write a PNG; the same numbers give the same bytes."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())
