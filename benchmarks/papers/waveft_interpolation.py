"""WaveFT (arXiv 2505.12532), §5.2, A.3 and Fig. 7: numbers it takes to learn 5 random pairs.

    python benchmarks/papers/waveft_interpolation.py

A matrix of 784 x 784, zero but for the trained numbers, is to map five random `x_i` to five random
`y_i`, both normal. As in A.3: mean squared error, Adam at 0.01, the rate times 0.75 every 500
epochs, 5,000 epochs. The text names SHiRA alone; WaveFT and LoRA are put beside it here. It does
not say these, which are our choice: all five pairs in each step, so that an epoch is a step; zeros
at the start for SHiRA and WaveFT, the usual start for LoRA; `λ = 1`, and `λ = 25`, the paper's
default elsewhere, at the size of the claim; float32.

Beside the loss after training stands the least loss that any values of the parameters have. It is
known in closed form: with `X̃`, `Ỹ` the pairs (for WaveFT, transformed), each row of a sparse update
is a least-squares problem of its own in its `m` places, so it leaves `max(0, 5 - m)` of 5
dimensions; LoRA of rank `r` leaves all but the first `r` singular values of `Y`.

Also: Lemma 3's update is built and sent through a layer; §5.2's bound on the chance that a row has
too few places is computed and counted; and the lemma's second hypothesis, columns that all rows
share, is looked for among random places.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pywt
import torch
from paper_tools import (
    ANY,
    RESULTS,
    figure,
    interval,
    trained,
    update_of,
    write_figure,
    write_result,
    zero_layer,
)
from scipy.stats import binom, hypergeom
from torch import Tensor, nn

import wara
from wara.adapters import LoRA, Method, SHiRA, WaveFT
from wara.adapters.base import adapted_layers
from wara.adapters.sparse import SparseLayer, draw_places

SIDE, PAIRS = 784, 5
SPARSE = (784, 1568, 3136, 4704, 7840, 11760, 15680)
RANKS = (1, 2, 3, 4, 5, 6, 8, 10)
SCALES = (1.0, 25.0)
"""`λ`: ours at all sizes, the paper's default at the last one."""
LR, GAMMA, EVERY, EPOCHS = 0.01, 0.75, 500, 5000
ZERO = 1e-6
"""Share of the loss at the start below which we call it zero."""


def pairs(side: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return standard normal inputs and outputs, both `[pairs, side]`, float64."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    x, y = torch.randn(2, count, side, generator=generator, dtype=torch.float64)
    return x, y


def train(method: Method, x: Tensor, y: Tensor, seed: int, epochs: int = EPOCHS) -> float:
    """Return the loss after training by Adam as a share of the loss at the start."""
    torch.manual_seed(seed)
    x, y = x.float(), y.float()
    model = zero_layer(method, (y.shape[1], x.shape[1]))
    optimiser = torch.optim.Adam(trained(model), lr=LR)
    schedule = torch.optim.lr_scheduler.StepLR(optimiser, EVERY, GAMMA)
    for _ in range(epochs):
        optimiser.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        return float((model(x) - y).double().square().sum() / y.double().square().sum())


def least_sparse(places: Tensor, x: Tensor, y: Tensor) -> float:
    """Return the least loss of `y = C x` with `C` zero but at the places, as a share."""
    rows, columns = places.numpy()
    inputs, outputs = x.numpy(), y.numpy()
    left = 0.0
    for row in range(outputs.shape[1]):
        a, b = inputs[:, columns[rows == row]], outputs[:, row]
        error = b - a @ np.linalg.lstsq(a, b, rcond=None)[0] if a.shape[1] else b
        left += float(error @ error)
    return left / float((outputs**2).sum())


def in_coefficients(places: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return places and pairs such that WaveFT with Haar asks of them what SHiRA would.

    `Y = X ΔWᵀ` and `ΔW = Uᵀ C' V` give `(Y Uᵀ) = (X Vᵀ) C'ᵀ`, `U` and `V` the one-level Haar
    transform along the features; `C'` is `[[LL, LH], [HL, HH]]` with the two quadrants off the
    diagonal exchanged, for `LH` is the high-pass across rows. Even sides.
    """
    bands = [np.concatenate(pywt.dwt(z.numpy(), "haar", mode="zero"), 1) for z in (x, y)]
    half = torch.tensor([[y.shape[1] // 2], [x.shape[1] // 2]])
    high = places >= half
    return places % half + half * high.flip(0), *(torch.from_numpy(band) for band in bands)


def least_low_rank(rank: int, y: Tensor) -> float:
    """Return the least loss of a rank-`r` update; the inputs are independent."""
    energy = torch.linalg.svdvals(y).square()
    return float(energy[rank:].sum() / energy.sum())


def expected(k: int, side: int, count: int) -> float:
    """Return the expected least loss of `k` random places, as a share."""
    m = np.arange(count)
    return float(((count - m) * hypergeom.pmf(m, side * side, side, k)).sum() / count)


def too_few(side: int, count: int, k: int, draws: int) -> dict[str, float]:
    """Return the chance that some row has fewer places than there are pairs.

    Returns:
        §5.2's union bound, whose places fall on rows independently; the same for `k` different
        places, as they are drawn; the share of draws of such places in which it happens.
    """
    rng = np.random.default_rng(0)
    rows = np.full(side, side)
    hits = sum(
        int(rng.multivariate_hypergeometric(rows, k, method="marginals").min() < count)
        for _ in range(draws)
    )
    return {
        "parameters": k,
        "union_bound_independent": float(side * binom.cdf(count - 1, k, 1 / side)),
        "union_bound_different": float(side * hypergeom.cdf(count - 1, side * side, side, k)),
        "counted": hits / draws,
        "draws": draws,
    }


def shared_columns(side: int, k: int, seed: int) -> dict[str, int]:
    """Return how many columns have a place in every row, and in how many rows the best one has."""
    columns = draw_places((side, side), k, seed)[1].bincount(minlength=side)
    return {"in_all_rows": int((columns == side).sum()), "most_rows": int(columns.max())}


def lemma3(side: int, count: int, rank: int, seed: int) -> dict[str, float]:
    """Build the update of Lemma 3's proof, put it into a SHiRA layer, and return what it does.

    Half of the rows `R` have to change, by a `Z` of the given rank; the places are `count` columns
    `C` in those rows, the values `Z_R (X_C)⁻¹`; `W0` is random.

    Returns:
        Numbers used; largest error of an output over the largest output; largest entry outside the
        places; ranks of `Z_R` and of the update.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(side, count, generator=generator, dtype=torch.float64)
    weight = torch.randn(side, side, generator=generator, dtype=torch.float64) / side**0.5
    rows = torch.randperm(side, generator=generator)[: side // 2].sort().values
    columns = torch.randperm(side, generator=generator)[:count].sort().values
    left = torch.randn(len(rows), rank, generator=generator, dtype=torch.float64)
    right = torch.randn(rank, count, generator=generator, dtype=torch.float64)
    wanted = torch.zeros(side, count, dtype=torch.float64).index_copy(0, rows, left @ right)
    linear = nn.Linear(side, side, bias=False, dtype=torch.float64)
    k = len(rows) * count
    with torch.no_grad():
        linear.weight.copy_(weight)
    model = wara.adapt(nn.Sequential(linear), SHiRA(k=k, targets=ANY)).double()
    (layer,) = adapted_layers(model).values()
    adapter = layer.adapter
    assert isinstance(adapter, SparseLayer)
    with torch.no_grad():
        adapter.places.copy_(torch.cartesian_prod(rows, columns).T)
        adapter.refresh()
        adapter.coefficients.copy_(torch.linalg.solve(x[columns].T, wanted[rows].T).T.flatten())
        outputs, targets = model(x.T).T, weight @ x + wanted
    update = update_of(model)
    outside = update.clone()
    outside[rows[:, None], columns] = 0
    return {
        "parameters": k,
        "error": float((outputs - targets).abs().max() / targets.abs().max()),
        "outside": float(outside.abs().max()),
        "rank_wanted": int(torch.linalg.matrix_rank(wanted[rows])),
        "rank_update": int(torch.linalg.matrix_rank(update)),
    }


def measure(side: int, count: int, sparse: list[int], ranks: list[int], seeds: int, epochs: int):
    """Return a row per method, size and `λ`."""
    rows = []
    plan: list[tuple[str, int, float]] = [("lora", r, 1.0) for r in ranks]
    for scale in SCALES:
        sizes = sparse if scale == SCALES[0] else sparse[-1:]
        plan += [(name, k, scale) for name in ("shira", "waveft") for k in sizes]
    for name, size, scale in plan:
        got, least, short = [], [], []
        for seed in range(seeds):
            x, y = pairs(side, count, seed)
            method: Method
            if name == "lora":
                method = LoRA(rank=size, alpha=size, targets=ANY)
                least.append(least_low_rank(size, y))
            else:
                places = draw_places((side, side), size, seed)
                if name == "shira":
                    method = SHiRA(k=size, seed=seed, scale=scale, targets=ANY)
                else:
                    method = WaveFT(k=size, seed=seed, scale=scale, targets=ANY)
                    places, *bands = in_coefficients(places, x, y)
                least.append(least_sparse(places, *((x, y) if name == "shira" else bands)))
                short.append(int((places[0].bincount(minlength=side) < count).sum()))
            got.append(train(method, x, y, seed, epochs))
        row = {
            "method": name,
            "size": size,
            "scale": scale,
            "parameters": size if name != "lora" else size * 2 * side,
            "lora_r1": size / (2 * side) if name != "lora" else float(size),
            "loss": interval(got),
            "losses": got,
            "least": interval(least),
            "leasts": least,
            "expected_least": expected(size, side, count) if name != "lora" else None,
            "rows_with_too_few": short,
        }
        rows.append(row)
        print(name, size, scale, row["parameters"], " ".join(f"{a:.3g}({b:.3g})"
              for a, b in zip(got, least, strict=True)), flush=True)  # fmt: skip
    return rows


def draw(rows: list[dict], path: Path) -> None:
    """Draw loss over parameters."""
    fig = figure(6.4, 3.6)
    ax = fig.subplots()
    for name, colour in (("lora", "#D55E00"), ("shira", "#009E73"), ("waveft", "#0072B2")):
        some = [row for row in rows if row["method"] == name and row["scale"] == SCALES[0]]
        x = [row["parameters"] for row in some]
        floor = 1e-10
        each = [(row["parameters"], max(v, floor)) for row in some for v in row["losses"]]
        ax.plot(*zip(*each, strict=True), ".", color=colour, alpha=0.3, markersize=5)
        ax.plot(x, [max(row["loss"]["mean"], floor) for row in some], "o-", color=colour,
                markersize=4, label=f"{name}, trained, mean")  # fmt: skip
        ax.plot(x, [max(row["least"]["mean"], floor) for row in some], "x:", color=colour,
                label=f"{name}, least possible, mean")  # fmt: skip
    ax.set(yscale="log", xlabel="trained parameters", ylabel="loss / loss at the start",
           title="5 random pairs in 784 dimensions (cut off at 1e-10)")  # fmt: skip
    ax.axvline(15680, color="0.7", zorder=0)
    ax.grid(alpha=0.25)
    ax.legend(fontsize=7)
    write_figure(fig, path)


def main(arguments: list[str] | None = None) -> dict[str, object]:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=SIDE)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--sparse", type=int, nargs="+", default=list(SPARSE))
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--draws", type=int, default=20_000, help="for the share with a short row")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    side, count, sparse = args.side, args.pairs, args.sparse
    chance = [too_few(side, count, k, args.draws) for k in sparse[-2:]]
    built = [lemma3(side, count, rank, 0) for rank in range(1, count + 1)]
    shared = [shared_columns(side, sparse[-1], seed) for seed in range(args.seeds)]
    print(chance, built, shared, sep="\n", flush=True)
    rows = measure(side, count, sparse, args.ranks, args.seeds, args.epochs)
    zero = {
        name: min(
            (
                row["parameters"]
                for row in rows
                if row["method"] == name and row["scale"] == SCALES[0] and max(row["losses"]) < ZERO
            ),
            default=None,
        )
        for name in ("lora", "shira", "waveft")
    }
    result: dict[str, object] = {
        "rows": rows,
        "zero_from": zero,
        "zero_is_below": ZERO,
        "too_few": chance,
        "lemma3": built,
        "shared_columns": shared,
        # Places fill a matrix evenly: a column has one in all rows with chance (k / n²)ⁿ.
        "filled_for_shared_columns": (count / side) ** (1 / side),
    }
    print("zero from", zero)
    write_result(args.out / "waveft_interpolation.json", vars(args), result)
    draw(rows, args.out / "waveft_interpolation.png")
    return result


if __name__ == "__main__":
    main()
