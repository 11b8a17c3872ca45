"""LoRA (arXiv 2106.09685): the weight-domain baseline that WaRA contains."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from wara.adapters.base import (
    AdapterLayer,
    LowRankLayer,
    WeightDomainLayer,
    check_rank,
    require,
)
from wara.adapters.targets import Target, TargetedMethod


class LoRALayer(LowRankLayer, WeightDomainLayer):
    """`ΔW = (α/r) B A` on each row group.

    `A` starts Kaiming-uniform as in the authors' code and `B` at zero: it starts as the base layer.
    """

    def __init__(
        self,
        target: Target,
        *,
        rank: int,
        scale: float,
        dropout: float = 0.0,
    ) -> None:
        linear = target.linear
        super().__init__(
            target.rows,
            linear.in_features,
            linear.out_features,
            rank=rank,
            scale=scale,
            dropout=dropout,
        )
        self.down, self.up = low_rank_parameters(linear.in_features, self.sizes, rank)

    def delta_weight(self) -> Tensor:
        """Return `(α/r) B A`, `[o, d]`."""
        return self.product()


def low_rank_parameters(
    in_features: int, sizes: list[int], rank: int
) -> tuple[nn.Parameter, nn.Parameter]:
    """Return fresh factors of all row groups of a layer.

    Args:
        in_features: `d`.
        sizes: rows of each group; `g` groups.
        rank: `r`.

    Returns:
        `A` `[g r, d]`, each group Kaiming-uniform with `a = √5`, and `B` `[Σ sizes, r]`, zero.
    """
    down = torch.empty(len(sizes) * rank, in_features)
    nn.init.kaiming_uniform_(down, a=math.sqrt(5))
    return nn.Parameter(down), nn.Parameter(torch.zeros(sum(sizes), rank))


@dataclass(frozen=True, kw_only=True)
class LoRA(TargetedMethod):
    """Low-rank adaptation (arXiv 2106.09685): `W = W0 + (α/r) B A`.

    Args:
        rank: `r`.
        alpha: `α`; none means `α = r`, a scale of 1.
        dropout: probability of dropping an input entry on the adapter's path.
        targets: see `TargetedMethod`.
        blocks: see `TargetedMethod`.
    """

    name: ClassVar[str] = "lora"
    summary: ClassVar[str] = "low-rank update of the weight; every token gets the same one"
    lr: ClassVar[float] = 6e-3

    rank: int = 4
    alpha: float | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_low_rank(self.rank, self.alpha, self.dropout)

    def build(self, model: nn.Module, targets: list[Target]) -> list[AdapterLayer]:
        """Return one `LoRALayer` per target."""
        scale = scaling(self.alpha, self.rank)
        return [
            LoRALayer(target, rank=self.rank, scale=scale, dropout=self.dropout)
            for target in targets
        ]


def scaling(alpha: float | None, rank: int) -> float:
    """Return `α / r`, or 1 when `alpha` is none."""
    return 1.0 if alpha is None else alpha / rank


def check_low_rank(rank: int, alpha: float | None, dropout: float) -> None:
    """Refuse impossible options of a low-rank method.

    Args:
        rank: `r`.
        alpha: `α` or none.
        dropout: probability.

    Raises:
        WaraError: kind `config`.
    """
    check_rank(rank)
    require(
        alpha is None or alpha > 0, f"alpha is {alpha}", "alpha", "set a number above 0, or null"
    )
    require(0 <= dropout < 1, f"dropout is {dropout}", "dropout", "set a number in [0, 1)")
