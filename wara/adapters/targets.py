"""Finds the linear layers that a method adapts, by the names a ViT person would say."""

from __future__ import annotations

import fnmatch
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import AfterValidator, Field, field_validator, model_validator
from torch import nn

from wara.adapters.base import (
    AdapterLayer,
    LinearAdapter,
    Method,
    Rows,
    is_skeleton,
    one_size,
    options,
)
from wara.errors import WaraError, suggest
from wara.schema import fault, fields_of, from_list
from wara.vit import block_names, plain_name

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

MOST_NUMBERS = 2**31 - 1
"""Of one matrix; what it has in truth is checked against the model."""
_MOST_MULTIPLE = 1e12
_MOST_BLOCK = 9999

Blocks = str | int | Sequence[int]
Numbers = Annotated[tuple[int, ...], from_list]


def _plausible(blocks: str | int | tuple[int, ...]) -> str | int | tuple[int, ...]:
    numbers = () if isinstance(blocks, str) else (blocks,) if isinstance(blocks, int) else blocks
    if any(not 0 <= number <= _MOST_BLOCK for number in numbers):
        raise fault(f"no model has such a block, of 0 to {_MOST_BLOCK}", "count blocks from 0")
    return blocks


WhichBlocks = Annotated[str | int | Numbers, AfterValidator(_plausible)]
"""Which blocks of a model, as a field of options: see `block_indices`."""


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

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Height and width `(o, d)` of each matrix that is adapted on its own."""
        return [(stop - start, self.linear.in_features) for start, stop in self.rows]

    def bare(self) -> Target:
        """Return the same target without the numbers of its weight."""
        linear = self.linear
        with_bias = linear.bias is not None
        twin = nn.Linear(linear.in_features, linear.out_features, with_bias, device="meta")
        return replace(self, linear=twin)


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
        match = re.fullmatch(r"last_(\d{1,9})", blocks)
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


def target_fault(targets: Sequence[str]) -> tuple[str, str] | None:
    """Return what is wrong with targets, and a remedy, without looking at a model.

    Args:
        targets: short names or path patterns.
    """
    if isinstance(targets, str) or not targets or None in targets:
        return "targets must be a list of names", "write a list, such as [q, k, v, o]"
    for target in targets:
        if not isinstance(target, str) or not (target in ALIASES or is_pattern(target)):
            remedy = suggest(str(target), ALIASES) + " (or a path pattern such as '*.query')"
            return f"unknown target '{target}'", remedy
    if "qkv" in targets and set(targets) & {"q", "k", "v"}:
        return "qkv overlaps with q, k or v", "name qkv, or q, k and v"
    return None


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
        Targets in the order of `model.named_modules()`, by plain name.

    Raises:
        WaraError: kind `config` when a target matches nothing.
    """
    wrong = target_fault(targets)
    if wrong:
        raise WaraError("config", wrong[0], "adapter.targets", wrong[1])
    short = [target for target in targets if not is_pattern(target)]
    patterns = [target for target in targets if is_pattern(target)]
    every = model.named_modules()
    linears = {plain_name(n): m for n, m in every if isinstance(m, nn.Linear)}
    unmatched = set(targets)
    found: dict[str, dict[str, Rows]] = {}
    if short:
        names = block_names(model)
        if not names:
            remedy = "give path patterns, such as '*.query'"
            what = f"{type(model).__name__} has no blocks to look for {short} in"
            raise WaraError("config", what, "adapter.targets", remedy)
        prefixes = tuple(f"{names[i]}." for i in block_indices(blocks, len(names)))
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


# As many digits as a number within the bound can need: Python refuses to read thousands of them.
_GRAMMAR = re.compile(
    r"\s*(?:(?P<times>\d{1,9}(?:\.\d{0,30})?|\.\d{1,30})\s*\*\s*)?lora_r(?P<rank>\d{1,9})\s*"
)


def parse_budget(text: str | float) -> float:
    """Return a budget as a multiple of what LoRA of rank 1 trains.

    Args:
        text: `lora_r<R>` or `<number>*lora_r<R>`, such as `lora_r4` or `0.8*lora_r1`; a number
            alone is a multiple of rank 1.

    Returns:
        `number · R`, above 0 and at most 1e12.

    Raises:
        WaraError: kind `config` when the text is neither.
    """
    match = _GRAMMAR.fullmatch(text) if isinstance(text, str) else None
    multiple = float(match["times"] or 1) * int(match["rank"]) if match else 0.0
    if isinstance(text, int | float) and not isinstance(text, bool) and math.isfinite(text):
        multiple = float(text)
    shown = repr(text) if len(repr(text)) <= 60 else f"{repr(text)[:57]}..."
    if multiple > _MOST_MULTIPLE:
        what = f"budget {shown} is above {_MOST_MULTIPLE:.0f} times a LoRA of rank 1"
        raise WaraError("config", what, "adapter.budget", "set less, such as lora_r4")
    if multiple <= 0:
        remedy = "write lora_r<rank> or a multiple of it, such as lora_r4, 0.8*lora_r1 or 0.8"
        raise WaraError("config", f"budget {shown} is not understood", "adapter.budget", remedy)
    return multiple


@options
class BlocksMethod(Method):
    """A method that acts in some of the blocks."""

    blocks: WhichBlocks = Field(
        "all", description="Blocks that are adapted: all, last_N, or numbers from 0."
    )


@options
class SizedMethod(BlocksMethod):
    """A method that acts in some of the blocks, and whose size a budget can set."""

    budget: str | float | None = Field(
        None, description="Size instead of the method's own, as lora_r4 or 0.8*lora_r1."
    )

    @field_validator("budget")
    @classmethod
    def _grammar(cls, value: str | float | None) -> str | float | None:
        if value is not None:
            try:
                parse_budget(value)
            except WaraError as error:
                raise fault(error.what, error.remedy) from error
        return value

    @model_validator(mode="before")
    @classmethod
    def _one_size(cls, given: Any) -> Any:
        return one_size(cls.knob, given)

    def find(self, model: nn.Module) -> list[Target]:
        """Return the linear layers that the method adapts; those of a LoRA where it has no own."""
        return find_targets(model, ATTENTION, self.blocks)

    def measured(self, model: nn.Module) -> list[Target]:
        """Return the targets of the LoRA that a budget compares with: `q k v o` of the blocks."""
        return find_targets(model, ATTENTION, self.blocks)

    def knob_range(self, targets: Sequence[Target]) -> tuple[int, int | None]:
        """Return the least and the most useful value of the knob, `None` for no limit."""
        return 1, None

    def turned(self, value: int) -> SizedMethod:
        """Return the method with its knob at a value."""
        change: dict[str, Any] = {self.knob[0]: value}
        return replace(self, **change)

    def forms(self) -> Sequence[SizedMethod]:
        """Return the methods whose knob a budget may turn: itself, and forms left to be chosen."""
        return [self]


@options
class TargetedMethod(SizedMethod):
    """A method that puts one adapter layer on each target."""

    targets: Annotated[tuple[str, ...], from_list] = Field(
        ATTENTION, description="What is adapted: q k v o qkv fc1 fc2, or patterns."
    )

    @field_validator("targets", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        wrong = target_fault(value) if isinstance(value, str | list | tuple) else None
        if wrong:
            raise fault(*wrong)
        return value

    def find(self, model: nn.Module) -> list[Target]:
        """Return the targets in `model`."""
        return find_targets(model, self.targets, self.blocks)

    def measured(self, model: nn.Module) -> list[Target]:
        """Return the targets of the LoRA that a budget compares with.

        They are the method's own where these were chosen. Targets that a paper names for its method
        do not change what a budget is, or methods in one table would have different ones.
        """
        own = fields_of(type(self))["targets"].default
        names = ATTENTION if self.targets == own else self.targets
        return find_targets(model, names, self.blocks)

    def layers(self, model: nn.Module) -> Mapping[str, AdapterLayer]:
        """Return one adapter layer per target, see `build`."""
        found = self.find(model)
        built = self.build(model, [target.bare() for target in found] if is_skeleton() else found)
        return {target.name: layer for target, layer in zip(found, built, strict=True)}

    def build(self, model: nn.Module, targets: Sequence[Target]) -> list[LinearAdapter]:
        """Return one adapter layer for each of some targets of the model, which is not changed."""
        raise TypeError(f"{type(self).__name__} does not define build")
