"""Evaluation: metrics, intervals, calibration and plots; numbers in, numbers out.

`evaluate` and `point_metrics` are loaded on first use, so that `import wara.evaluation` costs
neither scikit-learn nor matplotlib.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wara.evaluation.metrics import evaluate, point_metrics

__all__ = ["evaluate", "point_metrics"]


def __getattr__(name: str) -> Any:
    """Import the two everyday functions when they are first asked for."""
    if name in __all__:
        from wara.evaluation import metrics

        return getattr(metrics, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
