"""VPT-deep (arXiv 2203.12119): learned prompts among the tokens of every block."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from wara.adapters.base import AdapterLayer, options
from wara.adapters.bypass import chosen_blocks, token_width
from wara.adapters.targets import SizedMethod
from wara.errors import WaraError
from wara.vit import prefix_count, token_layout, unwrap


class PromptLayer(AdapterLayer):
    """`[·, x'] = block([P, x])`: prompts `P` `[t, d]` go in before the tokens and do not come out.

    What a block makes of its prompts is thrown away, for the next has its own; so each block hands
    on as many tokens as it got, and grid, prefix and pooling are those of the model. The order of
    tokens means nothing to attention.

    Args:
        width: `d`.
        tokens: `t`.
        grid: `(h, w)` of the patch tokens.
        prefix_tokens: `p`.
        bound: prompts are drawn from `U(-bound, bound)`.
        dropout: probability of dropping an entry of a prompt.
    """

    def __init__(
        self,
        width: int,
        tokens: int,
        grid: tuple[int, int],
        prefix_tokens: int,
        *,
        bound: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.grid, self.prefix_tokens = grid, prefix_tokens
        self.prompts = nn.Parameter(torch.empty(tokens, width).uniform_(-bound, bound))
        self.dropout = nn.Dropout(dropout) if dropout else None

    def forward(self, base: nn.Module, x: Tensor, *more: Any, **named: Any) -> Tensor:
        """Return the block's output `[b, n, d]` for tokens `[b, n, d]`."""
        prefix_count(x.shape[1], self.grid, self.prefix_tokens)
        prompts = self.prompts if self.dropout is None else self.dropout(self.prompts)
        prompts = prompts.to(x.dtype).expand(x.shape[0], -1, -1)
        return base(torch.cat([prompts, x], dim=1), *more, **named)[:, self.prompts.shape[0] :]

    def settings(self, base: nn.Module) -> Iterator[tuple[str, str, Any]]:
        """Tell attention with rotary positions that it has more tokens without a place."""
        for path, module in base.named_modules():
            count = getattr(module, "num_prefix_tokens", None)
            if path and isinstance(count, int):
                yield path, "num_prefix_tokens", count + self.prompts.shape[0]


@options
class VPT(SizedMethod):
    """VPT-deep (arXiv 2203.12119): `t` prompts of its own for every block, replaced at each.

    A model with prompts is another than the base from the start, for attention spreads over them
    too; they are drawn as in the paper, Xavier-uniform as of a patch embedding: from
    `U(±√(6 / (3 P² + d)))`, `P` the side of a patch.
    """

    name: ClassVar[str] = "vpt"
    summary: ClassVar[str] = "learned prompt tokens in every block"
    # An entry is drawn within ±0.05; a step of AdamW is to be a tenth of that.
    rates: ClassVar[Mapping[str, float]] = {"adapter": 6e-3, "head": 2e-3}
    knob: ClassVar[tuple[str, ...]] = ("tokens",)
    mergeable: ClassVar[bool] = False

    tokens: int = Field(50, ge=1, le=4096, description="Prompts t of each block.")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Probability of dropping an entry of a prompt."
    )

    def layers(self, model: nn.Module) -> Mapping[str, AdapterLayer]:
        """Return one layer per block, around the whole of it."""
        grid, prefix = token_layout(model)
        width = token_width(model)
        height, across = _patch_size(model)
        bound = math.sqrt(6 / (3 * height * across + width))
        paths = chosen_blocks(model, self.blocks)
        _check_positions(model, paths)
        return {
            path: PromptLayer(width, self.tokens, grid, prefix, bound=bound, dropout=self.dropout)
            for path in paths
        }


def _patch_size(model: Any) -> tuple[int, int]:
    size = getattr(model.patch_embed, "patch_size", None)
    if isinstance(size, int):
        return size, size
    if isinstance(size, tuple | list) and len(size) == 2:
        return int(size[0]), int(size[1])
    what = f"the patch embedding of {type(model).__name__} has no patch_size"
    raise WaraError("config", what, "backbone.name", "choose a timm ViT, or method: lora")


def _check_positions(model: nn.Module, paths: list[str]) -> None:
    """Refuse attention with a bias for each pair of places, of which prompts have none."""
    tables = ("relative_position_bias_table", "rel_pos_bias", "rel_pos", "rel_pos_h")
    places = [unwrap(model), *(m for path in paths for m in model.get_submodule(path).modules())]
    for module in places:
        if any(getattr(module, table, None) is not None for table in tables):
            what = (
                f"{type(model).__name__} has a bias per pair of places, and prompts have no place"
            )
            remedy = "choose a ViT with positions that are added or rotary, or method: lora"
            raise WaraError("config", what, "adapter.method", remedy)
