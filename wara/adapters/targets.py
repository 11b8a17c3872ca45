"""Finds the linear layers that a method adapts, by the names a ViT person would say."""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from wara.adapters.base import AdaptedLinear, AdapterLayer, Method, Rows
from wara.adapters.budget import parse_budget
from wara.errors import WaraError, suggest

FUSED = frozenset({"qkv"})
ALIASES = {
    "q": ("q", "q_proj", "query"),
    "k": ("k", "k_proj", "key"),
    "v": ("v", "v_proj", "value"),
    "qkv": ("qkv",),
    "o": ("proj", "o_proj", "out_proj"),
    "fc1": ("fc1", "fc1_g", "fc1_x", "w1", "w2", "w12"),
    "fc2": ("fc2", "w3"),
}
ATTENTION = ("q", "k", "v", "o")

Blocks = str | int | Sequence[int]


@dataclass(frozen=True)
class Target:
    """A linear layer and the output rows of it to adapt.

    Args:
        name: dotted path of the layer in the model.
        linear: the layer.
        rows: `[start, stop)` ranges, one per label.
        labels: what each range is called, such as `q`; unique within the layer.
    """

    name: str
    linear: nn.Linear
    rows: tuple[Rows, ...]
    labels: tuple[str, ...]


def block_indices(blocks: Blocks, depth: int) -> list[int]:
    """Return the block numbers that `blocks` asks for.

    Args:
        blocks: `all`, `last_N`, or block numbers from 0.
        depth: number of blocks of the model.

    Returns:
        Sorted block numbers.

    Raises:
        WaraError: kind `config` when the text is not understood or a number is out of range.
    """
    remedy = f"write all, last_1..last_{depth}, or a list of numbers 0..{depth - 1}"
    if isinstance(blocks, str):
        if blocks == "all":
            return list(range(depth))
        match = re.fullmatch(r"last_(\d+)", blocks)
        if match and 1 <= int(match[1]) <= depth:
            return list(range(depth - int(match[1]), depth))
        raise WaraError("config", f"blocks '{blocks}' not understood", "adapter.blocks", remedy)
    numbers = [blocks] if isinstance(blocks, int) else list(blocks)
    wrong = [b for b in numbers if type(b) is not int or not 0 <= b < depth]
    if wrong or not numbers:
        what = f"the model has no blocks {wrong}" if wrong else "no block is named"
        raise WaraError("config", what, "adapter.blocks", remedy)
    return sorted(set(numbers))


def is_pattern(target: str) -> bool:
    """Tell whether a target is a path pattern and not one of the short names."""
    return any(sign in target for sign in "*?[.")


def check_targets(targets: Sequence[str]) -> None:
    """Refuse short names that do not exist, without looking at a model.

    Args:
        targets: short names or path patterns.

    Raises:
        WaraError: kind `config`, with the nearest name.
    """
    if isinstance(targets, str) or not targets:
        remedy = "write a list, such as [q, k, v, o]"
        raise WaraError("config", "targets must be a list of names", "adapter.targets", remedy)
    for target in targets:
        if not isinstance(target, str) or not (target in ALIASES or is_pattern(target)):
            remedy = suggest(str(target), ALIASES) + " (or a path pattern such as '*.query')"
            raise WaraError("config", f"unknown target '{target}'", "adapter.targets", remedy)
    if "qkv" in targets and set(targets) & {"q", "k", "v"}:
        remedy = "name qkv, or q, k and v"
        raise WaraError("config", "qkv overlaps with q, k or v", "adapter.targets", remedy)


def find_targets(model: nn.Module, targets: Sequence[str], blocks: Blocks = "all") -> list[Target]:
    """Return the linear layers of a model that the targets name.

    Short names are looked up inside `model.blocks`. A fused `qkv` layer answers to `q`, `k` and `v`
    with a third of its rows each, and to `qkv` with all of them. Anything with a dot or wildcard is
    a pattern on the dotted path of any linear layer.

    Args:
        model: a timm ViT, or any module when `targets` are patterns.
        targets: short names of `ALIASES`, or patterns.
        blocks: see `block_indices`; patterns are not restricted by it.

    Returns:
        Targets in the order of `model.named_modules()`.

    Raises:
        WaraError: kind `config` when a target matches nothing.
    """
    check_targets(targets)
    short = [target for target in targets if not is_pattern(target)]
    patterns = [target for target in targets if is_pattern(target)]
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    unmatched = set(targets)
    found: dict[str, dict[str, Rows]] = {}
    if short:
        stack = getattr(model, "blocks", None)
        if stack is None:
            remedy = "give path patterns, such as '*.query'"
            what = f"{type(model).__name__} has no blocks to look for {short} in"
            raise WaraError("config", what, "adapter.targets", remedy)
        # By name, for a slice of a larger stack keeps the numbers of its blocks.
        names = [name for name, _ in stack.named_children()]
        prefixes = tuple(f"blocks.{names[i]}." for i in block_indices(blocks, len(names)))
        for name, linear in linears.items():
            if name.startswith(prefixes):
                ranges = _short_ranges(name.rsplit(".", 1)[-1], linear, short)
                found.setdefault(name, {}).update(ranges)
                unmatched -= set(ranges)
    for pattern in patterns:
        for name in fnmatch.filter(linears, pattern):
            found.setdefault(name, {})[name.rsplit(".", 1)[-1]] = (0, linears[name].out_features)
            unmatched.discard(pattern)
    # A split model has no `qkv`, a fused one has no `q_proj`; either is fine, none is not.
    if unmatched:
        have = sorted({name.rsplit(".", 1)[-1] for name in linears})
        what = f"no linear layer matches {', '.join(sorted(unmatched))}"
        raise WaraError(
            "config",
            what,
            "adapter.targets",
            "the model has linear layers named " + ", ".join(have),
        )
    for name, ranges in found.items():
        ordered = sorted(ranges.values())
        if any(one[1] > two[0] for one, two in itertools.pairwise(ordered)):
            what = f"the targets {', '.join(ranges)} adapt the same rows twice"
            raise WaraError("config", what, name, "name each part of the layer once")
    return [
        Target(name, linears[name], tuple(ranges.values()), tuple(ranges))
        for name, ranges in ((name, found.get(name)) for name in linears)
        if ranges
    ]


def _short_ranges(leaf: str, linear: nn.Linear, targets: Sequence[str]) -> dict[str, Rows]:
    """Return the row range of each short target that a layer called `leaf` answers to."""
    ranges: dict[str, Rows] = {}
    third, rest = divmod(linear.out_features, 3)
    for target in targets:
        if leaf in ALIASES[target]:
            ranges[target] = (0, linear.out_features)
        elif leaf in FUSED and target in "qkv" and rest == 0:
            place = "qkv".index(target)
            ranges[target] = (place * third, (place + 1) * third)
    return dict(sorted(ranges.items(), key=lambda item: item[1]))


def place(model: nn.Module, target: Target, adapter: AdapterLayer) -> None:
    """Put an adapter on a target, in place.

    Args:
        model: the model that `target` was found in.
        target: where.
        adapter: the adapter layer; moved to the dtype and device of the layer's weight.
    """
    weight = target.linear.weight
    adapter.to(device=weight.device, dtype=weight.dtype)
    parent_name, _, leaf = target.name.rpartition(".")
    parent: Any = model.get_submodule(parent_name)
    setattr(parent, leaf, AdaptedLinear(target.linear, adapter))
    # timm's EVA and BEiT read `qkv.weight` past the layer unless told to call it.
    if leaf in FUSED and getattr(parent, "qkv_bias_separate", None) is False:
        parent.qkv_bias_separate = True
        parent.wara_restore_fused_bias = True


def remove(model: nn.Module, name: str, linear: nn.Linear) -> None:
    """Put a plain linear layer where an adapted one was, in place.

    Args:
        model: the adapted model.
        name: dotted path of the adapted layer.
        linear: what takes its place.
    """
    parent_name, _, leaf = name.rpartition(".")
    parent: Any = model.get_submodule(parent_name)
    setattr(parent, leaf, linear)
    if getattr(parent, "wara_restore_fused_bias", False):
        parent.qkv_bias_separate = False
        del parent.wara_restore_fused_bias


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Return the adapted linear layers of a model by their dotted path.

    Args:
        model: any model.

    Returns:
        Paths and layers in the model's order; empty when nothing is adapted.
    """
    return {name: m for name, m in model.named_modules() if isinstance(m, AdaptedLinear)}


def token_layout(model: nn.Module) -> tuple[tuple[int, int], int]:
    """Return the patch grid `(h, w)` and the number of prefix tokens of a timm ViT.

    Args:
        model: a timm model with `patch_embed.grid_size` and `num_prefix_tokens`.

    Returns:
        `((h, w), p)`.

    Raises:
        WaraError: kind `config` when the model has no fixed grid of tokens.
    """
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    prefix = getattr(model, "num_prefix_tokens", None)
    if grid is None or prefix is None or len(tuple(grid)) != 2:
        what = f"{type(model).__name__} has no token grid, which token-domain methods need"
        remedy = "choose a timm ViT with patch_embed.grid_size, or a weight-domain method (lora)"
        raise WaraError("config", what, "backbone.name", remedy)
    return (int(grid[0]), int(grid[1])), int(prefix)


@dataclass(frozen=True, kw_only=True)
class TargetedMethod(Method):
    """A method that puts one adapter layer on each target.

    Args:
        targets: short names (`q k v o qkv fc1 fc2`) or path patterns.
        blocks: `all`, `last_N` or block numbers.
        budget: size to reach in place of the method's own, as a multiple of a LoRA: `lora_r4`,
            `0.8*lora_r1`; see `wara.adapters.budget`.
    """

    targets: tuple[str, ...] = ATTENTION
    blocks: Blocks = "all"
    budget: str | float | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        check_targets(self.targets)
        # Lists come from YAML; the options must stay hashable and comparable.
        object.__setattr__(self, "targets", tuple(self.targets))
        if isinstance(self.blocks, list):
            object.__setattr__(self, "blocks", tuple(self.blocks))
        if self.budget is not None:
            parse_budget(self.budget)

    def find(self, model: nn.Module) -> list[Target]:
        """Return the targets in `model`."""
        return find_targets(model, self.targets, self.blocks)

    def prepare(self, model: nn.Module) -> None:
        """Put the adapter layers into `model`, in place."""
        found = self.find(model)
        layers = self.build(model, found)
        for target, layer in zip(found, layers, strict=True):
            place(model, target, layer)

    def build(self, model: nn.Module, targets: list[Target]) -> list[AdapterLayer]:
        """Return one adapter layer per target; the model is not changed."""
        raise TypeError(f"{type(self).__name__} does not define build")
