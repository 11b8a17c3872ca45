"""APLA (arXiv 2503.11335): some rows of the output projection of attention train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from wara.adapters.base import LinearAdapter, WeightDomainLayer, is_skeleton, options, require
from wara.adapters.targets import Target, TargetedMethod
from wara.errors import WaraError
from wara.schema import from_list


class PartialRowsLayer(WeightDomainLayer):
    """`W = W0 + Δ`, `Δ` zero but for `m` rows of each row group, which train.

    Args:
        target: the linear layer, `d` wide in, and its `g` row groups.
        places: `[g m]`, the rows within the layer.
    """

    places: Tensor

    def __init__(self, target: Target, places: Tensor) -> None:
        super().__init__(target.rows, target.linear.out_features)
        self.register_buffer("places", places.to(torch.int32))
        self.change = nn.Parameter(torch.zeros(len(places), target.linear.in_features))

    def refresh(self) -> None:
        """Check the rows, after they were loaded.

        Raises:
            WaraError: kind `artefact` when a row is not one of the adapted ones, or occurs twice.
        """
        if self.places.is_meta:
            return
        found = self.places.tolist()
        allowed = {row for start, stop in self.rows for row in range(start, stop)}
        if len(set(found)) < len(found) or not allowed.issuperset(found):
            what = "a trained row occurs twice or lies outside of what is adapted"
            remedy = "copy the adapter folder again; the file is damaged"
            raise WaraError("artefact", what, "adapter places", remedy)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return `x (W0 + Δ)ᵀ + b`, `[…, o]`, for input `[…, d]`."""
        y, more = F.linear(x, weight, bias), F.linear(x, self.change)
        return y.index_add(-1, self.places, more.to(y.dtype))

    def delta_weight(self) -> Tensor:
        """Return `Δ`, `[o, d]`."""
        zero = self.change.new_zeros(self.out_features, self.change.shape[1])
        return zero.index_copy(0, self.places.long(), self.change)


@options
class APLA(TargetedMethod):
    """APLA (arXiv 2503.11335): a random subset of the rows of `W_O` trains in each block.

    What trains is the change of these rows, so weight decay draws them to the base and not to zero;
    their biases stay. The rows are drawn once, from the seed, for each layer anew, and stored.
    """

    name: ClassVar[str] = "apla"
    summary: ClassVar[str] = "a random subset of the rows of attention's output projection"
    # Whole rows of a weight move, as in full fine-tuning, but few of them.
    rates: ClassVar[Mapping[str, float]] = {"adapter": 3e-3, "head": 2e-3}
    knob: ClassVar[tuple[str, ...]] = ("rows",)

    targets: Annotated[tuple[str, ...], from_list] = Field(
        ("o",), description="What is adapted: q k v o qkv fc1 fc2, or patterns."
    )
    # As much as LoRA of rank 4 on q, k, v and o trains.
    rows: int = Field(32, ge=1, le=1_000_000, description="Rows that train in each matrix.")
    seed: int = Field(0, ge=0, lt=2**63, description="Draws the rows, which are stored.")

    def knob_range(self, targets: Sequence[Target]) -> tuple[int, int | None]:
        """Return 1, and the rows of the smallest matrix."""
        return 1, min(o for target in targets for o, _ in target.shapes)

    def build(self, model: nn.Module, targets: Sequence[Target]) -> list[LinearAdapter]:
        """Return one layer per target."""
        generator = torch.Generator().manual_seed(self.seed)
        layers: list[Any] = []
        for target in targets:
            drawn = []
            for start, stop in target.rows:
                what = f"rows is {self.rows}, and {target.name} has {stop - start}"
                require(self.rows <= stop - start, what, "rows", f"set at most {stop - start}")
                if is_skeleton():
                    drawn.append(torch.empty(self.rows, dtype=torch.int32))
                else:
                    some = torch.randperm(stop - start, generator=generator)[: self.rows]
                    drawn.append(start + some.sort().values)
            layers.append(PartialRowsLayer(target, torch.cat(drawn)))
        return layers
