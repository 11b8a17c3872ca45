"""WaveFT (arXiv 2505.12532), §4, Fig. 3, Lemmas 1 and 2: the rank of an update of `k` numbers.

    python benchmarks/papers/waveft_rank.py

For the shapes of SDXL's attention layers: rank of `C` (SHiRA) and of `IDWT2(C)` (WaveFT) by
singular values, against what theory says of it; the share of draws that have full rank, against
Lemma 1; image and kernel of LoRA's update, against Lemma 2.

Lemma 1: of `n × n` matrices with `k = n (ln n + c)` random places, the share `exp(-2 exp(-c))` has
full rank as `n` grows. It is a limit and bounds nothing at a given `n`.

With values of a continuous distribution the rank of `C` is, with probability 1, its structural
rank: the largest number of places of which no two share a row or a column. For Haar and even sides
`IDWT2(C) = Uᵀ C' V` with `U`, `V` orthogonal, where `C'` is `[[LL, LH], [HL, HH]]` with the two
quadrants off the diagonal exchanged (`LH` is the high-pass across rows). So the rank of a WaveFT
update is the structural rank of the exchanged places; these are as random as the others.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from paper_tools import ANY, RESULTS, figure, update_of, write_figure, write_result, zero_layer
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import structural_rank

from wara.adapters import LoRA, SHiRA, WaveFT
from wara.adapters.base import adapted_layers
from wara.adapters.lora import LoRALayer
from wara.adapters.sparse import draw_places

Shape = tuple[int, int]
SHAPES: tuple[Shape, ...] = ((640, 640), (1280, 1280), (640, 2048), (1280, 2048))
"""`(o, d)` of q, k, v, o of self-attention and of k, v of cross-attention."""
METHODS: dict[str, Any] = {"shira": SHiRA, "waveft": WaveFT}
BUDGETS = (0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5)
EXCESS = tuple(c / 4 for c in range(-8, 13))
"""Values of Lemma 1's `c`."""
FAMILIES = ("haar", "db2", "db3", "coif1", "coif2", "sym2", "sym3", "sym4")
"""Wavelets of the paper's Table 1; `db1` is Haar."""


def numerical_rank(matrix: torch.Tensor) -> int:
    """Return the number of singular values above rounding error."""
    values = torch.linalg.svdvals(matrix)
    limit = values.max() * max(matrix.shape) * torch.finfo(matrix.dtype).eps
    return int((values > limit).sum())


def measured_rank(name: str, shape: Shape, k: int, seed: int) -> int:
    """Return the rank of the update of a SHiRA or WaveFT layer with random numbers."""
    method = METHODS[name](k=k, seed=seed, init="gaussian", targets=ANY)
    torch.manual_seed(seed)
    return numerical_rank(update_of(zero_layer(method, shape, torch.float64)))


def places_of(name: str, shape: Shape, k: int, seed: int) -> np.ndarray:
    """Return the places `[2, k]` whose structural rank is the rank of the update."""
    places = draw_places(shape, k, seed).numpy()
    if name == "shira":
        return places
    half = np.array([[shape[0] // 2], [shape[1] // 2]])
    return places % half + half * (places >= half)[::-1]


def matching(places: np.ndarray, shape: Shape) -> int:
    """Return the structural rank of the places `[2, k]`."""
    entries = np.ones(places.shape[1], dtype=np.int8)
    return int(structural_rank(csr_matrix((entries, (places[0], places[1])), shape=shape)))


def empty_lines(lines: int, length: int, k: int) -> float:
    """Return the expected number of rows (or columns) of that length without any of `k` places."""
    area = lines * length
    log_none = sum(
        sign * math.lgamma(n + 1)
        for sign, n in ((1, area - length), (-1, area - length - k), (-1, area), (1, area - k))
    ) if k <= area - length else -math.inf  # fmt: skip
    return lines * math.exp(log_none)


def bounds(shape: Shape, k: int) -> tuple[float, float]:
    """Return a lower and an upper bound on the expected rank.

    Above: no more than the occupied rows, or columns. Below: one place of each occupied row; these
    are uniform and independent, so `R` occupied rows hit `f(R) = d (1 - (1 - 1/d)^R)` columns on
    average, and as `f` is concave, `E f(R) ≥ E R · f(o) / o`. The same with rows and columns
    exchanged; the better of the two.
    """
    above, below = [], []
    for lines, length in (shape, shape[::-1]):
        occupied = lines - empty_lines(lines, length, k)
        hit = length * (1 - (1 - 1 / length) ** lines)
        above.append(occupied)
        below.append(occupied * hit / lines)
    return max(below), min(*above, float(k))


def asymptotic_rank(shape: Shape, k: int) -> float:
    """Return the rank of a large random sparse matrix (arXiv 1906.05757, Theorem 1.1).

    `rank / d → 1 - max_α Φ(α)`, here with Poisson numbers of places per row and column.
    """
    o, d = shape
    per_row, per_column = k / o, k / d
    gap = np.linspace(0, 1, 20_001)  # 1 - α
    seen = np.exp(-per_row * gap)
    phi = np.exp(-per_column * seen) + o / d * (seen * (1 + per_row * gap) - 1)
    return float(d * (1 - phi.max()))


def full_rank_at(name: str, shape: Shape, seed: int) -> int:
    """Return the smallest `k` from which the update of a seed has full rank.

    The places of a seed are the first `k` of one permutation, so the rank only grows with `k`.
    """
    low, high = min(shape) - 1, min(20 * min(shape), shape[0] * shape[1])
    places = places_of(name, shape, high, seed)
    if matching(places, shape) < min(shape):
        raise ValueError("no full rank within 20 places per row")
    while high - low > 1:
        middle = (low + high) // 2
        if matching(places[:, :middle], shape) < min(shape):
            low = middle
        else:
            high = middle
    return high


def lemma1(shape: Shape, k: int) -> float:
    """Return Lemma 1's limit for the share of full rank, `n` the shorter side.

    The paper uses it for `m × n` matrices too, of which it says the share is higher.
    """
    n = min(shape)
    return math.exp(-2 * math.exp(math.log(n) - k / n))


def no_empty_line(shape: Shape, k: int) -> float:
    """Return the chance that no row or column that full rank needs is empty (they are Poisson).

    The last obstacles to full rank are empty lines of the shorter side, or of either side of a
    square matrix. For that the limit is Lemma 1's; for other shapes it is the square root of it.
    """
    o, d = shape
    return math.exp(-sum(empty_lines(n, m, k) for n, m in ((o, d), (d, o)) if n == min(shape)))


def full_rank(shape: Shape, draws: int) -> dict[str, object]:
    """Return where full rank begins, over many draws, and Lemma 1's share beside the share found.

    Singular values confirm it for the first draw.
    """
    unit, n = sum(shape), min(shape)
    first: dict[str, list[int]] = {name: [] for name in METHODS}
    for seed in range(draws):
        for name in METHODS:
            first[name].append(full_rank_at(name, shape, seed))
    budgets = {f"c = {c:g}": round(n * (math.log(n) + c)) for c in EXCESS}
    budgets |= {f"rank {r}": r * unit for r in (1, 2, 3, 4, 5)}
    shares = [
        {
            "at": at,
            "k": k,
            "lora_r1": k / unit,
            "lemma1": lemma1(shape, k),
            "no_empty_line": no_empty_line(shape, k),
            **{name: float(np.mean(np.array(first[name]) <= k)) for name in METHODS},
        }
        for at, k in budgets.items()
    ]
    found: dict[str, object] = {"draws": draws, "shares": shares}
    for name, each in first.items():
        low, median, high = np.quantile(each, (0.05, 0.5, 0.95)) / unit
        found[name] = {
            "median_lora_r1": float(median),
            "q05_lora_r1": float(low),
            "q95_lora_r1": float(high),
            "seed0_by_svd": measured_rank(name, shape, each[0], 0),
            "seed0_one_less_by_svd": measured_rank(name, shape, each[0] - 1, 0),
        }
    return found


def bottleneck(shape: Shape, rank: int) -> dict[str, float]:
    """Return what Lemma 2 says is 0 for LoRA's update with random factors, and its rank.

    Returns:
        Share of the update outside the span of `B`'s columns; share of it that is left for inputs
        orthogonal to the rows of `A`; rank by singular values.
    """
    torch.manual_seed(0)
    model = zero_layer(LoRA(rank=rank, alpha=rank, targets=ANY), shape, torch.float64)
    (layer,) = adapted_layers(model).values()
    adapter = layer.adapter
    assert isinstance(adapter, LoRALayer)
    torch.nn.init.normal_(adapter.up)
    update = update_of(model)
    span = torch.linalg.qr(adapter.up.detach())[0]
    seen = torch.linalg.qr(adapter.down.detach().T)[0]
    outside = update - span @ (span.T @ update)
    unseen = update - update @ seen @ seen.T
    size = update.norm()
    return {
        "rank": rank,
        "found": numerical_rank(update),
        "outside_span_of_b": float(outside.norm() / size),
        "left_in_kernel_of_a": float(unseen.norm() / size),
    }


def families(shape: Shape, budget: float) -> dict[str, object]:
    """Return the rank of `C` and of `IDWT2(C)` by wavelet, for the same places and numbers."""
    k = round(budget * sum(shape))
    found = {}
    for wavelet in FAMILIES:
        torch.manual_seed(0)
        method = WaveFT(k=k, seed=0, init="gaussian", wavelet=wavelet, targets=ANY)
        found[wavelet] = numerical_rank(update_of(zero_layer(method, shape, torch.float64)))
    return {
        "shape": list(shape),
        "lora_r1": budget,
        "coefficients": matching(places_of("shira", shape, k, 0), shape),
        "update": found,
    }


def measure(
    shape: Shape, budgets: tuple[float, ...], seeds: int, draws: int, svd: list[float]
) -> dict[str, object]:
    """Return all numbers for a shape; singular values at the budgets `svd`."""
    unit, rows = sum(shape), []
    for budget in budgets:
        k = round(budget * unit)
        below, above = bounds(shape, k)
        row: dict[str, object] = {
            "lora_r1": budget,
            "k": k,
            "bound_below": below,
            "bound_above": above,
            "asymptotic": asymptotic_rank(shape, k),
        }
        for name in METHODS:
            found = [matching(places_of(name, shape, k, s), shape) for s in range(seeds)]
            row[name] = {
                "mean": sum(found) / seeds,
                "low": min(found),
                "high": max(found),
                "seed0": found[0],
                "seed0_by_svd": measured_rank(name, shape, k, 0) if budget in svd else None,
            }
        rows.append(row)
        print(shape, row, flush=True)
    full, lora = full_rank(shape, draws), [bottleneck(shape, rank) for rank in (1, 3)]
    print(shape, full, lora, flush=True)
    return {
        "shape": list(shape), "lora_r1": unit, "rows": rows, "full_rank": full, "lora": lora
    }  # fmt: skip


def draw(found: list[dict], path: Path) -> None:
    """Draw the rank, and the share of draws that have full rank, over `k`."""
    fig = figure(3.1 * len(found), 5.6)
    panels = fig.subplots(2, len(found), sharex=True, sharey="row", squeeze=False)
    looks = (("shira", "s", "#009E73"), ("waveft", "x", "#0072B2"))
    for (ax, below), one in zip(panels.T, found, strict=True):
        most, rows = min(one["shape"]), one["rows"]
        x = np.array([row["lora_r1"] for row in rows])
        for key, style, label in (
            ("bound_above", ":", "bounds"),
            ("bound_below", ":", None),
            ("asymptotic", "-", "asymptotic"),
        ):
            ax.plot(x, [row[key] / most for row in rows], style, color="0.5", label=label)
        ax.plot(x, x / most, "--", color="#D55E00", label="LoRA")
        shares = sorted(one["full_rank"]["shares"], key=lambda row: row["k"])
        at = [row["lora_r1"] for row in shares]
        below.plot(at, [row["lemma1"] for row in shares], "-", color="0.3", label="Lemma 1")
        below.plot(at, [row["no_empty_line"] for row in shares], ":", color="0.3",
                   label="no empty line")  # fmt: skip
        below.axvline(3, color="#D55E00", ls="--", lw=1, label="LoRA of rank 3")
        for name, mark, colour in looks:
            ax.plot(x, [row[name]["mean"] / most for row in rows], mark, color=colour,
                    fillstyle="none", markersize=5, label=name)  # fmt: skip
            below.plot(at, [row[name] for row in shares], mark, color=colour, fillstyle="none",
                       markersize=4, label=name)  # fmt: skip
        ax.set(title=f"{one['shape'][0]} x {one['shape'][1]}")
        below.set(xlabel="k / (d + o)")
        ax.grid(alpha=0.25)
        below.grid(alpha=0.25)
    panels[0, 0].set_ylabel("rank / full rank")
    panels[1, 0].set_ylabel("share of draws with full rank")
    panels[0, -1].legend(fontsize=7, loc="center right")
    panels[1, 0].legend(fontsize=7, loc="upper left")
    write_figure(fig, path)


def main(arguments: list[str] | None = None) -> dict[str, object]:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shapes", nargs="+", default=[f"{o}x{d}" for o, d in SHAPES], help="even sides"
    )
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--draws", type=int, default=1000, help="for the share of full rank")
    parser.add_argument("--svd", type=float, nargs="*", default=[1, 3], help="budgets, of BUDGETS")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    shapes = [(int(o), int(d)) for o, d in (text.split("x") for text in args.shapes)]
    if any(side % 2 for shape in shapes for side in shape):
        parser.error("an odd side has more coefficients than entries; give even ones")
    found = [measure(shape, BUDGETS, args.seeds, args.draws, args.svd) for shape in shapes]
    result: dict[str, object] = {
        "shapes": found, "families": [families(shapes[0], budget) for budget in args.svd]
    }  # fmt: skip
    write_result(args.out / "waveft_rank.json", vars(args), result)
    draw(found, args.out / "waveft_rank.png")
    return result


if __name__ == "__main__":
    main()
