"""WaveFT (arXiv 2505.12532), A.2, §6 and Fig. 8: one linear layer as a classifier, by parameters.

    python benchmarks/papers/waveft_classifier.py                # scikit-learn's digits
    python benchmarks/papers/waveft_classifier.py --mnist DIR    # MNIST's four IDX files

As in A.2: one layer from the pixels to 10 classes, in which the adapter alone trains; LoRA of rank
1 to 6, SHiRA and WaveFT (Haar) at and below these sizes; cross-entropy, Adam at 0.01, the rate
halved every 5 epochs, 50 epochs, batches of 64; accuracy on the test images after the last epoch.

The text does not say these, which are our choice: `W0 = 0` and no bias, so that all is learned by
the update; pixels from 0 to 1; zeros at the start for SHiRA and WaveFT, and LoRA's `α = r`, as in
the paper's other experiments; sizes below rank 1; all that with `λ = 1` and with `λ = 25`, the
paper's default elsewhere. Splits, batches and drawn places are the same for SHiRA and WaveFT, so
that each seed gives a paired difference. MNIST is not shipped; digits stand in for it.
"""

from __future__ import annotations

import argparse
import gzip
import math
import struct
from pathlib import Path

import numpy as np
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
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from wara.adapters import LoRA, Method, SHiRA, WaveFT
from wara.errors import WaraError

RANKS = (1, 2, 3, 4, 5, 6)
BELOW = (0.1, 0.25, 0.5, 0.75)
"""Sizes of SHiRA and WaveFT below rank 1, beside those of `RANKS`."""
SCALES = (1.0, 25.0)
LR, GAMMA, EVERY, EPOCHS, BATCH = 0.01, 0.5, 5, 50, 64

Split = tuple[Tensor, Tensor]


def read_idx(path: Path) -> np.ndarray:
    """Return the array of an IDX file of bytes, plain or gzip.

    Two zeros, the type (8: unsigned byte), the number of axes, a big-endian uint32 per axis, data.

    Raises:
        WaraError: kind `data` when the file is not of that form or not whole.
    """
    remedy = "fetch the file again"
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError) as error:
        raise WaraError("data", f"cannot read: {error}", str(path), remedy) from error
    if len(data) < 4 or data[:3] != b"\0\0\x08" or len(data) < 4 + 4 * data[3]:
        raise WaraError("data", "not an IDX file of bytes", str(path), remedy)
    shape = struct.unpack(f">{data[3]}I", data[4 : 4 + 4 * data[3]])
    body = data[4 + 4 * data[3] :]
    if len(body) != math.prod(shape):
        what = f"{len(body):,} bytes of data for the shape {shape}"
        raise WaraError("data", what, str(path), remedy)
    return np.frombuffer(body, dtype=np.uint8).reshape(shape)


def read_mnist(folder: Path) -> tuple[Split, Split]:
    """Return `(images [n, 784] in [0, 1], labels [n])` of training and test from the IDX files.

    Raises:
        WaraError: kind `data` when a file is missing or files do not belong together.
    """
    parts = []
    for part in ("train", "t10k"):
        arrays = []
        for what, axes in (("images", 3), ("labels", 1)):
            names = [
                f"{part}-{what}{dot}idx{axes}-ubyte{end}" for dot in "-." for end in ("", ".gz")
            ]
            path = next((folder / name for name in names if (folder / name).is_file()), None)
            if path is None:
                remedy = f"put {names[0]} or {names[1]} there"
                raise WaraError("data", f"no {part} {what}", str(folder), remedy)
            array = read_idx(path)
            if array.ndim != axes:
                raise WaraError("data", f"{array.ndim} axes, not {axes}", str(path), remedy="")
            arrays.append(array)
        images, labels = arrays
        if len(images) != len(labels):
            what = f"{len(images)} images and {len(labels)} labels of {part}"
            raise WaraError("data", what, str(folder), "fetch the files again")
        flat = torch.from_numpy(images.reshape(len(images), -1).astype(np.float32) / 255)
        parts.append((flat, torch.from_numpy(labels.astype(np.int64))))
    return parts[0], parts[1]


def divide(x: Tensor, y: Tensor, share: float, seed: int) -> tuple[Split, Split]:
    """Return two stratified parts, the second of that share."""
    first, second = train_test_split(
        np.arange(len(y)), test_size=share, random_state=seed, stratify=y.numpy()
    )
    return (x[first], y[first]), (x[second], y[second])


def splits(mnist: Path | None, seed: int) -> tuple[Split, Split]:
    """Return training and test: MNIST's own, or a split of digits by the seed, 70 % to 30 %."""
    if mnist is not None:
        return read_mnist(mnist)
    x, y = load_digits(return_X_y=True)
    pixels = torch.from_numpy(x.astype(np.float32) / 16)
    return divide(pixels, torch.from_numpy(y.astype(np.int64)), 0.3, seed)


Key = tuple[str, float, float]
"""Method, size in units of rank 1, `λ`."""


def methods(shape: tuple[int, int], seed: int) -> dict[Key, Method]:
    """Return a method for each name, size and `λ`."""
    plan: dict[Key, Method] = {
        ("lora", float(r), 1.0): LoRA(rank=r, alpha=r, targets=ANY) for r in RANKS
    }
    for scale in SCALES:
        for size in (*BELOW, *map(float, RANKS)):
            k = round(size * sum(shape))
            plan["shira", size, scale] = SHiRA(k=k, seed=seed, scale=scale, targets=ANY)
            plan["waveft", size, scale] = WaveFT(k=k, seed=seed, scale=scale, targets=ANY)
    return plan


def accuracy(model: nn.Module, split: Split) -> float:
    """Return the share of right answers."""
    with torch.no_grad():
        return float((model(split[0]).argmax(1) == split[1]).double().mean())


def train(
    method: Method, shape: tuple[int, int], data: Split, seed: int, epochs: int = EPOCHS
) -> nn.Module:
    """Return the layer after training by Adam."""
    torch.manual_seed(seed)
    model = zero_layer(method, shape)
    optimiser = torch.optim.Adam(trained(model), lr=LR)
    schedule = torch.optim.lr_scheduler.StepLR(optimiser, EVERY, GAMMA)
    order = torch.Generator().manual_seed(seed)
    x, y = data
    for _ in range(epochs):
        for batch in torch.randperm(len(y), generator=order).split(BATCH):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimiser.step()
        schedule.step()
    return model


def measure(mnist: Path | None, seeds: int, epochs: int) -> list[dict]:
    """Return a row per method, size and `λ`."""
    scores: dict[Key, list[float]] = {}
    fits: dict[Key, list[float]] = {}
    sizes: dict[Key, int] = {}
    for seed in range(seeds):
        data, test = splits(mnist, seed)
        shape = (10, data[0].shape[1])
        for key, method in methods(shape, seed).items():
            model = train(method, shape, data, seed, epochs)
            sizes[key] = sum(p.numel() for p in trained(model))
            scores.setdefault(key, []).append(accuracy(model, test))
            fits.setdefault(key, []).append(accuracy(model, data))
        last = {f"{n} {s:g} λ {c:g}": round(v[-1], 3) for (n, s, c), v in scores.items()}
        print(f"seed {seed}", last, flush=True)
    return [
        {
            "method": name,
            "lora_r1": size,
            "scale": scale,
            "parameters": sizes[name, size, scale],
            "accuracy": interval(values),
            "accuracies": values,
            "training_accuracy": interval(fits[name, size, scale]),
        }
        for (name, size, scale), values in scores.items()
    ]


def sign(difference: dict[str, float | int | None], first: str, second: str) -> str:
    """Return who is ahead, or that the interval of the difference contains 0."""
    low, high = difference["low"], difference["high"]
    if low is None or high is None or low <= 0 <= high:
        return "not decided: the interval of the difference contains 0"
    return f"{first if low > 0 else second} is ahead"


def verdict(rows: list[dict]) -> dict[str, object]:
    """Return paired differences: SHiRA - WaveFT by `λ` and size, and of both to LoRA."""
    by = {(row["method"], row["lora_r1"], row["scale"]): row["accuracies"] for row in rows}
    found: dict[str, object] = {}
    for scale in sorted({scale for name, _, scale in by if name == "shira"}):
        sizes = sorted({size for name, size, c in by if name == "shira" and c == scale})
        pair = {
            s: np.subtract(by["shira", s, scale], by["waveft", s, scale]).tolist() for s in sizes
        }
        overall = interval(np.mean(list(pair.values()), 0).tolist())
        to_lora = {
            name: {
                str(s): interval(np.subtract(by[name, s, scale], by["lora", s, 1.0]).tolist())
                for s in sizes
                if ("lora", s, 1.0) in by
            }
            for name in ("shira", "waveft")
        }
        found[f"{scale:g}"] = {
            "shira_minus_waveft": {str(s): interval(d) for s, d in pair.items()},
            "shira_minus_waveft_mean_over_sizes": overall,
            "observation": sign(overall, "SHiRA", "WaveFT"),
            "minus_lora": to_lora,
        }
    return {"by_scale": found}


def draw(rows: list[dict], name: str, path: Path) -> None:
    """Draw accuracy over parameters with intervals, a panel per `λ`."""
    scales = sorted({row["scale"] for row in rows})
    fig = figure(4.4 * len(scales), 3.6)
    panels = fig.subplots(1, len(scales), sharey=True, squeeze=False)[0]
    for ax, scale in zip(panels, scales, strict=True):
        for method, colour in (("lora", "#D55E00"), ("shira", "#009E73"), ("waveft", "#0072B2")):
            own = scale if method != "lora" else 1.0  # LoRA has no λ
            some = [r for r in rows if (r["method"], r["scale"]) == (method, own)]
            mean = np.array([row["accuracy"]["mean"] for row in some])
            low = np.array([row["accuracy"]["low"] or row["accuracy"]["mean"] for row in some])
            ax.errorbar([row["parameters"] for row in some], mean, yerr=mean - low, fmt="o-",
                        color=colour, capsize=3, markersize=4, label=method)  # fmt: skip
        ax.set(xlabel="trained parameters", title=f"one linear layer, {name}, λ = {scale:g}")
        ax.grid(alpha=0.25)
    panels[0].set_ylabel("test accuracy")
    panels[-1].legend(fontsize=8, loc="lower right")
    write_figure(fig, path)


def main(arguments: list[str] | None = None) -> dict[str, object]:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mnist", type=Path, help="folder of MNIST's IDX files, plain or .gz")
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    name = "digits" if args.mnist is None else "mnist"
    rows = measure(args.mnist, args.seeds, args.epochs)
    result: dict[str, object] = {"data": name, "rows": rows, **verdict(rows)}
    print(result["by_scale"])
    setting = {**vars(args), "mnist": name == "mnist"}
    write_result(args.out / f"waveft_classifier_{name}.json", setting, result)
    draw(rows, name, args.out / f"waveft_classifier_{name}.png")
    return result


if __name__ == "__main__":
    main()
