"""A model in two parts: the trunk, which training never changes, and what trains above it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from wara.adapters import adaptation_of
from wara.errors import WaraError, out_of_memory
from wara.vit import block_names, plain_name, unwrap

# Modules of timm's ViTs that come after the blocks; any other is taken for one before them, which
# may cost speed and never a wrong token.
_AFTER = frozenset("norm fc_norm attn_pool head head_dist head_drop pre_logits".split())
_OFF = "set data.trunk=off"


def trunk_depth(model: nn.Module) -> int:
    """Return how many blocks lie below everything that a method changes.

    Args:
        model: an adapted timm ViT.

    Returns:
        0 when the first block changes, or what comes before it; all blocks for a linear probe.

    Raises:
        WaraError: kind `config` when the model has no blocks, or is not adapted.
    """
    inner, adaptation = unwrap(model), adaptation_of(model)
    blocks = block_names(inner)
    if not blocks:
        what = f"{type(inner).__name__} has no blocks, so no trunk to cache"
        raise WaraError("config", what, "data.trunk", _OFF)
    heads = set(adaptation.head)
    changed = [name for name in (*adaptation.paths, *adaptation.base) if name not in heads]
    return min((_height(name, blocks) for name in changed), default=len(blocks))


def _height(name: str, blocks: list[str]) -> int:
    """Return the number of the block that a parameter or module lies in."""
    for number, block in enumerate(blocks):
        if f"{name}.".startswith(f"{block}."):
            return number
    return len(blocks) if name.split(".")[0] in _AFTER else 0


class Trunk(nn.Module):
    """The blocks below; maps images `[b, 3, h, w]` to the tokens that block `depth` takes.

    Args:
        model: an adapted timm ViT, whose modules are used, not copied.
        depth: number of blocks, from 1.
    """

    def __init__(self, model: nn.Module, depth: int) -> None:
        super().__init__()
        blocks = dict(unwrap(model).get_submodule("blocks").named_children())
        names = list(blocks)
        self._last = _Noted(blocks[names[depth - 1]])
        rest = dict.fromkeys(names[depth:], _Through())
        self._model = _with_blocks(model, {names[depth - 1]: self._last, **rest})

    def forward(self, images: Tensor) -> Tensor:
        """Return tokens, `[b, n, d]` or as the architecture has them."""
        self._model(images)
        return self._last.tokens


class Upper(nn.Module):
    """What lies above the trunk; maps its tokens to the logits `[b, c]` of the whole model.

    timm's own forward pass runs, on one blank image, with the lower blocks replaced by one that
    hands on the given tokens. So position tables, pooling and heads are those of the architecture.

    Args:
        model: an adapted timm ViT, whose modules are used, not copied.
        depth: number of blocks of the trunk, from 1.
        size: `(H, W)` of the images.
    """

    def __init__(self, model: nn.Module, depth: int, size: tuple[int, int]) -> None:
        super().__init__()
        names = [name for name, _ in unwrap(model).get_submodule("blocks").named_children()]
        self._given = _Given()
        self._model = _with_blocks(model, dict.fromkeys(names[:depth], self._given))
        # In a tuple, so that it is not registered a second time.
        self._whole = (unwrap(model),)
        self._size = size

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits for tokens, which may be float16."""
        self._given.tokens = tokens.float()
        self._model.training = self._whole[0].training
        return self._model(torch.zeros(1, 3, *self._size, device=tokens.device))


class _Noted(nn.Module):
    """A block that notes what it returns."""

    tokens: Tensor

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        self.tokens = self.block(*inputs, **named)
        return self.tokens


class _Through(nn.Module):
    """Stands in for a block above the trunk, whose output nobody looks at."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x


class _Given(nn.Module):
    """Stands in for the blocks of the trunk: whatever comes in, the given tokens go out."""

    tokens: Tensor

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return self.tokens


def _with_blocks(model: nn.Module, replaced: Mapping[str, nn.Module]) -> nn.Module:
    """Return the model with some blocks replaced; all else is shared with the model itself."""
    shell = copy.copy(unwrap(model))
    blocks = copy.copy(shell.get_submodule("blocks"))
    blocks.__dict__["_modules"] = {**blocks._modules, **replaced}
    shell.__dict__["_modules"] = {**shell._modules, "blocks": blocks}
    return shell


@torch.no_grad()
def check_trunk(model: nn.Module, depth: int, size: tuple[int, int]) -> tuple[int, ...]:
    """Refuse a model that does not compute the same in two parts.

    Args:
        model: an adapted timm ViT.
        depth: number of blocks of the trunk, from 1.
        size: `(H, W)` of the images.

    Returns:
        Shape of the tokens of one image.

    Raises:
        WaraError: kind `config`, when the trunk draws random numbers in training, or two parts
            do not give what the whole gives.
    """
    _check_still(model, depth)
    was = model.training
    model.eval()
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    try:
        tokens = Trunk(model, depth)(images)
        found, wanted = Upper(model, depth, size)(tokens), model(images)
        same = found.shape == wanted.shape and torch.allclose(found, wanted, 1e-4, 1e-4)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        if out_of_memory(error):
            raise
        same = False  # its forward pass asks more of a block than to map tokens to tokens
    finally:
        model.train(was)
    if not same:
        what = f"{type(unwrap(model)).__name__} cannot be cut below block {depth}"
        raise WaraError("config", what, "data.trunk", _OFF)
    return tuple(tokens.shape[1:])


_RATES: tuple[Callable[[Any], Any], ...] = (
    lambda module: module.p if isinstance(module, nn.modules.dropout._DropoutNd) else 0,
    lambda module: getattr(module, "drop_prob", 0),  # timm's stochastic depth
    lambda module: getattr(module, "prob", 0),  # timm's dropping of patches
)


def _check_still(model: nn.Module, depth: int) -> None:
    blocks = block_names(unwrap(model))
    for path, module in unwrap(model).named_modules():
        name = plain_name(path)
        if _height(name, blocks) < depth and any(rate(module) for rate in _RATES):
            what = f"the trunk drops at random ({name}), so no output of it can be kept"
            remedy = f"set backbone.drop_path_rate=0 and no dropout in its options, or {_OFF}"
            raise WaraError("config", what, "data.trunk", remedy)
