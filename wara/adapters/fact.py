"""FacT-TT (arXiv 2212.03145): the changes of all weights as one tensor train."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from wara.adapters.base import LinearAdapter, WeightDomainLayer, options, require
from wara.adapters.lora import MOST_RANK
from wara.adapters.targets import Target, TargetedMethod
from wara.schema import from_list


class FacTLayer(WeightDomainLayer):
    """`ΔW_ij = s · V Σ_ij Uᵀ` for each `d × d` block of each adapted matrix.

    A matrix `[i d, j d]` has `i j` blocks: one for each of q, k, v and o, four for fc1 and for fc2
    of a ViT whose MLP is four times as wide.

    Args:
        target: the linear layer and its row groups, sides multiples of `d`.
        first: `U`, `[r, d]`, shared by all layers.
        last: `V`, `[d, r]`, shared by all layers.
        scale: `s`.
        dropout: probability of dropping one of the `r` numbers between `Σ` and `V`.
    """

    def __init__(
        self,
        target: Target,
        *,
        first: nn.Parameter,
        last: nn.Parameter,
        scale: float,
        dropout: float,
    ) -> None:
        super().__init__(target.rows, target.linear.out_features)
        self.first, self.last, self.scale = first, last, scale
        self.dropout = nn.Dropout(dropout) if dropout else None
        rank, width = first.shape
        self.starts = [place for rows in self.rows for place in range(*rows, width)]
        columns = target.linear.in_features // width
        core = torch.empty(len(self.starts), columns, rank, rank)
        self.core = nn.Parameter(core.uniform_(-(rank**-0.5), rank**-0.5))

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return `Σ Uᵀ` `[i r, j d]` and `V` for all blocks as one matrix `[o, i r]`."""
        rank, width = self.first.shape
        down = torch.einsum("ijab,bd->iajd", self.core, self.first).flatten(2).flatten(0, 1)
        up = self.last.new_zeros(self.out_features, len(self.starts) * rank)
        for i, start in enumerate(self.starts):
            up[start : start + width, i * rank : (i + 1) * rank] = self.last
        return down, up

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return `[b, n, o]` for input `[b, n, d]`; see the class."""
        down, up = self.factors()
        flat = x.reshape(-1, x.shape[-1])
        y, z = F.linear(flat, weight, bias), F.linear(flat, down.to(flat.dtype))
        z = z if self.dropout is None else self.dropout(z)
        y = y.addmm_(z.to(y.dtype), up.T.to(y.dtype), alpha=self.scale)
        return y.reshape(*x.shape[:-1], self.out_features)

    def delta_weight(self) -> Tensor:
        """Return `s · V Σ Uᵀ`, `[o, d]`, zero in rows that are not adapted."""
        down, up = self.factors()
        return self.scale * (up @ down)


@options
class FacT(TargetedMethod):
    """FacT-TT (arXiv 2212.03145): `ΔW = s · V Σ Uᵀ`, `U` and `V` shared by the whole model.

    All matrices are cut into blocks `d × d`; a block of a layer has `Σ` `[r, r]` of its own, so `t`
    blocks train `2 d r + t r²` numbers. `V` starts at zero, so it starts as the base model.
    """

    name: ClassVar[str] = "fact_tt"
    summary: ClassVar[str] = "low-rank updates with factors shared by all layers"
    # LoRA's: with V at zero a product starts to move as with its B.
    rates: ClassVar[Mapping[str, float]] = {"adapter": 6e-3, "head": 2e-3}
    knob: ClassVar[tuple[str, ...]] = ("rank",)

    targets: Annotated[tuple[str, ...], from_list] = Field(
        ("q", "k", "v", "o", "fc1", "fc2"),
        description="What is adapted: q k v o qkv fc1 fc2, or patterns.",
    )
    rank: int = Field(16, ge=1, le=MOST_RANK, description="Rank r of the tensor train.")
    scale: float = Field(1.0, gt=0, le=1e6, description="Factor s on the update.")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Probability of dropping a number between Σ and V."
    )

    def build(self, model: nn.Module, targets: Sequence[Target]) -> list[LinearAdapter]:
        """Return one layer per target, all with the same `U` and `V`."""
        sides = {(side, t.name) for t in targets for shape in t.shapes for side in shape}
        width = min(side for side, _ in sides)
        for side, name in sorted(sides):
            what = f"{name} has a side of {side}, which is no multiple of {width}"
            require(side % width == 0, what, "targets", "leave it out, as in [q, k, v, o]")
        first, last = torch.empty(self.rank, width), torch.zeros(width, self.rank)
        nn.init.kaiming_uniform_(first, a=math.sqrt(5))
        u, v = nn.Parameter(first), nn.Parameter(last)
        return [
            FacTLayer(target, first=u, last=v, scale=self.scale, dropout=self.dropout)
            for target in targets
        ]
