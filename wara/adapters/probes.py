"""The two ends of the scale: train only the head, or train everything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import nn

from wara.adapters.base import Method, options


@options
class LinearProbe(Method):
    """Train the classifier on frozen features."""

    name: ClassVar[str] = "linear_probe"
    summary: ClassVar[str] = "only the classifier trains, on frozen features"
    rates: ClassVar[Mapping[str, float]] = {"head": 2e-3}


@options
class Full(Method):
    """Train every weight."""

    name: ClassVar[str] = "full"
    summary: ClassVar[str] = "every weight trains"
    rates: ClassVar[Mapping[str, float]] = {"adapter": 1e-4, "head": 2e-3}

    def trains(self, name: str, owner: nn.Module) -> bool:
        """Return true for every base parameter."""
        return True
