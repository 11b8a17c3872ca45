"""WaveFT (arXiv 2505.12532), A.2 and Fig. 8: one linear layer as a classifier, by parameters.

    python benchmarks/papers/waveft_classifier.py                # scikit-learn's digits
    python benchmarks/papers/waveft_classifier.py --mnist DIR    # MNIST's four IDX files

`W0 = 0`, no bias: all that is learned is the update, by LoRA of rank 1 to 6, or by SHiRA and WaveFT
at and below the size of rank 1. Every size of every method picks its learning rate on validation
images, with the same places, splits and batches for SHiRA and WaveFT, so that each seed gives a
paired difference. The paper finds SHiRA ahead of WaveFT here.
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
FRACTIONS = (0.1, 0.25, 0.5, 0.75, 1.0)
RATES = (0.03, 0.1, 0.3)
BATCH = 512

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


def splits(mnist: Path | None, seed: int) -> tuple[Split, Split, Split]:
    """Return training, validation and test; centred by the training images."""
    if mnist is not None:
        train, test = read_mnist(mnist)
        train, val = divide(*train, 1 / 6, seed)
    else:
        x, y = load_digits(return_X_y=True)
        pixels = torch.from_numpy(x.astype(np.float32) / 16)
        train, test = divide(pixels, torch.from_numpy(y.astype(np.int64)), 0.3, seed)
        train, val = divide(*train, 0.2, seed)
    mean = train[0].mean(0)
    return (train[0] - mean, train[1]), (val[0] - mean, val[1]), (test[0] - mean, test[1])


def methods(shape: tuple[int, int], seed: int) -> dict[tuple[str, float], Method]:
    """Return a method for each name and size in units of rank 1."""
    unit = sum(shape)
    plan: dict[tuple[str, float], Method] = {
        ("lora", float(r)): LoRA(rank=r, targets=ANY) for r in RANKS
    }
    for fraction in FRACTIONS:
        k = round(fraction * unit)
        plan["shira", fraction] = SHiRA(k=k, seed=seed, targets=ANY)
        # Adam's steps do not depend on λ but through the learning rate: with λ = 1 both methods
        # have the same rates to choose from, and differ in nothing but the transform.
        plan["waveft", fraction] = WaveFT(k=k, seed=seed, scale=1.0, targets=ANY)
    return plan


def accuracy(model: nn.Module, split: Split) -> float:
    """Return the share of right answers."""
    with torch.no_grad():
        return float((model(split[0]).argmax(1) == split[1]).double().mean())


def train(
    method: Method, shape: tuple[int, int], data: Split, lr: float, seed: int, steps: int
) -> nn.Module:
    """Return the layer after Adam with a cosine schedule."""
    torch.manual_seed(seed)
    model = zero_layer(method, shape)
    optimiser = torch.optim.Adam(trained(model), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    order = torch.Generator().manual_seed(seed)
    x, y = data
    for _ in range(steps):
        batch = torch.randint(len(y), (min(BATCH, len(y)),), generator=order)
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimiser.step()
        schedule.step()
    return model


def measure(mnist: Path | None, seeds: int, steps: int) -> list[dict]:
    """Return a row per method and size."""
    scores: dict[tuple[str, float], list[float]] = {}
    sizes: dict[tuple[str, float], int] = {}
    rates: dict[tuple[str, float], list[float]] = {}
    for seed in range(seeds):
        data, val, test = splits(mnist, seed)
        shape = (10, data[0].shape[1])
        for key, method in methods(shape, seed).items():
            found = []
            for lr in RATES:
                model = train(method, shape, data, lr, seed, steps)
                found.append((accuracy(model, val), -lr, accuracy(model, test)))
                sizes[key] = sum(p.numel() for p in trained(model))
            best = max(found)
            scores.setdefault(key, []).append(best[2])
            rates.setdefault(key, []).append(-best[1])
        print(f"seed {seed}", {f"{n} {s:g}": round(v[-1], 3) for (n, s), v in scores.items()},
              flush=True)  # fmt: skip
    return [
        {
            "method": name,
            "lora_r1": size,
            "parameters": sizes[name, size],
            "accuracy": interval(values),
            "accuracies": values,
            "rates": rates[name, size],
        }
        for (name, size), values in scores.items()
    ]


def verdict(rows: list[dict]) -> dict[str, object]:
    """Return the paired differences SHiRA - WaveFT, and whether the paper's observation holds."""
    by = {(row["method"], row["lora_r1"]): row["accuracies"] for row in rows}
    sizes = [size for name, size in by if name == "shira"]
    pair = {s: np.subtract(by["shira", s], by["waveft", s]).tolist() for s in sizes}
    everywhere = np.mean(list(pair.values()), 0).tolist()
    overall = interval(everywhere)
    low, high = overall["low"], overall["high"]
    if low is None or high is None or low <= 0 <= high:
        words = "not decided: the interval of the difference contains 0"
    else:
        words = "holds: SHiRA is ahead" if low > 0 else "does not hold: WaveFT is ahead"
    return {
        "shira_minus_waveft": {str(s): interval(d) for s, d in pair.items()},
        "shira_minus_waveft_mean_over_sizes": overall,
        "observation": words,
    }


def draw(rows: list[dict], name: str, path: Path) -> None:
    """Draw accuracy over parameters with intervals."""
    fig = figure(5.4, 3.6)
    ax = fig.subplots()
    for method, colour in (("lora", "#D55E00"), ("shira", "#009E73"), ("waveft", "#0072B2")):
        some = [row for row in rows if row["method"] == method]
        mean = np.array([row["accuracy"]["mean"] for row in some])
        low = np.array([row["accuracy"]["low"] or row["accuracy"]["mean"] for row in some])
        ax.errorbar([row["parameters"] for row in some], mean, yerr=mean - low, fmt="o-",
                    color=colour, capsize=3, markersize=4, label=method)  # fmt: skip
    ax.set(xlabel="trained parameters", ylabel="test accuracy", title=f"one linear layer, {name}")
    ax.grid(alpha=0.25)
    ax.legend(fontsize=8)
    write_figure(fig, path)


def main(arguments: list[str] | None = None) -> dict[str, object]:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mnist", type=Path, help="folder of MNIST's IDX files, plain or .gz")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    name = "digits" if args.mnist is None else "mnist"
    rows = measure(args.mnist, args.seeds, args.steps)
    result: dict[str, object] = {"data": name, "rows": rows, **verdict(rows)}
    print(result["observation"])
    setting = {**vars(args), "mnist": name == "mnist"}
    write_result(args.out / f"waveft_classifier_{name}.json", setting, result)
    draw(rows, name, args.out / f"waveft_classifier_{name}.png")
    return result


if __name__ == "__main__":
    main()
