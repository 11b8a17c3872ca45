"""LoRA (arXiv 2106.09685): the weight-domain baseline that WaRA contains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from wara.adapters.base import (
    AdapterLayer,
    LinearAdapter,
    Method,
    WeightDomainLayer,
    options,
    require,
)
from wara.adapters.targets import Target, TargetedMethod

MOST_RANK = 4096
"""A slip of the keyboard must not become an allocation."""
MOST_ALPHA = 1e6


class LowRankLayer(LinearAdapter):
    """Shared arithmetic of the low-rank adapters: `y = x W0ᵀ + b0 + scale · mix(x Aᵀ) Bᵀ`.

    Row groups are handled together: `A` holds the factors of all groups `[g r, d]`, and `B` is
    applied as one block-diagonal matrix. With ranks this small the product is bound by reading
    the activations, which this way are read once.

    Args:
        target: the linear layer, `d` wide in and `o` out, and its `g` row groups.
        rank: `r` per group.
        scale: `α / r`.
        dropout: probability of dropping an input entry on the adapter's path.
    """

    down: Tensor
    up: Tensor

    def __init__(self, target: Target, *, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__(target.rows, target.linear.out_features)
        self.in_features = target.linear.in_features
        self.rank, self.scale = rank, scale
        self.dropout = nn.Dropout(dropout) if dropout else None
        self.sizes = [stop - start for start, stop in self.rows]

    def fresh(self) -> None:
        """Make the factors anew: `A` Kaiming-uniform with `a = √5` per group, `B` zero."""
        down = torch.empty(self.groups * self.rank, self.in_features)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(torch.zeros(sum(self.sizes), self.rank))

    @property
    def groups(self) -> int:
        """Number of adapted row groups."""
        return len(self.rows)

    def block_up(self) -> Tensor:
        """Return `B` of all groups as one matrix `[o, g r]`, zero outside its blocks."""
        blocks = self.up.split(self.sizes)
        if self.groups == 1 and self.sizes[0] == self.out_features:
            return self.up
        out = self.up.new_zeros(self.out_features, self.groups * self.rank)
        for i, ((start, stop), block) in enumerate(zip(self.rows, blocks, strict=True)):
            out[start:stop, i * self.rank : (i + 1) * self.rank] = block
        return out

    def mix(self, z: Tensor) -> Tensor:
        """Update `[…, g r]` in rank space; plain low rank leaves it alone."""
        return z

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return `[b, n, o]` for input `[b, n, d]`; see the class."""
        # Flat rows, so that the output is a tensor of its own and not a view: the update can
        # then be added in place by the product itself, without a pass of its own over [b, n, o].
        flat = x.reshape(-1, x.shape[-1])
        y = F.linear(flat, weight, bias)
        path = flat if self.dropout is None else self.dropout(flat)
        z = F.linear(path, self.down)
        z = self.mix(z.reshape(*x.shape[:-1], -1)).reshape(flat.shape[0], -1)
        y = y.addmm_(z.to(y.dtype), self.block_up().T.to(y.dtype), alpha=self.scale)
        return y.reshape(*x.shape[:-1], self.out_features)

    def product(self, middle: Tensor | None = None) -> Tensor:
        """Return `scale · B M A`, `[o, d]`, with `M` `[g, r, r]` between, or nothing."""
        down = self.down.reshape(self.groups, self.rank, self.in_features)
        if middle is not None:
            down = middle.to(down.dtype) @ down
        out = self.down.new_zeros(self.out_features, self.in_features)
        for (start, stop), up, factor in zip(
            self.rows, self.up.split(self.sizes), down, strict=True
        ):
            out[start:stop] = up @ factor
        return self.scale * out


class LoRALayer(LowRankLayer, WeightDomainLayer):
    """`ΔW = (α/r) B A` on each row group.

    `A` starts Kaiming-uniform as in the authors' code and `B` at zero: it starts as the base layer.
    """

    def __init__(self, target: Target, **low_rank: Any) -> None:
        super().__init__(target, **low_rank)
        self.fresh()

    def delta_weight(self) -> Tensor:
        """Return `(α/r) B A`, `[o, d]`."""
        return self.product()


def full_rank(targets: Sequence[Target]) -> int:
    """Return the shortest side of the matrices of some targets, beyond which a rank adds nothing.

    Args:
        targets: at least one.
    """
    return min(side for target in targets for shape in target.shapes for side in shape)


@options
class LowRankMethod(TargetedMethod):
    """Options of methods whose update is a product of rank `r`."""

    knob: ClassVar[tuple[str, ...]] = ("rank",)

    rank: int = Field(4, ge=1, le=MOST_RANK, description="Rank r of the update.")
    alpha: float | None = Field(
        None, gt=0, le=MOST_ALPHA, description="The update is scaled by alpha / rank; null: by 1."
    )

    def knob_range(self, targets: Sequence[Target]) -> tuple[int, int | None]:
        """Return 1, and the rank from which a product has every matrix there is."""
        return 1, full_rank(targets)

    def layers(self, model: nn.Module) -> Mapping[str, AdapterLayer]:
        """Return one adapter layer per target, see `build`.

        Raises:
            WaraError: kind `config` when the rank exceeds a side of a matrix.
        """
        self.check_rank(self.find(model))
        return super().layers(model)

    def check_rank(self, targets: Sequence[Target]) -> None:
        """Refuse a rank that no matrix of the targets can have."""
        most = full_rank(targets)
        what = f"rank {self.rank} exceeds {most}, the shorter side of a matrix"
        require(self.rank <= most, what, "rank", f"set at most {most}")

    @property
    def scaling(self) -> float:
        """`α / r`, or 1 when `alpha` is none."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


@options
class InputDropout(Method):
    """The option of methods that drop entries of what their layers get, on the adapter's path."""

    dropout: float = Field(
        0.0, ge=0, lt=1, description="Probability of dropping an input entry on the adapter's path."
    )


@options
class LoRA(InputDropout, LowRankMethod):
    """Low-rank adaptation (arXiv 2106.09685): `W = W0 + (α/r) B A`."""

    name: ClassVar[str] = "lora"
    summary: ClassVar[str] = "low-rank update of the weight; every token gets the same one"
    rates: ClassVar[Mapping[str, float]] = {"adapter": 6e-3, "head": 2e-3}

    def build(self, model: nn.Module, targets: Sequence[Target]) -> list[LinearAdapter]:
        """Return one `LoRALayer` per target."""
        return [
            LoRALayer(target, rank=self.rank, scale=self.scaling, dropout=self.dropout)
            for target in targets
        ]
