"""WaveFT (arXiv 2505.12532), §5.2 and Fig. 7: how many numbers it takes to learn 5 random pairs.

    python benchmarks/papers/waveft_interpolation.py

`W0 = 0`, `[784, 784]`; the update is to map five random `x_i` to five random `y_i`. For WaveFT,
SHiRA and LoRA, each through the layers of this package: the loss after training, and the least
loss that any values of its parameters have. The latter is known in closed form: with `X̃`, `Ỹ` the
pairs (for WaveFT, transformed), each row of a sparse update is a least-squares problem of its own
in its `m` places, so it leaves `max(0, 5 - m)` of 5 dimensions; LoRA of rank `r` leaves all but
the first `r` singular values of `Y`.
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
    write_figure,
    write_result,
    zero_layer,
)
from scipy.stats import hypergeom
from torch import Tensor

from wara.adapters import LoRA, Method, SHiRA, WaveFT
from wara.adapters.sparse import draw_places

SIDE, PAIRS = 784, 5
SPARSE = (784, 1568, 3136, 4704, 7840, 11760, 15680)
RANKS = (1, 2, 3, 4, 5, 6, 8, 10)
ZERO = 1e-4
"""Share of the loss at the start below which we call it zero."""


def pairs(side: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return standard normal inputs and outputs, both `[pairs, side]`, float64."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    x, y = torch.randn(2, count, side, generator=generator, dtype=torch.float64)
    return x, y


def train(method: Method, x: Tensor, y: Tensor, seed: int, steps: int) -> float:
    """Return the loss after training as a share of the loss at the start (L-BFGS)."""
    torch.manual_seed(seed)
    model = zero_layer(method, (y.shape[1], x.shape[1]), torch.float64)
    optimiser = torch.optim.LBFGS(
        trained(model), max_iter=steps, history_size=20, line_search_fn="strong_wolfe",
        tolerance_grad=1e-10, tolerance_change=1e-14,
    )  # fmt: skip

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = (model(x) - y).square().mean() / y.square().mean()
        value.backward()
        return value.detach()

    optimiser.step(loss)
    return loss().item()


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


def measure(side: int, count: int, sparse: list[int], ranks: list[int], seeds: int, steps: int):
    """Return a row per method and size."""
    rows = []
    plan: list[tuple[str, int]] = [("lora", r) for r in ranks]
    plan += [(name, k) for name in ("shira", "waveft") for k in sparse]
    for name, size in plan:
        got, least = [], []
        for seed in range(seeds):
            x, y = pairs(side, count, seed)
            method: Method
            if name == "lora":
                method = LoRA(rank=size, targets=ANY)
                least.append(least_low_rank(size, y))
            else:
                places = draw_places((side, side), size, seed)
                if name == "shira":
                    method = SHiRA(k=size, seed=seed, targets=ANY)
                    least.append(least_sparse(places, x, y))
                else:
                    # λ only rescales the unknowns; 1 suits the optimiser.
                    method = WaveFT(k=size, seed=seed, scale=1.0, targets=ANY)
                    least.append(least_sparse(*in_coefficients(places, x, y)))
            got.append(train(method, x, y, seed, steps))
        row = {
            "method": name,
            "size": size,
            "parameters": size if name != "lora" else size * 2 * side,
            "lora_r1": size / (2 * side) if name != "lora" else float(size),
            "loss": interval(got),
            "losses": got,
            "least": interval(least),
            "leasts": least,
            "expected_least": expected(size, side, count) if name != "lora" else None,
        }
        rows.append(row)
        print(name, size, row["parameters"], f"{max(got):.3g} {max(least):.3g}", flush=True)
    return rows


def draw(rows: list[dict], path: Path) -> None:
    """Draw loss over parameters."""
    fig = figure(6.4, 3.6)
    ax = fig.subplots()
    for name, colour in (("lora", "#D55E00"), ("shira", "#009E73"), ("waveft", "#0072B2")):
        some = [row for row in rows if row["method"] == name]
        x = [row["parameters"] for row in some]
        floor = 1e-8
        ax.plot(x, [max(row["loss"]["mean"], floor) for row in some], "o-", color=colour,
                markersize=4, label=f"{name}, trained")  # fmt: skip
        ax.plot(x, [max(row["least"]["mean"], floor) for row in some], "x:", color=colour,
                label=f"{name}, least possible")  # fmt: skip
    ax.set(yscale="log", xlabel="trained parameters", ylabel="loss / loss at the start",
           title="5 random pairs in 784 dimensions (cut off at 1e-8)")  # fmt: skip
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
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    rows = measure(args.side, args.pairs, args.sparse, args.ranks, args.seeds, args.steps)
    zero = {
        name: min(
            (r["parameters"] for r in rows if r["method"] == name and max(r["losses"]) < ZERO),
            default=None,
        )
        for name in ("lora", "shira", "waveft")
    }
    result: dict[str, object] = {"rows": rows, "zero_from": zero, "zero_is_below": ZERO}
    print("zero from", zero)
    write_result(args.out / "waveft_interpolation.json", vars(args), result)
    draw(rows, args.out / "waveft_interpolation.png")
    return result


if __name__ == "__main__":
    main()
