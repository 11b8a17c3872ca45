"""The two ends of the scale: train only the head, or train everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from wara.adapters.base import Method


@dataclass(frozen=True, kw_only=True)
class LinearProbe(Method):
    """Train the classifier on frozen features."""

    name: ClassVar[str] = "linear_probe"
    summary: ClassVar[str] = "only the classifier trains, on frozen features"


@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """Train every weight."""

    name: ClassVar[str] = "full"
    summary: ClassVar[str] = "every weight trains"
    lr: ClassVar[float] = 1e-4

    def trains(self, name: str, owner: nn.Module) -> bool:
        """Return true for every base parameter."""
        return True
