"""How far a run is, and what its epochs gave; plain values, part of every checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Row = dict[str, float | None]


@dataclass
class Progress:
    """State of a run between two epochs."""

    epoch: int = 0
    """Epochs completed."""
    step: int = 0
    """Optimiser steps made."""
    seconds: float = 0.0
    """Time spent training, over all processes that took their turn at the run."""
    monitor: str = ""
    """Metric that picks the best epoch; `val_loss` where the wanted one is undefined."""
    best_epoch: int = 0
    best_value: float | None = None
    stale: int = 0
    """Epochs since the best one."""
    history: list[Row] = field(default_factory=list)
    micro: list[list[int]] = field(default_factory=list)
    """`[batch, images]`: from that training batch of the run on (0-based), so many images at a time
    are computed; one more entry each time memory ran out."""
    changes: list[dict[str, Any]] = field(default_factory=list)
    """What breaks exactness and was allowed by name: `name`, `was`, `now`, `after_epoch`."""

    @property
    def best(self) -> Row:
        """The row of the best epoch so far; empty before the first."""
        return self.history[self.best_epoch - 1] if self.best_epoch else {}

    def better(self, value: float) -> bool:
        """Whether `value` beats the best so far; the earlier epoch wins a tie."""
        if self.best_value is None:
            return True
        return value < self.best_value if self.monitor == "val_loss" else value > self.best_value

    def note(self, row: Row, value: float) -> bool:
        """Count an epoch in; return whether it is the best so far."""
        improved = self.better(value)
        if improved:
            self.best_epoch, self.best_value, self.stale = self.epoch, value, 0
        else:
            self.stale += 1
        self.history.append(row)
        return improved
