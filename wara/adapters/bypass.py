"""Bottlenecks beside whole modules of a block: AdaptFormer and Convpass."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from wara.adapters.base import AdapterLayer, options, require
from wara.adapters.lora import MOST_RANK
from wara.adapters.targets import SizedMethod, block_indices
from wara.errors import WaraError
from wara.vit import block_names, prefix_count, token_layout


def chosen_blocks(model: nn.Module, blocks: Any) -> list[str]:
    """Return the paths of the blocks that `blocks` of a method asks for.

    Raises:
        WaraError: kind `config` when the model has no blocks, or not these.
    """
    names = block_names(model)
    if not names:
        what = f"{type(model).__name__} has no blocks to adapt"
        raise WaraError("config", what, "backbone.name", "choose a timm ViT, or method: lora")
    return [names[i] for i in block_indices(blocks, len(names))]


def parts_of(model: nn.Module, blocks: Any, part: str) -> list[str]:
    """Return the path of the module called `part`, `attn` or `mlp`, in each chosen block.

    Raises:
        WaraError: kind `config` when a block has no such module.
    """
    found = chosen_blocks(model, blocks)
    for path in found:
        if part not in dict(model.get_submodule(path).named_children()):
            what = f"a block of {type(model).__name__} has no module '{part}' to adapt beside"
            raise WaraError("config", what, path, "choose a timm ViT with attn and mlp, or lora")
    return [f"{path}.{part}" for path in found]


def token_width(model: nn.Module) -> int:
    """Return the width `d` of the tokens, which all blocks share.

    Raises:
        WaraError: kind `config` when the model has no one width.
    """
    width = getattr(model, "embed_dim", None)
    require(
        isinstance(width, int),
        f"{type(model).__name__} has no one width of tokens",
        "method",
        "choose a timm ViT, or method: lora",
    )
    return int(width)  # type: ignore[arg-type]


class BypassLayer(AdapterLayer):
    """`y = f(x) + s · up(middle(down(x)))` beside a module `f` of tokens `[b, n, d]`.

    Args:
        width: `d`.
        bottleneck: width `h` of the middle.
        scale: `s`.
        dropout: probability of dropping an entry of what goes into `up`.
    """

    def __init__(self, width: int, *, bottleneck: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.scale = scale
        self.down = nn.Linear(width, bottleneck)
        self.up = nn.Linear(bottleneck, width)
        self.dropout = nn.Dropout(dropout) if dropout else None
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)

    def middle(self, z: Tensor) -> Tensor:
        """Return what the bottleneck makes of `[b, n, h]`."""
        raise TypeError(f"{type(self).__name__} does not define middle")

    def forward(self, base: nn.Module, x: Tensor, *more: Any, **named: Any) -> Any:
        """Return the module's output `[b, n, d]` with the bypass added."""
        y = base(x, *more, **named)
        z = self.middle(self.down(x))
        z = self.up(z if self.dropout is None else self.dropout(z))
        return y + self.scale * z.to(y.dtype)


class AdaptFormerLayer(BypassLayer):
    """AdaptMLP: `mlp(x) + s · ReLU(x W_down + b) W_up + b'`, `W_down` `[d, h]`, `W_up` `[h, d]`.

    `x` is what the MLP gets, the normalised tokens. `W_down` starts Kaiming-uniform with `a = √5`
    and all else at zero, so it starts as the MLP.
    """

    def __init__(self, width: int, **bottleneck: Any) -> None:
        super().__init__(width, **bottleneck)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))

    def middle(self, z: Tensor) -> Tensor:
        """Return `ReLU(z)`."""
        return F.relu(z)


class ConvpassLayer(BypassLayer):
    """`f(x) + s · up(σ(conv(σ(down(x)))))`, a 3 × 3 convolution over the token grid in between.

    `σ(z) = z · sigmoid(1.702 z)`, the form of GELU in the authors' code. The patch tokens are an
    image `[b, h, H, W]` padded with zeros; each prefix token is an image of its own, 1 × 1, which
    only the middle of the kernel meets. The kernel starts as the identity, `down`
    Xavier-uniform, `up` at zero.

    Args:
        width: `d`.
        grid: `(H, W)` of the patch tokens.
        prefix_tokens: `p`.
        **bottleneck: see `BypassLayer`.
    """

    def __init__(
        self, width: int, grid: tuple[int, int], prefix_tokens: int, **bottleneck: Any
    ) -> None:
        super().__init__(width, **bottleneck)
        self.grid, self.prefix_tokens = grid, prefix_tokens
        nn.init.xavier_uniform_(self.down.weight)
        size = self.down.out_features
        self.conv = nn.Conv2d(size, size, 3, padding=1)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]
        nn.init.dirac_(self.conv.weight)

    def middle(self, z: Tensor) -> Tensor:
        """Return the convolved `[b, p + H W, h]`, activated before and after."""
        z = _activated(z)
        prefix = prefix_count(z.shape[1], self.grid, self.prefix_tokens)
        image = z[:, prefix:].transpose(1, 2).unflatten(2, self.grid)
        patches = self.conv(image).flatten(2).transpose(1, 2)
        if prefix:
            centre = self.conv.weight[:, :, 1, 1]
            alone = F.linear(z[:, :prefix], centre, self.conv.bias)
            patches = torch.cat([alone, patches], dim=1)
        return _activated(patches)


def _activated(z: Tensor) -> Tensor:
    return z * torch.sigmoid(1.702 * z)


BOTTLENECK = "Width of the bottleneck."
DROPOUT = "Probability of dropping an entry of the bottleneck."


@options
class AdaptFormer(SizedMethod):
    """AdaptFormer (arXiv 2205.13535): a bottleneck parallel to the MLP of each block.

    `x ← x + mlp(x̂) + s · ReLU(x̂ W_down) W_up` with `x̂ = norm(x)`; both have biases. Where a block
    scales what its MLP gives (LayerScale), the bottleneck is scaled with it.
    """

    name: ClassVar[str] = "adaptformer"
    summary: ClassVar[str] = "a small bottleneck beside the MLP of each block"
    # Above LoRA's, as s makes the steps the smaller.
    rates: ClassVar[Mapping[str, float]] = {"adapter": 2e-2, "head": 2e-3}
    knob: ClassVar[tuple[str, ...]] = ("bottleneck",)
    mergeable: ClassVar[bool] = False

    bottleneck: int = Field(64, ge=1, le=MOST_RANK, description=BOTTLENECK)
    scale: float = Field(0.1, gt=0, le=1e6, description="Factor s on the bottleneck's output.")
    dropout: float = Field(0.0, ge=0, lt=1, description=DROPOUT)

    def layers(self, model: nn.Module) -> Mapping[str, AdapterLayer]:
        """Return one layer per block, on its `mlp`."""
        size: Any = {"bottleneck": self.bottleneck, "scale": self.scale, "dropout": self.dropout}
        width = token_width(model)
        return {p: AdaptFormerLayer(width, **size) for p in parts_of(model, self.blocks, "mlp")}


@options
class Convpass(SizedMethod):
    """Convpass (arXiv 2207.07039): convolutional bottlenecks parallel to attention and MLP.

    `x ← x + attn(x̂) + s · conv(x̂)` with `x̂ = norm(x)`, and the same beside the MLP. Where a block
    scales what its modules give (LayerScale), the bottleneck is scaled with it.
    """

    name: ClassVar[str] = "convpass"
    summary: ClassVar[str] = "convolutional bottlenecks beside attention and MLP"
    # The authors' 1e-3 is with one s chosen per data set, mostly above 1; here s is 1.
    rates: ClassVar[Mapping[str, float]] = {"adapter": 6e-3, "head": 2e-3}
    knob: ClassVar[tuple[str, ...]] = ("bottleneck",)
    mergeable: ClassVar[bool] = False

    bottleneck: int = Field(8, ge=1, le=MOST_RANK, description=BOTTLENECK)
    scale: float = Field(1.0, gt=0, le=1e6, description="Factor s on the bottleneck's output.")
    dropout: float = Field(0.0, ge=0, lt=1, description=DROPOUT)

    def layers(self, model: nn.Module) -> Mapping[str, AdapterLayer]:
        """Return two layers per block, on its `attn` and its `mlp`."""
        grid, prefix = token_layout(model)
        width = token_width(model)
        size: Any = {"bottleneck": self.bottleneck, "scale": self.scale, "dropout": self.dropout}
        attn, mlp = (parts_of(model, self.blocks, part) for part in ("attn", "mlp"))
        paths = [path for pair in zip(attn, mlp, strict=True) for path in pair]
        return {path: ConvpassLayer(width, grid, prefix, **size) for path in paths}
