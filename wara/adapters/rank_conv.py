"""The control of WaRA without wavelets: a learned convolution of the token grid in rank space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wara.adapters.base import LinearAdapter, TokenDomainLayer, options
from wara.adapters.lora import InputDropout, LowRankLayer
from wara.adapters.targets import Target
from wara.adapters.wara import GridMethod
from wara.errors import WaraError
from wara.vit import prefix_count, token_layout


class RankConvLayer(LowRankLayer, TokenDomainLayer):
    """`Δ = (α/r) B (κ ∗ A x)`: each of the `r` channels has a 3 × 3 kernel `κ` of its own.

    Prefix tokens have no neighbours and get `B A x`. `B` starts at zero and the kernels as the unit
    impulse, so the layer starts as the base layer and contains LoRA.

    Args:
        target: the linear layer and its `g` row groups.
        grid: `(h, w)` of the patch tokens.
        prefix_tokens: `p`.
        prefix: `adapt` gives these the update without a convolution, `skip` leaves them alone.
        **low_rank: `rank`, `scale` and `dropout` of `LowRankLayer`.
    """

    core_names = frozenset({"core"})

    def __init__(
        self,
        target: Target,
        grid: tuple[int, int],
        prefix_tokens: int,
        prefix: str,
        **low_rank: Any,
    ) -> None:
        super().__init__(target, **low_rank)
        self.fresh()
        self.grid, self.prefix_tokens, self.prefix = grid, prefix_tokens, prefix
        core = torch.zeros(self.groups, self.rank, 3, 3)
        core[:, :, 1, 1] = 1
        self.core = nn.Parameter(core)

    def mix(self, z: Tensor) -> Tensor:
        """Convolve the patch tokens of `[b, n, g r]` over their grid."""
        if z.ndim != 3:
            what = f"a layer got input of {z.ndim} dimensions where tokens [b, n, d] are expected"
            raise WaraError("config", what, "backbone.name", "choose a ViT without windows")
        prefix = prefix_count(z.shape[1], self.grid, self.prefix_tokens)
        image = z[:, prefix:].transpose(1, 2).unflatten(2, self.grid)
        with torch.autocast(z.device.type, enabled=False):
            # In the precision of the kernels, as the transform of WaRA.
            kernels = self.core.flatten(0, 1).unsqueeze(1)
            mixed = F.conv2d(image.to(kernels.dtype), kernels, padding=1, groups=kernels.shape[0])
        patches = mixed.flatten(2).transpose(1, 2)
        if not prefix:
            return patches
        head = z[:, :prefix]
        head = head * 0 if self.prefix == "skip" else head
        return torch.cat([head.to(patches.dtype), patches], dim=1)

    def merged_weight(self) -> Tensor | None:
        """Return `(α/r) B A` while every kernel is exactly the unit impulse, else `None`."""
        impulse = torch.zeros_like(self.core[0, 0])
        impulse[1, 1] = 1
        same = bool((self.core == impulse).all())
        return self.product() if same and self.prefix == "adapt" else None


@options
class RankConv(InputDropout, GridMethod):
    """Low rank with a depth-wise 3 × 3 convolution of the token grid between the factors.

    The control for WaRA: a learned local mixing of tokens in place of the cores of subbands. The
    kernels have the cores' learning rate, for the same reason: beside `B`, which starts at zero,
    they hardly move at the factors' rate.
    """

    name: ClassVar[str] = "rank_conv"
    summary: ClassVar[str] = "low-rank update with a learned 3x3 convolution between its factors"
    rates: ClassVar[Mapping[str, float]] = {"adapter": 6e-3, "core": 5e-2, "head": 2e-3}

    def build(self, model: nn.Module, targets: Sequence[Target]) -> list[LinearAdapter]:
        """Return one layer per target."""
        grid, prefix_tokens = token_layout(model)
        low_rank: Any = {"rank": self.rank, "scale": self.scaling, "dropout": self.dropout}
        return [
            RankConvLayer(target, grid, prefix_tokens, self.prefix, **low_rank)
            for target in targets
        ]
