"""Equal budgets: `budget: lora_r4` picks rank, `k` or `u` so that methods train equally much.

A budget is a multiple of what LoRA of rank 1 trains on the same targets, `Σ (d + o)` over the
adapted matrices; a fused query-key-value layer with all three adapted counts as three matrices.
The sizes here are formulas: nothing is built to be counted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from wara.adapters.base import Method
from wara.errors import WaraError

TOLERANCE = 0.1
"""How far above a budget a method's smallest setting may lie before the budget is refused."""

_GRAMMAR = re.compile(r"\s*(?:(?P<times>\d+(?:\.\d*)?|\.\d+)\s*\*\s*)?lora_r(?P<rank>\d+)\s*")


def parse_budget(text: str | float) -> float:
    """Return a budget as a multiple of what LoRA of rank 1 trains.

    Args:
        text: `lora_r<R>` or `<number>*lora_r<R>`, such as `lora_r4` or `0.8*lora_r1`; a number
            alone is a multiple of rank 1.

    Returns:
        `number · R`, above 0.

    Raises:
        WaraError: kind `config` when the text is neither.
    """
    match = _GRAMMAR.fullmatch(text) if isinstance(text, str) else None
    multiple = float(match["times"] or 1) * int(match["rank"]) if match else 0.0
    if isinstance(text, int | float) and not isinstance(text, bool) and math.isfinite(text):
        multiple = float(text)
    if multiple <= 0:
        remedy = "write lora_r<rank> or a multiple of it, such as lora_r4, 0.8*lora_r1 or 0.8"
        raise WaraError("config", f"budget {text!r} is not understood", "adapter.budget", remedy)
    return multiple


@dataclass(frozen=True)
class Matrix:
    """A frozen matrix that a method adapts on its own.

    Args:
        layer: number of the linear layer that it is part of.
        d: width in.
        o: width out.
    """

    layer: int
    d: int
    o: int


Matrices = Sequence[Matrix]
Size = Callable[[Any, Matrices], int]


@dataclass(frozen=True)
class Knob:
    """How the size of a method is set.

    Args:
        size: trainable parameters of a method on given matrices.
        turn: the method with the knob at a value.
        most: largest useful value; none for no limit.
        least: smallest value.
    """

    size: Size
    turn: Callable[[Any, int], Any]
    most: Callable[[Any, Matrices], int] | None = None
    least: int = 1

    def candidates(self, method: Any, matrices: Matrices, goal: int) -> Iterable[Any]:
        """Return the smallest method, and the two next to `goal`; sizes grow with the knob."""
        low = self.least
        if self.most is not None:
            high = max(low, self.most(method, matrices))
        else:
            high = 2 * low
            while self.size(self.turn(method, high), matrices) < goal:
                high *= 2
        while high - low > 1:
            middle = (low + high) // 2
            if self.size(self.turn(method, middle), matrices) <= goal:
                low = middle
            else:
                high = middle
        return [self.turn(method, value) for value in sorted({self.least, low, high})]


class LoKrKnob(Knob):
    """LoKr: rank, and the factor of the decomposition where it is left to be chosen."""

    def candidates(self, method: Any, matrices: Matrices, goal: int) -> Iterable[Any]:
        """Return every rank below the one from which LoKr no longer decomposes."""
        # Automatic factors split a matrix so evenly that no rank reaches a usual budget.
        factors = (-1, 16, 8, 4, 2) if method.decompose_factor == -1 else (method.decompose_factor,)
        for factor in factors:
            changed = replace(method, decompose_factor=factor)
            sides = [side for m in matrices for side in _lokr_shape(changed, m)[1]]
            for rank in range(1, math.ceil(max(sides) / 2) + 1):
                yield replace(changed, rank=rank)


def _rank(method: Any, value: int) -> Any:
    return replace(method, rank=value)


def _adalora(method: Any, value: int) -> Any:
    # The paper starts at 1.5 times the rank it ends with.
    return replace(method, init_rank=value, rank=max(1, min(value - 1, round(value / 1.5))))


def _cores(method: Any) -> int:
    """Return how many numbers the cores of one adapted matrix hold."""
    subbands, r = 3 * method.level + 1, method.rank
    return {"identity": 0, "scalar": 1, "diag": r, "full": r * r}[method.core] * subbands


def _tiny(method: Any, matrices: Matrices) -> int:
    subbands, u = 3 * method.level + 1, method.coefficients
    owners = {"subband": subbands * len(matrices), "layer": _layers(matrices), "model": 1}
    return owners[method.share] * u


def _tiny_most(method: Any, matrices: Matrices) -> int:
    """Return the freedom that one vector `v` can have: entries of the cores it sets."""
    cores = 3 * method.level + 1
    shared = {
        "subband": 1,
        "layer": cores * min(sum(m.layer == n for m in matrices) for n in range(_layers(matrices))),
        "model": cores * len(matrices),
    }
    return shared[method.share] * method.rank**2


def _layers(matrices: Matrices) -> int:
    return len({m.layer for m in matrices})


def _lokr_shape(method: Any, m: Matrix) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the shapes of the two Kronecker factors."""
    (left_o, right_o), (left_d, right_d) = (
        _factors(side, method.decompose_factor) for side in (m.o, m.d)
    )
    return (left_o, left_d), (right_o, right_d)


def _factors(side: int, factor: int) -> tuple[int, int]:
    """Return the two factors LoKr writes a side as: `factor`, or the nearest below that divides."""
    if factor > 0 and side % factor == 0:
        return factor, side // factor
    most = side if factor == -1 else factor
    best = 1
    for small in range(1, math.isqrt(side) + 1):
        if side % small == 0 and small <= most:
            best = small
    return best, side // best


def _lokr(method: Any, matrices: Matrices) -> int:
    total, r = 0, method.rank
    for m in matrices:
        (a, c), (b, d) = _lokr_shape(method, m)
        low_left = method.decompose_both and r < max(a, c) / 2
        total += r * (a + c) if low_left else a * c
        total += r * (b + d) if r < max(b, d) / 2 else b * d
    return total


def _sum(number: Callable[[Any, Matrix], int]) -> Size:
    return lambda method, matrices: sum(number(method, m) for m in matrices)


def _sparse(method: Any, matrices: Matrices) -> int:
    return sum(method.counts([(m.o, m.d) for m in matrices]))


def _entries(method: Any, matrices: Matrices) -> int:
    return min(m.d * m.o for m in matrices)


KNOBS: dict[str, Knob] = {
    "lora": Knob(_sum(lambda x, m: x.rank * (m.d + m.o)), _rank),
    "wara": Knob(_sum(lambda x, m: x.rank * (m.d + m.o) + _cores(x)), _rank),
    "tiny_wara": Knob(_tiny, lambda x, value: replace(x, coefficients=value), _tiny_most),
    "dora": Knob(_sum(lambda x, m: x.rank * (m.d + m.o) + m.o), _rank),
    "adalora": Knob(_sum(lambda x, m: x.start_rank * (m.d + m.o + 1)), _adalora, least=2),
    "vera": Knob(_sum(lambda x, m: x.rank + m.o), _rank),
    "loha": Knob(_sum(lambda x, m: 2 * x.rank * (m.d + m.o)), _rank),
    "lokr": LoKrKnob(_lokr, _rank),
    "waveft": Knob(_sparse, lambda x, value: replace(x, k=value), _entries),
    "shira": Knob(_sparse, lambda x, value: replace(x, k=value), _entries),
    "fourierft": Knob(
        _sum(lambda x, m: x.n_frequency), lambda x, n: replace(x, n_frequency=n), _entries
    ),
}


def matrices_of(method: Any, model: nn.Module) -> list[Matrix]:
    """Return the matrices that a method with targets would adapt.

    Args:
        method: a method with targets.
        model: the model; it is not changed.

    Raises:
        WaraError: kind `config` when a target matches nothing.
    """
    return [
        Matrix(number, target.linear.in_features, stop - start)
        for number, target in enumerate(method.find(model))
        for start, stop in target.rows
    ]


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
            over a tenth more than wanted; then the smallest budget is named.
    """
    multiple = parse_budget(wanted)
    knob = KNOBS.get(method.name)
    if knob is None:
        what = f"what '{method.name}' trains is fixed, so no budget can be set"
        raise WaraError("config", what, "adapter.budget", "remove it, or choose another method")
    plain: Any = replace(method, budget=None)  # type: ignore[call-arg]
    matrices = matrices_of(plain, model)
    unit = sum(m.d + m.o for m in matrices)
    goal = round(multiple * unit)
    sized = [(knob.size(x, matrices), x) for x in knob.candidates(plain, matrices, goal)]
    least = min(size for size, _ in sized)
    if least > goal * (1 + TOLERANCE):
        what = f"budget {wanted} is {goal:,} parameters, and '{method.name}' has at least {least:,}"
        # Rounded up, so that the budget it names is accepted.
        remedy = f"set {_round_up(least / unit)}*lora_r1 or more"
        raise WaraError("config", what, "adapter.budget", remedy)
    got, fitted = min(sized, key=lambda item: (abs(item[0] - goal), item[0]))
    return fitted, goal, got


def _round_up(number: float) -> str:
    """Return a number above 0 with two digits that count, not below it, as `parse_budget` reads."""
    places = max(0, 1 - math.floor(math.log10(number)))
    return f"{math.ceil(number * 10**places) / 10**places:.{places}f}"
