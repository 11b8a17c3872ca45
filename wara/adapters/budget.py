"""Equal budgets: `budget: lora_r4` picks rank, `k` or `u` so that methods train equally much.

A budget is a multiple of what LoRA of rank 1 trains, `Σ (d + o)` over the adapted matrices; a fused
query-key-value layer with all three adapted counts as three matrices. They are those of the targets
that were chosen, and `q k v o` of the same blocks for a method that acts elsewhere by itself.
What a setting trains is counted, not computed: one layer per distinct shape is built without
numbers (on torch's `meta` device).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from wara.adapters.base import Method
from wara.adapters.targets import SizedMethod, Target, TargetedMethod, parse_budget
from wara.errors import WaraError

TOLERANCE = 0.1
"""How far above a budget a method's smallest setting may lie before the budget is refused."""


def size_of(method: SizedMethod, model: nn.Module, targets: Sequence[Target]) -> int:
    """Count what a method trains on targets, without building it.

    Args:
        method: with or without targets.
        model: that the targets were found in; it is not changed.
        targets: all of the method's.

    Returns:
        Trainable numbers. A parameter that layers share counts once.
    """
    if not isinstance(method, TargetedMethod):
        with torch.device("meta"):
            layers = method.layers(model).values()
        return sum({id(p): p.numel() for layer in layers for p in layer.parameters()}.values())
    shapes: Counter[Any] = Counter()
    samples: list[Target] = []
    for target in targets:
        key = (target.linear.in_features, target.linear.out_features, target.rows)
        shapes[key] += 1
        # Two of a kind tell what each layer has for itself from what they share.
        if shapes[key] <= 2:
            samples.append(target.bare())
    with torch.device("meta"):
        built = method.build(model, samples)
    holders = Counter(id(p) for layer in built for p in layer.parameters())
    own: Counter[Any] = Counter()
    shared: dict[int, int] = {}
    for target, layer in zip(samples, built, strict=True):
        key = (target.linear.in_features, target.linear.out_features, target.rows)
        for parameter in layer.parameters():
            if holders[id(parameter)] > 1:
                shared[id(parameter)] = parameter.numel()
            else:
                own[key] += parameter.numel()
    return sum(shared.values()) + sum(
        count * shapes[key] // min(2, shapes[key]) for key, count in own.items()
    )


def fit(method: Method, model: nn.Module, wanted: str | float) -> tuple[Method, int, int]:
    """Set a method's rank, `k` or `u` so that it trains as much as a LoRA would.

    Args:
        method: its own size is replaced; everything else stays.
        model: gives the shapes of the targets; it is not changed.
        wanted: see `parse_budget`.

    Returns:
        The method, the wanted number of trainable adapter parameters, and the number it will have:
        the nearest that the method allows, the smaller of two equally near.

    Raises:
        WaraError: kind `config` when the method has no size to set, or its smallest setting trains
            over a tenth more than wanted, or the largest that its options allow a tenth less; then
            the nearest budget is named. A method that is full, as where every entry of the weights
            trains, takes what it can have.
    """
    multiple = parse_budget(wanted)
    if not method.knob:
        what = f"what '{method.name}' trains is fixed, so no budget can be set"
        raise WaraError("config", what, "adapter.budget", "remove it, or choose another method")
    change: dict[str, Any] = {"budget": None}
    plain: Any = replace(method, **change)
    targets = plain.find(model)
    unit = sum(o + d for target in plain.measured(model) for o, d in target.shapes)
    goal = round(multiple * unit)
    sized = [pair for form in plain.forms() for pair in _near(form, model, targets, goal)]
    sizes = [size for size, _ in sized]
    least, most = min(sizes), max(sizes)
    said = f"budget {wanted} is {goal:,} parameters, and '{method.name}' has"
    # Rounded so that the budget it names is accepted.
    if least > goal * (1 + TOLERANCE):
        remedy = f"set {_rounded(least / unit, math.ceil)}*lora_r1 or more"
        raise WaraError("config", f"{said} at least {least:,}", "adapter.budget", remedy)
    if most < goal * (1 - TOLERANCE) and not _is_full(sized[sizes.index(most)][1], targets):
        remedy = f"set {_rounded(most / unit, math.floor)}*lora_r1 or less"
        raise WaraError("config", f"{said} at most {most:,}", "adapter.budget", remedy)
    got, fitted = min(sized, key=lambda item: (abs(item[0] - goal), item[0]))
    return fitted, goal, got


def _near(
    method: SizedMethod, model: nn.Module, targets: Sequence[Target], goal: int
) -> Iterator[tuple[int, SizedMethod]]:
    """Yield size and method at the least value of the knob, and on both sides of the goal."""
    sizes: dict[int, int] = {}

    def size(value: int) -> int:
        if value not in sizes:
            sizes[value] = size_of(method.turned(value), model, targets)
        return sizes[value]

    least, most = method.knob_range(targets)
    allowed = _last(least, lambda value: _may_be(method, value), most)
    low = _last(least, lambda value: size(value) <= goal, allowed)
    high = min(low + 1, allowed)
    for value in sorted({least, low, high}):
        yield size(value), method.turned(value)


def _may_be(method: SizedMethod, value: int) -> bool:
    """Whether the knob's own bounds let it stand at a value."""
    try:
        method.turned(value)
    except WaraError:
        return False
    return True


def _last(start: int, holds: Callable[[int], bool], most: int | None) -> int:
    """Return the last number from `start` on for which it holds, or `start`; at most `most`."""
    low, step = start, 1
    while (most is None or low + step <= most) and holds(low + step):
        low, step = low + step, 2 * step
    while step > 1:
        step //= 2
        if (most is None or low + step <= most) and holds(low + step):
            low += step
    return low


def _is_full(method: SizedMethod, targets: Sequence[Target]) -> bool:
    """Whether more of the knob would add nothing, so that the method can have no larger size."""
    return getattr(method, method.knob[0]) == method.knob_range(targets)[1]


def _rounded(number: float, way: Callable[[float], int]) -> str:
    """Return a number above 0 with two digits that count, as `parse_budget` reads."""
    places = max(0, 1 - math.floor(math.log10(number)))
    return f"{way(number * 10**places) / 10**places:.{places}f}"
